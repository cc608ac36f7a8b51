# SPDX-License-Identifier: Apache-2.0
"""Synthetic data: artificial languages and series, drawn with a seed."""
