# SPDX-License-Identifier: Apache-2.0
"""Pictures: they are drawn from committed numbers alone, and what every reader has to see is in them."""

import itertools

import numpy as np
import pytest
import yaml
from helpers.made_up_results import TASKS as MADE_UP_TASKS
from helpers.made_up_results import made_up
from helpers.pictures import faults_of
from matplotlib.figure import Figure

from training import tables
from training.figures import (
    STYLE,
    better,
    draw_result,
    label_lines,
    legend_below,
    new_figure,
    plot_seeds,
    save_figure,
    styles_of,
)
from training.paths import CONFIGURATION, RESULTS
from training.recipe import TASKS, load_recipe, task_module


# Drawn from a model, which no result holds.
OF_MODELS = {RESULTS / "regbench" / "regbench_units.png"}
LABELS = sorted(
    {
        label
        for path in (CONFIGURATION / "recipe").glob("*.yaml")
        for label in yaml.safe_load(path.read_text(encoding="utf-8")).get("runs", {})
    }
)


@pytest.mark.parametrize("num_columns", [1, 2])
def test_a_legend_of_many_long_names_stays_within_the_picture(num_columns):
    figure, axes = new_figure(1, num_columns)
    height = axes[0, 0].get_window_extent().height
    names = [f"a model with a long name, number {number}" for number in range(13)]
    for number, (name, style) in enumerate(styles_of(names).items()):
        # The first axis lacks one of them.
        axes[0, -1 if number else 0].plot([0, 1], [0, number], **style, label=name)
    legend_below(figure, axes)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(names)
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
    assert axes[0, 0].get_window_extent().height >= 0.8 * height


def test_thirty_series_look_different():
    styles = styles_of(f"series {number}" for number in range(30))
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == 30


def test_a_family_of_models_has_one_colour_beside_any_others():
    families = ["Memory Mosaic", "Memory Mosaic, adaptive bandwidth", "RoPE", "RoPE + shift", "Llama", "GPT-2", "LSTM"]
    colors = {label: styles_of([label])[label]["color"] for label in families}
    assert len(set(colors.values())) == len(families)
    for label in families:
        together = styles_of([*LABELS, label])
        assert together[label]["color"] == colors[label]
        assert styles_of([f"{label}, 2e-3"])[f"{label}, 2e-3"]["color"] == colors[label]


def test_seeds_are_a_median_and_a_band_from_the_lowest_to_the_highest():
    _, ((axis,),) = new_figure(1, 1)
    plot_seeds(axis, [1, 2], [[0.0, 5.0], [1.0, 7.0], [9.0, 6.0]], color="black")
    assert axis.get_lines()[0].get_ydata().tolist() == [1.0, 6.0]
    ends = axis.collections[0].get_paths()[0].vertices
    assert {tuple(end) for end in ends.tolist()} == {(1, 0), (2, 5), (1, 9), (2, 7)}


@pytest.mark.parametrize("ends", [[0.5] * 9, [0, 0, 0, 1, 1, 1], [0.2], list(np.linspace(0, 1, 7))])
def test_labels_at_the_ends_of_lines_keep_apart_and_in_order(ends):
    figure, axes = new_figure(1, 1, height=3.4)
    axis = axes[0, 0]
    for number, end in enumerate(ends):
        axis.plot([0, 1], [1 - end, end], label=f"model {number}")
    label_lines(axes)
    assert faults_of(figure) == []
    places = [text.get_position()[1] for text in axis.texts]
    assert all(low < high for low, high in itertools.pairwise(places))
    if len(ends) == 1:
        assert axis.transData.inverted().transform(axis.transAxes.transform((1, places[0])))[1] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda figure, axis: axis.text(0.1, 0.1, "tiny", fontsize=6), "'tiny' is small"),
        (lambda figure, axis: [axis.text(0.1, 0.1, word) for word in ("one", "other")], "'one' overlaps 'other'"),
        (lambda figure, axis: figure.text(0.9, 0.1, "a text that does not end here"), "leaves the picture"),
        (lambda figure, axis: figure.set_figwidth(11), "it is 11 inches wide"),
        (lambda figure, axis: figure.set_facecolor("none"), "it is not on white"),
        (lambda figure, axis: axis.set_xticks([0, 0.01], ["near", "nearer"]), "'near' overlaps 'nearer'"),
    ],
)
def test_what_cannot_be_read_is_noticed(change, fault):
    figure, ((axis,),) = new_figure(1, 1)
    axis.set_ylabel(better("loss", "lower"))
    assert faults_of(figure) == []
    change(figure, axis)
    assert any(fault in one for one in faults_of(figure))


def test_titles_and_notes_stand_above_the_axes_which_keep_their_height(tmp_path):
    heights = []
    for title, note in (("A title", ""), ("A title of many words, and so of more than one line " * 2, "A note " * 30)):
        figure, ((axis,),) = new_figure(1, 1)
        save_figure(figure, tmp_path / "picture.png", title.strip(), note.strip())
        heights.append(axis.get_window_extent().height)
        assert min(text.get_window_extent().y0 for text in figure.texts) > axis.get_window_extent().y1
    assert heights[0] == pytest.approx(heights[1], rel=0.02)


@pytest.mark.slow
def test_every_committed_picture_is_drawn_from_its_numbers_and_no_other_is_committed(monkeypatch, tmp_path, pictures):
    """The fixture `pictures` reads them as a phone shows them."""
    results = tables.committed_results()
    for result in results:
        (tmp_path / result["name"]).mkdir(exist_ok=True)
    monkeypatch.setattr(tables, "committed_results", lambda: results)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables.draw_pictures()
    drawn = {path.relative_to(tmp_path) for _, path in pictures}
    committed = set(RESULTS.glob("*/*.png")) - OF_MODELS
    assert len(drawn) > 15 and drawn == {path.relative_to(RESULTS) for path in committed}
    for figure, _ in pictures:
        # A title in words, and no key of a configuration anywhere.
        assert figure.texts[0].get_text() and figure.texts[0].get_weight() == "bold"
        words = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
        assert not [word for word in words if "_" in word.replace("W_", "")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("attention_maps", "beyond_training_length", "bound", "bound_recall", "induction", "join_stories"),
        *("memory_context", "memory_cost", "memory_needles", "memory_reads", "memory_size", "memory_fidelity_hub"),
        *("reading", "regbench", "regbench_paper"),
        *("regbench_search_paper", "regbench_search_start", "searching", "stories_tiny_tuning", "streaming"),
        *("suite_mad_recall", "suite_needles_recurrent", "training_curves"),
    ],
)
def test_pictures_of_todays_recipes_can_be_read(name, tmp_path, pictures):
    """The numbers are made up, and models may meet in any place. The fixture `pictures` reads them."""
    recipe = load_recipe(CONFIGURATION / "recipe" / f"{name}.yaml")
    draw_result(recipe, made_up(recipe), tmp_path)
    assert pictures and {path.parent for _, path in pictures} == {tmp_path}


def test_every_task_that_draws_is_drawn_here():
    drawing = {name for name in TASKS if hasattr(task_module(name), "draw")}
    assert drawing == {*MADE_UP_TASKS, "three_moons"}


def test_few_numbers_are_not_drawn(tmp_path, pictures):
    for name in ("suite_mqar", "regbench_recurrent", "memory_capacity_tokens", "regbench_search"):
        recipe = load_recipe(CONFIGURATION / "recipe" / f"{name}.yaml")
        measured = made_up(recipe)
        for part in measured.values():
            if isinstance(part, list):
                del part[3:]
        draw_result(recipe, measured, tmp_path)
    assert pictures == []


def test_pictures_of_one_result_are_drawn_alone(monkeypatch, tmp_path, pictures):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    result = {"name": "induction", "task": "induction"}
    monkeypatch.setattr(tables, "committed_results", lambda: [result | {"measured": {}}, {"name": "stories_tiny"}])
    with pytest.raises(ValueError, match="there are no numbers of 'stories_tiny' to draw .*'induction'"):
        tables.draw_pictures("stories_tiny")
    assert pictures == []


def test_pictures_are_white_where_a_page_is_dark():
    assert STYLE["savefig.facecolor"] == STYLE["figure.facecolor"] == "white"
    assert Figure(facecolor=STYLE["figure.facecolor"]).get_facecolor()[3] == 1
