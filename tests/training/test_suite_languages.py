# SPDX-License-Identifier: Apache-2.0
"""Languages of the recall suite: a reader that knows the rule of one answers all, and every setting changes rows."""

import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers.models import make_model

from training.synthetic import classes, mad, mqar, story_needles
from training.synthetic.classes import ASKED, FIRST_LABEL, NUM_WORDS, ClassesSection, words_by_feature
from training.synthetic.mad import BLANK, COMPRESS, COPY, DEFAULTS, MadSection, memorised_values
from training.synthetic.mqar import NUM_KEYS, MqarSection
from training.synthetic.questions import IGNORED, VOCAB_SIZE, RowWriter, collate, report, score
from training.synthetic.story_needles import NeedlesSection, needle_tokenizer


MODULES = {"mqar": mqar, "mad": mad, "classes": classes, "needles": story_needles}
SECTIONS = {"mqar": MqarSection, "mad": MadSection, "classes": ClassesSection, "needles": NeedlesSection}
# Each language, and each task of MAD, at sizes that take little time.
SMALL = {
    "mqar": {"language": "mqar", "sizes": [[40, 4], [64, 6]]},
    "classes": {"language": "classes", "num_shots": [1, 4]},
    "needles": {"language": "needles", "num_stories": [1, 1], "num_needles": 3, "num_questions": 2},
    **{task: {"language": "mad", "task": task} for task in DEFAULTS},
}


def section(name, **settings):
    values = {"num_rows": 20, "num_test": 6} | SMALL[name] | settings
    return SECTIONS[values["language"]].model_validate(values)


def splits_of(one):
    return MODULES[one.language].draw_splits(one)


def rows_of(name, num_rows=20, **settings):
    split = splits_of(section(name, num_rows=num_rows, **settings))["train"]
    return [split[index] for index in range(num_rows)]


# Readers: each sees the tokens of a row alone, and returns what comes next by its language's rule, by place.


def read_pairs(tokens, is_key):
    """Return what followed the first occurrence of each key."""
    found, values = {}, {}
    for place, token in enumerate(tokens):
        if token in values:
            found[place] = values[token]
        elif is_key(token) and place + 1 < len(tokens):
            values[token] = tokens[place + 1]
    return found


def read_fuzzy(tokens, num_tokens=16):
    """Cut a row into keys and values, and return the value of each key that was there before."""
    text = "".join("k" if token < num_tokens // 2 else "v" for token in tokens)
    found, values = {}, {}
    for pair in re.finditer("(k+)(v+)", text):
        key = tuple(tokens[slice(*pair.span(1))])
        value = values.setdefault(key, tokens[slice(*pair.span(2))])
        if pair.start() > 0:
            found |= {pair.start(2) - 1 + number: token for number, token in enumerate(value)}
    return found


def read_copies(tokens):
    copied = [token for token in tokens[: tokens.index(COPY)] if token != BLANK]
    return {tokens.index(COPY) + number: token for number, token in enumerate(copied)}


def read_classes(tokens, num_values=8):
    """Return the label of each item that is asked for, by the features of its words."""
    feature_of = {word: value for value, words in enumerate(words_by_feature(num_values, 0)) for word in words}
    found, labels, features = {}, {}, []
    for place, token in enumerate(tokens):
        if token in feature_of:
            features.append(feature_of[token])
        elif token >= FIRST_LABEL:
            if token == ASKED:
                found[place - 1] = labels[tuple(features)]
            else:
                labels[tuple(features)] = token
            features = []
    return found


def read_needles(tokens):
    """Return the number that a needle gives the name in each question."""
    tokenizer = needle_tokenizer()
    found, text = {}, ""
    for place in range(len(tokens)):
        text = tokenizer.decode(tokens[: place + 1])
        if match := re.search(r"What is the number of (\w+)\? It is([ \d]*)$", text):
            number = re.search(rf"The number of {match[1]} is ([ \d]*)\.", text)[1]
            following = tokenizer(" " + number)["input_ids"][len(tokenizer(match[2])["input_ids"]) :]
            found |= {place: following[0]} if following else {}
    return found


READERS = {
    "mqar": lambda tokens: read_pairs(tokens, lambda token: token < NUM_KEYS),
    "classes": read_classes,
    "needles": read_needles,
    "in_context_recall": lambda tokens: read_pairs(tokens, lambda token: token < 8),
    "noisy_recall": lambda tokens: read_pairs(tokens, lambda token: token < 8),
    "fuzzy_recall": read_fuzzy,
    "selective_copying": read_copies,
    # As a compressor answers: the first place has the first token.
    "compression": lambda tokens: dict(enumerate(tokens[:-1])),
    "memorisation": lambda tokens: {
        place: memorised_values(256, 0)[token] for place, token in enumerate(tokens) if token != BLANK
    },
}


class Reader:
    """A model by one of the readers, which says token 0 where that says nothing, and `wrong` tokens never."""

    device = torch.device("cpu")

    def __init__(self, read, wrong=()):
        self.read, self.wrong = read, wrong

    def __call__(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, VOCAB_SIZE)
        for row, tokens in zip(logits, input_ids.tolist(), strict=True):
            for place, token in self.read(tokens).items():
                row[place, token if token not in self.wrong else 0] = 30.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_that_knows_the_rule_answers_all(name):
    splits = splits_of(section(name))
    scores = score(Reader(READERS[name]), splits["test"], batch_size=1)  # padding is no token of a rule
    assert scores["accuracy"] == 1 and scores["loss"] < 1e-6
    assert scores["num_answers"] == sum(1 + max(row.answers) for row in map(splits["test"].__getitem__, range(6)))


@pytest.mark.parametrize("name", [name for name in READERS if name != "memorisation"])
def test_a_reader_of_another_row_does_not(name):
    other = splits_of(section(name))["test"][5].tokens
    reader = Reader(lambda tokens: {n: token for n, token in READERS[name](other).items() if n < len(tokens)})
    assert score(reader, splits_of(section(name))["train"], batch_size=1)["accuracy"] < 0.5


@pytest.mark.parametrize("name", ["fuzzy_recall", "needles", "mqar"])
def test_an_answer_is_right_if_all_its_tokens_are(name):
    test = splits_of(section(name))["test"]
    rows = [test[index] for index in range(6)]
    answers = [
        [token for token, number in zip(row.labels, row.answers, strict=True) if number == one]
        for row in rows
        for one in range(1 + max(row.answers))
    ]
    wrong = answers[0][-1]
    accuracy = score(Reader(READERS[name], [wrong]), test, batch_size=1)["accuracy"]
    assert accuracy == pytest.approx(sum(wrong not in answer for answer in answers) / len(answers)) and accuracy < 1


@pytest.mark.parametrize("name", READERS)
def test_rows_are_fresh_and_depend_on_split_seed_and_index_alone(name):
    one = section(name, tests={"again": {}})
    splits = splits_of(one)
    rows = [tuple(split[index].tokens) for split in splits.values() for index in range(6)]
    assert splits.keys() == {"train", "validation", "test", "again"} and len(set(rows)) == len(rows) == 24
    longer, other = (splits_of(section(name, num_rows=50, seed=seed))["train"] for seed in (0, 1))
    assert longer[3] == splits["train"][3] != other[3] and len(longer) == 50
    with pytest.raises(IndexError, match="row 20 of 20"):
        splits["train"][20]


@pytest.mark.parametrize("name", READERS)
def test_labels_are_in_the_vocabulary_and_answers_number_them(name):
    for row in rows_of(name):
        assert len(row.tokens) == len(row.labels) == len(row.answers)
        assert all(0 <= token < VOCAB_SIZE for token in row.tokens)
        assert [label != IGNORED for label in row.labels] == [number >= 0 for number in row.answers]
        numbers = [number for number in row.answers if number >= 0]
        assert sorted(set(numbers)) == list(range(1 + max(numbers))) and row.answers[0] == -1


def test_a_batch_is_padded_on_the_right_without_labels():
    rows = rows_of("classes", 5)
    batch = collate(rows)
    for row, ids, labels in zip(rows, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        length = len(row.tokens)
        assert (ids[:length], labels[:length]) == (row.tokens, row.labels)
        assert set(labels[length:]) <= {IGNORED}
    assert len({len(row.tokens) for row in rows}) > 1


def test_a_writer_hides_answers_where_it_is_asked_to():
    writer = RowWriter()
    writer.show([1, 2])
    writer.ask([3, 4])
    writer.ask([5], shown=[6])
    assert writer.row == ([1, 2, 3, 4, 6], [IGNORED, IGNORED, 3, 4, 5], [-1, -1, 0, 0, 1])


def test_a_model_is_measured_alike_in_any_batches_on_every_test():
    one = section("classes", tests={"grouped": {"order": "grouped"}})
    model, splits = make_model(vocab_size=VOCAB_SIZE), splits_of(one)
    scores = [report({"accuracy": model}, splits, size)["metrics"] for size in (1, 4)]
    assert scores[0].keys() == {"validation", "test", "grouped"}
    for name, measures in scores[0].items():
        assert measures == pytest.approx(scores[1][name], rel=1e-4) and measures["loss"] > 1
    batch = collate([splits["test"][0]])
    alone = score(model, splits_of(section("classes", num_test=1))["test"])
    assert model(**batch).loss.item() == pytest.approx(alone["loss"], rel=1e-5)


# MQAR


def test_pairs_are_asked_once_each_and_values_are_not_shown_again():
    for row in rows_of("mqar", sizes=[[64, 8]]):
        assert len(row.tokens) == 64
        pairs = dict(zip(row.tokens[:16:2], row.tokens[1:16:2], strict=True))
        assert len(pairs) == 8 and max(pairs) < NUM_KEYS <= min(pairs.values())
        asked = {row.tokens[place - 1]: label for place, label in enumerate(row.labels) if label != IGNORED}
        assert asked == pairs
        assert sum(token == label for token, label in zip(row.tokens, row.labels, strict=True)) <= 1


def test_every_size_of_mqar_is_drawn_and_may_be_odd():
    assert Counter(len(row.tokens) for row in rows_of("mqar", sizes=[[40, 4], [41, 4]])).keys() == {40, 41}


def test_a_greater_power_puts_questions_further_away():
    def mean_distance(power):
        rows = rows_of("mqar", 100, sizes=[[256, 4]], power=power)
        places = [place for row in rows for place, label in enumerate(row.labels) if label != IGNORED]
        return sum(places) / len(places)

    # With a power of 1 all places are alike: the middle of those behind the pairs.
    assert mean_distance(0.01) + 40 < mean_distance(1.0) == pytest.approx(132, abs=15)


# MAD


def test_noise_has_its_share_and_tokens_of_its_own():
    rows = rows_of("noisy_recall", 100)
    share = sum(16 <= token < 32 for row in rows for token in row.tokens) / (100 * 128)
    assert share == pytest.approx(0.2 * 62 / 64, abs=0.02)
    assert all(token < 16 for row in rows_of("noisy_recall", noise_share=0.0) for token in row.tokens)
    assert max(token for row in rows_of("noisy_recall", num_noise_tokens=2) for token in row.tokens) == 17


def test_no_key_of_fuzzy_recall_begins_another():
    lengths = Counter()
    for seed in range(30):
        keys = mad._draw_keys(random.Random(seed), 8, 3, 8)
        assert len(keys) == 8
        assert not [(a, b) for a in keys for b in keys if a != b and b[: len(a)] == a]
        lengths.update(map(len, keys))
    assert lengths.keys() == {1, 2, 3}


def test_motifs_are_as_many_and_as_long_as_asked():
    row = rows_of("fuzzy_recall", 1, longest_motif=1, num_motifs=3)[0]
    assert (
        len({token for token in row.tokens if token < 8}) == 3
        and row == rows_of("fuzzy_recall", 1, longest_motif=1, num_motifs=3)[0]
    )
    texts = ["".join("k" if t < 8 else "v" for t in row.tokens) for row in rows_of("fuzzy_recall", longest_motif=4)]
    assert max(len(part) for text in texts for part in re.findall("k+|v+", text)) == 4


def test_a_row_of_copying_has_its_tokens_before_the_mark():
    for row in rows_of("selective_copying", length=40, num_copied=5):
        assert len(row.tokens) == 40 and row.tokens[34] == COPY and row.tokens[35:] == [BLANK] * 5
        assert [t for t in row.tokens[:34] if t != BLANK] == row.labels[35:]


def test_a_row_of_compression_is_recovered_from_its_last_token():
    row = rows_of("compression", length=7)[0]
    assert row.tokens[-1] == COMPRESS and row.labels == [IGNORED, *row.tokens[:-1]] and len(row.tokens) == 8
    assert section("compression").needs_compressor and not section("fuzzy_recall").needs_compressor


def test_what_is_memorised_is_never_shown_and_belongs_to_a_seed():
    for row in rows_of("memorisation", seed=3):
        assert {label for label in row.labels if label != IGNORED}.isdisjoint(row.tokens)
    assert memorised_values(256, 0) != memorised_values(256, 1)
    assert memorised_values(256, 0) == memorised_values.__wrapped__(256, 0)


# Classes


def test_items_of_a_class_share_features_and_not_words():
    table = words_by_feature(8, 0)
    assert sorted(word for words in table for word in words) == list(range(NUM_WORDS))
    assert {len(words) for words in table} == {32} and table != words_by_feature(8, 1)
    (row,) = rows_of("classes", 1, num_classes=2, num_shots=[16, 16])
    items = [tuple(row.tokens[place : place + 3]) for place in range(0, 4 * 32, 4)]
    assert len(set(items)) == 32 and Counter(row.tokens[3 : 4 * 32 : 4]).most_common(1)[0][1] == 16


@pytest.mark.parametrize("order", ["shuffled", "grouped"])
def test_examples_are_shuffled_or_grouped(order):
    changes = []
    for row in rows_of("classes", num_shots=[8, 8], order=order, num_empty_words=0):
        labels = row.tokens[2 : 4 * 8 * 3 : 3]
        assert sorted(Counter(labels).values()) == [8] * 4
        changes.append(sum(a != b for a, b in zip(labels, labels[1:], strict=False)))
    assert set(changes) == {3} if order == "grouped" else min(changes) > 8


def test_labels_are_drawn_for_each_row_and_shots_within_their_range():
    rows = rows_of("classes", 50, num_shots=[1, 2])
    assert len({label for row in rows for label in row.labels}) > 40
    assert {len(row.tokens) for row in rows} == {4 * 4 * shots + 4 * 4 for shots in (1, 2)}


# Needles


def test_needles_stand_at_any_depth_and_their_names_in_no_story():
    tokenizer, depths = needle_tokenizer(), []
    for row in rows_of("needles", 40, num_needles=4):
        text = tokenizer.decode(row.tokens)
        story, question = text.split("What is the number", 1)
        found = re.findall(r"^The number of (\w+) is \d \d \d \d\.$", story, flags=re.MULTILINE)
        assert len(set(found)) == 4 and not re.search(r"\d", re.sub(r"(?m)^The number.*$", "", story))
        assert not set(found) & set(re.findall(r"\w+", re.sub(r"(?m)^The number.*$", "", story)))
        asked = re.findall(r"of (\w+)\?", question)
        assert len(set(asked)) == 2 and set(asked) <= set(found)
        depths.append(story.index("The number") / len(story))
    assert min(depths) == 0 and max(depths) > 0.3
    assert len(tokenizer) == VOCAB_SIZE and story_needles.tokenizer_of(section("needles")) is tokenizer


def test_digits_and_stories_are_as_many_as_asked():
    (row,) = rows_of("needles", 1, num_digits=6, num_stories=[3, 3], num_needles=2)
    text = needle_tokenizer().decode(row.tokens)
    assert (
        re.search(r"It is \d \d \d \d \d \d\.", text) and text.split("What is the number")[0].count("\n") == 4 * 3 + 2
    )


# Settings, readings and refusals


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mqar", {"sizes": [[40, 4]]}),
        ("mqar", {"power": 0.5}),
        *((task, {"num_tokens": 8}) for task in DEFAULTS),
        *((task, {"length": 50}) for task in DEFAULTS),
        ("classes", {"num_classes": 3}),
        ("classes", {"num_features": 3}),
        ("classes", {"num_values": 4}),
        ("classes", {"num_empty_words": 2}),
        ("classes", {"num_questions": 2}),
        ("needles", {"num_stories": [2, 2]}),
        ("needles", {"num_needles": 5}),
        ("needles", {"num_questions": 1}),
    ],
)
def test_every_setting_changes_rows_that_a_reader_of_the_rule_still_answers(name, settings):
    settings = settings | ({"num_motifs": 4} if name == "fuzzy_recall" else {})
    assert rows_of(name, 6, **settings) != rows_of(name, 6)
    num_tokens, num_values = settings.get("num_tokens", 16), settings.get("num_values", 8)
    readers = READERS | {
        "in_context_recall": lambda tokens: read_pairs(tokens, lambda token: token < num_tokens // 2),
        "noisy_recall": lambda tokens: read_pairs(tokens, lambda token: token < num_tokens // 2),
        "fuzzy_recall": lambda tokens: read_fuzzy(tokens, num_tokens),
        "classes": lambda tokens: read_classes(tokens, num_values),
        "memorisation": lambda tokens: {
            place: memorised_values(settings.get("num_tokens", 256), 0)[token]
            for place, token in enumerate(tokens)
            if token != BLANK
        },
    }
    assert score(Reader(readers[name]), splits_of(section(name, **settings))["test"], 1)["accuracy"] == 1


def test_questions_are_as_many_as_asked():
    for number in (1, 3):
        for name in ("classes", "needles"):
            assert {max(row.answers) for row in rows_of(name, 5, num_questions=number)} == {number - 1}


@pytest.mark.parametrize("name", ["mqar", "classes", "needles"])
def test_a_context_is_read_twice_before_the_question(name):
    settings = {"sizes": [[64, 4]]} if name == "mqar" else {}
    for once, twice in zip(rows_of(name, **settings), rows_of(name, times_read=2, **settings), strict=True):
        half = next(n for n in range(len(twice.tokens) // 2, 0, -1) if twice.tokens[:n] == twice.tokens[n : 2 * n])
        assert once.tokens[:half] == twice.tokens[:half] and max(twice.labels[: 2 * half]) == IGNORED
        if name != "mqar":  # whose rows are as long
            assert once.tokens[half:] == twice.tokens[2 * half :] and once.labels[half:] == twice.labels[2 * half :]
        assert sorted(once.answers)[-1] == sorted(twice.answers)[-1]
    assert score(Reader(READERS[name]), splits_of(section(name, times_read=2, **settings))["test"], 1)["accuracy"] == 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mqar", {"sizes": [[15, 4]]}, "4 pairs and their questions take 16 tokens, but `sizes` has 15: give fewer"),
        ("mqar", {"sizes": [[23, 4]], "times_read": 2}, "take 24 tokens, but `sizes` has 23"),
        ("mqar", {"sizes": [[64]]}, r"`sizes` has \[64\]: give each as \[tokens, pairs\]"),
        ("mqar", {"sizes": [[9999, 513]]}, "513 pairs, but there are 512 keys: give fewer pairs"),
        ("fuzzy_recall", {"noise_share": 0.1}, "`noise_share` means nothing to the task 'fuzzy_recall': leave it out"),
        ("fuzzy_recall", {"num_motifs": 9}, "`num_motifs` is 9, but 16 tokens are enough for 8 keys"),
        ("fuzzy_recall", {"length": 11}, "`length` is 11: a row of 'fuzzy_recall' takes 12 tokens or more"),
        ("selective_copying", {"length": 32}, "`length` is 32: a row of 'selective_copying' takes 33 tokens"),
        ("memorisation", {"num_tokens": 1022}, "the task has 1022 tokens, more than 1021: lower `num_tokens`"),
        ("classes", {"num_shots": [4, 2]}, r"`num_shots` is \[4, 2\]: give the smaller number first"),
        ("classes", {"num_features": 1, "num_classes": 9}, "1 features of 8 values make fewer than 9 classes"),
        ("needles", {"num_stories": [2, 1]}, r"`num_stories` is \[2, 1\]: give the smaller number first"),
        ("needles", {"num_questions": 4}, "`num_questions` is 4, but `num_needles` is 3: each question is about"),
        ("classes", {"tests": {"test": {}}}, "`tests` has 'test', which every training has: give it another name"),
        (
            "classes",
            {"tests": {"other": {"num_values": 4}}},
            "the test 'other' changes 'num_values', which is the train",
        ),
        ("mqar", {"tests": {"long": {"sizes": [[9, 4]]}}}, "take 16 tokens, but `sizes` has 9"),
        ("noisy_recall", {"tests": {"other": {"task": "compression"}}}, "the test 'other' changes 'task'"),
    ],
)
def test_impossible_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        section(name, **settings)
