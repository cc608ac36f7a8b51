# SPDX-License-Identifier: Apache-2.0
"""Trainings on artificial languages and their comparisons: resumable, several at once, the best evaluation kept."""

import json
import math
import shutil

import pytest
import torch
import yaml
from helpers.damage import flip
from safetensors.torch import load_file

from training import parallel
from training.experiments import comparison, regbench
from training.paths import CONFIGURATION
from training.recipe import load_recipe, task_module
from training.synthetic import automata
from training.synthetic.automata import AutomataSection
from training.tasks import symbols


RECIPES = CONFIGURATION / "recipe"
AUTOMATA = {"num_automata": 6, "num_test": 6, "num_strings": [2, 3], "string_length": [1, 8]}
TRAINING = {
    "max_steps": 6,
    "eval_steps": 2,
    "save_steps": 3,
    "logging_steps": 2,
    "per_device_train_batch_size": 4,
    "disable_tqdm": True,
}
SIZES = {"model_args": {"hidden_size": 16}}
TWO_BLOCKS = {"num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def small(name="regbench_training", **settings):
    data = AUTOMATA if name == "regbench_training" else {"num_sequences": 24, "num_test": 4, "length": 64}
    return load_recipe(RECIPES / f"{name}.yaml", settings=[{"data": data, "training": TRAINING}, SIZES, settings])


def small_comparison(tmp_path, name, **settings):
    """A shipped comparison of models as small as they come; two of a language's models are enough."""
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    data = AUTOMATA if name == "regbench" else {"num_sequences": 24, "num_test": 4, "length": 64}
    data = {key: value for key, value in data.items() if key != "num_automata"}
    values["common"] = {"data": data, "training": TRAINING}
    values["runs"] = {label: {**SIZES, **run} for label, run in values["runs"].items()}
    if name == "regbench":
        kept = ("Memory Mosaic", "Transformer, RoPE")
        values["runs"] = {label: run for label, run in values["runs"].items() if label in kept}
        effect = "accuracy (Memory Mosaic - Transformer, RoPE; 7 automata)"
        claim = {"claim": "it is ahead", "paper": "not asked", "effects": [effect], "above": 0.02}
        values |= {"num_automata": [6, 7], "claims": [claim]}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | settings, sort_keys=False), encoding="utf-8")
    return load_recipe(path)


@pytest.mark.parametrize("name", ["regbench_training", "induction_training"])
def test_an_interrupted_training_ends_as_one_that_was_not(name, monkeypatch):
    whole = symbols.run(small(name, output_dir="whole"))
    recipe = small(name, output_dir="parts")
    shares = []

    def interrupt(folder, share):
        shares.append(share)
        if len(shares) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("training.loop.report_progress", interrupt)
        with pytest.raises(KeyboardInterrupt):
            symbols.run(recipe)
    assert not (recipe.folder / "result.json").exists()
    parts = symbols.run(recipe)
    for key in ("metrics", "tokens", "steps", "learning_curve", "parameters"):
        assert parts[key] == whole[key], key
    kept = [path.name for path in (recipe.folder).glob("best*")]
    assert sorted(kept) == (["best", "best_loss"] if name == "regbench_training" else ["best"])
    for best in kept:
        weights = [load_file(f"{folder}/{best}/model.safetensors") for folder in ("whole", "parts")]
        assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


def test_a_changed_best_model_or_checkpoint_is_not_used(monkeypatch, caplog):
    recipe = small(output_dir="run", training={"save_total_limit": 2})
    whole = symbols.run(recipe)
    (recipe.folder / "result.json").unlink()
    flip(recipe.folder / "checkpoint-6" / "rng_state.pth")
    again = symbols.run(recipe)
    assert "checkpoint-6 is damaged" in caplog.text
    assert (again["metrics"], again["learning_curve"]) == (whole["metrics"], whole["learning_curve"])
    (recipe.folder / "result.json").unlink()
    flip(recipe.folder / "best" / "model.safetensors")
    with pytest.raises(ValueError, match="best is damaged .model.safetensors has changed"):
        symbols.run(recipe)


def test_a_changed_data_set_is_drawn_again(caplog):
    recipe = small(output_dir="run")
    before, folder = symbols.LANGUAGES["automata"].provenance(recipe.data), automata.data_folder(recipe.data)
    flip(folder / "train.parquet")
    assert symbols.LANGUAGES["automata"].provenance(recipe.data) == before
    assert "train.parquet has changed since it was written): it is removed and made again" in caplog.text


def test_the_models_of_the_best_evaluations_are_kept(monkeypatch):
    scores = iter([(0.2, 2.0), (0.5, 3.0), (0.5, 1.5)])
    shown = []

    def score(recipe, model, split):
        shown.append({name: value.clone() for name, value in model.state_dict().items()})
        accuracy, loss = next(scores)
        return {"accuracy": accuracy, "loss": loss}

    monkeypatch.setattr(symbols, "score", score)
    metrics = symbols.run(small(output_dir="run"))["metrics"]
    assert (metrics["best_step"], metrics["best_loss_step"]) == (4, 6)  # of equal accuracies the first
    for folder, number in (("best", 1), ("best_loss", 2)):
        kept = load_file(f"run/{folder}/model.safetensors")
        assert all((kept[name] == shown[number][name]).all() for name in kept)
        assert not all((kept[name] == shown[3 - number][name]).all() for name in kept)


def test_a_loss_that_is_not_a_number_is_never_the_best(monkeypatch):
    scores = iter([math.nan, 2.0, math.nan])
    monkeypatch.setattr(symbols, "score", lambda *_: {"accuracy": 0.5, "loss": next(scores)})
    assert symbols.run(small(output_dir="run"))["metrics"]["best_loss_step"] == 4


def test_a_training_of_a_version_that_kept_one_model_is_refused():
    recipe = small(output_dir="run")
    symbols.run(recipe)
    (recipe.folder / "result.json").unlink()
    shutil.rmtree(recipe.folder / "best_loss")
    with pytest.raises(ValueError, match="kept no model of the best loss; move run away"):
        symbols.run(recipe)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"training": {"eval_strategy": "no"}}, "eval_strategy"),
        ({"training": {"num_train_epochs": 2}}, "exactly one"),
        ({"model_args": {"vocab_size": 7}}, "20 tokens"),
        ({"data": {"num_autamata": 7}}, "num_automata"),
        ({"data": {"language": "latin"}}, "latin"),
        ({"data": {"num_strings": [3, 1]}}, "num_strings"),
    ],
)
def test_bad_recipes_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        small(**settings)


def test_a_folder_of_another_recipe_is_refused():
    symbols.run(small(output_dir="run"))
    with pytest.raises(ValueError, match="another recipe"):
        symbols.run(small(output_dir="run", training={"learning_rate": 1e-3}))


def test_a_comparison_runs(tmp_path):
    recipe = small_comparison(tmp_path, "regbench", seeds=[0], workers=1)
    result = task_module("regbench").run(recipe)
    assert [row["label"] for row in result["measured"]["series"]] == 2 * ["Memory Mosaic", "Transformer, RoPE"]
    assert [row["num_automata"] for row in result["measured"]["series"]] == [6, 6, 7, 7]
    assert len(result["measured"]["units"]) == 8  # two layers of two memories of two heads
    for picture in ("regbench.png", "regbench_units.png"):
        assert (recipe.folder / picture).stat().st_size > 10_000
    assert result["table"].count("\n") == 5
    # Effects are the differences of what the trainings measured, however they come by their intervals.
    trained = {(t.label, t.recipe.data.num_automata): t.result()["metrics"] for t in recipe.trainings}
    mosaic, transformer = (trained[label, 7]["test"]["accuracy"] for label in recipe.runs)
    name = "accuracy (Memory Mosaic - Transformer, RoPE; 7 automata)"
    assert result["effects"][name]["value"] == pytest.approx(mosaic - transformer, abs=2e-4)
    assert result["effects"][name]["basis"] == "3 automata, 1 seed"
    fitted = [trained["Memory Mosaic", number]["test"]["fitted_tvd"] for number in (6, 7)]
    name = "fitted TVD (Memory Mosaic; 7 - 6 automata)"
    assert result["effects"][name]["value"] == pytest.approx(fitted[1] - fitted[0], abs=2e-4)
    assert result["effects"].keys() == set(recipe.effect_names) and len(result["claims"]) == 1
    assert all("finished" in line for path, line in task_module("regbench").plan(recipe).items() if "seed0" in path)


@pytest.mark.slow
def test_a_comparison_measures_the_same_however_many_train_at_once(tmp_path):
    one = small_comparison(tmp_path, "regbench", seeds=[0], workers=1)
    many = small_comparison(tmp_path, "regbench", seeds=[0], workers=2, output_dir="many")
    assert one.hash == many.hash
    result = task_module("regbench").run(many)
    assert len(list((tmp_path / "runs/regbench_training").glob("*.log"))) == 4
    (tmp_path / "runs").rename(tmp_path / "set_aside")  # trained again, one after the other
    again = task_module("regbench").run(one)
    for row, other in zip(again["measured"]["series"], result["measured"]["series"], strict=True):
        assert row["seeds"][0]["test"] == pytest.approx(other["seeds"][0]["test"], rel=1e-4)


def test_the_comparison_at_the_papers_size_can_be_planned():
    recipe = load_recipe(RECIPES / "regbench_paper.yaml", ["num_automata=[100]", "claims=[]"])
    lines = task_module("regbench").plan(recipe)
    assert lines["trainings"] == 3 * 6
    assert sum("parameters, to be trained" in str(line) for line in lines.values()) == 3 * 6
    for training in recipe.trainings:
        # The authors choose the epoch on validation automata.
        assert training.recipe.training.eval_strategy == "epoch" and training.recipe.training.num_train_epochs == 200


@pytest.mark.slow
def test_the_induction_comparison_runs(tmp_path):
    recipe = small_comparison(tmp_path, "induction", seeds=[0, 1], workers=1)
    result = task_module("induction").run(recipe)
    assert len(result["measured"]["test"]["Two-block transformer"]) == 2
    assert len(result["claims"]) == 3 and result["effects"].keys() == set(recipe.effect_names)
    assert (recipe.folder / "induction.png").is_file()
    assert json.loads((recipe.folder / "result.json").read_text())["table"].count("\n") == 5


@pytest.mark.parametrize("model", ["lstm", "mamba2", "rwkv", "linear", "gpt2", "rope", "rope-shift"])
def test_baselines_see_nothing_of_what_comes_later(model):
    recipe = load_recipe(RECIPES / "regbench_training.yaml", [f"model={model}-regbench"])
    network = symbols.build_model(recipe).eval()
    ids = torch.randint(0, 18, (2, 40), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 18
    with torch.no_grad():
        logits, others = (network(input_ids=rows, use_cache=False).logits[..., :20] for rows in (ids, changed))
    torch.testing.assert_close(logits[:, :30], others[:, :30])
    assert not torch.allclose(logits[:, 30], others[:, 30])


def test_a_claim_about_a_block_is_refused_for_models_of_other_depths():
    with pytest.raises(ValueError, match=r"measures no effect 'accuracy .*Memory Mosaic, 1 block"):
        load_recipe(RECIPES / "induction.yaml", settings=[{"runs": {"Memory Mosaic": {"model_args": TWO_BLOCKS}}}])


def test_a_training_that_diverges_is_named_as_such(tmp_path, monkeypatch):
    recipe = small(output_dir=str(tmp_path / "run"))
    monkeypatch.setattr(symbols, "score", lambda *_: {"accuracy": 0.5, "loss": float("nan")})
    with pytest.raises(ValueError, match="the loss on the validation split was never a finite number"):
        symbols.run(recipe)


def test_a_training_without_a_temperature_is_refused(tmp_path, monkeypatch):
    recipe = small_comparison(tmp_path, "regbench", seeds=[0], workers=1)
    monkeypatch.setattr(comparison.Trained, "result", lambda _: {"metrics": {"best_step": 4, "test": {"tvd": 0.5}}})
    with pytest.raises(ValueError, match="measured by an earlier version, without a temperature: move the folder"):
        regbench._series(recipe, recipe.trainings)


@pytest.mark.slow
def test_a_failed_training_stops_those_not_begun_and_is_reported(tmp_path):
    fine, bad = small(output_dir="fine"), small(output_dir="bad", seed=1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a file of the user").touch()
    with pytest.raises(ValueError, match="not the folder of a run"):
        parallel.run_all([parallel.recipe_job(bad), parallel.recipe_job(fine)], workers=2)
    assert (tmp_path / "bad" / "a file of the user").exists()


@pytest.mark.slow
def test_the_bar_counts_jobs_and_not_what_they_train_besides(tmp_path, capfd):
    jobs = [
        parallel.Job(tmp_path / name, parallel.report_progress, (tmp_path / f"{name}-adapter", 1.0)) for name in "abc"
    ]
    parallel.run_all(jobs, workers=2)
    bar = capfd.readouterr().err
    assert "trainings: 3.00 of 3 |" in bar and "of None" not in bar


def test_automata_default_to_the_sizes_of_regbench():
    section = AutomataSection(language="automata")
    assert section.model_dump(exclude={"language", "seed", "num_automata"}) == {
        "num_test": 500,
        "num_states": (4, 12),
        "num_symbols": (4, 18),
        "num_edges": (1, 3),
        "num_strings": (10, 19),
        "string_length": (1, 49),
    }
