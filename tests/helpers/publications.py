# SPDX-License-Identifier: Apache-2.0
"""Short runs that can be published, what their cards say, and changes to their files."""

import gzip
import json
from pathlib import Path
from typing import Any

import yaml

from training import memories
from training.files import CHECKSUMS, checksums_of, checksums_text, read_checksums
from training.paths import CONFIGURATION, RESULTS
from training.publishing import publish
from training.publishing.artifacts import Publication
from training.recipe import BaseRecipe, load_recipe
from training.result import write_result


SHORT = {
    "data": {"train": {"num_stories": 40}, "validation": {"num_stories": 4}},
    "tokens": 4_096,
    "training": {"eval_steps": 2, "save_steps": 2, "disable_tqdm": True},
    "generation": {"prompts": ["Once upon a time"], "max_new_tokens": 8},
}
ABOUT_SMOKE = {
    "title": "A smoke test",
    "license": "apache-2.0",
    "language": "en",
    "purpose": "To be published by tests.",
    "data": {"datasets": [], "sources": ["embedded"], "license": "apache-2.0", "origin": "Written by a grammar."},
    "limits": "It knows nothing.",
}
COMMIT = "a" * 40


def smoke(folder: Path) -> BaseRecipe:
    """A recipe that trains a small Memory Mosaic in seconds."""
    return load_recipe(CONFIGURATION / "recipe" / "smoke.yaml", settings=[SHORT, {"output_dir": str(folder)}])


def smoke_v2(folder: Path) -> BaseRecipe:
    """A recipe that trains a small Memory Mosaic v2 in seconds."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    sizes |= {"intermediate_size": 48, "short_term_window": 8, "long_term_delay": 4}
    sizes |= {"long_term_delay_range": [4, 8]}
    settings = {"name": "smoke_v2", "model": "mosaic-v2-micro", "model_args": sizes}
    recipe = CONFIGURATION / "recipe" / "smoke.yaml"
    return load_recipe(recipe, settings=[SHORT, settings, {"output_dir": str(folder)}])


def lora(folder: Path, base: Path) -> BaseRecipe:
    """A recipe that adapts an exported model by LoRA in seconds."""
    settings = {
        "name": "lora",
        "model": str(base),
        "base": None,
        "data": {"context_length": 64, "train": {"source": "embedded"}, "validation": {"source": "embedded"}},
        "training": {"learning_rate": 0.01, "logging_steps": 1, "eval_strategy": "steps"},
    }
    recipe = CONFIGURATION / "recipe" / "shakespeare_lora.yaml"
    return load_recipe(recipe, settings=[settings, SHORT, {"output_dir": str(folder)}])


def stories_run(folder: Path, license: str = "cc-by-4.0") -> Path:
    """The folder of a run that has made a data set of two stories."""
    result = json.loads((RESULTS / "babistories_micro" / "result.json").read_text(encoding="utf-8"))
    result["metrics"]["kept"], result["recipe"]["license"] = 2, license
    folder.mkdir()
    rows = [json.dumps({"text": text, "index": index}) for index, text in enumerate(("One day.", "In a house."))]
    (folder / "stories.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    write_result(result, folder, ["stories.jsonl.gz"])
    return folder


def memorize(folder: Path, model: Path, dtype: str | None = None, **texts: str) -> Path:
    """Let a model read texts, which lie beside a folder as files of their names, and write them into the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    paths = [folder.with_name(f"{name}.txt") for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_bytes(text.encode())
    memories.memorize_files(model, paths, folder, dtype)
    return folder


def about_memory(folder: Path) -> Path:
    """Write what no result knows of a memory into a file beside it."""
    read = json.loads((folder / "result.json").read_text(encoding="utf-8"))["data"]["read"]["files"]
    path = folder.with_name(f"{folder.name}.yaml")
    data = ABOUT_SMOKE["data"] | {"sources": list(read.values()), "license": "public domain"}
    path.write_text(yaml.safe_dump(ABOUT_SMOKE | {"data": data}), encoding="utf-8")
    return path


def stage_memory(folder: Path, **options: Any) -> Path:
    about = options.pop("about", None) or about_memory(folder)
    return stage(folder, "someone/texts", "memory", about, f"someone/smoke@{COMMIT}", **options)


def prepare(run: Path, about: Path | None, repo_id: str = "someone/smoke", **options: Any) -> Publication:
    return publish.prepare(run, repo_id, about=about, **options)


def stage(run: Path, repo_id: str, *arguments: Any, lines: list[str] | None = None, **options: Any) -> Path:
    """Publish without an upload; what is logged goes to `lines`."""
    log = (lambda line: None) if lines is None else lines.append
    return publish.publish(run, repo_id, *arguments, dry_run=True, log=log, **options)


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Change values of a JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put(folder: Path, name: str, content: Any) -> None:
    """Write a text, or anything else as JSON."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def list_again(run: Path) -> None:
    """Write the checksums of a run whose files have been changed, as if nothing were wrong."""
    (run / CHECKSUMS).write_text(checksums_text(checksums_of(run, [*read_checksums(run), "model"])), encoding="utf-8")
