# SPDX-License-Identifier: Apache-2.0
"""A few stories that are hard to read, and how tests write stories into files."""

import json
from typing import Any


END = "<|endoftext|>"
STORIES = [
    'One day, a "fox" came.\nIt was naïve.',
    "Zwei Füße \U0001f600",
    "A \\ and a\ttab",
    "The end.",
]
GOOD_LINE = b'{"text": "good"}\n'


def json_lines(*values: Any) -> str:
    """Return one line of JSON for each value."""
    return "".join(json.dumps(value) + "\n" for value in values)
