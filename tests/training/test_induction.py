# SPDX-License-Identifier: Apache-2.0
"""Induction data are fresh and reproducible; only places whose answer stands in the sequence are measured."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import make_model
from scipy.stats import chisquare

from training.synthetic.bigrams import InductionDataset, InformedReader, random_bigrams, score, text_bigrams


def stack(dataset, name):
    return torch.stack([item[name] for item in dataset])


class Lookup:
    """Predicts the last successor of a token, and token 0 after a token that is new."""

    device = torch.device("cpu")

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def __call__(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            followed_by = {}
            for t, token in enumerate(ids):
                if t > 0:
                    followed_by[ids[t - 1]] = token
                logits[row, t, followed_by.get(token, 0)] = 100.0
        return SimpleNamespace(logits=logits)


def test_a_sequence_depends_on_seed_and_index_alone():
    dataset, longer = InductionDataset(8, seed=3), InductionDataset(50, seed=3)
    backwards = {index: longer[index] for index in reversed(range(50))}
    for index, item in enumerate(dataset):
        assert item.keys() == {"input_ids", "labels", "is_induction", "is_first"}
        for name, tensor in item.items():
            assert torch.equal(tensor, backwards[index][name])
        assert torch.equal(item["input_ids"], item["labels"]) and item["input_ids"].shape == (128,)


def test_sequences_are_fresh():
    rows = [tuple(row.tolist()) for seed in range(4) for row in stack(InductionDataset(50, seed=seed), "input_ids")]
    assert len(set(rows)) == 200
    first = stack(InductionDataset(5), "input_ids")
    assert not torch.equal(first, stack(InductionDataset(5, bigram_seed=1), "input_ids"))
    assert np.array_equal(InductionDataset(5, seed=1).bigrams, InductionDataset(5, seed=2).bigrams)


def test_masks_mark_triggers_and_tell_first_from_later():
    dataset = InductionDataset(100, length=200)
    for index, item in enumerate(dataset):
        tokens, triggers = item["input_ids"].tolist(), set(dataset._sequence(index)[1].tolist())
        assert len(triggers) == dataset.num_triggers
        seen = {}
        for t, token in enumerate(tokens[:-1]):
            is_trigger = token in triggers
            assert item["is_first"][t] == (is_trigger and token not in seen)
            assert item["is_induction"][t] == (is_trigger and token in seen)
            if is_trigger:
                assert seen.setdefault(token, tokens[t + 1]) == tokens[t + 1] and tokens[t + 1] not in triggers
        assert not item["is_induction"][-1] and not item["is_first"][-1]


def test_successors_are_uniform_over_the_other_tokens():
    dataset = InductionDataset(1500, length=40, vocab_size=12, num_triggers=1)
    ids, is_first = stack(dataset, "input_ids"), stack(dataset, "is_first")
    counts = np.zeros((12, 12))
    np.add.at(counts, (ids[:, :-1][is_first[:, :-1]].numpy(), ids[:, 1:][is_first[:, :-1]].numpy()), 1)
    assert not counts.diagonal().any()
    others = counts[~np.eye(12, dtype=bool)].reshape(12, 11)
    assert chisquare(others, axis=1).pvalue.min() > 0.01 / 12


def test_successors_of_other_tokens_have_the_shares_of_the_bigrams():
    dataset = InductionDataset(400, length=500, vocab_size=9, num_triggers=2)
    ids = stack(dataset, "input_ids")
    is_trigger = stack(dataset, "is_induction") | stack(dataset, "is_first")
    here, after = (part[~is_trigger[:, :-1]] for part in (ids[:, :-1], ids[:, 1:]))
    counts = np.zeros((9, 9))
    np.add.at(counts, (here.numpy(), after.numpy()), 1)
    deviation = np.abs(counts / counts.sum(1, keepdims=True) - dataset.bigrams)
    # Six standard deviations of a share in that many draws.
    assert (deviation < 6 * 0.5 / np.sqrt(counts.sum(1, keepdims=True))).all()
    assert deviation.max() < 0.02


def test_triggers_are_drawn_with_the_frequencies_of_a_text_without_triggers():
    dataset = InductionDataset(1, vocab_size=65)
    assert dataset.frequencies @ dataset.bigrams == pytest.approx(dataset.frequencies, abs=1e-12)
    assert dataset.frequencies.sum() == pytest.approx(1) and (dataset.frequencies > 0).all()


def test_bigrams_of_a_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abac", encoding="utf-8")
    assert text_bigrams(path) == pytest.approx(np.array([[0, 0.5, 0.5], [1, 0, 0], [1, 0, 0]]))
    dataset = InductionDataset(3, vocab_size=3, num_triggers=1, text_file=path)
    assert dataset.frequencies == pytest.approx([0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match="3 distinct characters: pass vocab_size=3, not 65"):
        InductionDataset(3, text_file=path)
    path.write_text("aaa", encoding="utf-8")
    with pytest.raises(ValueError, match="fewer than two distinct characters"):
        InductionDataset(3, vocab_size=2, num_triggers=1, text_file=path)


def test_random_bigrams_leave_as_much_open_as_they_say():
    bigrams = random_bigrams(65, seed=0)
    entropy = -(bigrams * np.log(bigrams.clip(min=1e-300))).sum(axis=1).mean()
    assert entropy == pytest.approx(2.4, abs=0.1)


def test_a_lookup_is_always_right_at_triggers_seen_before():
    dataset = InductionDataset(200)
    measures = score(Lookup(dataset.vocab_size), dataset, batch_size=64)
    assert measures["accuracy"] == measures["best_accuracy"] == 1 and measures["loss"] < 1e-6
    # At a first occurrence only a guess is possible: one in sixty, within six standard deviations.
    chance = measures["best_first_accuracy"]
    assert chance == 1 / 60 and measures["best_first_loss"] == pytest.approx(math.log(60))
    assert measures["first_accuracy"] < chance + 6 * math.sqrt(chance / measures["num_first"])
    assert measures["num_positions"] == stack(dataset, "is_induction").sum()


def test_an_informed_reader_is_as_sure_as_it_is_right():
    dataset = InductionDataset(300)
    reader = InformedReader(dataset)
    assert sum(reader.prior) == pytest.approx(dataset.num_triggers)
    ids = stack(dataset, "input_ids")
    probabilities = reader(ids).logits.exp()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(ids.shape, dtype=torch.float64))
    confidence, best = probabilities[:, :-1].max(-1)
    is_right = (best == ids[:, 1:]).double()
    deviation = (confidence * (1 - confidence)).sum().sqrt()
    assert (is_right - confidence).sum().abs() < 4 * deviation
    by_bigrams = torch.from_numpy(dataset.bigrams)[ids[:, :-1]].argmax(-1) == ids[:, 1:]
    assert is_right.mean() > by_bigrams.double().mean() + 0.02


def test_an_informed_reader_doubts_a_trigger_seen_once():
    dataset = InductionDataset(300)
    informed, lookup = (score(r, dataset) for r in (InformedReader(dataset), Lookup(65)))
    assert 0.85 < informed["accuracy"] < 0.95 < lookup["accuracy"]
    assert informed["loss"] < 0.5 and informed["best_first_loss"] < informed["first_loss"] < 7


def test_a_model_is_measured_alike_in_any_batches_and_untrained_knows_nothing():
    dataset, model = InductionDataset(30), make_model(vocab_size=65)
    measures = score(model, dataset, batch_size=7)
    assert measures["accuracy"] < 0.2 and measures["loss"] > 3
    assert measures == pytest.approx(score(model, dataset, batch_size=30), rel=1e-5)
    ids = dataset[0]["input_ids"][None]
    mask = dataset[0]["is_induction"][:-1]
    expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1][mask], ids[0, 1:][mask])
    assert score(model, InductionDataset(1))["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_triggers": 65}, "num_triggers=65 must be less than vocab_size=65"),
        ({"num_triggers": 0}, "num_triggers=0 must be at least 1"),
        ({"length": 1}, "length=1 at least 2"),
        ({"seed": -1}, "seed=-1 not negative"),
    ],
)
def test_sizes_that_make_no_task_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        InductionDataset(4, **options)


def test_indices_beyond_and_sequences_without_an_answer_are_refused():
    with pytest.raises(IndexError, match="sequence 4 of 4"):
        InductionDataset(4)[4]
    with pytest.raises(ValueError, match="No trigger occurs twice"):
        score(Lookup(65), InductionDataset(2, length=2))
