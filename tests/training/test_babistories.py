# SPDX-License-Identifier: Apache-2.0
"""BabiStories: the same stories on any number of processes and after any kill, clean ones only, and honest numbers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.damage import flip
from helpers.processes import launch
from helpers.story_generators import CHAT, LISTS, RECIPE, recipe_of, rows_of, save_generator, save_material, settings
from huggingface_hub import DatasetCard
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from training.__main__ import app
from training.paths import CLONE
from training.tasks import babistories
from training.text import story_prompts
from training.text.generator import Generator
from training.text.shards import ShardWriter
from training.text.sources import load_stories


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return save_material(tmp_path_factory.mktemp("material"))


def contents(folder):
    """All that must not depend on when, how often and on how many processes a run was started."""
    names = ("stories.jsonl.gz", "rejected.jsonl", "lists.json")
    return {
        path.name: path.read_bytes() for path in [*(folder / name for name in names), *(folder / "parts").iterdir()]
    }


@pytest.fixture(scope="module")
def finished_run(material):
    recipe = recipe_of(material, material / "run")
    return recipe, babistories.run(recipe)


def test_run_leaves_stories_that_the_training_reads(finished_run):
    recipe, result = finished_run
    kept = rows_of(recipe.folder / "stories.jsonl.gz")
    rejected = rows_of(recipe.folder / "rejected.jsonl")
    assert kept and rejected
    assert sorted(row["index"] for row in kept + rejected) == list(range(20))
    assert load_stories(str(recipe.folder / "stories.jsonl.gz"))["text"] == [row["text"] for row in kept]
    for row in kept:
        assert row["text"].startswith(row["opening"]) and re.search(r"[.!]$", row["text"])
        assert row["name"] in LISTS["names"] and row["verb"] in LISTS["verbs"]
        assert not set(row["features"]) & set(LISTS["feature_labels"][:2])  # phrases, not labels
    parts = sorted((recipe.folder / "parts").iterdir())
    assert [path.name for path in parts] == [f"part-{number:08d}.jsonl" for number in range(7)]
    assert all(rows_of(path)[-1].keys() == {"sha256"} for path in parts)
    assert [row["index"] for path in parts for row in rows_of(path)[:-1]] == list(range(20))
    assert "stories of 20 prompts" in babistories.summary(result, recipe.folder)


def test_numbers_of_the_result_are_those_of_the_files(finished_run):
    recipe, result = finished_run
    metrics, texts = result["metrics"], [row["text"] for row in rows_of(recipe.folder / "stories.jsonl.gz")]
    rejected = [row["reason"] for row in rows_of(recipe.folder / "rejected.jsonl")]
    assert metrics["kept"] == len(texts) and metrics["prompted"] == 20
    assert metrics["rejected"] == {reason: rejected.count(reason) for reason in sorted(set(rejected))}
    assert metrics["characters_mean"] == pytest.approx(sum(map(len, texts)) / len(texts))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.generator.model)
    assert metrics["tokens"] == sum(len(tokenizer.tokenize(text)) for text in texts)
    assert metrics["distinct_names"] <= 3 and 0 <= metrics["share_with_all_required_words"] < 1
    assert result["lists"] == {**{kind: len(LISTS[kind]) for kind in list(LISTS)[:5]}, "features": 3}
    assert result["data"]["lists"]["file"] == "lists.json" and len(result["data"]["lists"]["sha256"]) == 64
    assert json.loads((recipe.folder / "result.json").read_text(encoding="utf-8")) == result


def test_same_recipe_same_bytes_and_another_seed_others(finished_run, material, tmp_path):
    recipe, _ = finished_run
    babistories.run(recipe_of(material, tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(recipe.folder)
    babistories.run(recipe_of(material, tmp_path / "other", "seed=1"))
    first = "part-00000000.jsonl"
    assert contents(tmp_path / "other")[first] != contents(recipe.folder)[first]


def test_finished_run_is_shown_and_not_made_again(finished_run, monkeypatch):
    recipe, result = finished_run
    monkeypatch.setattr(babistories, "Generator", None)
    assert babistories.run(recipe) == result


def test_only_what_is_missing_is_made(finished_run, material, tmp_path, monkeypatch):
    recipe = recipe_of(material, tmp_path / "run")
    babistories.run(recipe)
    for name in ("result.json", "parts/part-00000002.jsonl", "parts/part-00000006.jsonl"):
        (recipe.folder / name).unlink()
    made, ask = [], babistories._ask_for_stories
    monkeypatch.setattr(
        babistories, "_ask_for_stories", lambda *arguments: made.append(arguments[-1]) or ask(*arguments)
    )
    babistories.run(recipe)
    assert made == [2, 6]
    assert contents(recipe.folder) == contents(finished_run[0].folder)


def test_a_changed_batch_is_written_again(finished_run, material, tmp_path, monkeypatch, caplog):
    shutil.copytree(finished_run[0].folder, tmp_path / "run")
    recipe = recipe_of(material, tmp_path / "run")
    (recipe.folder / "result.json").unlink()
    for name in ("parts/part-00000002.jsonl", "seconds.json"):
        flip(recipe.folder / name)
    made, ask = [], babistories._ask_for_stories
    monkeypatch.setattr(
        babistories, "_ask_for_stories", lambda *arguments: made.append(arguments[-1]) or ask(*arguments)
    )
    babistories.run(recipe)
    assert made == [2] and (recipe.folder / "parts" / "broken-part-00000002.jsonl").is_file()
    assert "part-00000002.jsonl is damaged: kept as broken-" in caplog.text
    assert "seconds.json is damaged" in caplog.text
    (recipe.folder / "parts" / "broken-part-00000002.jsonl").unlink()
    assert contents(recipe.folder) == contents(finished_run[0].folder)


def test_killed_run_resumes_to_the_same_bytes(finished_run, material, tmp_path):
    """kill -9 while the fourth batch is half written."""
    script = (
        "import os, signal, sys, training.files as files\n"
        "force = files._force_to_disk\n"
        "def die(path):\n"
        "    if path.name == '.incomplete-part-00000003.jsonl':\n"
        "        path.write_text(path.read_text()[:40])\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    force(path)\n"
        "files._force_to_disk = die\n"
        "from training.__main__ import app\n"
        "app(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, "run", RECIPE, *settings(material, tmp_path / "run")]
    killed = subprocess.run(command, cwd=CLONE, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = sorted(path.name for path in (tmp_path / "run" / "parts").iterdir())
    assert left == [".incomplete-part-00000003.jsonl", *(f"part-{number:08d}.jsonl" for number in range(3))]
    babistories.run(recipe_of(material, tmp_path / "run"))
    assert contents(tmp_path / "run") == contents(finished_run[0].folder)


def test_processes_share_batches_without_gap_or_overlap(tmp_path):
    (tmp_path / "parts").mkdir()
    made = []
    for index, processes in [(1, 3), (0, 2), (1, 2)]:  # a third process of an earlier start, then two others
        state = SimpleNamespace(
            process_index=index, num_processes=processes, is_main_process=index == 0, wait_for_everyone=lambda: None
        )
        paths = ShardWriter(tmp_path, state).write("parts", "part", 8, lambda n: made.append(n) or [{"number": n}], "")
    assert made[:3] == [1, 4, 7] and sorted(made) == list(range(8))
    assert [rows_of(path)[0]["number"] for path in paths] == list(range(8))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(finished_run, material, tmp_path):
    process = launch("ddp", "run", RECIPE, *settings(material, tmp_path / "run"), processes=2)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("stories of 20 prompts") == 1
    assert contents(tmp_path / "run") == contents(finished_run[0].folder)
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["num_processes"] == 2 and result["metrics"] == finished_run[1]["metrics"]


def test_stories_of_another_generator_are_not_mixed_in(material, tmp_path):
    save_generator(tmp_path / "generator")
    recipe = recipe_of(material, tmp_path / "run", f"generator.model={tmp_path / 'generator'}", "num_stories=6")
    babistories.run(recipe)
    save_generator(tmp_path / "generator", CHAT)
    with pytest.raises(ValueError, match="another recipe or other data .*generator.files"):
        babistories.run(recipe)


def test_template_of_the_opening_alone_needs_no_other_list(material, tmp_path):
    (tmp_path / "openings.json").write_text(json.dumps({"openings": ["One day", "the cat"]}), encoding="utf-8")
    result = babistories.run(
        recipe_of(material, tmp_path / "run", f"lists={tmp_path / 'openings.json'}", 'template="{opening}"')
    )
    assert set(rows_of(tmp_path / "run" / "stories.jsonl.gz")[0]) == {"text", "index", "opening"}
    assert result["metrics"]["share_with_all_required_words"] is None
    assert "required words |" not in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_lists_are_asked_of_the_generator(material, tmp_path, monkeypatch):
    answer, asked = Generator.answer, []

    def obliging(self, prompts, beginnings, seed):
        if beginnings[0] != "1.":
            return answer(self, prompts, beginnings, seed)
        asked.extend(prompts)
        words = "Anna Ben cat" if "names" in prompts[0] else "One day" if "begin" in prompts[0] else "walk big dog"
        return ["\n".join(f"{n}. {word}" for n, word in enumerate(words.split(), 1)) for _ in prompts]

    monkeypatch.setattr(Generator, "answer", obliging)
    more = ["lists=null", "asked={names: 4, openings: 5, verbs: 1, nouns: 1, adjectives: 1}"]
    recipe = recipe_of(material, tmp_path / "run", *more)
    assert (
        babistories.plan(recipe)["answers_asked_for_lists"]
        == 12
        == babistories.plan(recipe)["new_tokens_at_most"] // 24 - 20
    )
    result = babistories.run(recipe)
    assert len(asked) == 12 and len(set(asked)) == 6  # there are two ways to ask for openings
    lists = json.loads((recipe.folder / "lists.json").read_text(encoding="utf-8"))
    assert lists["names"] == ["Anna", "Ben", "cat"] and lists["features"] == list(story_prompts.FEATURES.values())
    assert result["data"]["lists"] is None and result["lists"]["names"] == 3
    (recipe.folder / "result.json").unlink()
    babistories.run(recipe)
    assert len(asked) == 12  # a restarted run does not ask again
    assert "names from 4 answers" in (recipe.folder / "README.md").read_text(encoding="utf-8")


# Mistakes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({name: LISTS[name] for name in LISTS if name != "verbs"}, "'.*words.json' misses the key 'verbs'"),
        ({name: LISTS[name] for name in list(LISTS)[:4]}, "misses the keys 'adjectives', 'features'"),
        (LISTS | {"nouns": []}, "words.json' .*nouns: List should have at least 1 item"),
        (LISTS | {"nouns": "dog"}, "nouns: Input should be a valid"),
        (LISTS | {"names": ["Ben", 3]}, "names.1: Input should be a valid string"),
        (LISTS | {"openings": ["  "]}, "openings.0: String should have at least 1 character"),
        (LISTS | {"feature_labels": ["Twsit"]}, "'Twsit' is neither a phrase nor one of the labels BadEnding"),
        (["Ben"], "the file: Input should be an object"),
        ("{", "the file: Invalid JSON"),
    ],
)
def test_list_file_is_explained(material, tmp_path, content, message):
    path = tmp_path / "words.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        babistories.run(recipe_of(material, tmp_path / "run", f"lists={path}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('template="A {nam}"', "unknown placeholder {nam}: there are {name}, {verb}"),
        ('template="A {name!r}"', "and nothing else inside the braces"),
        ('template="A {name"', "a brace that is meant as such is doubled"),
        ("lists=null", "nothing to draw names, verbs, nouns, adjectives, openings from"),
        ('template="{opening}" asked.names=2', "`asked.names` has no effect"),
        ("generator.temperature=0.0", "generator.temperature: Input should be greater than 0"),
        ("generator.quantization=8bit", "generator.quantization: Input should be 'none' or '4bit'"),
        ("near_duplicates=1.0", "near_duplicates: Input should be less than 1"),
        ("generator.batchsize=1", "nearest valid name: 'generator.batch_size'"),
    ],
)
def test_mistakes_in_the_recipe_are_explained(material, tmp_path, setting, message):
    with pytest.raises(ValueError) as error:
        recipe_of(material, tmp_path, *re.findall(r'[\w.]+=(?:"[^"]*"|\S+)', setting))
    assert message in str(error.value)


def test_missing_list_file_is_named(material, tmp_path):
    result = CliRunner().invoke(app, ["run", RECIPE, *settings(material, tmp_path / "run", "lists=nowhere.json")])
    assert result.exit_code == 1 and "there is no list file 'nowhere.json'" in result.stderr


def test_silent_generator_is_named_and_earlier_batches_stay(finished_run, material, tmp_path, monkeypatch):
    answer = Generator.answer
    silenced = babistories._batch_seed(finished_run[0], "part", 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            Generator,
            "answer",
            lambda self, prompts, beginnings, seed: (
                [f"{beginning} \n" for beginning in beginnings]
                if seed == silenced
                else answer(self, prompts, beginnings, seed)
            ),
        )
        with pytest.raises(ValueError, match="generator'.* added nothing to any of the 3 openings of batch 2: check"):
            babistories.run(recipe_of(material, tmp_path / "run"))
    assert len(list((tmp_path / "run" / "parts").iterdir())) == 2
    babistories.run(recipe_of(material, tmp_path / "run"))
    assert contents(tmp_path / "run") == contents(finished_run[0].folder)


def test_generator_that_makes_no_list_is_named(material, tmp_path):
    more = ["lists=null", "asked={names: 2, openings: 2, verbs: 2, nouns: 2, adjectives: 2}"]
    with pytest.raises(ValueError, match="was asked for names, but in none of its 2 answers is a numbered list"):
        babistories.run(recipe_of(material, tmp_path / "run", *more))


def test_no_story_at_all_is_an_error_and_the_answers_stay(material, tmp_path, monkeypatch):
    monkeypatch.setattr(Generator, "answer", lambda self, prompts, beginnings, seed: [f"{b} #" for b in beginnings])
    with pytest.raises(ValueError, match="none of 20 answers is a story .*'forbidden': 20.*rejected.jsonl"):
        babistories.run(recipe_of(material, tmp_path / "run"))
    assert len(rows_of(tmp_path / "run" / "rejected.jsonl")) == 20
    assert not (tmp_path / "run" / "result.json").exists()


# The card


def test_card_is_valid_and_its_numbers_are_the_results(finished_run):
    recipe, result = finished_run
    card = DatasetCard.load(recipe.folder / "README.md")
    assert card.data.license == "unknown" and card.data.language == "en"
    assert card.data.task_categories == ["text-generation"] and card.data.size_categories == "n<1K"
    assert "arxiv:2405.06394" in card.data.tags
    assert card.data.to_dict()["configs"] == [{"config_name": "default", "data_files": "stories.jsonl.gz"}]
    table = dict(re.findall(r"^\| (\w[^|]*) \| ([\d.,%]+) \|$", card.text, re.M))
    metrics = result["metrics"]
    expected = {
        "prompts": metrics["prompted"],
        "stories": metrics["kept"],
        "words": metrics["words"],
        "tokens (the generator's tokenizer, no end-of-text)": metrics["tokens"],
        "distinct openings": metrics["distinct_openings"],
        "distinct names drawn": metrics["distinct_names"],
        **metrics["rejected"],
        **result["lists"],
    }
    assert {name: table[name] for name in expected} == {name: f"{value:,}" for name, value in expected.items()}
    assert table["characters a story, mean"] == f"{metrics['characters_mean']:,.1f}"
    assert table["stories with all required words"] == f"{metrics['share_with_all_required_words']:.1%}"
    assert result["samples"][0] in card.text.replace("\n>\n> ", "\n")
    assert result["data"]["lists"]["sha256"] in card.text
    assert str(recipe.folder.parent) not in str(card)


@pytest.mark.parametrize(
    ("rows", "category"), [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (2_200_000, "1M<n<10M"), (10**9, "n>100M")]
)
def test_size_category(rows, category):
    assert babistories.size_category(rows) == category


def test_licence_may_be_stated_later(finished_run, material, tmp_path):
    folder = shutil.copytree(finished_run[0].folder, tmp_path / "run")
    (folder / "result.json").unlink()
    babistories.run(recipe_of(material, folder, "license=cc-by-4.0"))
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0" and "`cc-by-4.0`, as stated by" in card.text


def test_dry_run_reads_nothing():
    result = CliRunner().invoke(app, ["dry-run", RECIPE, "lists=nowhere.json", "asked.verbs=null"])
    assert result.exit_code == 0, result.stderr
    assert "batches: 39,063" in result.stdout.splitlines()
