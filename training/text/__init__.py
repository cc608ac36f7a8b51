# SPDX-License-Identifier: Apache-2.0
"""Text: stories, read or written, on their way to windows of tokens."""
