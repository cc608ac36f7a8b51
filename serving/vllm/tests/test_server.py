# SPDX-License-Identifier: Apache-2.0
"""vLLM's server on this machine answers completions of the OpenAI protocol as transformers does."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmark import Server, make_tokenizer, tokens_per_second


@pytest.fixture(scope="module")
def server(reference, tmp_path_factory):
    folder, log = reference.folder, tmp_path_factory.mktemp("server") / "serve.log"
    make_tokenizer(reference.model.config.vocab_size).save_pretrained(folder)
    options = ["--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20)]
    with Server("vllm", folder, log, *options) as server:
        yield server


def test_completions_over_http_are_those_of_transformers(reference, server):
    """Eight clients at a time, with prompts of token ids."""
    prompts, expected = zip(*[reference.draw(length) for length in (1, 12, 600, 5, 80, 33, 2, 128) * 2], strict=True)
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda prompt: server.complete(prompt, 32, return_token_ids=True), prompts))
    choices = [json.loads(answer)["choices"][0] for answer in answers]
    assert [choice["token_ids"] for choice in choices] == list(expected)


def test_text_and_streams_over_http_are_those_of_transformers(reference, server):
    model, text = reference.model, "Once upon a time there was a cat"
    tokenizer = make_tokenizer(model.config.vocab_size)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :])
    answer = json.loads(server.complete(text, 32))
    assert answer["choices"][0]["text"] == expected
    assert answer["usage"]["prompt_tokens"] == ids.shape[1] == len(text)
    events = [line.removeprefix("data: ") for line in server.complete(text, 32, stream=True).splitlines() if line]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected


def test_the_benchmark_counts_tokens_of_whole_answers(server, monkeypatch):
    assert tokens_per_second(server, num_requests=3, prompt_length=10, answer_length=4) > 0
    complete = server.complete
    monkeypatch.setattr(server, "complete", lambda prompt, max_tokens: complete(prompt, max_tokens - 1))
    with pytest.raises(RuntimeError, match=r"4 tokens were asked for, and answers have \[3\]"):
        tokens_per_second(server, num_requests=2, answer_length=4)
