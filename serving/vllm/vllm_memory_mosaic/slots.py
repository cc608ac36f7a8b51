# SPDX-License-Identifier: Apache-2.0
"""Pairs of keys and values in vLLM's paged cache, and the retrieval from them.

Slot t of a request holds a pair that is complete when token t arrives: that of token t-1, the key of which stands with
a value that blends those of t-1 and t, or one that is some tokens older. So the rule by which a token retrieves
earlier pairs only is plain causal attention over slots. The first slots hold no pair. One more channel of the heads
carries a bias for each slot: queries hold their length there, and `BIAS` at least, keys 0, and the keys of empty slots
`-BIAS`. So a token that sees empty slots alone retrieves the zeros in them, and other tokens give them no weight.

Shapes use N tokens of all requests together, H heads, D head width, W stored width of heads.
"""

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import CacheConfig
from vllm.model_executor.layers.attention import Attention

from modeling_memory_mosaic.ops_memory_mosaic import as_dtype, at_least_float32, scale_to_length

from .settings import stored_width
from .states import RequestStates, StepPlan


# Far beyond the length of any key, so that no product of a query and a key comes near that of their biases. float16
# holds the number.
BIAS = 2.0**15


class PairSlots(nn.Module):
    """The pairs of some heads of one layer: those of all tokens, or of the last ones, at once or after a delay.

    Args:
        level: of the heads, by which their states are named.
        delay (`int`): what a token's number is above that of the newest pair that it sees, 1 at least.
        window (`int`, *optional*): how many slots a token sees at most.
    """

    def __init__(
        self,
        level: str,
        num_heads: int,
        head_dim: int,
        states: RequestStates,
        cache_config: CacheConfig,
        prefix: str,
        delay: int = 1,
        window: int | None = None,
    ):
        super().__init__()
        self.level, self.num_heads, self.head_dim, self.states, self.delay = level, num_heads, head_dim, states, delay
        self.width = stored_width(head_dim)
        self.attn = Attention(
            num_heads,
            self.width,
            scale=1.0,
            num_kv_heads=num_heads,
            cache_config=cache_config,
            per_layer_sliding_window=window,
            prefix=f"{prefix}.attn",
        )

    def widened(self, vectors: torch.Tensor, bias: torch.Tensor | float) -> torch.Tensor:
        """Return vectors `(N, H, D)` in the width of stored heads, `(N, H, W)`, with a bias behind them."""
        slots = F.pad(vectors, (0, self.width - self.head_dim))
        slots[..., self.head_dim] = bias
        return slots

    def to_slots(self, vectors: torch.Tensor, bias: float, plan: StepPlan) -> torch.Tensor:
        """Return keys or values of pairs as slots hold them `(N, H, W)`: empty slots have a bias and no pair."""
        slots, empty = self.widened(vectors, 0.0), plan.places(self.delay).empty
        if len(empty):
            slots[empty] = 0.0
            slots[empty, :, self.head_dim] = bias
        return slots

    def pairs(
        self, keys: torch.Tensor, values: torch.Tensor, mix: torch.Tensor, length: torch.Tensor, plan: StepPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the pairs of each token's slot, `(N, H, D)`."""
        pair_keys = self.states.delayed(f"{self.level}_key", keys, plan)
        earlier = self.states.delayed(f"{self.level}_value", values, plan)
        blended = torch.lerp(at_least_float32(values), at_least_float32(earlier), mix)
        pair_values = as_dtype(scale_to_length(blended, length), values.dtype)
        if self.delay > 1:
            pair_keys = self.states.delayed(f"{self.level}_waiting_keys", pair_keys, plan)
            pair_values = self.states.delayed(f"{self.level}_waiting_values", pair_values, plan)
        return pair_keys, pair_values

    def forward(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mix: torch.Tensor,
        length: torch.Tensor,
        plan: StepPlan,
    ) -> torch.Tensor:
        """Store the pairs that new tokens complete, and return what each token retrieves, `(N, H, D)`.

        Args:
            queries, keys, values (`torch.Tensor` of shape `(N, H, D)`).
            mix (`torch.Tensor` of shape `(H, 1)`): the share of the earlier of two values.
            length (`torch.Tensor` of shape `(H, 1)`): of values of pairs.
        """
        largest = torch.finfo(queries.dtype).max
        bias = torch.linalg.vector_norm(at_least_float32(queries), dim=-1).clamp(BIAS, largest)
        pair_keys, pair_values = self.pairs(keys, values, mix, length, plan)
        retrieved = self.attn(
            self.widened(queries, bias).flatten(1),
            self.to_slots(pair_keys, -BIAS, plan).flatten(1),
            self.to_slots(pair_values, 0.0, plan).flatten(1),
        )
        return retrieved.view(-1, self.num_heads, self.width)[..., : self.head_dim]
