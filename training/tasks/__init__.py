# SPDX-License-Identifier: Apache-2.0
"""Tasks: what a recipe asks for; each trains, adapts, searches or makes something, and leaves a result."""
