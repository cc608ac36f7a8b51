# SPDX-License-Identifier: Apache-2.0
"""Experiments of the papers, one module each; a recipe's `task` names the one that does it."""
