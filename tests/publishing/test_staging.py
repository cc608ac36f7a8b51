# SPDX-License-Identifier: Apache-2.0
"""Staging: each artifact holds all of its files, nothing of this machine, no pickle and no secret."""

import gzip
import json
import shutil
import subprocess

import pytest
import torch
import yaml
from helpers.memory_recipes import read_memory_recipe
from helpers.payload import PAYLOAD
from helpers.publications import (
    ABOUT_SMOKE,
    COMMIT,
    edit,
    list_again,
    memorize,
    put,
    stage,
    stage_memory,
    stories_run,
)
from huggingface_hub import DatasetCard, ModelCard, RepoCard
from safetensors.torch import load_file, save_file

from training import secrecy
from training.paths import RESULTS
from training.publishing import artifacts, checks, publish, trials
from training.publishing.folder import published_files, write_sums
from training.publishing.portable_results import comparable_results, read_portable_result
from training.result import write_result
from training.tasks import memory_model


def test_the_payload_is_whole(staged, run):
    names = set(published_files(staged))
    assert names == {
        *PAYLOAD,
        *("README.md", "LICENSE", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "result.json", "units.json", "loss.png"),
    }
    assert (staged / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    listed = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=staged, capture_output=True, text=True)
    assert listed.returncode == 0 and listed.stdout.count(": OK") == len(names) - 2


@pytest.mark.slow
@pytest.mark.parametrize("what", ["adapter", pytest.param("merged", marks=pytest.mark.slow)])
def test_a_fine_tuned_model_names_its_base(adapted, run, about, what):
    folder = stage(adapted, "someone/lora", what, about, f"someone/smoke@{COMMIT}")
    metadata = ModelCard.load(folder / "README.md").data.to_dict()
    relation = "adapter" if what == "adapter" else "finetune"
    assert metadata["base_model"] == "someone/smoke" and metadata["base_model_relation"] == relation
    assert metadata["library_name"] == ("peft" if what == "adapter" else "transformers")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| the base | 0 |  | {result['base']['metrics']['validation_loss']:.4f} |" in card
    assert f"| {result['trained_parameters']:,} | 0 | {result['metrics']['validation_loss']:.4f} |" in card
    assert f"`{COMMIT[:12]}`" in card
    for name in published_files(folder):
        assert str(run.parent).encode() not in (folder / name).read_bytes(), f"{name} holds a path of this machine"
    if what == "adapter":
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert (settings["base_model_name_or_path"], settings["revision"]) == ("someone/smoke", COMMIT)
        assert not list(folder.glob("*.py")) and not (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_a_memory_model_is_published(tmp_path, about):
    recipe = read_memory_recipe(tmp_path)
    memory_model.run(recipe)
    lines = []
    folder = stage(recipe.folder, "someone/memory", about=about, lines=lines)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    card = ModelCard.load(folder / "README.md")
    assert "memory-model" in card.data.tags and "arxiv:2602.13466" in card.data.tags
    assert f"| {result['metrics']['causal_loss']:.3f} | {result['unigram']['loss']:.3f} |" in card.text
    assert f"{result['metrics']['autoencoding_accuracy']:.4f}" in card.text
    assert (folder / "stages.png").is_file() and "3 snippets of the card run" in "\n".join(lines)


@pytest.mark.slow
def test_a_v2_model_and_its_memory_are_published(run_v2, about, tmp_path):
    lines = []
    stage(run_v2, "someone/smoke", about=about, lines=lines)
    memory = memorize(tmp_path / "texts", run_v2 / "model", lily="Lily has the red ball.", tom="Tom had a blue kite.")
    folder = stage_memory(memory, lines=lines)
    log = "\n".join(lines)
    assert "ok: 6 snippets of the card run" in log and "ok: 3 snippets of the card run" in log
    assert "ok: loads in a clean offline process, with equal logits" in log
    assert "ok: 2 of 2 texts, read again by the base" in log
    assert (folder / "recall.png").is_file()


@pytest.fixture
def space(run, about):
    return stage(run, "someone/space", "space", about, f"someone/smoke@{COMMIT}")


@pytest.mark.slow
def test_a_space_runs_by_what_lies_in_it(run, about):
    lines = []
    folder = stage(run, "someone/space", "space", about, f"someone/smoke@{COMMIT}", lines=lines)
    assert "runs as a Space" in "\n".join(lines)
    names = published_files(folder)
    assert {*checks.SPACE_CODE, "LICENSE", "README.md", "model/config.json"} <= set(names)
    assert not [name for name in names if "pycache" in name]
    package = {path.name for path in checks.PACKAGE.glob("*.py")}
    assert {name.split("/")[1] for name in names if name.startswith(checks.PACKAGE.name)} == package
    metadata = RepoCard.load(folder / "README.md").data.to_dict()
    assert metadata["sdk"] == "gradio" and metadata["models"] == ["someone/smoke"] and metadata["app_file"] == "app.py"
    assert len(metadata["short_description"]) <= 60  # the Hub's limit
    publish.verify_published(str(folder), log=lines.append)


@pytest.mark.slow
def test_a_space_with_another_card_or_other_code_is_refused(space):
    folder = space
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
            checks.check_settings(folder)
    (folder / "README.md").write_text(good)
    asked = (folder / "requirements.txt").read_bytes()
    for harm in (b"--index-url http://127.0.0.1:9/simple\n", asked + b"evil-package\n", asked.rstrip(), b""):
        (folder / "requirements.txt").write_bytes(harm)
        with pytest.raises(ValueError, match="requirements.txt differs from this project's"):
            checks.check_code(folder)
    (folder / "requirements.txt").write_bytes(asked)
    with (folder / "app.py").open("a") as file:
        file.write("print('hello')")
    write_sums(folder)
    with pytest.raises(ValueError, match="app.py differs from this project's"):
        publish.verify_published(str(folder))


def test_stories_are_published_as_a_data_set(tmp_path):
    folder = stage(stories_run(tmp_path / "stories"), "someone/stories")
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0" and "someone/stories" in card.text
    assert set(published_files(folder)) == {"README.md", "SHA256SUMS", "result.json", "stories.jsonl.gz", "words.png"}


def test_stories_without_a_licence_or_with_another_number_are_refused(tmp_path):
    run = stories_run(tmp_path / "stories", license="unknown")
    with pytest.raises(ValueError, match="states no licence"):
        stage(run, "someone/stories")
    result = json.loads((run / "result.json").read_text())
    result["recipe"]["license"], result["metrics"]["kept"] = "mit", 3
    write_result(result, run)
    with pytest.raises(ValueError, match="with 2 stories, but its result says 3"):
        stage(run, "someone/stories")
    assert not (run / "published" / "dataset").exists()


def test_baselines_are_those_of_the_same_recipe_and_data(tmp_path):
    """The committed results of stories_tiny compare with each other; a result on other data compares with none."""
    results = {path.name: json.loads(path.read_text()) for path in sorted((RESULTS / "stories_tiny").glob("*.json"))}
    result, run = results["mosaic-tiny--seed1.json"], tmp_path / "runs" / "mosaic-tiny-seed1"
    compared = comparable_results(run, result)
    assert compared[0] is result and {(each["model"], each["seed"]) for each in compared} == {
        (model, seed) for model in ("gpt2-tiny", "mosaic-tiny") for seed in (0, 1, 2)
    }
    other = json.loads(json.dumps(result))
    other["data"]["train"]["files"] = {"train.jsonl.gz": "0" * 64}
    assert comparable_results(run, other) == [other]


def test_paths_of_the_machine_are_taken_out_and_nothing_else(tmp_path):
    result = {
        "model": "/home/x/runs/base",
        "recipe": {"data": {"train": {"source": "../../x/stories.txt"}}, "output_dir": "/tmp/run"},
        "samples": [{"prompt": "/a/b story", "text": "/a/b story/\nOnce / upon"}],
        "base": {"name": "runs/base/model"},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    read = read_portable_result(tmp_path / "result.json")
    assert read["model"] == "base" and read["recipe"] == {
        "data": {"train": {"source": "stories.txt"}},
        "output_dir": "run",
    }
    assert (read["samples"], read["base"]) == (result["samples"], result["base"])


def test_a_chat_template_that_came_with_a_tokenizer_is_left_out(run, about, tmp_path, monkeypatch):
    key = "language_modeling", "model"
    untried = artifacts.ARTIFACTS[key]._replace(run_trials=lambda *arguments: [])
    monkeypatch.setitem(artifacts.ARTIFACTS, key, untried)
    changed = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("published"))
    put(changed, "model/chat_template.jinja", "{{ messages }}")
    list_again(changed)
    folder = stage(changed, "someone/smoke", about=about)
    assert not (folder / "chat_template.jinja").exists()


def test_a_pickle_in_a_run_is_refused(run, about):
    for name in ("pytorch_model.bin", "training_args.pt"):
        path = run / "model" / name
        torch.save({"weights": torch.zeros(2)}, path)
        try:
            with pytest.raises(ValueError, match=f"{name} is a pickle"):
                stage(run, "someone/smoke", about=about)
        finally:
            path.unlink()


@pytest.mark.parametrize("secret", ["hf_" + "a1B2" * 9, "of-no-known-form", "-----BEGIN RSA PRIVATE KEY-----"])
@pytest.mark.parametrize("place", ["result.json", "about", "loss.png", "model/tokenizer_config.json", "weights"])
def test_nothing_that_holds_a_secret_is_staged(run, about, tmp_path, monkeypatch, place, secret):
    monkeypatch.setenv("HF_TOKEN", "of-no-known-form")
    monkeypatch.setattr(trials, "check_loads", lambda *arguments: pytest.fail("it was loaded"))
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
    list_again(leaking)
    name = {"about": "README.md", "weights": "model.safetensors"}.get(place, place.removeprefix("model/"))
    name = "README.md" if place == "result.json" else name  # its card shows what it says
    with pytest.raises(ValueError, match=rf"{name}, line \d+, holds what .* looks like") as error:
        stage(leaking, "someone/smoke", about=about)
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
