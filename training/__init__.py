# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation and export of Memory Mosaics, run from the clone: `python -m training VERB ...`."""
