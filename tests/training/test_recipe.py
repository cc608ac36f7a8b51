# SPDX-License-Identifier: Apache-2.0
"""Recipes and configurations: everything that ships is valid, and every mistake is named with its remedy."""

import base64
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from training.paths import CLONE, CONFIGURATION
from training.recipe import Recipe, load_recipe, task_module
from training.secrecy import names_secret
from training.tasks import memory_parts
from training.tasks.language_modeling import plan


RECIPES = sorted((CONFIGURATION / "recipe").glob("*.yaml"))
COMPARISONS = [path for path in RECIPES if "\nruns:" in path.read_text(encoding="utf-8")]
TRAININGS = [path for path in RECIPES if "task: language_modeling" in path.read_text(encoding="utf-8")]
MODELS = sorted((CONFIGURATION / "model").glob("*.json"))
SMOKE = CONFIGURATION / "recipe" / "smoke.yaml"
TINY = CONFIGURATION / "recipe" / "stories_tiny.yaml"


def num_parameters(path: Path, **changes: int) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **changes)).num_parameters()


def slow_if_many(path):
    """One comparison resolves its trainings, which is enough; operations of the paper's sizes take a minute."""
    is_slow = "runs:" in path.read_text(encoding="utf-8").splitlines() and path.stem != "join_facts"
    is_slow |= path.stem.startswith("memory_paper")
    return pytest.param(path, marks=pytest.mark.slow) if is_slow else path


@pytest.mark.parametrize("path", [*map(slow_if_many, RECIPES)], ids=lambda path: path.stem)
def test_dry_run_of_every_recipe_needs_no_data(path, monkeypatch):
    """Of public models it reads the configurations, for which a small one stands here."""
    small = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)
    monkeypatch.setattr(memory_parts, "AutoConfig", SimpleNamespace(from_pretrained=lambda *args, **options: small))
    recipe = load_recipe(path)
    result = task_module(recipe.task).plan(recipe)
    assert recipe.name == path.stem
    assert result["folder"] == str(recipe.folder) and result["hash"] == recipe.hash


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_dry_run_of_a_training_counts_what_it_takes(path):
    recipe = load_recipe(path)
    result = plan(recipe)
    assert result["parameters"] > 0
    if recipe.tokens is not None:
        assert 0 <= result["tokens"] - recipe.tokens < result["tokens_per_step"]
        assert result["tokens"] == result["steps"] * result["tokens_per_step"]


@pytest.mark.parametrize(
    "path",
    # A comparison resolves each of its trainings.
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path in COMPARISONS else []) for path in RECIPES],
)
def test_resolved_recipe_is_a_recipe_of_the_same_hash(path, tmp_path):
    recipe = load_recipe(path, ["output_dir=elsewhere"])
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml").hash == recipe.hash


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_files_are_complete_configurations(path):
    values = json.loads(path.read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        assert type(AutoModelForCausalLM.from_config(config)).__name__ == values["architectures"][0]

    def select(values, settings):  # the settings that the file names, also of a backbone within the model
        return {n: select(v, settings[n]) if isinstance(v, dict) else settings.get(n) for n, v in values.items()}

    assert select(values, config.to_dict()) == values


def test_models_of_regbench_have_equal_parameters_besides_positions():
    models = {path.stem: num_parameters(path) for path in MODELS if path.stem.endswith("-regbench")}
    positions = AutoConfig.from_pretrained(CONFIGURATION / "model/gpt2-regbench.json")
    models["gpt2-regbench"] -= positions.n_positions * positions.n_embd
    assert len(models) == 9
    assert models == {name: pytest.approx(100_000, rel=0.1) for name in models}
    for name in ("rope-regbench", "rope-shift-regbench"):
        assert models[name] == pytest.approx(models["mosaic-regbench"], rel=0.02)


def test_models_of_regbench_at_the_papers_size_have_equal_parameters_besides_positions():
    models = {path.stem: num_parameters(path) for path in MODELS if path.stem.endswith("-regbench-paper")}
    positions = AutoConfig.from_pretrained(CONFIGURATION / "model/gpt2-regbench-paper.json")
    models["gpt2-regbench-paper"] -= positions.n_positions * positions.n_embd
    assert len(models) == 6
    assert models == {name: pytest.approx(models["mosaic-regbench-paper"], rel=0.01) for name in models}


@pytest.mark.parametrize("task", ["induction", "recall", "suite", "compressor"])
def test_models_of_a_task_have_equal_parameters(task):
    mosaic, *others = (num_parameters(path) for path in sorted((CONFIGURATION / "model").glob(f"*-{task}.json")))
    assert len(others) >= 2 and others == [pytest.approx(mosaic, rel=0.02)] * len(others)


OF_TASKS = ("regbench", "induction", "recall", "suite", "compressor", "v2")
TWINS = [path for path in MODELS if "mosaic-" in path.stem and not {*OF_TASKS} & {*path.stem.split("-")}]


@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_twins_have_equal_parameters(path):
    twin = path.with_name(path.name.replace("mosaic-", "gpt2-"))
    assert num_parameters(path) == pytest.approx(num_parameters(twin), rel=0.01)
    mosaic, gpt2 = AutoConfig.from_pretrained(path), AutoConfig.from_pretrained(twin)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(mosaic, name) == getattr(gpt2, name), name


def test_v2_has_the_parameters_of_the_mosaic_and_of_the_paper():
    """Small and large are the paper's: 8.84 billion of the transformer, and 2 d^2 more in each of 32 blocks."""
    sizes = {
        name: num_parameters(CONFIGURATION / f"model/mosaic-v2-{name}.json") for name in ("micro", "small", "large")
    }
    assert sizes["micro"] == pytest.approx(num_parameters(CONFIGURATION / "model/mosaic-micro.json"), rel=0.01)
    assert sizes["small"] / 1e9 == pytest.approx(2.04, abs=0.01)
    assert sizes["large"] / 1e9 == pytest.approx(9.91, abs=0.03)


@pytest.mark.parametrize("size", ["micro", "tiny"])
@pytest.mark.parametrize("model", ["llama", "rope", "rope-shift"])
@pytest.mark.parametrize("layers", [1, 4])
def test_transformers_of_stories_have_the_parameters_of_the_mosaic(model, size, layers):
    """`rope-micro` is 2 % smaller: it is four times as wide within as without, as GPT-2 is."""
    count = num_parameters(CONFIGURATION / f"model/{model}-{size}.json", num_hidden_layers=layers)
    mosaic = num_parameters(CONFIGURATION / f"model/mosaic-{size}.json", num_hidden_layers=layers)
    assert count == pytest.approx(mosaic, rel=0.021 if (model, size) == ("rope", "micro") else 0.01)


@pytest.mark.parametrize("size", ["micro", "tiny", "induction", "regbench"])
def test_the_shift_is_all_that_the_shifted_transformer_has_besides(size):
    rope, shifted = (
        json.loads((CONFIGURATION / f"model/{name}-{size}.json").read_text(encoding="utf-8"))
        for name in ("rope", "rope-shift")
    )
    different = {name for name in rope.keys() | shifted.keys() if rope.get(name) != shifted.get(name)}
    assert different <= {"model_type", "architectures", "intermediate_size"}
    # Within 5 %, which makes up for the parameters that `rope-micro` lacks beside the mosaic.
    assert shifted["intermediate_size"] == pytest.approx(rope["intermediate_size"], rel=0.05)


PARTS = [path for path in MODELS if path.stem.startswith("parts-")]


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
def test_a_mosaic_without_a_part_differs_from_the_mosaic_in_that_part(path):
    """A separate query is paid for by slots; a scalar of each head that is fixed is no parameter."""
    size = path.stem.rpartition("-")[2]
    full = path.with_name(f"mosaic-{size}.json")
    assert num_parameters(path) == pytest.approx(num_parameters(full), rel=1e-4)
    mosaic, parts = (json.loads(file.read_text(encoding="utf-8")) for file in (full, path))
    complete = mosaic | {"look_ahead": True, "leak": True, "separate_query": False}
    different = {name for name in parts if parts[name] != complete.get(name)} - {"model_type", "architectures"}
    part = path.stem.removeprefix("parts-").removesuffix(f"-{size}").removeprefix("no-").replace("-", "_")
    assert different == ({part, "num_persistent_slots"} if part == "separate_query" else {part})


@pytest.mark.parametrize("path", sorted((CONFIGURATION / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    assert load_config_from_file(str(path)).num_processes >= 1


@pytest.mark.parametrize(
    ("override", "wrong", "nearest"),
    [
        ("sed=1", "sed", "seed"),
        ("data.contxt_length=32", "data.contxt_length", "data.context_length"),
        ("data.train.sorce=x", "data.train.sorce", "data.train.source"),
        ("learning_rate=1", "learning_rate", "training.learning_rate"),
        ("training.learning_rat=1e-3", "training.learning_rat", "training.learning_rate"),
        ("tokenizer.vocabsize=300", "tokenizer.vocabsize", "tokenizer.vocab_size"),
        ("model_args.hiden_size=32", "model_args.hiden_size", "model_args.hidden_size"),
        ("model=mosaic-smok", "mosaic-smok", "mosaic-smoke"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(override, wrong, nearest):
    with pytest.raises(ValueError) as error:
        load_recipe(SMOKE, [override])
    assert f"{wrong!r} (nearest valid name: {nearest!r})" in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=abc"], "seed: Input should be a valid integer, not 'abc'"),
        (["seed=1.5"], "seed: Input should be a valid integer"),
        (["training.learning_rate=fast"], "training.learning_rate: Input should be a valid number, not 'fast'"),
        (["tokens=null"], "exactly one of `tokens`"),
        (["training.max_steps=10"], "exactly one of `tokens`"),
        (["tokens=null", "training.num_train_epochs=1", "data.streaming=true"], "a stream has no epochs"),
        (["training.output_dir=x"], "use the recipe's own `output_dir`"),
        (["training.seed=1"], "use the recipe's own `seed`"),
        (["training.load_best_model_at_end=true"], "the last checkpoint is the result"),
        (["training.label_smoothing_factor=0.1"], "Trainer shifts labels for class names it knows only"),
        (["training.gradient_accumulation_steps=0"], "must be at least 1"),
        (["training.per_device_train_batch_size=0"], "must be at least 1"),
        (["model_args.hidden_dropout=2"], "hidden_dropout=2"),
        (["model_args.num_hidden_layers=1000000000"], "no model of over 10,000 layers"),
        (["model=gpt2-smoke", "model_args.num_hidden_layers=1000000000"], "no model of over 10,000 layers"),
        (["name=.."], "name"),
        (["tokenizer.pretrained=gpt2"], "either `pretrained` or `vocab_size`"),
        (["tokenizer.vocab_size=513"], "raise `model_args.vocab_size`"),
        (["data.context_length=65"], "raise `model_args.max_position_embeddings`"),
        (["data.train=null"], "data.train"),
        (["training.auto_find_batch_size=true"], "`auto_find_batch_size` cannot be set here: the batch is part of"),
        (["task=cooking"], "task: 'cooking' is none of 'language_modeling'"),
        (["seed"], "has no '='"),
        (["seed=${nowhere}"], "cannot read recipe"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(ValueError, match="recipe|override") as error:
        load_recipe(SMOKE, overrides)
    assert message in str(error.value)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ValueError) as error:
        load_recipe(SMOKE, ["sed=1", "seed=x", "tokenizer.vocabsize=3"])
    assert all(name in str(error.value) for name in ("'sed'", "seed:", "'tokenizer.vocabsize'"))


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(ValueError, match="there is no recipe"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot read recipe"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot read recipe"):
        load_recipe(tmp_path / "list.yaml")


def test_hash_is_of_what_determines_the_run():
    recipe = load_recipe(SMOKE)
    assert load_recipe(SMOKE, ["output_dir=elsewhere"]).hash == recipe.hash
    for override in ("seed=1", "model=gpt2-smoke", "model_args.hidden_size=64", "training.learning_rate=1e-4"):
        assert load_recipe(SMOKE, [override]).hash != recipe.hash


@pytest.mark.parametrize("model", ["mosaic-smoke", "gpt2-smoke"])
def test_model_args_go_by_standard_names(model):
    overrides = [f"model={model}", "model_args.hidden_size=64", "model_args.max_position_embeddings=128"]
    config = load_recipe(SMOKE, overrides).build_config()
    assert (config.hidden_size, config.max_position_embeddings) == (64, 128)


def test_folder_tells_model_and_seed_apart():
    runs = [[f"model={model}", f"seed={seed}"] for model in ("gpt2-smoke", "mosaic-smoke") for seed in (0, 1)]
    assert len({load_recipe(SMOKE, overrides).folder for overrides in runs}) == 4
    assert load_recipe(SMOKE, ["output_dir=here"]).folder == Path("here")


def test_local_files_take_the_place_of_the_hub():
    overrides = ["data.train.source=train.jsonl.gz", "data.validation.source=validation.jsonl.gz"]
    recipe = load_recipe(TINY, overrides)
    assert (recipe.data.train.source, recipe.data.validation.source) == ("train.jsonl.gz", "validation.jsonl.gz")


def test_every_key_is_explained():
    text = (CONFIGURATION / "README.md").read_text(encoding="utf-8")
    for name, field in Recipe.model_fields.items():
        assert f"`{name}" in text, name
        if name != "training" and hasattr(field.annotation, "model_fields"):
            for inner in field.annotation.model_fields:
                assert f"`{name}.{inner}" in text, f"{name}.{inner}"


SECRET = "hf_" + "Zq9" * 12
# Forms of secrets that are none: nothing issued them.
SECRETS = {
    "hub": SECRET,
    "api": "sk-proj-" + "a1B2c3" * 5,
    "github": "ghp_" + "a1" * 18,
    "aws": "AKIA" + "A1" * 8,
    "key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "address": "https://someone:sesame@example.com/data",
}


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:MOSAIC_SECRET}",
        "${ oc.env : MOSAIC_SECRET }",
        "before ${oc.env:MOSAIC_SECRET} after",
        "${oc.decode:'${oc.env:MOSAIC_SECRET}'}",
        "${${task}:MOSAIC_SECRET}",
        "${oc.select:seed}",
        r"\${oc.env:MOSAIC_SECRET}",
        r"\\${oc.env:MOSAIC_SECRET}",
    ],
)
@pytest.mark.parametrize("way", ["file", "override", "settings"])
def test_a_recipe_reads_nothing_of_the_machine(tmp_path, monkeypatch, text, way):
    monkeypatch.setenv("MOSAIC_SECRET", SECRET)
    path, overrides, settings = SMOKE, [], []
    if way == "file":
        path = tmp_path / "own.yaml"
        path.write_text(SMOKE.read_text() + f"\noutput_dir: {json.dumps(text)}\n", encoding="utf-8")
    elif way == "override":
        overrides = [f"generation.prompts={json.dumps([text])}"]
    else:  # such as a comparison hands to the recipe that it trains
        settings = [{"data": {"train": {"source": text}}}]
    with pytest.raises(ValueError, match="a recipe does not read the environment") as error:
        load_recipe(path, overrides, settings)
    assert SECRET not in str(error.value)


def test_a_recipe_may_refer_to_itself():
    assert load_recipe(SMOKE, ["generation.prompts=['${name}: ${tokens}']"]).generation.prompts == ["smoke: 20480"]


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize(
    "key", ["generation.prompts", "data.train.source", "seed", "training.optim_args", "x", "name"]
)
def test_a_secret_in_a_recipe_is_refused_and_never_shown(key, secret):
    value = [secret] if key == "generation.prompts" else {"a": [secret]} if key == "training.optim_args" else secret
    section = {}
    place = section
    *outer, last = key.split(".")
    for name in outer:
        place[name] = place = {}
    place[last] = value
    with pytest.raises(ValueError, match=f"`{key}.*` in .* looks like") as error:
        load_recipe(SMOKE, settings=[section])
    assert secret not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "training.hub_token=sesame-open",
        "training[hub_token]=sesame-open",
        "training.hub_token=[sesame-open",
        "training.push_to_hub_token=sesame-open",
        "training.accelerator_config={api_key: sesame-open}",
        "training.optim_args={a: [{password: sesame-open}]}",
        "generator.token=sesame-open",
        "model_args.authToken=sesame-open",
    ],
)
def test_fields_for_secrets_are_refused_and_their_values_never_shown(override):
    with pytest.raises(ValueError, match="is for a secret") as error:
        load_recipe(SMOKE, [override])
    assert "sesame-open" not in str(error.value)


def test_the_token_of_this_machine_is_refused_whatever_its_form(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-no-known-form")
    for override in ("name=of-no-known-form", "of-no-known-form=1", "seed=[of-no-known-form", "of-no-known-form"):
        with pytest.raises(ValueError) as error:
            load_recipe(SMOKE, [override])
        assert "of-no-known-form" not in str(error.value)


def test_secrets_that_are_packed_or_deep_are_found(tmp_path):
    packed = base64.b64encode(SECRET.encode()).decode()
    for value in (f"!!binary {packed}", "[" * 90 + SECRET + "]" * 90, f"{{? {SECRET} : 1}}"):
        (tmp_path / "own.yaml").write_text(f"task: language_modeling\ngeneration: {value}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="looks like|nesting depth|nested too deeply") as error:
            load_recipe(tmp_path / "own.yaml")
        assert SECRET not in str(error.value)


def test_tokens_of_text_are_no_secrets():
    for key in (
        "eos_token",
        "pad_token_id",
        "max_new_tokens",
        "tokens",
        "tokenizer.pretrained",
        "decoder_start_token",
    ):
        assert not names_secret(key)
    for key in ("HF_TOKEN", "hub_token", "apiKey", "WANDB_API_KEY", "auth", "db.password", "client_secret"):
        assert names_secret(key)


@pytest.mark.parametrize("model", ["../recipe/smoke", "/etc/passwd", "", ".", "mosaic-smoke\n", "a/b", "linked"])
def test_a_model_is_a_file_of_its_folder(tmp_path, monkeypatch, model):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.json").write_text("{}")
    (folder / "linked.json").symlink_to(tmp_path / "outside.json")
    monkeypatch.setattr("training.paths.CONFIGURATION", tmp_path)
    for name in (model, str(tmp_path / "outside"), "../outside"):
        with pytest.raises(ValueError, match="unknown model"):
            load_recipe(SMOKE, settings=[{"model": name}])


def test_a_recipe_has_a_name_or_a_path(tmp_path, monkeypatch):
    assert load_recipe("smoke") == load_recipe(SMOKE)
    with pytest.raises(ValueError, match=r"no recipe 'smoke.yml' \(nearest valid name: 'smoke'\)"):
        load_recipe("smoke.yml")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "outside.yaml").write_text("task: symbols")
    (tmp_path / "recipe" / "linked.yaml").symlink_to(tmp_path / "outside.yaml")
    monkeypatch.setattr("training.paths.CONFIGURATION", tmp_path)
    for name in ("../outside", "linked", "", ".", "smoke\n"):
        with pytest.raises(ValueError, match="there is no recipe"):
            load_recipe(name)


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/etc", "/etc/cron.d", "/usr/lib/x", "/proc/self", "/var/log/run", "//", "/etc/../etc"),
        *("~", "~/runs", " ", "", str(Path.home()), str(Path.home().parent), str(Path.home() / ".ssh")),
        *(str(CONFIGURATION), str(CONFIGURATION.parent), str(CONFIGURATION.parent / "training" / "x")),
        *(str(CONFIGURATION.parent.parent), str(CONFIGURATION.parent / ".git" / "hooks"), "a\0b"),
    ],
)
def test_a_run_writes_where_runs_belong(path):
    with pytest.raises(ValueError, match="output_dir: |null byte"):
        load_recipe(SMOKE, settings=[{"output_dir": path}])


def test_a_run_writes_into_no_folder_of_the_sources():
    listed = subprocess.run(["git", "ls-files"], cwd=CLONE, capture_output=True, text=True, check=False)
    folders = {name.partition("/")[0] for name in listed.stdout.splitlines() if "/" in name}
    if listed.returncode:
        pytest.skip("this is no clone of git's")
    assert {"serving", "training"} <= folders
    for folder in folders:
        with pytest.raises(ValueError, match="among the sources"):
            load_recipe(SMOKE, settings=[{"output_dir": str(CLONE / folder / "x")}])


def test_a_link_does_not_lead_a_run_elsewhere(tmp_path):
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(ValueError, match="belongs to the system"):
        load_recipe(SMOKE, settings=[{"output_dir": str(tmp_path / "link" / "x")}])
    for path in (str(tmp_path / "runs"), "runs/x", "../runs", str(CONFIGURATION.parent / "runs" / "x")):
        assert load_recipe(SMOKE, settings=[{"output_dir": path}]).folder == Path(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: &a [*a]", "nested too deeply"),
        ("[" * 5000 + "]" * 5000, "nested too deeply|nesting depth"),
        (
            "a: &a [1,1,1,1,1,1,1,1]\n"
            + "".join(
                f"k{n}: &{b} [{','.join(['*' + a] * 8)}]\n"
                for n, (a, b) in enumerate(zip("abcdefgh", "bcdefghi", strict=True))
            ),
            "values when its aliases are written out",
        ),
        ("# " + "x" * 2**21, "LARGEST_YAML"),
        ("3", "cannot read recipe"),
        ("a: " + "9" * 6000, "cannot read recipe"),
        ("? [1]\n: 2", "cannot read recipe"),
        ("a: \x07", "cannot read recipe"),
    ],
    ids=["tag", "cycle", "deep", "laughs", "large", "scalar", "number", "key", "control"],
)
def test_hostile_yaml_is_refused_at_once(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_recipe(path)
