# SPDX-License-Identifier: Apache-2.0
"""Memory models in stages: each stage trains its objectives and resumes; comparisons report what was measured."""

import json
import shutil

import pytest
import torch
import yaml
from helpers.damage import flip
from helpers.memory_recipes import SMALL, STAGES, read_memory_recipe

from modeling_memory_mosaic.layout_memory_model import pack_text
from training.evaluate import load_causal_lm
from training.experiments import memory_models, memory_questions
from training.experiments.comparison import Trained
from training.export import verify_export
from training.metrics.token_accuracy.token_accuracy import token_accuracy
from training.paths import CONFIGURATION
from training.recipe import load_recipe
from training.tables import claims_table
from training.tasks import memory_model
from training.tasks.memory_model import begin_stage, build_model, measure, training_flops


RECIPES = CONFIGURATION / "recipe"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    recipe = read_memory_recipe(tmp_path_factory.mktemp("memory"))
    return recipe, memory_model.run(recipe)


def test_each_stage_logs_the_parts_of_its_loss_and_what_memories_hold(trained):
    _, result = trained
    parts = [
        {k for entry in s["learning_curve"] for k in entry if not k.startswith("eval_")} for s in result["stages"]
    ]
    assert [p - {"step", "loss", "train_loss"} for p in parts] == [
        {"autoencoding_loss"},
        {"causal_loss", "copy_loss"},
        {"autoencoding_loss"},
    ]
    for stage in result["stages"]:
        evaluated = [e for e in stage["learning_curve"] if "eval_causal_loss" in e]
        assert len(evaluated) == stage["steps"] / 2
        assert evaluated[-1]["eval_copy_accuracy"] == pytest.approx(stage["metrics"]["copy_accuracy"])
        entry = next(e for e in stage["learning_curve"] if "loss" in e)
        weighted = sum(weight * entry[f"{name}_loss"] for name, weight in stage["objectives"].items())
        assert entry["loss"] == pytest.approx(weighted, abs=2e-3)


def test_a_frozen_encoder_stays_as_it_is(trained):
    recipe, _ = trained
    models = [
        load_causal_lm(recipe.folder / f"{n + 1}-{stage.name}" / "model") for n, stage in enumerate(recipe.stages)
    ]
    for before, after in zip(models, models[1:], strict=False):
        for (name, old), new in zip(
            before.encoder.state_dict().items(), after.encoder.state_dict().values(), strict=True
        ):
            assert torch.equal(old, new), name


def test_a_new_decoder_is_not_the_one_that_the_encoder_was_trained_with(trained):
    recipe, _ = trained
    model = load_causal_lm(recipe.folder / "2-combined" / "model")
    first = build_model(recipe, model.config)
    encoder = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    for other in (model, first):
        old = other.decoder.lm_head.weight.clone()
        begin_stage(other, recipe.stages[2], recipe.seed)
        assert (other.decoder.lm_head.weight - old).norm() > old.norm()
        assert torch.equal(other.decoder.lm_head.weight, other.decoder.model.embed_tokens.weight)
    assert torch.equal(first.decoder.lm_head.weight, model.decoder.lm_head.weight)
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in model.encoder.state_dict().items())


def test_a_stage_does_not_go_on_from_a_changed_checkpoint(trained, tmp_path):
    shutil.copytree(trained[0].folder, tmp_path / "run")
    for name in ("result.json", "2-combined/stage.json", "3-probe/stage.json"):
        (tmp_path / "run" / name).unlink()
    flip(tmp_path / "run" / "2-combined" / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(ValueError, match="2-combined is complete .checkpoint-4: optimizer.pt has changed"):
        memory_model.run(read_memory_recipe(tmp_path))  # it keeps one checkpoint only


@pytest.mark.parametrize("name", ["1-autoencoder/stage.json", "2-combined/model/model.safetensors"])
def test_a_changed_stage_is_refused(name, trained, tmp_path):
    shutil.copytree(trained[0].folder, tmp_path / "run")
    for unfinished in ("result.json", "3-probe/stage.json"):
        (tmp_path / "run" / unfinished).unlink()
    flip(tmp_path / "run" / name)
    with pytest.raises(ValueError, match=f"damaged .*{name.rpartition('/')[2]} has changed since it was written"):
        memory_model.run(read_memory_recipe(tmp_path))


def test_the_finished_model_loads_anywhere_and_measures_the_same(trained):
    recipe, result = trained
    assert len(verify_export(recipe.folder / "model", ["Once"], max_new_tokens=6)[0]) > len("Once")
    windows = memory_questions.prepare_windows(_trained(recipe))["validation"]
    again = measure(load_causal_lm(recipe.folder / "model"), windows, 3)
    assert again.keys() == result["metrics"].keys()
    for name, value in again.items():
        assert value == pytest.approx(result["metrics"][name], rel=1e-5, abs=1e-6), name


def _trained(recipe):
    return Trained("a model", 1, recipe.seed, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("stage, step", [(0, 2), (1, 2)])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(trained, tmp_path, monkeypatch, stage, step):
    recipe, expected = trained

    class Killed(Exception):
        pass

    def die(self, args, state, control, **kwargs):
        if state.global_step == step + 1 and args.output_dir.endswith(recipe.stages[stage].name):
            raise Killed

    again = read_memory_recipe(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("training.loop._ReportProgress.on_step_end", die)
        with pytest.raises(Killed):
            memory_model.run(again)
    assert (again.folder / f"{stage + 1}-{recipe.stages[stage].name}" / f"checkpoint-{step}").is_dir()
    result = memory_model.run(again)
    assert [s["metrics"] for s in result["stages"]] == [s["metrics"] for s in expected["stages"]]


def test_measures_are_means_over_all_targets(trained):
    recipe, _ = trained
    model = load_causal_lm(recipe.folder / "model")
    windows = memory_questions.prepare_windows(_trained(recipe))["validation"].select(range(5))
    ids = torch.tensor(windows["input_ids"][:])
    measures = measure(model, windows, 2)
    text = pack_text(ids)
    logits, targets, _ = model.reconstruct("copy", text, model.gather_memories(text))
    is_right = logits.argmax(-1) == targets
    assert torch.equal(targets.flatten(1), ids[:, :8])
    assert measures["copy_accuracy"] == pytest.approx(is_right.double().mean().item())
    assert measures["copy_exact"] == pytest.approx(is_right.all(-1).double().mean().item())
    assert measures["copy_by_place"] == pytest.approx(is_right.double().mean((0, 1)).tolist())
    scores = token_accuracy(logits.argmax(-1).flatten(0, 1).tolist(), targets.flatten(0, 1).tolist())
    assert [measures[f"copy_{name}"] for name in ("accuracy", "exact", "by_place")] == [
        pytest.approx(scores[name]) for name in ("accuracy", "exact", "by_place")
    ]
    model.config.causal_weight = 1.0
    assert measures["causal_loss"] == pytest.approx(model(ids, labels=ids).causal_loss.item(), rel=1e-5)


def test_operations_are_counted_for_each_stage(tmp_path):
    one, other = (
        training_flops(read_memory_recipe(tmp_path, stages=STAGES[1:2])),
        training_flops(read_memory_recipe(tmp_path)),
    )
    assert other[1:2] == one and len(other) == 3
    # Twice the objectives is more work a step, a frozen encoder less, and twice the steps twice as much.
    stage = {"name": "causal", "objectives": {"causal": 1.0}, "steps": 4}
    causal, both, frozen, longer = (
        training_flops(read_memory_recipe(tmp_path, stages=[stage | settings]))[0]
        for settings in ({}, {"objectives": {"causal": 1.0, "copy": 1.0}}, {"freeze_encoder": True}, {"steps": 8})
    )
    assert frozen < causal < both and longer == 2 * causal
    # Reading persistent memories is a product too, though torch's counter knows of none that sdpa makes on CPUs.
    eight, sixteen, more = (
        training_flops(
            read_memory_recipe(tmp_path, stages=[stage], model_args={"decoder": {"num_persistent_slots": slots}})
        )[0]
        for slots in (8, 16, 24)
    )
    assert more - sixteen == sixteen - eight > 0


@pytest.mark.parametrize("model", ["mosaic-characters", "gpt2-characters"])
def test_an_encoder_comes_from_a_trained_language_model(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.tasks.language_modeling.verify_export", lambda folder, prompts, **options: prompts)
    settings = {"model": model, "tokens": 256, "model_args": {"hidden_size": 16}, "data": {"context_length": 16}}
    settings |= {"training": {"per_device_train_batch_size": 4, "disable_tqdm": True}}
    encoder = {"recipe": "characters_lm", "settings": settings}
    stages = [STAGES[0] | {"freeze_encoder": True, "steps": 2}]
    args = {"encoder": {}, "memory_pooling": "last", "encoder_chunk_positions": False}
    recipe = read_memory_recipe(tmp_path, encoder=encoder, stages=stages, model_args=args)
    memory_model.run(recipe)
    source = load_causal_lm(recipe.encoder_source().folder / "model")
    assert source.config.hidden_size == 16
    trained = load_causal_lm(recipe.folder / "model")
    for name, tensor in source.base_model.state_dict().items():
        assert torch.equal(trained.encoder.backbone.state_dict()[name], tensor), name
    chunk = torch.arange(4)[None]
    torch.testing.assert_close(
        trained.encoder.encode_chunks(chunk)[:, 0], source.base_model(chunk).last_hidden_state[:, -1]
    )

    untrained = read_memory_recipe(tmp_path, encoder=encoder | {"untrained": True}, stages=stages, model_args=args)
    fresh = build_model(untrained, trained.config)
    assert fresh.config.encoder.to_dict() == untrained.encoder_source().build_config().to_dict()
    tables = [each.encoder.get_input_embeddings().weight for each in (fresh, trained)]
    assert tables[0].shape == tables[1].shape and not torch.equal(*tables)


def small_comparison(name, tmp_path):
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    for stages in [values.get("common", {}).get("stages", [])] + [
        run.get("stages", []) for run in values["runs"].values()
    ]:
        for stage in stages:
            stage["steps"] = 3  # a curve of fewer points is left to the table
    for run in values["runs"].values():
        run.get("model_args", {}).pop("chunk_length", None)
        run.pop("data", None), run.pop("training", None), run.pop("model", None)
        run.get("encoder", {}).get("settings", {}).pop("tokens", None)
        if "encoder" in run:
            run["encoder"].setdefault("settings", {}).update(tokens=64, model_args={"hidden_size": 16})
            run["encoder"]["settings"]["training"] = {"per_device_train_batch_size": 4, "disable_tqdm": True}
    small = json.loads(json.dumps(SMALL))
    small["training"]["eval_steps"] = 1
    if name == "memory_fidelity":
        small["model_args"].pop("encoder")
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return load_recipe(path, settings=[{"common": small, "seeds": [0], "workers": 1}])


# One of them is enough for every change.
COMPARISONS = [
    "memory_fidelity",
    *(pytest.param(f"memory_{name}", marks=pytest.mark.slow) for name in ("capacity", "objectives", "positions")),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_tells_what_was_measured(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.tasks.language_modeling.verify_export", lambda folder, prompts, **options: prompts)
    recipe = small_comparison(name, tmp_path)
    result = memory_models.run(recipe)
    labels = list(recipe.runs)
    assert [series["label"] for series in result["measured"]["series"]] == labels
    assert all(f"| {label} |" in result["table"] for label in labels)
    assert list(result["effects"]) == recipe.effect_names
    assert {claim["verdict"] for claim in result["claims"]} == {"undecided"}  # there is one seed
    assert claims_table([result]).count(f"`{name}`") == len(result["claims"]) >= 1
    assert (recipe.folder / f"{name}.png").stat().st_size > 10_000
    first = recipe.trainings[0]
    stages = result["measured"]["series"][0]["seeds"][0]["stages"]
    assert stages == first.result()["stages"]
    assert memory_models.run(recipe) == result
