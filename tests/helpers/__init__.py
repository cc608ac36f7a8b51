# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests: small models, runs, servers; no test file imports another."""
