# SPDX-License-Identifier: Apache-2.0
"""Parts of a memory model's training: encoders and decoders that exist, trained whole, by LoRA, or not at all."""

import json
from contextlib import nullcontext

import pytest
import torch
import yaml
from helpers import publications
from helpers.kinds import FAMILIES
from helpers.memory_recipes import SIZES, SMALL, read_memory_recipe
from helpers.models import make_ids, randomize_parameters
from helpers.publications import ABOUT_SMOKE
from huggingface_hub import ModelCard

from modeling_memory_mosaic.backbones_memory_model import build_decoder
from training.card import About, check_parts
from training.evaluate import load_causal_lm
from training.experiments import memory_models
from training.files import checksum
from training.paths import CONFIGURATION
from training.publishing import publish
from training.recipe import load_recipe
from training.tasks import memory_model
from training.tasks.memory_model import build_model
from training.text.tokenizer import load_tokenizer, train_tokenizer


PROBE = {"name": "probe", "objectives": {"autoencoding": 1.0}, "freeze_encoder": True, "steps": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of small language models of each family, all with one tokenizer of 300 entries."""
    tokenizer = train_tokenizer(["Once upon a time a girl had a red ball. The ball was lost."] * 9, 300)
    made = {}
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        size = {"vocab_size": 300, "pad_token_id": tokenizer.pad_token_id}
        made[family] = tmp_path_factory.mktemp(family)
        model = randomize_parameters(build_decoder(type(config)(**config.to_dict() | tokens | size)))
        model.save_pretrained(made[family])
        tokenizer.save_pretrained(made[family])
    return made


def pretrained_recipe(tmp_path, **settings):
    return read_memory_recipe(tmp_path, **{"tokenizer": None, "stages": [PROBE]} | settings)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_decoder_probes_the_states_of_a_pretrained_model(family, folders, tmp_path):
    encoder = {"pretrained": str(folders[family]), "layer": -2, "pooling": "mean"}
    recipe = pretrained_recipe(tmp_path, encoder=encoder)
    result = memory_model.run(recipe)
    assert len(result["metrics"]["autoencoding_by_place"]) == 4
    assert result["pretrained"]["encoder"]["weights"].keys() == {"model.safetensors"}
    model, source = load_causal_lm(recipe.folder / "model"), load_causal_lm(folders[family])
    for name, tensor in source.base_model.state_dict().items():
        assert torch.equal(model.encoder.backbone.state_dict()[name], tensor), name
    assert load_tokenizer(str(recipe.folder / "model")).get_vocab() == load_tokenizer(str(folders[family])).get_vocab()
    ids = make_ids(3, 4, vocab_size=300)
    expected = source.base_model(ids, output_hidden_states=True).hidden_states[-2].mean(1)
    torch.testing.assert_close(model.encoder(ids).memories[:, 0, 0], expected)
    untrained = pretrained_recipe(tmp_path, encoder=encoder | {"untrained": True})
    table = build_model(untrained, model.config).encoder.get_input_embeddings().weight
    assert table.shape == source.get_input_embeddings().weight.shape
    assert not torch.equal(table, source.get_input_embeddings().weight)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "mosaic", "mamba"])
def test_lora_of_a_pretrained_decoder_is_merged_at_the_end_of_its_stage(family, folders, tmp_path):
    part = {"pretrained": str(folders[family])}
    targets = {"target_modules": ["in_proj"]} if family == "mamba" else {}
    lora = {"name": "lora", "objectives": {"causal": 1.0}, "freeze_encoder": True, "steps": 2}
    lora |= {"lora": {"part": "decoder", "r": 2} | targets, "learning_rates": {"reader": 1e-3, "decoder": 1e-2}}
    recipe = pretrained_recipe(tmp_path, encoder=part, decoder=part, stages=[lora])
    memory_model.run(recipe)
    model, source = load_causal_lm(recipe.folder / "model"), load_causal_lm(folders[family])
    changed = {
        name for name, old in source.state_dict().items() if not torch.equal(model.decoder.state_dict()[name], old)
    }
    names = {"gpt2": ("c_attn", "c_proj", "c_fc"), "mosaic": ("_proj",), "mamba": ("in_proj",)}[family]
    assert changed and all(any(part in name for part in names) for name in changed)
    for name, old in source.base_model.state_dict().items():
        assert torch.equal(model.encoder.backbone.state_dict()[name], old), name
    new = build_model(recipe, model.config)
    assert not torch.equal(model.reader.slot_embeddings, new.reader.slot_embeddings)


ORIGIN = {"base_model": "someone/tales", "license": "mit", "origin": "A small model of tales."}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "mosaic", "mamba"])
def test_a_memory_model_of_pretrained_parts_is_published_with_their_origin(family, folders, tmp_path):
    part = {"pretrained": str(folders[family])}
    stage = {"name": "reader", "objectives": {"causal": 1.0, "copy": 0.5}, "freeze_encoder": True, "steps": 2}
    recipe = pretrained_recipe(tmp_path, encoder=part, decoder=part, stages=[stage])
    memory_model.run(recipe)
    about = tmp_path / "about.yaml"

    def describe(**parts):
        about.write_text(yaml.safe_dump(ABOUT_SMOKE | {"parts": parts}), encoding="utf-8")
        return about

    for names in ([], ["encoder"], ["encoder", "decoder", "reader"]):
        with pytest.raises(ValueError, match=r"the pretrained parts of the run are: decoder \(.*\) and encoder"):
            publish.prepare(recipe.folder, "someone/memory", about=describe(**dict.fromkeys(names, ORIGIN)))
    folder = publications.stage(
        recipe.folder, "someone/memory", about=describe(encoder=ORIGIN | {"base_model": None}, decoder=ORIGIN)
    )
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/tales" and card.data.base_model_relation == "finetune"
    assert "The encoder was a model that is not on the Hub, licence mit. A small model of tales." in card.text
    assert f"`model.safetensors` sha256 `{checksum(folders[family] / 'model.safetensors')[:16]}…`." in card.text


def test_what_is_described_of_parts_is_what_the_run_took():
    """Of the Hub, a part is known by its name; a beginning of the file has it already."""
    taken = {"decoder": {"name": "someone/tales", "commit": "a" * 40, "weights": {}}}
    for base_model, wrong in (("someone/tales", False), ("someone/other", True), (None, True)):
        about = About.model_validate(ABOUT_SMOKE | {"parts": {"decoder": ORIGIN | {"base_model": base_model}}})
        with pytest.raises(ValueError, match="is someone/tales of the Hub") if wrong else nullcontext():
            check_parts(about, {"pretrained": taken})
    with pytest.raises(ValueError, match="the pretrained parts of the run are: none"):
        check_parts(about, {})


def test_each_part_has_its_learning_rate_and_a_frozen_one_stays(folders, tmp_path):
    """A decoder at a rate of nearly 0 stays where it was while the new encoder learns."""
    stages = [
        {"name": "encoder", "objectives": {"causal": 1.0}, "freeze_decoder": True, "steps": 2},
        {"name": "all", "objectives": {"causal": 1.0}, "learning_rates": {"decoder": 1e-12}, "steps": 2},
    ]
    recipe = pretrained_recipe(tmp_path, decoder={"pretrained": str(folders["llama"])}, stages=stages)
    memory_model.run(recipe)
    source = load_causal_lm(folders["llama"])
    first, last = (load_causal_lm(recipe.folder / name / "model") for name in ("1-encoder", "2-all"))
    for name, old in source.state_dict().items():
        assert torch.equal(first.decoder.state_dict()[name], old), name
        torch.testing.assert_close(last.decoder.state_dict()[name], old, rtol=0, atol=1e-8)
    models = (build_model(recipe, last.config), first, last)
    weights = [model.encoder.get_input_embeddings().weight for model in models]
    assert (weights[0] - weights[1]).abs().max() > 1e-4 and (weights[1] - weights[2]).abs().max() > 1e-4
    assert first.encoder.config.vocab_size == 300


def test_a_stage_of_lora_resumes_where_it_was_interrupted(folders, tmp_path, monkeypatch):
    part = {"pretrained": str(folders["gpt2"])}
    stage = {"name": "lora", "objectives": {"causal": 1.0}, "freeze_encoder": True, "steps": 4}
    stage |= {"lora": {"part": "decoder", "r": 2}}
    whole = pretrained_recipe(tmp_path / "whole", encoder=part, decoder=part, stages=[stage])
    expected = memory_model.run(whole)
    recipe = pretrained_recipe(tmp_path / "broken", encoder=part, decoder=part, stages=[stage])
    compute_loss, steps = memory_model.MemoryModelTrainer.compute_loss, []

    def interrupted(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(memory_model.MemoryModelTrainer, "compute_loss", interrupted)
        memory_model.run(recipe)
    assert memory_model.run(recipe)["metrics"] == expected["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["characters_lm", "memory_characters"])
def test_a_decoder_of_another_recipe_is_trained_first(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.tasks.language_modeling.verify_export", lambda folder, prompts, **options: prompts)
    training = {"per_device_train_batch_size": 4, "disable_tqdm": True}
    settings = {"tokens": 256, "model_args": {"hidden_size": 16}, "data": {"context_length": 16}, "training": training}
    part = {"recipe": "characters_lm", "settings": settings}
    encoder = part
    if source == "memory_characters":  # an autoencoder's encoder before a language model as decoder
        stages = [{"name": "autoencoder", "objectives": {"autoencoding": 1.0}, "steps": 2}]
        args = {"encoder": SIZES, "decoder": SIZES, "chunk_length": 4}
        settings = {"model_args": args, "stages": stages, "data": {"context_length": 16}, "training": training}
        encoder = {"recipe": source, "settings": settings}
    args = {"encoder": {}, "memory_pooling": "last", "encoder_chunk_positions": source == "memory_characters"}
    stages = [{"name": "causal", "objectives": {"causal": 1.0}, "freeze_encoder": True, "steps": 1}]
    stages[0]["freeze_decoder"] = True
    recipe = read_memory_recipe(tmp_path, encoder=encoder, decoder=part, stages=stages, model_args=args)
    memory_model.run(recipe)
    model = load_causal_lm(recipe.folder / "model")
    decoder = load_causal_lm(recipe.part_source("decoder").folder / "model")
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(model.decoder.state_dict()[name], tensor), name
    given = load_causal_lm(recipe.part_source("encoder").folder / "model")
    ids = torch.arange(8)[None]
    if source == "memory_characters":
        assert torch.equal(model.encoder(ids).memories, given.encoder(ids).memories)
    else:
        last = given.base_model(ids[:, :4]).last_hidden_state[:, -1]
        torch.testing.assert_close(model.encoder(ids).memories[:, 0, 0], last)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": {"pretrained": "gpt2"}}, "name an exported folder, or a model on the Hub as USER/NAME"),
        ({"encoder": {"pretrained": "a/b"}}, "with its `revision`"),
        ({"encoder": {}}, "give either `recipe`, which trains the model, or `pretrained`"),
        ({"encoder": {"recipe": "characters_lm", "revision": "main"}}, "`revision` is of a `pretrained` model"),
        ({"encoder": {"recipe": "characters_lm", "layer": 1}}, "set `model_args.encoder_layer`"),
        ({"encoder": {"pretrained": "LLAMA", "settings": {"a": 1}}}, "a `pretrained` model is taken as it is"),
        ({"encoder": {"pretrained": "LLAMA"}, "tokenizer": {"vocab_size": 300}}, "comes with its own tokenizer"),
        ({}, "missing key 'tokenizer'"),
        (
            {"encoder": {"pretrained": "LLAMA"}, "decoder": {"recipe": "characters_lm"}},
            "a part of another recipe reads by that recipe's tokenizer",
        ),
        ({"encoder": {"pretrained": "LLAMA", "layer": 7}}, "encoder_layer=7, but the encoder has 2 blocks"),
        ({"stages": [PROBE | {"lora": {"part": "encoder"}}]}, "freeze the other part, and that one not"),
        (
            {"stages": [PROBE | {"learning_rates": {"encoder": 0.1}}]},
            "the encoder is frozen, and has no learning rate",
        ),
    ],
)
def test_mistakes_in_parts_are_named(settings, message, folders, tmp_path):
    text = json.dumps(settings).replace("LLAMA", str(folders["llama"]))
    with pytest.raises(ValueError, match=message):
        pretrained_recipe(tmp_path, **json.loads(text))


@pytest.mark.parametrize(
    ("family", "lora", "message"),
    [
        ("mamba", {"part": "decoder"}, r"name `lora.target_modules`, such as \[in_proj\]"),
        ("gpt2", {"part": "decoder", "target_modules": ["q_proj"]}, "its linear layers are .*c_attn"),
    ],
)
def test_layers_that_lora_cannot_adapt_are_named(family, lora, message, folders, tmp_path):
    part = {"pretrained": str(folders[family])}
    stage = PROBE | {"objectives": {"causal": 1.0}, "lora": lora}
    with pytest.raises(ValueError, match=message):
        memory_model.run(pretrained_recipe(tmp_path, encoder=part, decoder=part, stages=[stage]))


def test_other_weights_under_the_same_folder_make_another_run(folders, tmp_path, monkeypatch):
    recipe = pretrained_recipe(tmp_path, encoder={"pretrained": str(folders["gpt2"])})
    other = pretrained_recipe(tmp_path, encoder={"pretrained": str(folders["llama"])})
    assert recipe.hash != other.hash and "encoder_made_of" in recipe.content()
    hub = pretrained_recipe(tmp_path, encoder={"pretrained": "someone/else", "revision": "main"})
    assert "encoder_made_of" not in hub.content()  # the name and the revision stand in the recipe
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="cannot read the configuration of someone/else at main"):
        hub.build_config()


# Comparisons


LM = {"tokens": 256, "model_args": {"hidden_size": 16, "num_persistent_slots": 8}, "data": {"context_length": 16}}
LM["training"] = {"per_device_train_batch_size": 4, "disable_tqdm": True}


def small_comparison(name, tmp_path, runs, settings):
    """A shipped comparison of some of its runs, of the sizes of `SMALL`, a step each stage, without its claims."""
    values = yaml.safe_load((CONFIGURATION / "recipe" / f"{name}.yaml").read_text(encoding="utf-8"))
    values |= {"runs": {label: values["runs"][label] | more for label, more in runs.items()}, "claims": []}
    for stage in [stage for run in [values["common"], *values["runs"].values()] for stage in run.get("stages", [])]:
        stage["steps"] = 1
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return load_recipe(path, settings=[{"common": SMALL, "seeds": [0], "workers": 1}, {"common": settings}])


@pytest.mark.slow
def test_a_comparison_of_pretrained_decoders_runs_as_it_is_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.tasks.language_modeling.verify_export", lambda folder, prompts, **options: prompts)
    runs = {"Random memories": {}, "Encoder first, then LoRA": {}, "From scratch": {}}
    settings = {"decoder": {"recipe": "characters_lm", "settings": LM}}
    recipe = small_comparison("memory_pretrained", tmp_path, runs, settings)
    result = memory_models.run(recipe)
    assert list(result["effects"]) == recipe.effect_names
    folders = [training.recipe.folder / "model" for training in recipe.trainings]
    models = dict(zip(runs, map(load_causal_lm, folders), strict=True))
    source = recipe.trainings[0].recipe.part_source("decoder").folder / "model"
    table = load_causal_lm(source).get_input_embeddings().weight
    assert torch.equal(models["Encoder first, then LoRA"].get_input_embeddings().weight, table)
    assert not torch.equal(models["From scratch"].get_input_embeddings().weight, table)


@pytest.mark.slow
def test_a_comparison_of_public_encoders_has_a_guess_for_each_tokenizer(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["Lily had a dog. The dog ran to the park."] * 9, 280)
    part = {"revision": None, "pretrained": str(folders["gpt2"])}
    other = tmp_path / "mamba"
    config = type(FAMILIES["mamba"])(**FAMILIES["mamba"].to_dict() | {"vocab_size": 280})
    build_decoder(config).save_pretrained(other)
    tokenizer.save_pretrained(other)
    runs = {
        "Autoencoder": {"encoder": part | {"untrained": True}},
        "GPT-2": {"encoder": part},
        "Mamba 130M": {"encoder": {"revision": None, "pretrained": str(other)}},
    }
    settings = {"model_args": {"encoder": {"hidden_size": 16}, "memory_read": "unroll_add"}}
    recipe = small_comparison("memory_fidelity_hub", tmp_path, runs, settings)
    result = memory_models.run(recipe)
    assert list(result["effects"]) == recipe.effect_names
    guesses = [series["seeds"][0]["unigram"] for series in result["measured"]["series"]]
    assert guesses[0] == guesses[1] != guesses[2]
    assert "| entropy ratio of frequencies |" in result["table"] and "A guess by" not in result["table"]
    assert not list(recipe.folder.glob("*.png"))  # of three models and four places: the table has them
    read = result["measured"]["series"][2]["seeds"][0]
    places = read["stages"][-1]["metrics"]["autoencoding_by_place"]
    above = sum((place - guesses[2]["accuracy"]) / (1 - guesses[2]["accuracy"]) for place in places)
    assert result["effects"]["tokens above chance: Mamba 130M"]["value"] == pytest.approx(above)


def test_the_hours_of_a_memory_model_are_those_of_its_operations(folders, tmp_path):
    recipe = pretrained_recipe(tmp_path, encoder={"pretrained": str(folders["gpt2"])})
    operations = sum(memory_model.training_flops(recipe))
    priced = memory_model.plan(recipe, teraflops=1e-9, utilisation=0.5)
    assert priced["hours"] == pytest.approx(operations / (1e3 * 0.5) / 3600, abs=1e-3)
    assert memory_model.plan(recipe, teraflops=1e-9, utilisation=0.5, devices=2)["hours"] == pytest.approx(
        priced["hours"], abs=1e-3
    )  # twice the windows on twice the devices
    with pytest.raises(ValueError, match="Give teraflops"):
        memory_model.plan(recipe, utilisation=0.5)
