# SPDX-License-Identifier: Apache-2.0
"""Blocks of READMEs are filled from committed results, and finished experiments become committed results."""

import json

import pytest

from training import tables
from training.result import write_result


BLOCK = '<!-- [[[cog print(table_of("smoke")) ]]] -->\n{}<!-- [[[end]]] -->\n'


@pytest.fixture
def results_folder(tmp_path, monkeypatch):
    """An empty folder in the place of `training/results`; the working folder is empty too."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


def training_result(seed, name="smoke"):
    losses = {"validation_loss": 2.0 + seed, "validation_perplexity": 7.4, "validation_bits_per_byte": 1.0}
    settings = {"name": name, "task": "language_modeling", "model": "mosaic-smoke", "seed": seed, "metrics": losses}
    return settings | {"parameters": 1234, "tokens": 5120, "seconds": 10.0}


def finish(folder, result):
    folder.mkdir(parents=True)
    (folder / "smoke.png").write_bytes(b"picture")
    (folder / "README.md").write_text("card")
    (folder / "log.txt").write_text("not shown")
    write_result(result, folder)


def test_a_block_is_filled_from_all_seeds_of_its_recipe(results_folder, tmp_path):
    results = [training_result(0), training_result(1), training_result(0, name="other")]
    for index, result in enumerate(results):
        (results_folder / result["name"]).mkdir(exist_ok=True)
        (results_folder / result["name"] / f"{index}.json").write_text(json.dumps(result))
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + BLOCK.format("old\n") + "after\n")
    tables.rewrite_tables(readme)
    table = tables.results_table(results[:2])
    assert "| mosaic-smoke | 1,234 | 0, 1 | 5,120 | 2.5000 ± 0.7071 |" in table
    filled = readme.read_text()
    assert filled == "before\n" + BLOCK.format(table + "\n") + "after\n"
    tables.rewrite_tables(readme)
    assert readme.read_text() == filled
    with pytest.raises(ValueError, match=r"asks for the results of 'absent', but there are only those of \['other', "):
        tables.table_of("absent")


def test_a_block_without_results_changes_nothing(results_folder, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(BLOCK.format("old\n"))
    with pytest.raises(Exception, match="asks for the results of 'smoke'"):
        tables.rewrite_tables(readme)
    assert readme.read_text() == BLOCK.format("old\n")


def test_tables_are_not_padded_and_keep_empty_cells():
    assert tables.markdown_table(["a", "long name"], "lr", [["x", ""], ["1.50", "007"]]) == (
        "| a | long name |\n| --- | ---: |\n| x |  |\n| 1.50 | 007 |"
    )
    assert tables.markdown_table(["a"], "r", []) == "| a |\n| ---: |"


def test_collecting_copies_result_pictures_and_tables(results_folder, tmp_path):
    with pytest.raises(ValueError, match="holds no result.json: run the recipe 'smoke' to its end first"):
        tables.collect("smoke")
    finish(tmp_path / "runs" / "smoke", training_result(0))
    tables.collect("smoke")
    tables.collect("smoke")
    collected = {path.name: path.read_bytes() for path in (results_folder / "smoke").iterdir()}
    assert set(collected) == {"README.md", "result.json", "smoke.png"}
    for name, content in collected.items():
        assert content == (tmp_path / "runs" / "smoke" / name).read_bytes()
    assert tables.committed_results() == [training_result(0)]


def test_one_table_has_the_measures_of_both_experiments_on_parts(results_folder):
    with pytest.raises(ValueError, match="'parts_summary', but there are only those of"):
        tables.table_of("parts_summary")
    effect = {"value": 0.25, "low": 0.2, "high": 0.3, "unit": "nats", "basis": "3 seeds, 9 documents"}
    text = {"models": [{"label": "M", "mean_loss": 2.5}], "effects": {"fall past 100 tokens, M, 4 blocks": effect}}
    induction = {"test": {"M": [{"accuracy": 0.5}, {"accuracy": 0.7}]}}
    measures = {"parts": {"stories": text, "encyclopaedia": text}, "parts_induction": induction}
    for name, measured in measures.items():
        (results_folder / name).mkdir()
        content = json.dumps({"name": name, "measured": measured})
        (results_folder / name / "result.json").write_text(content, encoding="utf-8")
    assert "| M | 2.500 | 0.25 (0.2 to 0.3) nats | 0.600 ± 0.141 |" in tables.table_of("parts_summary")
    assert "stories: 3 seeds, 9 documents; encyclopaedia: 3 seeds" in tables.table_of("parts_summary")
