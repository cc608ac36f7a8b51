# SPDX-License-Identifier: Apache-2.0
"""Pictures for the cards of what a run draws no picture of: memories and stories."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from training.figures import better, label_lines, new_figure, save_figure


# By file, what a card says of a picture to those who cannot see it.
ALTERNATIVES = {
    "loss.png": "Loss while the model was trained, by the number of tokens read",
    "stages.png": "Loss and reproduced tokens over the stages of the training",
    "recall.png": "Loss at each place of the texts: behind the memory, without the text, and behind nothing",
    "words.png": "How many stories have how many words",
}
RECALL, WORDS = "recall.png", "words.png"
# By the name of a series in what `measure_recall` returns: its label and its colour.
_SERIES = {
    "alone": ("behind nothing", "#444444"),
    "forgotten": ("without that text", "#E69F00"),
    "behind": ("behind the memory", "#0072B2"),
}


def draw_recall(recall: dict[str, Any], path: Path) -> None:
    """Draw the loss at each place of the texts that a memory holds, as a PNG.

    Args:
        recall: what `memories.measure_recall` returns.
        path: of the picture.
    """
    figure, axes = new_figure(1, 1, height=3.0)
    for name, (label, color) in _SERIES.items():
        losses = recall["by_place"].get(name)
        if losses is not None:
            axes[0, 0].plot(range(2, 2 + len(losses)), losses, color=color, label=label)
    axes[0, 0].set(xlabel="place of the token in its text", ylabel=better("loss (nats per token)", "lower"))
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    label_lines(axes)
    texts = f"{recall['num_texts']} texts" if recall["num_texts"] != 1 else "1 text"
    save_figure(figure, path, "Loss on the texts that the memory holds", f"Means over {texts}.")


def draw_words(counts: Sequence[int], path: Path) -> None:
    """Draw how many stories have how many words as a PNG.

    Args:
        counts: words of each story.
        path: of the picture.
    """
    figure, ((axis,),) = new_figure(1, 1, height=2.6)
    axis.hist(counts, bins=min(40, max(counts) - min(counts) + 1), color="#0072B2")
    axis.set(xlabel="words", ylabel="stories")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    save_figure(figure, path, "How long the stories are", f"{len(counts):,} stories.")
