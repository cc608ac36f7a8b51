# SPDX-License-Identifier: Apache-2.0
"""Small models with random weights, answers to them by transformers, and engines of vLLM in this process.

Weights are larger than at the start of a training, so that each answer has many different tokens and depends on all
that was read. A prompt is kept if no two tokens of its answer are nearly as likely: which of them is first would be a
matter of rounding.
"""

import os


# Before vLLM is imported, which reads them: engines in this process, and quiet ones.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}

import contextlib  # noqa: E402
import gc  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

from modeling_memory_mosaic import MemoryMosaicConfig, MemoryMosaicV2Config  # noqa: E402


VOCAB_SIZE, ANSWER_LENGTH, LEAST_MARGIN = 500, 32, 1e-3
# Fields of configurations. "authors" have the start of a training: leaks, scales, blends and bandwidths.
VARIANTS = {
    "plain": {},
    "authors": {"num_attention_heads": 8},
    "tied": {"tie_word_embeddings": True},
    "biases": {"use_bias": True},
    "narrowing": {"bandwidth_exponent": 0.35, "bandwidth_start": 8},
    "odd_heads": {"head_dim": 31, "num_hidden_layers": 3},
    "wide_heads": {"num_attention_heads": 1},
    "v2": {},
    "v2_authors": {"num_attention_heads": 2, "short_term_window": 256, "long_term_delay": 64},
    "v2_biases": {
        "use_bias": True,
        "gate_bias": True,
        "norm_type": "layer_norm",
        "bandwidth_sharing": "memory",
        "bandwidth_count": "total",
        "tie_word_embeddings": True,
    },
    "v2_slots": {
        "persistent_memory_type": "slots",
        "num_persistent_slots": 100,
        "gated_keys": False,
        "adaptive_bandwidth": False,
        "head_dim": 31,
        "num_hidden_layers": 3,
    },
    "v2_short": {"num_long_term_heads": 0, "short_term_window": 2},
    "v2_long": {"num_short_term_heads": 0, "long_term_delay": 1, "hidden_act": "gelu"},
    "v2_uneven": {"num_short_term_heads": 3, "long_term_delay": 40, "short_term_window": 17},
    "v2_few_long": {"num_long_term_heads": 2, "long_term_delay": 2, "short_term_window": 33},
    "v2_late": {"long_term_delay": 620, "short_term_window": 1000},
}
# Of parameters by their names, in place of what a training begins with.
RANGES = {
    "key_leak": (-0.3, 0.3),
    "key_scale": (0.0, 0.25),
    "value_scale": (-0.05, 0.1),
    "value_mix": (-0.5, 1.5),
    "bandwidth_scale": (-1.0, 1.0),
    "bandwidth_offset": (-1.0, 1.0),
    "bandwidth_exponent": (-0.5, 0.5),
}


def make_model(variant):
    """Return a model whose weights depend on the variant alone."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB_SIZE}
    # A training length below that of many prompts: it is no limit.
    sizes |= {"max_position_embeddings": 64, "tie_word_embeddings": False}
    is_v2 = variant.startswith("v2")
    if is_v2:
        sizes |= {"short_term_window": 16, "long_term_delay": 8}
        config = MemoryMosaicV2Config(**(sizes | VARIANTS[variant]))
    else:
        config = MemoryMosaicConfig(**(sizes | VARIANTS[variant]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-1]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(24 if is_v2 else 6)
        elif kind == "bias":
            parameter.data.normal_(std=0.3)
        elif kind in RANGES and not variant.endswith("authors"):
            parameter.data.uniform_(*RANGES[kind])
    return model


class Reference:
    """A model of transformers, the folder that it is saved in, and its answers."""

    def __init__(self, variant, folder):
        self.model, self.folder = make_model(variant), str(folder)
        self.model.save_pretrained(folder)
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, length, answer_length=ANSWER_LENGTH, before=()):
        """Return a prompt of `length` random tokens behind those of `before`, and its greedy answer."""
        for _ in range(100):
            prompt = [*before, *torch.randint(0, VOCAB_SIZE, (length,), generator=self.generator).tolist()]
            answer = self.model.generate(
                torch.tensor([prompt]),
                max_new_tokens=answer_length,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
            best, second = torch.cat(answer.scores).topk(2).values.T
            if (best - second).min() > LEAST_MARGIN:
                return prompt, answer.sequences[0, len(prompt) :].tolist()
        raise AssertionError("no prompt has an answer without near ties")


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """Return a function that gives the reference of a variant."""
    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = Reference(variant, tmp_path_factory.mktemp(variant))
        return made[variant]

    return get


@pytest.fixture(params=VARIANTS)
def variant(request):
    """Return the name of each variant."""
    return request.param


# A promise of one model is a promise of its sibling.
@pytest.fixture(scope="session", params=["plain", "v2"])
def reference(references, request):
    """Return the reference of each model."""
    return references(request.param)


@pytest.fixture
def engine():
    """Return a context manager that starts an engine for a folder, with settings of vLLM."""

    @contextlib.contextmanager
    def start(folder, **settings):
        defaults = {"dtype": "float32", "max_model_len": 2048, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
        defaults |= {"skip_tokenizer_init": True, "disable_log_stats": False, "enable_prefix_caching": False}
        llm = LLM(folder, **(defaults | settings))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
            gc.collect()

    return start


@pytest.fixture
def answer():
    """Return a function that gives the greedy answers of an engine to prompts of tokens, all at once.

    Answers are of 32 tokens, or of a number for each.
    """

    def generate(llm, prompts, lengths=None):
        lengths = [ANSWER_LENGTH] * len(prompts) if lengths is None else lengths
        settings = {"temperature": 0, "ignore_eos": True, "detokenize": False}
        greedy = [SamplingParams(max_tokens=length, **settings) for length in lengths]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


@pytest.fixture
def count():
    """Return a function that gives a counter of an engine, such as `num_preemptions`."""

    def value(llm, name):
        return {metric.name: metric for metric in llm.get_metrics()}[f"vllm:{name}"].value

    return value
