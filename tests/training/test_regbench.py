# SPDX-License-Identifier: Apache-2.0
"""RegBench: automata, strings and measures follow their description, and the data set loads by itself."""

import evaluate
import numpy as np
import pytest
import torch
from datasets import DatasetDict, load_dataset
from helpers.models import make_model
from huggingface_hub import DatasetCard

from training.synthetic import automata
from training.synthetic.automata import (
    CHOSEN_BY,
    NUM_SYMBOLS,
    PADDING,
    SEPARATOR,
    SPLITS,
    TEST,
    TEST_IID,
    TRAIN,
    VALIDATION,
    VOCAB_SIZE,
    AutomataSection,
    Automaton,
    Predictions,
    collate,
    draw_automaton,
    draw_split,
    draw_splits,
    fitted_temperature,
    measures,
    minimize,
    next_symbol_probabilities,
    predict,
    report,
    score,
    trim,
)


SECTION = AutomataSection(language="automata", num_automata=30, num_test=40)


@pytest.fixture(scope="module")
def sequences():
    return draw_split(SECTION, TRAIN).to_list()


class Oracle(torch.nn.Module):
    """Predicts the true distributions of `rows`, except at the row and position of `mistake`."""

    device = torch.device("cpu")

    def __init__(self, rows, mistake=None):
        super().__init__()
        self.known = {tuple(row["input_ids"]): row for row in rows}
        self.mistake = mistake

    def forward(self, input_ids, use_cache):
        rows = [self.known[tuple(token for token in ids if token != PADDING)] for ids in input_ids.tolist()]
        true = next_symbol_probabilities(rows, input_ids.shape[1])
        for number, row in enumerate(rows):
            if self.mistake is not None and tuple(row["input_ids"]) == self.mistake[0]:
                true[number, self.mistake[1]] = torch.eye(VOCAB_SIZE)[SEPARATOR]
        return type("Output", (), {"logits": true.clamp(min=1e-30).log()})


def test_automata_have_the_sizes_that_were_asked_for(monkeypatch):
    monkeypatch.setattr(automata, "trim", lambda table: table)  # the sizes are those before trimming
    monkeypatch.setattr(automata, "minimize", lambda table: table)
    tables = [draw_automaton(SECTION, np.random.default_rng(seed)).transitions for seed in range(300)]
    assert {len(table) for table in tables} == set(range(4, 13))
    for table in tables:
        for state, row in enumerate(table):
            targets = row[row >= 0].tolist()
            assert 1 <= len(set(targets)) == len(targets) <= 3 and state not in targets
    symbols = [(table >= 0).any(axis=0).sum() for table in tables]
    assert max(symbols) > 12 and min(symbols) <= 4


def test_trimming_leaves_reachable_states():
    table = np.full((4, NUM_SYMBOLS), -1)
    table[0, 3], table[3, 1], table[1, 0] = 3, 0, 2
    assert trim(table).tolist() == [
        [1 if symbol == 3 else -1 for symbol in range(NUM_SYMBOLS)],
        [0 if symbol == 1 else -1 for symbol in range(NUM_SYMBOLS)],
    ]


def test_minimizing_changes_no_probability_of_a_string():
    table = np.full((4, NUM_SYMBOLS), -1)
    # States 1 and 2 have the same successor, so they merge; state 3 allows another symbol.
    table[0, [0, 1]], table[1, 5], table[2, 5], table[3, 7] = [1, 2], 3, 3, 0
    smaller = minimize(table)
    assert len(smaller) == 3
    for rng in map(np.random.default_rng, range(20)):
        state = small = 0
        for _ in range(30):
            assert ((table[state] >= 0) == (smaller[small] >= 0)).all()
            symbol = rng.choice(np.flatnonzero(table[state] >= 0))
            state, small = table[state, symbol], smaller[small, symbol]
    assert len(minimize(smaller)) == 3


def test_sequences_follow_their_automata(sequences):
    for row in sequences:
        state, transitions = 0, row["transitions"]
        for token, after in zip(row["input_ids"], row["states"], strict=True):
            state = 0 if token == SEPARATOR else transitions[state][token]
            assert state == after >= 0
        strings = "".join(chr(token) for token in row["input_ids"]).split(chr(SEPARATOR))
        assert 10 <= len(strings) <= 19
        assert all(1 <= len(string) <= 49 for string in strings)
        assert PADDING not in row["input_ids"]


def test_allowed_symbols_are_equally_likely():
    table = np.full((2, NUM_SYMBOLS), -1)
    table[0, [2, 4, 9]], table[1, 0] = 1, 0
    symbols, _ = Automaton(table).draw_string(np.random.default_rng(0), 6000)
    counts = np.bincount(symbols[::2], minlength=NUM_SYMBOLS)
    assert set(np.flatnonzero(counts)) == {2, 4, 9}
    assert counts[[2, 4, 9]] == pytest.approx([1000] * 3, abs=4 * (3000 * 2 / 9) ** 0.5)


def test_a_larger_data_set_begins_with_the_smaller(sequences):
    larger = draw_split(SECTION.model_copy(update={"num_automata": 35}), TRAIN).to_list()
    assert larger[:30] == sequences and len(larger) == 35


def test_tests_are_of_unseen_automata_and_of_new_sequences_of_the_seen(sequences):
    seen = [row["transitions"] for row in sequences]
    for split in (VALIDATION, TEST):
        rows = draw_split(SECTION, split).to_list()
        assert len(rows) == 20
        assert not any(row["transitions"] in seen for row in rows)
    training_ids = [row["input_ids"] for row in sequences]
    for row in draw_split(SECTION.model_copy(update={"num_test": 80}), TEST_IID).to_list():
        assert row["transitions"] == seen[row["automaton"]]
        assert row["input_ids"] not in training_ids


def test_separators_and_padding_are_read_and_never_predicted(sequences):
    batch = collate(sequences[:4])
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape == (4, max(len(row["input_ids"]) for row in sequences[:4]))
    assert ((labels == -100) == (ids >= NUM_SYMBOLS)).all() and (labels[labels >= 0] == ids[labels >= 0]).all()
    asked = next_symbol_probabilities(sequences[:4], ids.shape[1])
    assert torch.equal(asked[:, :-1].sum(-1) > 0, labels[:, 1:] >= 0)
    assert not asked[:, -1].any()
    # The next symbols were allowed.
    came = asked[:, :-1].gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    assert (came[labels[:, 1:] >= 0] > 0).all()


def test_an_oracle_scores_full_marks(sequences):
    split = draw_split(SECTION, TRAIN)
    scores = score(Oracle(sequences), split, batch_size=7)
    assert scores["accuracy"] == scores["last_accuracy"] == 1
    assert scores["tvd"] == pytest.approx(0, abs=1e-12) and scores["last_tvd"] == pytest.approx(0, abs=1e-12)
    row = sequences[0]
    last = max(t for t, token in enumerate(row["input_ids"][1:]) if token < NUM_SYMBOLS)
    for position, last_accuracy in ((0, 1.0), (last, 29 / 30)):
        wrong = score(Oracle(sequences, (tuple(row["input_ids"]), position)), split, batch_size=7)
        assert wrong["accuracy"] == pytest.approx(1 - 1 / wrong["num_positions"], abs=1e-12)
        assert wrong["tvd"] == pytest.approx(1 / wrong["num_positions"], abs=1e-9)
        assert wrong["last_accuracy"] == pytest.approx(last_accuracy, abs=1e-12)


def test_measures_are_those_of_the_evaluate_module_and_of_the_definition(request, sequences):
    model = make_model(vocab_size=VOCAB_SIZE)
    rows = sequences[:5]
    scores = score(model, draw_split(SECTION, TRAIN).select(range(5)), batch_size=2)
    predictions, references, hits = [], [], []
    for row in rows:
        with torch.no_grad():
            predicted = model(torch.tensor([row["input_ids"]])).logits[0].double().softmax(-1)
        kept = [t for t, token in enumerate(row["input_ids"][1:]) if token < NUM_SYMBOLS]
        allowed = [[s for s, target in enumerate(row["transitions"][row["states"][t]]) if target >= 0] for t in kept]
        true = [[float(symbol in these) / len(these) for symbol in range(VOCAB_SIZE)] for these in allowed]
        predictions.append(predicted[kept].tolist())
        references.append(true)
        hits.append([int(predicted[t].argmax()) in these for t, these in zip(kept, allowed, strict=True)])
    metric = evaluate.load(str(request.config.rootpath / "training/metrics/sequence_tvd"))
    for positions, prefix in (("all", ""), ("last", "last_")):
        expected = metric.compute(predictions=predictions, references=references, positions=positions)
        assert scores[f"{prefix}tvd"] == pytest.approx(expected["tvd"], abs=1e-6)
    assert scores["accuracy"] == pytest.approx(np.mean(np.concatenate(hits)))
    assert scores["last_accuracy"] == pytest.approx(np.mean([row[-1] for row in hits]))
    assert scores["num_positions"] == sum(map(len, hits))


def random_predictions(num_places, temperature=1.0):
    """Predictions at random, and next tokens drawn with the probabilities of the logits divided by the temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num_places, VOCAB_SIZE, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
    true = torch.nn.functional.one_hot(drawn, VOCAB_SIZE).double()
    return Predictions(logits, true, drawn, torch.arange(num_places) // 10)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_fitted_temperature_is_that_of_the_symbols(temperature):
    predictions = random_predictions(20_000, temperature)
    fitted = fitted_temperature(predictions)
    assert fitted == pytest.approx(temperature, rel=0.03)
    losses = [measures(predictions, fitted * factor)["loss"] for factor in (1, 0.98, 1.02)]
    assert losses[0] == min(losses)


def test_a_temperature_changes_no_accuracy():
    predictions = random_predictions(500)
    plain = measures(predictions)
    for temperature in (0.05, 0.7, 3.0, 50.0):
        other = measures(predictions, temperature)
        for name in ("accuracy", "last_accuracy", "num_positions"):
            assert other[name] == plain[name]
        assert other["tvd"] != plain["tvd"] and other["loss"] != plain["loss"]


def test_a_report_has_the_accuracy_of_one_model_and_the_distance_of_the_other():
    splits = DatasetDict({name: draw_split(SECTION, number).select(range(8)) for name, number in SPLITS.items()})
    models = {measure: make_model(seed, vocab_size=VOCAB_SIZE) for seed, measure in enumerate(CHOSEN_BY)}
    found = report(models, splits, batch_size=3)
    metrics = found["metrics"]
    assert metrics.keys() == {"temperature", "validation", "test", "test_iid"}
    assert metrics["temperature"] == fitted_temperature(predict(models["loss"], splits["validation"], 3))
    by_accuracy, by_loss = (score(models[measure], splits["test"], 8) for measure in ("accuracy", "loss"))
    fitted = measures(predict(models["loss"], splits["test"], 8), metrics["temperature"])
    test = metrics["test"]
    assert (test["accuracy"], test["last_accuracy"]) == (by_accuracy["accuracy"], by_accuracy["last_accuracy"])
    assert by_accuracy["accuracy"] != by_loss["accuracy"]
    for name in ("tvd", "last_tvd", "loss"):
        assert test[name] == pytest.approx(by_loss[name], rel=1e-5)
        assert test[f"fitted_{name}"] == pytest.approx(fitted[name], rel=1e-5)
        assert test[name] != test[f"fitted_{name}"]
    of_sequences = found["test_sequences"]
    assert of_sequences["num_positions"] == [
        sum(token < NUM_SYMBOLS for token in row["input_ids"][1:]) for row in splits["test"]
    ]
    for name in ("accuracy", "tvd", "fitted_tvd"):
        mean = np.average(of_sequences[name], weights=of_sequences["num_positions"])
        assert mean == pytest.approx(test[name], abs=1e-4)
    first = score(models["loss"], splits["test"].select([0]), 1)
    assert of_sequences["tvd"][0] == pytest.approx(first["tvd"], abs=1e-4)


def test_the_data_set_is_saved_once_with_its_card_and_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits = draw_splits(SECTION)
    folder = automata.data_folder(SECTION)
    monkeypatch.setattr(automata, "draw_split", None)  # from here on everything is read
    assert draw_splits(SECTION)["test"].to_list() == splits["test"].to_list()
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {
        "train": 30,
        "validation": 20,
        "test": 20,
        "test_iid": 20,
    }
    assert loaded["train"].to_list() == splits["train"].to_list()
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and "30 random automata" in card.text
    assert f"| {sum(map(len, splits['train']['input_ids'])):,} |" in card.text
    assert automata.provenance(SECTION)["train"]["sha256"] != automata.provenance(SECTION)["test"]["sha256"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_states": [3, 12]}, "3 edges need as many other states"),
        ({"num_symbols": [4, 19]}, "num_symbols"),
        ({"num_strings": [5, 2]}, "num_strings"),
        ({"string_length": [0, 2]}, "string_length"),
        ({"num_test": 5}, "even"),
        ({"num_automata": 0}, "num_automata"),
    ],
)
def test_impossible_automata_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        AutomataSection(language="automata", **settings)
