# SPDX-License-Identifier: Apache-2.0
"""Rows of documents and a question: each question has one answer, and models read the rows as is said of them."""

import random

import pytest
import torch
from helpers.models import make_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, set_seed

from modeling_memory_mosaic import MosaicMemory
from training.baselines.shifted_rope import ShiftedGPTNeoXConfig, ShiftedGPTNeoXForCausalLM
from training.experiments.join import about_one, largest_difference, reordered, without
from training.synthetic import recall
from training.synthetic.readings import Reading, labelled_batch, model_inputs, own_positions
from training.synthetic.recall import RecallDataset, RecallSection, recall_tokenizer, score_rows
from training.text.fact_writer import NAMES, write_facts
from training.text.question_rows import IGNORED, FactRows, Row, features, pad, window_features


KINDS = ("pairs", "facts", "stories")
SIZES = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ROPE = {"intermediate_size": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
ROPE |= {"use_parallel_residual": False, "max_position_embeddings": 4096, "initializer_range": 0.2}


def section(kind="pairs", **settings):
    return RecallSection(language="recall", kind=kind, num_rows=50, num_test=8, **settings)


def rows_of(kind, num_documents=None, num_rows=8, **settings):
    dataset = RecallDataset(section(kind, **settings), num_rows, "test", num_documents)
    return [dataset.row(index) for index in range(num_rows)]


def transformer(kind):
    set_seed(0)
    if kind == "rope":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **ROPE)).eval()
    return ShiftedGPTNeoXForCausalLM(ShiftedGPTNeoXConfig(**SIZES, **ROPE)).eval()


def mosaic(**settings):
    return make_model(**SIZES | {"max_position_embeddings": 64} | settings).eval()


# Facts


@pytest.mark.parametrize("seed", range(20))
def test_a_question_has_one_answer_in_one_document(seed):
    documents, questions = write_facts(random.Random(seed), 1 + seed, 5)
    assert len(documents) == 1 + seed and len(questions) == min(5, 1 + seed)
    assert len({question.asked for question in questions}) == len(questions)
    for question in questions:
        words = question.text.rstrip("?").split()
        assert question.answer in documents[question.asked]
        # What a question names stands together in that document alone.
        named = {"who": words[3:], "where": words[3:], "what": words[2:3], "colour": words[-2:-1]}[question.kind]
        holders = [index for index, document in enumerate(documents) if " ".join(named) in document.split(". ")[0]]
        assert holders == [question.asked], (question, documents)


def test_rows_have_at_most_as_many_documents_as_names():
    assert len({name for name, _ in NAMES}) == len(NAMES) >= 64
    write_facts(random.Random(0), len(NAMES))
    for number in (0, len(NAMES) + 1):
        with pytest.raises(ValueError, match=f"num_documents is {number}"):
            write_facts(random.Random(0), number)


def test_rows_of_facts_fit_and_do_not_depend_on_their_number():
    tokenizer = recall_tokenizer()
    rows = FactRows(tokenizer, 100, 50, "train", 4, 4)
    assert all(len(rows[index]["input_ids"]) <= 100 for index in range(50))
    assert {len(rows.row(index).documents) for index in range(50)} >= {1, 2, 3}
    assert rows[3] == FactRows(tokenizer, 100, 5, "train", 4, 4)[3] != FactRows(tokenizer, 100, 5, "test", 4, 4)[3]
    with pytest.raises(ValueError, match="take more than 10 tokens"):
        FactRows(tokenizer, 10, 50, "train", 4, 4)[0]
    with pytest.raises(IndexError):
        rows[50]


# Rows


@pytest.mark.parametrize("kind", KINDS)
def test_answers_stand_in_the_documents_that_are_asked(kind):
    for row in rows_of(kind, max_documents=5):
        numbers = [answer for answer in row.answers if answer >= 0]
        assert len(row.question) == len(row.answers) and 1 <= len(row.documents) <= 5
        if kind == "stories":
            assert row.question == row.documents[row.asked[0]] and numbers == list(range(len(row.question) - 1))
            continue
        assert sorted(set(numbers)) == list(range(len(row.asked)))
        for number, document in enumerate(row.asked):
            answer = [t for t, n in zip(row.question, row.answers, strict=True) if n == number]
            tokens = row.documents[document]
            if kind == "pairs":
                key = row.question[row.question.index(answer[0]) - 1] if row.question.count(answer[0]) == 1 else None
                assert key is None or tokens[tokens.index(key) + 1] == answer[0]
            else:
                assert recall_tokenizer().decode(answer[:-2]).strip() in recall_tokenizer().decode(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_fresh_and_depend_on_split_and_index_alone(kind):
    sets = {split: RecallDataset(section(kind), 6, split) for split in ("train", "validation", "test")}
    rows = [str(one[index]) for one in sets.values() for index in range(6)]
    assert len(set(rows)) == len(rows)
    assert sets["train"][2] == RecallDataset(section(kind), 3, "train")[2]
    with pytest.raises(IndexError):
        sets["train"][6]


def test_a_batch_is_padded_on_the_right_and_answers_are_its_labels():
    rows = [features(row) for row in rows_of("facts")] + [window_features([5, 6, 7])]
    batch = pad(rows)
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][place, :length].tolist() == row["input_ids"]
        assert batch["labels"][place, :length].tolist() == row["labels"]
        assert (batch["labels"][place, length:] == IGNORED).all() and (
            batch["document_ids"][place, length:] == -1
        ).all()
    assert ((batch["labels"] != IGNORED) == (batch["answers"] >= 0))[:-1].all()
    assert batch["labels"][-1, :3].tolist() == [5, 6, 7] and not batch["is_question"][-1].any()


# Readings


def alone(model, row):
    """Return the logits behind a question `(T, V)`, by the memory of documents that are each read alone."""
    memories = [model.memorize(torch.tensor([ids]), source=str(n)) for n, ids in enumerate(row.documents)]
    return model(**MosaicMemory.union(memories).prompt(torch.tensor([row.question]))).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mosaic_is_trained_in_what_joined_memories_compute(kind):
    model, rows = mosaic().double(), rows_of(kind, max_documents=3, num_rows=3)
    batch = pad([features(row) for row in rows])
    logits = model(**model_inputs(model.config, batch, Reading())).logits
    for place, row in enumerate(rows):
        expected = alone(model, row)
        torch.testing.assert_close(logits[place, batch["is_question"][place]], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("positions", ["own", "running"])
@pytest.mark.parametrize("kind", ["rope", "shift"])
def test_documents_of_a_transformer_do_not_see_each_other_and_questions_see_all(kind, positions):
    model = transformer(kind)
    row, reading = rows_of("facts", 3, 1)[0], Reading(True, positions)
    batch = pad([features(row)])
    logits = model(**model_inputs(model.config, batch, reading)).logits[0]
    changed = pad([features(row._replace(documents=[row.documents[0], row.documents[0][::-1], row.documents[2]]))])
    if len(row.documents[0]) != len(row.documents[1]):
        size = len(row.documents[1])
        other = (row.documents[0] * 4)[:size]
        changed = pad([features(row._replace(documents=[row.documents[0], other, row.documents[2]]))])
    again = model(**model_inputs(model.config, changed, reading)).logits[0]
    is_other = batch["document_ids"][0] == 1
    is_same = ~is_other & ~batch["is_question"][0]
    torch.testing.assert_close(logits[is_same], again[is_same], rtol=0, atol=1e-5)
    assert (logits - again)[batch["is_question"][0]].abs().amax(-1).min() > 1e-6
    first = model(input_ids=torch.tensor([row.documents[0]]), use_cache=False).logits[0]
    torch.testing.assert_close(logits[: len(first)], first, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["rope", "shift"])
def test_stored_keys_answer_in_any_order_alike_and_rotated_ones_do_not(kind):
    model, rows = transformer(kind), rows_of("facts", 4, 2)
    orders = [[reordered(row, order) for row in rows] for order in ([0, 1, 2, 3], [3, 1, 0, 2])]
    assert largest_difference(model, orders, Reading(True, "own")) < 1e-4
    assert largest_difference(model, orders, Reading(True, "running")) > 1e-3
    assert largest_difference(mosaic(), orders, Reading()) < 1e-4
    assert largest_difference(mosaic(), orders, Reading(is_joined=False)) > 1e-3


def test_own_positions_start_again_and_questions_stand_behind_the_longest():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, -1]])
    is_question = documents == 2
    assert own_positions(documents)[0, :7].tolist() == [0, 1, 0, 1, 2, 0, 1]
    assert own_positions(documents, is_question)[0, :7].tolist() == [0, 1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["rope", "shift"])
def test_parallel_encoding_of_temperature_and_scale_1_is_plain_attention_and_others_are_not(kind):
    model, rows = transformer(kind), rows_of("facts", 3, 2)
    batch = pad([features(row) for row in rows])
    plain = model(**model_inputs(model.config, batch, Reading(True, "own"))).logits
    model.set_attn_implementation("parallel_encoding")
    is_question, is_text = batch["is_question"], batch["document_ids"] >= 0
    same = model(**model_inputs(model.config, batch, Reading(True, "own", 1.0, 1.0))).logits
    torch.testing.assert_close(same[is_text], plain[is_text], rtol=0, atol=1e-5)
    other = model(**model_inputs(model.config, batch, Reading(True, "own", 0.5, 0.8))).logits
    torch.testing.assert_close(other[is_text & ~is_question], plain[is_text & ~is_question], rtol=0, atol=1e-5)
    assert (other - plain)[is_question].abs().max() > 1e-3


def test_parallel_encoding_is_its_formula():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 5, 4, dtype=torch.float64)
    of_documents = torch.tensor([[[[True, True, True, False, False]]]]).expand(1, 1, 5, 5)
    from training.synthetic.readings import parallel_encoding

    output, weights = parallel_encoding(None, query, key, value, None, 0.5, of_documents, 0.4, 0.7)
    scores = (query @ key.mT * 0.5)[0, 0]
    terms = (scores[:, :3] / 0.4).exp()
    total = terms.sum(-1, keepdim=True)
    mass = torch.cat([terms / total * total**0.7, scores[:, 3:].exp()], dim=-1)
    expected = mass / mass.sum(-1, keepdim=True)
    torch.testing.assert_close(weights[0, 0], expected)
    torch.testing.assert_close(output[0, :, 0], expected @ value[0, 0])


# Scores


class Oracle(torch.nn.Module):
    """Answers with the token that follows, unless that token is `wrong`."""

    config = GPTNeoXConfig(**SIZES)
    device = torch.device("cpu")

    def __init__(self, wrong=()):
        super().__init__()
        self.wrong = torch.tensor(list(wrong), dtype=torch.long)

    def forward(self, input_ids, **kwargs):
        following = input_ids.roll(-1, 1)
        following = torch.where(torch.isin(following, self.wrong), 0, following)
        return type("Output", (), {"logits": 20.0 * torch.nn.functional.one_hot(following, 1024).float()})


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_right_if_all_its_tokens_are(kind, batch_size):
    rows = rows_of(kind, max_documents=3)
    assert score_rows(Oracle(), rows, batch_size, Reading())["accuracy"] == 1
    wrong = next(t for row in rows for t, n in zip(row.question, row.answers, strict=True) if n >= 0 and t)
    scores = score_rows(Oracle([wrong]), rows, batch_size, Reading())
    answers = [
        [t for t, n in zip(row.question, row.answers, strict=True) if n == number]
        for row in rows
        for number in {n for n in row.answers if n >= 0}
    ]
    assert scores["num_answers"] == len(answers)
    assert scores["accuracy"] == pytest.approx(sum(wrong not in answer for answer in answers) / len(answers))


def test_the_collator_of_a_language_gives_what_a_model_reads():
    for model in (mosaic(), transformer("rope"), transformer("shift")):
        batch = recall.collator(section("pairs"), model.config)([features(row) for row in rows_of("pairs")])
        assert torch.isfinite(model(**batch).loss)
        assert batch.keys() == labelled_batch(model.config, [features(rows_of("pairs")[0])], Reading()).keys()
    assert (
        recall.tokenizer_of(section("pairs")) is None and recall.tokenizer_of(section("facts")) is recall_tokenizer()
    )


def test_rows_are_changed_as_said():
    row = Row([[1], [2], [3]], [7, 8, 9, 10], [-1, 0, -1, 1], [2, 0])
    assert reordered(row, [2, 0, 1]) == row._replace(documents=[[3], [1], [2]], asked=[0, 1])
    assert without(row, 1).documents == [[1], [3]]
    assert about_one(row, 1) == row._replace(answers=[-1, -1, -1, 0], asked=[0])
