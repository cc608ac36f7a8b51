# SPDX-License-Identifier: Apache-2.0
"""A model that tells a text from one state, as MAD's compression task asks (arXiv 2403.17844).

A causal model reads a text of L tokens and a mark. Its state at the mark is all that a small MLP sees, which tells the
token at each place from the state and a learnt vector of the place. Any causal model of transformers may read.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from modeling_memory_mosaic.configuration_memory_model import Backbone, backbone_config


@strict
class CompressorConfig(PreTrainedConfig):
    """The `encoder`, a configuration of any causal model, and the `max_length` of a text without its mark.

    The encoder is a Memory Mosaic by default, as that of a memory model.
    """

    model_type = "compressor"
    sub_configs = {"encoder": AutoConfig}

    encoder: Backbone = None
    max_length: int = 32
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.encoder = backbone_config(self.encoder)
        super().__post_init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the encoder."""
        size: int = self.encoder.vocab_size
        return size

    @property
    def hidden_size(self) -> int:
        """Width of the encoder."""
        size: int = self.encoder.hidden_size
        return size

    @property
    def num_hidden_layers(self) -> int:
        """Depth of the encoder."""
        depth: int = self.encoder.num_hidden_layers
        return depth


class CompressorForCausalLM(PreTrainedModel):
    """An encoder, and an MLP that reads its last state. There is no cache: each call reads the whole text."""

    config: CompressorConfig

    def __init__(self, config: CompressorConfig):
        super().__init__(config)
        size = config.hidden_size
        # The body alone: its head would be left without a gradient.
        whole = AutoModelForCausalLM.from_config(config.encoder)
        self.encoder = getattr(whole, whole.base_model_prefix)
        self.places = nn.Embedding(config.max_length, size)
        self.decoder = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, size), nn.GELU(), nn.Linear(size, config.vocab_size)
        )
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Tell all tokens of texts from the states at their last tokens.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L + 1)`): texts without padding, each with its mark.
            labels (`torch.LongTensor` of shape `(B, L + 1)`, *optional*): at place t + 1 the token at place t.

        Returns:
            logits `(B, L + 1, V)`: at place t those of the token at place t; the last are of no token. And the loss.

        Raises:
            ValueError: the texts are longer than `max_length`.
        """
        length = input_ids.shape[1] - 1
        if length > self.config.max_length:
            raise ValueError(f"texts have {length} tokens, more than {self.config.max_length}: raise `max_length`")
        states = self.encoder(input_ids=input_ids, use_cache=False)[0][:, -1:]  # (B, 1, C)
        logits = nn.functional.pad(self.decoder(states + self.places.weight[:length]), (0, 0, 0, 1))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register(CompressorConfig.model_type, CompressorConfig, exist_ok=True)
AutoModelForCausalLM.register(CompressorConfig, CompressorForCausalLM, exist_ok=True)
