# SPDX-License-Identifier: Apache-2.0
"""The page in a browser, for pictures and for tests.

    python hub_cards/space/screenshot.py runs/stories_tiny/mosaic-tiny-seed0/model runs/demo/mosaic-demo-seed0/model

takes all pictures again: each tab, on a desktop and on a phone. It needs Chromium and its driver. It works without a
network: the browser reaches no machine but this one.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait


APP = Path(__file__).with_name("app.py")
WINDOW = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
DEVICES = {"desktop": (1280, 900), "phone": (390, 844)}
SECONDS_TO_START = 60
# Of each tab, its name on the page, the tokens to choose from, and what is there when all is.
TABS = {
    "text": ("A text", "#text .token", "#recalled .token"),
    "memories": ("Memories", "#answers .token", "#documents .token"),
}


@contextlib.contextmanager
def serve(*arguments: str | Path, app: Path = APP) -> Iterator[str]:
    """Run the app in a process of its own while the block lasts, and yield its address.

    Args:
        arguments: of the app.
        app: its file.

    Raises:
        RuntimeError: the app ends or does not answer; the message has what it printed.
    """
    with socket.socket() as free, tempfile.TemporaryFile("w+") as printed:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        environment = os.environ | {
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": str(port),
            "HF_HUB_OFFLINE": "1",
            # Python searches the folder of the app first: there a Space has its own copy of the package.
            "PYTHONPATH": str(APP.parents[2]),
        }
        command = [sys.executable, str(app), *map(str, arguments)]
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}/"
            wait_until_it_answers(process, address, printed)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_it_answers(process: subprocess.Popen[bytes], address: str, printed: IO[str]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=5).close()
            return
        time.sleep(0.2)
    printed.seek(0)
    raise RuntimeError(f"{address} does not answer. The app printed:\n{printed.read()}")


@contextlib.contextmanager
def browse(address: str) -> Iterator[webdriver.Chrome]:
    """Open the page in a headless Chromium while the block lasts, and yield the driver."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Without the path of a driver, selenium would look for one on the network.
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", WINDOW)
        driver.get(address)
        yield driver
    finally:
        driver.quit()


def wait_for(driver: webdriver.Chrome, condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Wait until `condition()` is true, and return its value."""
    ignored = webdriver.remote.webdriver.WebDriverException  # the page may be drawn again while it is read
    return WebDriverWait(driver, seconds, 0.1, ignored_exceptions=[ignored]).until(lambda _: condition())


def find(driver: webdriver.Chrome, selector: str) -> list[Any]:
    """Return the elements of the page that a CSS selector matches."""
    return driver.find_elements(By.CSS_SELECTOR, selector)


def open_tab(driver: webdriver.Chrome, name: str) -> None:
    """Show a tab of `TABS`, and wait until its first example is there."""
    label, _, shown = TABS[name]
    wait_for(driver, lambda: find(driver, "#recalled .token"))
    wait_for(driver, lambda: find(driver, "button[role=tab]"))
    next(button for button in find(driver, "button[role=tab]") if button.text == label).click()
    wait_for(driver, lambda: find(driver, shown))


def requested(driver: webdriver.Chrome) -> set[str]:
    """Return the addresses that the page has requested since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [message for message in messages if message["method"] == "Network.requestWillBeSent"]
    return {message["params"]["request"]["url"] for message in sent}


def look_at(driver: webdriver.Chrome, width: int, height: int, is_dark: bool = False) -> None:
    """Load the page again in a window of this size, on a phone if it is narrow, as a light or a dark page."""
    window = WINDOW | {"width": width, "height": height, "mobile": width < 600}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.refresh()


def save_small(png: bytes, path: Path) -> None:
    """Save a picture with 256 colours, which takes half of the room."""
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Take a picture of each tab on a desktop and on a phone.")
    parser.add_argument("text_model", help="folder of the model for the first tab")
    parser.add_argument("memory_model", help="folder of the model for the tab on memories, as `make demo` trains one")
    parser.add_argument("--output", type=Path, default=APP.parent, help="folder; by default that of this file")
    parser.add_argument("--dark", action="store_true", help="as a visitor sees it who likes pages dark")
    arguments = parser.parse_args()
    if BROWSER is None or DRIVER is None:
        raise SystemExit("Chromium and its driver are needed: install `chromium` and `chromium-driver`.")
    for tab, folder in zip(TABS, (arguments.text_model, arguments.memory_model), strict=True):
        with serve(folder) as address, browse(address) as driver:
            for device, size in DEVICES.items():
                look_at(driver, *size, arguments.dark)
                open_tab(driver, tab)
                time.sleep(2)  # until nothing moves
                height = driver.execute_script("return document.querySelector('.gradio-container').scrollHeight")
                driver.execute_cdp_cmd(
                    "Emulation.setDeviceMetricsOverride", WINDOW | {"width": size[0], "height": height}
                )
                time.sleep(1)
                save_small(driver.get_screenshot_as_png(), arguments.output / f"screenshot_{tab}_{device}.png")


if __name__ == "__main__":
    main()
