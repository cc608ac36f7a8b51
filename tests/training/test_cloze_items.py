# SPDX-License-Identifier: Apache-2.0
"""Items of stories: names are found without a list, endings are whole sentences, and candidates are alike in form."""

import pytest

from training.text.cloze_items import Names, ending_items, name_items, sentence_starts
from training.text.story_writer import write_stories


STORIES = [
    "Anna was a girl. One day, Anna saw a boy named Tim at the pond near the old mill. Anna smiled at him and waved. "
    "Tim was happy to play with her. They were glad to play. Anna and Tim went home to eat a big cake.",
    "Mr. Bear met Anna in the wood. He had a dog named Rex, and Mr. Bear loved Rex very much, and it was a warm day. "
    "The dog ran. Anna found a bone and a TV. Then Anna and Rex played in the garden all day.",
    "A girl named Lily had a cat. It was a fine cat that ate fish and slept all day in the sun by the door. Lily "
    'loved it. "Come to me!" Lily said. The cat came to sit with Lily on the soft bed. The end.',
    "A boy named Ben had a drum. He hit it hard all day, and the noise was so loud that a girl named Sue ran off. "
    "Ben was sad. He put the drum away. Then Sue and Ben sat down to eat a pie.",
    "A boy named Tom had a kite. He let it go up in the wind, and it flew to the house of a girl named Mia. Tom ran "
    "after it. She had it. Then Mia and Tom flew the kite till night.",
    "A boy named Sam had a frog. It sat in a box by the pond until a girl named Lucy let it out in the rain. Sam was "
    "cross. He said so. Then Lucy and Sam looked for it till noon.",
]


def words(mentions):
    return [mention.name for mention in mentions]


@pytest.fixture(scope="module")
def many():
    return list(write_stories(80, 3))


def test_names_are_words_with_a_capital_letter_inside_sentences():
    names = Names(STORIES)
    assert {"Anna", "Rex", "Sue", "Mia", "Lucy"} <= names.known
    assert names.abbreviations == {"Mr"}
    # Tim is inside a sentence, Anna begins all sentences but one, and both count wherever they stand.
    assert words(names.mentions(STORIES[0])) == ["Anna", "Anna", "Tim", "Anna", "Tim", "Anna", "Tim"]
    assert words(names.mentions(STORIES[1])) == ["Anna", "Rex", "Rex", "Anna", "Anna", "Rex"]
    # One story alone: a word that it has without a capital letter too is no name.
    assert words(Names(["x"]).mentions("They saw Cat and Rex. The cat ran to Rex.")) == ["Rex", "Rex"]


def test_a_mention_is_where_the_name_stands():
    for mention in Names(STORIES).mentions(STORIES[1]):
        assert STORIES[1][mention.start : mention.end] == mention.name


def test_sentences_end_neither_at_abbreviations_nor_within_what_is_said():
    names = Names(STORIES)
    text = 'Mr. Bear ran. "Stop!" Anna said. He did not.\n"Why?"\nHe fell.'
    starts = [*sentence_starts(text, names), len(text)]
    assert [text[a:b].strip() for a, b in zip(starts, starts[1:], strict=False)] == [
        "Mr. Bear ran.",
        '"Stop!" Anna said.',
        "He did not.",
        '"Why?"',
        "He fell.",
    ]


def test_the_true_ending_is_first_and_the_others_have_the_names_of_the_story():
    items = {item.story: item for item in ending_items(STORIES, 10, seed=0)}
    # The third story has one name in its ending, which no other has; "The end." is no ending.
    assert set(items) == {0, 3, 4, 5, 1}
    item = items[3]
    assert STORIES[3] == item.context + item.candidates[0]
    assert item.candidates[0] == " Then Sue and Ben sat down to eat a pie."
    others = {
        " Then Sue and Ben flew the kite till night.",
        " Then Sue and Ben looked for it till noon.",
        " Ben and Sue went home to eat a big cake.",
        " Then Ben and Sue played in the garden all day.",
        " Then Ben and Sue flew the kite till night.",
        " Then Ben and Sue looked for it till noon.",
    }
    assert set(item.candidates[1:]) <= others and len(set(item.candidates)) == 4


def test_endings_are_drawn_by_the_seed_and_do_not_depend_on_how_many_are_asked_for(many):
    items = ending_items(many, 30, seed=1)
    assert items == ending_items(many, 30, seed=1) != ending_items(many, 30, seed=2)
    assert ending_items(many, 5, seed=1) == items[:5] and len(items) == 30
    names = Names(many)
    for item in items:
        own = set(words(names.mentions(many[item.story])))
        sizes = [len(candidate.strip()) for candidate in item.candidates]
        counts = {len(set(words(names.mentions(candidate))) & own) for candidate in item.candidates}
        assert 2 / 3 * sizes[0] <= min(sizes) and max(sizes) <= 3 / 2 * sizes[0]
        assert len(counts) == 1, item
        assert many[item.story].startswith(item.context + item.candidates[0])


@pytest.mark.parametrize(
    "ending", ['" Then Sue went off to eat it. "No', '"Now then, we are all here.', "“Now then, we are all here."]
)
def test_half_a_quotation_is_no_ending(ending):
    stories = [*STORIES[:3], STORIES[3].replace("Then Sue and Ben sat", f"{ending} Sue and Ben sat"), *STORIES[4:]]
    assert 3 not in {item.story for item in ending_items(stories, 10, seed=0)}


def test_a_name_is_asked_for_where_the_story_had_it_before(many):
    items = name_items(many, 20, 3, seed=0)
    assert items == name_items(many, 20, 3, seed=0)
    assert len({named.item.story for named in items}) == 20
    for named in items:
        text, (true, *others) = many[named.item.story], [name.strip() for name in named.item.candidates]
        before = named.item.context
        assert text.startswith(before + named.item.candidates[0]) and true in before
        assert sum(other in before for other in others) == named.rivals
        # Those that the story had come first.
        assert all(other in before for other in others[: named.rivals])
        for one in (true, *others):
            assert not any(one.startswith(other) for other in {true, *others} - {one})


def test_rules_choose_the_most_frequent_and_the_latest_name():
    story = (
        "A girl named Mia met a boy named Tom. Mia ran and Mia sang and Mia fell down by the tree, "
        "and then she cried. Tom gave a cake to Mia, and then a hug and a ball, and she said to Tom that she ran."
    )
    items = {
        (named.item.candidates[0], named.item.context[-5:]): named for named in name_items([*STORIES, story], 10, 9, 0)
    }
    named = items[" Tom", "id to"]
    assert named.item.candidates[:2] == (" Tom", " Mia") and named.rivals == 1
    assert (named.most_frequent, named.latest) == (1, 1)
    assert named.distance == 16
    named = items[" Mia", "ke to"]
    assert (named.most_frequent, named.latest) == (0, 1)


def test_without_other_names_there_is_no_item():
    assert name_items([STORIES[2]], 10, 4, seed=0) == []
