# SPDX-License-Identifier: Apache-2.0
"""Tools that others wrote for causal language models take an exported folder: lm-evaluation-harness, TRL, torchao and
`transformers serve`.
"""

import copy
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import lm_eval
import pytest
import torch
import yaml
from helpers.kinds import KINDS, for_kinds
from helpers.models import make_ids, make_model
from helpers.tools import logged, sft
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from torchao import quantization
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig, Trainer, TrainingArguments, pipeline

from modeling_memory_mosaic import MemoryMosaicConfig
from training.export import export_model
from training.text.story_writer import write_stories
from training.text.tokenizer import train_tokenizer


NUM_STORIES = 300
PROJECTIONS = {"mosaic": ("k_proj.weight", "v_proj.weight", "o_proj.weight")}
PROJECTIONS["mosaic v2"] = (
    *PROJECTIONS["mosaic"],
    *(f"{name}_proj.weight" for name in ("gate", "leak", "up", "down")),
)
PROJECTIONS["memory model"] = (*PROJECTIONS["mosaic"], "prefix_proj.weight", "0.weight", "1.weight")
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function that exports a model of a kind, once, trained until its loss is well below a uniform guess."""
    stories = list(write_stories(NUM_STORIES))
    tokenizer = train_tokenizer(stories, 320)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = torch.cat([tokenizer(story + tokenizer.eos_token, return_tensors="pt").input_ids[0] for story in stories])
    # Four-bit weights come in groups of 32, which must divide the width.
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_attention_heads": 4}
    backbone = MemoryMosaicConfig(**sizes, **NO_DROPOUT, num_hidden_layers=1)

    @functools.cache
    def export(name):
        if name == "mosaic":
            model, num_steps = make_model(**sizes, **special).train(), 150
        elif name == "mosaic v2":
            widths = {
                "intermediate_size": 192,
                "short_term_window": 16,
                "long_term_delay": 8,
                "tie_word_embeddings": True,
            }
            model, num_steps = KINDS[name].make(**sizes, **widths, **special).train(), 150
        else:
            settings = {"encoder": backbone, "decoder": backbone, "chunk_length": 32}
            model, num_steps = KINDS[name].make(**settings, **special).train(), 80
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(num_steps):
            windows = text.unfold(0, 64, 1)[make_ids(16, seed=step, vocab_size=len(text) - 64)]
            model(windows, labels=windows, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folder = tmp_path_factory.mktemp("peers") / "model"
        for settings in (model.config, model.generation_config):
            for token, number in special.items():
                setattr(settings, token, number)
        export_model(model.eval(), tokenizer, folder)
        return folder

    return export


@pytest.fixture
def folder(request, exported):
    """Return an exported folder of the kind that a test names, or of a mosaic."""
    return exported(request.getfixturevalue("kind").name if "kind" in request.fixturenames else "mosaic")


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def held_out(number):
    return list(write_stories(NUM_STORIES + number))[NUM_STORIES:]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def run_clean(home, *command, timeout=300, offline=True, **options):
    """Run a command that knows the folder only: it does not import this package and has a cache of its own."""
    process = subprocess.run(
        [sys.executable, "-I", "-m", *command],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=home,
        env=os.environ | {"HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": str(int(offline))},
        **options,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


# lm-evaluation-harness


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Write three tasks on texts of very different lengths, each as a YAML file and a file of rows."""
    folder = tmp_path_factory.mktemp("tasks")
    stories = held_out(24)
    endings, texts = [], [*stories[:3], " ".join(stories[3:9])]  # the last one is longer than a window
    for index, (story, other) in enumerate(zip(stories[:12], stories[12:], strict=True)):
        words, begin, length = story.split(), (3, 10, 40, 80)[index % 4], (2, 5, 12)[index % 3]
        choices = [words[begin : begin + length], other.split()[length:0:-1]]
        row = {"context": " ".join(words[:begin]), "endings": [" " + " ".join(choice) for choice in choices]}
        endings.append(row | {"label": 0})
    for name, rows in {"endings": endings, "texts": [{"text": text} for text in texts]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write(name, data, metrics, **options):
        metrics = [{"metric": name, "aggregation": how, "higher_is_better": up} for name, how, up in metrics]
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{data}.jsonl")}}}
        task = {"task": name, **data, "test_split": "test", "metric_list": metrics, **options}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")

    write(
        "mosaic_endings",
        "endings",
        [("acc", "mean", True), ("acc_norm", "mean", True)],
        output_type="multiple_choice",
        doc_to_text="{{context}}",
        doc_to_choice="{{endings}}",
        doc_to_target="{{label}}",
        target_delimiter="",
    )
    write(
        "mosaic_stories",
        "texts",
        [("bits_per_byte", "bits_per_byte", False)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
    )
    write(
        "mosaic_continued",
        "endings",
        [("exact_match", "mean", True)],
        output_type="generate_until",
        doc_to_text="{{context}}",
        doc_to_target="{{endings[0]}}",
        generation_kwargs={"max_gen_toks": 8, "do_sample": False, "until": ["\n"]},
    )
    return folder


def harness(folder, tasks, batch_size):
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(folder), device="cpu", batch_size=batch_size),
        tasks=["mosaic_endings", "mosaic_stories", "mosaic_continued"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )


def answers(results, task):
    """Return the answers of the model to the requests of a task: numbers or texts."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    answers = [answer for sample in samples for responses in sample["resps"] for answer in responses]
    return [answer[0] if isinstance(answer, tuple) else answer for answer in answers]


def log_likelihood(model, tokenizer, context, text):
    """Return the log probability of a text behind a context, in nats, from the logits."""
    ids = tokenizer(context + text, return_tensors="pt").input_ids
    begin = len(tokenizer(context).input_ids)
    with torch.no_grad():
        log_probs = model(ids).logits[:, begin - 1 : -1].log_softmax(-1)
    return log_probs.gather(-1, ids[:, begin:, None]).sum().item()


@pytest.mark.slow
@for_kinds("mosaic", "mosaic v2", "memory model")
def test_harness_scores_are_the_models_whatever_the_batch_size(kind, folder, tasks, tokenizer):
    one, eight = (harness(folder, tasks, batch_size) for batch_size in (1, 8))
    for task in ("mosaic_endings", "mosaic_stories"):
        assert answers(one, task) == pytest.approx(answers(eight, task), rel=1e-6, abs=1e-4)
    assert answers(one, "mosaic_continued") == answers(eight, "mosaic_continued")
    assert all(answers(one, "mosaic_continued"))
    assert one["results"]["mosaic_endings"] == pytest.approx(eight["results"]["mosaic_endings"])
    bits = [result["results"]["mosaic_stories"]["bits_per_byte,none"] for result in (one, eight)]
    assert bits[0] == pytest.approx(bits[1], abs=1e-4)
    assert bits[0] < {"memory model": 6}.get(kind.name, 3)  # of 8.3 for a uniform guess among 320 tokens

    model = load(folder)
    for task, name in (("mosaic_endings", "endings"), ("mosaic_stories", "texts")):
        rows = [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        if name == "endings":
            pairs = [(row["context"], ending) for row in rows for ending in row["endings"]]
        else:  # the last text takes several windows
            pairs = [(tokenizer.bos_token, row["text"]) for row in rows[:-1]]
        expected = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
        assert answers(eight, task)[: len(pairs)] == pytest.approx(expected, rel=1e-6, abs=1e-4)


@pytest.mark.slow
def test_harness_from_the_command_line(folder, tasks, tmp_path):
    command = ["--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True"]
    command += ["--tasks", "mosaic_endings,mosaic_stories", "--include_path", str(tasks)]
    command += ["--device", "cpu", "--batch_size", "8", "--output_path", str(tmp_path / "results")]
    printed = run_clean(tmp_path, "lm_eval", *command)
    assert "mosaic_endings" in printed
    assert list((tmp_path / "cache").rglob("transformers_modules/**/modeling_memory_mosaic.py"))
    (path,) = (tmp_path / "results").rglob("results_*.json")
    results, expected = json.loads(path.read_text(encoding="utf-8"))["results"], harness(folder, tasks, 1)["results"]
    for task, metric in (
        ("mosaic_endings", "acc"),
        ("mosaic_endings", "acc_norm"),
        ("mosaic_stories", "bits_per_byte"),
    ):
        assert results[task][f"{metric},none"] == pytest.approx(expected[task][f"{metric},none"], abs=1e-4)


# TRL


def uneven_texts():
    return [story[: 20 + 45 * index] for index, story in enumerate(held_out(6))]


@pytest.mark.slow
@for_kinds("mosaic", "mosaic v2")
def test_sft_trains_every_parameter_on_the_models_own_loss(kind, folder, tokenizer, tmp_path):
    """TRL computes the loss from hidden states, so it has to read the scale of the logits."""
    still = NO_DROPOUT if kind.model == "mosaic" else {"long_term_delay_range": None}
    model = load(folder, **still)
    before = copy.deepcopy(model.state_dict())
    trainer = sft(model, tokenizer, tmp_path / "run", uneven_texts())
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert not batch["attention_mask"].all()
    own_loss = load(folder)(**batch).loss.item()
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(own_loss, rel=1e-5)
    assert logged(trainer)[-1] < own_loss
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all() and not torch.equal(tensor, before[name]), name
    trainer.save_model(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("Once").input_ids == tokenizer("Once").input_ids


def test_sft_with_lora(folder, tokenizer, tmp_path):
    lora = LoraConfig(target_modules="all-linear", target_parameters=["slot_keys", "slot_values"])
    trainer = sft(load(folder, **NO_DROPOUT), tokenizer, tmp_path / "run", uneven_texts(), lora)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0]
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora" not in name), name
    trainer.save_model(tmp_path / "saved")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    expected = trainer.model.eval()(ids).logits
    again = PeftModel.from_pretrained(load(folder), tmp_path / "saved").eval()
    torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(load(folder)(ids).logits, expected, rtol=0, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 256},
        {"packing": True, "max_length": 256, "pad_to_multiple_of": 64},
    ],
    ids=["padding-free", "packed", "packed and padded"],
)
def test_sft_on_packed_documents_is_sft_on_each_alone(folder, tokenizer, tmp_path, options):
    """TRL puts all documents of a batch in one row and passes where each begins, under any attention."""
    texts = uneven_texts()
    packed, apart = (
        sft(load(folder, **NO_DROPOUT), tokenizer, tmp_path, texts, **options) for options in (options, {})
    )
    batch = packed.data_collator(list(packed.train_dataset))
    assert len(batch["input_ids"]) == 1 and "attention_mask" not in batch
    assert {"position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"} <= batch.keys()
    assert (batch["position_ids"] == 0).sum() >= len(texts)
    for trainer in (packed, apart):
        trainer.train()
    assert logged(packed) == pytest.approx(logged(apart), rel=1e-4)
    assert logged(packed, "grad_norm") == pytest.approx(logged(apart, "grad_norm"), rel=1e-3)


def test_sft_on_wrapped_documents_in_bfloat16(folder, tokenizer, tmp_path):
    """Rows cut from one long text, as in pretraining: a document runs on into the next. Autocast is TRL's default."""
    model = load(folder, **NO_DROPOUT)
    options = {"max_length": 64, "packing": True, "packing_strategy": "wrapped", "bf16": True}
    trainer = sft(model, tokenizer, tmp_path, uneven_texts(), **options)
    batch = trainer.data_collator(list(trainer.train_dataset)[:6])
    assert (batch["input_ids"][:, 1:-1] == tokenizer.eos_token_id).any() and "position_ids" not in batch
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in model.parameters())


# torchao


def quantization_of(name):
    """Cases are those that run on a CPU: eight and four bits for weights, and eight bits for activations too."""
    if name == "int8":
        return quantization.Int8WeightOnlyConfig()
    if name == "int4":
        group = quantization.PerGroup(32)
        return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)
    return quantization.Int8DynamicActivationInt8WeightConfig()


def load_quantized(folder, name, way="from_pretrained"):
    config = quantization_of(name)
    if way == "from_pretrained":
        return load(folder, quantization_config=TorchAoConfig(config))
    model = load(folder)
    # All but the head, which is the embedding too.
    quantize_(model, config, lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name)
    return model


def loss_of(model, tokenizer, texts):
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    with torch.no_grad():
        return sum(model(row, labels=row).loss.item() for row in rows) / len(rows)


def is_quantized(tensor):
    return type(tensor.data) is not torch.Tensor


@for_kinds("mosaic", "mosaic v2", "memory model")
@pytest.mark.parametrize("way", ["from_pretrained", "quantize_"])
@pytest.mark.parametrize(("name", "bound"), [("int8", 0.01), ("int8 dynamic", 0.01), ("int4", 0.05)])
def test_quantized_model_loses_little(kind, folder, tokenizer, tmp_path, name, bound, way):
    """Projections are quantized; slots, per-head scalars, norms and the embedding, which is the head, are not."""
    model, texts = load_quantized(folder, name, way), held_out(12)
    expected = {key for key, _ in model.named_parameters() if key.endswith(PROJECTIONS[kind.name])}
    assert {key for key, tensor in model.named_parameters() if is_quantized(tensor)} == expected
    assert all(tensor.dtype == torch.float32 for tensor in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    full_loss, loss = loss_of(load(folder), tokenizer, texts), loss_of(model, tokenizer, texts)
    print(f"loss {loss:.4f} of {full_loss:.4f} in float32")
    # A uniform guess has 5.8, so there is something to lose.
    assert full_loss < {"memory model": 4.5}.get(kind.name, 3)
    assert 0 < abs(loss - full_loss) < bound

    inputs = tokenizer(["Once upon a time", "One day"], return_tensors="pt", padding=True)
    text = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert text.shape[1] > inputs.input_ids.shape[1]
    assert torch.equal(text, model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False))
    if way == "from_pretrained":
        model.save_pretrained(tmp_path)
        assert loss_of(load(tmp_path), tokenizer, texts) == pytest.approx(loss, abs=1e-6)


@for_kinds("continuous of real weights", "classifier")
def test_quantized_layers_of_other_models_answer_nearly_alike(kind):
    model = kind.make()
    inputs = kind.inputs(model, 2, 12)
    expected = kind.answer(model, inputs)
    quantize_(model, quantization_of("int8"))
    assert sum(is_quantized(parameter) for parameter in model.parameters()) >= 3
    error = (kind.answer(model, inputs) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


@for_kinds("classifier")
def test_a_pipeline_classifies_a_batch_as_each_text(kind, exported):
    tokenizer = AutoTokenizer.from_pretrained(exported("mosaic"))
    model = kind.make(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)
    texts = ["Once upon a time", "One day, a little cat", "The"]
    for verdict, text in zip(classify(texts, batch_size=3), texts, strict=True):
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        scores = {entry["label"]: entry["score"] for entry in verdict}
        expected = dict(zip(model.config.id2label.values(), logits.softmax(-1).tolist(), strict=True))
        assert scores == pytest.approx(expected, abs=1e-5)


def plain(parameter):
    parameter = parameter.detach()
    return (parameter.dequantize() if is_quantized(parameter) else parameter).clone()


@for_kinds("mosaic", "mosaic v2", "memory model")
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_lora_on_a_quantized_base(kind, folder, tokenizer, name):
    model = get_peft_model(load_quantized(folder, name), LoraConfig(target_modules="all-linear"))
    quantized = [key for key, parameter in model.named_parameters() if is_quantized(parameter)]
    assert len(quantized) == {"mosaic": 10, "mosaic v2": 24, "memory model": 13}[kind.name]
    before = {key: plain(parameter) for key, parameter in model.named_parameters()}
    batch = tokenizer([story[:200] for story in held_out(4)], return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(model(**batch, labels=labels, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.2
    for key, parameter in model.named_parameters():
        assert torch.equal(plain(parameter), before[key]) == ("lora" not in key), key
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    assert model.eval().generate(**inputs, max_new_tokens=4).shape[1] > inputs.input_ids.shape[1]


def test_sft_with_lora_on_a_quantized_base(folder, tokenizer, tmp_path):
    """Eight bits train by `Trainer`, which refuses four bits: these train in a plain loop."""
    lora = LoraConfig(target_modules="all-linear")
    trainer = sft(load_quantized(folder, "int8"), tokenizer, tmp_path, uneven_texts(), lora)
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0]
    with pytest.raises(ValueError, match="do not support training"):
        Trainer(get_peft_model(load_quantized(folder, "int4"), lora), TrainingArguments(str(tmp_path), use_cpu=True))


# transformers serve, transformers chat


class Server:
    """Run `transformers serve FOLDER` on a free port, in a process group of its own."""

    def __init__(self, folder, home, *options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.folder, self.log = f"http://127.0.0.1:{port}", str(folder), home / "serve.log"
        command = [sys.executable, "-I", "-m", "transformers.cli.transformers", "serve", self.folder]
        command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--trust-remote-code", *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=home,
                env=os.environ | {"HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )

    def __enter__(self):
        try:
            deadline = time.monotonic() + 180
            while not self.is_healthy():
                assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
                try:
                    self.process.wait(30)
                except subprocess.TimeoutExpired:
                    continue

    def request(self, path, **body):
        """Send a request without a proxy, whatever the environment sets."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            return response.read().decode()

    def is_healthy(self):
        try:
            return json.loads(self.request("/health")) == {"status": "ok"}
        except urllib.error.URLError:
            return False

    def chat(self, prompt, **options):
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self.folder, "messages": messages, "max_tokens": 12, "temperature": 0}
        return self.request("/v1/chat/completions", **body | options)


@pytest.mark.slow
@for_kinds("mosaic", "mosaic v2", "memory model")
def test_serve_and_chat(kind, folder, tokenizer, tmp_path):
    prompt = "Once upon a time there was a"
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = load(folder).generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) == 12 and expected.strip()
    with Server(folder, tmp_path) as server:
        answer = json.loads(server.chat(prompt))
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["prompt_tokens"] == inputs.input_ids.shape[1]
        assert answer["usage"]["completion_tokens"] == 12

        events = server.chat(prompt, stream=True).split("\n\n")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
        deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(deltas) == expected and sum(map(bool, deltas)) > 3

        body = {"model": str(folder), "prompt": prompt, "max_tokens": 12, "temperature": 0}
        assert json.loads(server.request("/v1/completions", **body))["choices"][0]["text"] == expected

        # The terminal asks whether to go on, because the answer has reached its length. It connects to this machine
        # only, but refuses to start where the Hub is switched off.
        command = ["transformers.cli.transformers", "chat", str(folder), server.url + "/v1"]
        flags = ["max_new_tokens=12", "do_sample=False"]
        printed = run_clean(tmp_path, *command, *flags, input=f"{prompt}\nn\n!exit\n", offline=False, timeout=120)
        assert " ".join(expected.split()) in " ".join(printed.split())
    assert server.process.returncode in (0, -signal.SIGTERM)


@pytest.mark.slow
def test_serve_refuses_continuous_batching(folder, tmp_path):
    with Server(folder, tmp_path, "--continuous-batching") as server:
        with pytest.raises(urllib.error.HTTPError, match="500"):
            server.chat("Once upon a time")
        assert server.is_healthy()
    assert "ValueError: Continuous batching is not supported" in server.log.read_text()
