# SPDX-License-Identifier: Apache-2.0
"""Streams of tokens go on in place: the windows are those of a stream without a break, and nothing is read twice."""

import builtins
import contextlib
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import datasets
import numpy as np
import psutil
import pytest
import torch
from helpers.processes import launch, launch_command
from helpers.runs import SHORT, SMOKE, Interrupted, assert_same_run, interrupt_after, short_recipe
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from training.__main__ import app
from training.paths import CLONE
from training.recipe import load_recipe
from training.tasks import language_modeling
from training.text import story_files
from training.text.sources import load_stories
from training.text.story_writer import write_stories
from training.text.token_streams import Reader, TokenStream, collate_stream, make_reader, place_to_json
from training.text.tokenizer import train_tokenizer
from training.text.windows import collate_windows


LENGTH = 32
SOURCE = {"split": "train", "text_field": "text", "separator": "<|endoftext|>", "num_stories": None, "seed": 0}
SOURCE |= {"validation_fraction": None}

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(write_stories(200), 400)


def write_shards(folder, counts, seed=0, form=".jsonl"):
    """Write a shard of stories for each count; every story of all shards is another one."""
    folder.mkdir(parents=True, exist_ok=True)
    stories = iter(write_stories(sum(counts), seed=seed))
    for number, count in enumerate(counts):
        texts = list(itertools.islice(stories, count))
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}{form}").write_text(content if form == ".jsonl" else "<|endoftext|>".join(texts))
    return folder


def stream_of(tokenizer, *sources, weights=(1.0,), share=(0, 1)):
    readers = [make_reader(SOURCE | {"source": str(source)}, share) for source in sources]
    return TokenStream(readers, weights, tokenizer, LENGTH)


def take(stream, count):
    """Return windows and the place behind the last, as a checkpoint would hold it."""
    rows = list(itertools.islice(stream, count))
    return np.array([row["input_ids"] for row in rows]), json.loads(json.dumps(place_to_json(rows[-1]["place"])))


@pytest.fixture(params=["jsonl", "txt", "hub"])
def source(request, tmp_path, monkeypatch):
    """Return a source of three shards: local files of lines, separated stories, or a stream of `datasets`."""
    if request.param != "hub":
        return write_shards(tmp_path / "shards", [3, 1, 4], form=f".{request.param}")
    files = [str(path) for path in sorted(write_shards(tmp_path / "hub", [3, 1, 4]).iterdir())]
    load_dataset = functools.partial(datasets.load_dataset, "json", data_files=files)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, name, revision, split, streaming: load_dataset(split=split, streaming=streaming),
    )
    return "some/stories"


def test_a_stream_has_the_windows_of_the_whole_text_round_after_round(source, tokenizer):
    texts = [row["text"] for row in load_stories(str(source), streaming=True)]
    assert len(texts) == 8
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    whole = np.concatenate(ids * 3)
    count = len(whole) // LENGTH
    windows, _ = take(stream_of(tokenizer, source), count)
    assert np.array_equal(windows.ravel(), whole[: count * LENGTH])


def test_a_stream_goes_on_anywhere_with_the_next_window(source, tokenizer):
    expected, _ = take(stream_of(tokenizer, source), 160)
    one_round = sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in load_stories(str(source), streaming=True))
    assert one_round / LENGTH < 80  # so that rounds end in between
    for seen in range(1, 150, 7):
        _, place = take(stream_of(tokenizer, source), seen)
        for _ in range(2):  # a place of a stream that went on itself is as good
            stream = stream_of(tokenizer, source)
            stream.go_on_from(place)
            following, place = take(stream, 4)
            assert np.array_equal(following, expected[seen : seen + 4]), seen
            seen += 4


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_number_of_workers_changes_no_window(source, tokenizer, workers, monkeypatch):
    expected, _ = take(stream_of(tokenizer, source), 24)
    place = None
    for begin in (0, 12):  # goes on with another number of workers than it began with
        stream = stream_of(tokenizer, source)
        if place is not None:
            stream.go_on_from(json.loads(json.dumps(place_to_json(place))))
        collate = functools.partial(collate_stream, collate_windows)
        count = (workers + begin) % 3
        loader = DataLoader(stream, batch_size=4, collate_fn=collate, num_workers=count)
        batches = list(itertools.islice(loader, 3))
        place = batches[-1]["place"]
        read = torch.cat([batch["input_ids"] for batch in batches]).numpy()
        assert np.array_equal(read, expected[begin : begin + 12])


def test_the_first_stories_of_many_shards_are_read_by_one_worker(tokenizer, monkeypatch):
    stories = datasets.Dataset.from_dict({"text": list(write_stories(12))})
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: stories.to_iterable_dataset(num_shards=4))
    reader = make_reader(SOURCE | {"source": "some/stories", "num_stories": 10}, (0, 1))
    assert [text for text, _ in reader.read(None)] == stories["text"][:10]
    stream = TokenStream([reader], [1.0], tokenizer, LENGTH)
    expected, _ = take(stream, 24)
    collate = functools.partial(collate_stream, collate_windows)
    batches = itertools.islice(DataLoader(stream, batch_size=4, collate_fn=collate, num_workers=2), 6)
    assert np.array_equal(torch.cat([batch["input_ids"] for batch in batches]).numpy(), expected)


class CountingFile:
    """A file that notes from where to where it was read."""

    def __init__(self, file, spans):
        self.file, self.spans = file, spans

    def readline(self, *size):
        begin = self.file.tell()
        line = self.file.readline(*size)
        self.spans.append((begin, begin + len(line)))
        return line

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def test_no_byte_of_lines_is_read_again(tmp_path, tokenizer, monkeypatch):
    folder = write_shards(tmp_path / "shards", [1, 3, 2])
    expected, _ = take(stream_of(tokenizer, folder), 30)
    _, place = take(stream_of(tokenizer, folder), 20)
    spans = {}

    def counting(path, *mode):
        return CountingFile(builtins.open(path, *mode), spans.setdefault(os.path.basename(path), []))

    stream = stream_of(tokenizer, folder)
    monkeypatch.setattr(story_files, "open", counting, raising=False)
    stream.go_on_from(place)
    following, _ = take(stream, 10)
    assert np.array_equal(following, expected[20:])
    stands = place["sources"][0]["place"]
    assert stands["shard"] >= 1 and stands["at"] > 0
    read = {int(name.split(".")[0]) for name in spans}
    assert read and min(read) == stands["shard"]
    assert min(begin for begin, _ in spans[f"{stands['shard']}.jsonl"]) == stands["at"]


def test_shards_that_were_read_may_be_gone(source, tokenizer, tmp_path):
    expected, _ = take(stream_of(tokenizer, source), 70)
    places = [take(stream_of(tokenizer, source), seen)[1] for seen in range(1, 60)]
    files = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".jsonl", ".txt"))

    seen = next(number for number, place in enumerate(places, 1) if place["sources"][0]["place"]["shard"] == 2)
    stream = stream_of(tokenizer, source)
    for path in files[:2]:
        path.unlink()
    stream.go_on_from(places[seen - 1])
    following, _ = take(stream, 3)
    assert np.array_equal(following, expected[seen : seen + 3])


@pytest.mark.parametrize("counts", [[6, 5, 4, 6], [12]])
def test_processes_read_each_story_once(tmp_path, tokenizer, counts):
    folder = write_shards(tmp_path / "shards", counts)
    parts = [list(make_reader(SOURCE | {"source": str(folder)}, (index, 2)).read(None)) for index in range(2)]
    texts = [[text for text, _ in part] for part in parts]
    assert all(texts) and sorted(texts[0] + texts[1]) == sorted(row["text"] for row in load_stories(str(folder)))
    embedded = SOURCE | {"source": "embedded", "num_stories": 11}
    texts = [[text for text, _ in make_reader(embedded, (index, 2)).read(None)] for index in range(2)]
    assert sorted(texts[0] + texts[1]) == sorted(write_stories(11))


def test_processes_that_are_given_one_batch_read_one_stream(tmp_path, tokenizer):
    """As those that share texts are: each two of four."""
    folder = write_shards(tmp_path / "shards", [12, 12, 12, 12])
    recipe = short_recipe(tmp_path / "run", "data.streaming=true", f"data.train.source={folder}")
    read = []
    for index in range(4):
        state = SimpleNamespace(process_index=index, num_processes=4, main_process_first=contextlib.nullcontext)
        windows = language_modeling.prepare_windows(recipe, tokenizer, state, per_batch=2)
        read.append(take(windows["train"], 3)[0].tolist())
    assert read[0] == read[1] != read[2] == read[3]


def test_a_mixture_has_the_tokens_of_its_weights_and_goes_on(tmp_path, tokenizer):
    folders = [write_shards(tmp_path / str(seed), [30, 30], seed=seed) for seed in range(3)]
    weights = (6.0, 3.0, 1.0)
    make = functools.partial(stream_of, tokenizer, *folders, weights=weights)
    expected, place = take(make(), 400)
    tokens = np.array([source["tokens"] for source in place["sources"]])
    longest = max(len(tokenizer(text)["input_ids"]) + 1 for seed in range(3) for text in write_stories(60, seed=seed))
    shares = np.array(weights) / sum(weights) * tokens.sum()
    assert np.abs(tokens - shares).max() <= 2 * longest < shares.min()
    for seen in (1, 57, 200, 333):
        stream = make()
        stream.go_on_from(take(make(), seen)[1])
        assert np.array_equal(take(stream, 20)[0], expected[seen : seen + 20])
    with pytest.raises(ValueError, match="the place is of 3 sources, and the stream has 1"):
        stream_of(tokenizer, folders[0]).go_on_from(place)


def test_a_source_without_a_story_ends_the_stream(tokenizer):
    with pytest.raises(ValueError, match="no story for one of the processes: give it more files"):
        next(iter(TokenStream([Reader([lambda at: iter(())])], [1.0], tokenizer, LENGTH)))


# Whole runs


def mixture(tmp_path):
    """Overrides for a stream of two sources."""
    first, second = (write_shards(tmp_path / name, [4, 3, 4, 5], seed=seed) for seed, name in enumerate(("a", "b")))
    own = [f"data.train.source={first}", "data.train.num_stories=null", "data.streaming=true"]
    return [*own, "data.train_weight=3", f"data.mixture=[{{source: {second}, weight: 1}}]"]


def test_a_run_of_a_mixture_goes_on_in_place_with_other_workers(tmp_path, monkeypatch, without_clean_process):
    settings = mixture(tmp_path)
    recipes = []
    for number, name in enumerate(("straight", "stopped")):
        recipes.append(short_recipe(tmp_path / name, *settings, f"training.dataloader_num_workers={number}"))
    language_modeling.run(recipes[0])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 17)
        language_modeling.run(recipes[1])
    again = short_recipe(recipes[1].folder, *settings)
    assert again.hash == recipes[1].hash
    skipped = []
    monkeypatch.setattr("transformers.trainer.skip_first_batches", lambda *arguments: skipped.append(arguments))
    result = language_modeling.run(again)
    assert not skipped
    assert_same_run(recipes[0].folder, recipes[1].folder)
    assert result["data"].keys() == {"train", "train_2", "validation"}


@pytest.mark.slow
def test_two_killed_processes_go_on_in_place(tmp_path):
    """Killed where they stand, by -9, at no particular moment behind the second checkpoint."""
    settings = [*SHORT, *mixture(tmp_path), "training.per_device_train_batch_size=2", "training.save_steps=3"]
    run = ["run", str(SMOKE), *settings]
    killed = [*run, f"output_dir={tmp_path / 'killed'}"]
    straight = launch("ddp", *run, f"output_dir={tmp_path / 'straight'}", processes=2)
    assert straight.returncode == 0, straight.stderr
    process = subprocess.Popen(
        [sys.executable, *launch_command("ddp", *killed, processes=2)],
        cwd=CLONE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (tmp_path / "killed" / "checkpoint-6").is_dir():
        time.sleep(0.01)
    launcher = psutil.Process(process.pid)
    for each in [*launcher.children(recursive=True), launcher]:
        each.kill()
    assert process.wait() == -signal.SIGKILL
    places = [json.loads((tmp_path / f"killed/checkpoint-6/place_{index}.json").read_text()) for index in range(2)]
    assert places[0] != places[1]
    again = launch("ddp", *killed, "training.dataloader_num_workers=1", processes=2)
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_a_checkpoint_without_a_place_is_refused(tmp_path, monkeypatch, without_clean_process):
    recipe = short_recipe(tmp_path / "run", "data.streaming=true")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 7)
        language_modeling.run(recipe)
    monkeypatch.setattr("training.loop.LanguageModelTrainer._place_name", "elsewhere.json")
    with pytest.raises(ValueError, match="elsewhere.json is missing, so that the stream of text cannot go on"):
        language_modeling.run(recipe)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.mixture=[{source: x, weight: 1}]", "data.streaming=true"], "`mixture` and `train_weight` belong"),
        (["data.train_weight=1"], "`mixture` and `train_weight` belong together"),
        (["data.mixture=[{source: x, weight: 1}]", "data.train_weight=1"], "set `streaming` to true"),
        (["data.mixture=[{source: x, weight: 0}]", "data.train_weight=1"], "greater than 0"),
    ],
)
def test_mixtures_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(SMOKE, [*SHORT, *overrides])


def test_a_budget_of_a_trillion_tokens_reads_well():
    recipes = [load_recipe(SMOKE, [*SHORT, f"tokens={tokens}"]) for tokens in ("1e12", "1_000_000_000_000")]
    assert recipes[0].tokens == 10**12 and recipes[0].hash == recipes[1].hash
    with pytest.raises(ValueError, match="tokens: Input should be a valid integer"):
        load_recipe(SMOKE, [*SHORT, "tokens=1.5"])
    options = ["--devices", "512", "--teraflops", "400"]
    output = CliRunner().invoke(app, ["dry-run", str(SMOKE), *SHORT, "tokens=1e12", *options]).stdout
    lines = dict(line.split(": ", 1) for line in output.splitlines() if ": " in line)
    assert re.fullmatch(r"1,000,000,\d{3},\d{3} \(1 trillion\)", lines["tokens"])
    assert re.fullmatch(r"\d\.\d{3}e\+1\d", lines["training_flops"])
    assert re.fullmatch(r"[\d,]+(\.\d+)?", lines["hours"])
