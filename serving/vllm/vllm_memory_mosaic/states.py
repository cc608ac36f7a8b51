# SPDX-License-Identifier: Apache-2.0
"""Running states of requests beside vLLM's paged cache: two leaky sums, and the newest key and value of each request.

vLLM gives each request a page for them, as it does for the states of Mamba, and takes it back with the request. A
page is not cleared: a text that begins reads no state, whatever lies there. `StepPlan` says which requests are read in
a step of the engine, and where their tokens lie among all tokens.

Shapes use R requests, N tokens of all requests together, H heads, D head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend, LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor

from modeling_memory_mosaic.ops_memory_mosaic import at_least_float32, leaky_average


# Names of the states, in the order of a page: those in float32 first, so that all are aligned.
STATES = ("contextual_sum", "persistent_sum", "newest_key", "newest_value")


@dataclass
class StepPlan:
    """The requests of one step: where their new tokens lie, and the page of each.

    - `begins`, `ends` `(R,)`: first and last new token of each request, among all tokens,
    - `pages` `(R,)`: page of each request's states,
    - `is_new` `(R,)`: True where a text begins in this step,
    - `openings` `(texts,)`: first tokens of the texts that begin,
    - `pieces`: request, first token and end of each request that has more than one new token.
    """

    begins: torch.Tensor
    ends: torch.Tensor
    pages: torch.Tensor
    is_new: torch.Tensor
    openings: torch.Tensor
    pieces: list[tuple[int, int, int]]


class StepPlanBuilder(LinearAttentionMetadataBuilder):
    """Makes a plan of what vLLM schedules, once for all layers."""

    # A plan has lists, and tensors of its own in each step: a recorded graph would read those of another step.
    _cudagraph_support = AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        common, cache_config = common_attn_metadata, self.vllm_config.cache_config
        pages = mamba_get_block_table_tensor(
            common.block_table_tensor, common.seq_lens, self.kv_cache_spec, cache_config.mamba_cache_mode
        )[: common.num_reqs, 0]
        offsets = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        starts = common.query_start_loc[: common.num_reqs + 1].long()
        is_new = common.seq_lens[: common.num_reqs] == starts.diff()
        return StepPlan(
            begins=starts[:-1],
            ends=starts[1:] - 1,
            pages=pages.long(),
            is_new=is_new,
            openings=starts[:-1][is_new],
            pieces=[
                (row, start, end)
                for row, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True))
                if end - start > 1
            ],
        )


class StateBackend(LinearAttentionBackend):
    """Tells vLLM to hand [`StepPlan`]s to layers of states."""

    @staticmethod
    def get_name() -> str:
        return "MEMORY_MOSAIC_STATES"

    @staticmethod
    def get_builder_cls() -> type[StepPlanBuilder]:
        return StepPlanBuilder


def state_shapes(num_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
    """Return the shape of each of a request's states in one layer."""
    return ((num_heads, head_dim),) * len(STATES)


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the precision of each state: sums in float32, key and value in that of the model."""
    return (torch.float32, torch.float32, dtype, dtype)


class RequestStates(nn.Module, MambaBase):
    """The states of all requests in one layer of the model."""

    kv_cache: tuple[torch.Tensor, ...]

    def __init__(self, num_heads: int, head_dim: int, dtype: torch.dtype, prefix: str):
        super().__init__()
        self.num_heads, self.head_dim, self.dtype, self.prefix = num_heads, head_dim, dtype, prefix
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self
        self.kv_cache = ()  # bound by vLLM once it knows how many pages there are

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self.num_heads, self.head_dim)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.dtype)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def plan(self) -> StepPlan | None:
        """Return the plan of this step; `None` while vLLM measures what a step takes, without requests."""
        metadata: Any = get_forward_context().attn_metadata
        return None if metadata is None else metadata[self.prefix]

    def read(self, name: str, plan: StepPlan) -> torch.Tensor:
        """Return a state of each request `(R, H, D)`: zeros where a text begins."""
        state = self.kv_cache[STATES.index(name)].index_select(0, plan.pages)
        # Not a product with a mask: what lies in a page that was never written may be no number.
        return state.masked_fill_(plan.is_new[:, None, None], 0.0)

    def write(self, name: str, vectors: torch.Tensor, plan: StepPlan) -> None:
        """Store each request's newest vector, of vectors `(N, H, D)` of all tokens."""
        self.kv_cache[STATES.index(name)].index_copy_(0, plan.pages, vectors.index_select(0, plan.ends))

    def shifted(self, name: str, vectors: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """Return for each token the vector of the token before it `(N, H, D)`; zeros where a text begins.

        The newest of the vectors `(N, H, D)` become the state of their requests.
        """
        before = self.read(name, plan)
        if plan.pieces:
            moved = torch.cat([vectors[:1], vectors[:-1]])
            before = moved.index_copy_(0, plan.begins, before)
        self.write(name, vectors, plan)
        return before

    def leaky_sums(
        self, name: str, vectors: torch.Tensor, leak: torch.Tensor, decay: torch.Tensor, plan: StepPlan
    ) -> torch.Tensor:
        """Return the leaky sums `(N, H, D)` of each request, in float32, and keep the newest.

        Args:
            vectors (`torch.Tensor` of shape `(N, H, D)`).
            leak (`torch.Tensor` of shape `(H,)`): in nats per token.
            decay (`torch.Tensor` of shape `(H, 1)`): exp(-leak).
        """
        sums, before = at_least_float32(vectors), self.read(name, plan)
        firsts = torch.addcmul(sums.index_select(0, plan.begins), decay, before)
        sums = sums.index_copy(0, plan.begins, firsts) if plan.pieces else firsts
        for row, start, end in plan.pieces:
            piece = vectors[start:end].transpose(0, 1)[None]
            summed, _ = leaky_average(piece, leak, before[row][None, :, None])
            sums[start:end] = summed[0].transpose(0, 1)
        self.write(name, sums, plan)
        return sums


def page_layout(vllm_config: VllmConfig) -> tuple[tuple[tuple[int, ...], ...], tuple[torch.dtype, ...]]:
    """Return shapes and precisions of the states of a request in one layer."""
    config: Any = vllm_config.model_config.hf_config
    return state_shapes(config.num_attention_heads, config.head_dim), state_dtypes(vllm_config.model_config.dtype)
