# SPDX-License-Identifier: Apache-2.0
"""Trials of a published folder: it is loaded and used in clean, offline processes, isolated from this clone.

These functions run code of the folder; `check_loss` alone measures in this process, with this clone's code. Only a
folder that `training.publishing.checks` has found in order comes here.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel

from modeling_memory_mosaic import MosaicMemory
from training.evaluate import load_causal_lm, load_model, mean_loss
from training.export import run_isolated, verify_export
from training.files import checksum_of_text
from training.memories import load_memory, measure_recall, stored_texts
from training.progress import progress
from training.publishing.folder import folder_type
from training.publishing.memory_checks import Recall, read_result
from training.publishing.vector_checks import read_result as read_vectors
from training.publishing.vector_checks import read_table
from training.recipe import SourceSection, WindowsSection
from training.secrecy import masked
from training.text.sources import EMBEDDED, load_stories, source_provenance
from training.text.story_selection import STORIES_FILE
from training.text.windows import pack_windows, some_windows
from training.vectors import FILE as VECTORS_FILE
from training.vectors import MOST_GIVEN, measure_given_back


# By task, the loss that is measured again.
LOSSES = {"language_modeling": "validation_loss", "fine_tuning": "validation_loss", "memory_model": "causal_loss"}
# In nats: other hardware adds in another order.
LOSS_TOLERANCE = 0.005
# What a result from elsewhere may ask for, so that it takes minutes at most.
MOST_STORIES, MOST_CONTEXT = 10_000, 8192
_BATCH_SIZE = 16
# Of the share of tokens that is given back: other hardware adds in another order.
GIVEN_TOLERANCE = 0.005
# Tokens of a memory that are read again, so that it takes minutes at most.
MOST_READ = 100_000
# By the precision of a stored memory, the part of its largest number by which rounding, and other hardware, may change
# a number.
ROUNDING = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 0.01, "int8": 0.02, "fp8": 0.08}


def check_lint(folder: Path) -> str:
    """Check that `transformers-mlinter`, the linter of transformers' own models, finds nothing."""
    command = [sys.executable, "-m", "mlinter", "--no-cache", "--no-progress", str(folder.resolve())]
    process = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if process.returncode != 0:
        raise ValueError(f"transformers-mlinter:\n{process.stdout.strip()}{process.stderr.strip()}")
    return "transformers-mlinter finds no fault"


def check_loads(
    folder: Path, prompts: list[str], base: Path | None = None, model: PreTrainedModel | None = None
) -> str:
    """Check that a clean, offline process loads the folder and computes the logits of a local model, bit for bit.

    Args:
        folder: of a model, or of an adapter of PEFT.
        prompts: texts that the process continues.
        base: of an adapter, the folder of the model that it changes.
        model: the local model; by default the folder, loaded with this clone's code.

    Raises:
        RuntimeError: the process fails, or its logits differ.
    """
    if model is None:
        model = load_causal_lm(base or folder)
        model = model if base is None else cast(PreTrainedModel, PeftModel.from_pretrained(model, folder))
    adapter = None if base is None else folder
    verify_export(base or folder, prompts, max_new_tokens=16, model=model, adapter=adapter)
    return "loads in a clean offline process, with equal logits"


def _measure_loss(name: str, model: Any, windows: Any) -> float:
    if name != "causal_loss":
        return mean_loss(model, windows, _BATCH_SIZE)
    from training.tasks.memory_model import measure  # only here: it imports more libraries than other trials need

    return measure(model, windows, _BATCH_SIZE)[name]


def check_loss(result: dict[str, Any], load: Callable[[], tuple[Any, Any]], is_local: bool = True) -> str:
    """Measure the loss that a result states again, if the data are at hand.

    Args:
        result: content of `result.json`.
        load: returns the model and its tokenizer.
        is_local: whether the run is of this machine, so that its data can be read where it read them. A result from
            elsewhere may only ask for some stories of the embedded writer: it must not make this machine read a file,
            or work for hours.

    Returns:
        A line that says what was measured, or why nothing was.

    Raises:
        ValueError: the loss differs by more than `LOSS_TOLERANCE`, or is no number.
    """
    not_checked = "not checked: the loss that result.json states"
    try:
        data = result["recipe"]["data"]
        source, context_length = SourceSection.model_validate(data["validation"]), data["context_length"]
        limits = WindowsSection.model_validate(data.get("num_windows") or {})
        name = LOSSES[result["task"]]
        stated = result["metrics"][name]
        is_small = (source.num_stories or 0) <= MOST_STORIES and 2 <= context_length <= MOST_CONTEXT
    except (KeyError, TypeError, ValidationError):
        return f"{not_checked}, as it states none on a text"
    if not is_local and not (source.source == EMBEDDED and is_small):
        return f"{not_checked}, as the data are not here"
    try:
        if is_local and source_provenance(**source.model_dump()) != result["data"]["validation"]:
            return f"{not_checked}, as the data have changed since"
        stories = load_stories(**source.model_dump())
    except (ValueError, OSError) as error:
        return f"{not_checked}, as the data are not at hand ({masked(error)})"
    model, tokenizer = load()
    windows = some_windows(pack_windows(stories, tokenizer, context_length), limits.validation)
    measured = _measure_loss(name, model, windows)
    if not isinstance(stated, float) or not abs(measured - stated) <= LOSS_TOLERANCE:
        raise ValueError(f"`{name}` in result.json is {stated!r}, but measured again it is {measured:.4f}")
    return f"ok: {name} measured again is {measured:.4f}, stated {stated:.4f} (within {LOSS_TOLERANCE} nats)"


def _fill_hub_cache(home: Path, repositories: dict[tuple[str, str], Path]) -> None:
    """Copy folders to where `huggingface_hub` keeps its downloads."""
    for (repo_id, commit), folder in repositories.items():
        kind = "datasets" if folder_type(folder) in ("dataset", "vectors") else "models"
        repository = home / "hub" / f"{kind}--{repo_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit, encoding="utf-8")
        shutil.copytree(folder, repository / "snapshots" / commit)


def check_snippets(card: str, repositories: dict[tuple[str, str], Path]) -> str:
    """Check that every Python block of a card runs as it stands, in one clean offline process.

    Args:
        card: the text of the card.
        repositories: by repository and pinned commit, the folders that a reader would have downloaded.
    """
    blocks = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    run_each = "for n, block in enumerate(json.load(sys.stdin)): exec(compile(block, f'snippet {n}', 'exec'), {})"
    process = run_isolated(
        ["-c", f"import json, sys\n{run_each}"], json.dumps(blocks), lambda home: _fill_hub_cache(home, repositories)
    )
    if process.returncode != 0:
        numbers = re.findall(r"snippet (\d+)", process.stderr)  # a killed process has printed no traceback
        failed = blocks[int(numbers[-1])] if numbers else f"one of {len(blocks)}, exit status {process.returncode}\n"
        raise ValueError(f"this snippet of the card fails:\n\n{failed}\n{process.stderr.strip()}")
    return f"{len(blocks)} snippets of the card run"


def check_stories(folder: Path, num_stories: int | None) -> str:
    """Check that a clean, offline process loads a data set by its card, with all its stories.

    Args:
        folder: of the data set.
        num_stories: the number that its result states.
    """
    # Counted first by our reader, which stops at a file that unpacks to too much. The library would unpack all of it.
    counted = sum(1 for _ in load_stories(str(folder / STORIES_FILE), streaming=True))
    load = f"load_dataset({str(folder.resolve())!r}, split='train')"
    process = run_isolated(["-c", f"from datasets import load_dataset\nprint(len({load}['text']))"])
    if process.returncode != 0:
        raise ValueError(f"{folder} does not load as a data set:\n{process.stderr.strip()}")
    loaded = int(process.stdout.split()[-1])
    if loaded != num_stories or loaded != counted:
        raise ValueError(f"{folder} loads with {loaded} stories, but its result says {num_stories}")
    return f"loads in a clean offline process, with {loaded:,} stories"


def _most_difference(memory: MosaicMemory, precision: str) -> float:
    """Return by how much a number of a stored memory may differ from that of its text, read again."""
    # Of weights in half precision, each number is a sum of rounded ones.
    share = max(ROUNDING[precision], 0.05 if memory.dtype.itemsize < 4 else 0.0)
    return share * max(float(part.abs().max()) for part in (*memory.keys, *memory.values))


def _check_recall(memory: MosaicMemory, model: PreTrainedModel, stated: Recall | None) -> str:
    """Measure again how well a memory gives its texts back; `ValueError` if that differs from what is stated."""
    if stated is None:
        return "not checked: the loss on its texts, as result.json states none"
    measured = (measure_recall(memory, model) or {"loss": {}})["loss"]
    is_same = measured.keys() == stated.loss.keys()
    if not is_same or not all(abs(measured[way] - loss) <= LOSS_TOLERANCE for way, loss in stated.loss.items()):
        raise ValueError(f"`recall` in result.json is {stated.loss}, but measured again it is {measured}")
    return f"the loss on its texts, measured again, is {measured['behind']:.4f} (within {LOSS_TOLERANCE} nats)"


def check_memory(folder: Path, base: Path) -> list[str]:
    """Check that a memory is what its base reads in the texts that it holds.

    Texts of which a part is forgotten or merged cannot be compared, nor those beyond `MOST_READ` tokens.

    Args:
        folder: of the memory.
        base: of the model.

    Returns:
        A line for each trial; one that begins with `not checked` has compared nothing.

    Raises:
        ValueError: the base has other weights than those that wrote the memory, or reads something else.
    """
    model, tokenizer = load_model(base)
    result = read_result(folder)
    memory = load_memory(str(folder), model)  # raises if other weights wrote it
    texts, chosen, read, incomplete = stored_texts(folder, tokenizer), [], 0, memory.incomplete_sources()
    lengths = memory.source_ids.bincount(minlength=len(memory.sources)).tolist()
    for name, length in zip(memory.sources, lengths, strict=True):
        if name not in incomplete and read + length <= MOST_READ:
            chosen.append(name)
            read += length
    differences: dict[str, float] = {}
    for name in progress(chosen, "texts read again", "text"):
        differences |= memory.verify(model, sources=[name])
    count, most = len(memory.sources), _most_difference(memory, result.memory.precision)
    if differences and not max(differences.values()) <= most:
        name = max(differences, key=differences.__getitem__)
        raise ValueError(
            f"the pairs of {name!r} differ by {differences[name]:.2g} from those that {base} reads in its tokens, "
            f"more than by rounding ({most:.2g}): memorize it again"
        )
    again = f"{len(differences)} of {count} texts, read again by the base"
    line = f"{again}: a number differs by at most {max(differences.values()):.1e}" if differences else None
    same = sum(checksum_of_text(texts[name]) == digest for name, digest in result.data.read.files.items())
    return [
        line or f"not checked: the pairs, as no text of at most {MOST_READ:,} tokens is whole and not merged",
        f"{same} of {count} texts, put back from their tokens, have the sha256 that result.json states"
        if same
        else "not checked: the sha256 of the texts, which their tokens do not give back",
        _check_recall(memory, model, result.recall),
    ]


def check_vectors(folder: Path, base: Path) -> list[str]:
    """Check that vectors are what their base writes of the texts beside them, and that the base tells as much of them.

    A chunk whose text has other tokens by itself, because it begins or ends within a word, cannot be compared.

    Args:
        folder: of the data set.
        base: of the model.

    Raises:
        ValueError: the base has other weights than those that wrote the vectors, writes others, or tells other texts.
    """
    loaded: Any
    loaded, tokenizer = load_model(base)
    model, result, rows = loaded.eval(), read_vectors(folder), read_table(folder / VECTORS_FILE)[:MOST_GIVEN]
    single = [row | {"source": str(number), "chunk": 0} for number, row in enumerate(rows)]
    stored = model.memories_from_rows(single)["memories"]  # raises if another encoder wrote them
    most = ROUNDING[result.vectors.precision] * float(stored.abs().max())
    compared, largest = 0, 0.0
    for row, vectors in zip(progress(rows, "chunks encoded again", "chunk"), stored, strict=True):
        ids = tokenizer(row["text"], return_tensors="pt", split_special_tokens=True)["input_ids"]
        if ids.shape[1] != model.config.chunk_length:
            continue
        with torch.no_grad():
            again = model.encoder(ids).memories[0]
        difference = float((again - vectors).abs().max())
        # The same number of tokens need not be the same tokens: other words at its borders.
        if difference <= most:
            compared, largest = compared + 1, max(largest, difference)
    if not compared:
        raise ValueError(f"{base} writes other vectors of the texts of {folder}: encode them again")
    given = measure_given_back(model, tokenizer, rows)
    if abs(given - result.vectors.given_back) > GIVEN_TOLERANCE:
        raise ValueError(
            f"`given_back` in result.json is {result.vectors.given_back}, but measured again it is {given}"
        )
    return [
        f"{compared} of {len(rows)} chunks, encoded again by the base, differ by at most {largest:.1e}",
        f"the share of tokens that is given back, measured again, is {given:.4f} (within {GIVEN_TOLERANCE})",
    ]


def check_space(folder: Path) -> str:
    """Check that a clean, offline process runs all tabs of a Space, by the code in it, with its model."""
    code = f"import sys\nsys.path.insert(0, {str(folder.resolve())!r})\nimport app, memories, texts, vectors\n" + (
        f"parts = app.load({str(folder.resolve() / 'model')!r})\n"
        "if parts[0].config.model_type == 'memory_model':\n"
        "    vectors.read(*parts, vectors.EXAMPLES[0] * 99)\n"
        "else:\n"
        "    texts.write(*parts, 'Once upon a time', 4, 0.0, 0)\n"
        "    documents = 'Once upon a time', 'There was a cat', ''\n"
        "    memories.answer_all(*parts, None, memories.NAMES, documents, (True, False, True), 'Once upon')\n"
        "print(sys.modules['modeling_memory_mosaic'].__file__)"
    )
    process = run_isolated(["-c", code])
    if process.returncode != 0:
        raise ValueError(f"{folder} does not run as a Space:\n{process.stderr.strip()}")
    # An installed package would be found as well, and hide that the Space's own copy does not work.
    if not process.stdout.strip().endswith(str(folder.resolve() / "modeling_memory_mosaic" / "__init__.py")):
        raise ValueError(f"{folder} runs other code than its own: {process.stdout.strip()}")
    return "runs as a Space in a clean offline process, by the code in it"
