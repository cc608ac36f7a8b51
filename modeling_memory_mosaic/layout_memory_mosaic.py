# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The Memory Mosaic authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Layout of texts over processes: each of a group reads one stretch of every text (context parallelism).

A stretch goes on where the one before it ends, as a text goes on from a memory. So layers take a [`Stretch`] for a
memory: it knows the sums and the value before the stretch, and the pairs of all stretches before. Sums compose
exactly: at the ends of stretches they are leaky sums of the stretches' own.

Shapes use B batch, T tokens of whole texts, L tokens of a stretch, P processes, H heads, D head width, C hidden size.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .masking_memory_mosaic import find_documents, find_padding
from .ops_memory_mosaic import at_least_float32, forward_fill, leaky_average


def cuts_of_text(num_tokens: int, num_processes: int) -> list[int]:
    """Return where the stretches of a text begin, and its end: lengths differ by one token at most.

    Raises:
        ValueError: if a stretch would have no token.
    """
    if num_tokens < num_processes:
        raise ValueError(
            f"{num_processes} processes cannot share a text of {num_tokens} tokens: pad it, or read it with at most "
            f"{num_tokens} of them."
        )
    length, longer = divmod(num_tokens, num_processes)
    return [rank * length + min(rank, longer) for rank in range(num_processes + 1)]


def collective(name: str, older_name: str) -> Callable[..., Any]:
    """Return a collective of torch by its name from 2.13 on, which warns of the older one."""
    function: Callable[..., Any] = getattr(torch.distributed, name, None) or getattr(torch.distributed, older_name)
    return function


def gathered(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the tensors `(...)` of all processes of a group, `(P, ...)`, without a gradient."""
    size = torch.distributed.get_world_size(group)
    whole = tensor.new_empty(size * tensor.numel())
    collective("all_gather_single", "all_gather_into_tensor")(whole, tensor.flatten(), group=group)
    return whole.view(size, *tensor.shape)


class _Gather(torch.autograd.Function):
    """Stacks a tensor `(...)` of each process to `(P, ...)`. Gradients of all processes are summed."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return gathered(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # In half precision a sum over processes would round with each of them.
        gradients = at_least_float32(gradient).flatten()
        total = gradients.new_empty(gradient[0].numel())
        collective("reduce_scatter_single", "reduce_scatter_tensor")(total, gradients, group=ctx.group)
        return total.view(gradient.shape[1:]).to(gradient.dtype), None


class _Sum(torch.autograd.Function):
    """Sums a number over processes. Each of them goes on with the sum, so that gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, number: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        total = number.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


@dataclass(frozen=True, eq=False)
class Stretch:
    """The tokens of each text that this process reads.

    - `group`: the processes that share the texts, `rank` of this one among them,
    - `cuts`: see [`cuts_of_text`],
    - `is_token` `(B, L)`, *optional*: False at padding,
    - `document_ids` `(B, L)`, *optional*: 0 for the document that the stretch before ends with,
    - `num_tokens` `(B, P)`: of each stretch, without padding,
    - `last_documents` `(B, P)`, *optional*: number of the document that each stretch ends with.
    """

    group: Any
    rank: int
    cuts: list[int]
    is_token: torch.Tensor | None
    document_ids: torch.Tensor | None
    num_tokens: torch.Tensor
    last_documents: torch.Tensor | None

    @property
    def begin(self) -> int:
        """The number of tokens and padding before the stretch."""
        return self.cuts[self.rank]

    @property
    def end(self) -> int:
        """The number of tokens and padding up to the end of the stretch."""
        return self.cuts[self.rank + 1]

    @property
    def shortest(self) -> int:
        """The length of the shortest stretch."""
        return self.cuts[-1] - self.cuts[-2]

    def cut(self, columns: torch.Tensor) -> torch.Tensor:
        """Return the part `(B, L, ...)` of a tensor `(B, T, ...)`."""
        return columns[:, self.begin : self.end]

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors `(...)` of all processes, `(P, ...)`."""
        whole: torch.Tensor = _Gather.apply(tensor, self.group)
        return whole

    def before(self, ends: torch.Tensor) -> torch.Tensor:
        """Return what stands before the stretch `(B, H, 1, D)`, of what stands at the ends of all `(B, H, P, D)`."""
        return F.pad(ends, (0, 0, 1, 0))[:, :, self.rank : self.rank + 1]


class StretchStates:
    """The running states of one layer before a stretch, and the pairs of the stretches before, from other processes.

    It has what layers ask of a memory's layer ([`MemoryMosaicStates`]), and keeps nothing.
    """

    search = None

    def __init__(self, stretch: Stretch):
        self.stretch = stretch
        self.scalars: dict[str, Any] = {}

    def get_state(self, name: str) -> None:
        """Return `None`: sums begin with the stretch, and [`StretchStates.continue_sum`] adds what came before."""

    def set_state(self, name: str, trajectory: torch.Tensor) -> None:
        """Keep nothing: a text that processes share leaves no memory."""

    def continue_sum(
        self, name: str, sums: torch.Tensor, previous: torch.Tensor | None, leak: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the leaky sums `(B, H, L, D)` of whole texts, and the one before the stretch `(B, H, 1, D)`.

        Each process sends the last of its sums, `(B, H, D)` numbers.

        Args:
            sums (`torch.Tensor` of shape `(B, H, L, D)`): of the stretch alone.
            leak (`torch.Tensor` of shape `(H,)`): in nats per token.
        """
        stretch = self.stretch
        ends = stretch.gather(sums[:, :, -1]).permute(1, 2, 0, 3)  # (B, H, P, D)
        ends = leaky_average(ends, leak, None, stretch.num_tokens, stretch.last_documents)[0]
        before = stretch.before(ends)
        ages = torch.arange(1, sums.shape[2] + 1, device=sums.device)[None]
        if stretch.is_token is not None:
            ages = stretch.is_token.long().cumsum(-1)
        decays = torch.exp(-leak.to(sums.dtype)[:, None] * ages[:, None])  # (B or 1, H, L)
        if stretch.document_ids is not None:
            decays = decays * (stretch.document_ids == 0)[:, None]
        return torch.addcmul(sums, decays[..., None], before), before

    def value_before(self, name: str, projected: torch.Tensor) -> torch.Tensor:
        """Return the projected value `(B, H, 1, D)` of the last token before the stretch; 0 if there is none.

        Args:
            projected (`torch.Tensor` of shape `(B, H, L, D)`): of the stretch.
        """
        stretch, last = self.stretch, projected[:, :, -1:]
        if stretch.is_token is not None:
            places = torch.arange(projected.shape[2], device=projected.device) * stretch.is_token
            last = projected.gather(2, places.argmax(-1)[:, None, None, None].expand_as(last))
        ends = F.pad(stretch.gather(last).squeeze(3).permute(1, 2, 0, 3), (0, 0, 1, 0))  # (B, H, 1 + P, D)
        # Of the stretches before, the last one that has a token.
        numbers = torch.arange(1, stretch.rank + 1, device=projected.device)
        source = F.pad(numbers * (stretch.num_tokens[:, : stretch.rank] > 0), (1, 0)).amax(-1)
        return ends.gather(2, source[:, None, None, None].expand_as(last))

    def slots(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all slots up to the end of the stretch, `(B, H, S, D)`, slot 0 empty.

        Args:
            keys, values (`torch.Tensor` of shape `(B, H, L, D)`): of the pairs that the stretch completes.
        """
        stretch, length = self.stretch, keys.shape[2]
        pairs = torch.stack([keys, values])
        if stretch.rank == 0:
            pairs = F.pad(pairs[:, :, :, 1:], (0, 0, 1, 0))
        longest = stretch.cuts[1]
        parts = stretch.gather(F.pad(pairs, (0, 0, 0, longest - length)))
        lengths = [end - begin for begin, end in zip(stretch.cuts, stretch.cuts[1:], strict=False)]
        seen = [parts[rank, :, :, :, : lengths[rank]] for rank in range(stretch.rank + 1)]
        whole = torch.cat(seen, dim=3)
        return whole[0], whole[1]


class SharedTexts:
    """What layers are given in place of a memory: [`StretchStates`] for each."""

    def __init__(self, stretch: Stretch, num_layers: int, states: type[StretchStates] = StretchStates):
        self.layers = [states(stretch) for _ in range(num_layers)]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all slots up to the end of the stretch, see [`StretchStates.slots`]."""
        if keys.shape[1] == 0:  # v2 without long-term heads
            return keys, values
        return self.layers[layer_idx].slots(keys, values)


def check_shared(config: Any, past_key_values: Any, attention_mask: Any) -> None:
    """Raise `ValueError` for what a model does not do with texts that processes share."""
    if past_key_values is not None:
        raise ValueError(
            "A text that several processes share is not read behind a memory and leaves none: call `generate` and "
            "`memorize` outside of `context_parallel`, and pass no cache."
        )
    if isinstance(attention_mask, dict):
        raise ValueError("Masks of a shared text are made by the model: pass attention_mask (batch, tokens).")
    if config._attn_implementation != "sdpa":
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} does not read texts that several processes share, "
            'and computes no maps of them: call `model.set_attn_implementation("sdpa")`.'
        )


def check_same_texts(group: Any, *parts: Any) -> None:
    """Raise `ValueError` unless all processes of a group were given the same tensors `parts` (`None` for absent ones).

    Different ones would silently be read as stretches of one text.
    """
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    device = tensors[0].device
    numbers: list[Any] = [part is None for part in parts]
    for tensor in tensors:
        numbers += tensor.shape
        if not tensor.is_floating_point():  # embeddings that processes computed may differ by rounding
            flat = tensor.to(device).flatten().long()
            numbers.append((flat * torch.arange(1, 2 * flat.numel(), 2, device=device)).sum())
    mine = torch.stack([torch.as_tensor(number, device=device).long() for number in numbers])
    mine = F.pad(mine, (0, 4 * len(parts) + 1 - len(mine)))
    numbers_of_all = gathered(mine, group)
    if not torch.equal(numbers_of_all, numbers_of_all[:1].expand_as(numbers_of_all)):
        raise ValueError(
            "The processes of a group were given different texts. Each needs the whole of the same batch, of which it "
            "reads its own stretch: draw batches by the number of the group, not of the process."
        )


def as_columns(tokens: torch.Tensor) -> torch.Tensor:
    """Return ids `(B, T)` as `(B, T, 1)`, and embeddings `(B, T, C)` as they are."""
    return tokens if tokens.ndim == 3 else tokens[..., None]


def lay_out(group: Any, tokens: torch.Tensor, attention_mask: torch.Tensor | None, packing: dict[str, Any]) -> Stretch:
    """Return the stretch of this process.

    Args:
        tokens (`torch.Tensor` of shape `(B, T, C)`): of whole texts.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding.
        packing: `position_ids`, `seq_idx` and `cu_seq_lens_q`, see [`find_documents`].
    """
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    cuts = cuts_of_text(tokens.shape[1], size)
    attention_mask, is_token = find_padding(tokens, attention_mask, None)
    document_ids = find_documents(tokens, attention_mask, None, **packing)
    begin, end = cuts[rank], cuts[rank + 1]
    lengths = torch.tensor(cuts, device=tokens.device).diff().expand(tokens.shape[0], -1)
    last_documents = None
    if is_token is not None:
        lengths = torch.stack([is_token[:, a:b].sum(-1) for a, b in zip(cuts, cuts[1:], strict=False)], dim=-1)
        is_token = is_token[:, begin:end]
    if document_ids is not None:
        last_documents = document_ids[:, torch.tensor(cuts[1:], device=tokens.device) - 1]
        document_ids = document_ids[:, begin:end] - (document_ids[:, begin - 1, None] if begin else 0)
    return Stretch(group, rank, cuts, is_token, document_ids, lengths, last_documents)


def filled_tokens(tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return tokens `(B, T, C)` with padding that repeats the last one before it."""
    is_token = find_padding(tokens, attention_mask, None)[1]
    return tokens if is_token is None else forward_fill(tokens[:, None], is_token, None)[:, 0]


def shared_loss(
    group: Any, loss_function: Callable[..., torch.Tensor], labels: torch.Tensor, length: int, **kwargs: Any
) -> torch.Tensor:
    """Return the loss of whole texts, of which this process has the logits of its stretch.

    It is the same number on all processes, and the mean over them of their gradients is the gradient of whole texts:
    so DDP and FSDP2, which average, need nothing else.

    Args:
        loss_function: of one process; the sum over labels, divided by `num_items_in_batch`.
        labels (`torch.Tensor` of shape `(B, T)`): not shifted.
        length (`int`): L, of the logits.

    Raises:
        ValueError: if there is not one label for each token of whole texts.
    """
    shift_labels = kwargs.pop("shift_labels", None)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    if kwargs.get("num_items_in_batch") is None:
        kwargs["num_items_in_batch"] = (shift_labels != kwargs.get("ignore_index", -100)).sum()
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    cuts = cuts_of_text(labels.shape[1], size)
    own = shift_labels[:, cuts[rank] : cuts[rank + 1]].contiguous()
    if own.shape[1] != length:
        raise ValueError(f"labels cover {labels.shape[1]} tokens: each process needs those of whole texts.")
    total: torch.Tensor = _Sum.apply(loss_function(labels=own, shift_labels=own, **kwargs), group)
    return total


@contextlib.contextmanager
def context_parallel(model: nn.Module, group: Any = None) -> Iterator[None]:
    """Let the processes of a group share each text that a model reads: context parallelism.

    Each process is given the whole batch, the same as the others, and reads one stretch of every row: logits and
    hidden states are those of its stretch, and lengths of stretches differ by one token at most. `loss` is that of
    whole texts. The mean over the processes of their gradients is that of one process which reads everything: DDP and
    FSDP2 take it; without them, divide the sum by the number of processes.

    A layer exchanges three vectors per row and process (two sums, one value), and gathers keys and values. Memory for
    activations falls with the number of processes but for these, which gradient checkpointing makes again. Under
    `torch.compile` the body of the model runs as it is written.

    ```python
    >>> with context_parallel(model, mesh["cp"].get_group()):
    ...     loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
    >>> loss.backward()
    ```

    Args:
        model: a Memory Mosaic, of v2 too, with a head for tokens or none, in wrappers or not.
        group (`torch.distributed.ProcessGroup`, *optional*): that share texts; all processes when absent.

    Raises:
        ValueError: if there is no process group, or if the model is of another kind. While reading, if the processes
            were given different texts, if a text has fewer tokens than there are processes, and for what needs whole
            texts on one process: a memory, attention maps, `logits_to_keep`.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError("There is no group of processes: start them by `torchrun`, and call `init_process_group`.")
    models: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    others = [type(module).__name__ for module in models if not getattr(module, "reads_stretches", False)]
    if others or not models:
        raise ValueError(
            f"{(others or [type(model).__name__])[0]} needs whole texts: context parallelism is for Memory Mosaics "
            "with a head for tokens, or none."
        )
    bodies = [module for module in models if hasattr(module, "processes")]
    before = [body.processes for body in bodies]
    for body in bodies:
        body.processes = torch.distributed.group.WORLD if group is None else group
    try:
        yield
    finally:
        for body, processes in zip(bodies, before, strict=True):
            body.processes = processes


__all__ = ["context_parallel"]
