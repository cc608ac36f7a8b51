# SPDX-License-Identifier: Apache-2.0
"""Publishing: a run becomes a folder that anybody can check, and the folder goes to the Hub."""
