# SPDX-License-Identifier: Apache-2.0
"""Data sets of vectors: encoded, published and read back; what is wrong with one is found without its model."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from helpers.memory_recipes import read_memory_recipe
from helpers.publications import COMMIT, about_memory, edit, stage
from huggingface_hub import DatasetCard
from typer.testing import CliRunner

from training.__main__ import app
from training.evaluate import load_model
from training.publishing import checks, publish
from training.publishing.folder import CARD, published_files, write_sums
from training.secrecy import machine_tokens
from training.tasks import memory_model
from training.vectors import FILE, encode_files, given_back, measure_given_back, read_rows


TEXTS = {"lily": "Lily had a red ball and a dog. The dog was kind.", "tom": "Tom saw a cat. 😀 The cat ran away."}
BASE = f"someone/memory@{COMMIT}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = read_memory_recipe(tmp_path_factory.mktemp("memory"))
    memory_model.run(recipe)
    return recipe.folder


def encoded(folder: Path, model: Path) -> Path:
    """Let a model encode texts, which lie beside a folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    files = [folder.with_name(f"{name}.txt") for name in TEXTS]
    for path, text in zip(files, TEXTS.values(), strict=True):
        path.write_bytes(text.encode())
    encode_files(model, files, folder)
    return folder


@pytest.fixture(scope="module")
def vectors(run, tmp_path_factory):
    return encoded(tmp_path_factory.mktemp("vectors") / "texts", run / "model")


@pytest.fixture(scope="module")
def staged(vectors):
    lines = []
    folder = stage(vectors, "someone/texts", "vectors", about_memory(vectors), BASE, lines=lines)
    return folder, lines


@pytest.fixture
def copied(staged, tmp_path):
    return shutil.copytree(staged[0], tmp_path / "vectors")


def test_a_model_reads_the_rows_of_a_file_in_place_of_its_text(run, vectors):
    model, tokenizer = load_model(run / "model")
    rows = Dataset.from_parquet(str(vectors / FILE))
    length = model.config.chunk_length
    for name, text in TEXTS.items():
        own = [row for row in rows if row["source"] == f"{name}.txt"]
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = model.encoder(ids).memories
        assert len(own) == expected.shape[1] == ids.shape[1] // length
        assert [row["text"] for row in own] == [tokenizer.decode(part) for part in ids[0].split(length)[: len(own)]]
        memories = model.memories_from_rows(own)
        torch.testing.assert_close(memories["memories"], expected, rtol=0, atol=1e-6)
        question = tokenizer("The dog", return_tensors="pt")
        read = model.generate(**question, **memories, max_new_tokens=5, do_sample=False)
        whole = model.generate(**question, memories=expected, max_new_tokens=5, do_sample=False)
        assert torch.equal(read, whole)


def test_what_is_given_back_is_what_the_decoder_writes_of_each_memory(run, vectors):
    model, tokenizer = load_model(run / "model")
    rows = read_rows(vectors / FILE)
    given = given_back(model, rows)
    assert len(given) == len(rows) and {len(ids) for ids in given} == {model.config.chunk_length}
    again = [row | {"text": tokenizer.decode(ids)} for row, ids in zip(rows, given, strict=True)]
    kept = [row for row in again if len(tokenizer(row["text"]).input_ids) == model.config.chunk_length]
    assert not kept or measure_given_back(model, tokenizer, kept) == 1.0
    stated = json.loads((vectors / "result.json").read_text())["vectors"]
    assert stated["given_back"] == pytest.approx(measure_given_back(model, tokenizer, rows))


@pytest.mark.slow
def test_a_card_says_what_was_read_by_which_encoder(staged, run):
    folder, lines = staged
    assert published_files(folder) == ["README.md", "SHA256SUMS", FILE, "result.json"]
    card = DatasetCard.load(folder / CARD)
    for part in (
        "`lily.txt`",
        "`tom.txt`",
        COMMIT,
        "someone/memory",
        "float32",
        "Licence of the texts: public domain",
    ):
        assert part in card.text, part
    assert card.data.to_dict()["configs"][0]["data_files"] == FILE
    log = "\n".join(lines)
    assert "chunks, encoded again by the base, differ by at most" in log and "1 snippets of the card run" in log
    for name in published_files(folder):
        assert str(run.parent).encode() not in (folder / name).read_bytes(), name


def write(folder, change):
    table = pyarrow.parquet.read_table(folder / FILE)
    rows = change(table.to_pylist())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), folder / FILE)
    state(folder, bytes=(folder / FILE).stat().st_size)


def state(folder, **changes):
    result = json.loads((folder / "result.json").read_text())
    edit(folder, "result.json", vectors=result["vectors"] | changes)


def in_rows(**changes):
    return lambda folder: write(folder, lambda rows: [rows[0] | changes, *rows[1:]])


def wider(rows):
    return [rows[0] | {"vectors": [[1.0]]}, *rows[1:]]


HARM = {
    "other encoder": (in_rows(encoder="00" * 32), "a row of memories.parquet is of another encoder"),
    "other chunk": (in_rows(chunk=7), "the texts of memories.parquet differ from those that result.json states"),
    "other source": (in_rows(source="../etc"), "the texts of memories.parquet differ"),
    "other shape": (lambda folder: write(folder, wider), "vectors of memories.parquet are not 1 of 16 numbers"),
    "not finite": (in_rows(vectors=[[float("inf")] * 16]), "has numbers that are not finite"),
    "a row less": (lambda folder: write(folder, lambda rows: rows[1:]), "the texts of memories.parquet differ"),
    "columns": (
        lambda folder: pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), folder / FILE),
        "has the columns",
    ),
    "damaged": (lambda folder: (folder / FILE).write_bytes(b"PAR1" + b"x" * 99), "memories.parquet is damaged"),
    "no table": (lambda folder: (folder / FILE).write_bytes(b"text"), "is not what its name says"),
    "code": (lambda folder: (folder / "app.py").write_text("print(1)"), "is not a published model, adapter, data set"),
    "other table": (
        lambda folder: (folder / CARD).write_text((folder / CARD).read_text().replace(FILE, "other.parquet", 1)),
        "it would load something else",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HARM)
def test_what_is_wrong_with_a_table_is_found_without_its_model(kind, copied):
    assert checks.check_folder(copied)
    harm, message = HARM[kind]
    harm(copied)
    if kind != "code":
        write_sums(copied)
    with pytest.raises(ValueError, match=message):
        checks.check_folder(copied)


def test_a_secret_in_a_text_is_not_published(run, tmp_path, monkeypatch):
    secret = "hf_" + "abcdefghij" * 3
    folder = tmp_path / "texts"
    (tmp_path / "note.txt").write_text(f"The key is {secret} and nothing else.")
    encode_files(run / "model", [tmp_path / "note.txt"], folder)
    rows = read_rows(folder / FILE)
    assert secret not in {row["text"] for row in rows} and not {secret} & machine_tokens()
    with pytest.raises(ValueError, match="note.txt"):
        stage(folder, "someone/texts", "vectors", about_memory(folder), BASE)


def test_what_cannot_be_encoded_is_named(run, tmp_path):
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(ValueError, match="short.txt has 1 tokens, which fill no chunk of 4"):
        encode_files(run / "model", [tmp_path / "short.txt"], tmp_path / "out")
    (tmp_path / "long.txt").write_text("a long text")
    with pytest.raises(ValueError, match="stored in its own precision"):
        encode_files(run / "model", [tmp_path / "long.txt"], tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="exists already"):
        encode_files(run / "model", [tmp_path / "long.txt"], tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_command_line_encodes_with_a_memory_model(run, tmp_path):
    (tmp_path / "one.txt").write_text("a long text of words")
    arguments = ["memorize", str(run / "model"), str(tmp_path / "one.txt"), "--output", str(tmp_path / "out")]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert f"memories of 1 texts are in {tmp_path / 'out' / FILE}" in outcome.output.replace("\n", "")


def test_vectors_need_the_model_that_reads_them(vectors):
    with pytest.raises(ValueError, match="the card has to name the model that has read it on the Hub"):
        publish.prepare(vectors, "someone/texts", about=about_memory(vectors), base="someone")
