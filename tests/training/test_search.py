# SPDX-License-Identifier: Apache-2.0
"""Searches over settings: everything is tried once, whatever kills a search, and failures are reported."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import yaml
from helpers import searched_task
from helpers.damage import flip
from typer.testing import CliRunner

from training import parallel
from training.__main__ import app
from training.recipe import load_recipe
from training.tasks import language_modeling, search


CLONE = Path(__file__).resolve().parents[2]
GRID = {"x": [1, 2, 3], "inner.y": [0.5, 0.25]}
RANGES = {"x": {"low": 0.5, "high": 8.0}, "inner.y": {"low": 0.001, "high": 1.0, "log": True}}
SAMPLED = {"space": RANGES, "num_trials": 12}
LOSSES = {(x, y): (x - 3) ** 2 + y for x in GRID["x"] for y in GRID["inner.y"]}


@pytest.fixture
def write(tmp_path):
    """Writes a search of the task that takes no time, and gives its path."""

    def write(name="found", fake=None, **changes):
        for file, values in (("fake", {"name": "fake", "task": "searched", **(fake or {})}), (name, None)):
            values = values or {
                "name": name,
                "task": "search",
                "base": str(tmp_path / "fake"),
                "space": GRID,
                "metric": "metrics.loss",
                "sampler": "grid",
                "output_dir": str(tmp_path / name),
                **changes,
            }
            (tmp_path / f"{file}.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return tmp_path / f"{name}.yaml"

    return write


@pytest.fixture
def read(write):
    return lambda *arguments, **changes: load_recipe(write(*arguments, **changes))


def tried(result):
    return {tuple(trial["settings"].values()): trial["metric"] for trial in result["measured"]["trials"]}


def starts(folder):
    return sorted((folder / "starts").read_text().split())


def test_a_grid_is_tried_once_and_ranked(read, monkeypatch):
    recipe = read()
    result = search.run(recipe)
    assert tried(result) == LOSSES and starts(recipe.folder) == sorted("112233")
    assert result["measured"]["best"]["settings"] == {"x": 3, "inner.y": 0.25}
    assert [line.split(" | ")[2] for line in result["table"].splitlines()[2:8]] == [
        f"{loss:.6g}" for loss in sorted(LOSSES.values())
    ]
    assert result["data"] == {result["measured"]["trials"][0]["folder"]: {"lines": 1}} and result["claims"] == []
    for trial in result["measured"]["trials"]:
        assert json.loads((recipe.folder / trial["folder"] / "run.json").read_text())["hash"] == trial["recipe_hash"]
        assert f"x is {trial['settings']['x']}\n" == (recipe.folder / f"{trial['folder']}.log").read_text()
    assert not list(recipe.folder.glob("*.png"))  # of six trials: the table has them
    assert "best: x=3 inner.y=0.25 (metrics.loss 0.25)" in search.summary(result, recipe.folder)
    monkeypatch.setattr(searched_task, "run", lambda *_: pytest.fail("tried again"))
    assert search.run(recipe) == result


def test_the_order_of_a_space_changes_nothing_that_is_found(read):
    forth = search.run(read("forth", space=GRID))
    back = search.run(read("back", space={"inner.y": [0.25, 0.5], "x": [3, 2, 1]}, direction="maximize"))
    assert {values[::-1]: metric for values, metric in tried(back).items()} == tried(forth)
    hashes = [{trial["recipe_hash"] for trial in result["measured"]["trials"]} for result in (forth, back)]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 6
    assert back["measured"]["best"]["metric"] == max(LOSSES.values())


def test_a_changed_study_is_drawn_again_and_what_is_finished_is_found(read, caplog):
    recipe = read(**SAMPLED, sampler="random")
    result = search.run(recipe)
    (recipe.folder / "result.json").unlink()
    flip(recipe.folder / "study.db")
    again = search.run(recipe)
    assert "study.db is damaged" in caplog.text and (recipe.folder / "broken-study.db").is_file()
    assert tried(again) == tried(result) and len(starts(recipe.folder)) == 12
    caplog.clear()
    (recipe.folder / "result.json").unlink()
    assert tried(search.run(recipe)) == tried(result) and not caplog.records
    (recipe.folder / "result.json").unlink()
    flip(recipe.folder / again["measured"]["best"]["folder"] / "result.json")
    with pytest.raises(ValueError, match="result.json is damaged"):
        search.run(recipe)


def killed(path, folder, *overrides):
    """Start a search as a process and kill it while a trial with x = 2 is going on, and one with x = 1 finished."""
    (folder.parent / "hold").touch()
    command = [sys.executable, str(CLONE / "tests" / "helpers" / "searched_task.py"), str(path), *overrides]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CLONE), str(CLONE / "tests")])}
    with subprocess.Popen(command, cwd=CLONE, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "starts").is_file() or {"1", "2"} - set(starts(folder)):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    (folder.parent / "hold").unlink()


@pytest.mark.slow
def test_a_killed_search_repeats_nothing_finished_and_goes_on_in_parallel(write):
    path = write()
    recipe = load_recipe(path, ["workers=2"])
    killed(path, recipe.folder)
    lines = search.plan(recipe)
    assert lines["done"] == 2 and lines["trials"] == 6
    assert lines["trial 1"].endswith("finished, metrics.loss 4.25") and lines["trial 2"].endswith("begun")
    assert lines["trial 5"] == "x=3 inner.y=0.25"
    result = search.run(recipe)
    assert tried(result) == LOSSES
    assert starts(recipe.folder) == sorted("112233" + "2")  # the one that was going on
    assert search.plan(recipe)["done"] == 6
    ran = [json.loads(path.read_text()) for path in recipe.folder.glob("trial-*/result.json")]
    assert len(ran) == 6 and len({result["process"] for result in ran}) == 3  # the killed one, and two workers


@pytest.mark.slow
def test_workers_end_with_a_killed_search(write):
    path = write()
    recipe = load_recipe(path)
    killed(path, recipe.folder, "workers=2")
    assert tried(search.run(recipe)) == LOSSES  # a worker that lived on would hold the folder of its trial
    assert len(starts(recipe.folder)) <= 6 + 2


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("random", marks=pytest.mark.slow)])
def test_samplers_draw_by_the_seed_whatever_interrupts_them(read, sampler, monkeypatch):
    whole = search.run(read("whole", sampler=sampler, **SAMPLED))
    other = search.run(read("other", sampler=sampler, seed=1, **SAMPLED))
    recipe = read("interrupted", sampler=sampler, **SAMPLED)
    measure, calls = searched_task.measure, []

    def interrupted(trial):
        calls.append(trial)
        if len(calls) in (5, 11):
            raise KeyboardInterrupt
        return measure(trial)

    monkeypatch.setattr(searched_task, "measure", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search.run(recipe)
    assert tried(search.run(recipe)) == tried(whole)
    assert len(calls) == 12 + 2 and len(tried(whole)) == 12
    assert not tried(whole).keys() & tried(other).keys()
    assert all(0.5 <= x <= 8 and 0.001 <= y <= 1 for x, y in tried(whole))


def test_a_trial_without_all_of_its_settings_is_drawn_again(read, monkeypatch):
    whole = search.run(read("whole", sampler="random", **SAMPLED))
    recipe = read("killed", sampler="random", **SAMPLED)
    suggest = optuna.Trial._suggest

    def killed(trial, name, distribution):
        if trial.number == 3 and name == "inner.y":
            raise KeyboardInterrupt
        return suggest(trial, name, distribution)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Trial, "_suggest", killed)
        search.run(recipe)
    assert tried(search.run(recipe)) == tried(whole)


def test_ranges_of_whole_numbers_are_whole(read):
    result = search.run(read(space={"x": {"low": 1, "high": 64, "log": True}}, sampler="tpe", num_trials=12))
    values = [trial["settings"]["x"] for trial in result["measured"]["trials"]]
    assert all(isinstance(x, int) and 1 <= x <= 64 for x in values) and len(set(values)) > 3


def test_settings_drawn_twice_are_run_once(read):
    recipe = read(space={"x": [1, 2, 9], "inner.y": [0.5, 1.0, 0.25]}, sampler="random", num_trials=9)
    result = search.run(recipe)
    trials, different = result["measured"]["trials"], len(tried(result))
    assert len(trials) == 9 and different < 9
    assert len(starts(recipe.folder)) == different
    assert f"All {different} settings with a result, from 9 trials" in result["table"]


@pytest.mark.parametrize(
    ("error", "message"), [("diverged", "the loss diverged at x = 4"), ("memory", "out of memory")]
)
def test_a_trial_that_fails_is_reported_and_ends_nothing(read, error, message):
    recipe = read(fake={"inner": {"error": error}}, space={"x": [4, 3]})
    result = search.run(recipe)
    failed, finished = result["measured"]["trials"]
    assert (failed["state"], failed["error"], failed["metric"]) == ("failed", message, None)
    assert finished["state"] == "finished" and result["measured"]["best"] == finished
    assert f"failed: x=4: {message}" in search.summary(result, recipe.folder) and "; 1 failed" in result["table"]


def test_a_number_that_is_not_finite_is_a_failure(read, monkeypatch):
    measure = searched_task.measure

    def measured(recipe):
        return measure(recipe) | ({"metrics": {"loss": math.nan}} if recipe.x == 2 else {})

    monkeypatch.setattr(searched_task, "measure", measured)
    states = [trial["error"] for trial in search.run(read(space={"x": [1, 2, 3]}))["measured"]["trials"]]
    assert states == [None, "metrics.loss is nan", None]


def test_a_search_without_any_result_says_why(read):
    recipe = read(fake={"inner": {"error": "diverged"}}, space={"x": [4, 5]})
    with pytest.raises(
        ValueError, match=r"all 2 trials failed, the first with: the loss diverged at x = 4.*--restart"
    ):
        search.run(recipe)


def test_a_bug_ends_the_search_and_is_no_failure(read):
    recipe = read(fake={"inner": {"error": "bug"}})
    with pytest.raises(RuntimeError, match="a bug"):
        search.run(recipe)
    assert search.plan(recipe)["trial 0"].endswith("begun") and search.plan(recipe)["done"] == 0


def test_an_unknown_metric_is_named_with_the_nearest(read):
    with pytest.raises(ValueError, match=r"no number 'metrics.los' \(nearest valid name: 'metrics.loss'\)"):
        search.run(read(metric="metrics.los"))
    with pytest.raises(ValueError, match="no number 'metrics'"):
        search.run(read("whole", metric="metrics"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space"),
        ({"space": {"z": [1]}}, r"invalid point, z=1.*unknown key 'z' \(nearest valid name: 'x'\)"),
        ({"space": {"inner.yy": [1.0]}}, "nearest valid name: 'inner.y'"),
        ({"space": {"inner.y": [1.0, "high"]}}, 'invalid point, inner.y="high"'),
        ({"space": {"x": 1}}, "space.x.choices: Input should be a valid list, not 1"),
        ({"space": {"x": []}}, "space.x.choices"),
        ({"space": {"x": [1, 2, 1]}}, "`space.x` has a value twice"),
        ({"space": {"inner": [None], "inner.y": [1.0]}}, "`space.inner` holds inner.y"),
        ({"space": {"output_dir": ["a", "b"]}}, "output_dir cannot be set"),
        ({"common": {"name": "other"}}, "name cannot be set"),
        ({"space": RANGES}, "a grid has no ranges: list the values of x, inner.y"),
        ({"num_trials": 3}, "`num_trials` has no effect on a grid"),
        ({"sampler": "tpe"}, "give `num_trials`"),
        ({"sampler": "random", "num_trials": 7}, "7 of only 6 points"),
        (SAMPLED | {"sampler": "tpe", "space": {"x": {"low": 2, "hihg": 3}}}, "space.x.range.high"),
        (SAMPLED | {"sampler": "tpe", "space": {"x": {"low": 2, "high": 2}}}, "low is 2 and high is 2"),
        (SAMPLED | {"sampler": "tpe", "space": {"x": {"low": 0, "high": 2, "log": True}}}, "no logarithm"),
        (SAMPLED | {"sampler": "tpe", "space": {"name": {"low": 0, "high": 2}}}, "name cannot be set"),
        ({"direction": "down"}, "direction"),
        ({"sampler": "bayes"}, "sampler"),
        ({"workers": 0}, "workers"),
        ({"base": "absent"}, "there is no recipe"),
        ({"base": "stories_search"}, "itself a search"),
    ],
)
def test_mistakes_in_a_search_are_named(read, changes, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read(**changes)


def test_settings_that_contradict_each_other_are_refused_or_fail_alone(write, monkeypatch):
    space = {"model_args.hidden_size": [36, 34], "model_args.num_attention_heads": [2, 4]}  # 4 does not divide 34
    with pytest.raises(ValueError, match="invalid point, model_args.hidden_size=34 model_args.num_attention_heads=4"):
        load_recipe(write(base="smoke", space=space))
    space["model_args.hidden_size"] = {"low": 34, "high": 36}
    recipe = load_recipe(write(base="smoke", space=space, sampler="random", num_trials=6, metric="loss"))
    monkeypatch.setattr(language_modeling, "run", lambda _: {"loss": 1.0})
    monkeypatch.setattr(search, "_data", lambda *_: {})
    trials = search.run(recipe)["measured"]["trials"]
    for trial in trials:
        hidden_size, heads = trial["settings"].values()
        assert (trial["state"] == "failed") == (hidden_size % heads != 0)
    assert {trial["state"] for trial in trials} == {"failed", "finished"}


def test_the_hash_is_of_all_but_the_workers(read, write):
    recipe = read()
    assert read(workers=2).hash == recipe.hash and read(common={"inner": {"y": 2.0}}).hash != recipe.hash
    assert read(seed=1).hash != recipe.hash and read(metric="x").hash != recipe.hash
    assert load_recipe(write(), ["space.inner.y=[0.5,0.25,0.125]"]).space["inner.y"] == [0.5, 0.25, 0.125]
    assert read(fake={"x": 5}).hash != recipe.hash  # what the file of the base recipe says


def test_another_search_in_the_folder_is_refused_and_can_be_moved_aside(read):
    search.run(read())
    changed = read(space={"x": [3]})
    assert search.plan(changed)["done"] == 0
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        search.run(changed)
    assert tried(search.run(changed, restart=True)) == {(3,): 1.0}


def test_several_processes_of_accelerate_are_refused(read, monkeypatch):
    monkeypatch.setattr(search, "PartialState", lambda **_: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="without `accelerate launch`, and set workers=2"):
        search.run(read())


def test_a_worker_sees_one_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 2)
    seen, started = [], SimpleNamespace(submit=lambda _: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", lambda *_: started)
    assert [parallel._start_worker(1, gpu, None) for gpu in parallel._gpus()] == [started] * 2
    assert seen == ["3", "5"] and os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_a_search_of_trainings_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(language_modeling, "verify_export", lambda folder, prompts, **options: prompts)
    values = {
        "name": "smoke_search",
        "task": "search",
        "base": "smoke",
        "common": {
            "tokens": 2048,
            "data": {"train": {"num_stories": 40}, "validation": {"num_stories": 12}},
            "generation": {"prompts": []},
        },
        "space": {"training.learning_rate": [1e-3, 3e-3], "model_args.num_hidden_layers": [1]},
        "metric": "metrics.validation_loss",
        "sampler": "grid",
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "smoke_search.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    ran = CliRunner().invoke(app, ["run", str(path)])
    assert ran.exit_code == 0, ran.output
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    for trial in result["measured"]["trials"]:
        run = json.loads((tmp_path / "out" / trial["folder"] / "result.json").read_text(encoding="utf-8"))
        assert run["recipe"]["training"]["learning_rate"] == trial["settings"]["training.learning_rate"]
        assert run["architecture"]["num_hidden_layers"] == 1
        assert (run["metrics"]["validation_loss"], run["recipe_hash"]) == (trial["metric"], trial["recipe_hash"])
    assert len({trial["metric"] for trial in result["measured"]["trials"]}) == 2
    assert "best: training.learning_rate=" in ran.stdout
    planned = CliRunner().invoke(app, ["dry-run", str(path)])
    assert "trial 1: training.learning_rate=0.003" in planned.stdout and "done: 2" in planned.stdout


@pytest.mark.parametrize("space", [{"model": ["one", "two"]}, {"model": list("abcdefgh")}, {}])
def test_a_search_in_a_range_is_drawn_with_and_without_models(space, tmp_path):
    """A range has no line through its values, and a search of models alone has nothing else to stand along an axis."""
    if len(space.get("model", [])) < 8:
        space = space | {"training.learning_rate": search.RangeSection(low=1e-3, high=1e-1, log=True)}
    rows = []
    for number in range(8):
        drawn = {"model": space.get("model", [None])[number % len(space.get("model", [None]))]}
        settings = {key: drawn.get(key, 10 ** (-3 + number / 4)) for key in space}
        rows.append({"number": number, "settings": settings, "metric": number / 8, "recipe_hash": str(number)})
    recipe = SimpleNamespace(space=space, direction="maximize", metric="metrics.validation.accuracy", name="drawn")
    search.draw(recipe, {"trials": rows}, tmp_path)
    assert (tmp_path / "drawn.png").stat().st_size > 5000
