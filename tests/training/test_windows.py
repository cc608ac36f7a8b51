# SPDX-License-Identifier: Apache-2.0
"""Windows: no token is lost on the way from stories to windows, cached or streamed, and no work is done twice."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset, IterableDataset
from helpers.damage import flip
from helpers.stories import END
from torch.utils.data import DataLoader

from training.files import CHECKSUMS
from training.text import windows as windows_module
from training.text.sources import STORY_FEATURES, load_stories
from training.text.story_writer import write_stories
from training.text.tokenizer import load_tokenizer, train_tokenizer
from training.text.windows import collate_windows, pack_windows


SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(write_stories(300), 400)


@pytest.fixture(scope="module")
def stories():
    return load_stories("embedded", num_stories=300)


def _must_not_be_called(*args, **kwargs):
    raise AssertionError("this work was done before")


def _stream(texts, tokenizer):
    """The tokens that windows are cut from, story by story."""
    ids = [tokenizer(text, split_special_tokens=True)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    return np.concatenate(ids)


def _ids(windows):
    return np.array([row["input_ids"] for row in windows])


@pytest.mark.parametrize("context_length", [1, 7, 64, 1000])
def test_windows_are_the_stream_cut_and_nothing_else(stories, tokenizer, context_length):
    stories = stories.take(50)
    stream = _stream(stories["text"], tokenizer)
    whole = len(stream) // context_length
    windows = pack_windows(stories, tokenizer, context_length)
    assert windows.column_names == ["input_ids"]
    assert np.array_equal(_ids(windows), stream[: whole * context_length].reshape(whole, context_length))
    first = windows[0]["input_ids"]
    assert isinstance(first, list) and len(first) == context_length


def test_windows_do_not_depend_on_the_number_of_processes(tokenizer, tmp_path, monkeypatch):
    # More stories than one batch holds, so that batches and processes have borders inside.
    results = []
    for num_proc in (None, 2, 3):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / str(num_proc)))
        stories = load_stories("embedded", num_stories=1500)
        results.append(_ids(pack_windows(stories, tokenizer, 128, num_proc)))
    assert np.array_equal(results[0].ravel(), _stream(stories["text"], tokenizer)[: results[0].size])
    for result in results[1:]:
        assert np.array_equal(result, results[0])


def test_a_second_call_does_no_work(stories, tokenizer, monkeypatch, tmp_path):
    before = _ids(pack_windows(stories, tokenizer, 96))
    tokenizer("calls leave traces in a tokenizer", padding="max_length", max_length=20, truncation=True)
    tokenizer.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(windows_module, "_tokenize_batch", _must_not_be_called)
        assert len(pack_windows(stories, tokenizer, 97)) > 0
        patch.setattr(windows_module, "_tokenize", _must_not_be_called)
        again = load_stories("embedded", num_stories=300)
        for num_proc in (None, 2):
            assert np.array_equal(_ids(pack_windows(again, load_tokenizer(str(tmp_path)), 96, num_proc)), before)


def test_what_has_changed_in_the_cache_is_made_again(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    texts = load_stories("embedded", num_stories=40)["text"][:]
    before = _ids(pack_windows(load_stories("embedded", num_stories=40), tokenizer, 64, num_proc=2))
    files = sorted(tmp_path.rglob("*.arrow"))
    assert [path.name for path in files].count("rows.arrow") == 2 and len(files) == 4  # tokens of two processes
    for name in ("*.arrow", CHECKSUMS):
        caplog.clear()
        for path in tmp_path.rglob(name):
            flip(path)
        stories = load_stories("embedded", num_stories=40)
        assert stories["text"][:] == texts
        assert np.array_equal(_ids(pack_windows(stories, tokenizer, 64)), before)
        shorter = pack_windows(stories, tokenizer, 32)  # by the tokens, which the windows had no need of
        assert np.array_equal(_ids(shorter).ravel()[: before.size], before.ravel())
        assert caplog.text.count("it is removed and made again") == 3
        shutil.rmtree(Path(shorter.cache_files[0]["filename"]).parent)


def test_another_tokenizer_or_other_stories_are_not_taken_from_the_cache(stories, tokenizer):
    before = _ids(pack_windows(stories, tokenizer, 64))
    smaller = train_tokenizer(write_stories(300), 300)
    assert np.array_equal(
        _ids(pack_windows(stories, smaller, 64)).ravel()[:500], _stream(stories["text"], smaller)[:500]
    )
    fewer = _ids(pack_windows(stories.take(100), tokenizer, 64))
    assert 0 < len(fewer) < len(before)


def test_stories_in_memory_and_other_columns_are_fine(tokenizer):
    stories = Dataset.from_dict({"id": list(range(40)), "text": list(write_stories(40))})
    windows = _ids(pack_windows(stories, tokenizer, 32, num_proc=2))
    assert np.array_equal(windows.ravel(), _stream(stories["text"], tokenizer)[: windows.size])


def test_streamed_windows_equal_cached_ones(stories, tokenizer):
    streamed = pack_windows(load_stories("embedded", num_stories=300, streaming=True), tokenizer, 64)
    assert isinstance(streamed, IterableDataset)
    expected = _ids(pack_windows(stories, tokenizer, 64))
    for _ in range(2):
        assert np.array_equal(_ids(streamed), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_each_window_once_in_a_loader(tmp_path, tokenizer, num_workers):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(END.join(write_stories(30, seed=index)))
    expected = _ids(pack_windows(load_stories(str(tmp_path)), tokenizer, 64))
    streamed = pack_windows(load_stories(str(tmp_path), streaming=True), tokenizer, 64)
    loader = DataLoader(streamed, batch_size=4, num_workers=num_workers, collate_fn=collate_windows)
    assert np.array_equal(torch.cat([batch["input_ids"] for batch in loader]).numpy(), expected)


def test_a_stream_resumed_anywhere_goes_on_with_the_next_window(tmp_path, tokenizer):
    """As Trainer resumes: within a file, where a window spans two, and where the corpus begins again."""
    files = [list(write_stories(12, seed=index)) for index in range(3)]
    for index, texts in enumerate(files):
        (tmp_path / f"{index}.txt").write_text(END.join(texts))
    one_pass = _ids(pack_windows(load_stories(str(tmp_path)), tokenizer, 64))
    borders = np.cumsum([len(_stream(texts, tokenizer)) for texts in files])[:2]
    assert (borders % 64 != 0).all() and len(one_pass) % 4 != 0  # in the middle of a window, and of a batch
    streamed = pack_windows(load_stories(str(tmp_path), streaming=True), tokenizer, 64).repeat(None)
    loader = DataLoader(streamed, batch_size=4, collate_fn=collate_windows)
    expected = np.concatenate([one_pass] * 4)
    num_batches = 2 * len(one_pass) // 4 + 2
    assert num_batches > 15
    for seen in range(num_batches):
        resumed = iter(skip_first_batches(loader, seen))
        following = np.concatenate([next(resumed)["input_ids"].numpy() for _ in range(2)])
        assert np.array_equal(following, expected[4 * seen : 4 * seen + 8]), seen


@pytest.mark.parametrize("seen", [3, 40])
def test_a_stream_is_resumed_from_a_state_of_a_resumed_one(tokenizer, seen):
    """By the states of `datasets`, which some versions of it stop counting after the first time."""

    def windows():
        return pack_windows(load_stories("embedded", num_stories=60, streaming=True), tokenizer, 64)

    expected, state, read = list(windows()), None, []
    for _ in range(3):
        stream = windows()
        if state is not None:
            stream.load_state_dict(state)
        rows = iter(stream)
        read += [next(rows) for _ in range(seen)]
        state = stream.state_dict()
    assert read == expected[: 3 * seen] and len(read) == 3 * seen


def test_end_of_text_inside_a_story_ends_nothing(tokenizer):
    texts = [f"A fox. {END} A dog.", "An owl.", f"{END}", f"<|pad|>{END}"]
    ids = _ids(pack_windows(Dataset.from_dict({"text": texts}), tokenizer, 1)).ravel()
    assert (ids == tokenizer.eos_token_id).sum() == len(texts)
    assert (ids == tokenizer.pad_token_id).sum() == 0
    assert tokenizer.decode(ids) == "".join(text + END for text in texts)


def test_an_empty_story_adds_nothing(tokenizer):
    ids = _ids(pack_windows(Dataset.from_dict({"text": ["", "An owl.", "", "", "A fox.", ""]}), tokenizer, 1)).ravel()
    assert tokenizer.decode(ids) == f"An owl.{END}A fox.{END}"


@pytest.mark.parametrize("texts", [["An owl."], [""], []])
def test_too_few_tokens_for_a_window_is_an_error(tokenizer, texts):
    stories = Dataset.from_dict({"text": texts}, features=STORY_FEATURES)
    num_tokens = len(_stream(texts, tokenizer)) if any(texts) else 0
    message = f"have {num_tokens} tokens, too few for one window of context_length 512"
    with pytest.raises(ValueError, match=message):
        pack_windows(stories, tokenizer, 512)
    streamed = pack_windows(IterableDataset.from_generator(stories.__iter__), tokenizer, 512)
    with pytest.raises(ValueError, match=message):
        next(iter(streamed))


def test_windows_need_a_length_and_an_eos(stories, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="context_length is 0"):
        pack_windows(stories, tokenizer, 0)
    tokenizer.save_pretrained(tmp_path)
    bare = load_tokenizer(str(tmp_path))
    bare.eos_token = None
    with pytest.raises(ValueError, match="no eos token.*load_tokenizer"):
        pack_windows(stories, bare, 8)


def test_collated_windows_are_a_batch(stories, tokenizer):
    windows = pack_windows(stories, tokenizer, 16)
    batch = collate_windows([windows[0], windows[1], windows[2]])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for tensor in batch.values():
        assert tensor.shape == (3, 16)
        assert tensor.dtype == torch.int64
    assert batch["input_ids"].tolist() == _ids(windows)[:3].tolist()
    assert batch["attention_mask"].all()
    assert torch.equal(batch["labels"], batch["input_ids"])
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] != -100
    formatted = windows.with_format("torch")
    assert collate_windows([formatted[0], formatted[1]])["input_ids"].dtype == torch.int64


@pytest.mark.skipif(not SHARED.is_dir(), reason="real stories are not at ../shared/data")
def test_real_stories():
    stories = load_stories(str(SHARED / "stories/validation.jsonl.gz"))
    assert len(stories) == 587
    tokenizer = load_tokenizer(str(SHARED / "gpt2-tokenizer"))
    windows = pack_windows(stories, tokenizer, 128, num_proc=2)
    assert len(windows) == (118_949 + 587) // 128
    text = END.join(stories["text"]) + END
    assert text.startswith(tokenizer.decode(_ids(windows).ravel()))
