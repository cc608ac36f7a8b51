# SPDX-License-Identifier: Apache-2.0
"""Problems that users of other models reported, tried on every model of this project; see tests/REPORTS.md."""

import copy
import os
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.kinds import BACKBONE_KINDS, KINDS, for_kinds, make_continuous, observe
from helpers.models import checkpoint_activations, make_ids
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
)

from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME
from training.text.tokenizer import train_tokenizer


PROJECTIONS = ["k_proj", "v_proj", "o_proj"]
language_models = for_kinds("mosaic", "mosaic v2", "memory model")
backbones = for_kinds("mosaic", "mosaic v2", "memory model", "memory model of llama", "memory model of gpt2")
all_models = for_kinds()


def make_mosaic(**config):
    return KINDS["mosaic"].make(**config)


def make_memory(backbones="memory model", **config):
    return KINDS[backbones].make(**config)


def inputs_of(model, seed=0):
    """Return one row that the model reads, as keyword arguments."""
    if model.main_input_name == "observations":
        return {"observations": observe(model, 1, 11, seed=seed).to(model.dtype)}
    return {"input_ids": make_ids(1, 11, seed=seed)}


def answer(model, **inputs):
    outputs = model(**inputs, use_cache=False)
    return outputs.predictions if "observations" in inputs else outputs.logits


def memory_of(outputs):
    return getattr(outputs, MEMORY_NAME)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def generate(model, ids, **settings):
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | settings
    return model.generate(ids, attention_mask=mask, **settings)


def padded(rows, side):
    """Return ids and mask of rows of different length, with padding on one side."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


# Memories


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@backbones
def test_a_row_that_ends_in_padding_goes_on_as_the_row_alone(kind, way):
    model, rows = kind.make(), [make_ids(n, seed=n) for n in (3, 10, 7)]
    ids, mask = padded(rows, "right")
    texts = generate(model, ids, attention_mask=mask, **way)
    for text, row in zip(texts, rows, strict=True):
        assert torch.equal(text[10:], generate(model, row[None], **way)[0, len(row) :])


@pytest.mark.parametrize("side", ["left", "right"])
@backbones
def test_a_memory_of_padded_rows_is_read_on(kind, side):
    model, rows, more = kind.make(), [make_ids(n, seed=n) for n in (3, 10, 7)], make_ids(3, 4, seed=77)
    ids, mask = padded(rows, side)
    with torch.no_grad():
        memory = memory_of(model(ids, attention_mask=mask, use_cache=True))
        whole = torch.cat([mask, torch.ones_like(more)], dim=1)
        logits = model(more, attention_mask=whole, past_key_values=memory, use_cache=True).logits
        for index, row in enumerate(rows):
            alone = model(torch.cat([row, more[index]])[None], use_cache=False).logits[0, -4:]
            torch.testing.assert_close(logits[index], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "static"),
    [("mosaic", False), ("mosaic", True), ("mosaic v2", False), ("mosaic v2", True), ("memory model", False)],
)
def test_a_prompt_that_was_read_once_serves_many_texts(name, static):
    model, prompt = KINDS[name].make(), make_ids(1, 8)
    memory = StaticCache(config=model.config, max_cache_len=32) if static else None
    with torch.no_grad():
        memory = memory_of(model(prompt, past_key_values=memory, use_cache=True))
    for seed in (1, 2):
        text = torch.cat([prompt, make_ids(1, 5, seed=seed)], dim=1)
        assert torch.equal(generate(model, text, past_key_values=copy.deepcopy(memory)), generate(model, text))


def test_observations_that_were_read_once_serve_many_predictions():
    model = make_continuous()
    observations = observe(model, 1, 12)
    with torch.no_grad():
        memory = memory_of(model(observations[:, :7], use_cache=True))
    for _ in range(2):
        predicted = model.predict(observations[:, 7:], 4, past_key_values=copy.deepcopy(memory))
        torch.testing.assert_close(predicted, model.predict(observations, 4), rtol=0, atol=1e-10)


@backbones
def test_finished_rows_leave_a_memory(kind):
    model, read, more = kind.make(), make_ids(4, 7), make_ids(4, 3, seed=5)
    with torch.no_grad():
        memory = memory_of(model(read, use_cache=True))
        for kept in (torch.tensor([0, 2, 3]), torch.tensor([True, False, True])):  # by number, then by a mask
            memory.batch_select_indices(kept)
            read, more = torch.cat([read[kept], more[kept]], dim=1), more[kept]
            logits = model(more, past_key_values=memory, use_cache=True).logits
            expected = model(read, use_cache=False).logits[:, -3:]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


# Training


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@for_kinds("mosaic", "mosaic v2", *BACKBONE_KINDS, "continuous")
def test_a_gradient_flows_through_what_was_remembered(kind, mode):
    """A text in pieces has the gradient of the whole text, in training too."""
    model = without_dropout(kind.make()).train(mode)
    name, read = next(iter(inputs_of(model).items()))
    read = torch.cat([read, inputs_of(model, seed=1)[name]])
    targets = read[:, 1:].flatten() if name == "input_ids" else read[:, 1:].flatten(0, 1)
    measure = F.cross_entropy if name == "input_ids" else F.mse_loss

    def gradients(answers):
        model.zero_grad()
        measure(answers[:, :-1].flatten(0, 1), targets).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients(answer(model, **{name: read}))
    memory, answers = None, []
    for begin, end in ((0, 4), (4, 5), (5, 9), (9, 11)):
        outputs = model(**{name: read[:, begin:end]}, past_key_values=memory, use_cache=True)
        memory = memory_of(outputs)
        answers.append(outputs.logits if name == "input_ids" else outputs.predictions)
    for name, gradient in gradients(torch.cat(answers, dim=1)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@all_models
def test_a_loss_has_its_gradients_whatever_the_mode_and_with_the_default_cache(kind, mode):
    model = kind.make().train(mode)
    inputs = inputs_of(model)
    labels = torch.tensor([1]) if kind.model == "classifier" else next(iter(inputs.values()))
    model(**inputs, labels=labels).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@for_kinds(*BACKBONE_KINDS)
def test_a_memory_model_generates_in_training_as_in_evaluation_or_says_why_not(kind):
    model, ids = without_dropout(kind.make()), make_ids(1, 8)
    expected = generate(model, ids, max_new_tokens=12)
    assert torch.equal(generate(model.train(), ids, max_new_tokens=12), expected)
    checkpoint_activations(model, use_reentrant=False)
    with pytest.raises(ValueError, match="under gradient checkpointing"):
        generate(model, ids)
    with pytest.raises(ValueError, match="leave the cache out"):
        model(ids, labels=ids, use_cache=True)


@language_models
def test_logits_of_the_last_tokens_only_in_training(kind):
    model, ids = kind.make().train(), make_ids(2, 10)
    whole = answer(model, input_ids=ids)
    torch.testing.assert_close(model(ids, logits_to_keep=3, use_cache=False).logits, whole[:, -3:], rtol=0, atol=1e-6)


def training_arguments(folder, **settings):
    defaults = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 0.3}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(folder), **defaults | quiet | settings)


def ragged_rows():
    return [{"input_ids": make_ids(n, seed=n), "label": n % 3} for n in (10, 5, 15, 10, 5)]


def collate(rows):
    """Batches differ in length, so that Trainer pads the predictions that it gathers."""
    ids, mask = padded([row["input_ids"] for row in rows], "right")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def collate_for_verdicts(rows):
    return collate(rows) | {"labels": torch.tensor([row["label"] for row in rows])}


@for_kinds("mosaic", "mosaic v2", "classifier", "continuous")
def test_trainer_predicts_for_each_row_what_the_model_does(kind, tmp_path):
    model, rows, collator = kind.make(), ragged_rows(), collate
    if kind.model == "classifier":
        collator = collate_for_verdicts
    if kind.model == "continuous":
        rows, collator = [{"observations": row, "labels": row} for row in observe(model, 5, 9).float()], None
    options = training_arguments(tmp_path, remove_unused_columns=False)
    predictions = Trainer(model, options, data_collator=collator).predict(rows).predictions
    assert len(predictions) == len(rows)  # and no tuple of several outputs
    for row, predicted in zip(rows, torch.as_tensor(predictions), strict=True):
        name = "observations" if kind.model == "continuous" else "input_ids"
        expected = answer(model, **{name: row[name][None]})[0]
        torch.testing.assert_close(predicted[: len(expected)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "LoRA"])
def test_the_model_of_the_best_evaluation_is_loaded_at_the_end(adapted, tmp_path):
    """Here the largest loss counts as the best, so that the best model is not the last."""
    model = make_mosaic()
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=PROJECTIONS))
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    options = training_arguments(
        tmp_path, max_steps=4, load_best_model_at_end=True, greater_is_better=True, label_names=["labels"], **each
    )
    rows = ragged_rows()
    trainer = Trainer(model, options, data_collator=collate, train_dataset=rows, eval_dataset=rows)
    trainer.args.remove_unused_columns = False
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) > losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-6)


# Saving and loading


@all_models
def test_a_model_survives_pickling_and_copying(kind):
    model = kind.make()
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(answer(again, **inputs_of(model)), answer(model, **inputs_of(model)))
        assert again.all_tied_weights_keys == model.all_tied_weights_keys
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


@backbones
def test_a_memory_survives_pickling(kind):
    model, more = kind.make(), make_ids(1, 2, seed=5)
    with torch.no_grad():
        memory = memory_of(model(make_ids(1, 8), use_cache=True))
        again = pickle.loads(pickle.dumps(memory))
        assert torch.equal(*(model(more, past_key_values=each).logits for each in (again, memory)))


@pytest.mark.slow
def test_a_model_with_its_own_code_goes_to_a_new_process(tmp_path):
    """The name of the folder has a dot, which no Python module may have, and the process is spawned."""
    make_mosaic().save_pretrained(tmp_path / "model-1.4")
    (tmp_path / "parent.py").write_text("""
import multiprocessing, torch
from transformers import AutoModelForCausalLM

def read(queue, model):
    queue.put(model(torch.tensor([[3, 4, 5]])).logits.sum().item())

if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained("model-1.4", trust_remote_code=True)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=read, args=(queue, model))
    process.start()
    process.join(100)
    assert process.exitcode == 0 and type(model).__module__.startswith("transformers_modules")
    assert queue.get(timeout=1) == model(torch.tensor([[3, 4, 5]])).logits.sum().item()
""")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-P", "parent.py"]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def assert_loads(model, folder, loader):
    again, report = loader.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@all_models
def test_a_compiled_model_is_saved_under_its_own_names(kind, tmp_path):
    """Save as accelerate documents it: `save_pretrained(folder, state_dict=accelerator.get_state_dict(model))`."""
    model, loader = kind.make(), kind.auto
    compiled = torch.compile(model, backend="eager").state_dict()
    assert all(name.startswith("_orig_mod.") for name in compiled)
    model.save_pretrained(tmp_path / "whole", state_dict=compiled)
    assert_loads(model, tmp_path / "whole", loader)
    foreign = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"names that this \w+ does not have, such as 'module\."):
        model.save_pretrained(tmp_path / "foreign", state_dict=foreign)


def test_a_model_with_a_compiled_layer_is_saved_under_its_own_names(tmp_path):
    model, expected = make_mosaic(), make_mosaic()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model.save_pretrained(tmp_path)
    assert_loads(expected, tmp_path, AutoModelForCausalLM)


@for_kinds("mosaic", "mosaic v2", "untied mosaic", "memory model", "memory model of llama")
def test_resized_tables_survive_another_initialisation(kind, tmp_path):
    model = kind.make()
    model.resize_token_embeddings(70)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.post_init()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor) and torch.equal(again.state_dict()[name], tensor), name
    assert again.config.vocab_size == 70 and answer(again, input_ids=torch.full((1, 9), 69)).shape[-1] == 70


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16], ids=str)
@all_models
def test_a_precision_that_is_asked_for_is_given(kind, saved, tmp_path):
    kind.make().to(saved).save_pretrained(tmp_path)
    for loader in {kind.auto, AutoModel}:
        for asked, given in (({}, saved), ({"dtype": "auto"}, saved), *(({"dtype": d}, d) for d in (torch.float32,))):
            model = loader.from_pretrained(tmp_path, **asked)
            assert {parameter.dtype for parameter in model.parameters()} == {given}, (loader, asked)
            assert model.config.dtype == given


# Adapters


def adapt(model, seed=0, **config):
    """Return a model in eval mode, with adapters that are away from their start."""
    adapted = get_peft_model(model, LoraConfig(target_modules=PROJECTIONS, r=2, **config))
    return move_adapters(adapted, seed).eval()


def move_adapters(adapted, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


TABLES = [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens", "lm_head"]}]
TOKENS = [{"trainable_token_indices": [3, 5]}]


@pytest.mark.filterwarnings("ignore")  # PEFT's, of ties
@pytest.mark.parametrize("trained", [*TABLES, *TOKENS], ids=lambda trained: next(iter(trained)))
@language_models
def test_a_tied_table_trained_beside_adapters_merges_and_loads(kind, trained, tmp_path):
    ids = torch.tensor([[3, 5, 3, 7, 9, 3, 5, 3, 3, 11, 5]])
    adapted = adapt(kind.make(), **trained)
    expected = answer(adapted, input_ids=ids)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(kind.make(), tmp_path / "adapter").eval()
    torch.testing.assert_close(answer(loaded, input_ids=ids), expected, rtol=0, atol=1e-5)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(answer(merged, input_ids=ids), expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(again, input_ids=ids), expected, rtol=0, atol=1e-5)


@for_kinds("mosaic", "mosaic v2 otherwise", "memory model")
def test_an_adapter_of_a_tied_table_is_warned_of(kind):
    """PEFT merges it into the head too, which the adapter did not change, and warns if it knows of the tie."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(kind.make(), LoraConfig(target_modules=["embed_tokens"]))
    assert any("tie_word_embeddings=True" in str(warning.message) for warning in caught)


def test_whether_a_memory_models_table_is_tied_is_its_decoders_to_say(tmp_path):
    tied, untied = make_memory(), make_memory("memory model of llama")
    for model, is_tied in ((tied, True), (untied, False)):
        assert model.config.tie_word_embeddings is is_tied and model.config.to_dict()["tie_word_embeddings"] is is_tied
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.config.tie_word_embeddings is is_tied
        assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) is is_tied


@pytest.mark.parametrize("use_reentrant", [False, True])
@language_models
def test_adapters_under_checkpointed_activations_have_their_gradients(kind, use_reentrant):
    ids, gradients = make_ids(2, 10), []
    for checkpointed in (False, True):
        adapted = adapt(kind.make(), lora_dropout=0.0).train()
        if checkpointed:
            checkpoint_activations(adapted.base_model.model, use_reentrant)
            adapted.enable_input_require_grads()
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@language_models
def test_adapters_can_be_combined(kind):
    adapted = get_peft_model(kind.make(), LoraConfig(target_modules=PROJECTIONS, r=2), adapter_name="one")
    adapted.add_adapter("two", LoraConfig(target_modules=PROJECTIONS, r=2))
    move_adapters(adapted)
    adapted.add_weighted_adapter(["one", "two"], [0.5, 0.25], "both", combination_type="cat")
    adapted.set_adapter("both")
    expected, ids = kind.make(), make_ids(1, 9)
    modules = dict(expected.named_modules())
    with torch.no_grad():
        for name, module in adapted.base_model.model.named_modules():
            if getattr(module, "lora_A", None):
                added = 0.5 * module.get_delta_weight("one") + 0.25 * module.get_delta_weight("two")
                modules[name].weight.add_(added)
    combined = answer(adapted.eval(), input_ids=ids)
    torch.testing.assert_close(combined, answer(expected, input_ids=ids), rtol=0, atol=1e-5)


def test_each_row_may_have_an_adapter_of_its_own():
    """A mosaic allows it. A memory model reads a row as many chunks, for which PEFT finds too few names."""
    adapted = get_peft_model(make_mosaic(), LoraConfig(target_modules=PROJECTIONS, r=2), adapter_name="one")
    adapted.add_adapter("two", LoraConfig(target_modules=PROJECTIONS, r=2))
    move_adapters(adapted).eval()
    ids, names = make_ids(3, 11), ["one", "two", "__base__"]
    texts = adapted.generate(input_ids=ids, adapter_names=names, max_new_tokens=6, do_sample=False)
    for row, name in enumerate(names[:2]):
        adapted.set_adapter(name)
        alone = adapted.generate(input_ids=ids[row : row + 1], max_new_tokens=6, do_sample=False)
        assert torch.equal(texts[row], alone[0])
    with adapted.disable_adapter():
        assert torch.equal(texts[2], adapted.generate(input_ids=ids[2:], max_new_tokens=6, do_sample=False)[0])
    with pytest.raises(ValueError, match="`adapter_names` should be the same"):
        adapt(make_memory())(input_ids=ids, adapter_names=["default"] * 3)


@language_models
def test_a_resized_table_needs_no_place_in_an_adapter(kind, tmp_path):
    def resized():
        torch.manual_seed(0)
        model = kind.make()
        model.resize_token_embeddings(70)
        return model

    adapted, ids = adapt(resized()), torch.full((1, 9), 68)
    expected = answer(adapted, input_ids=ids)
    adapted.save_pretrained(tmp_path)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(resized(), tmp_path).eval()
    torch.testing.assert_close(answer(again, input_ids=ids), expected, rtol=0, atol=1e-6)


# Several users at once


@language_models
def test_texts_written_in_several_threads_are_those_written_one_by_one(kind):
    model, prompts, texts = kind.make(), [make_ids(1, n, seed=n) for n in (3, 7, 12)], {}

    def write(index):
        texts[index] = generate(model, prompts[index])

    threads = [threading.Thread(target=write, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(texts[index], generate(model, prompt)) for index, prompt in enumerate(prompts))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Once upon a time there was a cat."] * 3, vocab_size=280)


def test_a_streamed_text_that_is_left_in_the_middle_leaves_nothing_behind(tokenizer):
    model = make_mosaic(vocab_size=len(tokenizer))
    inputs = tokenizer("Once upon", return_tensors="pt")
    expected, is_stopped = generate(model, inputs.input_ids), threading.Event()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    stop = {"stopping_criteria": [lambda ids, scores, **_: torch.full((len(ids),), is_stopped.is_set())]}
    options = {"streamer": streamer, "max_new_tokens": 2_000, "do_sample": False, **stop}
    writer = threading.Thread(target=model.generate, kwargs={**inputs, **options})
    writer.start()
    next(iter(streamer))
    is_stopped.set()
    writer.join(60)
    assert not writer.is_alive() and torch.equal(generate(model, inputs.input_ids), expected)


def test_a_streamed_character_of_several_tokens_is_never_cut(tokenizer):
    text, pieces = "a 🤗 日本 é", []
    streamer = TextIteratorStreamer(tokenizer)
    for token in tokenizer(text, return_tensors="pt").input_ids[0]:
        streamer.put(token[None])
    streamer.end()
    pieces.extend(streamer)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


# Other tools


def test_export_of_a_static_memory_is_refused():
    from transformers import GenerationConfig
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    model = make_mosaic()
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static")
    wrapped = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=32, device="cpu")
    example = (torch.tensor([[3]]),), {"cache_position": torch.tensor([0])}
    with pytest.raises(ValueError, match="of a static memory is not supported if its tensors are no inputs"):
        torch.export.export(wrapped, *example, strict=False)


@language_models
def test_a_quantized_model_is_saved_and_loaded(kind, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model = kind.make()
    model.save_pretrained(tmp_path / "model")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    expected = answer(quantized, **inputs_of(model))
    assert 0 < (expected - answer(model, **inputs_of(model))).abs().max() < 0.1
    quantized.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(answer(again, **inputs_of(model)), expected)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_dispatched_layers_keep_the_tie_and_can_be_saved(tmp_path):
    from accelerate import dispatch_model

    model, ids = make_mosaic(), make_ids(1, 7)
    expected = answer(model, input_ids=ids)
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "offloaded"), force_hooks=True)
    assert torch.equal(answer(model, input_ids=ids), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(answer(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), input_ids=ids), expected)


def test_preferences_are_learnt_alike_padded_and_padding_free(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    make_mosaic(vocab_size=len(tokenizer), **special).save_pretrained(tmp_path / "model")
    rows = [{"prompt": "Once " * n, "chosen": "a cat." * n, "rejected": "a time"} for n in (1, 2, 3, 4)]
    logged = []
    for padding_free in (False, True):
        arguments = trl.DPOConfig(
            str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to=[],
            use_cpu=True, bf16=False, activation_checkpointing=False, save_strategy="no", padding_free=padding_free,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        trainer = trl.DPOTrainer(
            model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.train()
        logged.append([entry["logps/chosen"] for entry in trainer.state.log_history if "logps/chosen" in entry])
        if not padding_free:
            expected = [chosen_log_probability(batch, row, tmp_path / "model") for row in range(4)]
            assert logged[0][0] == pytest.approx(sum(expected) / 4, rel=1e-5)
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)


@torch.no_grad()
def chosen_log_probability(batch, row, folder):
    """Return the log probability of the completion in one row of TRL's batch, read alone and without padding."""
    is_token = batch["attention_mask"][row].bool()
    ids, is_completion = batch["input_ids"][row][is_token], batch["completion_mask"][row][is_token].bool()
    logits = answer(AutoModelForCausalLM.from_pretrained(folder), input_ids=ids[None])[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[is_completion[1:]].sum().item()


def test_what_a_memory_model_cannot_write_from_is_refused():
    with pytest.raises(ValueError, match="inputs_embeds"):
        make_memory().generate(inputs_embeds=torch.randn(1, 4, 24), max_new_tokens=3)
    with pytest.raises(ValueError, match="is not what a memory model has read"):
        generate(make_memory(), make_ids(1, 8), past_key_values=DynamicCache())
