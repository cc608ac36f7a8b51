# SPDX-License-Identifier: Apache-2.0
"""Measures of predictions. Each folder is a module of `evaluate`: a function, a metric that wraps it, and a card."""
