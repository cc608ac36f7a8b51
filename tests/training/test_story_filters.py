# SPDX-License-Identifier: Apache-2.0
"""Filters: an answer is cut where the story ends, refused if it is none, and found if it was there before."""

import pytest

from training.text.story_filters import Duplicates, clean, contains


@pytest.mark.parametrize(
    ("answer", "text", "reason"),
    [
        (" there was a dog. It ran.", "Once there was a dog. It ran.", None),
        (" a dog ran.\n\n  It sat.\r\n\r\nIt ate. ", "Once a dog ran.\nIt sat.\nIt ate.", None),
        (' he said, "Come!"', 'Once he said, "Come!"', None),
        (' he said "hello"', 'Once he said "hello"', None),
        (" a dog ran. Then it", "Once a dog ran.", None),
        (' a dog said, "Hi." Then "', 'Once a dog said, "Hi."', None),
        (" a dog ran and", "Once a dog ran and", "unfinished"),
        ("", "Once", "empty"),
        (" \n The End", "Once", "empty"),
        (" a dog (big) ran.", None, "forbidden"),
        (" see http://x now.", None, "forbidden"),
        (" a dog &amp; a cat ran.", None, "forbidden"),
        (" a dog ran -- and sat.", None, "forbidden"),
        (" a dog\ufffd ran.", None, "forbidden"),
        (" a well-known dog & a cat ran.", "Once a well-known dog & a cat ran.", None),
        *((f" a dog ran.{mark}x{mark}", None, "forbidden") for mark in "\\*#<>%^/@[]{}+="),
        *(
            (f" a dog ran.{tail}", "Once a dog ran.", None)
            for tail in (
                "\n\nMoral: be kind.",
                "\n**The moral of the story:** (be kind)",
                " The moral of this story is to be kind.",
                "\n\nNote to parents: this is #1.",
                "\n\nAuthor's note\nI wrote it.",
                "\n\nDear parents, read it.",
                "\n\nThe End.",
                " The end",
                "\nKey words: run, dog",
                "\n- Words used: run (verb)",
                "\nVerb: run",
                "\n### Features: twist",
                "\nTwist: it was a cat.",
                "\nQuestions for you:\n1. Who ran?",
                "\nAnswer: the dog",
                "\n\nChapter 2\nIt ran on.",
                "\nAlternative ending: it sat.",
                "\nUser 0: write more",
                "\nAssistant: yes",
                "\nWrite another story about a cat.",
                "\nWord count: 4",
                "\n---\nmore",
                " I hope you enjoyed this story!",
                "\nThis story contains a twist.",
                "\n```python",
                " [/INST] more",
                "\nTo be continued",
                "\nSummary: a dog ran.",
                "\nLesson learned: run.",
                "\nTitle: The dog",
                "\nIllustration: a dog.",
            )
        ),
    ],
)
def test_answer_becomes_a_story_or_is_refused(answer, text, reason):
    story = clean("Once" + answer, "Once")
    assert story.reason == reason
    assert text is None or story.text == text


@pytest.mark.parametrize(
    "answer",
    [
        " at the end of the day a dog ran to the end.",
        " a dog had a question: where was the end? It took note of a moral tale.",
        ' a dog ran.\n"The end of the road," it said.',
        " a dog wrote a story. Tom said: write me a letter.",
        " a user of the boat asked a parent. This story is about a dog.",
    ],
)
def test_prose_is_not_cut(answer):
    story = clean("Once" + answer, "Once")
    assert (story.text, story.reason, story.marker) == ("Once" + answer, None, None)


def test_opening_is_never_cut():
    story = clean("The moral of the story is funny. A dog ran.", "The moral of the story is funny.")
    assert story.reason is None and story.marker is None


def test_duplicates_are_found():
    story = (
        "One day a little dog ran to the big old tree and saw a red bird that sang a song about the sea and the sun"
    )
    near = story.replace("One", "Some")
    strict, loose = Duplicates(None), Duplicates(0.7)
    for duplicates in (strict, loose):
        assert duplicates.find(story + ".", 4) is None
        assert duplicates.find(story.upper() + "!", 5) == ("duplicate", 4)
        assert duplicates.find("A cat slept all day long in the warm kitchen of the house by the lake.", 6) is None
    assert strict.find(near, 7) is None
    assert loose.find(near, 7) == ("near duplicate", 4)
    assert loose.find("Hi.", 8) is None and loose.find("hi", 9) == ("duplicate", 8)


@pytest.mark.parametrize(
    ("text", "word", "there"),
    [
        ("She walked.", "walk", True),
        ("Liking it.", "like", True),
        ("Carried", "carry", True),
        ("She ran.", "run", False),
        ("a set", "see", False),
        ("Crown", "row", False),
    ],
)
def test_required_word_is_found_with_its_endings(text, word, there):
    assert contains(text, word) == there
