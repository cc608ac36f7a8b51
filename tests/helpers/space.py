# SPDX-License-Identifier: Apache-2.0
"""The page of the Space: a model for it, its folder as it is uploaded, and a visitor of it in a browser."""

import shutil
from pathlib import Path
from typing import Any

from selenium.webdriver.common.keys import Keys

from helpers.models import make_model
from hub_cards.space.screenshot import find, wait_for
from training.publishing.checks import PACKAGE, SPACE, SPACE_CODE
from training.text.tokenizer import train_tokenizer


STORIES = ["Once upon a time there was a cat. One day, the cat saw a <b>ball</b> & a dog.\nThe end."] * 3


def make_parts() -> tuple[Any, Any]:
    """Return a model and a tokenizer that knows no character of more than one byte."""
    tokenizer = train_tokenizer(STORIES, vocab_size=300)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return make_model(vocab_size=len(tokenizer), num_persistent_slots=7, **ids), tokenizer


def write_space(parts: tuple[Any, Any], folder: Path) -> Path:
    """Write the folder of a Space as it is uploaded: the package and the model beside the app; return the app."""
    for name in SPACE_CODE:
        shutil.copy(SPACE / name, folder)
    shutil.copytree(PACKAGE, folder / PACKAGE.name)
    for part in parts:
        part.save_pretrained(folder / "model")
    return folder / "app.py"


class Visitor:
    """The actions of a visitor in a browser, and what the page then shows."""

    def __init__(self, browser):
        self.browser = browser

    def texts(self, selector):
        return [element.text for element in find(self.browser, selector)]

    def wait_for(self, condition):
        return wait_for(self.browser, condition)

    def click(self, selector, number=0):
        self.wait_for(lambda: find(self.browser, selector))[number].click()

    def write(self, selector, text):
        """Write into a text box, in place of what it holds."""
        (box,) = find(self.browser, selector)
        box.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, text)

    def continue_text(self, beginning):
        self.write("#beginning textarea", beginning)
        self.click("#continue")

    def tokens(self):
        return self.texts("#text .token")

    def colours(self):
        """Return the colours of the text that a memory read, once they have stopped changing."""
        seen = [None]
        self.wait_for(lambda: seen.append(self.colours_now()) or seen[-1] and seen[-1] == seen[-2])
        return seen[-1]

    def colours_now(self):
        return [token.value_of_css_property("background-color") for token in find(self.browser, "#pairs .token")]
