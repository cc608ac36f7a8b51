# SPDX-License-Identifier: Apache-2.0
"""That a published folder works: tried in clean, offline processes, isolated from this clone.

Only what `training.publishing.checks` has found to be in order comes here: from here on, code of the folder is run.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel

from training.evaluate import load_causal_lm, mean_loss
from training.export import run_isolated, verify_export
from training.recipe import SourceSection
from training.secrecy import masked
from training.text.sources import EMBEDDED, load_stories, source_provenance
from training.text.windows import pack_windows


# By task, the measure that is computed again, and how far it may be from what was stated, in nats: other hardware sums
# in another order.
LOSSES = {"language_modeling": "validation_loss", "fine_tuning": "validation_loss", "memory_model": "causal_loss"}
LOSS_TOLERANCE = 0.005
# Of another's result.
MOST_STORIES, MOST_CONTEXT = 10_000, 8192


def check_lint(folder: Path) -> str:
    """`transformers-mlinter`, the linter of transformers' own models, finds nothing."""
    command = [sys.executable, "-m", "mlinter", "--no-cache", "--no-progress", str(folder.resolve())]
    process = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if process.returncode != 0:
        raise ValueError(f"transformers-mlinter:\n{process.stdout.strip()}{process.stderr.strip()}")
    return "transformers-mlinter is content"


def check_loads(
    folder: Path, prompts: list[str], base: Path | None = None, model: PreTrainedModel | None = None
) -> str:
    """A clean, offline process loads the folder and computes the very logits of a model here, bit for bit.

    Args:
        folder: a model's, or an adapter's of PEFT.
        prompts: are continued there.
        base: of an adapter, the folder of the model that it goes on top of.
        model: here; by default the folder, loaded with this clone's code.
    """
    if model is None:
        model = load_causal_lm(folder) if base is None else PeftModel.from_pretrained(load_causal_lm(base), folder)
    adapter = None if base is None else folder
    verify_export(base or folder, prompts, max_new_tokens=16, model=model, adapter=adapter)
    return "loads in a clean offline process, with equal logits"


def check_loss(result: dict[str, Any], load: Callable[[], tuple[Any, Any]], own: bool = True) -> str:
    """Measure the loss that a result states again, if the data are at hand; returns a line that says what was done.

    Args:
        result: content of `result.json`.
        load: gives the model and its tokenizer.
        own: whether it is a run of this machine, whose files can be read where it read them. Of another's, stories of
            the embedded writer alone are at hand, and no more of them than take some minutes.

    Raises:
        ValueError: the loss is another by more than `LOSS_TOLERANCE`, or none.
    """
    not_checked = "not checked: the loss that result.json states"
    try:
        data = result["recipe"]["data"]
        source, context_length = SourceSection.model_validate(data["validation"]), data["context_length"]
        name = LOSSES[result["task"]]
        stated = result["metrics"][name]
        is_small = (source.num_stories or 0) <= MOST_STORIES and 2 <= context_length <= MOST_CONTEXT
    except (KeyError, TypeError, ValidationError):
        return f"{not_checked}, as it states none on a text"
    if not own and not (source.source == EMBEDDED and is_small):
        return f"{not_checked}, as the data are not here"
    try:
        if own and source_provenance(**source.model_dump()) != result["data"]["validation"]:
            return f"{not_checked}, as the data have changed since"
        stories = load_stories(**source.model_dump())
    except (ValueError, OSError) as error:
        return f"{not_checked}, as the data are not at hand ({masked(error)})"
    model, tokenizer = load()
    windows = pack_windows(stories, tokenizer, context_length)
    if name == "causal_loss":
        from training.tasks.memory_model import measure  # only here, for it takes libraries of its own

        found = measure(model, windows, 16)[name]
    else:
        found = mean_loss(model, windows, 16)
    if not isinstance(stated, float) or not abs(found - stated) <= LOSS_TOLERANCE:
        raise ValueError(f"`{name}` in result.json is {stated!r}, but measured again it is {found:.4f}")
    return f"ok: {name} measured again is {found:.4f}, stated {stated:.4f} (within {LOSS_TOLERANCE} nats)"


def check_snippets(card: str, repositories: dict[tuple[str, str], Path]) -> str:
    """Every Python block of a card runs, as it stands, in a clean offline process.

    Args:
        card: its text.
        repositories: by id and pinned commit, the folders that a reader would have downloaded.
    """
    blocks = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    each = "for n, block in enumerate(json.load(sys.stdin)): exec(compile(block, f'snippet {n}', 'exec'), {})"
    process = run_isolated(
        ["-c", f"import json, sys\n{each}"], json.dumps(blocks), lambda home: _put_into_cache(home, repositories)
    )
    if process.returncode != 0:
        named = re.findall(r"snippet (\d+)", process.stderr)  # in the traceback, if there was time for one
        failed = blocks[int(named[-1])] if named else f"one of {len(blocks)}, exit status {process.returncode}\n"
        raise ValueError(f"this snippet of the card fails:\n\n{failed}\n{process.stderr.strip()}")
    return f"{len(blocks)} snippets of the card run"


def _put_into_cache(home: Path, repositories: dict[tuple[str, str], Path]) -> None:
    """Lay folders out as `huggingface_hub` keeps what it has downloaded."""
    for (repo_id, commit), folder in repositories.items():
        repository = home / "hub" / f"models--{repo_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit, encoding="utf-8")
        shutil.copytree(folder, repository / "snapshots" / commit)


def check_stories(folder: Path, num_stories: int) -> str:
    """A clean, offline process loads a data set by its card, with all its stories."""
    load = f"load_dataset({str(folder.resolve())!r}, split='train')"
    # Within bounds, before a library unpacks all of it.
    stories = sum(1 for _ in load_stories(str(folder / "stories.jsonl.gz"), streaming=True))
    code = f"from datasets import load_dataset\nprint(len({load}['text']))"
    process = run_isolated(["-c", code])
    if process.returncode != 0:
        raise ValueError(f"{folder} does not load as a data set:\n{process.stderr.strip()}")
    found = int(process.stdout.split()[-1])
    if found != num_stories or stories != found:
        raise ValueError(f"{folder} loads with {found} stories, but its result says {num_stories}")
    return f"loads in a clean offline process, with {found:,} stories"


def check_space(folder: Path) -> str:
    """A clean, offline process loads a Space's model through the code beside it, and traces a text."""
    code = f"import sys\nsys.path.insert(0, {str(folder.resolve())!r})\nimport app\n" + (
        f"app.write(*app.load({str(folder.resolve() / 'model')!r}), 'Once upon a time', 4, 0.0, 0)\n"
        "print(sys.modules['modeling_memory_mosaic'].__file__)"
    )
    process = run_isolated(["-c", code])
    if process.returncode != 0:
        raise ValueError(f"{folder} does not run as a Space:\n{process.stderr.strip()}")
    if not process.stdout.strip().endswith(str(folder.resolve() / "modeling_memory_mosaic" / "__init__.py")):
        raise ValueError(f"{folder} runs other code than what lies in it: {process.stdout.strip()}")
    return "runs as a Space in a clean offline process, by the code in it"
