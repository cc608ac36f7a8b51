# SPDX-License-Identifier: Apache-2.0
"""The commands: a run reaches a stranger by way of a Hub; what cannot be published is refused before any work."""

import json
import re
import shutil

import pytest
from helpers import processes
from helpers.damage import flip
from helpers.hub_server import TOKEN, Hub, Repository
from helpers.publications import COMMIT, prepare, stage
from typer.testing import CliRunner

from training import hub
from training.__main__ import app
from training.export import run_isolated
from training.publishing import artifacts, publish, trials, upload
from training.publishing.folder import CARD, NO_COMMIT, published_files
from training.result import write_result
from training.run_folder import locked


def call(*arguments, **environment):
    """Run the command line, which is free to ask a Hub."""
    return processes.call("-m", "training", *map(str, arguments), HF_HUB_OFFLINE="0", **environment)


@pytest.mark.slow
def test_a_run_is_published_and_verified_by_a_stranger(run, about, tmp_path):
    """The stranger has an empty cache and nothing but the address."""
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
        card = files[CARD].decode()
        assert pinned in card and NO_COMMIT not in card

        process = call("publish", "someone/smoke", "--verify-only", HF_TOKEN=TOKEN, **home)
        assert process.returncode == 0, process.stderr
        assert "checksums hold" in process.stdout and "byte for byte" in process.stdout

        server.repositories["model", "someone/smoke"].private = False
        blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        snippet = f"{blocks[-1]}\n{blocks[0]}"  # its check, and how to load it
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "stranger")}
        code = f"import os\nos.environ.update({environment!r})\nos.environ.pop('HF_HUB_OFFLINE')\n{snippet}"
        process = run_isolated(["-c", code])
        assert process.returncode == 0 and "Once upon a time" in process.stdout, process.stderr


@pytest.mark.slow
def test_an_adapter_is_verified_with_its_base(adapted, staged, about, tmp_path):
    """Both come from the Hub. The adapter names the commit of the base that has no card yet."""
    with Hub() as server:
        base = hub_repository(server, "someone/smoke", staged, without=CARD)
        folder = stage(adapted, "someone/lora", "adapter", about, f"someone/smoke@{base}")
        hub_repository(server, "someone/lora", folder)
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
        process = call("publish", "someone/lora", "--verify-only", **environment)
        assert process.returncode == 0 and f"its base is someone/smoke at commit {base}" in process.stdout, (
            process.stderr
        )
        assert process.stdout.count("byte for byte") == 1 and "no code" in process.stdout


def hub_repository(server, repo_id, folder, without=None):
    repository = server.repositories["model", repo_id] = Repository(private=False)
    names = [name for name in published_files(folder) if name != without]
    return repository.commit("main", {name: (folder / name).read_bytes() for name in names})


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
def test_what_cannot_be_published_is_refused_at_once(run, about, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(run, about, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--verify-only", "--public", "--dry-run"], "leave out --public, --dry-run"),
        (["--revision", "v2", "--repo-id", "someone/x"], "--revision is 'v2', which is for --verify-only"),
        (["--verify-only", "--revision", "v2"], "is a folder: leave out --revision"),
        ([], "give --repo-id user/name"),
        (["--init", "--public", "--what", "model"], "--init writes one file: leave out --public, --what"),
    ],
    ids=["verify", "revision", "folder", "nowhere", "init"],
)
def test_options_without_a_meaning_are_refused(run, options, message):
    process = CliRunner().invoke(app, ["publish", str(run), *options])
    assert process.exit_code == 1 and message in process.stderr


def test_what_is_neither_a_folder_nor_a_repository_is_refused():
    for name in ("runs/a/typo", "typo"):
        with pytest.raises(ValueError, match="neither a folder nor user/name"):
            publish.verify_published(name)


def test_an_unpublished_base_is_asked_for(adapted, about):
    with pytest.raises(ValueError, match="the card has to name its base on the Hub"):
        prepare(adapted, about)
    with pytest.raises(ValueError, match="--base user/name@COMMIT"):
        prepare(adapted, about, base="someone/smoke@main")


def test_a_base_that_has_other_weights_is_refused(adapted, about, monkeypatch):
    def refuse(repo_id, revision, weights):
        assert (repo_id, revision) == ("someone/gpt2", COMMIT) and list(weights) == ["model.safetensors"]
        raise ValueError("other weights")

    key = "fine_tuning", "adapter"
    untried = artifacts.ARTIFACTS[key]._replace(run_trials=lambda *arguments: [])
    monkeypatch.setitem(artifacts.ARTIFACTS, key, untried)
    monkeypatch.setattr(hub, "check_base_weights", refuse)  # `test_hub.py` tests it
    monkeypatch.setattr(upload, "upload_folder", lambda *arguments: pytest.fail("it was uploaded"))
    with pytest.raises(ValueError, match="^other weights$"):
        publish.publish(adapted, "someone/lora", "adapter", about, f"someone/gpt2@{COMMIT}", log=lambda line: None)


def test_another_base_than_the_one_adapted_is_refused(adapted, run, about):
    path = run / "model" / "model.safetensors"
    weights = path.read_bytes()
    try:
        path.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        with pytest.raises(ValueError, match="are not those that .* has adapted"):
            stage(adapted, "someone/lora", "adapter", about, f"someone/smoke@{COMMIT}")
    finally:
        path.write_bytes(weights)


def test_a_run_without_a_result_is_refused(tmp_path, run, about):
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    process = CliRunner().invoke(app, ["publish", str(unfinished), "--repo-id", "someone/smoke"])
    assert process.exit_code == 1 and "has no result.json" in process.stderr


def test_a_run_of_another_kind_of_model_is_refused(tmp_path, run, about):
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    result["architecture"]["model_type"] = "gpt2"
    write_result(result, tmp_path)
    with pytest.raises(ValueError, match="holds a gpt2: only Memory Mosaics and memory models"):
        prepare(tmp_path, about)


@pytest.mark.parametrize("name", ["result.json", "model/model.safetensors", "loss.png", "checksums.json"])
def test_a_run_that_has_changed_is_not_published(name, run, about, tmp_path):
    changed = shutil.copytree(run, tmp_path / "run")
    flip(changed / name)
    with pytest.raises(ValueError, match=f"is damaged .*{re.escape(name)}.*run the recipe again"):
        prepare(changed, about)


def test_a_run_is_published_by_one_process_at_a_time(run, about):
    with locked(run), pytest.raises(ValueError, match="a run is going on"):
        stage(run, "someone/smoke", about=about)


def test_failure_leaves_nothing_staged(run, about, tmp_path, monkeypatch):
    def fail(*arguments):
        raise ValueError("no")

    monkeypatch.setattr(trials, "check_loads", fail)
    run = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("published"))
    with pytest.raises(ValueError, match="^no$"):
        stage(run, "someone/smoke", about=about)
    assert not list((run / "published").iterdir())
