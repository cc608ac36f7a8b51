# SPDX-License-Identifier: Apache-2.0
"""Damage to files, as by a bad disk."""

from pathlib import Path


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, at equal size: what a bad disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
