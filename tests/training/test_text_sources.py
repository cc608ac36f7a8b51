# SPDX-License-Identifier: Apache-2.0
"""Sources: files, folders, the embedded writer and the Hub give their stories and their provenance."""

import gzip
import hashlib
import json
import logging
import shutil

import datasets
import pytest
from datasets import Dataset, IterableDataset
from helpers.damage import flip
from helpers.stories import END, STORIES, json_lines

from training.text import story_files
from training.text.sources import load_stories, source_provenance
from training.text.story_writer import write_stories


pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_folder_is_read_whole_and_in_order(tmp_path):
    (tmp_path / "b.jsonl").write_text(json_lines({"text": "third"}))
    (tmp_path / "a.txt").write_text(f"first{END}second")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(json_lines("fourth").encode()))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / ".hidden.txt").write_text("not to be read")
    (tmp_path / "README.md").write_text("not to be read")
    (tmp_path / "folder.txt").mkdir()
    expected = ["first", "second", "third", "fourth"]
    assert list(load_stories(str(tmp_path))["text"]) == expected
    assert [row["text"] for row in load_stories(str(tmp_path), streaming=True)] == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_num_stories_limits(tmp_path, streaming, caplog):
    path = tmp_path / "a.txt"
    path.write_text(json_lines(*STORIES))
    few = load_stories(str(path), num_stories=2, streaming=streaming)
    assert [row["text"] for row in few] == STORIES[:2]
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="training.text.sources"):
        assert len(list(load_stories(str(path), num_stories=99, streaming=streaming))) == 4
    assert streaming or "has only 4 stories, not the 99" in caplog.text


def _begin_and_fail(*args, **kwargs):
    # A look at the first story, which shows that there is one, is allowed.
    yield "first"
    raise AssertionError("this file was read before")


def test_an_unchanged_file_is_not_read_again_and_an_edited_one_is(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines({"text": "before"}))
    assert list(load_stories(str(path))["text"]) == ["before"]
    (tmp_path / "copy").mkdir()
    shutil.copy(path, tmp_path / "copy" / "a.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(story_files, "read_story_file", _begin_and_fail)
        assert list(load_stories(str(path))["text"]) == ["before"]
        assert list(load_stories(str(tmp_path / "copy"))["text"]) == ["before"]
    path.write_text(json_lines({"text": "afters"}))
    assert list(load_stories(str(path))["text"]) == ["afters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "embedded"}, "never ends: set num_stories"),
        ({"source": "embedded", "num_stories": 0}, "num_stories is 0"),
        ({"source": ""}, "source '' does not exist"),
        ({"source": "./missing"}, "source './missing' does not exist"),
        ({"source": "missing/stories.jsonl"}, "'missing/stories.jsonl' does not exist"),
        ({"source": "{folder}"}, "empty corpus: folder .* has no file of the forms"),
        ({"source": "{folder}", "split": "validation"}, "has no split 'validation'.*name the file"),
        ({"source": "{folder}/a.csv"}, "a.csv: not one of the known forms.*name it .txt"),
        ({"source": "{folder}/b", "separator": ""}, "separator is empty"),
    ],
)
def test_mistakes_in_arguments_are_explained(tmp_path, arguments, message):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("x")
    arguments = arguments | {"source": arguments["source"].replace("{folder}", str(tmp_path))}
    with pytest.raises(ValueError, match=message):
        load_stories(**arguments)


def test_embedded_stories_are_the_writers():
    assert list(load_stories("embedded", num_stories=50, seed=3)["text"]) == list(write_stories(50, seed=3))
    streamed = load_stories("embedded", num_stories=5, streaming=True)
    assert [row["text"] for row in streamed] == list(write_stories(5))


def test_embedded_splits_and_seeds_share_no_story():
    options = [{}, {"split": "validation"}, {"split": "test"}, {"seed": 1}, {"seed": 1, "split": "validation"}]
    parts = [set(load_stories("embedded", num_stories=500, **option)["text"]) for option in options]
    assert len(set().union(*parts)) == 500 * len(parts)


def test_hub_data_sets_are_loaded_by_name(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        rows = [{"story": text, "id": index} for index, text in enumerate(STORIES)]
        return IterableDataset.from_generator(lambda: iter(rows)) if kwargs["streaming"] else Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for streaming in (False, True):
        loaded = load_stories("some/stories", split="test", text_field="story", num_stories=3, streaming=streaming)
        assert list(loaded) == [{"text": text} for text in STORIES[:3]]
        with pytest.raises(ValueError, match="'some/stories' has no field 'text', but 'story', 'id': set text_field"):
            load_stories("some/stories", streaming=streaming)
    named = {"path": "some/stories", "name": None, "revision": None}
    assert calls[0] == ((), named | {"split": "test", "streaming": False})
    assert calls[2] == ((), named | {"split": "test", "streaming": True})
    load_stories("some/stories:simple@v1", text_field="story")
    assert calls[-1][1].items() >= {"path": "some/stories", "name": "simple", "revision": "v1"}.items()
    with pytest.raises(ValueError, match="field 'id' of 'some/stories' is no text"):
        load_stories("some/stories", text_field="id")


# A column of strings holds no number: only an untyped stream can have one.
@pytest.mark.parametrize(
    ("gap", "typed", "streaming"),
    [(None, True, False), (None, False, False), (None, True, True), (None, False, True), (7, False, True)],
)
def test_a_gap_in_a_hub_data_set_is_named_with_its_row_and_field(monkeypatch, gap, typed, streaming):
    rows = [{"story": text} for text in STORIES[:3]] + [{"story": gap}, {"story": "Late."}]

    def load_dataset(*args, **kwargs):
        features = datasets.Features({"story": datasets.Value("string")}) if typed else None
        if kwargs["streaming"]:
            return IterableDataset.from_generator(lambda: iter(rows), features=features)
        return Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=rf"'some/stories', split 'train', row 3: field 'story' is {type(gap).__name__}"
    ):
        list(load_stories("some/stories", text_field="story", streaming=streaming))


def test_files_of_a_hub_data_set_that_have_changed_are_refused(monkeypatch, tmp_path):
    Dataset.from_dict({"text": STORIES * 50}).save_to_disk(tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: Dataset.from_file(str(path)))
    for _ in range(2):
        assert load_stories("some/stories")["text"][:] == STORIES * 50
    flip(path)
    with pytest.raises(ValueError, match=f"{path} has changed since it was first read: remove its folder"):
        load_stories("some/stories")
    assert load_stories("some/stories", streaming=True)  # another way of reading, which the cache has no part in


@pytest.mark.parametrize("failure", [ConnectionError("no network"), FileNotFoundError("unknown")])
def test_what_the_hub_cannot_give_is_explained(monkeypatch, failure):
    def load_dataset(*args, **kwargs):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="'storys' is neither 'embedded' nor an existing file.*(no network|unknown)"):
        load_stories("storys")


def test_provenance_says_what_was_read_but_not_where(tmp_path):
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.jsonl").write_text(json_lines({"text": "a"}))
    provenance = source_provenance(str(tmp_path), num_stories=5, streaming=True)
    assert provenance["kind"] == "files"
    assert provenance["name"] == tmp_path.name
    assert provenance["files"]["b.txt"] == hashlib.sha256(b"b").hexdigest()
    assert list(provenance["files"]) == ["a.jsonl", "b.txt"]
    assert (provenance["num_stories"], provenance["seed"]) == (5, 0)
    assert str(tmp_path) not in json.dumps(provenance)
    shutil.copytree(tmp_path, tmp_path / "elsewhere" / tmp_path.name)
    assert source_provenance(str(tmp_path / "elsewhere" / tmp_path.name), num_stories=5) == provenance
    (tmp_path / "b.txt").write_text("c")
    assert source_provenance(str(tmp_path), num_stories=5) != provenance


def test_provenance_of_writer_and_hub():
    embedded = source_provenance("embedded", num_stories=10, seed=4, split="validation")
    assert embedded["kind"] == embedded["name"] == "embedded"
    assert (embedded["seed"], embedded["num_stories"], embedded["split"]) == (4, 10, "validation")
    # What runs have recorded since the first of them: with another value, none of these would resume.
    recorded = "bd68c1b503464210f75009a44f7b1746526faafe3da65233a1b80efea3697a15"
    assert embedded["files"] == {"story_writer.py": recorded}
    hub = source_provenance("some/stories", text_field="story")
    assert (hub["kind"], hub["name"], hub["files"], hub["text_field"]) == ("hub", "some/stories", {}, "story")
    json.dumps([embedded, hub])
