# SPDX-License-Identifier: Apache-2.0
"""A language model made of torch's LSTM, which transformers lacks: a baseline of RegBench."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput


@strict
class LstmConfig(PreTrainedConfig):
    """Sizes: `num_hidden_layers` LSTMs of width `hidden_size`, on embeddings that the head shares."""

    model_type = "lstm"

    vocab_size: int = 50257
    hidden_size: int = 64
    num_hidden_layers: int = 2
    dropout: float | int = 0.0  # `strict` does not take an int for a float
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


class LstmForCausalLM(PreTrainedModel):
    """Embedding, LSTM, layer norm, head. There is no cache: each call reads the whole text."""

    config: LstmConfig
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: LstmConfig):
        super().__init__(config)
        size, layers = config.hidden_size, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.lstm = nn.LSTM(size, size, layers, dropout=config.dropout, batch_first=True)
        self.norm = nn.LayerNorm(size)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LSTM):
            # By transformers' `init`, which leaves loaded weights as they are.
            for weight in module.parameters():  # torch's own distribution
                init.uniform_(weight, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        else:
            super()._init_weights(module)

    def forward(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Return logits `(B, T, V)` of ids `(B, T)`, and the loss by labels `(B, T)`, not shifted; -100 is ignored."""
        # Without `use_cache`, which callers pass to every model.
        states, _ = self.lstm(self.embed_tokens(input_ids))
        logits = self.lm_head(self.norm(states))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register(LstmConfig.model_type, LstmConfig, exist_ok=True)
AutoModelForCausalLM.register(LstmConfig, LstmForCausalLM, exist_ok=True)
