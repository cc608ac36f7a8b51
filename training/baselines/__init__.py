# SPDX-License-Identifier: Apache-2.0
"""Baselines that transformers lacks. An import of this package registers them with transformers' Auto classes.

To add one, write its module here, import it below, and put its JSON into `configuration/model`.
"""

from training.baselines import compressor, lstm, mosaic_parts, shifted_rope  # noqa: F401  (each registers its classes)
