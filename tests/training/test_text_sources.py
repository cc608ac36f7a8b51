# SPDX-License-Identifier: Apache-2.0
"""Data: every form of a source gives its stories, no token is lost on the way into windows, mistakes are explained."""

import gzip
import hashlib
import json
import logging
import shutil
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset, IterableDataset
from helpers.damage import flip
from torch.utils.data import DataLoader

from training import bounded
from training.files import CHECKSUMS
from training.text import sources
from training.text.sources import collate_windows, load_stories, pack_windows, source_provenance
from training.text.story_writer import write_stories
from training.text.tokenizer import load_tokenizer, train_tokenizer


SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
END = "<|endoftext|>"
STORIES = [
    'One day, a "fox" came.\nIt was naïve.',
    "Zwei Füße \U0001f600",
    "A \\ and a\ttab",
    "The end.",
]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(write_stories(300), 400)


@pytest.fixture(scope="module")
def stories():
    return load_stories("embedded", num_stories=300)


def _lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


FORMS = {
    "objects.jsonl": _lines(*({"id": 1, "text": text} for text in STORIES)),
    "empty_lines.jsonl": "\n".join(["", *(json.dumps({"text": text}) for text in [*STORIES, "", " "]), " ", ""]),
    "unescaped.jsonl": "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in STORIES),
    "windows.jsonl": "\ufeff" + "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in STORIES),
    "babi.txt": _lines(*STORIES),
    "babi_after_empty_lines.txt": "\ufeff\n\n" + _lines(*STORIES),
    "tiny.txt": f"\n{END}\n".join(STORIES) + f"\n{END}\n",
    "tiny_inline.txt": END.join(STORIES),
    "tiny_twice.txt": f"{END}{END}\n\n{END}".join(STORIES),
    "tiny_windows.txt": "\ufeff" + f"\n{END}\n".join(STORIES).replace("\n", "\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_stories(tmp_path, name, compressed):
    path, content = tmp_path / name, FORMS[name].encode()
    if compressed:
        path, content = tmp_path / f"{name}.gz", gzip.compress(content)
    path.write_bytes(content)
    loaded = load_stories(str(path))
    assert isinstance(loaded, Dataset)
    assert loaded.column_names == ["text"]
    assert list(loaded["text"]) == STORIES
    streamed = load_stories(str(path), streaming=True)
    assert isinstance(streamed, IterableDataset)
    assert [row["text"] for row in streamed] == [row["text"] for row in streamed] == STORIES


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["objects.jsonl", "strings.txt", "separated.txt"])
def test_nothing_but_a_line_feed_ends_a_line(tmp_path, form, streaming):
    """Neither do the line and paragraph separators of Unicode, nor what else Python's `splitlines` cuts at."""
    stories = ["one\u2029two\u2028three\x85four\x0bfive\x0csix\x1cseven", "eight\rnine"]
    lines = {
        "objects.jsonl": "\n".join(json.dumps({"text": story}, ensure_ascii=False) for story in stories),
        "strings.txt": "\n".join(json.dumps(story, ensure_ascii=False) for story in stories),
        "separated.txt": f"\n{END}\n".join(stories),
    }
    (tmp_path / form).write_bytes(lines[form].encode())
    assert [row["text"] for row in load_stories(str(tmp_path / form), streaming=streaming)] == stories


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("A story\n\nin one file.\n", ["A story\n\nin one file."]),
        ('"Hello," said the fox.\nIt left.', ['"Hello," said the fox.\nIt left.']),
        ("42\n43\n", ["42\n43"]),
        ("[" * 2000, ["[" * 2000]),
    ],
)
def test_text_without_separator_is_one_story(tmp_path, content, expected):
    (tmp_path / "one.txt").write_text(content)
    assert list(load_stories(str(tmp_path / "one.txt"))["text"]) == expected


def test_separator_and_field_can_be_chosen(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n\n\n\nThree.")
    assert list(load_stories(str(tmp_path / "a.txt"), separator="\n\n")["text"]) == ["One.", "Two.", "Three."]
    (tmp_path / "b.jsonl").write_text(_lines({"text": "no", "story": "yes"}))
    assert list(load_stories(str(tmp_path / "b.jsonl"), text_field="story")["text"]) == ["yes"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_separators_across_chunks_are_seen(tmp_path, monkeypatch, chunk):
    path = tmp_path / "inline.txt"
    path.write_text(END.join(STORIES))
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    assert list(sources._read_file(str(path), "text", END)) == STORIES


def test_a_folder_is_read_whole_and_in_order(tmp_path):
    (tmp_path / "b.jsonl").write_text(_lines({"text": "third"}))
    (tmp_path / "a.txt").write_text(f"first{END}second")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(_lines("fourth").encode()))
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
    path.write_text(_lines(*STORIES))
    few = load_stories(str(path), num_stories=2, streaming=streaming)
    assert [row["text"] for row in few] == STORIES[:2]
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="training.text.sources"):
        assert len(list(load_stories(str(path), num_stories=99, streaming=streaming))) == 4
    assert streaming or "has only 4 stories, not the 99" in caplog.text


def test_an_unchanged_file_is_not_read_again_and_an_edited_one_is(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(_lines({"text": "before"}))
    assert list(load_stories(str(path))["text"]) == ["before"]
    (tmp_path / "copy").mkdir()
    shutil.copy(path, tmp_path / "copy" / "a.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_read_file", _begin_and_fail)
        assert list(load_stories(str(path))["text"]) == ["before"]
        assert list(load_stories(str(tmp_path / "copy"))["text"]) == ["before"]
    path.write_text(_lines({"text": "afters"}))
    assert list(load_stories(str(path))["text"]) == ["afters"]


def _begin_and_fail(*args, **kwargs):
    # A look at the first story, which shows that there is one, is allowed.
    yield "first"
    raise AssertionError("this file was read before")


def _must_not_be_called(*args, **kwargs):
    raise AssertionError("this work was done before")


GOOD = b'{"text": "good"}\n'
MISTAKES = {
    "broken.jsonl": (
        GOOD + b"\n" + b'{"text": "no end\n' + GOOD,
        r":3: broken JSON \(column 17: .*'{\"text\": \"no end'",
    ),
    "field.jsonl": (GOOD + b'{"story": "x", "id": 1}\n', r":2: no field 'text', but 'story', 'id': set text_field"),
    "number.jsonl": (GOOD + b'{"text": 7}\n', r":2: field 'text' is int, not a string"),
    "null.jsonl": (b'{"text": null}\n', r":1: field 'text' is NoneType"),
    "list.jsonl": (b'["good"]\n', r":1: list, but a JSON object with a field 'text' is needed"),
    "latin.jsonl": (GOOD + GOOD + '{"text": "café"}\n'.encode("latin-1"), r":3: not UTF-8"),
    "surrogate.jsonl": (GOOD + b'{"text": "a \\ud83d b"}\n', r":2: the text has half a character, '\\ud83d'"),
    "deep.jsonl": (GOOD + b"[" * 100_000 + b"]" * 100_000, r":2: the JSON is nested too deeply"),
    "deep_object.jsonl": (GOOD + b'{"a":' * 50_000 + b"1" + b"}" * 50_000, r":2: the JSON is nested too deeply"),
    "digits.jsonl": (GOOD * 2 + b'{"text": "a", "n": ' + b"9" * 6000 + b"}", r":3: cannot be read as JSON \(Exceeds"),
    "babi_deep.txt": (b'"good"\n' + b"[" * 100_000, r":2: the JSON is nested too deeply"),
    "babi_digits.txt": (b'"good"\n' + b"9" * 6000, r":2: cannot be read as JSON"),
    "babi.txt": (b'"good"\n{"text": "x"}\n', r":2: dict, but the first line is a JSON string"),
    "babi_broken.txt": (b'"good"\n"no end\n', r":2: broken JSON"),
    "latin.txt": (f"one\n{END}\ntwo\nthree\nnaïve".encode("latin-1"), r":5: not UTF-8"),
    "cut.txt.gz": (gzip.compress(END.join(STORIES * 50).encode())[:-20], r": the compressed data are damaged or cut"),
    "not.jsonl.gz": (GOOD, r": the compressed data are damaged or cut off"),
    "table.csv": (b"text\ngood", r": not one of the known forms .jsonl, .jsonl.gz, .txt, .txt.gz"),
    "nothing.jsonl": (b"", "empty corpus: there is no story in"),
    "nothing.txt": (b" \n\n", "empty corpus: there is no story in"),
    "separators.txt": (f"{END}\n{END}".encode(), "empty corpus: there is no story in"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_files_name_file_and_line(tmp_path, name, streaming):
    content, message = MISTAKES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.") if message[0] == ":" else message) as caught:
        list(load_stories(str(path), streaming=streaming))
    assert caught.match(message)


def test_a_mistake_is_reported_again_and_repairing_it_helps(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"{\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="a.jsonl:2: broken JSON"):
            load_stories(str(path))
    path.write_bytes(GOOD + GOOD)
    assert len(load_stories(str(path))) == 2


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
        ({"source": "{folder}/a.md"}, "a.md: not one of the known forms"),
        ({"source": "{folder}/b", "separator": ""}, "separator is empty"),
    ],
)
def test_mistakes_in_arguments_are_explained(tmp_path, arguments, message):
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("x")
    arguments = arguments | {"source": arguments["source"].replace("{folder}", str(tmp_path))}
    with pytest.raises(ValueError, match=message):
        load_stories(**arguments)


def test_a_large_text_needs_its_separator(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK", 100)
    monkeypatch.setattr(sources, "LARGEST_STORY", 1000)
    path = tmp_path / "a.txt"
    path.write_text("x" * 1000)
    assert len(load_stories(str(path))[0]["text"]) == 1000
    path.write_text("x" * 1001)
    with pytest.raises(ValueError, match=r"a\.txt: '<\|endoftext\|>' does not occur .* set separator"):
        load_stories(str(path))
    path.write_text("x" * 900 + END + "y" * 1000)
    assert [len(text) for text in load_stories(str(path))["text"]] == [900, 1000]
    path.write_text("x" * 900 + END + "\n" + "y" * 5000 + END + "z")
    with pytest.raises(ValueError, match=r"a\.txt:1: the story has over 1,000 bytes: cut it .* raise LARGEST_STORY"):
        load_stories(str(path))


def bomb(path, beginning, line, times):
    with gzip.open(path, "wb", 9) as file:
        file.write(beginning)
        for _ in range(times):
            file.write(line)


@pytest.mark.parametrize(
    ("name", "beginning", "line", "message"),
    [
        ("a.txt.gz", b"A story." + END.encode(), b"a", r"a\.txt\.gz:1: the story has over 1,048,576 bytes"),
        ("a.txt.gz", b"A story.", b"a", "does not occur in the first 1 MiB"),
        ("a.jsonl.gz", GOOD, b"a", r"a\.jsonl\.gz:2: the line has over 1,048,576 bytes"),
        ("a.jsonl.gz", GOOD, b" \n" + b" " * 1000, r"a\.jsonl\.gz: [\d,]+ bytes unpack to [\d,]+ and more"),
        ("a.txt.gz", b"", b"\n" + b" " * 1000, r"a\.txt\.gz: [\d,]+ bytes unpack to [\d,]+ and more"),
        ("a.txt.gz", b'"Good."\n"', b"a", r"a\.txt\.gz:2: the line has over 1,048,576 bytes"),
    ],
    ids=["story", "no-separator", "line", "empty-lines", "empty-text", "string"],
)
def test_what_unpacks_without_end_fills_no_memory(tmp_path, monkeypatch, name, beginning, line, message):
    monkeypatch.setattr(sources, "LARGEST_STORY", 2**20)
    monkeypatch.setattr(bounded, "ALWAYS_UNPACKED", 2**22)
    bomb(tmp_path / name, beginning, line * (2**24 // len(line)), 2)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            load_stories(str(tmp_path / name))
        assert tracemalloc.get_traced_memory()[1] < 16e6  # of 33 million bytes
    finally:
        tracemalloc.stop()


def test_stories_that_repeat_without_end_fill_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, "ALWAYS_UNPACKED", 2**20)
    bomb(tmp_path / "a.jsonl.gz", b"", GOOD * 1000, 500)
    with pytest.raises(ValueError, match="over 100 times as much: if you trust the file, unpack it yourself"):
        load_stories(str(tmp_path / "a.jsonl.gz"))


def test_a_line_without_end_fills_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST_STORY", 1000)
    for name, content in (("a.jsonl", GOOD + b"a" * 1001), ("a.txt", b'"good"\n"' + b"a" * 1001)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{name}:2: the line has over 1,000 bytes: cut it into stories, or raise"
        ):
            load_stories(str(tmp_path / name))


@pytest.mark.parametrize("name", ["one_line.txt", "babi.txt", "objects.jsonl"])
def test_a_file_is_never_held_in_memory(tmp_path, name):
    story = "Once upon a time. " * 50
    line = {"one_line.txt": story + END, "babi.txt": _lines(story), "objects.jsonl": _lines({"text": story})}[name]
    path = tmp_path / name
    path.write_text(line * 20_000)
    assert path.stat().st_size > 18e6
    tracemalloc.start()
    try:
        count = sum(1 for _ in sources._read_files([str(path)], "text", END))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 6e6


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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("gap", [None, 7])
def test_a_gap_in_a_hub_data_set_is_named_with_its_row_and_field(monkeypatch, gap, typed, streaming):
    rows = [{"story": text} for text in STORIES[:3]] + [{"story": gap}, {"story": "Late."}]
    if gap == 7 and (typed or not streaming):
        pytest.skip("a column of strings holds no number")

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
    (tmp_path / "a.jsonl").write_text(_lines({"text": "a"}))
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
    assert list(embedded["files"]) == ["story_writer.py"]
    hub = source_provenance("some/stories", text_field="story")
    assert (hub["kind"], hub["name"], hub["files"], hub["text_field"]) == ("hub", "some/stories", {}, "story")
    json.dumps([embedded, hub])


def _stream(texts, tokenizer):
    """The tokens that windows are cut from, story by story."""
    ids = [tokenizer(text, split_special_tokens=True)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    return np.concatenate(ids)


def _ids(windows):
    return np.array([row["input_ids"] for row in windows])


@pytest.mark.parametrize("context_length", [1, 7, 64, 1000])
def test_windows_are_the_stream_cut_and_nothing_else(stories, tokenizer, context_length):
    stories = stories.take(50)
    stream = _stream(stories["text"], tokenizer)
    whole = len(stream) // context_length
    windows = pack_windows(stories, tokenizer, context_length)
    assert windows.column_names == ["input_ids"]
    assert np.array_equal(_ids(windows), stream[: whole * context_length].reshape(whole, context_length))
    first = windows[0]["input_ids"]
    assert isinstance(first, list) and len(first) == context_length


def test_windows_do_not_depend_on_the_number_of_processes(tokenizer, tmp_path, monkeypatch):
    # More stories than one batch holds, so that batches and processes have borders inside.
    results = []
    for num_proc in (None, 2, 3):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / str(num_proc)))
        stories = load_stories("embedded", num_stories=1500)
        results.append(_ids(pack_windows(stories, tokenizer, 128, num_proc)))
    assert np.array_equal(results[0].ravel(), _stream(stories["text"], tokenizer)[: results[0].size])
    for result in results[1:]:
        assert np.array_equal(result, results[0])


def test_a_second_call_does_no_work(stories, tokenizer, monkeypatch, tmp_path):
    before = _ids(pack_windows(stories, tokenizer, 96))
    tokenizer("calls leave traces in a tokenizer", padding="max_length", max_length=20, truncation=True)
    tokenizer.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_tokenize", _must_not_be_called)
        assert len(pack_windows(stories, tokenizer, 97)) > 0
        patch.setattr(sources, "_tokenized", _must_not_be_called)
        again = load_stories("embedded", num_stories=300)
        for num_proc in (None, 2):
            assert np.array_equal(_ids(pack_windows(again, load_tokenizer(str(tmp_path)), 96, num_proc)), before)


def test_what_has_changed_in_the_cache_is_made_again(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    texts = load_stories("embedded", num_stories=40)["text"][:]
    before = _ids(pack_windows(load_stories("embedded", num_stories=40), tokenizer, 64, num_proc=2))
    files = sorted(tmp_path.rglob("*.arrow"))
    assert [path.name for path in files].count("rows.arrow") == 2 and len(files) == 4  # tokens of two processes
    for name in ("*.arrow", CHECKSUMS):
        caplog.clear()
        for path in tmp_path.rglob(name):
            flip(path)
        stories = load_stories("embedded", num_stories=40)
        assert stories["text"][:] == texts
        assert np.array_equal(_ids(pack_windows(stories, tokenizer, 64)), before)
        shorter = pack_windows(stories, tokenizer, 32)  # by the tokens, which the windows had no need of
        assert np.array_equal(_ids(shorter).ravel()[: before.size], before.ravel())
        assert caplog.text.count("it is removed and made again") == 3
        shutil.rmtree(Path(shorter.cache_files[0]["filename"]).parent)


def test_another_tokenizer_or_other_stories_are_not_taken_from_the_cache(stories, tokenizer):
    before = _ids(pack_windows(stories, tokenizer, 64))
    smaller = train_tokenizer(write_stories(300), 300)
    assert np.array_equal(
        _ids(pack_windows(stories, smaller, 64)).ravel()[:500], _stream(stories["text"], smaller)[:500]
    )
    fewer = _ids(pack_windows(stories.take(100), tokenizer, 64))
    assert 0 < len(fewer) < len(before)


def test_stories_in_memory_and_other_columns_are_fine(tokenizer):
    stories = Dataset.from_dict({"id": list(range(40)), "text": list(write_stories(40))})
    windows = _ids(pack_windows(stories, tokenizer, 32, num_proc=2))
    assert np.array_equal(windows.ravel(), _stream(stories["text"], tokenizer)[: windows.size])


def test_streamed_windows_equal_cached_ones(stories, tokenizer):
    streamed = pack_windows(load_stories("embedded", num_stories=300, streaming=True), tokenizer, 64)
    assert isinstance(streamed, IterableDataset)
    expected = _ids(pack_windows(stories, tokenizer, 64))
    for _ in range(2):
        assert np.array_equal(_ids(streamed), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_each_window_once_in_a_loader(tmp_path, tokenizer, num_workers):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(END.join(write_stories(30, seed=index)))
    expected = _ids(pack_windows(load_stories(str(tmp_path)), tokenizer, 64))
    streamed = pack_windows(load_stories(str(tmp_path), streaming=True), tokenizer, 64)
    loader = DataLoader(streamed, batch_size=4, num_workers=num_workers, collate_fn=collate_windows)
    assert np.array_equal(torch.cat([batch["input_ids"] for batch in loader]).numpy(), expected)


def test_a_stream_resumed_anywhere_goes_on_with_the_next_window(tmp_path, tokenizer):
    """As Trainer resumes: within a file, where a window spans two, and where the corpus begins anew."""
    files = [list(write_stories(12, seed=index)) for index in range(3)]
    for index, texts in enumerate(files):
        (tmp_path / f"{index}.txt").write_text(END.join(texts))
    one_pass = _ids(pack_windows(load_stories(str(tmp_path)), tokenizer, 64))
    borders = np.cumsum([len(_stream(texts, tokenizer)) for texts in files])[:2]
    assert (borders % 64 != 0).all() and len(one_pass) % 4 != 0  # in the middle of a window, and of a batch
    streamed = pack_windows(load_stories(str(tmp_path), streaming=True), tokenizer, 64).repeat(None)
    loader = DataLoader(streamed, batch_size=4, collate_fn=collate_windows)
    expected = np.concatenate([one_pass] * 4)
    num_batches = 2 * len(one_pass) // 4 + 2
    assert num_batches > 15
    for seen in range(num_batches):
        resumed = iter(skip_first_batches(loader, seen))
        following = np.concatenate([next(resumed)["input_ids"].numpy() for _ in range(2)])
        assert np.array_equal(following, expected[4 * seen : 4 * seen + 8]), seen


@pytest.mark.parametrize("seen", [3, 40])
def test_a_stream_is_resumed_from_a_state_of_a_resumed_one(tokenizer, seen):
    """By the states of `datasets`, which some versions of it stop counting after the first time."""

    def windows():
        return pack_windows(load_stories("embedded", num_stories=60, streaming=True), tokenizer, 64)

    expected, state, read = list(windows()), None, []
    for _ in range(3):
        stream = windows()
        if state is not None:
            stream.load_state_dict(state)
        rows = iter(stream)
        read += [next(rows) for _ in range(seen)]
        state = stream.state_dict()
    assert read == expected[: 3 * seen] and len(read) == 3 * seen


def test_end_of_text_inside_a_story_ends_nothing(tokenizer):
    texts = [f"A fox. {END} A dog.", "An owl.", f"{END}", f"<|pad|>{END}"]
    ids = _ids(pack_windows(Dataset.from_dict({"text": texts}), tokenizer, 1)).ravel()
    assert (ids == tokenizer.eos_token_id).sum() == len(texts)
    assert (ids == tokenizer.pad_token_id).sum() == 0
    assert tokenizer.decode(ids) == "".join(text + END for text in texts)


def test_an_empty_story_adds_nothing(tokenizer):
    ids = _ids(pack_windows(Dataset.from_dict({"text": ["", "An owl.", "", "", "A fox.", ""]}), tokenizer, 1)).ravel()
    assert tokenizer.decode(ids) == f"An owl.{END}A fox.{END}"


@pytest.mark.parametrize("texts", [["An owl."], [""], []])
def test_too_few_tokens_for_a_window_is_an_error(tokenizer, texts):
    stories = Dataset.from_dict({"text": texts}, features=sources.STORY_FEATURES)
    num_tokens = len(_stream(texts, tokenizer)) if any(texts) else 0
    message = f"have {num_tokens} tokens, too few for one window of context_length 512"
    with pytest.raises(ValueError, match=message):
        pack_windows(stories, tokenizer, 512)
    streamed = pack_windows(IterableDataset.from_generator(stories.__iter__), tokenizer, 512)
    with pytest.raises(ValueError, match=message):
        next(iter(streamed))


def test_windows_need_a_length_and_an_eos(stories, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="context_length is 0"):
        pack_windows(stories, tokenizer, 0)
    tokenizer.save_pretrained(tmp_path)
    bare = load_tokenizer(str(tmp_path))
    bare.eos_token = None
    with pytest.raises(ValueError, match="no eos token.*load_tokenizer"):
        pack_windows(stories, bare, 8)


def test_collated_windows_are_a_batch(stories, tokenizer):
    windows = pack_windows(stories, tokenizer, 16)
    batch = collate_windows([windows[0], windows[1], windows[2]])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for tensor in batch.values():
        assert tensor.shape == (3, 16)
        assert tensor.dtype == torch.int64
    assert batch["input_ids"].tolist() == _ids(windows)[:3].tolist()
    assert batch["attention_mask"].all()
    assert torch.equal(batch["labels"], batch["input_ids"])
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] != -100
    formatted = windows.with_format("torch")
    assert collate_windows([formatted[0], formatted[1]])["input_ids"].dtype == torch.int64


@pytest.mark.skipif(not SHARED.is_dir(), reason="real stories are not at ../shared/data")
def test_real_stories():
    stories = load_stories(str(SHARED / "stories/validation.jsonl.gz"))
    assert len(stories) == 587
    tokenizer = load_tokenizer(str(SHARED / "gpt2-tokenizer"))
    windows = pack_windows(stories, tokenizer, 128, num_proc=2)
    assert len(windows) == (118_949 + 587) // 128
    text = END.join(stories["text"]) + END
    assert text.startswith(tokenizer.decode(_ids(windows).ravel()))
