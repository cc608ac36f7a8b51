# SPDX-License-Identifier: Apache-2.0
"""Experiments: one file per figure or table of the papers, each the `task` of a recipe.

`TASKS` in `training/recipe.py` registers them. `comparison.py` is what experiments on trained models share.
"""
