# SPDX-License-Identifier: Apache-2.0
"""Trainings on artificial languages and their comparisons: resumable, several at once, the best evaluation kept."""

import json

import pytest
import torch
import yaml
from helpers.damage import flip
from safetensors.torch import load_file

from training import parallel
from training.experiments import induction
from training.experiments.regbench import Series, _claim_out_of_distribution, _claims_on_number
from training.paths import CONFIGURATION
from training.recipe import load_recipe, task_module
from training.synthetic import automata
from training.synthetic.automata import AutomataSection
from training.tables import claims_table
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
    values["runs"] = {label: {**SIZES, **run} for label, run in values["runs"].items() if "2" not in label}
    if name == "regbench":
        kept = ("Memory Mosaic", "Transformer, RoPE")
        values["runs"] = {label: run for label, run in values["runs"].items() if label in kept}
        values |= {"transformers": ["Transformer, RoPE"], "num_automata": [6, 7]}
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
    weights = [load_file(f"{folder}/best/model.safetensors") for folder in ("whole", "parts")]
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


def test_the_model_of_the_best_evaluation_is_kept(monkeypatch):
    accuracies = iter([0.2, 0.5, 0.5])
    shown = []

    def score(recipe, model, split):
        if next_is := next(accuracies, None):
            shown.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"accuracy": next_is or 0.0, "loss": 1.0}

    monkeypatch.setattr(symbols, "score", score)
    result = symbols.run(small(output_dir="run"))
    assert result["metrics"]["best_step"] == 4
    best, second = load_file("run/best/model.safetensors"), shown[1]
    assert all((best[name] == second[name]).all() for name in best)
    assert not all((best[name] == shown[2][name]).all() for name in best)


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
    assert result["table"].count("\n") == 5 and len(result["claims"]) == 2 * 3 + 2
    assert claims_table([result]).count("\n") == 9
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


def test_the_induction_comparison_runs(tmp_path):
    recipe = small_comparison(tmp_path, "induction", seeds=[0, 1], workers=1)
    result = task_module("induction").run(recipe)
    assert len(result["measured"]["test"]["Two-block transformer"]) == 2
    assert [row["claim"] for row in result["claims"]]
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


def test_models_of_other_depths_are_refused_for_the_induction_claim(tmp_path):
    with pytest.raises(ValueError, match="1, transformers of 1 and 2"):
        small_comparison(tmp_path, "induction", runs={"Memory Mosaic": {"model": "mosaic-induction"}})


def test_a_failed_training_stops_those_not_begun_and_is_reported(tmp_path):
    fine, bad = small(output_dir="fine"), small(output_dir="bad", seed=1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a file of the user").touch()
    with pytest.raises(ValueError, match="not the folder of a run"):
        parallel.run_all([parallel.recipe_job(bad), parallel.recipe_job(fine)], workers=2)
    assert (tmp_path / "bad" / "a file of the user").exists()


def series(number, accuracy, tvd):
    metrics = {"test": {"accuracy": accuracy, "tvd": tvd}}
    return Series("Memory Mosaic", number, [{"metrics": metrics, "seed": 0}])


def test_the_curve_over_automata_counts_as_reproduced_only_if_it_gets_better():
    better = list(_claims_on_number([series(100, 0.8, 0.6), series(500, 0.9, 0.5)]))
    assert [claim.verdict for claim in better] == ["reproduced", "reproduced"]
    mixed = list(_claims_on_number([series(100, 0.9, 0.6), series(500, 0.8, 0.5)]))
    assert [claim.verdict for claim in mixed] == ["contradicted", "reproduced"]
    assert "0.924, 0.928" in better[0].paper


@pytest.mark.parametrize(
    ("mosaic", "transformer", "verdict"),
    [
        ([0.91, 0.92], [0.5, 0.6], "reproduced"),
        ([0.89, 0.92], [0.5, 0.6], "not at this size"),
        ([0.91, 0.92], [0.5, 0.61], "not at this size"),
        ([0.5, 0.6], [0.7, 0.8], "contradicted"),
    ],
)
def test_verdicts_on_new_automata_take_every_seed(mosaic, transformer, verdict):
    first, second = (
        Series(label, 100, [{"metrics": {"test": {"accuracy": value}}, "seed": 0} for value in values])
        for label, values in (("Memory Mosaic", mosaic), ("Transformer", transformer))
    )
    assert _claim_out_of_distribution(first, second).verdict == verdict


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ([[0.95, 0.96], [0.1, 0.2], [0.8, 0.9]], "reproduced"),
        ([[0.95, 0.80], [0.1, 0.2], [0.8, 0.9]], "not at this size"),
        ([[0.95, 0.96], [0.1, 0.2], [0.8, 0.1]], "not at this size"),
        ([[0.95, 0.96], [0.1, 0.6], [0.8, 0.9]], "not at this size"),
        ([[0.10, 0.10], [0.1, 0.2], [0.8, 0.9]], "contradicted"),
    ],
)
def test_verdicts_on_induction_take_every_seed(accuracies, verdict):
    results = {
        label: [{"metrics": {"test": {"accuracy": accuracy}}} for accuracy in values]
        for label, values in zip(("mosaic", "one", "two"), accuracies, strict=True)
    }
    assert induction._claim(results, informed=0.97).verdict == verdict


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
