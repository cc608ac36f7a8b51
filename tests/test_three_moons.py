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
from conftest import flip
from kinds import CONTINUOUS_VARIANTS, make_continuous

from training.experiments import moon_training, moons, three_moons
from training.experiments.moon_training import (
    SECTIONS,
    absolute_weights,
    deviation_curve,
    identity_model,
    moons_by_head,
    nearness_to_permutation,
    permutation_measures,
    predict_from_prefixes,
    section_means,
    train_part,
)
from training.recipe import CONFIGURATION, load_recipe
from training.result import read_result, write_result


RECIPE = CONFIGURATION / "recipe" / "three_moons.yaml"
TINY = ["length=108", "steps=12", "batch_size=3", "num_windows=3", "horizon=5", "eval_stride=2", "save_steps=5"]


@pytest.fixture
def tiny(tmp_path):
    """Load the shipped recipe with small sizes."""

    def read(*overrides):
        return load_recipe(RECIPE, [*TINY, f"output_dir={tmp_path / 'run'}", *overrides], [{"seeds": [0, 1]}])

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
    curve = deviation_curve(identity_model(recipe, heads, beta), windows, lengths, 25)
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
    model = moon_training.build_model(tiny(), 3)
    windows = moons.draw_windows(moons.VALIDATION_TRIPLE, 5, 108, seed=0)
    lengths = [1, 30, 103]
    curve = deviation_curve(model, windows, lengths, 5)
    for length, deviation in zip(lengths, curve, strict=True):
        expected = (model.predict(windows[:, :length], 5) - windows[:, length : length + 5]).abs().mean()
        assert deviation == pytest.approx(expected.item(), rel=1e-5)


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
    ],
)
def test_nearness_to_a_permutation(matrix, expected):
    assert nearness_to_permutation(np.array(matrix)) == pytest.approx(expected)
    scaled = np.array(matrix) * [[0.2], [7], [1]]
    assert nearness_to_permutation(scaled[[2, 0, 1]]) == pytest.approx(expected)


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


def test_weights_are_rows_of_heads_and_columns_of_moons(tiny):
    model = identity_model(tiny(), 3, 50.0)
    with torch.no_grad():
        model.memory.k_proj.weight[:, 0, 2] = torch.tensor([3.0, 4.0])  # head 0 also looks at moon 2
        model.memory.o_proj.weight[:, 2, 0] = torch.tensor([0.0, 2.0])  # head 0 also predicts moon 2
    weights = absolute_weights(model)
    assert weights["W_phi"][0].tolist() == [1.0, 0.0, 5.0]
    assert weights["W_z"][0].tolist() == [1.0, 0.0, 2.0]


def test_an_interrupted_training_ends_with_the_same_bits(tiny, tmp_path, monkeypatch):
    steps = []

    def interrupt(folder, share):
        steps.append(round(12 * share))
        if steps == list(range(1, 9)):
            raise KeyboardInterrupt

    recipe = tiny()
    train_part(recipe, 3, 1, tmp_path / "whole")
    monkeypatch.setattr(moon_training, "tell_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_part(recipe, 3, 1, tmp_path / "cut")
    train_part(recipe, 3, 1, tmp_path / "cut")
    assert steps == [*range(1, 9), *range(6, 13)]
    whole, cut = (moon_training.load_part(tmp_path / name) for name in ("whole", "cut"))
    assert whole[1]["losses"] == cut[1]["losses"] and len(cut[1]["losses"]) == 12
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, cut[0].state_dict()[name])
    assert not (tmp_path / "cut" / "checkpoint").exists()


@pytest.mark.parametrize("name", ["checkpoint/model.safetensors", "checkpoint/optimizer.bin", "model/training.json"])
def test_a_part_whose_state_has_changed_is_trained_again(name, tiny, tmp_path, monkeypatch, caplog):
    recipe = tiny()
    train_part(recipe, 3, 1, tmp_path / "whole")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if name.startswith("model"):
            patch.setattr(moon_training, "measure", interrupt)
        else:
            patch.setattr(moon_training, "tell_progress", lambda _, share: interrupt() if share > 0.6 else None)
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
        moon_training.load_part(tmp_path / "cut")


def test_a_loss_that_is_no_number_ends_the_training(tiny, tmp_path):
    with pytest.raises(ValueError, match="the loss is nan at step"):
        train_part(tiny("learning_rate=1e30", "loss_clip=null"), 3, 0, tmp_path / "part")


def test_the_experiment_runs_and_a_second_call_shows_it(tiny, monkeypatch):
    recipe = tiny()
    assert "to be trained" in three_moons.plan(recipe)["3 heads, seed 1"]
    result = three_moons.run(recipe)
    assert [(part["heads"], part["seed"]) for part in result["measured"]["trained"]] == list(recipe.parts)
    assert result["recipe_hash"] == recipe.hash and result["commit"] is None or "hash" in result["commit"]
    assert len(result["measured"]["trained"][0]["curves"]["validation"]) == len(range(1, 104, 2))
    assert result["table"].count("\n| trained | 3 | 0, 1 |") == 2
    assert {claim["verdict"] for claim in result["claims"]} <= {"reproduced", "not at this size", "contradicted"}
    assert "reproduced" == result["claims"][-1]["verdict"]  # identity weights, whatever is trained
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
        for system, deviations in theirs["sections"].items():
            assert ours["sections"][system] == pytest.approx(deviations, rel=1e-3), system


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


@pytest.mark.parametrize(
    ("failures", "verdict"), [(0, "reproduced"), (1, "reproduced"), (2, "not at this size"), (3, "contradicted")]
)
def test_verdicts_count_the_seeds(failures, verdict):
    together = [0.2 if seed < failures else 0.95 for seed in range(3)]
    parts = [part(1, seed, *(FAILED if seed < failures else ONE_HEAD)) for seed in range(3)]
    parts += [
        part(3, seed, *(FAILED if seed < failures else THREE_HEADS), together=together[seed]) for seed in range(3)
    ]
    identities = [{"heads": heads, "beta": 5000.0} | sections(*ONE_HEAD) for heads in (1,)]
    *trained, identity = three_moons._claims(parts, identities)
    assert [claim.verdict for claim in trained] == [verdict] * 4
    assert identity.verdict == "reproduced"
    assert f"{3 - failures} of 3 seeds" in trained[1].ours
    assert ("(not " + ", ".join(map(str, range(failures))) + ")" in trained[1].ours) == (failures > 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["heads=[2]"], "heads.0"),
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
