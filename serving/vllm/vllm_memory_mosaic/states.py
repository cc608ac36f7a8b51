# SPDX-License-Identifier: Apache-2.0
"""Running states of requests beside vLLM's paged cache: sums of keys, and what waits until its pair is stored.

vLLM gives each request a page for them, as it does for the states of Mamba, and takes it back with the request. A
page is not cleared: a text that begins reads no state, whatever lies there. `StepPlan` says which requests are read in
a step of the engine, and where their tokens lie among all tokens.

Shapes use R requests, N tokens of all requests together, H heads, D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend, LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor


class Places(NamedTuple):
    """Where a step finds and keeps what a ring of a page holds: the last vectors of a text, one cell for each.

    - `empty`: tokens that nothing stands so many tokens before,
    - `old`, `old_pages`, `old_cells`: tokens for which it was read in an earlier step, and where it lies,
    - `kept`, `kept_pages`, `kept_cells`: tokens that the ring holds from now on, and where.
    """

    empty: torch.Tensor
    old: torch.Tensor
    old_pages: torch.Tensor
    old_cells: torch.Tensor
    kept: torch.Tensor
    kept_pages: torch.Tensor
    kept_cells: torch.Tensor


@dataclass
class StepPlan:
    """The requests of one step: where their new tokens lie, and the page of each.

    - `begins`, `ends` `(R,)`: first and last new token of each request, among all tokens,
    - `pages` `(R,)`: page of each request's states,
    - `num_read` `(R,)`: tokens of each text up to the end of this step,
    - `is_new` `(R,)`: True where a text begins in this step,
    - `pieces`: request, first token and end of each request that has more than one new token.
    """

    begins: torch.Tensor
    ends: torch.Tensor
    pages: torch.Tensor
    num_read: torch.Tensor
    is_new: torch.Tensor
    pieces: list[tuple[int, int, int]]
    found: dict[int, Places] = field(default_factory=dict)

    def places(self, size: int) -> Places:
        """Return where vectors of so many tokens before lie, which all layers ask for."""
        if size not in self.found:
            rows = torch.arange(len(self.begins), device=self.begins.device)
            rows = rows.repeat_interleave(self.ends - self.begins + 1)
            tokens = torch.arange(len(rows), device=rows.device)
            left = self.ends[rows] - tokens
            positions = self.num_read[rows] - 1 - left
            old, kept = (tokens - self.begins[rows] < size).nonzero()[:, 0], (left < size).nonzero()[:, 0]
            pages, cells = self.pages[rows], positions % size
            empty = (positions < size).nonzero()[:, 0]
            self.found[size] = Places(empty, old, pages[old], cells[old], kept, pages[kept], cells[kept])
        return self.found[size]


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
        num_read = common.seq_lens[: common.num_reqs].long()
        return StepPlan(
            begins=starts[:-1],
            ends=starts[1:] - 1,
            pages=pages.long(),
            num_read=num_read,
            is_new=num_read == starts.diff(),
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


class State(NamedTuple):
    """Shape and precision of one state of a request in one layer."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def states_of_pairs(level: str, num_heads: int, head_dim: int, dtype: torch.dtype, delay: int = 1) -> dict[str, State]:
    """Return the states of what waits: the newest key and value, and pairs that are stored later by a delay."""
    states = {f"{level}_{name}": State((1, num_heads, head_dim), dtype) for name in ("key", "value")}
    if delay > 1:
        waiting = State((delay - 1, num_heads, head_dim), dtype)
        states |= {f"{level}_waiting_{name}": waiting for name in ("keys", "values")}
    return states


def page_of(*states: dict[str, State]) -> dict[str, State]:
    """Return states in the order of a page: those in float32 first, so that all are aligned."""
    named = [item for part in states for item in part.items()]
    return dict(sorted(named, key=lambda item: item[1].dtype != torch.float32))


class RequestStates(nn.Module, MambaBase):
    """The states of all requests in one layer of the model."""

    kv_cache: tuple[torch.Tensor, ...]

    def __init__(self, page: dict[str, State], prefix: str):
        super().__init__()
        self.page, self.names, self.prefix = page, list(page), prefix
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self
        self.kv_cache = ()  # bound by vLLM once it knows how many pages there are

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(state.shape for state in self.page.values())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(state.dtype for state in self.page.values())

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def plan(self) -> StepPlan | None:
        """Return the plan of this step; `None` while vLLM measures what a step takes, without requests."""
        metadata: Any = get_forward_context().attn_metadata
        return None if metadata is None else metadata[self.prefix]

    def state(self, name: str) -> torch.Tensor:
        return self.kv_cache[self.names.index(name)]

    def delayed(self, name: str, vectors: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """Return for each token the vector of so many tokens before as the state has room for, `(N, H, D)`.

        The state takes the newest of vectors `(N, H, D)`. What stands at `empty` tokens of [`Places`] means nothing.
        """
        ring = self.state(name)
        places = plan.places(ring.shape[1])
        before = ring[places.old_pages, places.old_cells]
        if plan.pieces:
            before = vectors.roll(ring.shape[1], 0).index_copy_(0, places.old, before)
        ring[places.kept_pages, places.kept_cells] = vectors.index_select(0, places.kept)
        return before

    def read(self, name: str, start: float, plan: StepPlan) -> torch.Tensor:
        """Return a sum of each request `(R, H, ...)`: `start` where a text begins."""
        state = self.state(name).index_select(0, plan.pages)
        # Not a product with a mask: what lies in a page that was never written may be no number.
        return state.masked_fill_(plan.is_new[:, None, None], start)

    def sums(
        self,
        starts: dict[str, float],
        inputs: tuple[torch.Tensor, ...],
        add: Callable[..., tuple[torch.Tensor, ...]],
        plan: StepPlan,
    ) -> torch.Tensor:
        """Return sums `(N, H, D)` over the tokens of each request, in float32, and keep the newest.

        Args:
            starts: states that make up a sum, the sum itself first, and what they are before a text.
            inputs (`torch.Tensor` of shape `(N, H, ...)`): of each token.
            add: maps inputs `(B, H, T, ...)` and states before them `(B, H, 1, ...)` to states `(B, H, T, ...)`.
        """
        before = [self.read(name, start, plan)[:, :, None] for name, start in starts.items()]
        firsts = [part.index_select(0, plan.begins)[:, :, None] for part in inputs]
        results = [part.squeeze(2) for part in add(*firsts, *before)]
        if plan.pieces:
            results = [
                part.new_empty(len(inputs[0]), *part.shape[1:]).index_copy_(0, plan.begins, part) for part in results
            ]
        for row, start, end in plan.pieces:
            piece = [part[start:end].transpose(0, 1)[None] for part in inputs]
            for result, part in zip(results, add(*piece, *(part[row, None] for part in before)), strict=True):
                result[start:end] = part[0].transpose(0, 1)
        for name, result in zip(starts, results, strict=True):
            self.state(name).index_copy_(0, plan.pages, result.index_select(0, plan.ends))
        return results[0]
