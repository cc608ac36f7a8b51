# SPDX-License-Identifier: Apache-2.0
"""The metric modules load from the clone, offline, and follow their formulas; the examples of their cards run."""

import doctest
import math
import re

import evaluate
import numpy as np
import pytest

from training.metrics import mean_loss


NAMES = ["per_position_loss", "bits_per_byte", "sequence_tvd", "token_accuracy", "entropy_ratio", "retrieval_accuracy"]


@pytest.fixture(autouse=True)
def _in_the_clone(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture
def metric(tmp_path):
    return lambda name: evaluate.load(f"training/metrics/{name}", cache_dir=str(tmp_path))


@pytest.fixture
def per_position_loss(metric):
    return metric("per_position_loss").compute


@pytest.fixture
def bits_per_byte(metric):
    return metric("bits_per_byte").compute


@pytest.fixture
def sequence_tvd(metric):
    return metric("sequence_tvd").compute


@pytest.fixture
def token_accuracy(metric):
    return metric("token_accuracy").compute


@pytest.fixture
def entropy_ratio(metric):
    return metric("entropy_ratio").compute


@pytest.fixture
def retrieval_accuracy(metric):
    return metric("retrieval_accuracy").compute


@pytest.mark.parametrize("name", NAMES)
def test_cards_and_docstrings_do_what_they_say(name, metric, request):
    card = (request.config.rootpath / "training" / "metrics" / name / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    module = metric(name)
    for text, minimum in (("\n".join(blocks), 5), (module.inputs_description, 2)):
        examples = doctest.DocTestParser().get_doctest(text, {"evaluate": evaluate}, name, None, 0)
        assert len(examples.examples) >= minimum
        output = []
        failed = doctest.DocTestRunner(verbose=False).run(examples, out=output.append)
        assert failed.failed == 0, "".join(output)


@pytest.mark.parametrize("name", NAMES)
def test_cards_describe_inputs_and_outputs(name, metric, request):
    card = (request.config.rootpath / "training" / "metrics" / name / "README.md").read_text(encoding="utf-8")
    described = set(re.findall(r"\*\*(\w+)\*\*", card))
    module = metric(name)
    assert set(module.features) <= described
    headings = ["Metric Description", "How to Use", "Inputs", "Output Values", "Examples", "Limitations and Bias"]
    assert re.findall(r"^##+ (.*)$", card, flags=re.MULTILINE)[:6] == headings
    assert module.citation.strip() in card


# Loss by position


def windows(count=30, length=9, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, length + 1, size=count)
    lengths[:3] = length  # so that several documents reach the end
    return [generator.uniform(0, 5, size=size) for size in lengths], (np.arange(count) % 7).tolist()


def test_means_are_those_of_the_windows_that_reach(per_position_loss):
    losses, documents = windows()
    results = per_position_loss(predictions=losses, references=documents)
    assert set(results) == {"mean", "low", "high", "count"}
    for position in range(9):
        reaching = [window[position] for window in losses if len(window) > position]
        assert results["count"][position] == len(reaching)
        assert results["mean"][position] == pytest.approx(sum(reaching) / len(reaching))
    assert per_position_loss(predictions=losses)["mean"] == pytest.approx(results["mean"])


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_bands_are_those_of_documents_drawn_one_by_one(per_position_loss, grouped, confidence):
    losses, documents = windows()
    results = per_position_loss(
        predictions=losses, references=documents if grouped else None, confidence=confidence, num_resamples=20_000
    )
    documents = np.array(documents) if grouped else np.arange(len(losses))
    members = [np.flatnonzero(documents == document) for document in np.unique(documents)]
    generator = np.random.default_rng(1)
    means = np.full((4000, 9), np.nan)
    for row in means:
        drawn = np.concatenate([members[i] for i in generator.integers(0, len(members), len(members))])
        for position in range(9):
            reaching = [losses[window][position] for window in drawn if len(losses[window]) > position]
            row[position] = np.mean(reaching) if reaching else np.nan
    expected = np.nanquantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    # Both are random: the ends agree as well as that many draws allow.
    np.testing.assert_allclose([results["low"], results["high"]], expected, atol=0.12)
    assert np.all(np.array(results["low"]) <= results["mean"]) and np.all(results["mean"] <= np.array(results["high"]))


def test_the_band_of_two_documents_is_known_exactly(per_position_loss):
    """Each of the three mixtures of two documents is drawn often enough to be an end of the band."""
    results = per_position_loss(predictions=[[1.0], [1.0], [1.0], [5.0]], references=["a", "a", "a", "b"])
    assert (results["mean"], results["low"], results["high"]) == ([2.0], [1.0], [5.0])
    results = per_position_loss(predictions=[[1.0], [1.0], [1.0], [5.0]], references=[0, 0, 0, 1], confidence=0.2)
    assert (results["low"], results["high"]) == ([2.0], [2.0])


def test_a_band_over_documents_is_wider_than_over_their_windows(per_position_loss):
    generator = np.random.default_rng(0)
    losses = [[document] for document in generator.normal(3, 1, size=10) for _ in range(20)]
    documents = [index // 20 for index in range(200)]
    clustered = per_position_loss(predictions=losses, references=documents)
    independent = per_position_loss(predictions=losses)
    assert clustered["high"][0] - clustered["low"][0] > 3 * (independent["high"][0] - independent["low"][0])


def test_the_seed_fixes_the_band(per_position_loss):
    losses, documents = windows()
    results = [per_position_loss(predictions=losses, references=documents, seed=seed) for seed in (0, 0, 1)]
    assert results[0] == results[1]
    assert results[0]["low"] != results[2]["low"]
    assert results[0]["mean"] == results[2]["mean"]


def test_no_band_where_one_document_is_alone(per_position_loss):
    results = per_position_loss(predictions=[[1.0, 2.0], [2.0], [1.0, 4.0]], references=["a", "b", "a"])
    assert results["mean"] == [pytest.approx(4 / 3), 3.0]
    assert math.isfinite(results["low"][0]) and math.isnan(results["low"][1]) and math.isnan(results["high"][1])
    # A single draw holds neither of the two documents that reach the second position.
    losses = [[1.0, 1.0], [1.0, 1.0], *[[1.0]] * 3]
    ends = [per_position_loss(predictions=losses, num_resamples=1, seed=seed)["low"][1] for seed in range(60)]
    assert {1.0} < {-1.0 if math.isnan(end) else end for end in ends} == {1.0, -1.0}


def test_long_windows_are_computed_in_blocks(per_position_loss):
    losses = np.random.default_rng(0).uniform(size=(6, 2500))
    whole = per_position_loss(predictions=losses, num_resamples=50)
    assert len(whole["low"]) == 2500
    part = per_position_loss(predictions=losses[:, 2040:2060], num_resamples=50)
    np.testing.assert_allclose(whole["low"][2040:2060], part["low"], rtol=1e-12)


def test_windows_can_be_added_in_batches(metric):
    losses, documents = windows()
    module = metric("per_position_loss")
    expected = module.compute(predictions=losses, references=documents)
    module.add_batch(predictions=losses[:10], references=documents[:10])
    module.add(prediction=losses[10], reference=documents[10])
    module.add_batch(predictions=losses[11:], references=[str(document) for document in documents[11:]])
    assert module.compute() == expected
    module.add(prediction=[1.0, 2.0])
    assert module.compute()["mean"] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": []}, "predictions are empty: give the losses of at least one window"),
        ({"predictions": [[1.0], []]}, "window 1 is empty: leave it out"),
        ({"predictions": [[1.0], [1.0, math.nan]]}, "loss at position 1 of window 1 is nan: repair or leave out"),
        ({"predictions": [[math.inf]]}, "loss at position 0 of window 0 is inf"),
        ({"predictions": [[1.0, None]]}, "loss at position 1 of window 0 is nan"),
        ({"predictions": [[1.0], [2.0]], "references": ["a", None]}, "1 of 2 windows have no document: give one"),
        ({"predictions": [[1.0], [2.0]], "references": ["a"]}, "Mismatch in the number of predictions"),
        ({"predictions": [[1.0]], "confidence": 95}, "confidence is 95: give a share above 0 and below 1"),
        ({"predictions": [[1.0]], "num_resamples": 0}, "num_resamples is 0: give at least 1"),
        ({"predictions": [[1.0]], "seed": -1}, "seed is -1: give a whole number from 0 on"),
    ],
)
def test_mistakes_in_losses_are_explained(per_position_loss, arguments, message):
    with pytest.raises(ValueError, match=message):
        per_position_loss(**arguments)


# Bits per byte


def test_bits_per_byte_is_its_formula_and_that_of_results(bits_per_byte):
    texts, nats, num_tokens = ["A fox.", "Zwei Füße \U0001f600", ""], [7.25, 31.5, 0.5], 19
    results = bits_per_byte(predictions=nats, references=texts)
    assert results["bytes"] == 6 + 12 + 4
    assert results["bytes"] == len("".join(texts).encode())
    assert results["bits"] == pytest.approx(sum(nats) * math.log2(math.e), rel=1e-15)
    assert results["bits_per_byte"] == results["bits"] / results["bytes"]
    loss = sum(nats) / num_tokens
    assert results["bits_per_byte"] == pytest.approx(mean_loss.bits_per_byte_of_loss(loss, num_tokens, 22), rel=1e-15)
    assert mean_loss.bits_per_byte_of_loss(math.log(2), 8, 1) == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("nats", "texts", "message"),
    [
        ([], [], "predictions are empty: give at least one text"),
        ([1.0], [""], "the texts have no bytes"),
        ([1.0, -2.0], ["a", "b"], "negative log likelihood of text 1 is -2.0: it has to be finite and at least 0"),
        ([math.nan], ["a"], "of text 0 is nan"),
        ([math.inf], ["a"], "of text 0 is inf"),
        ([None], ["a"], "of text 0 is None"),
        ([1.0], ["a", "b"], "Mismatch in the number of predictions"),
        ([1.0, 1.0], ["a", None], "text 1 is missing"),
    ],
)
def test_mistakes_in_likelihoods_are_explained(bits_per_byte, nats, texts, message):
    with pytest.raises(ValueError, match=message):
        bits_per_byte(predictions=nats, references=texts)


# Total variation distance


def distributions(*lengths, symbols=5, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.dirichlet(np.ones(symbols), size=length) for length in lengths]


def test_the_distance_is_the_largest_difference_of_an_event(sequence_tvd):
    """By its definition: over all sets of symbols, the largest difference of their probabilities."""
    predicted, true = distributions(3, 1, 4), distributions(3, 1, 4, seed=1)
    events = np.array([[(event >> symbol) & 1 for symbol in range(5)] for event in range(32)])
    expected = [np.abs(events @ (p - q)).max() for p, q in zip(np.vstack(predicted), np.vstack(true), strict=True)]
    results = sequence_tvd(predictions=predicted, references=true)
    assert results == {"tvd": pytest.approx(np.mean(expected)), "l1": 2 * results["tvd"], "count": 8}
    last = sequence_tvd(predictions=predicted, references=true, positions="last")
    assert last["tvd"] == pytest.approx(np.mean([expected[2], expected[3], expected[7]]))
    assert last["count"] == 3


def test_the_distance_is_zero_of_equal_and_one_of_disjoint_distributions(sequence_tvd):
    same = distributions(4, 2)
    assert sequence_tvd(predictions=same, references=same) == {"tvd": 0.0, "l1": 0.0, "count": 6}
    results = sequence_tvd(predictions=[np.eye(4)], references=[np.eye(4)[::-1]])
    assert results == {"tvd": 1.0, "l1": 2.0, "count": 4}


GOOD = [[0.5, 0.5], [0.25, 0.75]]


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        ([], "predictions are empty: give at least one sequence"),
        ([[]], r"predictions\[0\] has no positions: leave the sequence out"),
        ([GOOD[:1]], r"predictions\[0\] has shape \(1, 2\) \(positions, symbols\), but references\[0\] \(2, 2\)"),
        ([[[1.0, 0.0, 0.0]] * 2], r"shape \(2, 3\) .* but references\[0\] \(2, 2\)"),
        ([[[0.5, 0.5], [1.0]]], r"predictions\[0\] has rows of 1 to 2 symbols"),
        ([[[0.5, 0.5], [0.5, 0.502]]], r"predictions\[0\], position 1, is no probability distribution .*sum 1.00"),
        ([[[2.0, -1.0], [0.5, 0.5]]], r"predictions\[0\], position 0, is no .*smallest entry -1\.0, sum 1\.0"),
        ([[[math.nan, 1.0], [0.5, 0.5]]], r"predictions\[0\], position 0, is no .*not logits"),
        ([GOOD, GOOD], "Mismatch in the number of predictions"),
    ],
)
def test_mistakes_in_distributions_are_explained(sequence_tvd, predicted, message):
    with pytest.raises(ValueError, match=message):
        sequence_tvd(predictions=predicted, references=[GOOD] if predicted else [])
    assert sequence_tvd(predictions=[GOOD], references=[GOOD])["tvd"] == 0.0  # an error leaves nothing behind


def test_rounding_of_probabilities_is_allowed(sequence_tvd):
    rounded = [[[0.333, 0.333, 0.333]]]
    exact = [[[1 / 3, 1 / 3, 1 / 3]]]
    assert sequence_tvd(predictions=rounded, references=exact)["tvd"] == pytest.approx(0.0005)
    with pytest.raises(ValueError, match=r"references\[0\], position 0"):
        sequence_tvd(predictions=exact, references=[[[0.33, 0.33, 0.33]]])


def test_other_positions_are_refused(sequence_tvd):
    with pytest.raises(ValueError, match="positions is 'first': give 'all' or 'last'"):
        sequence_tvd(predictions=[GOOD], references=[GOOD], positions="first")


def test_stored_bits_are_counted(bits_per_byte):
    plain = bits_per_byte(predictions=[3.0], references=["an owl"])
    stored = bits_per_byte(predictions=[3.0], references=["an owl"], stored_bits=12)
    assert stored["bits"] == plain["bits"] + 12
    assert stored["bits_per_byte"] == pytest.approx(plain["bits_per_byte"] + 2)
    assert stored["bits_per_byte_of_text"] == plain["bits_per_byte"]
    assert set(plain) == {"bits_per_byte", "bits", "bytes"}
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"stored_bits is {bad}"):
            bits_per_byte(predictions=[3.0], references=["an owl"], stored_bits=bad)


# Token accuracy, entropy ratio and retrieval: tokens recovered from a memory


def test_accuracy_counts_targets_alone(token_accuracy):
    results = token_accuracy(predictions=[[1, 2, 3], [4, 5], [9]], references=[[1, 0, 3], [-100, 5], [-100]])
    assert (results["accuracy"], results["exact"], results["count"]) == (3 / 4, 1 / 2, 4)
    assert results["by_place"] == [1.0, 0.5, 1.0]
    again = token_accuracy(predictions=[[1, 2]], references=[[1, 0]], ignore_index=0)
    assert (again["accuracy"], again["count"]) == (1.0, 1)


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([[1, 2]], [[1]], "has 2 tokens, but references"),
        ([[1]], [[-100]], "no target"),
        ([[]], [[]], "no target"),
        ([[1], [2, None]], [[1], [2, 3]], "token missing in sequence 1: give -100"),
        ([[1, 2]], [[None, 2]], "token missing in sequence 0"),
    ],
)
def test_mistakes_in_tokens_are_explained(token_accuracy, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        token_accuracy(predictions=predictions, references=references)


def test_the_ratio_of_a_uniform_guess_is_zero_and_of_a_guess_by_frequencies_is_not(entropy_ratio):
    text = np.random.default_rng(0).choice(8000, 5000, p=(lambda w: w / w.sum())(1 / np.arange(1, 8001))).tolist()
    results = entropy_ratio(predictions=[5000 * math.log(8000)], references=[text], vocab_size=8000)
    assert results["entropy_ratio"] == pytest.approx(0)
    assert results["uniform_cross_entropy"] == math.log(8000) != pytest.approx(9.03, abs=0.01)
    shares = np.bincount(text, minlength=8000) / 5000
    assert results["unigram_cross_entropy"] == pytest.approx(-np.log(shares[text]).mean())
    assert results["unigram_entropy_ratio"] > 0.1
    # The unigram guess, scored as a model, has the same ratio.
    of_guess = entropy_ratio(predictions=[5000 * results["unigram_cross_entropy"]], references=[text], vocab_size=8000)
    assert of_guess["entropy_ratio"] == pytest.approx(results["unigram_entropy_ratio"])


def test_no_guess_by_frequencies_beats_that_of_the_texts_own(entropy_ratio):
    given = {"predictions": [1.0], "references": [[5] * 9 + [7]], "vocab_size": 8000}
    of_references = entropy_ratio(**given)["unigram_cross_entropy"]
    assert of_references == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    for share in (10, 1000, 10**9):
        frequencies = [0] * 8000
        frequencies[5], frequencies[7] = 9 * share, share
        assert entropy_ratio(**given, frequencies=frequencies)["unigram_cross_entropy"] > of_references


def test_frequencies_may_be_of_another_text(entropy_ratio):
    results = entropy_ratio(predictions=[1.0], references=[[0, 1]], vocab_size=2, frequencies=[2, 0])
    assert results["unigram_cross_entropy"] == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"references": [[0, 4]]}, "range from 0 to 4, but vocab_size is 4"),
        ({"references": [[0, -1]]}, "range from -1 to 0"),
        ({"references": [[]]}, "no tokens"),
        ({"references": [[0, None]]}, "a token of the references is missing"),
        ({"predictions": [-1.0]}, "is -1.0"),
        ({"predictions": [math.nan]}, "is nan"),
        ({"vocab_size": 1}, "vocab_size is 1"),
        ({"frequencies": [1, 2]}, "there are 2 frequencies"),
        ({"frequencies": []}, "there are 0 frequencies"),
        ({"frequencies": [1, 2, -1, 0]}, "frequency of token 2 is -1"),
        ({"frequencies": [1, math.nan, 1, 0]}, "frequency of token 1 is nan"),
    ],
)
def test_mistakes_in_frequencies_and_tokens_are_explained(entropy_ratio, settings, message):
    with pytest.raises(ValueError, match=message):
        entropy_ratio(**{"predictions": [1.0], "references": [[0, 1]], "vocab_size": 4} | settings)


def test_each_query_chooses_among_all_candidates(retrieval_accuracy):
    generator = np.random.default_rng(0)
    queries, noise = generator.normal(size=(2, 6, 5))
    candidates = queries + noise
    results = retrieval_accuracy(predictions=queries.tolist(), references=candidates.tolist(), temperature=0.5)
    num_right, losses = 0, []
    for index, query in enumerate(queries):
        cosines = [query @ c / np.linalg.norm(query) / np.linalg.norm(c) for c in candidates]
        num_right += int(np.argmax(cosines) == index)
        losses.append(-math.log(math.exp(cosines[index] / 0.5) / sum(math.exp(c / 0.5) for c in cosines)))
    assert 0 < num_right < 6
    assert results["accuracy"] == num_right / 6
    assert results["info_nce"] == pytest.approx(np.mean(losses))
    assert results["chance_info_nce"] == math.log(6)


def test_the_largest_cosine_of_all_says_nothing_of_the_other_queries(retrieval_accuracy):
    queries, candidates = [[1.0, 0.0], [1.0, 0.1]], [[1.0, 0.0], [0.0, 1.0]]
    flat = np.argmax(np.array(queries) @ np.array(candidates).T)
    assert flat == 0  # at a right pair, though the second query is wrong
    assert retrieval_accuracy(predictions=queries, references=candidates)["accuracy"] == 0.5


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([[1.0]], [[1.0]], "there are 1 candidates"),
        ([[1.0, 2.0], [0.0, 0.0]], [[1.0, 2.0], [1.0, 1.0]], r"predictions\[1\] has no direction"),
        ([[1.0], [2.0]], [[1.0, 2.0], [1.0, 1.0]], "must be alike"),
        ([[1.0], [2.0, 1.0]], [[1.0], [1.0]], "predictions have 1 to 2 numbers"),
    ],
)
def test_mistakes_in_embeddings_are_explained(retrieval_accuracy, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        retrieval_accuracy(predictions=predictions, references=references)
