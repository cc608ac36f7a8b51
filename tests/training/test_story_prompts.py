# SPDX-License-Identifier: Apache-2.0
"""Prompts: what is drawn depends on seed and index alone, templates are filled, and lists are parsed from answers."""

import pytest
from helpers.story_generators import LISTS

from training.text import story_prompts


def test_prompt_depends_on_seed_lists_and_index_alone():
    lists = {kind: LISTS[kind] for kind in ("names", "verbs", "openings")}
    drawn = [story_prompts.draw(lists, 0, index) for index in range(40)]
    assert drawn[7] == story_prompts.draw(lists, 0, 7)
    assert drawn != [story_prompts.draw(lists, 1, index) for index in range(40)]
    assert {words["name"] for words in drawn} == set(LISTS["names"])
    features = story_prompts.draw({"features": ["a b", "c d", "e f", "g h"], "openings": ["x"]}, 3, 1)["features"]
    assert len(set(features)) == len(features) <= story_prompts.MOST_FEATURES


def test_filled_template_names_all_that_was_drawn():
    drawn = {"name": "Anna", "verb": "run", "noun": "{dog}", "adjective": "big", "opening": "Once"}
    drawn["features"] = ["a twist", "a moral", "a talk"]
    prompt = story_prompts.fill(story_prompts.TEMPLATE, drawn)
    for part in ('"Anna"', '"run"', '"{dog}"', '"big"', "a twist, a moral and a talk"):
        assert part in prompt
    assert story_prompts.fill("{features}", {"features": ["a twist"]}) == "a twist"


@pytest.mark.parametrize(
    ("kind", "answers", "entries"),
    [
        ("names", ["1. Anna\n2. Ben\n 3) Zoë\n4. Anna"], ["Anna", "Ben", "Zoë"]),
        ("names", ["1. Charlie\n2. Benjamin\n3. Mary Ann\n4. O'Hara"], ["Charlie", "O'Hara"]),
        ("names", ["Sure! Here are names:\n1. **Ida**\n2. Bo (a boy)\n3.", "17. Eva"], ["Ida", "Eva"]),
        ("openings", ['1. "Once a cat"\n2. Once a dog'], ["Once", "Once a", "Once a cat", "Once a dog"]),
        ("openings", ["1. See http://x\n2. (hm) \n3. Hi"], ["Hi"]),
        ("verbs", ["1. Run\n2. jump.\n3. fall down\n4. run"], ["run", "jump"]),
        ("nouns", ["no list at all"], []),
    ],
)
def test_numbered_lists_are_parsed(kind, answers, entries):
    assert story_prompts.parse_answers(kind, answers) == entries


def test_opening_has_at_most_twelve_words():
    entries = story_prompts.parse_answers("openings", ["1. " + " ".join("abcdefghijklmnop")])
    assert len(entries) == 12 and entries[-1] == "a b c d e f g h i j k l"
