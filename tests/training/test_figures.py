# SPDX-License-Identifier: Apache-2.0
"""Pictures: what every reader has to see is in them."""

import pytest

from training.figures import legend_below, new_figure, series_style


@pytest.mark.parametrize("num_columns", [1, 3])
def test_a_legend_of_many_long_names_stays_within_the_picture(num_columns):
    figure, axes = new_figure(1, num_columns)
    height = axes[0, 0].get_window_extent().height
    names = [f"a model with a long name, number {number}" for number in range(13)]
    for number, name in enumerate(names):
        # The first axis lacks one of them.
        axes[0, -1 if number else 0].plot([0, 1], [0, number], **series_style(number), label=name)
    legend_below(figure, axes)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(names)
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
    assert axes[0, 0].get_window_extent().height >= 0.8 * height


def test_thirty_series_look_different():
    assert len({tuple(series_style(number).values()) for number in range(30)}) == 30
