# SPDX-License-Identifier: Apache-2.0
"""Reading few of many pairs: errors are within their certificates, and certificates within what is asked."""

import pytest
import torch
from helpers.kinds import make_mosaic
from helpers.models import make_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_memory_mosaic import MosaicMemory, nearest, retrieval_memory_mosaic
from modeling_memory_mosaic.retrieval_memory_mosaic import Clusters, ExactIndex, LshIndex, UsearchIndex
from modeling_memory_mosaic.stacked_memory_mosaic import ClusterStack


def unit_vectors(generator):
    """Return a function that draws so many vectors of length 1, `(number, 6)`."""

    def draw(number):
        drawn = torch.randn(number, 6, generator=generator, dtype=torch.float64)
        return drawn / drawn.norm(dim=-1, keepdim=True)

    return draw


@settings(max_examples=60, deadline=None)
@given(
    num_pairs=st.integers(1, 300),
    num_clusters=st.integers(1, 30),
    length=st.sampled_from([0.1, 1.0, 3.0, 10.0, 30.0]),
    tolerance=st.sampled_from([1e-6, 1e-3, 0.1, 1.0]),
    num_others=st.integers(0, 5),
    with_counts=st.booleans(),
    one_in=st.sampled_from([1, 4]),
    seed=st.integers(0, 1000),
)
def test_the_error_is_within_its_certificate(
    num_pairs, num_clusters, length, tolerance, num_others, with_counts, one_in, seed
):
    generator = torch.Generator().manual_seed(seed)
    vectors = unit_vectors(generator)
    keys, values = length * vectors(num_pairs), vectors(num_pairs)
    bias = torch.zeros(num_pairs, dtype=torch.float64)
    if with_counts:
        bias = torch.randint(1, 5, (num_pairs,), generator=generator).double().log()
    query, other_keys, other_values = length * vectors(1)[0], length * vectors(num_others), vectors(num_others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval_memory_mosaic, "ONE_IN", one_in)
        found = Clusters.of(keys, values, bias, num_clusters).read(query, other_keys @ query, tolerance)
    assert len(found.places) * one_in <= num_pairs or len(found.places) == num_pairs
    clusters = Clusters.of(keys, values, bias, num_clusters)
    weights = torch.cat([found.scores, found.whole_scores, other_keys @ query]).softmax(0)
    retrieved = weights @ torch.cat([found.values, found.means, other_values])
    scores = torch.cat([keys @ query + bias, other_keys @ query])
    expected = scores.softmax(0) @ torch.cat([values, other_values])
    assert (retrieved - expected).norm() <= found.bound + 1e-12
    assert found.bound <= tolerance
    # The mass that was not read one by one is at most what is reported.
    is_left = torch.ones(num_pairs, dtype=torch.bool)
    order = torch.cat(
        [(keys == key).all(-1).nonzero()[:1, 0] for key in clusters.keys[found.places]] or [keys.new_zeros(0)]
    )
    is_left[order.long()] = False
    assert scores.softmax(0)[:num_pairs][is_left].sum() <= found.mass + 1e-12


@settings(max_examples=60, deadline=None)
@given(
    num_pairs=st.integers(1, 300),
    length=st.sampled_from([0.1, 1.0, 3.0, 10.0]),
    max_share=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    num_others=st.integers(0, 5),
    make=st.sampled_from([None, ExactIndex, LshIndex]),
    seed=st.integers(0, 1000),
)
def test_a_share_of_pairs_has_a_certificate_too(num_pairs, length, max_share, num_others, make, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = unit_vectors(generator)
    keys, values, bias = length * vectors(num_pairs), vectors(num_pairs), torch.zeros(num_pairs, dtype=torch.float64)
    query, other_keys, other_values = length * vectors(1)[0], length * vectors(num_others), vectors(num_others)
    clusters = Clusters.of(keys, values, bias, 20)
    clusters.index = make and make(clusters.keys)
    found = clusters.read(query, other_keys @ query, 1e-6, max_share)
    assert len(found.places) <= max_share * num_pairs
    weights = torch.cat([found.scores, found.whole_scores, other_keys @ query]).softmax(0)
    retrieved = weights @ torch.cat([found.values, found.means, other_values])
    expected = torch.cat([keys, other_keys]) @ query
    expected = expected.softmax(0) @ torch.cat([values, other_values])
    assert (retrieved - expected).norm() <= found.bound + 1e-12 and found.bound <= 2


@pytest.fixture(params=[{}, "mosaic v2"], ids=["v1", "v2"])
def model(request, monkeypatch):
    monkeypatch.setattr(retrieval_memory_mosaic, "FEWEST_PAIRS", 10)
    # Never all pairs at once, so that each tolerance reads others.
    monkeypatch.setattr(retrieval_memory_mosaic, "ONE_IN", 1)
    return make_mosaic(request.param, dtype=torch.float64)


def many(model):
    return MosaicMemory.union([model.memorize(make_ids(1, n, seed=n), source=str(n)) for n in (90, 60, 75)])


@torch.no_grad()
def answer(model, memory, question):
    return model(**memory.prompt(question)).logits


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_answers_come_near_as_the_tolerance_falls(num_tokens, model):
    memory, question = many(model), make_ids(2, num_tokens, seed=5)
    expected, errors, visited = answer(model, memory, question), [], []
    for tolerance in (1.0, 0.1, 1e-3, 1e-9):
        with nearest(model, tolerance) as report:
            errors.append(float((answer(model, memory, question) - expected).abs().max()))
        visited.append(report.summary()["visited"])
        assert report.summary()["largest_bound"] <= tolerance * 2
        assert len(report.bound) == 6 and all(len(one) == 2 * num_tokens for one in report.bound.values())
    assert errors[-1] < 1e-8 and errors[0] > errors[2] > errors[3]
    assert visited[0] < visited[1] < visited[2] <= visited[3] <= 1
    # Outside, everything is read.
    assert torch.equal(answer(model, memory, question), expected)


def test_a_question_is_read_in_parts_and_generated_from(model):
    memory, question = many(model), make_ids(1, 6, seed=5)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 61}
    expected = model.generate(**memory.prompt(question), **settings)
    with nearest(model, 1e-9) as report:
        assert torch.equal(model.generate(**memory.prompt(question), **settings), expected)
        beams = model.generate(**memory.prompt(question), num_beams=3, **settings)
    assert torch.equal(beams, model.generate(**memory.prompt(question), num_beams=3, **settings))
    assert report.visited


def test_clusters_are_made_once_and_only_of_many_pairs(model, monkeypatch):
    memory, question = many(model), make_ids(1, 3)
    with nearest(model) as report:
        answer(model, memory, question)
        monkeypatch.setattr(Clusters, "of", None)
        answer(model, memory, question)
        memory_of_one = model.memorize(make_ids(1, 8), source="short")
        answer(model, memory_of_one, question)
        model(question)
    assert all(len(one) == 6 for one in report.visited.values())


@pytest.mark.parametrize("tolerance", [0, -1e-3, 2.5, float("nan")])
def test_a_tolerance_that_cannot_be_met_is_refused(tolerance, model):
    with pytest.raises(ValueError, match="tolerance"), nearest(model, tolerance):
        pass
    with pytest.raises(ValueError, match="no memories"), nearest(torch.nn.Linear(2, 2)):
        pass


INDEXES = ["exact", "lsh", "usearch", ExactIndex, lambda keys: Blind()]
INDEX_NAMES = ["exact", "lsh", "usearch", "class", "blind"]


class Blind:
    """An index that finds nothing."""

    def search(self, queries, k):
        return torch.full((len(queries), k), -1)


@pytest.mark.parametrize("index", INDEXES, ids=INDEX_NAMES)
def test_any_index_keeps_the_tolerance(index, model):
    memory, question = many(model), make_ids(2, 3, seed=5)
    expected = answer(model, memory, question)
    for tolerance, largest in ((1e-1, 1.0), (1e-9, 1e-7)):
        with nearest(model, tolerance, index) as report:
            error = float((answer(model, memory, question) - expected).abs().max())
        assert error < largest and report.summary()["largest_bound"] <= 2 * tolerance
        assert all(0 <= share <= 1 for one in report.visited.values() for share in one)


ALL_INDEXES = {"clusters": "clusters"} | dict(zip(INDEX_NAMES, INDEXES, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("index", ALL_INDEXES.values(), ids=ALL_INDEXES)
def test_a_text_is_forgotten_after_its_pairs_were_clustered(index, model):
    """No index and no cluster brings its pairs back, and a copy in a cache of before keeps them."""
    memory, question = many(model), make_ids(1, 3, seed=5)
    whole = answer(model, memory, question)
    rest = MosaicMemory.union([model.memorize(make_ids(1, n, seed=n), source=str(n)) for n in (90, 75)])
    expected = answer(model, rest, question)
    with nearest(model, 1e-9, index) as report:
        before = memory.prompt(question)
        assert (answer(model, memory, question) - whole).abs().max() < 1e-7
        assert all(memory.indexes[layer] for layer in memory.indexes)
        memory.forget("60")
        assert (answer(model, memory, question) - expected).abs().max() < 1e-7
        clusters, _ = next(iter(memory.indexes[0].values()))
        assert {len(one.keys) for one in clusters} == {89 + 74}
        assert (model(**before).logits - whole).abs().max() < 1e-7
    assert report.summary()["largest_bound"] <= 2e-9 and (whole - expected).abs().max() > 1e-3


@torch.no_grad()
def test_fewer_clusters_are_wider_so_that_more_pairs_are_read(model):
    question, visited = make_ids(1, 3, seed=5), []
    for num_clusters in (60, 8, 1):
        memory = many(model)
        with nearest(model, 0.5, num_clusters=num_clusters) as report:
            answer(model, memory, question)
        visited.append(report.summary()["visited"])
        for layer in memory.indexes.values():
            ((name, (clusters, _)),) = layer.items()
            assert name[0] == num_clusters and all(len(one.centres) <= num_clusters for one in clusters)
            assert num_clusters == 1 or len(clusters[0].centres) > 1
    assert visited[0] < visited[1] <= visited[2]


def test_an_index_that_was_made_cannot_serve_several_heads(model):
    """It has keys of one head: what makes indexes is asked for instead."""
    made = ExactIndex(torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"has `search`, but .* one head.*`index=lambda keys: ...`"):
        nearest(model, index=made).__enter__()


@settings(max_examples=60, deadline=None)
@given(
    num_pairs=st.integers(1, 300),
    num_clusters=st.integers(1, 30),
    length=st.sampled_from([1.0, 3.0, 10.0]),
    tolerance=st.sampled_from([1e-6, 1e-3, 0.1]),
    make=st.sampled_from([ExactIndex, LshIndex, UsearchIndex]),
    with_counts=st.booleans(),
    one_in=st.sampled_from([1, 4]),
    seed=st.integers(0, 1000),
)
def test_pairs_that_an_index_finds_are_counted_once(
    num_pairs, num_clusters, length, tolerance, make, with_counts, one_in, seed
):
    generator = torch.Generator().manual_seed(seed)
    vectors = unit_vectors(generator)
    keys, values, query = length * vectors(num_pairs), vectors(num_pairs), length * vectors(1)[0]
    bias = torch.zeros(num_pairs, dtype=torch.float64)
    if with_counts:
        bias = torch.randint(1, 5, (num_pairs,), generator=generator).double().log()
    clusters = Clusters.of(keys, values, bias, num_clusters)
    clusters.index = make(clusters.keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval_memory_mosaic, "ONE_IN", one_in)
        found = clusters.read(query, query[:0], tolerance)
    assert len(found.places.unique()) == len(found.places)
    weights = torch.cat([found.scores, found.whole_scores]).softmax(0)
    retrieved = weights @ torch.cat([found.values, found.means])
    expected = (keys @ query + bias).softmax(0) @ values
    assert (retrieved - expected).norm() <= found.bound + 1e-11
    assert found.bound <= tolerance


def test_an_exact_index_finds_the_nearest_and_hashing_most_of_them():
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(4000, 16, generator=generator), torch.randn(20, 16, generator=generator)
    nearest_ones = (queries @ keys.T).topk(10).indices
    assert torch.equal(ExactIndex(keys).search(queries, 10), nearest_ones)
    for index, least in ((LshIndex, 0.5), (UsearchIndex, 0.9)):
        found = index(keys).search(queries, 10)
        shares = [len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), nearest_ones.tolist(), strict=True)]
        assert sum(shares) / len(shares) >= least, index


@torch.no_grad()
def test_a_larger_share_comes_nearer(model):
    memory, question = many(model), make_ids(2, 3, seed=5)
    expected, errors = answer(model, memory, question), []
    for share in (0.05, 0.3, 1.0):
        with nearest(model, 1e-9, max_share=share) as report:
            errors.append(float((answer(model, memory, question) - expected).abs().max()))
        assert all(one <= share for shares in report.visited.values() for one in shares)
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-8
    assert report.summary()["largest_bound"] < 1e-8
    for share in (0, 1.5, -1.0):
        with pytest.raises(ValueError, match="max_share="), nearest(model, max_share=share):
            pass


def test_an_unknown_index_is_refused(model):
    with pytest.raises(ValueError, match="index='trees' is not one of clusters, exact, lsh, usearch"):
        nearest(model, index="trees").__enter__()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    length=st.sampled_from([0.1, 1.0, 3.0, 10.0]),
    max_share=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    tolerance=st.sampled_from([1e-6, 0.05, 0.5]),
    num_others=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_all_heads_at_once_read_what_each_reads_alone(sizes, length, max_share, tolerance, num_others, seed):
    """Heads of different numbers of pairs, as a consolidated memory has, some of which stand for several."""
    generator = torch.Generator().manual_seed(seed)
    vectors = unit_vectors(generator)
    counts = [torch.randint(1, 4, (size,), generator=generator).double().log() for size in sizes]
    heads = [
        Clusters.of(length * vectors(size), vectors(size), bias, 12) for size, bias in zip(sizes, counts, strict=True)
    ]
    query, others = length * vectors(len(sizes)), torch.randn(len(sizes), num_others, generator=generator).double()
    other_values = vectors(len(sizes) * num_others).view(len(sizes), num_others, 6)
    alone = [one.read(query[head], others[head], tolerance, max_share) for head, one in enumerate(heads)]
    stack, limit = ClusterStack.of(heads), torch.tensor([one.limit(max_share) for one in heads])
    is_wide = stack.asks_for_more(query, others, tolerance, limit)
    read = stack.read_nearest(query, others, other_values, limit)
    everything = stack.read_all(query, others, other_values)
    for head, one in enumerate(alone):
        if is_wide[head]:
            weights = torch.cat([one.scores, one.whole_scores, others[head]]).softmax(0)
            expected = weights @ torch.cat([one.values, one.means, other_values[head]])
            torch.testing.assert_close(read.retrieved[head], expected, rtol=0, atol=1e-12)
            assert (int(read.num_read[head]), float(read.bound[head])) == (len(one.places), pytest.approx(one.bound))
            assert float(read.mass[head]) == pytest.approx(one.mass)
        own = heads[head]
        weights = torch.cat([own.keys @ query[head] + own.bias, others[head]]).softmax(0)
        expected = weights @ torch.cat([own.values, other_values[head]])
        torch.testing.assert_close(everything[head], expected, rtol=0, atol=1e-12)
