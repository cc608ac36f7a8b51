# SPDX-License-Identifier: Apache-2.0
"""What the plugin does not serve is refused before a model is built, and the message says what to do."""

import pytest
from transformers import AutoModelForCausalLM

import modeling_memory_mosaic


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 2}, "served by one process"),
        ({"kv_cache_dtype": "fp8"}, "Leave --kv-cache-dtype out"),
        ({"disable_hybrid_kv_cache_manager": True}, "leave --disable-hybrid-kv-cache-manager out"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "Speculative decoding is not"),
    ],
)
def test_settings_under_which_answers_would_be_wrong_are_refused(reference, engine, settings, message):
    with pytest.raises(ValueError, match=message), engine(reference.folder, **settings):
        pass


@pytest.mark.parametrize("kind", ["", "V2"])
def test_heads_that_are_too_wide_are_refused(engine, tmp_path, kind):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 50, "head_dim": 256}
    config = getattr(modeling_memory_mosaic, f"MemoryMosaic{kind}Config")(**sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="head_dim=256: this plugin needs one channel"), engine(str(tmp_path)):
        pass


def test_another_version_of_vllm_is_refused(monkeypatch):
    import vllm

    import vllm_memory_mosaic

    vllm_memory_mosaic.check_version()
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(ImportError, match="with vLLM 0.32 only, and this is 0.33.1"):
        vllm_memory_mosaic.check_version()
