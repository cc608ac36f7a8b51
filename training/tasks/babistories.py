# SPDX-License-Identifier: Apache-2.0
"""BabiStories: stories for small children, written by a language model from words and a beginning drawn for each.

The data set on which the paper trains its language models (arXiv 2405.06394, Fig. 14 and Table 2), as a recipe. The
parts are in `training/text/`: `story_prompts.py` draws the words of a prompt, `generator.py` answers it, `shards.py`
keeps the answers, `story_filters.py` and `story_selection.py` choose the stories.

The unit of work is a batch of answers, one file, seeded by its number: the stories depend neither on the number of
processes nor on when a run was interrupted. Answers are kept as they came: after a change of the filters, remove
`result.json` and start the run again, which then only filters.
"""

import functools
import hashlib
import math
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub import DatasetCard, DatasetCardData
from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from training.card import PAPERS, STORIES, render
from training.files import checksum, remove_leftovers, write_json, write_text
from training.recipe import BaseRecipe, Section
from training.result import header
from training.run_folder import run_once
from training.text import story_prompts
from training.text.generator import Generator, GeneratorSection, check_quantization
from training.text.shards import ShardWriter, read_rows
from training.text.story_prompts import FEATURES, FIRST_NUMBER, LISTS, REQUESTS, TEMPLATE
from training.text.story_selection import REJECTED_FILE, STORIES_FILE, Statistics, select_stories


# Processes that are done wait for the slowest, which may have most of an interrupted run left to do.
LONGEST_WAIT = timedelta(days=30)


class AskedSection(Section):
    """Lists that the generator itself makes first, and how many answers each is gathered from."""

    names: PositiveInt | None = None
    openings: PositiveInt | None = None
    verbs: PositiveInt | None = None
    nouns: PositiveInt | None = None
    adjectives: PositiveInt | None = None


class Recipe(BaseRecipe):
    """A data set of stories to make; see `configuration/README.md` for each field."""

    task: Literal["babistories"]
    seed: int = Field(default=0, ge=0)
    num_stories: PositiveInt
    generator: GeneratorSection
    lists: str | None = None
    asked: AskedSection = AskedSection()
    template: str = TEMPLATE
    near_duplicates: float | None = Field(default=0.8, gt=0, lt=1)
    license: str = "unknown"

    @model_validator(mode="after")
    def _check_each_list_has_one_origin(self) -> Self:
        asked, needed = self.requests, self.needed
        for kind in asked:
            if kind not in needed:
                raise ValueError(f"`asked.{kind}` has no effect: the template draws from no {kind}; remove it")
        without = [kind for kind in needed if kind not in asked and kind != "features"]
        if self.lists is None and without:
            raise ValueError(
                f"there is nothing to draw {', '.join(without)} from: give a list file (`lists`), or the number of "
                f"answers to gather them from (such as asked.{without[0]}=8)"
            )
        if self.lists is not None and all(kind in asked for kind in needed):
            raise ValueError("`lists` has no effect, as everything is asked of the generator: remove one of the two")
        return self

    def content(self) -> dict[str, Any]:
        """Return all that determines the run: not the licence, which only the card states."""
        content = super().content()
        del content["license"]
        return content

    @functools.cached_property
    def needed(self) -> list[str]:
        """Names of the lists to draw from: those of the template's placeholders, and always the openings."""
        # Every answer begins with an opening, whether or not the template shows it.
        used = story_prompts.placeholders(self.template) | {"opening"}
        return [kind for placeholder, kind in LISTS.items() if placeholder in used]

    @functools.cached_property
    def requests(self) -> dict[str, int]:
        """How many answers the generator is asked for, by list."""
        return {kind: count for kind, count in self.asked.model_dump().items() if count is not None}

    @functools.cached_property
    def num_batches(self) -> int:
        """Batches of stories."""
        return math.ceil(self.num_stories / self.generator.batch_size)


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return what a run would amount to, known without any data or model: `dry-run` prints it."""
    answers = recipe.num_stories + sum(recipe.requests.values())
    return {
        "stories_prompted": recipe.num_stories,
        "batches": recipe.num_batches,
        "answers_asked_for_lists": sum(recipe.requests.values()),
        "new_tokens_at_most": answers * recipe.generator.max_new_tokens,
        "folder": str(recipe.folder),
        "hash": recipe.hash,
    }


def _batch_seed(recipe: Recipe, name: str, number: int) -> int:
    # Hashed, so that neighbouring seeds and batches share nothing; 63 bits, as torch takes a signed integer.
    return int.from_bytes(hashlib.sha256(f"{recipe.seed} {name} {number}".encode()).digest()[:8], "big") >> 1


def _batch_indices(number: int, count: int, size: int) -> range:
    return range(number * size, min((number + 1) * size, count))


# Lists


def _given_lists(recipe: Recipe) -> dict[str, list[str]]:
    """Return the lists that need not be asked for; read first, so that a mistake in them costs no time."""
    given = [kind for kind in recipe.needed if kind not in recipe.requests]
    if recipe.lists is not None:
        return story_prompts.read_lists(recipe.lists, given)
    # Without a list file only features can be left: the recipe was refused if anything else had no origin.
    return {"features": list(FEATURES.values())} if given else {}


def _ask_for_list(recipe: Recipe, generator: Generator, kind: str, number: int) -> list[dict[str, Any]]:
    """Return the rows of one batch of answers that hold a list."""
    indices = _batch_indices(number, recipe.requests[kind], recipe.generator.batch_size)
    # A list with two requests gets them in turn.
    prompts = [REQUESTS[kind][index % len(REQUESTS[kind])] for index in indices]
    texts = generator.answer(prompts, [FIRST_NUMBER] * len(prompts), _batch_seed(recipe, kind, number))
    return [{"index": index, "text": text} for index, text in zip(indices, texts, strict=True)]


def _collect_lists(
    recipe: Recipe, given: dict[str, list[str]], generator: Generator, writer: ShardWriter
) -> dict[str, list[str]]:
    """Return all lists, those asked of the generator among them; the main process writes them into `lists.json`."""
    lists = dict(given)
    for kind, count in recipe.requests.items():
        ask = functools.partial(_ask_for_list, recipe, generator, kind)
        batches = math.ceil(count / recipe.generator.batch_size)
        paths = writer.write("asked", kind, batches, ask, f"lists of {kind}")
        # A text is None where the tokenizer did not give the prompt back as it was.
        lists[kind] = story_prompts.parse_answers(kind, (row["text"] or "" for row in read_rows(paths)))
        if not lists[kind]:
            raise ValueError(
                f"the generator {recipe.generator.model!r} was asked for {kind}, but in none of its {count} answers "
                f"is a numbered list of them (see {recipe.folder / 'asked'}): take a model that follows instructions, "
                f"or give {kind} in a list file (`lists`)"
            )
    if writer.state.is_main_process:
        write_json(recipe.folder / "lists.json", {kind: lists[kind] for kind in recipe.needed})
    writer.state.wait_for_everyone()
    return lists


# Stories


def _ask_for_stories(
    recipe: Recipe, lists: dict[str, list[str]], generator: Generator, number: int
) -> list[dict[str, Any]]:
    """Return the rows of one batch of stories, as the model wrote them."""
    indices = _batch_indices(number, recipe.num_stories, recipe.generator.batch_size)
    drawn = [story_prompts.draw(lists, recipe.seed, index) for index in indices]
    prompts = [story_prompts.fill(recipe.template, words) for words in drawn]
    openings = [words["opening"] for words in drawn]
    # "part" is in the seed: another name would give other stories.
    texts = generator.answer(prompts, openings, _batch_seed(recipe, "part", number))
    added = [text is not None and text[len(opening) :].strip() for text, opening in zip(texts, openings, strict=True)]
    # A single answer may well be empty; that of a whole batch is a model, or a template, that does not work.
    if len(texts) > 1 and not any(added):
        raise ValueError(
            f"the generator {recipe.generator.model!r} added nothing to any of the {len(texts)} openings of batch "
            f"{number}: check that its chat template and end-of-text token are right, that generator.dtype suits it, "
            "and that the template asks for a story; earlier batches stay where they are"
        )
    return [{"index": index, **words, "text": text} for index, words, text in zip(indices, drawn, texts, strict=True)]


def size_category(num_rows: int) -> str:
    """Return the Hub's name for a size, such as `1K<n<10K`."""
    bounds = [(10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M"), (10**8, "100M")]
    lower = "n"
    for bound, name in bounds:
        if num_rows < bound:
            return f"n<{name}" if lower == "n" else f"{lower}<n<{name}"
        lower = name
    return f"n>{lower}"


def card(result: dict[str, Any], published: dict[str, Any] | None = None) -> str:
    """Return the data set's card, in Markdown; every number in it is one of the result.

    Args:
        result: content of the run's `result.json`.
        published: the `repo_id` and `revision` where a reader finds it, the sha256 of its `files`, and its `pictures`,
            with what is said of each; None if it is not published.

    Raises:
        ValueError: its metadata are not valid.
    """
    paper = PAPERS["memory_mosaic"]
    data = DatasetCardData(
        language="en",
        license=result["recipe"]["license"],
        task_categories=["text-generation"],
        size_categories=size_category(result["metrics"]["kept"]),
        tags=["synthetic", "stories", "babistories", "memory-mosaics", f"arxiv:{paper.arxiv}"],
        pretty_name=result["name"],
        configs=STORIES,
    )
    values = {"result": result, "metrics": result["metrics"], "recipe": result["recipe"]}
    values["paper"] = paper
    return str(DatasetCard(render("dataset_card.md.jinja", metadata=data.to_yaml(), published=published, **values)))


# The run


def _result(
    recipe: Recipe,
    lists: dict[str, list[str]],
    counted: Statistics,
    writer: ShardWriter,
    data: dict[str, Any],
) -> dict[str, Any]:
    return {
        **header(recipe),
        "seed": recipe.seed,
        "num_processes": writer.state.num_processes,
        "data": data,
        "generator": {"name": recipe.generator.name, "revision": recipe.generator.revision()},
        "lists": {kind: len(entries) for kind, entries in lists.items()},
        "stories_sha256": checksum(recipe.folder / STORIES_FILE),
        "seconds": writer.seconds,
        "metrics": counted.metrics(),
        "samples": counted.samples,
    }


def _make_stories(
    recipe: Recipe, given: dict[str, list[str]], state: PartialState, data: dict[str, Any]
) -> dict[str, Any]:
    """Make what is missing of lists, answers and stories; return the result, on the main process alone."""
    if state.is_main_process:
        # Only here: `run_once` tidies the folder of the run, but not those within it.
        for name in ("asked", "parts") if recipe.requests else ("parts",):
            (recipe.folder / name).mkdir(exist_ok=True)
            remove_leftovers(recipe.folder / name)
    state.wait_for_everyone()
    writer = ShardWriter(recipe.folder, state)
    generator = Generator(recipe.generator, state)
    lists = _collect_lists(recipe, given, generator, writer)
    ask = functools.partial(_ask_for_stories, recipe, lists, generator)
    paths = writer.write("parts", "part", recipe.num_batches, ask, "stories")
    # One process filters, because each story is compared with all before it.
    if not state.is_main_process:
        return {}
    # Every answer has its opening by force, and a feature is no word to look for.
    required = [word for word in ("name", "verb", "noun", "adjective") if LISTS[word] in recipe.needed]
    counted = select_stories(
        recipe.folder, paths, recipe.num_stories, recipe.near_duplicates, required, generator.tokenizer
    )
    if not counted.characters:
        raise ValueError(
            f"none of {counted.prompted} answers is a story ({dict(counted.rejected)}): look at "
            f"{recipe.folder / REJECTED_FILE}, and take another generator or template"
        )
    result = _result(recipe, lists, counted, writer, data)
    write_text(recipe.folder / "README.md", card(result))
    return result


def _identity(recipe: Recipe, state: PartialState) -> dict[str, Any]:
    # Only one process reads the weights; they are what makes the stories of a folder belong together.
    provenance: list[dict[str, Any] | None] = [None]
    if state.is_main_process:
        lists = recipe.lists and {"file": Path(recipe.lists).name, "sha256": checksum(Path(recipe.lists))}
        generator = {"name": recipe.generator.name, "files": recipe.generator.checksums()}
        provenance = [{"lists": lists, "generator": generator}]
    return {
        "hash": recipe.hash,
        "recipe": recipe.model_dump(exclude={"output_dir"}),
        "data": broadcast_object_list(provenance)[0],
    }


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Make the data set, from wherever an earlier start of the same recipe got to.

    Args:
        recipe: what to do.
        restart: move what an earlier run left in the folder aside and begin again.

    Returns:
        The content of `result.json`; of the earlier one, if the recipe was already finished.

    Raises:
        ValueError: the list file is not as it should be, the generator cannot be loaded or adds nothing, the folder
            belongs to another recipe, or no story passes the filters.
    """
    check_quantization(recipe.generator)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT)
    given = _given_lists(recipe)
    return run_once(
        recipe,
        state,
        restart,
        identity=lambda: _identity(recipe, state),
        make=lambda data: _make_stories(recipe, given, state, data),
        kept=[STORIES_FILE, REJECTED_FILE],
        again="makes the stories again",
    )


def summary(result: dict[str, Any], folder: Path) -> str:
    """Return the end of a run in words: sample stories, how many were kept, and where everything is."""
    metrics = result["metrics"]
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in metrics["rejected"].items()) or "none"
    lines = [f"{sample}\n" for sample in result["samples"]]
    lines += [
        f"{result['generator']['name']}: {metrics['kept']:,} stories of {metrics['prompted']:,} prompts "
        f"(rejected: {rejected}), {metrics['tokens']:,} tokens, {metrics['characters_mean']:.0f} characters a story, "
        f"in {result['seconds']:,.0f} s",
        f"{STORIES_FILE}, {REJECTED_FILE}, README.md and result.json are in {folder}",
    ]
    return "\n".join(lines)
