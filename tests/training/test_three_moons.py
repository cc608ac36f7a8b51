# SPDX-License-Identifier: Apache-2.0
"""Three moons: data, predictions, measures, exact resumption, and verdicts that follow from the numbers."""

import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.damage import flip
from helpers.kinds import CONTINUOUS_VARIANTS, make_continuous

from training.experiments import three_moons
from training.paths import CONFIGURATION
from training.recipe import load_recipe
from training.result import read_result, write_result
from training.synthetic import moons
from training.tasks import moon_model, narrow_attention
from training.tasks.moon_model import (
    SECTIONS,
    absolute_weights,
    deviations,
    identity_model,
    moons_by_head,
    nearness_to_permutation,
    permutation_measures,
    predict_from_prefixes,
    section_means,
    train_part,
)


RECIPE = CONFIGURATION / "recipe" / "three_moons.yaml"
TINY = ["length=108", "steps=12", "batch_size=3", "num_windows=3", "horizon=5", "eval_stride=2", "save_steps=5"]


@pytest.fixture
def tiny(tmp_path):
    """Load the shipped recipe with small sizes."""

    def read(*overrides):
        few = {"seeds": [0, 1], "heads": [1, 3, 4]}
        return load_recipe(RECIPE, [*TINY, f"output_dir={tmp_path / 'run'}", *overrides], [few])

    return read


def test_the_nine_systems_have_the_smallest_common_periods():
    candidates = itertools.combinations([0.5, 1, 1.5, 2, 2.5, 3, 3.5], 3)
    smallest = sorted(moons.common_period(triple) for triple in candidates)[:9]
    systems = [*moons.TRAINING_TRIPLES, moons.VALIDATION_TRIPLE]
    assert len(set(systems)) == 9
    assert sorted(map(moons.common_period, systems)) == smallest == [2, 3, 3, 3, 3, 5, 6, 6, 6]
    assert set(moons.VALIDATION_TRIPLE) <= set().union(*moons.TRAINING_TRIPLES)  # only their combination is new


def test_landmarks_are_where_the_moons_stand_as_before():
    assert moons.landmarks((1.0, 2.0, 3.0), 800) == pytest.approx([44.4, 88.9, 133.3, 266.7], abs=0.05)
    marks = [round(mark) for mark in moons.landmarks((3.0, 1.0, 2.0), 900)]
    assert marks == [50, 100, 150, 300]
    system = moons.observe(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([17]), 900)[0].unflatten(-1, (3, 2))
    for moon, mark in enumerate(marks[:3]):
        torch.testing.assert_close(system[mark:, moon], system[:-mark, moon], rtol=0, atol=1e-5)
        assert (system[1:mark, moon] - system[0, moon]).norm(dim=-1).min() > 0.03
    assert (system[1:300] - system[0]).abs().amax((1, 2)).min() > 0.05
    first = moons.observe(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0]), 900)[0, 0]
    assert first.tolist() == pytest.approx([math.sin(0.3), math.cos(0.3)] * 3)


def test_batches_are_windows_of_training_systems_and_depend_on_the_seed_alone():
    windows = moons.TrainingWindows(4, 50, 100, seed=3)
    assert windows[2].shape == (50, 100, 6)
    assert torch.equal(windows[2], moons.TrainingWindows(4, 50, 100, seed=3)[2])
    assert not torch.equal(windows[2], windows[1])
    assert windows.starts.min() >= 0 and windows.starts.max() + 100 <= moons.TRAJECTORY_LENGTH
    assert set(windows.systems.unique().tolist()) == set(range(8))
    system, start = windows.systems[1, 7], windows.starts[1, 7]
    time = (start + 5).item() / (100 / 18)
    angles = [0.3 + 2 * math.pi * time / period for period in moons.TRAINING_TRIPLES[system]]
    expected = [function(angle) for angle in angles for function in (math.sin, math.cos)]
    assert windows[1][7, 5].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("heads", "beta", "expected"),
    [
        (1, 5000, [0.604, 0.604, 0.604, 0.604, 0.018]),
        (3, 5000, [0.604, 0.323, 0.131, 0.011, 0.013]),
        (1, 50, [0.609, 0.608, 0.609, 0.608, 0.161]),
    ],
)
def test_identity_weights_predict_from_the_periods_on(heads, beta, expected):
    recipe = load_recipe(RECIPE)
    # Up to twice the common period: beyond it there are two pairs to average, and less blur.
    lengths = [10, 24, 38, 50, 66, 82, 94, 110, 126, 140, 180, 220, 255, 275, 350, 430, 505]
    windows = moons.draw_windows(moons.VALIDATION_TRIPLE, 16, 800, seed=0)
    curve = deviations(identity_model(recipe, heads, beta), windows, lengths, 25).mean(0)
    sections = section_means(curve, lengths, moons.landmarks(moons.VALIDATION_TRIPLE, 800))
    for deviation, value in zip(sections.values(), expected, strict=True):
        assert deviation == pytest.approx(value, rel=0.05, abs=0.01)


@pytest.mark.parametrize("variant", list(CONTINUOUS_VARIANTS))
def test_continuing_all_prefixes_together_equals_each_alone(variant):
    model = make_continuous(**CONTINUOUS_VARIANTS[variant])
    size, generator = model.config.observation_size, torch.Generator().manual_seed(0)
    observations = torch.randn(2, 14, size, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([14, 1, 2, 7])
    together = predict_from_prefixes(model, observations, lengths, 5)
    assert together.shape == (2, 4, 5, size)
    for index, length in enumerate(lengths.tolist()):
        alone = model.predict(observations[:, :length], 5)
        torch.testing.assert_close(together[:, index], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("lengths", "num_steps", "message"),
    [([0, 3], 2, "numbers from 1 to 5"), ([6], 2, "numbers from 1 to 5"), ([5], 0, "num_steps=0 must be positive")],
)
def test_impossible_prefixes_are_refused(lengths, num_steps, message):
    model = make_continuous()
    observations = torch.ones(2, 5, model.config.observation_size, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        predict_from_prefixes(model, observations, torch.tensor(lengths), num_steps)


def test_deviation_is_that_of_continuing_each_prefix(tiny):
    model = moon_model.build_model(tiny(), 3)
    windows = moons.draw_windows(moons.VALIDATION_TRIPLE, 5, 108, seed=0)
    lengths = [1, 30, 103]
    of_windows = deviations(model, windows, lengths, 5)
    for length, column in zip(lengths, of_windows.T, strict=True):
        expected = (model.predict(windows[:, :length], 5) - windows[:, length : length + 5]).abs().mean((1, 2))
        assert column == pytest.approx(expected.numpy(), rel=1e-5)


def test_sections_lie_between_the_periods():
    lengths = list(range(1, 12))
    sections = section_means(np.array(lengths) * 1.0, lengths, [2.5, 4.4, 6.6, 8.2])
    assert sections == dict(zip(SECTIONS, [1.5, 3.5, 5.5, 7.5, 10.0], strict=True))


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ([[0, 2, 0], [0, 0, 0.1], [5, 0, 0]], 1.0),
        ([[1, 1, 1], [1, 1, 1], [1, 1, 1]], 0.0),
        ([[3, 0, 0], [1, 0, 0], [2, 0, 0]], 0.0),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 0]], 0.5),
        ([[1, 1, 0], [1, 1, 0], [0, 0, 1]], 0.5),
        ([[0, 0, 0]] * 3, 0.0),
        # More rows than columns: an idle row, one that shares a column with another, a mixed one beside three good.
        ([[0, 2, 0], [0, 0, 0], [0, 0, 0.1], [5, 0, 0]], 1.0),
        ([[1, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 1]], 1.0),
        ([[1, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]], 1.0),
        ([[1, 0, 0], [2, 0, 0], [0, 1, 0], [0, 3, 0]], 0.5),
        ([[1, 1, 1]] * 5, 0.0),
    ],
)
def test_nearness_to_a_permutation(matrix, expected):
    assert nearness_to_permutation(np.array(matrix)) == pytest.approx(expected)
    scaled = np.array(matrix) * np.linspace(0.2, 7, len(matrix))[:, None]
    assert nearness_to_permutation(np.roll(scaled, 1, 0)) == pytest.approx(expected)


def test_three_permutations_are_one_only_if_they_agree():
    eye, turned = np.eye(3), np.eye(3)[[1, 2, 0]]
    agreeing = permutation_measures({"W_phi": turned, "W_psi": 3 * turned, "W_z": turned})
    assert set(agreeing.values()) == {1.0}
    differing = permutation_measures({"W_phi": eye, "W_psi": turned, "W_z": turned})
    assert differing["W_phi"] == differing["W_psi"] == 1.0 and differing["together"] == pytest.approx(0.5)


def test_identity_weights_give_each_moon_a_head(tiny):
    recipe = tiny()
    assert np.array(moons_by_head(identity_model(recipe, 3, 50.0), recipe)) == pytest.approx(np.eye(3))
    assert moons_by_head(identity_model(recipe, 1, 50.0), recipe) == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(("heads", "coordinates"), [(1, 3), (2, 4), (3, 3), (4, 4), (6, 6)])
def test_heads_have_room_for_all_moons_and_spare_ones_change_no_prediction(heads, coordinates, tiny):
    recipe = tiny()
    model, three = identity_model(recipe, heads, 50.0), identity_model(recipe, 3, 50.0)
    assert model.memory.k_proj.weight.shape == (2, coordinates, 3)
    windows = moons.draw_windows(moons.VALIDATION_TRIPLE, 2, 108, seed=0)
    same = torch.allclose(model(windows).predictions, three(windows).predictions, atol=1e-6)
    assert same == (heads >= 3)


def test_weights_are_rows_of_heads_and_columns_of_moons(tiny):
    model = identity_model(tiny(), 3, 50.0)
    with torch.no_grad():
        model.memory.k_proj.weight[:, 0, 2] = torch.tensor([3.0, 4.0])  # head 0 also looks at moon 2
        model.memory.o_proj.weight[:, 2, 0] = torch.tensor([0.0, 2.0])  # head 0 also predicts moon 2
    weights = absolute_weights(model)
    assert weights["W_phi"][0].tolist() == [1.0, 0.0, 5.0]
    assert weights["W_z"][0].tolist() == [1.0, 0.0, 2.0]


@pytest.mark.parametrize("heads", [1, 2, 3, 5])
def test_the_attention_of_a_training_has_the_function_and_gradients_of_the_model(heads, tiny):
    recipe = tiny()
    # More rows than heads at once, and more observations than queries at once, of which some are left over.
    model = moon_model.build_model(recipe, heads).double()
    observations = moons.TrainingWindows(1, 7, 150, 0)[0].double()
    found = {}
    for name in ("eager", "sdpa", narrow_attention.NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        output = model(observations, labels=observations)
        output.loss.backward()
        found[name] = [output.predictions.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
    for name in ("eager", "sdpa"):
        for ours, theirs in zip(found[narrow_attention.NAME], found[name], strict=True):
            assert theirs.abs().max() > 1e-4
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_large_scores_do_not_overflow_in_a_training(tiny):
    model = moon_model.build_model(tiny(), 3, beta=5000.0)
    observations = moons.TrainingWindows(1, 2, 100, 0)[0]
    losses = []
    for name in ("sdpa", narrow_attention.NAME):
        model.set_attn_implementation(name)
        losses.append(model(observations, labels=observations).loss)
    torch.testing.assert_close(*losses)
    losses[1].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_attention_of_a_training_refuses_what_it_does_not_compute(tiny):
    model = moon_model.build_model(tiny(), 3)
    model.set_attn_implementation(narrow_attention.NAME)
    with pytest.raises(ValueError, match="whole rows in causal order"):
        model.predict(torch.ones(1, 5, 6), 2)


def test_a_training_uses_the_fast_attention_and_its_model_the_usual_one(tiny, tmp_path, monkeypatch):
    used = []
    forward = narrow_attention.NarrowAttention.forward
    monkeypatch.setattr(
        narrow_attention.NarrowAttention, "forward", staticmethod(lambda *given: used.append(1) or forward(*given))
    )
    train_part(tiny(), 3, 0, tmp_path / "part")
    assert len(used) == 12
    assert moon_model.load_part(tmp_path / "part")[0].config._attn_implementation == "sdpa"


def test_an_interrupted_training_ends_with_the_same_bits(tiny, tmp_path, monkeypatch):
    steps = []

    def interrupt(folder, share):
        steps.append(round(12 * share))
        if steps == list(range(1, 9)):
            raise KeyboardInterrupt

    recipe = tiny()
    train_part(recipe, 3, 1, tmp_path / "whole")
    monkeypatch.setattr(moon_model, "report_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_part(recipe, 3, 1, tmp_path / "cut")
    train_part(recipe, 3, 1, tmp_path / "cut")
    assert steps == [*range(1, 9), *range(6, 13)]
    whole, cut = (moon_model.load_part(tmp_path / name) for name in ("whole", "cut"))
    assert whole[1]["losses"] == cut[1]["losses"] and len(cut[1]["losses"]) == 12
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, cut[0].state_dict()[name])
    assert not (tmp_path / "cut" / "checkpoint").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint/model.safetensors", "checkpoint/optimizer.bin", "model/training.json"])
def test_a_part_whose_state_has_changed_is_trained_again(name, tiny, tmp_path, monkeypatch, caplog):
    recipe = tiny()
    train_part(recipe, 3, 1, tmp_path / "whole")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if name.startswith("model"):
            patch.setattr(moon_model, "measure", interrupt)
        else:
            patch.setattr(moon_model, "report_progress", lambda _, share: interrupt() if share > 0.6 else None)
        train_part(recipe, 3, 1, tmp_path / "cut")
    flip(tmp_path / "cut" / name)
    train_part(recipe, 3, 1, tmp_path / "cut")
    assert f"{name.partition('/')[2]} has changed since it was written): kept as broken-" in caplog.text
    parts = [read_result(tmp_path / folder, "part.json") for folder in ("whole", "cut")]
    assert parts[0].pop("seconds") >= 0 and parts[1].pop("seconds") >= 0 and parts[0] == parts[1]
    flip(tmp_path / "cut" / "part.json")
    with pytest.raises(ValueError, match="part.json is damaged .*remove it and start again"):
        train_part(recipe, 3, 1, tmp_path / "cut")
    flip(tmp_path / "cut" / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="model is damaged .*model.safetensors has changed"):
        moon_model.load_part(tmp_path / "cut")


def test_a_loss_that_is_no_number_ends_the_training(tiny, tmp_path):
    with pytest.raises(ValueError, match="the loss is nan at step"):
        train_part(tiny("learning_rate=1e30", "loss_clip=null"), 3, 0, tmp_path / "part")


@pytest.mark.slow
def test_the_experiment_runs_and_a_second_call_shows_it(tiny, monkeypatch):
    recipe = tiny()
    assert "to be trained" in three_moons.plan(recipe)["3 heads, seed 1"]
    result = three_moons.run(recipe)
    assert [(part["heads"], part["seed"]) for part in result["measured"]["trained"]] == list(recipe.parts)
    assert result["recipe_hash"] == recipe.hash and result["commit"] is None or "hash" in result["commit"]
    assert len(result["measured"]["trained"][0]["curves"]["validation"]) == len(range(1, 104, 2))
    assert result["table"].count("\n| trained, 2 seeds | 4 |") == 2
    assert result["effects"].keys() == set(recipe.effect_names)
    assert [claim["verdict"] for claim in result["claims"]][:3] == ["undecided"] * 3  # two seeds are too few
    for name in ("", "_weights", "_units"):
        assert (recipe.folder / f"three_moons{name}.png").stat().st_size > 10_000
    monkeypatch.setattr(three_moons, "train_part", lambda *_: pytest.fail("trained again"))
    assert three_moons.run(recipe) == json.loads(json.dumps(result))
    assert "finished" in three_moons.plan(recipe)["3 heads, seed 1"]
    assert result["table"] in three_moons.summary(result, recipe.folder)


def test_finished_parts_are_kept_when_others_are_not(tiny):
    recipe = tiny()
    for part, folder in recipe.parts.items():
        folder.mkdir(parents=True)
        write_result({}, folder, name="part.json")
        train_part(recipe, *part, folder)
        assert {path.name for path in folder.iterdir()} == {"part.json", "checksums.json"}


@pytest.mark.slow
def test_several_at_once_end_as_one_after_another(tiny, tmp_path):
    one = three_moons.run(tiny())
    several = three_moons.run(tiny("workers=2", f"output_dir={tmp_path / 'several'}"))
    for ours, theirs in zip(several["measured"]["trained"], one["measured"]["trained"], strict=True):
        assert ours["final_loss"] == pytest.approx(theirs["final_loss"], rel=1e-3)
        for system, values in theirs["sections"].items():
            assert ours["sections"][system] == pytest.approx(values, rel=1e-3), system


def test_how_many_train_at_once_is_not_part_of_the_hash(tiny):
    assert tiny("workers=2", "save_steps=7").hash == tiny().hash != tiny("steps=13").hash


def sections(*values: float) -> dict[str, Any]:
    return {"sections": {"validation": dict(zip(SECTIONS, values, strict=True))}}


def part(heads: int, seed: int, *values: float, together: float = 1.0) -> dict[str, Any]:
    """Return what `part.json` says of deviations and weights, for these deviations by section."""
    return {"heads": heads, "seed": seed, "permutation": {"together": together}} | sections(*values)


ONE_HEAD = (0.6, 0.6, 0.6, 0.6, 0.1)
THREE_HEADS = (0.6, 0.4, 0.2, 0.1, 0.1)
FAILED = (0.6, 0.6, 0.5, 0.5, 0.5)
DIVERGED = (40.0, 8.0, 0.4, 0.2, 0.1)


@pytest.mark.parametrize(
    ("values", "at_the_end", "at_each"),
    [(ONE_HEAD, True, False), (THREE_HEADS, False, True), (FAILED, False, False), (DIVERGED, False, False)],
)
def test_falls_are_distinguished_from_levels(values, at_the_end, at_each):
    deviations = sections(*values)["sections"]["validation"]
    assert three_moons.falls_at_the_end_only(deviations) is at_the_end
    assert three_moons.falls_at_each_period(deviations) is at_each


SEEDS = range(6)


def trained(heads: int, values: list[tuple[float, ...]], together: list[float]) -> list[dict[str, Any]]:
    return [part(heads, seed, *values[seed], together=together[seed]) for seed in SEEDS]


def first(number: int, yes: Any, no: Any) -> list[Any]:
    """Return `yes` for the first seeds and `no` for all others."""
    return [yes if seed < number else no for seed in SEEDS]


def made_up(successes: int, spare: int, late: list[float], solved: float) -> dict[str, Any]:
    """Return what an experiment may measure.

    Args:
        successes: seeds of one and of three heads of which the claims hold.
        spare: seeds of four heads for which the deviation falls at each period.
        late: of each seed, the deviation of three heads between the longest and the common period over that of one.
        solved: deviation of the identity after the period, relative to that before.
    """
    ones, threes = first(successes, ONE_HEAD, FAILED), first(successes, THREE_HEADS, FAILED)
    threes = [(*three[:3], ratio * one[3], three[4]) for three, one, ratio in zip(threes, ones, late, strict=True)]
    rows = trained(1, ones, [0.0] * 6) + trained(3, threes, first(successes, 0.95, 0.4))
    rows += trained(4, first(spare, THREE_HEADS, FAILED), [1.0] * 6)
    windows = {name: [0.6, 0.7, 0.65] for name in SECTIONS}
    late_windows = {name: [solved * 0.6, solved * 0.8, solved * 0.6] for name in ("p3 to lcm", "after lcm")}
    identity = [{"heads": heads, "beta": 5000.0, "windows": windows | late_windows} for heads in (1, 3)]
    return {"trained": rows, "identity": identity}


SUPPORTED, CONTRADICTED, UNDECIDED = ["supported"] * 6, ["contradicted"] * 6, ["undecided"] * 6
CASES = {
    # If all seeds succeed with three heads, more heads have nothing to help with.
    "supported": (made_up(6, 6, [0.15] * 6, 0.02), [*SUPPORTED[:4], "undecided", "supported"]),
    "spare heads help": (made_up(0, 6, [1.1] * 6, 0.5), [*CONTRADICTED[:4], "supported", "contradicted"]),
    "spare heads harm": (made_up(6, 0, [0.15] * 6, 0.1), [*SUPPORTED[:4], "contradicted", "undecided"]),
    "undecided": (made_up(3, 4, first(3, 0.15, 1.2), 0.1), UNDECIDED),
}


@pytest.mark.parametrize("case", CASES)
def test_each_claim_can_get_each_verdict(case):
    measured, verdicts = CASES[case]
    recipe = load_recipe(RECIPE, settings=[{"heads": [1, 3, 4]}])
    found = three_moons.effects(recipe, json.loads(json.dumps(measured)))
    assert sorted(found) == sorted(recipe.effect_names)
    assert [claim.judge(found) for claim in recipe.claims] == verdicts


def test_each_rule_of_the_recipe_is_tried_both_ways():
    by_claim = zip(*(verdicts for _, verdicts in CASES.values()), strict=True)
    assert all({"supported", "contradicted", "undecided"} <= set(verdicts) for verdicts in by_claim)


def test_an_identity_without_single_windows_has_no_interval():
    measured = made_up(6, 6, [0.15] * 6, 0.02)
    for row in measured["identity"]:
        windows = row.pop("windows")
        row["sections"] = {"validation": {name: values[0] for name, values in windows.items()}}
    found = three_moons.effects(load_recipe(RECIPE, settings=[{"heads": [1, 3, 4]}]), measured)
    effect = found["deviation p3 to lcm over that before p1, identity, 3 heads"]
    assert effect.value == pytest.approx(0.02) and effect.low is None


def test_the_table_names_seeds_that_fail():
    rows = [row | {"final_loss": 0.001} for row in made_up(4, 6, [0.15] * 6, 0.02)["trained"] if row["heads"] == 3]
    assert three_moons._counts_line(3, rows)[:3] == ["3", "4 of 6 (0.30 to 0.90)", "4, 5"]


def test_a_claim_on_spare_heads_needs_them():
    with pytest.raises(ValueError, match="measures no effect 'falls at each period, spare heads less 3 heads'"):
        load_recipe(RECIPE, settings=[{"heads": [1, 3]}])
    assert load_recipe(RECIPE, ["claims=[]"], settings=[{"heads": [1, 3]}]).claims == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["heads=[0]"], "heads.0"),
        (["seeds=[1,1]"], "`seeds` names one twice"),
        (["seeds=[-1]"], "cannot be negative"),
        (["horizon=700"], "no prediction would be judged"),
        (["length=20000"], "the length is over 10000"),
        (["eval_stride=30"], "below the shortest period, 22.2"),
        (["windows=3"], "nearest valid name: 'num_windows'"),
    ],
)
def test_bad_recipes_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPE, overrides)


def test_several_launched_processes_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(three_moons, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="2 processes were launched"):
        three_moons.run(tiny())
