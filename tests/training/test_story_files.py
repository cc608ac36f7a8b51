# SPDX-License-Identifier: Apache-2.0
"""Story files: every form gives the same stories, bounds hold, and mistakes are reported with file and line."""

import gzip
import json
import tracemalloc

import pytest
from datasets import Dataset, IterableDataset
from helpers.stories import END, GOOD_LINE, STORIES, json_lines

from training import untrusted
from training.text import story_files
from training.text.sources import load_stories


pytestmark = pytest.mark.usefixtures("own_cache")


FORMS = {
    "objects.jsonl": json_lines(*({"id": 1, "text": text} for text in STORIES)),
    "empty_lines.jsonl": "\n".join(["", *(json.dumps({"text": text}) for text in [*STORIES, "", " "]), " ", ""]),
    "unescaped.jsonl": "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in STORIES),
    "windows.jsonl": "\ufeff" + "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in STORIES),
    "babi.txt": json_lines(*STORIES),
    "babi_after_empty_lines.txt": "\ufeff\n\n" + json_lines(*STORIES),
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
    """The line and paragraph separators of Unicode do not, nor do the other places where `splitlines` cuts."""
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
    (tmp_path / "b.jsonl").write_text(json_lines({"text": "no", "story": "yes"}))
    assert list(load_stories(str(tmp_path / "b.jsonl"), text_field="story")["text"]) == ["yes"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_separators_across_chunks_are_seen(tmp_path, monkeypatch, chunk):
    path = tmp_path / "inline.txt"
    path.write_text(END.join(STORIES))
    monkeypatch.setattr(story_files, "_CHUNK", chunk)
    assert list(story_files.read_story_file(str(path), "text", END)) == STORIES


MISTAKES = {
    "broken.jsonl": (
        GOOD_LINE + b"\n" + b'{"text": "no end\n' + GOOD_LINE,
        r":3: broken JSON \(column 17: .*'{\"text\": \"no end'",
    ),
    "field.jsonl": (
        GOOD_LINE + b'{"story": "x", "id": 1}\n',
        r":2: no field 'text', but 'story', 'id': set text_field",
    ),
    "number.jsonl": (GOOD_LINE + b'{"text": 7}\n', r":2: field 'text' is int, not a string"),
    "null.jsonl": (b'{"text": null}\n', r":1: field 'text' is NoneType"),
    "list.jsonl": (b'["good"]\n', r":1: list, but a JSON object with a field 'text' is needed"),
    "latin.jsonl": (GOOD_LINE + GOOD_LINE + '{"text": "café"}\n'.encode("latin-1"), r":3: not UTF-8"),
    "surrogate.jsonl": (
        GOOD_LINE + b'{"text": "a \\ud83d b"}\n',
        r":2: the text has half a character, '\\ud83d'",
    ),
    "deep.jsonl": (GOOD_LINE + b"[" * 100_000 + b"]" * 100_000, r":2: the JSON is nested too deeply"),
    "deep_object.jsonl": (
        GOOD_LINE + b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        r":2: the JSON is nested too deeply",
    ),
    "digits.jsonl": (
        GOOD_LINE * 2 + b'{"text": "a", "n": ' + b"9" * 6000 + b"}",
        r":3: cannot be read as JSON \(Exceeds",
    ),
    "babi_deep.txt": (b'"good"\n' + b"[" * 100_000, r":2: the JSON is nested too deeply"),
    "babi_digits.txt": (b'"good"\n' + b"9" * 6000, r":2: cannot be read as JSON"),
    "babi.txt": (b'"good"\n{"text": "x"}\n', r":2: dict, but the first line is a JSON string"),
    "babi_broken.txt": (b'"good"\n"no end\n', r":2: broken JSON"),
    "latin.txt": (f"one\n{END}\ntwo\nthree\nnaïve".encode("latin-1"), r":5: not UTF-8"),
    "cut.txt.gz": (gzip.compress(END.join(STORIES * 50).encode())[:-20], r": the compressed data are damaged or cut"),
    "not.jsonl.gz": (GOOD_LINE, r": the compressed data are damaged or cut off"),
    "table.csv": (b"text\ngood", r": not one of the known forms .jsonl, .jsonl.gz, .txt, .txt.gz, .md, .md.gz"),
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
    path.write_bytes(GOOD_LINE + b"{\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="a.jsonl:2: broken JSON"):
            load_stories(str(path))
    path.write_bytes(GOOD_LINE + GOOD_LINE)
    assert len(load_stories(str(path))) == 2


def test_a_large_text_needs_its_separator(tmp_path, monkeypatch):
    monkeypatch.setattr(story_files, "_CHUNK", 100)
    monkeypatch.setattr(story_files, "LARGEST_STORY", 1000)
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
        ("a.jsonl.gz", GOOD_LINE, b"a", r"a\.jsonl\.gz:2: the line has over 1,048,576 bytes"),
        ("a.jsonl.gz", GOOD_LINE, b" \n" + b" " * 1000, r"a\.jsonl\.gz: [\d,]+ bytes unpack to [\d,]+ and more"),
        ("a.txt.gz", b"", b"\n" + b" " * 1000, r"a\.txt\.gz: [\d,]+ bytes unpack to [\d,]+ and more"),
        ("a.txt.gz", b'"Good."\n"', b"a", r"a\.txt\.gz:2: the line has over 1,048,576 bytes"),
    ],
    ids=["story", "no-separator", "line", "empty-lines", "empty-text", "string"],
)
def test_what_unpacks_without_end_fills_no_memory(tmp_path, monkeypatch, name, beginning, line, message):
    monkeypatch.setattr(story_files, "LARGEST_STORY", 2**20)
    monkeypatch.setattr(untrusted, "ALWAYS_UNPACKED", 2**22)
    bomb(tmp_path / name, beginning, line * (2**24 // len(line)), 2)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            load_stories(str(tmp_path / name))
        assert tracemalloc.get_traced_memory()[1] < 16e6  # of 33 million bytes
    finally:
        tracemalloc.stop()


def test_stories_that_repeat_without_end_fill_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "ALWAYS_UNPACKED", 2**20)
    bomb(tmp_path / "a.jsonl.gz", b"", GOOD_LINE * 1000, 500)
    with pytest.raises(ValueError, match="over 100 times as much: if you trust the file, unpack it yourself"):
        load_stories(str(tmp_path / "a.jsonl.gz"))


def test_a_line_without_end_fills_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(story_files, "LARGEST_STORY", 1000)
    for name, content in (("a.jsonl", GOOD_LINE + b"a" * 1001), ("a.txt", b'"good"\n"' + b"a" * 1001)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{name}:2: the line has over 1,000 bytes: cut it into stories, or raise"
        ):
            load_stories(str(tmp_path / name))


@pytest.mark.parametrize("name", ["one_line.txt", "babi.txt", "objects.jsonl"])
def test_a_file_is_never_held_in_memory(tmp_path, name):
    story = "Once upon a time. " * 50
    line = {"one_line.txt": story + END, "babi.txt": json_lines(story), "objects.jsonl": json_lines({"text": story})}[
        name
    ]
    path = tmp_path / name
    path.write_text(line * 20_000)
    assert path.stat().st_size > 18e6
    tracemalloc.start()
    try:
        count = sum(1 for _ in story_files.read_story_files([str(path)], "text", END))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 6e6
