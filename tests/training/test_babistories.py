# SPDX-License-Identifier: Apache-2.0
"""BabiStories: the same stories on any number of processes and after any kill, clean ones only, and honest numbers."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from helpers.damage import flip
from helpers.models import make_model
from helpers.processes import launch
from huggingface_hub import DatasetCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from training.__main__ import app
from training.export import export_model
from training.paths import CLONE, CONFIGURATION
from training.recipe import load_recipe
from training.tasks import babistories
from training.text import story_prompts
from training.text.sources import load_stories
from training.text.story_filters import Duplicates, clean, contains


RECIPE = str(CONFIGURATION / "recipe" / "babistories.yaml")
LISTS = {
    "names": ["Anna", "Ben", "Lily"],
    "openings": ["One day", "Once upon a time, there was a dog. It", "In a"],
    "verbs": ["walk", "sing"],
    "nouns": ["dog", "tree", "boat"],
    "adjectives": ["big", "red"],
    "feature_labels": ["Twist", "Dialogue", "two friends who share"],
}
SPECIAL = ("<|endoftext|>", "<|pad|>", "<unk>")
WORDS = sorted(
    {*re.findall(r"\w+|[.#]", " ".join(map(str, LISTS.values()))), "the", "and", "ran", "cat", ".", "!", "#"}
)
CHAT = "{% for message in messages %}[{{ message.role }}] {{ message.content }}</s>\n{% endfor %}"
NOTHING_ASKED = "asked={names: null, openings: null, verbs: null, nouns: null, adjectives: null}"


def save_generator(folder, chat_template=None, mosaic=False):
    """A few thousand random parameters that tell words, full stops and now and then a forbidden character."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[2]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL[0],
        bos_token=SPECIAL[0],
        pad_token=SPECIAL[1],
        unk_token=SPECIAL[2],
        padding_side="left",
    )
    tokenizer.chat_template = chat_template
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", n_positions=256, initializer_range=0.3, **sizes, **special)
    model = make_model(**sizes, **special) if mosaic else AutoModelForCausalLM.from_config(config)
    export_model(model, tokenizer, folder)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    save_generator(folder / "generator")
    (folder / "lists.json").write_text(json.dumps(LISTS), encoding="utf-8")
    return folder


def settings(material, output, *more):
    return [
        f"generator.model={material / 'generator'}",
        "generator.quantization=none",
        "generator.dtype=float32",
        "generator.max_new_tokens=24",
        "generator.batch_size=3",
        "num_stories=20",
        f"lists={material / 'lists.json'}",
        NOTHING_ASKED,
        f"output_dir={output}",
        *more,
    ]


def recipe_of(material, output, *more):
    return load_recipe(RECIPE, settings(material, output, *more))


def contents(folder):
    """All that must not depend on when, how often and on how many processes a run was started."""
    names = ("stories.jsonl.gz", "rejected.jsonl", "lists.json")
    return {
        path.name: path.read_bytes() for path in [*(folder / name for name in names), *(folder / "parts").iterdir()]
    }


def rows_of(path):
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def finished_run(material):
    recipe = recipe_of(material, material / "run")
    return recipe, babistories.run(recipe)


# The run


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
    made, tell = [], babistories._tell
    monkeypatch.setattr(babistories, "_tell", lambda *arguments: made.append(arguments[-1]) or tell(*arguments))
    babistories.run(recipe)
    assert made == [2, 6]
    assert contents(recipe.folder) == contents(finished_run[0].folder)


def test_a_changed_batch_is_told_again(finished_run, material, tmp_path, monkeypatch, caplog):
    shutil.copytree(finished_run[0].folder, tmp_path / "run")
    recipe = recipe_of(material, tmp_path / "run")
    (recipe.folder / "result.json").unlink()
    for name in ("parts/part-00000002.jsonl", "seconds.json"):
        flip(recipe.folder / name)
    made, tell = [], babistories._tell
    monkeypatch.setattr(babistories, "_tell", lambda *arguments: made.append(arguments[-1]) or tell(*arguments))
    babistories.run(recipe)
    assert made == [2] and (recipe.folder / "parts" / "broken-part-00000002.jsonl").is_file()
    assert "part-00000002.jsonl is damaged: kept as broken-" in caplog.text
    assert "seconds.json is damaged" in caplog.text
    (recipe.folder / "parts" / "broken-part-00000002.jsonl").unlink()
    assert contents(recipe.folder) == contents(finished_run[0].folder)


def test_killed_run_resumes_to_the_same_bytes(finished_run, material, tmp_path):
    """kill -9 while the fourth batch is half written."""
    script = (
        "import os, signal, sys, training.export as export\n"
        "force = export._force_to_disk\n"
        "def die(path):\n"
        "    if path.name == '.incomplete-part-00000003.jsonl':\n"
        "        path.write_text(path.read_text()[:40])\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    force(path)\n"
        "export._force_to_disk = die\n"
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
        paths = babistories.Desk(tmp_path, state).do("part", 8, lambda n: made.append(n) or [{"number": n}], "")
    assert made[:3] == [1, 4, 7] and sorted(made) == list(range(8))
    assert [rows_of(path)[0]["number"] for path in paths] == list(range(8))


@pytest.mark.slow
def test_two_processes_tell_what_one_tells(finished_run, material, tmp_path):
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


# The generator


def generator_of(recipe):
    return babistories.Generator(recipe.generator, PartialState(cpu=True))


@pytest.mark.parametrize("mosaic", [False, True], ids=["gpt2", "mosaic"])
def test_answers_do_not_depend_on_the_padding(mosaic, material, tmp_path):
    save_generator(tmp_path / "generator", mosaic=mosaic)
    more = [f"generator.model={tmp_path / 'generator'}", "generator.top_k=1"]
    recipe = recipe_of(material, tmp_path / "run", *more)
    generator = generator_of(recipe)
    prompts, beginnings = ["the dog ran . the cat ran and ran", "tree", "a big boat"], ["One day", "In a", "the"]
    together = generator.answer(prompts, beginnings, 0)
    alone = [generator.answer([p], [b], 0)[0] for p, b in zip(prompts, beginnings, strict=True)]
    assert together == alone and len(set(together)) == 3
    assert all(answer.startswith(beginning) for answer, beginning in zip(together, beginnings, strict=True))


def test_sampling_is_the_recipes_alone(material, tmp_path):
    save_generator(tmp_path / "generator")
    path = tmp_path / "generator" / "generation_config.json"
    path.write_text(json.dumps({"repetition_penalty": 9.0, "top_k": 3, "max_new_tokens": 2, "eos_token_id": [0, 5]}))
    recipe = recipe_of(material, tmp_path, f"generator.model={tmp_path / 'generator'}", "generator.temperature=0.7")
    config = generator_of(recipe).model.generation_config
    assert (config.temperature, config.top_p, config.top_k, config.max_new_tokens) == (0.7, 1.0, 0, 24)
    assert config.repetition_penalty is None or config.repetition_penalty == 1.0
    assert config.eos_token_id == [0, 5] and config.do_sample


def test_chat_template_takes_the_prompt_and_leaves_the_answer_open(material, tmp_path):
    save_generator(tmp_path / "generator", CHAT)
    recipe = recipe_of(material, tmp_path / "run", f"generator.model={tmp_path / 'generator'}")
    generator = generator_of(recipe)
    assert generator._text("Tell a story.", "One day") == "[user] Tell a story.</s>\n[assistant] One day"
    plain = generator_of(recipe_of(material, tmp_path / "run"))
    assert plain._text("Tell a story.", "One day") == "Tell a story.\n\nOne day"
    assert plain._text("One day", "One day") == "One day"
    assert babistories.run(recipe)["metrics"]["kept"] > 0


def test_template_of_the_opening_alone_needs_no_other_list(material, tmp_path):
    (tmp_path / "openings.json").write_text(json.dumps({"openings": ["One day", "the cat"]}), encoding="utf-8")
    result = babistories.run(
        recipe_of(material, tmp_path / "run", f"lists={tmp_path / 'openings.json'}", 'template="{opening}"')
    )
    assert set(rows_of(tmp_path / "run" / "stories.jsonl.gz")[0]) == {"text", "index", "opening"}
    assert result["metrics"]["share_with_all_required_words"] is None
    assert "required words |" not in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


# Lists and prompts


def test_prompt_depends_on_seed_lists_and_index_alone():
    lists = {kind: LISTS[kind] for kind in ("names", "verbs", "openings")}
    drawn = [story_prompts.draw(lists, 0, index) for index in range(40)]
    assert drawn[7] == story_prompts.draw(lists, 0, 7)
    assert drawn != [story_prompts.draw(lists, 1, index) for index in range(40)]
    assert {about["name"] for about in drawn} == set(LISTS["names"])
    features = story_prompts.draw({"features": ["a b", "c d", "e f", "g h"], "openings": ["x"]}, 3, 1)["features"]
    assert len(set(features)) == len(features) <= story_prompts.MOST_FEATURES


def test_filled_template_names_all_that_was_drawn():
    drawn = {"name": "Anna", "verb": "run", "noun": "{dog}", "adjective": "big", "opening": "Once"}
    drawn["features"] = ["a twist", "a moral", "a talk"]
    prompt = story_prompts.fill(story_prompts.TEMPLATE, drawn)
    for part in ('"Anna"', '"run"', '"{dog}"', '"big"', "a twist, a moral and a talk"):
        assert part in prompt
    assert story_prompts.fill("{features}", {"features": ["a twist"]}) == "a twist"


@pytest.mark.parametrize(
    ("kind", "answers", "entries"),
    [
        ("names", ["1. Anna\n2. Ben\n 3) Zoë\n4. Anna"], ["Anna", "Ben", "Zoë"]),
        ("names", ["1. Charlie\n2. Benjamin\n3. Mary Ann\n4. O'Hara"], ["Charlie", "O'Hara"]),
        ("names", ["Sure! Here are names:\n1. **Ida**\n2. Bo (a boy)\n3.", "17. Eva"], ["Ida", "Eva"]),
        ("openings", ['1. "Once a cat"\n2. Once a dog'], ["Once", "Once a", "Once a cat", "Once a dog"]),
        ("openings", ["1. See http://x\n2. (hm) \n3. Hi"], ["Hi"]),
        ("verbs", ["1. Run\n2. jump.\n3. fall down\n4. run"], ["run", "jump"]),
        ("nouns", ["no list at all"], []),
    ],
)
def test_numbered_lists_are_parsed(kind, answers, entries):
    assert story_prompts.parse_answers(kind, answers) == entries


def test_opening_has_at_most_twelve_words():
    entries = story_prompts.parse_answers("openings", ["1. " + " ".join("abcdefghijklmnop")])
    assert len(entries) == 12 and entries[-1] == "a b c d e f g h i j k l"


def test_lists_are_asked_of_the_generator(material, tmp_path, monkeypatch):
    answer, asked = babistories.Generator.answer, []

    def obliging(self, prompts, beginnings, seed):
        if beginnings[0] != "1.":
            return answer(self, prompts, beginnings, seed)
        asked.extend(prompts)
        words = "Anna Ben cat" if "names" in prompts[0] else "One day" if "begin" in prompts[0] else "walk big dog"
        return ["\n".join(f"{n}. {word}" for n, word in enumerate(words.split(), 1)) for _ in prompts]

    monkeypatch.setattr(babistories.Generator, "answer", obliging)
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


# Filters


@pytest.mark.parametrize(
    ("told", "text", "reason"),
    [
        (" there was a dog. It ran.", "Once there was a dog. It ran.", None),
        (" a dog ran.\n\n  It sat.\r\n\r\nIt ate. ", "Once a dog ran.\nIt sat.\nIt ate.", None),
        (' he said, "Come!"', 'Once he said, "Come!"', None),
        (' he said "hello"', 'Once he said "hello"', None),
        (" a dog ran. Then it", "Once a dog ran.", None),
        (' a dog said, "Hi." Then "', 'Once a dog said, "Hi."', None),
        (" a dog ran and", "Once a dog ran and", "unfinished"),
        ("", "Once", "empty"),
        (" \n The End", "Once", "empty"),
        (" a dog (big) ran.", None, "forbidden"),
        (" see http://x now.", None, "forbidden"),
        (" a dog &amp; a cat ran.", None, "forbidden"),
        (" a dog ran -- and sat.", None, "forbidden"),
        (" a dog\ufffd ran.", None, "forbidden"),
        (" a well-known dog & a cat ran.", "Once a well-known dog & a cat ran.", None),
        *((f" a dog ran.{mark}x{mark}", None, "forbidden") for mark in "\\*#<>%^/@[]{}+="),
        *(
            (f" a dog ran.{tail}", "Once a dog ran.", None)
            for tail in (
                "\n\nMoral: be kind.",
                "\n**The moral of the story:** (be kind)",
                " The moral of this story is to be kind.",
                "\n\nNote to parents: this is #1.",
                "\n\nAuthor's note\nI wrote it.",
                "\n\nDear parents, read it.",
                "\n\nThe End.",
                " The end",
                "\nKey words: run, dog",
                "\n- Words used: run (verb)",
                "\nVerb: run",
                "\n### Features: twist",
                "\nTwist: it was a cat.",
                "\nQuestions for you:\n1. Who ran?",
                "\nAnswer: the dog",
                "\n\nChapter 2\nIt ran on.",
                "\nAlternative ending: it sat.",
                "\nUser 0: write more",
                "\nAssistant: yes",
                "\nWrite another story about a cat.",
                "\nWord count: 4",
                "\n---\nmore",
                " I hope you enjoyed this story!",
                "\nThis story contains a twist.",
                "\n```python",
                " [/INST] more",
                "\nTo be continued",
                "\nSummary: a dog ran.",
                "\nLesson learned: run.",
                "\nTitle: The dog",
                "\nIllustration: a dog.",
            )
        ),
    ],
)
def test_answer_becomes_a_story_or_is_refused(told, text, reason):
    story = clean("Once" + told, "Once")
    assert story.reason == reason
    assert text is None or story.text == text


@pytest.mark.parametrize(
    "told",
    [
        " at the end of the day a dog ran to the end.",
        " a dog had a question: where was the end? It took note of a moral tale.",
        ' a dog ran.\n"The end of the road," it said.',
        " a dog wrote a story. Tom said: write me a letter.",
        " a user of the boat asked a parent. This story is about a dog.",
    ],
)
def test_prose_is_not_cut(told):
    story = clean("Once" + told, "Once")
    assert (story.text, story.reason, story.marker) == ("Once" + told, None, None)


def test_opening_is_never_cut():
    story = clean("The moral of the story is funny. A dog ran.", "The moral of the story is funny.")
    assert story.reason is None and story.marker is None


def test_duplicates_are_found():
    told = "One day a little dog ran to the big old tree and saw a red bird that sang a song about the sea and the sun"
    near = told.replace("One", "Some")
    strict, loose = Duplicates(None), Duplicates(0.7)
    for duplicates in (strict, loose):
        assert duplicates.find(told + ".", 4) is None
        assert duplicates.find(told.upper() + "!", 5) == ("duplicate", 4)
        assert duplicates.find("A cat slept all day long in the warm kitchen of the house by the lake.", 6) is None
    assert strict.find(near, 7) is None
    assert loose.find(near, 7) == ("near duplicate", 4)
    assert loose.find("Hi.", 8) is None and loose.find("hi", 9) == ("duplicate", 8)


@pytest.mark.parametrize(
    ("text", "word", "there"),
    [
        ("She walked.", "walk", True),
        ("Liking it.", "like", True),
        ("Carried", "carry", True),
        ("She ran.", "run", False),
        ("a set", "see", False),
        ("Crown", "row", False),
    ],
)
def test_required_word_is_found_with_its_endings(text, word, there):
    assert contains(text, word) == there


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
    answer = babistories.Generator.answer
    silenced = babistories._batch_seed(finished_run[0], "part", 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            babistories.Generator,
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
    monkeypatch.setattr(
        babistories.Generator, "answer", lambda self, prompts, beginnings, seed: [f"{b} #" for b in beginnings]
    )
    with pytest.raises(ValueError, match="none of 20 answers is a story .*'forbidden': 20.*rejected.jsonl"):
        babistories.run(recipe_of(material, tmp_path / "run"))
    assert len(rows_of(tmp_path / "run" / "rejected.jsonl")) == 20
    assert not (tmp_path / "run" / "result.json").exists()


def test_generator_that_cannot_be_loaded_is_named(material, tmp_path):
    with pytest.raises(ValueError, match="nobody/nothing"):
        babistories.run(recipe_of(material, tmp_path / "run", "generator.model=nobody/nothing"))
    save_generator(tmp_path / "generator")
    (tmp_path / "generator" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load the generator '.*generator'"):
        babistories.run(recipe_of(material, tmp_path / "half", f"generator.model={tmp_path / 'generator'}"))


def test_missing_bitsandbytes_is_said_before_anything_else(material, tmp_path, monkeypatch):
    monkeypatch.setattr(babistories.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(babistories, "Generator", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        babistories.run(recipe_of(material, tmp_path / "run", "generator.quantization=4bit"))
    assert not (tmp_path / "run").exists()


def test_experts_that_would_stay_as_they_are_are_refused(material, tmp_path, monkeypatch):
    save_generator(tmp_path / "generator")
    sizes = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    AutoConfig.for_model("mixtral", num_attention_heads=2, num_key_value_heads=1, **sizes).save_pretrained(
        tmp_path / "generator"
    )
    monkeypatch.setattr(babistories.importlib.util, "find_spec", lambda name: True)
    more = [f"generator.model={tmp_path / 'generator'}", "generator.quantization=4bit"]
    monkeypatch.setattr(babistories.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match="% of the parameters of .* are stacked experts"):
        babistories.run(recipe_of(material, tmp_path / "run", *more))


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
