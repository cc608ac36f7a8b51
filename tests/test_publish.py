# SPDX-License-Identifier: Apache-2.0
"""What is published has been proven, says only what its results say, and is refused where something is missing."""

import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from hub_server import TOKEN, Hub, Repository
from huggingface_hub import DatasetCard, ModelCard, RepoCard
from safetensors.torch import load_file, save_file
from test_memory_training import read as read_memory_recipe
from test_saving import PAYLOAD
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from modeling_memory_mosaic.inspection_memory_mosaic import measure_units
from training import finetune, hub, proof, publication, publish, secrecy, train, verify
from training.__main__ import app
from training.card import ABOUT, TEMPLATES, load_about, model_metadata
from training.checksums import LIST, list_of, read_list, sums_of
from training.evaluate import load_model
from training.experiments import memory_training
from training.export import run_isolated
from training.recipe import CONFIGURATION, load_recipe
from training.result import CLONE, RESULTS, results_table, write_result
from training.run_folder import locked


SHORT = {
    "data": {"train": {"num_stories": 40}, "validation": {"num_stories": 4}},
    "tokens": 4_096,
    "training": {"eval_steps": 2, "save_steps": 2, "disable_tqdm": True},
    "generation": {"prompts": ["Once upon a time"], "max_new_tokens": 8},
}
ABOUT_SMOKE = {
    "title": "A smoke test",
    "license": "apache-2.0",
    "language": "en",
    "purpose": "To be published by tests.",
    "data": {"datasets": [], "sources": ["embedded"], "license": "apache-2.0", "origin": "Written by a grammar."},
    "limits": "It knows nothing.",
}
COMMIT = "a" * 40


def smoke(folder, **settings):
    recipe = CONFIGURATION / "recipe" / "smoke.yaml"
    return load_recipe(recipe, settings=[SHORT, {"output_dir": str(folder)}, settings])


def lora(folder, base, **settings):
    settings = {
        "name": "lora",
        "model": str(base),
        "base": None,
        "data": {"context_length": 64, "train": {"source": "embedded"}, "validation": {"source": "embedded"}},
        "training": {"learning_rate": 0.01, "logging_steps": 1, "eval_strategy": "steps"},
    } | settings
    base = CONFIGURATION / "recipe" / "shakespeare_lora.yaml"
    return load_recipe(base, settings=[settings, SHORT, {"output_dir": str(folder)}])


@pytest.fixture(scope="module")
def about(tmp_path_factory):
    path = tmp_path_factory.mktemp("about") / "smoke.yaml"
    path.write_text(yaml.safe_dump(ABOUT_SMOKE), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = smoke(tmp_path_factory.mktemp("runs") / "smoke")
    train.run(recipe)
    return recipe.folder


@pytest.fixture(scope="module")
def adapted(run):
    recipe = lora(run.with_name("lora"), run / "model")
    finetune.run(recipe)
    return recipe.folder


@pytest.fixture(scope="module")
def staged(run, about):
    return publish.publish(run, "someone/smoke", about=about, dry_run=True, tell=lambda line: None)


@pytest.fixture
def copy(staged, tmp_path):
    return shutil.copytree(staged, tmp_path / "copy")


def prepared(run, about, **options):
    return publish.prepare(run, options.pop("repo_id", "someone/smoke"), about=about, **options)


def call(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "training", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=CLONE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"} | environment,
    )


def test_a_run_is_published_and_verified_by_a_stranger(run, about, tmp_path):
    """From the command line, by way of a Hub, to a machine that has nothing but the address."""
    with Hub() as server:
        home = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        arguments = ["publish", run, "--repo-id", "someone/smoke", "--about", about]
        process = call(*arguments, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1", **home)
        assert process.returncode == 0, process.stderr
        assert TOKEN not in process.stdout + process.stderr
        for line in ("model.safetensors", "to be uploaded, in bytes", "snippets of the card run", "equal logits"):
            assert line in process.stdout
        pinned = re.search(r"--base someone/smoke@([0-9a-f]{40})", process.stdout)[1]
        files = server.repositories["model", "someone/smoke"].files()
        card = files[hub.CARD].decode()
        assert pinned in card and hub.NO_COMMIT not in card

        process = call("publish", "someone/smoke", "--verify-only", HF_TOKEN=TOKEN, **home)
        assert process.returncode == 0, process.stderr
        assert "checksums hold" in process.stdout and "byte for byte" in process.stdout

        server.repositories["model", "someone/smoke"].private = False
        snippet = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[:2])  # see what it is, and load it
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "stranger")}
        code = f"import os\nos.environ.update({environment!r})\nos.environ.pop('HF_HUB_OFFLINE')\n{snippet}"
        process = run_isolated(["-c", code])
        assert process.returncode == 0 and "Once upon a time" in process.stdout, process.stderr


def test_the_payload_is_whole(staged, run):
    names = set(hub.published_files(staged))
    assert names == {
        *PAYLOAD,
        *("README.md", "LICENSE", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "result.json", "units.json", "loss.png"),
    }
    assert (staged / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    listed = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=staged, capture_output=True, text=True)
    assert listed.returncode == 0 and listed.stdout.count(": OK") == len(names) - 2


def test_a_card_says_what_its_result_says(staged):
    result = json.loads((staged / "result.json").read_text(encoding="utf-8"))
    units = json.loads((staged / "units.json").read_text(encoding="utf-8"))
    card = ModelCard.load(staged / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation" and card.data.language == "en"
    assert card.data.eval_results is None  # the Hub's index knows data sets on the Hub only
    assert results_table([result]) in card.text
    for number in (result["parameters"], result["tokens"], result["steps"], units["tokens"]):
        assert f"{number:,}" in card.text
    for row in units["layers"]:
        assert f"| {row['layer']} | {row['kind']} |" in card.text and f"{row['effective_pairs']:.1f}" in card.text
    for version in result["versions"].values():
        assert f"| {version} |" in card.text
    listed = dict(map(reversed, re.findall(r"^([0-9a-f]{64})  (.+)$", card.text, flags=re.MULTILINE)))
    assert listed.items() <= verify.read_sums(staged).items() and len(listed) == len(PAYLOAD) + 4
    assert card.text.index(listed["model.safetensors"]) < card.text.index("trust_remote_code=True")
    assert "No baseline was trained by this recipe" in card.text


def test_the_models_index_has_the_results_metrics():
    result = json.loads((RESULTS / "stories_tiny--mosaic-tiny--seed0.json").read_text())
    about = load_about("stories_tiny")
    card = ModelCard(f"---\n{model_metadata(result, about)}\n---\n")
    told = {found.metric_type: found.metric_value for found in card.data.eval_results}
    metrics = result["metrics"]
    assert told == {name: metrics[f"validation_{name}"] for name in ("loss", "perplexity", "bits_per_byte")}
    assert {found.dataset_type for found in card.data.eval_results} == {"roneneldan/TinyStories"}


def test_units_of_a_padded_batch_are_those_of_the_texts(staged):
    model, tokenizer = load_model(staged)
    texts = ["Once upon a time", "A dog ran to the big red house and saw a cat"]
    together = measure_units(model, tokenizer, texts)
    apart = [measure_units(model, tokenizer, [text]) for text in texts]
    assert together["tokens"] == sum(part["tokens"] for part in apart)
    assert len(together["layers"]) == 2 * model.config.num_hidden_layers
    leak = 10 * model.model.layers[1].persistent_memory.key_leak.detach().abs().double()
    half_life = next(r for r in together["layers"] if (r["layer"], r["kind"]) == (1, "persistent"))["half_life"]
    torch.testing.assert_close(torch.tensor(half_life).double(), math.log(2) / leak)
    for row, first, second in zip(together["layers"], *(part["layers"] for part in apart), strict=True):
        low, high = sorted((first["effective_pairs"], second["effective_pairs"]))
        assert low <= row["effective_pairs"] <= high


def test_baselines_are_those_of_the_same_recipe_and_data(tmp_path):
    """The committed results of stories_tiny are each other's; one on other data is not."""
    results = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("stories_tiny--*.json"))}
    own = results["stories_tiny--mosaic-tiny--seed1.json"]
    about = publication.Publication(tmp_path / "runs" / "own", own, "model", "someone/x", None, None)
    found = publication.comparable_results(about)
    assert found[0] is own and {(r["model"], r["seed"]) for r in found} == {
        (model, seed) for model in ("gpt2-tiny", "mosaic-tiny") for seed in (0, 1, 2)
    }
    other = json.loads(json.dumps(own))
    other["data"]["train"]["files"] = {"train.jsonl.gz": "0" * 64}
    assert publication.comparable_results(about._replace(result=other)) == [other]


@pytest.mark.parametrize("what", ["adapter", pytest.param("merged", marks=pytest.mark.slow)])
def test_a_fine_tuned_model_names_its_base(adapted, run, about, what):
    folder = publish.publish(
        adapted, "someone/lora", what, about, f"someone/smoke@{COMMIT}", dry_run=True, tell=lambda line: None
    )
    metadata = ModelCard.load(folder / "README.md").data.to_dict()
    relation = "adapter" if what == "adapter" else "finetune"
    assert metadata["base_model"] == "someone/smoke" and metadata["base_model_relation"] == relation
    assert metadata["library_name"] == ("peft" if what == "adapter" else "transformers")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| the base | 0 |  | {result['base']['metrics']['validation_loss']:.4f} |" in card
    assert f"| {result['trained_parameters']:,} | 0 | {result['metrics']['validation_loss']:.4f} |" in card
    assert f"`{COMMIT[:12]}`" in card
    for name in hub.published_files(folder):
        assert str(run.parent).encode() not in (folder / name).read_bytes(), f"{name} tells a path of this machine"
    if what == "adapter":
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert (settings["base_model_name_or_path"], settings["revision"]) == ("someone/smoke", COMMIT)
        assert not list(folder.glob("*.py")) and not (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_an_adapter_is_verified_with_its_base(adapted, staged, about, tmp_path):
    """Both from the Hub, the base at the commit that its publication names, where there is no card yet."""
    with Hub() as server:
        base = hub_repository(server, "someone/smoke", staged, without=hub.CARD)
        folder = publish.publish(
            *(adapted, "someone/lora", "adapter", about, f"someone/smoke@{base}"),
            dry_run=True,
            tell=lambda line: None,
        )
        hub_repository(server, "someone/lora", folder)
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
        process = call("publish", "someone/lora", "--verify-only", **environment)
        assert process.returncode == 0 and f"its base is someone/smoke at commit {base}" in process.stdout, (
            process.stderr
        )
        assert process.stdout.count("byte for byte") == 1 and "no code" in process.stdout


def hub_repository(server, repo_id, folder, without=None):
    repository = server.repositories["model", repo_id] = Repository(private=False)
    names = [name for name in hub.published_files(folder) if name != without]
    return repository.commit("main", {name: (folder / name).read_bytes() for name in names})


def test_a_base_that_has_other_weights_is_refused(adapted, about, monkeypatch):
    def refuse(repo_id, revision, weights):
        assert (repo_id, revision) == ("nobody/gpt2", COMMIT) and list(weights) == ["model.safetensors"]
        raise ValueError("other weights")

    kind = publication.KINDS["fine_tuning", "adapter"]
    monkeypatch.setitem(publication.KINDS, ("fine_tuning", "adapter"), kind._replace(prove=lambda *arguments: []))
    monkeypatch.setattr(hub, "check_weights", refuse)  # `test_hub.py` has it
    monkeypatch.setattr(hub, "upload", lambda *arguments: pytest.fail("it was uploaded"))
    with pytest.raises(ValueError, match="^other weights$"):
        publish.publish(adapted, "someone/lora", "adapter", about, f"nobody/gpt2@{COMMIT}", tell=lambda line: None)


def test_another_base_than_the_one_adapted_is_refused(adapted, run, about):
    path = run / "model" / "model.safetensors"
    weights = path.read_bytes()
    try:
        path.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        with pytest.raises(ValueError, match="are not those that .* has adapted"):
            publish.publish(adapted, "someone/lora", "adapter", about, f"someone/smoke@{COMMIT}", dry_run=True)
    finally:
        path.write_bytes(weights)


@pytest.mark.slow
def test_a_memory_model_is_published(tmp_path, about):
    recipe = read_memory_recipe(tmp_path)
    memory_training.run(recipe)
    told = []
    folder = publish.publish(recipe.folder, "someone/memory", about=about, dry_run=True, tell=told.append)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    card = ModelCard.load(folder / "README.md")
    assert "memory-model" in card.data.tags and "arxiv:2602.13466" in card.data.tags
    assert f"| {result['metrics']['causal_loss']:.3f} | {result['unigram']['loss']:.3f} |" in card.text
    assert f"{result['metrics']['autoencoding_accuracy']:.4f}" in card.text
    assert (folder / "stages.png").is_file() and "3 snippets of the card run" in "\n".join(told)


def test_a_space_runs_by_what_lies_in_it(run, about, tmp_path):
    told = []
    folder = publish.publish(
        *(run, "someone/space", "space", about, f"someone/smoke@{COMMIT}"), dry_run=True, tell=told.append
    )
    assert "runs as a Space" in "\n".join(told)
    names = hub.published_files(folder)
    assert {"app.py", "requirements.txt", "LICENSE", "README.md", "model/config.json"} <= set(names)
    assert not [name for name in names if "pycache" in name]
    package = {path.name for path in verify.PACKAGE.glob("*.py")}
    assert {name.split("/")[1] for name in names if name.startswith(verify.PACKAGE.name)} == package
    metadata = RepoCard.load(folder / "README.md").data.to_dict()
    assert metadata["sdk"] == "gradio" and metadata["models"] == ["someone/smoke"] and metadata["app_file"] == "app.py"
    assert len(metadata["short_description"]) <= 60  # the Hub's limit
    publish.verify_published(str(folder), tell=told.append)
    good = (folder / "README.md").read_text()
    for old, new in (
        ("sdk: gradio", "sdk: docker"),
        ("app_file: app.py", "app_file: model/app.py"),
        ('python_version: "3.11"', 'python_version: "2.7"'),
        ("app_file: app.py\n", "app_file: app.py\npreload_from_hub: [evil/repo]\n"),
        ("app_file: app.py\n", "app_file: app.py\nhf_oauth: true\n"),
        ("  - someone/smoke", "  - someone/smoke\n  - evil/repo"),
        ("  - someone/smoke", "  - https://evil.org"),
        ("sdk_version: ", "sdk_version: 0."),
        ("sdk_version: ", "sdk_version: git+https://evil.org/"),
    ):
        assert old in good
        (folder / "README.md").write_text(good.replace(old, new, 1))
        with pytest.raises(ValueError, match="in the card is"):
            verify.check_settings(folder)
    (folder / "README.md").write_text(good)
    asked = (folder / "requirements.txt").read_bytes()
    for harm in (b"--index-url http://127.0.0.1:9/simple\n", asked + b"evil-package\n", asked.rstrip(), b""):
        (folder / "requirements.txt").write_bytes(harm)
        with pytest.raises(ValueError, match="requirements.txt differs from this project's"):
            verify.check_code(folder)
    (folder / "requirements.txt").write_bytes(asked)
    with (folder / "app.py").open("a") as file:
        file.write("print('hello')")
    verify.write_sums(folder)
    with pytest.raises(ValueError, match="app.py differs from this project's"):
        publish.verify_published(str(folder))


def stories_run(tmp_path, license="cc-by-4.0"):
    result = json.loads((RESULTS / "babistories_micro.json").read_text(encoding="utf-8"))
    result["metrics"]["kept"], result["recipe"]["license"] = 2, license
    folder = tmp_path / "stories"
    folder.mkdir()
    rows = [json.dumps({"text": text, "index": index}) for index, text in enumerate(("One day.", "In a house."))]
    (folder / "stories.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    write_result(result, folder, ["stories.jsonl.gz"])
    return folder


def test_stories_are_published_as_a_data_set(tmp_path):
    folder = publish.publish(stories_run(tmp_path), "someone/stories", dry_run=True, tell=lambda line: None)
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0" and "someone/stories" in card.text
    assert set(hub.published_files(folder)) == {"README.md", "SHA256SUMS", "result.json", "stories.jsonl.gz"}


def test_stories_without_a_licence_or_with_another_number_are_refused(tmp_path):
    run = stories_run(tmp_path, license="unknown")
    with pytest.raises(ValueError, match="states no licence"):
        publish.publish(run, "someone/stories", dry_run=True, tell=lambda line: None)
    result = json.loads((run / "result.json").read_text())
    result["recipe"]["license"], result["metrics"]["kept"] = "mit", 3
    write_result(result, run)
    with pytest.raises(ValueError, match="with 2 stories, but its result says 3"):
        publish.publish(run, "someone/stories", dry_run=True, tell=lambda line: None)
    assert not (run / "published" / "dataset").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "smoke"}, "give it as user/name"),
        ({"repo_id": "some one/smoke"}, "--repo-id 'some one/smoke'"),
        ({"what": "adapter"}, "'language_modeling' has model"),
        ({"base": f"someone/smoke@{COMMIT}"}, "a model builds on nothing"),
    ],
    ids=["no-user", "not-a-name", "not-made", "no-base"],
)
def test_what_cannot_be_published_is_told_at_once(run, about, options, message):
    with pytest.raises(ValueError, match=message):
        prepared(run, about, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--verify-only", "--public", "--dry-run"], "leave out --public, --dry-run"),
        (["--revision", "v2", "--repo-id", "someone/x"], "--revision is 'v2', which is for --verify-only"),
        (["--verify-only", "--revision", "v2"], "is a folder: leave out --revision"),
        ([], "give --repo-id user/name"),
    ],
    ids=["verify", "revision", "folder", "nowhere"],
)
def test_options_without_a_meaning_are_refused(run, options, message):
    process = CliRunner().invoke(app, ["publish", str(run), *options])
    assert process.exit_code == 1 and message in process.stderr


def test_what_is_neither_a_folder_nor_a_repository_is_told():
    for name in ("runs/a/typo", "typo"):
        with pytest.raises(ValueError, match="neither a folder nor user/name"):
            publish.verify_published(name)


def test_data_that_nobody_has_described_are_refused(run, tmp_path):
    told = json.loads(json.dumps(ABOUT_SMOKE))
    told["data"]["sources"] = ["roneneldan/TinyStories"]
    path = tmp_path / "about.yaml"
    path.write_text(yaml.safe_dump(told), encoding="utf-8")
    with pytest.raises(ValueError, match="train data are embedded .*say nothing"):
        prepared(run, path)
    result = json.loads((run / "result.json").read_text())
    result["data"]["train"] |= {"kind": "files", "name": "embedded", "files": {"embedded": "f" * 64}}
    shutil.copytree(run, tmp_path / "run")
    write_result(result, tmp_path / "run")
    path.write_text(yaml.safe_dump(ABOUT_SMOKE), encoding="utf-8")  # a file may be called anything
    with pytest.raises(ValueError, match=f"train data are {'f' * 64}"):
        prepared(tmp_path / "run", path)


def test_paths_of_the_machine_are_taken_out_and_nothing_else(tmp_path):
    result = {
        "model": "/home/x/runs/base",
        "recipe": {"data": {"train": {"source": "../../x/stories.txt"}}, "output_dir": "/tmp/run"},
        "samples": [{"prompt": "/a/b story", "text": "/a/b story/\nOnce / upon"}],
        "base": {"name": "runs/base/model"},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    read = publication.read_result(tmp_path / "result.json")
    assert read["model"] == "base" and read["recipe"] == {
        "data": {"train": {"source": "stories.txt"}},
        "output_dir": "run",
    }
    assert (read["samples"], read["base"]) == (result["samples"], result["base"])


def test_an_unpublished_base_is_asked_for(adapted, about):
    with pytest.raises(ValueError, match="the card has to name its base on the Hub"):
        prepared(adapted, about)
    with pytest.raises(ValueError, match="--base user/name@COMMIT"):
        prepared(adapted, about, base="someone/smoke@main")


def test_a_run_without_a_result_is_refused(tmp_path, run, about):
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    process = CliRunner().invoke(app, ["publish", str(unfinished), "--repo-id", "someone/smoke"])
    assert process.exit_code == 1 and "has no result.json" in process.stderr


def test_a_run_of_another_kind_of_model_is_refused(tmp_path, run, about):
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    result["architecture"]["model_type"] = "gpt2"
    write_result(result, tmp_path)
    with pytest.raises(ValueError, match="holds a gpt2"):
        prepared(tmp_path, about)


@pytest.mark.parametrize("name", ["result.json", "model/model.safetensors", "loss.png", "checksums.json"])
def test_a_run_that_has_changed_is_not_published(name, run, about, tmp_path):
    changed = shutil.copytree(run, tmp_path / "run")
    content = bytearray((changed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (changed / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"is damaged .*{re.escape(name)}.*run the recipe again"):
        prepared(changed, about)


def test_a_run_is_published_by_one_process_at_a_time(run, about):
    with locked(run), pytest.raises(ValueError, match="a run is going on"):
        publish.publish(run, "someone/smoke", about=about, dry_run=True)


@pytest.mark.parametrize("field", ["title", "license", "language", "purpose", "limits", "data.license", "data.origin"])
@pytest.mark.parametrize("way", ["empty", "missing"])
def test_an_empty_field_of_a_card_is_named(run, tmp_path, field, way):
    told = json.loads(json.dumps(ABOUT_SMOKE))
    *section, name = field.split(".")
    place = told[section[0]] if section else told
    place[name] = ""
    if way == "missing":
        del place[name]
    path = tmp_path / "about.yaml"
    path.write_text(yaml.safe_dump(told), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"needs these fields of .*about.yaml:\n  {re.escape(field)}: "):
        prepared(run, path)


def test_a_recipe_that_nobody_has_described_is_refused(run):
    with pytest.raises(ValueError, match="write it in .*smoke.yaml"):
        prepared(run, None)


def test_a_pickle_in_a_run_is_refused(run, about):
    for name in ("pytorch_model.bin", "training_args.pt"):
        path = run / "model" / name
        torch.save({"weights": torch.zeros(2)}, path)
        try:
            with pytest.raises(ValueError, match=f"{name} is a pickle"):
                publish.publish(run, "someone/smoke", about=about, dry_run=True, tell=lambda line: None)
        finally:
            path.unlink()


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


OWN_CODE = (CLONE / "modeling_memory_mosaic" / "modeling_memory_mosaic.py").read_text(encoding="utf-8")
FOREIGN = {"AutoModel": "evil/repo--modeling_memory_mosaic.MemoryMosaicModel"}
NESTED = {"AutoModel": "evil/repo--sub/modeling_memory_mosaic.MemoryMosaicModel"}
PIPELINE = {"impl": "extra/mod.P", "pt": ["AutoModelForCausalLM"], "type": "text"}
INDEX = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}

NAN = float("nan")
LAUGHS = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 8)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


def change_tensors(folder, change=lambda tensor: tensor, more=None, without=None):
    path = folder / "model.safetensors"
    tensors = {name: change(tensor) for name, tensor in load_file(path).items() if name != without}
    save_file(tensors | (more or {}), path, {"format": "pt"})


def one_infinite(tensor):
    tensor.view(-1)[-1] = float("inf")
    return tensor


def card(folder, metadata):
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n", encoding="utf-8")


# What somebody could do to a folder, who writes checksums anew afterwards.
HARM = {
    "disguised-pickle": (
        lambda f: torch.save({"weights": torch.zeros(2)}, f / "model.safetensors"),
        "model.safetensors is not what its name says",
    ),
    "pickle": (lambda f: torch.save({}, f / "pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "changed-code": (
        lambda f: put(f, "modeling_memory_mosaic.py", OWN_CODE + "\nprint(1)\n"),
        "differs from this project's",
    ),
    "lost-code": (lambda f: (f / "cache_memory_mosaic.py").unlink(), "lacks code .*cache_memory_mosaic.py"),
    "more-code": (
        lambda f: put(f, "custom_generate/generate.py", "print(1)"),
        "generate.py is no file of a published",
    ),
    "own-code-elsewhere": (
        lambda f: put(f, "sub/modeling_memory_mosaic.py", OWN_CODE),
        "is no file of a published model",
    ),
    "script": (lambda f: put(f, "run.sh", "echo hello"), "run.sh is no file of a published model"),
    "linked-folder": (lambda f: (f / "extra").symlink_to(f.parent), "extra is a link"),
    "linked-file": (lambda f: (f / "units.png").symlink_to(f / "loss.png"), "units.png is a link"),
    "code-of-others": (lambda f: edit(f, "config.json", auto_map=FOREIGN), "leads to 'evil/repo--model"),
    "code-of-others-nested": (lambda f: edit(f, "config.json", auto_map=NESTED), "leads to 'evil/repo--sub"),
    "no-map": (lambda f: edit(f, "config.json", auto_map=None), "leads to None"),
    "list-map": (lambda f: edit(f, "config.json", auto_map={"AutoTokenizer": [None, "x.Y"]}), "leads to .None, 'x.Y'"),
    "pipeline": (
        lambda f: edit(f, "config.json", custom_pipelines={"text-generation": PIPELINE}),
        "`custom_pipelines` in config.json is .*leads elsewhere",
    ),
    "kernel": (
        lambda f: edit(f, "config.json", attn_implementation="evil/kernel"),
        "`attn_implementation` in config.json is 'evil/kernel'",
    ),
    "tokenizer-code": (
        lambda f: edit(f, "tokenizer_config.json", auto_map={"AutoTokenizer": "evil/repo--tok.T"}),
        "`auto_map` in tokenizer_config.json",
    ),
    "nested-setting": (
        lambda f: edit(f, "generation_config.json", more=[{"custom_generate": "evil/repo"}]),
        "`more` in generation_config.json is",
    ),
    "processor": (
        lambda f: put(f, "processor_config.json", {"auto_map": FOREIGN}),
        "processor_config.json is no file",
    ),
    "weights-outside": (lambda f: put(f, "model.safetensors.index.json", INDEX), "leads to '../outside.safetensors'"),
    "another-model": (lambda f: edit(f, "config.json", model_type="gpt2"), "holds a model of type 'gpt2'"),
    "broken-settings": (lambda f: put(f, "config.json", "{"), "config.json cannot be read as JSON"),
    "list-of-settings": (lambda f: put(f, "tokenizer_config.json", []), "tokenizer_config.json holds no JSON object"),
    "two-kinds": (lambda f: put(f, "adapter_config.json", {}), "is not one thing that was published"),
    "no-kind": (lambda f: (f / "config.json").unlink(), "is not one thing that was published"),
    "another-licence": (
        lambda f: put(f, "LICENSE", "All rights reserved."),
        "is not this project's, although its code",
    ),
    "no-licence": (lambda f: (f / "LICENSE").unlink(), "has code, but no LICENSE"),
    "no-class": (
        lambda f: edit(f, "config.json", auto_map={"AutoModelForCausalLM": "modeling_memory_mosaic.torch"}),
        "has 'modeling_memory_mosaic.torch' for 'AutoModelForCausalLM', which is no class for that",
    ),
    "other-class": (
        lambda f: edit(f, "config.json", auto_map={"AutoConfig": "modeling_memory_mosaic.MemoryMosaicForCausalLM"}),
        "for 'AutoConfig', which is no class for that",
    ),
    "other-architecture": (
        lambda f: edit(f, "config.json", architectures=["GPT2LMHeadModel"]),
        "`architectures` in config.json names 'GPT2LMHeadModel'",
    ),
    "markup-in-a-label": (lambda f: edit(f, "config.json", id2label={"0": "<script>"}), "config.json has '<script>'"),
    "markup-in-a-key": (lambda f: edit(f, "config.json", id2label={"<b>": "a"}), "config.json has '<b>'"),
    "other-end-of-texts": (
        lambda f: edit(f, "generation_config.json", eos_token_id=[0, 10**9]),
        "`eos_token_id` in generation_config.json is .0, 1000000000., but 0 in config.json",
    ),
    "text-beside-weights": (
        lambda f: save_file(load_file(f / "model.safetensors"), f / "model.safetensors", {"format": "pt", "by": "x"}),
        "says .'by', 'format'. beside its tensors",
    ),
    "attributes": (lambda f: put(f, ".gitattributes", "* filter=evil"), ".gitattributes does more than to keep"),
    "deep-units": (lambda f: put(f, "units.json", "[" * 100_000), "units.json cannot be read as JSON"),
    "list-of-results": (lambda f: put(f, "result.json", "[]"), "result.json holds no JSON object"),
    "type-of-a-list": (lambda f: edit(f, "config.json", model_type=["memory_mosaic"]), "holds a model of type"),
    "map-of-a-list": (lambda f: put(f, "model.safetensors.index.json", {"weight_map": ["a"]}), "has no `weight_map`"),
    "layers": (lambda f: edit(f, "config.json", num_hidden_layers=10**9), "num_hidden_layers. in config.json is 10"),
    "width": (lambda f: edit(f, "config.json", hidden_size=10**12), "hidden_size. in config.json is 10"),
    "other-width": (lambda f: edit(f, "config.json", hidden_size=64, head_dim=32), "tensors do not fit config.json"),
    "heads": (lambda f: edit(f, "config.json", num_attention_heads=-1), "describes no model that can be built"),
    "not-a-number": (lambda f: edit(f, "config.json", layer_norm_eps=float("nan")), "is nan, which is no number"),
    "repository": (
        lambda f: edit(f, "config.json", dtype="someone/repo"),
        "`dtype` in config.json names 'someone/repo'",
    ),
    "address": (lambda f: edit(f, "config.json", dtype="https://x.org"), "`dtype` in config.json names 'https:"),
    "path": (lambda f: edit(f, "config.json", dtype="../x"), "`dtype` in config.json names '../x'"),
    "deep": (lambda f: put(f, "config.json", "[" * 100_000), "config.json cannot be read as JSON: it is nested too"),
    "digits": (lambda f: put(f, "config.json", '{"a": ' + "9" * 6000 + "}"), "config.json cannot be read as JSON"),
    "endless-text": (
        lambda f: edit(f, "generation_config.json", max_new_tokens=10**12),
        "`max_new_tokens` in generation_config.json is 1000000000000: a published model leaves",
    ),
    "stop-strings": (lambda f: edit(f, "generation_config.json", stop_strings=["a"]), "`stop_strings` in generation"),
    "template": (
        lambda f: put(f, "chat_template.jinja", "{% for i in range(99) %}{% endfor %}"),
        "is no file of a pub",
    ),
    "template-within": (
        lambda f: edit(f, "tokenizer_config.json", chat_template="{{ messages }}"),
        "`chat_template` in tokenizer_config.json",
    ),
    "templates-within": (
        lambda f: edit(f, "tokenizer_config.json", chat_template=[{"name": "default", "template": "x"}]),
        "`chat_template` in tokenizer_config.json",
    ),
    "word-that-ends": (
        lambda f: edit(f, "tokenizer_config.json", eos_token="a"),
        "'a' in tokenizer_config.json is no",
    ),
    "new-word": (
        lambda f: edit(f, "tokenizer_config.json", extra_special_tokens=["<evil>"]),
        "'<evil>' in tokenizer_config.json is no special token",
    ),
    "other-end": (lambda f: edit(f, "tokenizer_config.json", eos_token="<|pad|>"), "but the model's has the id 0"),
    "other-words": (
        lambda f: edit(f, "tokenizer_config.json", added_tokens_decoder={"0": {"content": "<evil>"}}),
        "`added_tokens_decoder` in tokenizer_config.json has 0",
    ),
    "map-of-words": (
        lambda f: put(f, "special_tokens_map.json", {"eos_token": "<evil>"}),
        "'<evil>' in special_tokens_map.json is no special token",
    ),
    "large-vocabulary": (
        lambda f: edit(f, "tokenizer.json", added_tokens=[{"id": 10**6, "content": "x", "special": True}]),
        "tokenizer.json has the id 1000000, but the model has",
    ),
    "no-vocabulary": (lambda f: edit(f, "tokenizer.json", model=[]), "tokenizer.json has no vocabulary"),
    "nan": (lambda f: change_tensors(f, lambda t: t * NAN), "numbers that are not finite: it predicts nothing"),
    "nan-in-half-precision": (lambda f: change_tensors(f, lambda t: t.half() * NAN), "numbers that are not finite"),
    "nan-in-bfloat16": (lambda f: change_tensors(f, lambda t: t.bfloat16() * NAN), "numbers that are not finite"),
    "one-infinite": (lambda f: change_tensors(f, one_infinite), "numbers that are not finite"),
    "integers": (lambda f: change_tensors(f, lambda t: t.long()), "is of I64: weights here are of"),
    "second-weights": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model-00001-of-00002.safetensors"),
        "which ones are meant cannot be known",
    ),
    "weights-of-another-variant": (
        lambda f: shutil.copy(f / "model.safetensors", f / "model.fp16.safetensors"),
        "which ones are meant cannot be known",
    ),
    "index-beside-the-whole": (
        lambda f: put(f, "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "model.safetensors"}}),
        "does not hold the tensors that model.safetensors.index.json says",
    ),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "the weights are .., where"),
    "more-tensors": (
        lambda f: change_tensors(f, more={"evil.weight": torch.zeros(2)}),
        "do not fit config.json, such",
    ),
    "fewer-tensors": (
        lambda f: change_tensors(f, without="model.norm.weight"),
        "do not fit config.json, such as 'model.n",
    ),
    "markup-in-a-name": (
        lambda f: put(f, "<img src=x onerror=alert(1)>.png", "x"),
        "is the name of a file with signs",
    ),
    "control-in-a-name": (lambda f: put(f, "a\x1b[2J.png", "x"), "is the name of a file with signs"),
    "line-in-a-name": (lambda f: put(f, "results/a\nb.json", {}), "is the name of a file with signs"),
    "tag-in-the-card": (lambda f: card(f, "license: !!python/name:os.system ''"), "not YAML that can be read, line 1"),
    "laughs-in-the-card": (lambda f: card(f, f"license: mit\n{LAUGHS}"), "values when its aliases are written out"),
    "list-for-a-card": (lambda f: card(f, "- a"), "are no table of values by name"),
    "key-twice-in-the-card": (
        lambda f: card(f, "license: mit\nbase_model: evil/x\nlicense: apache-2.0"),
        "has the key 'license' twice, and readers differ",
    ),
    "key-twice-within-the-card": (lambda f: card(f, "tags: [{a: 1, a: 2}]"), "has the key 'a' twice"),
    "date-in-the-card": (lambda f: card(f, "license: 2020-99-99"), "not YAML that can be read"),
    "deep-settings": (
        lambda f: put(f, "config.json", '{"model_type": "memory_mosaic", "dtype":' + "[" * 900 + "]" * 900 + "}"),
        "config.json",
    ),
    "broken-card": (lambda f: card(f, "license: [mit"), "not YAML that can be read"),
    "numbers-in-the-card": (lambda f: card(f, "1: 2"), "are no table of values by name"),
    "list-of-licences": (lambda f: card(f, "license: [mit]"), "states no licence"),
    "gate-in-the-card": (
        lambda f: card(f, "license: mit\nextra_gated_prompt: pay"),
        "the card has 'extra_gated_prompt'",
    ),
    "widget-in-the-card": (lambda f: card(f, "license: mit\nwidget: [{text: x}]"), "the card has 'widget'"),
    "library-in-the-card": (
        lambda f: card(f, "license: mit\nlibrary_name: evil"),
        "`library_name` in the card is 'evil'",
    ),
    "secret-licence": (lambda f: card(f, "license: '<script>'"), "states no licence"),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_is_not_in_order_is_found_before_anything_is_loaded(copy, monkeypatch, harm):
    do, message = HARM[harm]
    do(copy)
    try:
        verify.write_sums(copy)
    except ValueError:
        pass  # of a link there is none
    monkeypatch.setattr(proof, "check_loads", lambda *arguments: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=message):
        publish.verify_published(str(copy))


def change_weights(folder):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)


def lose_license(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(text.replace("license: apache-2.0\n", "", 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (change_weights, "changed since they were published, by their sha256: model.safetensors"),
        (lambda f: put(f, "results/more.json", {}), r"files it does not list \['results/more.json'\]"),
        (lambda f: (f / "tokenizer.json").unlink(), r"missing files \['tokenizer.json'\]"),
        (lambda f: (f / "SHA256SUMS").unlink(), "has no SHA256SUMS"),
        (lose_license, "states no licence"),
    ],
    ids=["changed", "unlisted", "missing", "no-sums", "no-licence"],
)
def test_what_has_changed_is_found(copy, harm, message):
    harm(copy)
    with pytest.raises(ValueError, match=message):
        publish.verify_published(str(copy))


@pytest.mark.parametrize(
    ("base", "commit"), [("someone/smoke", "main"), ("someone/smoke", None), (None, COMMIT), ("../x", COMMIT)]
)
def test_an_adapter_whose_base_is_not_pinned_is_refused(tmp_path, base, commit):
    put(tmp_path, "adapter_config.json", {"base_model_name_or_path": base, "revision": commit})
    with pytest.raises(ValueError, match="not a base on the Hub at a commit"):
        verify.check_settings(tmp_path)


def test_a_data_set_that_would_load_other_files_is_refused(tmp_path):
    folder = publish.publish(stories_run(tmp_path), "someone/stories", dry_run=True, tell=lambda line: None)
    text = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(text.replace("data_files: stories", "data_files: /tmp/other"), encoding="utf-8")
    with pytest.raises(ValueError, match="it would load something else"):
        publish.verify_published(str(folder))


def test_downloads_of_git_and_of_the_hub_are_verified_too(copy):
    put(copy, ".git/COMMIT_EDITMSG", "Publish")
    put(copy, ".gitattributes", "*.7z filter=lfs diff=lfs merge=lfs -text\n" * 3)
    put(copy, ".cache/huggingface/download/config.json.metadata", "0")
    assert len(verify.check_folder(copy)) == 6


def test_a_folder_in_order_is_told_so(staged):
    told = []
    publish.verify_published(str(staged), tell=told.append)
    assert [line.split(":")[0] for line in told[:-2]] == ["ok"] * 8 and "byte for byte" in told[2]
    assert told[7].startswith("ok: validation_loss measured again is ") and "(within 0.005 nats)" in told[7]
    assert "none of this proves who wrote it" in told[-2] and "the text of the card is not checked" in told[-1]


def test_a_loss_that_is_not_the_models_is_refused(staged, run, about, tmp_path, monkeypatch):
    result, parts = json.loads((staged / "result.json").read_text()), load_model(staged)
    loss = result["metrics"]["validation_loss"]
    assert "ok: validation_loss" in proof.check_loss(result, lambda: parts, own=False)
    for stated in (loss - 0.01, loss + 0.01, NAN, str(loss), None, 1):
        changed = result | {"metrics": {"validation_loss": stated}}
        with pytest.raises(ValueError, match="`validation_loss` in result.json is .*, but measured again it is"):
            proof.check_loss(changed, lambda: parts, own=False)
    kind = publication.KINDS["language_modeling", "model"]._replace(prove=lambda *arguments: [])
    monkeypatch.setitem(publication.KINDS, ("language_modeling", "model"), kind)
    better = shutil.copytree(run, tmp_path / "better", ignore=shutil.ignore_patterns("published"))
    edit(better, "result.json", metrics=result["metrics"] | {"validation_loss": 0.1})
    listed_again(better)
    with pytest.raises(ValueError, match="in result.json is 0.1, but measured again"):
        publish.publish(better, "someone/smoke", about=about, dry_run=True, tell=lambda line: None)
    assert not (better / "published" / "model").exists()


def listed_again(run):
    """The checksums of a run, of which somebody has changed files, written as if nothing were amiss."""
    (run / LIST).write_text(list_of(sums_of(run, [*read_list(run), "model"])), encoding="utf-8")


HERE = {"source": "embedded", "num_stories": 4}


@pytest.mark.parametrize(
    ("result", "why"),
    [
        ({}, "it states none on a text"),
        ({"task": ["a"]}, "it states none on a text"),
        ({"recipe": {"data": {"validation": HERE, "context_length": "64"}}}, "it states none on a text"),
        (
            {"recipe": {"data": {"validation": {"source": "/etc/passwd"}, "context_length": 64}}},
            "the data are not here",
        ),
        (
            {"recipe": {"data": {"validation": HERE | {"num_stories": 10**9}, "context_length": 64}}},
            "data are not here",
        ),
        ({"recipe": {"data": {"validation": HERE, "context_length": 10**9}}}, "the data are not here"),
        ({"recipe": {"data": {"validation": {"source": "embedded"}, "context_length": 64}}}, "not at hand"),
    ],
)
def test_what_a_strangers_result_asks_for_is_not_read(result, why):
    result = {"task": "language_modeling", "metrics": {"validation_loss": 1.0}} | result
    told = proof.check_loss(result, lambda: pytest.fail("it was loaded"), own=False)
    assert told.startswith("not checked: the loss that result.json states") and why in told


@pytest.mark.parametrize("secret", ["hf_" + "a1B2" * 9, "of-no-known-form", "-----BEGIN RSA PRIVATE KEY-----"])
@pytest.mark.parametrize("place", ["result.json", "about", "loss.png", "model/tokenizer_config.json", "weights"])
def test_nothing_that_holds_a_secret_is_staged(run, about, tmp_path, monkeypatch, place, secret):
    monkeypatch.setenv("HF_TOKEN", "of-no-known-form")
    monkeypatch.setattr(proof, "check_loads", lambda *arguments: pytest.fail("it was loaded"))
    leaking = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("published"))
    if place == "about":
        about = tmp_path / "about.yaml"
        about.write_text(yaml.safe_dump(ABOUT_SMOKE | {"purpose": f"To show {secret} to all."}), encoding="utf-8")
    elif place == "loss.png":
        with (leaking / place).open("ab") as file:
            file.write(secret.encode())
    elif place == "weights":
        path = leaking / "model" / "model.safetensors"
        save_file(load_file(path), path, {"format": "pt", "by": secret})
    elif place == "result.json":
        edit(leaking, place, samples=[{"prompt": "Once", "text": f"Once\nupon {secret}"}])
    else:
        put(leaking, place, {"bos_token": secret})
    listed_again(leaking)
    name = {"about": "README.md", "weights": "model.safetensors"}.get(place, place.removeprefix("model/"))
    name = "README.md" if place == "result.json" else name  # its card shows what it says
    with pytest.raises(ValueError, match=rf"{name}, line \d+, holds what .* looks like") as error:
        publish.publish(leaking, "someone/smoke", about=about, dry_run=True, tell=lambda line: None)
    assert secret not in str(error.value)
    assert not (leaking / "published" / "model").exists()


def test_a_secret_in_packed_stories_and_across_chunks_is_found(tmp_path):
    secret = b"hf_" + b"a1B2" * 9
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 3 + secret))
    (tmp_path / "b.txt").write_bytes(b"\n" + b"a " * 2**19 + b"\n" + secret)
    (tmp_path / "c.txt").write_bytes(b"a " * (2**19 - 10) + secret)
    for name, line in (("a.jsonl.gz", 4), ("b.txt", 3), ("c.txt", 1)):
        with pytest.raises(ValueError, match=f"{name}, line {line}, holds what a Hugging Face token looks like"):
            secrecy.check_no_secrets(tmp_path, [name])
    for text in ("a hf_token", "risk-abcdefghijklmnopqrst", "sk-" + "-" * 40, "a" * 40, "f" * 64, "http://a.b/c@d"):
        (tmp_path / "d.txt").write_text(text)
        assert "no token" in secrecy.check_no_secrets(tmp_path, ["d.txt"])


def test_a_chat_template_that_came_with_a_tokenizer_is_left_out(run, about, tmp_path, monkeypatch):
    kind = publication.KINDS["language_modeling", "model"]._replace(prove=lambda *arguments: [])
    monkeypatch.setitem(publication.KINDS, ("language_modeling", "model"), kind)
    own = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("published"))
    put(own, "model/chat_template.jinja", "{{ messages }}")
    listed_again(own)
    folder = publish.publish(own, "someone/smoke", about=about, dry_run=True, tell=lambda line: None)
    assert not (folder / "chat_template.jinja").exists()


ADAPTER = {
    "base_model_name_or_path": "someone/smoke",
    "revision": COMMIT,
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "r": 8,
    "lora_alpha": 16.0,
    "lora_dropout": 0.0,
    "target_modules": ["k_proj"],
    "target_parameters": None,
    "loftq_config": {},
    "peft_version": "0.21.2",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "adapters here are LORA"),
        ({"peft_type": ["LORA"]}, "adapters here are LORA"),
        ({"auto_mapping": {"base_model_class": "x", "parent_library": "evil"}}, "`auto_mapping` in"),
        ({"megatron_config": {"a": 1}}, "`megatron_config` in"),
        ({"corda_config": {"cache_file": "/tmp/x.pt"}}, "`cache_file` in|`corda_config` in"),
        ({"eva_config": {"rho": 2.0}}, "`eva_config` in .* no adapter of this project has that"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` in"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` in"),
        ({"layer_replication": [[0, 10**9]]}, "`layer_replication` in"),
        ({"rank_pattern": {"(a+)+$": 4}}, "`rank_pattern` in"),
        ({"target_modules": "(a+)+$"}, "`target_modules` in .*, not a list of names"),
        ({"target_modules": ["(a+)+$"]}, "`target_modules` in .*, not a list of names"),
        ({"tokenizer_name_or_path": "evil/repo"}, "`tokenizer_name_or_path` in"),
        ({"r": 10**12}, "`r` in"),
        ({"r": True}, "`r` in"),
        ({"lora_alpha": NAN}, "`lora_alpha` in"),
    ],
)
def test_an_adapter_is_lora_as_recipes_have_it(tmp_path, change, message):
    put(tmp_path, "adapter_config.json", ADAPTER)
    verify.check_settings(tmp_path)
    put(tmp_path, "adapter_config.json", ADAPTER | change)
    with pytest.raises(ValueError, match=message):
        verify.check_settings(tmp_path)


def test_the_weights_of_an_adapter_are_finite_and_lora(tmp_path):
    put(tmp_path, "adapter_config.json", ADAPTER)
    name = "base_model.model.model.layers.0.contextual_memory.k_proj.lora_A.weight"
    for tensors, message in (
        ({name: torch.full((2, 2), NAN, dtype=torch.bfloat16)}, "not finite"),
        ({"base_model.model.lm_head.weight": torch.zeros(2)}, "is no part of LoRA"),
    ):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            verify.check_weights(tmp_path)
    save_file({name: torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    assert "every number finite" in verify.check_weights(tmp_path)
    shutil.copy(tmp_path / "adapter_model.safetensors", tmp_path / "adapter_more.safetensors")
    with pytest.raises(ValueError, match="which ones are meant cannot be known"):
        verify.check_weights(tmp_path)


def nested(**changes):
    """A memory model's folder whose encoder has changed settings."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["encoder"] |= changes
        put(folder, "config.json", config)

    return change


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (nested(model_type="evil"), "has a part of the type 'evil'"),
        (nested(model_type=["gpt2"]), "has a part of the type"),
        (nested(auto_map={"AutoModel": "evil/repo--x.Y"}), "`auto_map` in config.json"),
        (nested(more=1), "settings that a memory_mosaic does not have: 'more'"),
        (nested(_name_or_path="evil/repo"), "`_name_or_path` in config.json is 'evil/repo'"),
        (nested(dtype="evil/repo"), "`dtype` in config.json names 'evil/repo'"),
        (nested(quantization_config={"quant_method": "x"}), "does not have: 'quantization_config'"),
        (nested(num_hidden_layers=10**9), "`num_hidden_layers` in config.json is 1000000000"),
        (lambda f: edit(f, "config.json", encoder="evil/repo"), "`encoder` in config.json names 'evil/repo'"),
        (
            lambda f: edit(f, "config.json", encoder=[1]),
            "`encoder` in config.json is .1., not the settings of a model",
        ),
        (lambda f: edit(f, "config.json", memory_size=10**12), "`memory_size` in config.json is"),
    ],
)
def test_a_model_within_a_model_is_looked_at_too(tmp_path, harm, message):
    folder = memory_model_folder(tmp_path / "model")
    assert "every number finite" in verify.check_weights(folder)
    harm(folder)
    with pytest.raises(ValueError, match=message):
        verify.check_settings(folder)
        verify.check_weights(folder)


def memory_model_folder(folder):
    architecture = json.loads((CONFIGURATION / "model" / "memory-characters.json").read_text())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    model.save_pretrained(folder)
    return folder


def test_a_failing_snippet_is_shown():
    card = "```python\nprint('fine')\n```\n\n```python\nimport nothing_of_the_kind\n```\n"
    with pytest.raises(ValueError, match="this snippet of the card fails:\n\nimport nothing_of_the_kind"):
        proof.check_snippets(card, {})


def test_a_linter_that_is_not_content_is_heard(copy):
    path = copy / "modeling_memory_mosaic.py"
    path.write_text(path.read_text().replace('base_model_prefix = "model"', 'base_model_prefix = ""'))
    with pytest.raises(ValueError, match="TRF002"):
        proof.check_lint(copy)


def test_failure_leaves_nothing_staged(run, about, monkeypatch):
    monkeypatch.setattr(proof, "check_loads", lambda *arguments: (_ for _ in ()).throw(ValueError("no")))
    shutil.rmtree(run / "published", ignore_errors=True)
    with pytest.raises(ValueError, match="^no$"):
        publish.publish(run, "someone/smoke", about=about, dry_run=True, tell=lambda line: None)
    assert not list((run / "published").iterdir())


@pytest.mark.parametrize("path", sorted(ABOUT.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_said_of_a_recipe_is_whole(path):
    load_about(path.stem)
    assert (CONFIGURATION / "recipe" / path.name).is_file()


def test_every_snippet_is_in_a_card():
    templates = "\n".join(path.read_text(encoding="utf-8") for path in TEMPLATES.rglob("*.jinja"))
    snippets = {path.name for path in (TEMPLATES / "snippets").glob("*.py")}
    assert snippets == set(re.findall(r'"snippets/(\w+\.py)"', templates))
