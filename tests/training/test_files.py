# SPDX-License-Identifier: Apache-2.0
"""Files are believed by their checksums: what one changed bit damages is set aside, made again or refused by name."""

import shutil

import pytest
from helpers.damage import flip
from helpers.runs import assert_same_run, short_recipe
from typer.testing import CliRunner

from training.__main__ import app
from training.evaluate import load_causal_lm, load_model
from training.files import (
    CHECKSUMS,
    checksums_of,
    checksums_text,
    faults,
    read_json,
    read_sealed,
    sealed,
    write_checksums,
    write_json,
)
from training.result import read_result, write_result
from training.tasks import language_modeling


@pytest.fixture
def folder(tmp_path):
    """Three files, one of them in a folder, and their list."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    for name, content in (("a", b"\x00" * 9), ("b.json", b"{}"), ("model/weights", b"\xff")):
        (tmp_path / "run" / name).write_bytes(content)
    write_checksums(tmp_path / "run")
    return tmp_path / "run"


def test_every_bit_of_every_file_counts_and_of_the_list_itself(folder):
    assert not faults(folder)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        for bit in range(0, 8 * len(content), 3):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            assert any(name in fault for fault in faults(folder)), (name, bit)
        path.write_bytes(content)
    assert not faults(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"files": {}}', '{"files": [1]}', checksums_text({})])
def test_a_list_of_nothing_is_a_fault(folder, content):
    (folder / CHECKSUMS).write_text(content)
    assert faults(folder)[0].startswith(f"{CHECKSUMS} ")


def test_what_is_missing_and_what_is_not_listed_are_faults(folder):
    (folder / "a").unlink()
    (folder / "c").touch()
    assert faults(folder) == ["a is missing", f"{CHECKSUMS} does not list c"]
    assert faults(folder, unlisted=False) == ["a is missing"]
    assert not faults(folder, "model") and faults(folder, "a") == ["a is missing"]
    (folder / CHECKSUMS).write_text(checksums_text(checksums_of(folder, ["model"])))
    assert faults(folder, "b.json") == [f"{CHECKSUMS} does not list b.json"]
    (folder / CHECKSUMS).unlink()
    assert faults(folder) == [f"{CHECKSUMS} is missing"]


def test_a_sealed_text_comes_back_and_a_changed_one_does_not(tmp_path):
    path = tmp_path / "part.jsonl"
    for text in ("", "one\n", 'one\n"two\u2028"\n'):
        path.write_text(sealed(text), encoding="utf-8")
        assert read_sealed(path) == text
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 7):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            assert read_sealed(path) is None, bit
        path.write_bytes(content[: len(content) // 2])
        assert read_sealed(path) is None
    assert read_sealed(tmp_path / "absent") is None


def test_a_result_is_what_was_written_or_refused(tmp_path):
    assert read_result(tmp_path) is None
    (tmp_path / "model").mkdir()
    for name in ("model/weights", "table.md", "notes.txt"):
        (tmp_path / name).write_text(name)
    result = {"metrics": {"loss": 1.5}, "samples": ["naïve"]}
    write_result(result, tmp_path, ["model"])
    assert read_result(tmp_path) == result
    assert checksums_of(tmp_path, ["model", "table.md", "result.json"]).keys() == checksums_of(tmp_path).keys() - {
        "notes.txt"
    }
    (tmp_path / "notes.txt").write_text("may change")
    flip(tmp_path / "model" / "weights")  # is refused where it is read
    assert read_result(tmp_path) == result
    flip(tmp_path / "result.json")
    with pytest.raises(ValueError, match="result.json is damaged .*has changed.*restore it, or remove it"):
        read_result(tmp_path)


def test_json_comes_back_and_a_failed_write_leaves_the_earlier_file(tmp_path):
    path, value = tmp_path / "value.json", {"name": "naïve\u2028", "loss": [1.5, None], "empty": {}}
    write_json(path, value)
    assert read_json(path) == value and "naïve" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"not JSON": object()})
    assert read_json(path) == value and list(tmp_path.iterdir()) == [path]
    path.write_text(path.read_text(encoding="utf-8")[:-3], encoding="utf-8")
    with pytest.raises(ValueError):
        read_json(path)


# The folder of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_modeling, "verify_export", lambda folder, prompts, **options: prompts)
        recipe = short_recipe(tmp_path_factory.mktemp("runs") / "run")
        language_modeling.run(recipe)
    return recipe


@pytest.fixture
def copied(finished, tmp_path, without_clean_process):  # noqa: F811
    shutil.copytree(finished.folder, tmp_path / "run")
    return short_recipe(tmp_path / "run")


def unfinished(recipe):
    (recipe.folder / "result.json").unlink()
    return recipe


def test_every_file_of_a_checkpoint_counts(copied):
    checkpoint = copied.folder / "checkpoint-20"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert {"tokenizer.json", "config.json", CHECKSUMS} <= names
    for name in sorted(names):
        content = (checkpoint / name).read_bytes()
        flip(checkpoint / name)
        assert any(name in fault for fault in faults(checkpoint)), name
        (checkpoint / name).write_bytes(content)
    assert not faults(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", CHECKSUMS])
def test_a_changed_checkpoint_is_set_aside_and_the_one_before_used(name, finished, copied, caplog):
    flip(unfinished(copied).folder / "checkpoint-20" / name)
    language_modeling.run(copied)
    assert_same_run(finished.folder, copied.folder)
    assert (copied.folder / "broken-checkpoint-20" / name).is_file()
    warnings = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(warnings) == 1 and name in warnings[0] and "continuing from checkpoint-15" in warnings[0]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", CHECKSUMS])
def test_a_changed_tokenizer_of_a_run_is_refused(name, copied):
    flip(unfinished(copied).folder / "tokenizer" / name)
    with pytest.raises(ValueError, match=f"tokenizer is damaged .*{name}.*restore it.*--restart"):
        language_modeling.run(copied)


@pytest.mark.parametrize("name", ["result.json", CHECKSUMS])
def test_a_changed_result_is_refused_and_can_be_made_again(name, finished, copied):
    flip(copied.folder / name)
    with pytest.raises(ValueError, match=f"result.json is damaged .*{name}.*remove it and start again"):
        language_modeling.run(copied)
    language_modeling.run(unfinished(copied))
    assert_same_run(finished.folder, copied.folder)
    assert not faults(copied.folder, "model")


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"hash": "0"}', b"\xff"])
def test_a_run_json_that_cannot_be_read_is_refused_by_name(content, copied):
    path = copied.folder / "run.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="run.json is damaged.*--restart"):
        language_modeling.run(copied)


def test_a_changed_hash_in_run_json_is_another_recipe(copied):
    path = copied.folder / "run.json"
    path.write_text(path.read_text().replace(copied.hash, f"{'0' * 64}"))
    with pytest.raises(ValueError, match="another recipe.*by its hash alone: its run.json may be damaged.*--restart"):
        language_modeling.run(copied)


def generate(folder):
    arguments = ["--debug", "generate", str(folder), "Once"]
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize("use", [load_causal_lm, load_model, generate])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "modeling_memory_mosaic.py"])
def test_a_changed_model_is_not_loaded(use, name, copied, tmp_path):
    flip(copied.folder / "model" / name)
    with pytest.raises(ValueError, match=f"is damaged .*{name} has changed"):
        use(copied.folder / "model")


def test_a_copied_model_stands_for_itself(copied, tmp_path):
    shutil.copytree(copied.folder / "model", tmp_path / "mine")
    (tmp_path / "mine" / "notes.md").write_text("mine")
    (copied.folder / "mine").symlink_to(tmp_path / "mine")
    assert load_causal_lm(tmp_path / "mine") and load_causal_lm(copied.folder / "mine")
    flip(copied.folder / "checkpoint-20" / "optimizer.pt")
    with pytest.raises(ValueError, match="optimizer.pt has changed"):
        load_causal_lm(copied.folder / "checkpoint-20")
