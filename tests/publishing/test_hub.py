# SPDX-License-Identifier: Apache-2.0
"""Uploads to a Hub on this machine: one commit or none, wherever the connection breaks, and no token in a message."""

import hashlib
import json
import traceback

import pytest
from helpers.hub_server import TOKEN, Refusal, served
from huggingface_hub import constants

from training.hub import Target, check_base_files, check_base_weights, download
from training.publishing.folder import CARD, published_files, write_sums
from training.publishing.upload import upload_folder


# huggingface_hub 2.4 uploads large files by an argument that httpx2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

RESULT = {
    "recipe": {"name": "stories", "model": "mosaic", "seed": 0, "training": {"max_steps": 2, "logging_steps": 1}},
    "data": {"train": {"name": "embedded"}},
}
WEIGHTS = b"weights " * 1000


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with served(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "staged")


def make_folder(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "result.json").write_text(json.dumps(RESULT))
    return folder


def card(revision):
    return f"---\nlicense: apache-2.0\n---\n# A model at {revision}\n"


def send(folder, repo_id="someone/stories", **options):
    write_sums(folder)
    return upload_folder(folder, Target(repo_id, **options), "Publish stories", card)


def published(hub, repo_id="someone/stories", kind="model"):
    return hub.repositories[kind, repo_id]


def assert_whole(repository, pinned, revision="main"):
    """Check that all files are there, and that the card pins a commit with the same payload."""
    files, payload = dict(repository.files(revision)), dict(repository.files(pinned))
    assert files.keys() == {".gitattributes", "config.json", "model.safetensors", "result.json", "SHA256SUMS", CARD}
    assert files["model.safetensors"] == WEIGHTS and files.pop(CARD).decode() == card(pinned)
    payload.pop(CARD, None)  # it has the card of the version before
    assert payload == files


def test_a_folder_appears_on_main_in_one_commit(hub, folder):
    address, pinned = send(folder)
    repository = published(hub)
    assert_whole(repository, pinned)
    assert [revision for revision, _ in repository.history].count("main") == 2  # the empty one of the Hub, and ours
    assert address == f"{hub.url}/someone/stories/commit/{repository.refs['main']}"
    assert repository.private


def test_the_same_again_changes_nothing(hub, folder):
    first = send(folder)
    history = list(published(hub).history)
    assert send(folder)[1] == first[1]
    assert published(hub).history == history


def test_an_upload_through_xet(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    _, pinned = send(folder)
    files = published(hub).files(pinned)
    assert files["model.safetensors"].decode() == "in xet: " + hashlib.sha256(WEIGHTS).hexdigest()
    assert not hub.blobs and any("/cas/" in request for request in hub.requests)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_connection_may_break_at_any_request(hub, folder, tmp_path, moment):
    """After any break, `main` is as it was or whole, and the same upload again completes it."""
    send(folder, "someone/counted")
    requests = len([request for request in hub.requests if "agent-harnesses" not in request])
    assert requests > 10
    broken = 0
    for number in range(requests):
        repo_id, seen = f"someone/broken-{number}", []

        def drop(request, seen=seen, number=number):
            seen.append(request)
            return len(seen) > number  # from here on, all of them

        setattr(hub, f"drop_{moment}", drop)
        try:
            send(folder, repo_id)
        except OSError as error:
            broken += 1
            assert TOKEN not in str(error) and "the same command again goes on" in str(error)
        setattr(hub, f"drop_{moment}", lambda request: False)
        repository = hub.repositories.get(("model", repo_id))
        if repository is not None:
            assert CARD in repository.files() or repository.files().keys() == {".gitattributes"}
        _, pinned = send(folder, repo_id)
        assert_whole(published(hub, repo_id), pinned)
        assert [revision for revision, _ in published(hub, repo_id).history].count("main") == 2
    assert broken >= requests - 1


def test_a_new_version_replaces_the_old_one_whole(hub, folder):
    (folder / "loss.png").write_bytes(b"a picture")
    send(folder)
    (folder / "loss.png").unlink()
    (folder / "config.json").write_text('{"use_cache": true}')
    _, pinned = send(folder)
    assert_whole(published(hub), pinned)
    assert published(hub).files()["config.json"] == b'{"use_cache": true}'


def test_a_change_in_the_meantime_is_not_overwritten(hub, folder, monkeypatch):
    send(folder)
    (folder / "config.json").write_text('{"use_cache": true}')
    theirs = {".gitattributes": b"", "their.txt": b"theirs"}

    def interfere(request):
        if request.startswith("POST") and request.endswith("/commit/main"):
            published(hub).commit("main", theirs)
        return False

    hub.drop_before = interfere
    with pytest.raises(OSError, match="has been changed in the meantime"):
        send(folder)
    assert published(hub).files() == theirs


@pytest.mark.parametrize("token", ["hf_wrong", ""], ids=["wrong", "none"])
def test_a_refused_token_is_not_shown(hub, folder, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OSError, match="HF_TOKEN") as error:
        send(folder)
    shown = "".join(traceback.format_exception(error.value))  # as with --debug
    assert not hub.repositories and (not token or token not in shown)


def test_a_hidden_repository_of_somebody_else_is_not_touched(hub, folder, monkeypatch):
    send(folder)
    history = list(published(hub).history)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OSError, match="does not accept the token"):
        send(folder)
    assert published(hub).history == history


def result(**changes):
    return json.dumps(RESULT | changes).encode()


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"model.bin": b"theirs"}, "holds 1 files .model.bin. but no result.json"),
        ({"README.md": b"---\nlicense: mit\n---\n# Mine\n"}, "holds 1 files .README.md. but no result.json"),
        ({"result.json": result(recipe=RESULT["recipe"] | {"name": "other"})}, "holds a run of another recipe"),
        ({"result.json": result(recipe=RESULT["recipe"] | {"seed": 3})}, "holds a run of another recipe"),
        ({"result.json": result(data={"train": {"name": "mine"}})}, "holds a run of another data"),
        ({"result.json": result(base={"weights": {"model.safetensors": "0"}})}, "holds a run of another base"),
        ({"result.json": b"[1, 2]"}, "holds a run of another recipe"),
        ({"result.json": b"\x80\x04"}, "holds a run of another recipe"),
        ({"result.json": result(), "adapter_config.json": b"{}"}, "has no config.json"),
    ],
    ids=["foreign", "a-card", "recipe", "seed", "data", "base", "a-list", "no-text", "an-adapter"],
)
def test_other_content_is_refused(hub, folder, theirs, message):
    send(folder)
    repository = published(hub)
    repository.commit("main", {".gitattributes": b"", **theirs})
    with pytest.raises(ValueError, match=message):
        send(folder)
    assert repository.files() == {".gitattributes": b"", **theirs}


def memory_result(digest, name="texts", weights="0"):
    """The result of a memory that has read one file."""
    read = {"kind": "local", "name": name, "files": {"a.txt": digest}}
    base = {"weights": {"model.safetensors": weights}}
    return json.dumps({"name": name, "task": "memorize", "recipe": {}, "data": {"read": read}, "base": base})


def test_a_memory_with_other_texts_is_a_version_of_the_same(hub, tmp_path):
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.safetensors").write_bytes(WEIGHTS)
    (folder / "result.json").write_text(memory_result("1"))
    send(folder, "someone/texts")
    (folder / "result.json").write_text(memory_result("2"))
    send(folder, "someone/texts")
    for other, message in (
        (memory_result("2", name="others"), "holds a run of another recipe"),
        (memory_result("2", weights="1"), "holds a run of another base"),
        (json.dumps(RESULT), "holds a run of another recipe"),
    ):
        (folder / "result.json").write_text(other)
        with pytest.raises(ValueError, match=message):
            send(folder, "someone/texts")
    (folder / "result.json").write_text(memory_result("2"))
    (folder / "memory.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match="has memory.safetensors, unlike the folder to be published"):
        send(folder, "someone/texts")


def test_an_earlier_version_may_have_shown_its_progress_otherwise(hub, folder):
    send(folder)
    recipe = RESULT["recipe"] | {"training": {"max_steps": 2, "disable_tqdm": True}}
    (folder / "result.json").write_bytes(result(recipe=recipe))
    send(folder)
    assert json.loads(published(hub).files()["result.json"])["recipe"] == recipe


def test_what_somebody_has_added_stays(hub, folder):
    (folder / "loss.png").write_bytes(b"a picture")
    send(folder)
    published(hub).commit("main", published(hub).files() | {"precious.txt": b"theirs"})
    (folder / "loss.png").unlink()
    send(folder)
    assert published(hub).files()["precious.txt"] == b"theirs" and "loss.png" not in published(hub).files()


@pytest.mark.parametrize("begun", ["", "---\nlicense: apache-2.0\n---\n"], ids=["nothing", "a-licence-chosen"])
def test_an_empty_repository_is_filled(hub, folder, begun):
    send(folder)
    first = published(hub)
    hub.repositories["model", "someone/stories"] = repository = type(first)(private=True)
    if begun:
        repository.commit("main", {CARD: begun.encode(), ".gitattributes": b""})
    _, pinned = send(folder)
    assert_whole(repository, pinned)


def test_public_only_if_asked_for(hub, folder):
    send(folder, "someone/open", public=True)
    assert not published(hub, "someone/open").private
    with pytest.raises(ValueError, match="is public already: pass --public"):
        send(folder, "someone/open")
    send(folder, "someone/closed")
    with pytest.raises(ValueError, match="is private already: leave out --public"):
        send(folder, "someone/closed", public=True)


def test_a_pull_request_leaves_main_alone(hub, folder):
    send(folder)
    main = dict(published(hub).files())
    (folder / "config.json").write_text('{"use_cache": true}')
    address, pinned = send(folder, create_pr=True)
    assert published(hub).files() == main
    assert address.endswith("/discussions/1")
    assert_whole(published(hub), pinned, "refs/pr/1")


@pytest.mark.slow
@pytest.mark.parametrize("request_number", range(1, 12))
def test_an_interrupted_pull_request_is_continued(hub, folder, request_number):
    send(folder)
    (folder / "config.json").write_text('{"use_cache": true}')
    seen = []

    def drop(request):
        seen.append(request)
        return len(seen) > request_number

    hub.drop_before = drop
    with pytest.raises(OSError, match="the same command again goes on"):
        send(folder, create_pr=True)
    hub.drop_before = lambda request: False
    _, pinned = send(folder, create_pr=True)
    assert len(published(hub).proposals) == 1
    assert_whole(published(hub), pinned, "refs/pr/1")


def test_what_is_there_already_is_not_proposed(hub, folder):
    send(folder)
    with pytest.raises(ValueError, match="there is nothing to propose"):
        send(folder, create_pr=True)
    assert not published(hub).proposals


def test_nothing_is_proposed_to_what_is_not_there(hub, folder):
    with pytest.raises(ValueError, match="nothing to propose to"):
        send(folder, create_pr=True)
    assert not hub.repositories


def test_invalid_metadata_are_refused_before_anything_is_there(hub, folder):
    with pytest.raises(ValueError, match="license.* must be one of"):
        upload_folder(
            folder, Target("someone/stories"), "Publish", lambda revision: "---\nlicense: mine\n---\n# Mine\n"
        )
    assert not hub.repositories


@pytest.mark.parametrize(
    ("status", "at", "message"),
    [
        (429, "POST /api/models/someone/stories/commit", "too many requests .429.: wait 17 s"),
        (403, "POST /api/models/someone/stories/commit", "this token may not write to someone/stories"),
        (500, "POST /api/models/someone/stories/commit", "the Hub answered 500"),
    ],
    ids=["too-many", "read-only", "broken"],
)
def test_a_refusal_is_explained(hub, folder, status, at, message):
    refusal = Refusal(status, "no", headers={"Retry-After": "17"})
    hub.refuse = lambda request: refusal if request.startswith(at) else None
    with pytest.raises(OSError, match=message):
        send(folder)


def test_weights_of_a_base_are_compared(hub, folder):
    _, pinned = send(folder)
    weights = {"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}
    check_base_weights("someone/stories", pinned, weights)
    for wrong in ({}, {"model.safetensors": "0" * 64}, {"other.safetensors": weights["model.safetensors"]}):
        with pytest.raises(ValueError, match="has not the weights"):
            check_base_weights("someone/stories", pinned, wrong)
    with pytest.raises(OSError, match="not there, or hidden"):
        check_base_weights("someone/nothing", pinned, weights)
    check_base_files("someone/stories", pinned, {"config.json"})
    with pytest.raises(ValueError, match="lacks store_memory_mosaic.py: publish it again"):
        check_base_files("someone/stories", pinned, {"config.json", "store_memory_mosaic.py"})


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_other_kinds_of_repositories(hub, folder, kind):
    address, pinned = send(folder, repo_type=kind)
    assert f"/{kind}s/someone/stories/commit/" in address
    assert_whole(published(hub, kind=kind), pinned)


def test_what_was_uploaded_is_downloaded(hub, folder, tmp_path):
    _, pinned = send(folder)
    there = download("someone/stories", pinned, into=tmp_path)
    assert (there / "model.safetensors").read_bytes() == WEIGHTS and there.name == pinned
    assert published_files(there) == sorted(published(hub).files(pinned))  # real files, and none of the download's own
    with pytest.raises(OSError, match="not there, or hidden"):
        download("someone/nothing", into=tmp_path)


def test_a_link_leads_out_of_a_folder(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "extra").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="extra is a link"):
        published_files(folder)
