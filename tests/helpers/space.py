# SPDX-License-Identifier: Apache-2.0
"""The page of the Space: a model for it, its folder as it is uploaded, and a visitor of it in a browser."""

import shutil
from pathlib import Path
from typing import Any

import torch
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from helpers.kinds import MOSAIC, make_memory_model, make_v2
from helpers.models import make_model
from hub_cards.space.screenshot import find, wait_for
from training.publishing.checks import PACKAGE, SPACE, SPACE_CODE
from training.text.tokenizer import train_tokenizer


STORIES = ["Once upon a time there was a cat. One day, the cat saw a <b>ball</b> & a dog.\nThe end."] * 3


# Of the model in the Space, as its card names it.
REPOSITORY = "someone/some-mosaic"


def make_parts(kind: str = "mosaic", **config: Any) -> tuple[Any, Any]:
    """Return a model, a `mosaic` or a `mosaic v2`, and a tokenizer that knows no character of more than one byte."""
    tokenizer = train_tokenizer(STORIES, vocab_size=300)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    make = {"mosaic": make_model, "mosaic v2": make_v2}[kind]
    return make(vocab_size=len(tokenizer), num_persistent_slots=7, **ids | config), tokenizer


def make_memory_parts() -> tuple[Any, Any]:
    """Return a memory model of chunks of five tokens, and its tokenizer."""
    tokenizer = train_tokenizer(STORIES, vocab_size=300)
    backbone = type(MOSAIC)(**MOSAIC.to_dict() | {"vocab_size": len(tokenizer)})
    sizes = {"encoder": backbone, "decoder": backbone, "dtype": torch.float32, "num_memory_embeddings": 2}
    return make_memory_model(**sizes, memory_pooling="summary", pad_token_id=tokenizer.pad_token_id), tokenizer


def write_space(parts: tuple[Any, Any], folder: Path) -> Path:
    """Write the folder of a Space as it is uploaded: the package and the model beside the app; return the app."""
    for name in SPACE_CODE:
        shutil.copy(SPACE / name, folder)
    shutil.copytree(PACKAGE, folder / PACKAGE.name)
    for part in parts:
        part.save_pretrained(folder / "model")
    (folder / "README.md").write_text(f"---\nmodels:\n  - {REPOSITORY}\n---\n", encoding="utf-8")
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
        """Return the tokens of the text; a space alone is shown as a sign."""
        return [token.get_attribute("textContent").replace("␣", " ") for token in find(self.browser, "#text .token")]

    def press(self, *keys):
        """Press keys, wherever the focus is."""
        ActionChains(self.browser).send_keys(*keys).perform()

    def focused(self):
        """Return the element that has the focus."""
        return self.browser.switch_to.active_element

    def colours(self):
        """Return the colours of the text that a memory recalls, once they have stopped changing."""
        seen = [None]
        self.wait_for(lambda: seen.append(self.colours_now()) or seen[-1] and seen[-1] == seen[-2])
        return seen[-1]

    def colours_now(self):
        return [token.value_of_css_property("background-color") for token in find(self.browser, "#recalled .token")]


# What a visitor may not be able to use


def outside(browser, width):
    """Return the elements with text that reach beyond a width."""
    return browser.execute_script(
        """return [...document.querySelectorAll('p, h1, h2, li, td, th, button, label, textarea, mark, .token, .part')]
        .filter(e => e.checkVisibility() && !e.closest('.spoken'))
        .filter(e => e.getBoundingClientRect().right > arguments[0] + 0.5)
        .map(e => e.outerHTML.slice(0, 90));""",
        width,
    )


def nameless(browser):
    """Return the controls that can be seen and have no name for a screen reader."""
    controls = [e for e in find(browser, "button, input, textarea, a, [role=tab]") if e.is_displayed()]
    # Gradio has a hidden copy of the tabs, by which it measures them.
    controls = [e for e in controls if not browser.execute_script("return !!arguments[0].closest('[aria-hidden]')", e)]
    return [control.get_attribute("outerHTML")[:90] for control in controls if not control.accessible_name.strip()]


def low_contrast(browser):
    """Return the texts of the page whose contrast with their ground is below 4.5, as WCAG 2 counts it."""
    return browser.execute_script(
        """
        const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        const read = colour => {
            context.clearRect(0, 0, 1, 1);
            context.fillStyle = colour;
            context.fillRect(0, 0, 1, 1);
            return [...context.getImageData(0, 0, 1, 1).data];
        };
        const light = colour => colour.slice(0, 3).map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = element => {
            for (let e = element; e; e = e.parentElement) {
                const colour = read(getComputedStyle(e).backgroundColor);
                if (colour[3] > 250) return colour;
            }
            return [255, 255, 255, 255];
        };
        const views = document.querySelectorAll('.html-container *');
        return [...views].filter(e => e.checkVisibility() && !e.matches('.spoken') &&
            [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).filter(e => {
                const [a, b] = [light(read(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
                return (a + 0.05) / (b + 0.05) < 4.5;
            }).map(e => e.outerHTML.slice(0, 90));
        """
    )
