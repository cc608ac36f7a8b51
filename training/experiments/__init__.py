# SPDX-License-Identifier: Apache-2.0
"""Experiments: one file per figure or table of the papers, each the `task` of a recipe."""
