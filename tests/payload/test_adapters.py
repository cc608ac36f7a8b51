# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT come off completely or are refused, and are never saved in part; soft prompts are read once."""

import copy
import warnings

import pytest
import torch
from helpers.kinds import SHORT_LEVELS, make_mosaic
from helpers.models import make_ids, make_model
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    XLoraConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from modeling_memory_mosaic import (
    ContinuousMemoryMosaicConfig,
    ContinuousMemoryMosaicModel,
    MemoryModelConfig,
    MemoryModelEncoder,
    MemoryModelForCausalLM,
    MemoryMosaicConfig,
    MemoryMosaicForCausalLM,
    MemoryMosaicForSequenceClassification,
    MemoryMosaicModel,
    MemoryMosaicV2Config,
    MemoryMosaicV2ForCausalLM,
)
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME


pytestmark = [
    # PEFT warns so at every `generate` of every model, which cannot take packed documents anyway.
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

VOCAB_SIZE, NUM_VIRTUAL_TOKENS = 61, 3
BACKBONE = {"vocab_size": VOCAB_SIZE, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
LLAMA = LlamaConfig(**BACKBONE, intermediate_size=16, tie_word_embeddings=True)
PROJECTIONS = ["k_proj", "v_proj", "o_proj"]
SLOTS = ["persistent_memory.slot_keys", "persistent_memory.slot_values"]
PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")


def mosaic_config(**fields):
    return MemoryMosaicConfig(**BACKBONE | {"num_persistent_slots": 5} | fields)


def v2_config(**fields):
    return MemoryMosaicV2Config(**BACKBONE | SHORT_LEVELS | fields)


def memory_config(backbone=None):
    backbone = backbone or mosaic_config()
    return MemoryModelConfig(encoder=backbone, decoder=backbone, chunk_length=4)


def continuous_config():
    return ContinuousMemoryMosaicConfig(complex_weights=False, key_leak=True, learnable_beta=True)


def read_observations(model):
    return model(torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))).predictions


def reader(name, **inputs):
    return lambda model: getattr(model(make_ids(2, 10), **inputs), name)


# For each class: its configuration, what it computes, and targets that nest adapters within adapters.
MODELS = {
    "base": (MemoryMosaicModel, mosaic_config, reader("last_hidden_state"), SLOTS),
    "causal": (MemoryMosaicForCausalLM, mosaic_config, reader("logits"), SLOTS),
    "classifier": (
        MemoryMosaicForSequenceClassification,
        mosaic_config,
        reader("logits", attention_mask=torch.ones(2, 10)),
        SLOTS,
    ),
    "v2": (MemoryMosaicV2ForCausalLM, v2_config, reader("logits"), []),
    "v2_slots": (
        MemoryMosaicV2ForCausalLM,
        lambda: v2_config(persistent_memory_type="slots", num_persistent_slots=5),
        reader("logits"),
        SLOTS,
    ),
    "memory_model": (MemoryModelForCausalLM, memory_config, reader("logits"), SLOTS),
    "memory_model_llama": (MemoryModelForCausalLM, lambda: memory_config(LLAMA), reader("logits"), []),
    "encoder": (MemoryModelEncoder, memory_config, reader("memories"), SLOTS),
    "continuous": (ContinuousMemoryMosaicModel, continuous_config, read_observations, []),
}
every_model = pytest.mark.parametrize("name", MODELS)


def shake(model, seed=0, only="", scale=0.1):
    """Move the parameters whose names hold `only` away from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name and parameter.is_floating_point():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build(name):
    torch.manual_seed(0)
    kind, config, *_ = MODELS[name]
    return shake(kind(config()), scale=0.05)


def nested(name, **settings):
    return LoraConfig(r=2, target_modules=PROJECTIONS, target_parameters=MODELS[name][3], **settings)


def adapt(name, **settings):
    adapted = get_peft_model(build(name), nested(name, **settings))
    return shake(shake(adapted, 1, "lora_"), 2, "modules_to_save.")


@torch.no_grad()
def read(name, model):
    return MODELS[name][2](model)


def assert_near(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def assert_is_whole(name, model, expected, folder):
    """Check that no part of an adapter is left in a model, and that it computes the same after saving and loading."""
    assert_near(read(name, model), expected)
    assert model.state_dict().keys() == build(name).state_dict().keys()
    model.save_pretrained(folder)
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_near(read(name, loaded.eval()), expected)


@every_model
def test_adapters_are_merged_and_taken_off_in_one_call(name, tmp_path):
    before, after = read(name, build(name)), read(name, adapt(name))
    assert not torch.allclose(after, before, atol=1e-3)
    assert_is_whole(name, adapt(name).merge_and_unload(), after, tmp_path / "merged")
    assert_near(read(name, adapt(name).merge_and_unload(safe_merge=True)), after)
    assert_is_whole(name, adapt(name).unload(), before, tmp_path / "base")
    assert torch.equal(read(name, adapt(name).unload()), before)


@every_model
def test_adapters_are_disabled_switched_joined_and_deleted(name, tmp_path):
    before = read(name, build(name))
    adapted = shake(get_peft_model(build(name), LoraConfig(r=2, target_modules=PROJECTIONS)), 1, "lora_")
    first = read(name, adapted)
    with adapted.disable_adapter():
        assert torch.equal(read(name, adapted), before)
    adapted.merge_adapter()
    assert_near(read(name, adapted), first)
    adapted.unmerge_adapter()
    adapted.save_pretrained(tmp_path)
    adapted.add_adapter("second", nested(name))
    shake(adapted, 3, ".second.")
    adapted.set_adapter("second")
    second = read(name, adapted)
    assert not torch.allclose(second, first, atol=1e-3)
    adapted.set_adapter("default")
    assert_near(read(name, adapted), first)
    adapted.save_pretrained(tmp_path, selected_adapters=["second"])
    for adapter, expected in (("", first), ("second", second)):
        loaded = PeftModel.from_pretrained(build(name), tmp_path / adapter).eval()
        assert_near(read(name, loaded), expected)
    adapted.base_model.set_adapter(["default", "second"])
    both = read(name, adapted)
    assert_is_whole(name, copy.deepcopy(adapted).merge_and_unload(), both, tmp_path / "both_merged")
    adapted.delete_adapter("default")
    assert_near(read(name, adapted), second)
    assert_is_whole(name, adapted.merge_and_unload(), second, tmp_path / "second_merged")


CONTEXTUAL = ["contextual_memory.k_proj", "contextual_memory.v_proj"]
TARGETS = {
    "projections_and_slots": {"target_modules": PROJECTIONS, "target_parameters": SLOTS},
    "projections": {"target_modules": PROJECTIONS},
    "slots": {"target_modules": [], "target_parameters": SLOTS},
    "contextual_and_slots": {"target_modules": CONTEXTUAL, "target_parameters": SLOTS},
}
# PEFT passes over the projections within the wrapper of slots that another adapter has put there.
PASSED_OVER = {
    (first, second)
    for first in TARGETS
    for second in TARGETS
    if second != "slots" and ("slots" in first or second == "contextual_and_slots")
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Make a folder with an adapter for each kind of targets, and return what each computes alone."""
    folder, alone = tmp_path_factory.mktemp("adapters"), {}
    for seed, (kind, targets) in enumerate(TARGETS.items()):
        adapted = shake(get_peft_model(build("causal"), LoraConfig(r=2, **targets)), seed, "lora_")
        adapted.save_pretrained(folder / kind)
        alone[kind] = read("causal", adapted)
    return folder, alone


@pytest.mark.parametrize("first", TARGETS)
@pytest.mark.parametrize("second", TARGETS)
def test_a_second_adapter_acts_whole_or_is_refused(first, second, adapters):
    folder, alone = adapters
    adapted = PeftModel.from_pretrained(build("causal"), folder / first, "first")
    adapted.load_adapter(folder / second, "second")
    adapted.eval()
    assert_near(read("causal", adapted), alone[first])
    assert_near(read("causal", copy.deepcopy(adapted).merge_and_unload()), alone[first])
    for is_alone in (False, True):
        if is_alone:
            adapted.delete_adapter("first")
        adapted.set_adapter("second")
        uses = [lambda: adapted, lambda: copy.deepcopy(adapted).merge_and_unload()]
        for use in uses:
            if (first, second) in PASSED_OVER:
                with pytest.raises(ValueError, match="'second' was added to a model whose slots another adapter"):
                    read("causal", use())
            else:
                assert_near(read("causal", use()), alone[second])
        with adapted.disable_adapter():
            assert torch.equal(read("causal", adapted), read("causal", build("causal")))


@every_model
@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": []},
        {"target_modules": ["o_proj"]},
        {"modules_to_save": ["k_proj"], "target_modules": ["v_proj"]},
    ],
    ids=["projections", "one", "trained_copies"],
)
def test_a_model_with_adapters_in_it_is_not_saved(name, settings, tmp_path):
    adapted = get_peft_model(build(name), LoraConfig(**{"target_modules": PROJECTIONS} | settings))
    for model in [adapted.get_base_model(), *(getattr(adapted, part) for part in ("encoder",) if "memory" in name)]:
        with pytest.raises(ValueError, match=r"An adapter still wraps \d+ modules, such as '.*(load|merge)"):
            model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:target_modules=.* were set but no module was matched")
@pytest.mark.parametrize("name", ["base", "causal", "classifier", "memory_model", "encoder"])
def test_what_one_call_leaves_is_refused_until_nothing_is_left(name, tmp_path):
    """PEFT takes trained copies of layers out of their wrapper, with the adapters in them."""
    settings = {"modules_to_save": ["layers.0"]}
    expected, adapted = read(name, adapt(name, **settings)), adapt(name, **settings)
    with pytest.raises(ValueError, match="taken the outer adapters off, but"):
        adapted.merge_and_unload()
    with pytest.raises(ValueError, match="An adapter still wraps"):
        adapted.get_base_model().save_pretrained(tmp_path)
    assert_is_whole(name, adapted.merge_and_unload(), expected, tmp_path)
    adapted = adapt(name, **settings)
    with pytest.raises(ValueError, match="taken the outer adapters off, but"):
        adapted.unload()


@pytest.mark.parametrize("name", ["base", "causal", "classifier", "memory_model", "encoder"])
def test_trained_copies_are_merged(name, tmp_path):
    for copied in ("contextual_norm", "persistent_memory.o_proj"):
        settings = {"modules_to_save": [copied]}
        expected = read(name, adapt(name, **settings))
        assert_is_whole(name, adapt(name, **settings).merge_and_unload(), expected, tmp_path / copied)


def test_offloaded_layers_refuse_what_would_be_lost():
    accelerate = pytest.importorskip("accelerate")
    model = build("causal")
    accelerate.cpu_offload(model, torch.device("cpu"))
    adapted = shake(get_peft_model(model, nested("causal")), 1, "lora_")
    with pytest.raises(ValueError, match="load the model without offloading"):
        adapted.merge_and_unload()


def test_adapters_that_transformers_attaches_are_saved_alone(tmp_path):
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(str(error))
    model = build("causal")
    before = read("causal", model)
    model.add_adapter(nested("causal"))
    after = read("causal", shake(model, 1, "lora_"))
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    assert_near(read("causal", PeftModel.from_pretrained(build("causal"), tmp_path / "adapter").eval()), after)
    model.delete_adapter("default")
    assert torch.equal(read("causal", model), before)
    with pytest.raises(ValueError, match="An adapter still wraps"):
        model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["causal", "memory_model", "memory_model_llama"])
@pytest.mark.parametrize(
    "settings",
    [{"trainable_token_indices": [3, 4]}, {"modules_to_save": ["embed_tokens"]}],
    ids=["tokens", "table"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings are no")
def test_a_table_that_is_also_the_head_is_adapted_as_such(name, settings, tmp_path):
    def adapted():
        model = get_peft_model(build(name), LoraConfig(target_modules=PROJECTIONS, **settings))
        return shake(shake(model, 1, "trainable_tokens_delta"), 2, "modules_to_save.")

    expected = read(name, adapted())
    assert not torch.allclose(expected, read(name, build(name)), atol=1e-3)
    model = adapted().merge_and_unload()
    model.save_pretrained(tmp_path)
    assert_near(read(name, model), expected)
    assert_near(read(name, type(model).from_pretrained(tmp_path).eval()), expected)


@pytest.mark.parametrize("name", ["causal", "memory_model"])
def test_merging_into_a_table_that_is_also_the_head_is_warned_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(build(name), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        adapted.merge_and_unload()


# Settings that a method of PEFT needs for so small a model.
KINDS = dict.fromkeys(PEFT_TYPE_TO_CONFIG_MAPPING, {}) | {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 4},
    "CPT": {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["contextual_norm"]},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "POLY": {"n_tasks": 2, "n_skills": 2, "r": 4, "n_splits": 1},
    "PSOFT": {"r": 4},
    "P_TUNING": {"encoder_hidden_size": 8},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2, "r": 2},
    "WAVEFT": {"n_frequency": 20},
}
SOFT_PROMPTS = ("CPT", "MULTITASK_PROMPT_TUNING", "PROMPT_TUNING", "P_TUNING")
# Methods that PEFT refuses, as it knows the layers of other models only, or that fail before there is a model.
NOT_ATTACHED = {"ADAPTION_PROMPT": "Unsupported model type", "SHADOW": "layer_types"}
REFUSED = {"LILY": "pass `use_cache=False`"} | dict.fromkeys(PREFIX_TYPES, "use prompt tuning or LoRA")
NEEDS_TASKS = ("MULTITASK_PROMPT_TUNING", "POLY")


def attach(kind, model, folder, task_type="CAUSAL_LM"):
    """Make a model with an adapter by a method of PEFT's registry, moved away from its start."""
    if kind == "XLORA":
        get_peft_model(build("causal"), LoraConfig(target_modules=PROJECTIONS)).save_pretrained(folder)
        model.config.use_cache = False  # which it asks for
        config = XLoraConfig(task_type=task_type, hidden_size=24, xlora_size=8, adapters={"0": str(folder)})
    else:
        settings = {} if kind in (*SOFT_PROMPTS, *PREFIX_TYPES) else {"target_modules": PROJECTIONS}
        if kind in (*SOFT_PROMPTS, *PREFIX_TYPES) and kind != "CPT":
            settings["num_virtual_tokens"] = NUM_VIRTUAL_TOKENS
        if kind == "ADAPTION_PROMPT":
            settings = {"adapter_len": 3, "adapter_layers": 1}
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type=task_type, **settings | KINDS[kind])
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def padded_batch():
    ids, mask = make_ids(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = mask[1, :1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def write(model, **settings):
    """Write four tokens greedily for each row; return them with their logits."""
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
    return model.generate(return_dict_in_generate=True, output_logits=True, **padded_batch() | settings)


@torch.no_grad()
def assert_is_read_anew(model, written, attention_mask, **inputs):
    """Logits of generation equal those of one pass over the written text."""
    ids, num_new = written.sequences, len(written.logits)
    mask = torch.nn.functional.pad(attention_mask, (0, num_new), value=1)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits[:, -num_new - 1 : -1]
    assert_near(torch.stack(written.logits, dim=1), expected, 1e-4)


# Methods that change what layers compute, and nothing that `generate` does. Any method not named here is always run.
OF_LAYERS = set(
    "ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR MISS OFT "
    "OSF PEANUT PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA "
    "WAVEFT".split()
)
ALL_KINDS = [
    pytest.param(kind, marks=[pytest.mark.slow] * (kind in OF_LAYERS)) for kind in sorted(PEFT_TYPE_TO_CONFIG_MAPPING)
]


# PEFT initialises some adapters with warnings that do not concern this model.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] * (kind in OF_LAYERS))
        for kind in sorted(PEFT_TYPE_TO_CONFIG_MAPPING)
    ],
)
def test_every_kind_of_adapter_is_decoded_as_it_is_read_or_refused(kind, tmp_path):
    """Run all methods that PEFT has registered, so that no new one is passed over."""
    model = make_model(num_hidden_layers=1, pad_token_id=0)
    if kind in NOT_ATTACHED:
        with pytest.raises((ValueError, AttributeError), match=NOT_ATTACHED[kind]):
            attach(kind, model, tmp_path)
        return
    adapted = attach(kind, model, tmp_path)
    inputs = {"task_ids": torch.tensor([0, 1, 0])} if kind in NEEDS_TASKS else {}
    if kind in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[kind]):
            write(adapted, **inputs)
        return
    assert_is_read_anew(adapted, write(adapted, **inputs), padded_batch()["attention_mask"], **inputs)


def soft_prompt(kind, tmp_path=None, variant=None):
    return attach(kind, make_mosaic(variant or {}, dtype=torch.float32, num_hidden_layers=2, pad_token_id=0), tmp_path)


@pytest.mark.filterwarnings("ignore:task_type")
@pytest.mark.parametrize("variant", [{}, "mosaic v2"], ids=["v1", "v2"])
@pytest.mark.parametrize("kind", SOFT_PROMPTS)
def test_soft_prompts_are_read_once_in_every_way_of_decoding(kind, variant):
    adapted = soft_prompt(kind, variant=variant)
    inputs = {"task_ids": torch.tensor([0, 1, 0])} if kind in NEEDS_TASKS else {}
    for settings in ({"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"max_new_tokens": 1}):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            texts.append(write(adapted, use_cache=use_cache, **settings, **inputs).sequences)
        assert torch.equal(*texts), settings
    one = {"input_ids": make_ids(3, 1), "attention_mask": torch.ones(3, 1, dtype=torch.long)}
    assert_is_read_anew(adapted, write(adapted, **one, **inputs), one["attention_mask"], **inputs)
    bare = make_mosaic(variant, dtype=torch.float32, num_hidden_layers=2, pad_token_id=0)
    with adapted.disable_adapter():
        assert torch.equal(write(adapted).sequences, write(bare).sequences)
    assert_is_read_anew(adapted, write(adapted, **inputs), padded_batch()["attention_mask"], **inputs)


def test_two_soft_prompts_are_each_read_once():
    adapted = soft_prompt("PROMPT_TUNING")
    adapted.add_adapter("longer", PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=5))
    for name in ("longer", "default"):
        adapted.set_adapter(name)
        assert_is_read_anew(adapted, write(adapted), padded_batch()["attention_mask"])


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_no_outdated_name_of_a_memory_is_warned_of_and_none_too_many_given(kind):
    adapted, ids = soft_prompt(kind), make_ids(1, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(adapted)
    assert not [str(warning.message) for warning in caught if "past_key_values" in str(warning.message)]
    # Without a soft prompt, `generate` gets the memory only by the name that this transformers uses.
    model = adapted.get_base_model()
    inputs = model.prepare_inputs_for_generation(ids, **{MEMORY_NAME: DynamicCache(config=model.config)})
    assert {"past_key_values", "cache"} & inputs.keys() == {MEMORY_NAME}


def test_what_a_soft_prompt_cannot_precede_is_refused():
    adapted = soft_prompt("PROMPT_TUNING")
    config = adapted.get_base_model().config
    read_before = write(adapted)
    memory = read_before.get(MEMORY_NAME)
    ids = torch.cat([read_before.sequences, make_ids(3, 3)], dim=1)
    mask = torch.nn.functional.pad(padded_batch()["attention_mask"], (0, 7), value=1)
    whole = torch.ones(3, memory.get_seq_length() + 1, dtype=torch.long)
    one_row = {"input_ids": make_ids(1, 6), "attention_mask": None}
    for settings, reason in (
        ({"cache_implementation": "static"}, "no room for the soft prompt"),
        ({"past_key_values": StaticCache(config=config, max_cache_len=40)}, "no room for the soft prompt"),
        ({"prefill_chunk_size": 2}, "one new token at a time"),
        ({"prefill_chunk_size": 2, "attention_mask": None}, "one new token at a time"),
        ({"prompt_lookup_num_tokens": 2, "num_beams": 1} | one_row, "one new token at a time"),
        ({"assistant_model": make_model(seed=1)} | one_row, "one new token at a time"),
        # The soft prompt came as embeddings, so the memory does not know all ids.
        ({"past_key_values": memory, "input_ids": ids, "attention_mask": mask}, "does not know their ids"),
        ({"past_key_values": memory, "input_ids": ids[:, -1:], "attention_mask": None}, "does not know their ids"),
        ({"past_key_values": memory, "input_ids": ids[:, -1:], "attention_mask": whole}, "one new token at a time"),
    ):
        with pytest.raises(ValueError, match=reason):
            write(adapted, **settings)
    assert_is_read_anew(adapted, write(adapted), padded_batch()["attention_mask"])


@pytest.mark.parametrize("kind", [*SOFT_PROMPTS[1:], *PREFIX_TYPES])
def test_a_soft_prompt_of_a_memory_model_is_refused(kind):
    # PEFT cannot read this off the configuration.
    sizes = {"token_dim": 24, "num_layers": 1, "num_attention_heads": 3}
    settings = {"num_virtual_tokens": NUM_VIRTUAL_TOKENS} | KINDS[kind] | sizes
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **settings)
    adapted, inputs = get_peft_model(build("memory_model"), config).eval(), padded_batch()
    if kind in NEEDS_TASKS:
        inputs["task_ids"] = torch.tensor([0, 1, 0])
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="use LoRA"):
            adapted.generate(**inputs, max_new_tokens=3, use_cache=use_cache)
    with pytest.raises(ValueError, match="use LoRA"):
        adapted(**inputs)


def test_routers_over_a_whole_text_are_refused_with_a_memory():
    config = PEFT_TYPE_TO_CONFIG_MAPPING["LILY"](task_type="CAUSAL_LM", target_modules=PROJECTIONS)
    for model in (make_model(), build("memory_model")):
        adapted = get_peft_model(model, config).eval()
        with pytest.raises(ValueError, match="pass `use_cache=False`"):
            adapted.generate(**padded_batch(), max_new_tokens=3)
        adapted.generate(**padded_batch(), max_new_tokens=3, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["MULTITASK_PROMPT_TUNING", "PROMPT_TUNING", "P_TUNING"])
def test_a_classifier_behind_a_soft_prompt_reads_each_row_as_if_alone(kind):
    adapted, batch = attach(kind, build("classifier"), None, "SEQ_CLS"), padded_batch()
    tasks = {"task_ids": torch.tensor([0, 1, 0])} if kind in NEEDS_TASKS else {}
    together = adapted(**batch, **tasks).logits
    for row in range(3):
        is_token = batch["attention_mask"][row].bool()
        alone = {name: tensor[row : row + 1, is_token] for name, tensor in batch.items()}
        of_row = {name: tensor[row : row + 1] for name, tensor in tasks.items()}
        assert_near(together[row : row + 1], adapted(**alone, **of_row).logits)
    with pytest.raises(ValueError, match="pass attention_mask"):
        adapted(input_ids=batch["input_ids"], **tasks)
    with pytest.raises(ValueError, match="prefix tuning of PEFT makes is refused"):
        prefix = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=NUM_VIRTUAL_TOKENS)
        get_peft_model(build("classifier"), prefix)(**batch)


def test_rows_of_one_batch_have_adapters_of_their_own(tmp_path):
    adapted = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS))
    adapted.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS))
    shake(adapted, 1, "lora_", scale=0.3)
    together = write(adapted, adapter_names=["__base__", "default", "second"]).sequences
    with adapted.disable_adapter():
        assert torch.equal(write(adapted).sequences[0], together[0])
    for row, name in enumerate(("default", "second"), start=1):
        adapted.set_adapter(name)
        assert torch.equal(write(adapted).sequences[row], together[row])
