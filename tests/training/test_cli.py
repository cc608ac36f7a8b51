# SPDX-License-Identifier: Apache-2.0
"""The command line: its surface is frozen, it starts fast, it speaks plainly, and it runs on several processes."""

import json

import pytest
import torch
import typer
from helpers.processes import call, launch
from safetensors.torch import load_file
from typer.testing import CliRunner

from training.__main__ import app
from training.paths import CONFIGURATION


CLONE = CONFIGURATION.parent
SMOKE = str(CONFIGURATION / "recipe" / "smoke.yaml")
SHORT = [
    "data.train.num_stories=40",
    "data.validation.num_stories=4",
    "tokens=6_144",
    "training.eval_steps=100",
    "training.save_steps=2",
    "training.disable_tqdm=true",
]
SURFACE = {
    "run": {"recipe", "overrides", "--restart"},
    "dry-run": {"recipe", "overrides", "--teraflops", "--utilisation", "--devices", "--layout"},
    "evaluate": {
        "folder",
        "--source",
        "--split",
        "--text-field",
        "--separator",
        "--num-stories",
        "--context-length",
        "--batch-size",
    },
    "generate": {"folder", "prompts", "--prompt", "--max-new-tokens", "--temperature", "--top-p", "--seed"},
    "chat": {"folder", "--max-new-tokens", "--temperature", "--seed"},
    "inspect": {"folder", "text"},
    "memorize": {"folder", "files", "--output", "--dtype"},
    "ask": {
        "folder",
        "question",
        "--memory",
        "--max-new-tokens",
        "--temperature",
        "--bandwidth",
        "--seed",
    },
    "forget": {"folder", "--memory", "--source"},
    "info": {"memory"},
    "convert": {"checkpoint", "output"},
    "publish": {
        "run",
        "--repo-id",
        "--what",
        "--base",
        "--about",
        "--init",
        "--public",
        "--create-pr",
        "--dry-run",
        "--verify-only",
        "--revision",
    },
}


def test_surface_is_frozen():
    group = typer.main.get_command(app)
    surface = {
        name: {option for parameter in command.params for option in parameter.opts} - {"--help"}
        for name, command in group.commands.items()
    }
    assert surface == SURFACE
    assert {option for parameter in group.params for option in parameter.opts} == {"--debug"}


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'datasets', 'pydantic', 'omegaconf', 'matplotlib'}"
    process = call("-c", f"import sys, training.__main__; print({heavy} & set(sys.modules))")
    assert process.stdout.strip() == "set()", process.stdout + process.stderr


@pytest.mark.parametrize("verb", [[], *([verb] for verb in SURFACE)], ids=lambda verb: verb[0] if verb else "all")
def test_help_of_every_verb(verb):
    assert CliRunner().invoke(app, [*verb, "--help"]).exit_code == 0


def test_dry_run_prints_the_plan():
    result = CliRunner().invoke(app, ["dry-run", SMOKE, "model=gpt2-smoke", "tokens=10_241"])
    assert result.exit_code == 0
    for line in ("model: gpt2-smoke", "parameters: 43,904", "tokens_per_step: 1,024", "steps: 11", "tokens: 11,264"):
        assert line in result.stdout.splitlines()


def test_epochs_are_not_counted_without_the_data():
    result = CliRunner().invoke(app, ["dry-run", SMOKE, "tokens=null", "training.num_train_epochs=2"])
    assert "steps: as many as 2 epochs of the data make" in result.stdout


def test_mistake_is_one_message_and_a_traceback_on_request():
    result = CliRunner().invoke(app, ["run", SMOKE, "training.learning_rat=1"])
    assert result.exit_code == 1
    assert "unknown key 'training.learning_rat' (nearest valid name: 'training.learning_rate')" in result.stderr
    result = CliRunner().invoke(app, ["--debug", "run", SMOKE, "training.learning_rat=1"])
    assert isinstance(result.exception, ValueError)


def test_life_of_a_run_from_the_command_line(tmp_path):
    run = tmp_path / "run"
    prompts = "generation.prompts=[Once upon a time]"
    process = call("-m", "training", "run", SMOKE, *SHORT, f"output_dir={run}", prompts, "generation.max_new_tokens=4")
    assert process.returncode == 0, process.stderr
    assert "Once upon a time" in process.stdout and "validation loss" in process.stdout
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))

    source = ["--source", "embedded", "--num-stories", "4"]
    evaluation = CliRunner().invoke(app, ["evaluate", str(run / "model"), *source])
    assert json.loads(evaluation.stdout)["loss"] == pytest.approx(result["metrics"]["validation_loss"], rel=1e-5)
    assert json.loads(evaluation.stdout)["num_stories"] == 4
    options = ["Once", "--prompt", "A cat", "--max-new-tokens", "3", "--temperature", "0"]
    texts = CliRunner().invoke(app, ["generate", str(run / "checkpoint-6"), *options]).stdout
    assert "Once" in texts and "A cat" in texts
    assert CliRunner().invoke(app, ["generate", str(run), *options]).stdout == texts  # the folder of the run


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "smok"], "there is no recipe 'smok' (nearest valid name: 'smoke')"),
        (["dry-run", "../demo"], "there is no recipe '../demo' (nearest valid name: 'demo')"),
        (["generate", "absent", "Once"], "'absent' is no folder"),
        (["evaluate", "tests", "--source", "embedded"], "'tests' has no config.json"),
        (["chat", "tests"], "name an exported folder, a checkpoint, or that of a finished run"),
        (["generate", "tests"], "give a beginning to continue"),
        (["generate", "tests", "Once", "--top-p", "0"], "--top-p 0 leaves no token to choose"),
        (["generate", "tests", "Once", "--top-p", "1.5"], "--top-p"),
        (["generate", "tests", "Once", "--temperature", "-1"], "--temperature"),
        (["ask", "tests", "Who?", "--memory", "x", "--temperature", "-1"], "--temperature"),
    ],
)
def test_a_mistake_shows_before_anything_heavy_is_imported(command, message):
    script = f"import sys\nfrom training.__main__ import app\ntry:\n    app({command!r})\nexcept SystemExit as end:\n"
    script += "    code = end.code\nassert code and 'torch' not in sys.modules"
    process = call("-c", script)
    assert process.returncode == 0, process.stderr
    # Words of a message in a box may be split over lines.
    assert message in process.stderr


def run_on_one_and_on_several(configuration, tmp_path, processes, batches=None):
    """As many windows in a step on one process and on several: the same training, up to rounding."""
    shared = ["run", SMOKE, *SHORT, "generation.prompts=[]", "training.save_total_limit=9"]
    shared += ["data.validation.num_stories=5"]  # 19 windows, which no number of processes shares evenly
    one = CliRunner().invoke(app, [*shared, f"output_dir={tmp_path / 'one'}"])
    assert one.exit_code == 0, one.output
    batch = f"training.per_device_train_batch_size={16 // (batches or processes)}"
    command = [*shared, batch, f"output_dir={tmp_path / 'several'}"]
    several = launch(configuration, *command, processes=processes)
    assert several.returncode == 0, several.stderr
    assert several.stdout.count("validation loss") == 1
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "several"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)
    results = [
        json.loads((tmp_path / name / "result.json").read_text(encoding="utf-8")) for name in ("one", "several")
    ]
    losses = [result["metrics"]["validation_loss"] for result in results]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # each window counts once, wherever it was read
    return command, second


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("training.tasks.language_modeling.verify_export", lambda folder, prompts, **options: prompts)
    run_on_one_and_on_several("ddp", tmp_path, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("configuration", "processes", "batches"), [("cpu", 1, 1), ("ddp", 2, 2), ("fsdp2", 2, 2), ("cp", 2, 1)]
)
def test_launched_run_resumes_bitwise(configuration, processes, batches, tmp_path):
    """Two processes that share each text have one batch."""
    command, weights = run_on_one_and_on_several(configuration, tmp_path, processes, batches)
    for path in ("checkpoint-6/model.safetensors", "result.json"):  # the newest checkpoint breaks
        (tmp_path / "several" / path).unlink()
    again = launch(configuration, *command, processes=processes)
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout and "checkpoint-4" in again.stdout
    resumed = load_file(tmp_path / "several" / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
