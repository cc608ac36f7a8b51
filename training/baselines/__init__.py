# SPDX-License-Identifier: Apache-2.0
"""Baselines that transformers lacks."""
