# SPDX-License-Identifier: Apache-2.0
"""BabiStories: stories for small children, told by a language model that is given words and a beginning for each.

The data set on which the paper trains its language models (arXiv 2405.06394, Fig. 14 and Table 2), as a recipe. What
is drawn for a prompt: `story_prompts.py`; which answers become stories: `story_filters.py`.

The unit of work is a batch of answers, one file, seeded by its number: what is told depends neither on the number of
processes nor on when a run was interrupted. Answers are kept as they came: after a change of the filters, remove
`result.json` and start the run again, which then only filters.
"""

import functools
import gzip
import hashlib
import importlib.util
import json
import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub import DatasetCard, DatasetCardData
from pydantic import Field, PositiveInt, model_validator
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.card import STORIES, render
from training.files import (
    checksum,
    read_sealed,
    remove_leftovers,
    sealed,
    set_aside,
    staged_file,
    write_json,
    write_text,
)
from training.recipe import BaseRecipe, Section
from training.result import header
from training.run_folder import run_once
from training.tables import Claim
from training.text import story_filters, story_prompts
from training.text.story_prompts import FEATURES, FIRST_NUMBER, LISTS, REQUESTS, TEMPLATE
from training.text.tokenizer import added_tokens, load_tokenizer


logger = logging.getLogger(__name__)

NUM_SAMPLES = 3
# Of a generator in a local folder, what its stories depend on: configuration, tokenizer, chat template and weights.
GENERATOR_FILES = ("*.json", "*.model", "*.jinja", "*.safetensors", "*.bin")
# Processes that are done wait for the slowest, which may have most of an interrupted run left to do.
LONGEST_WAIT = timedelta(days=30)


class GeneratorSection(Section):
    """The language model that tells the stories, and how its tokens are drawn."""

    model: str
    quantization: Literal["none", "4bit"] = "none"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_new_tokens: PositiveInt = 512
    batch_size: PositiveInt


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
    def _every_list_has_one_origin(self):
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
        """All that determines the run: not the licence, which only the card states."""
        content = super().content()
        del content["license"]
        return content

    @functools.cached_property
    def needed(self) -> list[str]:
        """The lists that something is drawn from: those of the template's placeholders, and always the openings."""
        used = story_prompts.placeholders(self.template) | {"opening"}
        return [kind for placeholder, kind in LISTS.items() if placeholder in used]

    @functools.cached_property
    def requests(self) -> dict[str, int]:
        """How many answers are asked for, by list."""
        return {kind: count for kind, count in self.asked.model_dump().items() if count is not None}

    @functools.cached_property
    def generator_name(self) -> str:
        """The generator as readers may know it: of a folder, the end of its path only (a run's ends in `/model`)."""
        folder = Path(self.generator.model)
        return "/".join(folder.resolve().parts[-2:]) if folder.is_dir() else self.generator.model

    @functools.cached_property
    def num_batches(self) -> int:
        """Batches of stories."""
        return math.ceil(self.num_stories / self.generator.batch_size)


def plan(recipe: Recipe) -> dict[str, Any]:
    """What a run would amount to, known without any data or model: `dry-run` prints it."""
    answers = recipe.num_stories + sum(recipe.requests.values())
    return {
        "stories_prompted": recipe.num_stories,
        "batches": recipe.num_batches,
        "answers_asked_for_lists": sum(recipe.requests.values()),
        "new_tokens_at_most": answers * recipe.generator.max_new_tokens,
        "folder": str(recipe.folder),
        "hash": recipe.hash,
    }


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Make the data set, from wherever an earlier start of the same recipe got to.

    Args:
        recipe: what to do.
        restart: move what an earlier run left in the folder aside and begin anew.

    Returns:
        The content of `result.json`; of the earlier one, if the recipe was already finished.

    Raises:
        ValueError: the list file is not as it should be, the generator cannot be loaded or says nothing, the folder
            belongs to another recipe, or no story passes the filters.
    """
    if recipe.generator.quantization == "4bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "generator.quantization is 4bit, which needs the library bitsandbytes: pip install bitsandbytes, or set "
            "generator.quantization=none"
        )
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT)
    given = _given_lists(recipe)
    return run_once(
        recipe,
        state,
        restart,
        identity=lambda: _identity(recipe, state),
        make=lambda data: _make_stories(recipe, given, state, data),
        kept=["stories.jsonl.gz", "rejected.jsonl"],
        again="makes the stories again",
    )


def _make_stories(
    recipe: Recipe, given: dict[str, list[str]], state: PartialState, data: dict[str, Any]
) -> dict[str, Any]:
    if state.is_main_process:
        for name in ("asked", "parts") if recipe.requests else ("parts",):
            (recipe.folder / name).mkdir(exist_ok=True)
            remove_leftovers(recipe.folder / name)
    state.wait_for_everyone()
    desk = Desk(recipe.folder, state)
    generator = Generator(recipe.generator, state)
    lists = _gathered_lists(recipe, given, generator, desk)
    paths = desk.do("part", recipe.num_batches, functools.partial(_tell, recipe, lists, generator), "stories")
    if not state.is_main_process:
        return {}
    return _finish(recipe, lists, generator.tokenizer, paths, desk, data)


def _identity(recipe: Recipe, state: PartialState) -> dict[str, Any]:
    # Only one process reads the weights; they are what makes the stories of a folder belong together.
    provenance = [None]
    if state.is_main_process:
        folder = Path(recipe.generator.model)
        files = sorted(file for pattern in GENERATOR_FILES for file in folder.glob(pattern))
        lists = recipe.lists and {"file": Path(recipe.lists).name, "sha256": checksum(Path(recipe.lists))}
        generator = {"name": recipe.generator_name, "files": {file.name: checksum(file) for file in files}}
        provenance = [{"lists": lists, "generator": generator}]
    return {
        "hash": recipe.hash,
        "recipe": recipe.model_dump(exclude={"output_dir"}),
        "data": broadcast_object_list(provenance)[0],
    }


class Generator:
    """A language model that answers requests, each answer beginning with given words.

    The model is loaded when the first answer is needed: a run that has only to be finished does without it.

    Args:
        section: the recipe's `generator`.
        state: of the processes; each has a copy of the model on its device.

    Raises:
        ValueError: model or tokenizer cannot be loaded.
    """

    def __init__(self, section: GeneratorSection, state: PartialState):
        self.section = section
        self.device = state.device
        # As its makers trained it: a model of others may need the begin token that its tokenizer adds.
        self.tokenizer = load_tokenizer(section.model, keep_added=True)
        self._refuse_what_ends_a_prompt()
        if section.quantization == "4bit":
            _refuse_stacked_experts(section.model)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        section, options = self.section, {"trust_remote_code": False}
        dtype = getattr(torch, section.dtype)
        if section.quantization == "4bit":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(
                section.model, dtype=dtype, device_map={"": self.device}, **options
            )
        except UnpicklingError:  # whose advice is to run what is in it
            raise ValueError(
                f"cannot load the generator {section.model!r}: its weights are a pickle of more than tensors"
            ) from None
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"cannot load the generator {section.model!r}: it has to be a folder with a causal language model, or "
                f"the name of one on the Hub that can be reached ({error})"
            ) from error
        end = model.generation_config.eos_token_id
        # In place of the model's own settings, which might hold a penalty or another limit that no recipe shows.
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            max_new_tokens=section.max_new_tokens,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id if end is None else end,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return model.eval()

    def answer(self, prompts: list[str], beginnings: list[str], seed: int) -> list[str | None]:
        """Answers to a batch of requests.

        Args:
            prompts: the requests; the user's turn, if the model knows turns.
            beginnings: the first words of each answer, none empty.
            seed: of the sampling: the same arguments give the same answers.

        Returns:
            Each answer with its beginning, but without the prompt. None where the tokenizer did not give the prompt
            back as it was, so that nobody can say where the answer begins.
        """
        texts = [self._text(*pair) for pair in zip(prompts, beginnings, strict=True)]
        batch = self.tokenizer(
            texts,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
            add_special_tokens=self.tokenizer.chat_template is None,  # a chat template has written them already
        ).to(self.device)
        model = self.model
        torch.manual_seed(seed)
        with torch.inference_mode():
            ids = model.generate(**batch)
        # Decoded as a whole: a tokenizer may drop the space in front of what it takes for the first word.
        asked, whole = (
            self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for rows in (batch["input_ids"], ids)
        )
        return [
            beginning + text[len(prompt) :] if text.startswith(prompt) else None
            for beginning, prompt, text in zip(beginnings, asked, whole, strict=True)
        ]

    def _refuse_what_ends_a_prompt(self) -> None:
        behind = [added for added in added_tokens(self.tokenizer) if added.endswith("behind")]
        if behind and self.tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of the generator {self.section.model!r} adds {behind[0]} each prompt, and no answer "
                "comes after the end: set add_eos_token=false in its tokenizer_config.json (or take that token out of "
                "the post_processor in its tokenizer.json), or take a generator with a chat template"
            )

    def _text(self, prompt: str, beginning: str) -> str:
        if self.tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": beginning}]
            return self.tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
        # A template may end with the opening itself.
        return prompt if prompt.endswith(beginning) else f"{prompt}\n\n{beginning}"


def _refuse_stacked_experts(name: str) -> None:
    """bitsandbytes packs linear layers only, and passes over experts that transformers 5 stacks into one tensor.

    Unsaid, such a model would take several times the memory that 4 bit promises (issue 1849 of bitsandbytes).
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, trust_remote_code=False))
    stacked = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 2)
    total = model.num_parameters()
    if stacked > total / 10:
        raise ValueError(
            f"generator.quantization is 4bit, but {stacked / total:.0%} of the parameters of {name!r} are stacked "
            f"experts, which bitsandbytes leaves as they are: set generator.quantization=none on a GPU that holds its "
            f"{2 * total / 1e9:.1f} GB of bfloat16 weights, or take a generator without experts"
        )


class Desk:
    """Where batches are done: each becomes one file, whole or not at all, and none is done twice.

    Args:
        folder: of the run.
        state: of the processes, which share the batches; all call the same methods.
    """

    def __init__(self, folder: Path, state: PartialState):
        self.folder, self.state = folder, state
        self._clock = folder / "seconds.json"
        earlier = read_sealed(self._clock)
        if earlier is None and self._clock.is_file():
            logger.warning("%s is damaged: the seconds are counted from this start on", self._clock)
        self._started = time.perf_counter() - json.loads(earlier or "0.0")

    def do(self, kind: str, count: int, work: Callable[[int], Iterable[dict]], label: str) -> list[Path]:
        """Do what is missing of batches 0 to `count - 1`, each on process number modulo processes.

        Args:
            kind: names the files: `parts/part-*.jsonl`, `asked/names-*.jsonl`.
            count: how many batches there are.
            work: makes the rows of a batch from its number.
            label: shown beside the progress.

        Returns:
            The files of all batches, in order, when all are there.
        """
        folder = self.folder / ("parts" if kind == "part" else "asked")
        paths = [folder / f"{kind}-{number:08d}.jsonl" for number in range(count)]
        mine = range(self.state.process_index, count, self.state.num_processes)
        missing = [number for number in mine if not self._is_done(paths[number])]
        is_main = self.state.is_main_process
        for number in tqdm(missing, desc=label, unit="batch", disable=not is_main or not missing):
            write_text(paths[number], sealed("".join(_json_line(row) for row in work(number))))
            if is_main:
                write_text(self._clock, sealed(f"{json.dumps(self.seconds)}\n"))
        self.state.wait_for_everyone()
        return paths

    def _is_done(self, path: Path) -> bool:
        if not path.is_file():
            return False
        if read_sealed(path) is not None:
            return True
        logger.warning("%s is damaged: kept as %s, and done again", path, set_aside(path).name)
        return False

    @property
    def seconds(self) -> float:
        """Wall-clock time of the main process, over all starts; of a killed one, up to its last whole batch."""
        return time.perf_counter() - self._started


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _rows(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        text = read_sealed(path)
        if text is None:
            raise ValueError(f"{path} is damaged: start the run again, which does this batch again")
        yield from map(json.loads, filter(None, text.split("\n")))  # a story may hold other ends of lines


def _batch_seed(recipe: Recipe, kind: str, number: int) -> int:
    # 63 bits: neighbouring seeds and batches share nothing.
    return int.from_bytes(hashlib.sha256(f"{recipe.seed} {kind} {number}".encode()).digest()[:8], "big") >> 1


def _given_lists(recipe: Recipe) -> dict[str, list[str]]:
    """The lists that need not be asked for; read at once, so that a mistake in them costs no time."""
    given = [kind for kind in recipe.needed if kind not in recipe.requests]
    if recipe.lists is not None:
        return story_prompts.read_lists(recipe.lists, given)
    return {"features": list(FEATURES.values())} if given else {}


def _gathered_lists(
    recipe: Recipe, given: dict[str, list[str]], generator: Generator, desk: Desk
) -> dict[str, list[str]]:
    """All lists, those asked of the generator among them; kept in `lists.json`, which every process reads."""
    saved, size = recipe.folder / "lists.json", recipe.generator.batch_size
    lists = dict(given)
    for kind, count in recipe.requests.items():
        work = functools.partial(_ask, recipe, generator, kind)
        paths = desk.do(kind, math.ceil(count / size), work, f"lists of {kind}")
        lists[kind] = story_prompts.parse_answers(kind, (row["text"] or "" for row in _rows(paths)))
        if not lists[kind]:
            raise ValueError(
                f"the generator {recipe.generator.model!r} was asked for {kind}, but in none of its {count} answers "
                f"is a numbered list of them (see {recipe.folder / 'asked'}): take a model that follows instructions, "
                f"or give {kind} in a list file (`lists`)"
            )
    if desk.state.is_main_process:
        write_json(saved, {kind: lists[kind] for kind in recipe.needed})
    desk.state.wait_for_everyone()
    return lists


def _ask(recipe: Recipe, generator: Generator, kind: str, number: int) -> list[dict[str, Any]]:
    indices = _indices(number, recipe.requests[kind], recipe.generator.batch_size)
    prompts = [REQUESTS[kind][index % len(REQUESTS[kind])] for index in indices]
    texts = generator.answer(prompts, [FIRST_NUMBER] * len(prompts), _batch_seed(recipe, kind, number))
    return [{"index": index, "text": text} for index, text in zip(indices, texts, strict=True)]


def _tell(recipe: Recipe, lists: dict[str, list[str]], generator: Generator, number: int) -> list[dict[str, Any]]:
    """The rows of one batch of stories, as the model told them."""
    indices = _indices(number, recipe.num_stories, recipe.generator.batch_size)
    drawn = [story_prompts.draw(lists, recipe.seed, index) for index in indices]
    prompts = [story_prompts.fill(recipe.template, about) for about in drawn]
    openings = [about["opening"] for about in drawn]
    texts = generator.answer(prompts, openings, _batch_seed(recipe, "part", number))
    said = [text is not None and text[len(opening) :].strip() for text, opening in zip(texts, openings, strict=True)]
    # A single answer may well be empty; that of a whole batch is a model, or a template, that does not work.
    if len(texts) > 1 and not any(said):
        raise ValueError(
            f"the generator {recipe.generator.model!r} added nothing to any of the {len(texts)} openings of batch "
            f"{number}: check that its chat template and end-of-text token are right, that generator.dtype suits it, "
            "and that the template asks for a story; earlier batches stay where they are"
        )
    return [{"index": index, **about, "text": text} for index, about, text in zip(indices, drawn, texts, strict=True)]


def _indices(number: int, count: int, size: int) -> range:
    return range(number * size, min((number + 1) * size, count))


@dataclass
class Tally:
    """Counts of what was prompted, refused, cut and kept."""

    required: list[str]
    prompted: int = 0
    rejected: Counter = field(default_factory=Counter)
    cut: Counter = field(default_factory=Counter)
    characters: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    openings: set[str] = field(default_factory=set)
    complete: int = 0

    def add(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
        """Count a kept story; `row` has its text, and what was drawn for it."""
        text = row["text"]
        self.characters.append(len(text))
        self.words.append(len(story_filters.words(text)))
        self.tokens.append(len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
        self.openings.add(row["opening"])
        self.names |= {row["name"]} if "name" in row else set()
        self.complete += all(story_filters.contains(text, row[word]) for word in self.required)

    def metrics(self) -> dict[str, Any]:
        """As `result.json` shows them; a share is None where the template requires no word."""
        kept = len(self.characters)
        return {
            "prompted": self.prompted,
            "kept": kept,
            "rejected": dict(sorted(self.rejected.items())),
            "cut_at_marker": dict(sorted(self.cut.items())),
            "characters_mean": statistics.mean(self.characters),
            "words": sum(self.words),
            "words_mean": statistics.mean(self.words),
            "tokens": sum(self.tokens),
            "tokens_mean": statistics.mean(self.tokens),
            "distinct_names": len(self.names),
            "distinct_openings": len(self.openings),
            "share_with_all_required_words": self.complete / kept if self.required else None,
        }


def _finish(
    recipe: Recipe,
    lists: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    paths: list[Path],
    desk: Desk,
    data: dict[str, Any],
) -> dict[str, Any]:
    tally, samples = _filter(recipe, tokenizer, paths)
    if not tally.characters:
        raise ValueError(
            f"none of {tally.prompted} answers is a story ({dict(tally.rejected)}): look at "
            f"{recipe.folder / 'rejected.jsonl'}, and take another generator or template"
        )
    result = {
        **header(recipe),
        "seed": recipe.seed,
        "num_processes": desk.state.num_processes,
        "data": data,
        "generator": {"name": recipe.generator_name, "revision": _revision(recipe.generator.model)},
        "lists": {kind: len(entries) for kind, entries in lists.items()},
        "stories_sha256": checksum(recipe.folder / "stories.jsonl.gz"),
        "seconds": desk.seconds,
        "metrics": tally.metrics(),
        "samples": samples,
    }
    result["claims"] = [claim._asdict() for claim in _claims(result)]
    write_text(recipe.folder / "README.md", card(result))
    return result


def _claims(result: dict[str, Any]) -> list[Claim]:
    metrics = result["metrics"]
    paper = {"kept": 2_200_000, "characters_mean": 888.0}  # its training split
    near = all(abs(metrics[name] / value - 1) <= 0.1 for name, value in paper.items())
    return [
        Claim(
            "A language model that is given names, words and openings tells a corpus of short stories",
            "2.2 M stories of 888 characters, 474,704,907 GPT-2 tokens, from Mixtral 8x7B (Table 2)",
            f"{metrics['kept']:,} stories of {metrics['characters_mean']:.0f} characters, {metrics['tokens']:,} of "
            f"the generator's tokens, from {metrics['prompted']:,} prompts to {result['generator']['name']}",
            "reproduced" if near else "not at this size",
        )
    ]


def _filter(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, paths: list[Path]) -> tuple[Tally, list[str]]:
    """Write `stories.jsonl.gz` and `rejected.jsonl` from all parts; their statistics, and the first stories."""
    duplicates = story_filters.Duplicates(recipe.near_duplicates)
    required = [word for word in ("name", "verb", "noun", "adjective") if LISTS[word] in recipe.needed]
    tally, samples = Tally(required), []
    with (
        staged_file(recipe.folder / "stories.jsonl.gz") as kept_path,
        staged_file(recipe.folder / "rejected.jsonl") as rejected_path,
        # No name and no time in the compressed file: the same stories are the same bytes.
        kept_path.open("wb") as compressed,
        gzip.GzipFile(filename="", mode="wb", fileobj=compressed, mtime=0) as kept,
        rejected_path.open("w", encoding="utf-8") as rejected,
    ):
        for row in tqdm(_rows(paths), total=recipe.num_stories, desc="filters", unit="story"):
            tally.prompted += 1
            text, reason, detail, marker = _judge(row, duplicates)
            tally.cut.update([marker] if marker else [])
            if reason is not None:
                tally.rejected[reason] += 1
                rejected.write(_json_line({"reason": reason, "detail": detail, **row}))
                continue
            story = {"text": text, **{key: value for key, value in row.items() if key != "text"}}
            tally.add(story, tokenizer)
            kept.write(_json_line(story).encode())
            if len(samples) < NUM_SAMPLES:
                samples.append(text)
    return tally, samples


def _judge(row: dict[str, Any], duplicates: story_filters.Duplicates) -> story_filters.Story:
    if row["text"] is None:
        return story_filters.Story("", "undecodable")
    story = story_filters.clean(row["text"], row["opening"])
    if story.reason is None:
        found = duplicates.find(story.text, row["index"])
        if found is not None:
            return story._replace(reason=found[0], detail=f"of story {found[1]}")
    return story


def _revision(model: str) -> str | None:
    return getattr(AutoConfig.from_pretrained(model, trust_remote_code=False), "_commit_hash", None)


def card(result: dict[str, Any], published: dict[str, Any] | None = None) -> str:
    """The data set's card, in Markdown; every number in it is one of the result.

    Args:
        result: content of the run's `result.json`.
        published: the `repo_id` and `revision` where a reader finds it, and the sha256 of its `files`; nowhere yet by
            default.

    Raises:
        ValueError: its metadata are not valid.
    """
    data = DatasetCardData(
        language="en",
        license=result["recipe"]["license"],
        task_categories=["text-generation"],
        size_categories=size_category(result["metrics"]["kept"]),
        tags=["synthetic", "stories", "babistories", "memory-mosaics", "arxiv:2405.06394"],
        pretty_name=result["name"],
        configs=STORIES,
    )
    values = {"result": result, "metrics": result["metrics"], "recipe": result["recipe"]}
    return str(DatasetCard(render("dataset_card.md.jinja", metadata=data.to_yaml(), published=published, **values)))


def size_category(num_rows: int) -> str:
    """The Hub's name for a size, such as `1K<n<10K`."""
    bounds = [(10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M"), (10**8, "100M")]
    lower = "n"
    for bound, name in bounds:
        if num_rows < bound:
            return f"n<{name}" if lower == "n" else f"{lower}<n<{name}"
        lower = name
    return f"n>{lower}"


def summary(result: dict[str, Any], folder: Path) -> str:
    """The end of a run in words: sample stories, how many were kept, and where everything is."""
    metrics = result["metrics"]
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in metrics["rejected"].items()) or "none"
    lines = [f"{sample}\n" for sample in result["samples"]]
    lines += [
        f"{result['generator']['name']}: {metrics['kept']:,} stories of {metrics['prompted']:,} prompts "
        f"(rejected: {rejected}), {metrics['tokens']:,} tokens, {metrics['characters_mean']:.0f} characters a story, "
        f"in {result['seconds']:,.0f} s",
        f"stories.jsonl.gz, rejected.jsonl, README.md and result.json are in {folder}",
    ]
    return "\n".join(lines)
