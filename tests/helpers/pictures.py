# SPDX-License-Identifier: Apache-2.0
"""What a reader on a phone needs of every picture: texts that are large, within it, and apart from each other."""

import itertools
from collections.abc import Iterator

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from training.figures import SMALLEST_TEXT, WIDTH


def _shown_texts(figure: Figure) -> Iterator[Text]:
    """Yield all texts that are drawn: of the ticks only those within the limits of their axis."""
    ticks = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                ticks |= {tick.label1, tick.label2}
                room = 1e-9 * (high - low)
                if axes.get_visible() and axes.axison and low - room <= tick.get_loc() <= high + room:
                    yield from (text for text in (tick.label1, tick.label2) if text.get_visible())
    hidden = {text for axes in figure.axes if not axes.get_visible() for text in axes.findobj(Text)}
    yield from (text for text in figure.findobj(Text) if text not in ticks | hidden and text.get_visible())


def _box(text: Text) -> Bbox:
    # Not that of an annotation, which its arrow belongs to.
    return Text.get_window_extent(text)


def faults_of(figure: Figure) -> list[str]:
    """Return what a reader cannot read of a figure that was saved, in words."""
    figure.draw_without_rendering()
    texts = [text for text in _shown_texts(figure) if text.get_text().strip()]
    faults = [] if figure.get_figwidth() == WIDTH else [f"it is {figure.get_figwidth():g} inches wide"]
    if (figure.get_facecolor(), matplotlib.rcParams["savefig.facecolor"]) != ((1, 1, 1, 1), "white"):
        faults.append("it is not on white")
    for text in texts:
        if text.get_fontsize() < SMALLEST_TEXT:
            faults.append(f"{text.get_text()!r} is small")
        box = _box(text).padded(-1)
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.width or box.y1 > figure.bbox.height:
            faults.append(f"{text.get_text()!r} leaves the picture")
    # Boxes have room above and below the letters.
    boxes = [(text.get_text(), _box(text).padded(-2)) for text in texts]
    for (one, box), (other, its) in itertools.combinations(boxes, 2):
        if box.x0 < its.x1 and its.x0 < box.x1 and box.y0 < its.y1 and its.y0 < box.y1:
            faults.append(f"{one!r} overlaps {other!r}")
    return faults
