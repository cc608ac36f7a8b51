# SPDX-License-Identifier: Apache-2.0
"""Measurements of speed and memory; each module writes the JSON file beside it."""
