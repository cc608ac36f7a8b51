# SPDX-License-Identifier: Apache-2.0
"""Text: stories from their source to windows of tokens."""
