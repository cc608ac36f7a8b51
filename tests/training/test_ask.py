# SPDX-License-Identifier: Apache-2.0
"""`python -m training ask`: it reads, answers and explains by kernels of one width, that of `--bandwidth`."""

import pytest
import torch
from helpers.models import make_model
from typer.testing import CliRunner

from training.__main__ import app
from training.commands.texts import answer
from training.evaluate import load_model
from training.export import export_model
from training.memories import load_memory, memorize_files
from training.text.tokenizer import train_tokenizer


TEXTS = {"mia.txt": "Mia has the red ball in the park.", "tom.txt": "Tom has a blue kite at home."}
QUESTION = "Who has the kite?"
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of a model and of its memory of two texts."""
    folder = tmp_path_factory.mktemp("asked")
    tokenizer = train_tokenizer([*TEXTS.values()] * 3, vocab_size=300)
    export_model(make_model(vocab_size=300, max_position_embeddings=4), tokenizer, folder / "model")
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    memorize_files(folder / "model", [folder / name for name in TEXTS], folder / "memory")
    return folder / "model", folder / "memory"


@pytest.mark.parametrize("bandwidth", [None, 0.5])
def test_an_answer_is_explained_by_the_kernels_that_wrote_it(bandwidth, folders):
    model, tokenizer = load_model(folders[0])
    text, totals = answer(model, tokenizer, [str(folders[1])], QUESTION, bandwidth=bandwidth, **GREEDY)
    memory = load_memory(str(folders[1]), model)
    prompt = memory.prompt(QUESTION, tokenizer, bandwidth=bandwidth)
    length, output = prompt["input_ids"].shape[1], model.generate(**prompt, **GREEDY)
    assert text == tokenizer.decode(output[0, length:], skip_special_tokens=True)
    sums, of_others = (
        memory.explain(model, output, bandwidth=exponent).by_source()[length - 1 :].sum(0)
        for exponent in (bandwidth, 0.25)
    )
    names, nats = zip(*totals, strict=True)
    assert list(names) == [*TEXTS, "the question and the answer"]
    torch.testing.assert_close(torch.tensor(nats), sums)
    assert (sums - of_others).abs().max() > 1e-3


def test_the_command_line_passes_the_bandwidth_on(folders):
    runner, shown = CliRunner(), []
    for exponent in (0.0, 0.5):
        options = ["--memory", str(folders[1]), "--bandwidth", str(exponent), "--max-new-tokens", "6"]
        result = runner.invoke(app, ["ask", str(folders[0]), QUESTION, *options])
        assert result.exit_code == 0, result.output
        _, totals = answer(*load_model(folders[0]), [str(folders[1])], QUESTION, bandwidth=exponent, **GREEDY)
        lines = [f"{nats:9.2f}  {name}" for name, nats in totals]
        assert all(line in result.output for line in lines)
        shown.append(result.output)
    assert shown[0] != shown[1]
