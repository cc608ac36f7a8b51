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
"""The equations of Memory Mosaics v2 (arXiv 2507.03285, section 3) as plain loops over tokens, heads and pairs.

No code of the authors is public, so that this is the only oracle of the model, which equals it in value and gradient.
It is slow and meant to be read.

Shapes use T tokens of one text, C hidden size, D head width. Tokens are counted from 0, in the paper from 1.
"""

from typing import Any

import torch

from .naive_memory_mosaic import (
    naive_kernel_smoothing,
    naive_layer_norm,
    naive_norm,
    naive_persistent_memory,
    naive_ratings,
)


def naive_magnitude(theta: torch.Tensor) -> torch.Tensor:
    """Return |theta|, with the derivative 1 at 0: the paper starts the lengths of values there, to grow."""
    return torch.where(theta < 0, -theta, theta)


def naive_gated_keys(k_states: torch.Tensor, log_gates: torch.Tensor, log_leaks: torch.Tensor) -> torch.Tensor:
    """Return the keys `(T, D)` of one head, for projected inputs `(T, D)` and two numbers for each token `(T,)`.

    Eq. 8: s_t = exp(log_gate_t) k_t + exp(-|leak_t|) s_(t-1), s_(-1) = 0, scaled to unit length.
    """
    sums: list[torch.Tensor] = []
    for t, state in enumerate(k_states):
        gated = torch.exp(log_gates[t]) * state
        sums.append(gated if t == 0 else gated + torch.exp(-naive_magnitude(log_leaks[t])) * sums[t - 1])
    return torch.stack([naive_norm(s) for s in sums])


def naive_bandwidth(
    num_pairs: int, scale: torch.Tensor, offset: torch.Tensor, exponent: torch.Tensor | None
) -> torch.Tensor:
    """Return the inverse temperature of the kernel over `num_pairs` pairs: beta_1 n^alpha + beta_0 (eq. 6).

    Parametrised as in table 6: beta = exp(min(theta, 10)), alpha = min(|theta|, 1). Without an exponent alpha is 0.
    """
    growth = 1 if exponent is None else num_pairs ** naive_magnitude(exponent).clamp(max=1)
    return torch.exp(scale.clamp(max=10)) * growth + torch.exp(offset.clamp(max=10))


def naive_value(v_states: torch.Tensor, t: int, value_scale: torch.Tensor, value_mix: torch.Tensor) -> torch.Tensor:
    """Return the value `(D,)` of the pair of token t, which looks at the next token (eq. 9)."""
    blend = value_mix * v_states[t] + (1 - value_mix) * v_states[t + 1]
    return torch.exp(naive_magnitude(value_scale).clamp(max=15)) * naive_norm(blend)


def naive_head(
    keys: torch.Tensor,
    v_states: torch.Tensor,
    visible: list[range],
    bandwidth: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    value_scale: torch.Tensor,
    value_mix: torch.Tensor,
    counts_all: bool = False,
    pairs: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Return what one head retrieves `(T, D)`, short-term or long-term.

    Args:
        keys, v_states (`torch.Tensor` of shape `(T, D)`): keys, and projected inputs of values.
        visible: the tokens whose pairs each token reads.
        bandwidth: scale, offset and exponent, of [`naive_bandwidth`].
        counts_all (`bool`): whether the bandwidth follows all pairs before a token, and not those that it reads.
        pairs (*optional*): keys and values of texts that were read alone and joined; every token reads all of them.
            Those of this text are added to them.
    """
    own_keys: list[torch.Tensor] = []
    own_values: list[torch.Tensor] = []
    other_keys, other_values = ([], []) if pairs is None else (list(pairs[0]), list(pairs[1]))
    outputs = []
    for t in range(len(keys)):
        if t > 0:
            own_keys.append(keys[t - 1])
            own_values.append(naive_value(v_states, t - 1, value_scale, value_mix))
        read_keys = other_keys + [own_keys[i] for i in visible[t]]
        read_values = other_values + [own_values[i] for i in visible[t]]
        num_pairs = len(other_keys) + t if counts_all else len(read_keys)
        beta = naive_bandwidth(max(num_pairs, 1), *bandwidth)
        outputs.append(naive_kernel_smoothing(beta * keys[t], read_keys, read_values, v_states.shape[1]))
    if pairs is not None:
        pairs[0].extend(own_keys)
        pairs[1].extend(own_values)
    return torch.stack(outputs)


def naive_bounded_head(
    keys: torch.Tensor,
    v_states: torch.Tensor,
    bandwidth: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    value_scale: torch.Tensor,
    value_mix: torch.Tensor,
    delay: int,
    max_pairs: int,
    policy: Any,
    counts_all: bool = False,
) -> torch.Tensor:
    """Return what one long-term head retrieves `(T, D)` if it holds at most so many pairs. Not in the paper.

    The pair of token t - m waits until token t, and is then stored. Before it is, if it does not fit, a sixteenth of
    the pairs go, and one at least: those that the policy rates lowest, of pairs that are rated alike the older ones.
    """
    pairs: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    outputs: list[torch.Tensor] = []
    for t in range(len(keys)):
        if t > 0:
            value = naive_value(v_states, t - 1, value_scale, value_mix)
            error = float((outputs[t - 1] - value).square().sum() / value.square().sum())
            waiting.append({"key": keys[t - 1], "value": value, "error": error})
        if len(waiting) == delay:
            if len(pairs) == max_pairs:
                ratings = naive_ratings(pairs, policy)
                order = sorted(range(max_pairs), key=lambda index: ratings[index])
                pairs = [pairs[index] for index in sorted(order[max(1, max_pairs // 16) :])]
            pairs.append(waiting.pop(0) | {"born": t + 1, "used_at": t + 1, "usage": 0.0, "exposure": 0})
        num_pairs = len(pairs) + (len(waiting) if counts_all else 0)
        query = naive_bandwidth(max(num_pairs, 1), *bandwidth) * keys[t]
        read_keys, read_values = ([pair[name] for pair in pairs] for name in ("key", "value"))
        outputs.append(naive_kernel_smoothing(query, read_keys, read_values, v_states.shape[1]))
        scores = torch.stack([query @ key for key in read_keys]) if pairs else query.new_zeros(0)
        for pair, weight in zip(pairs, scores.softmax(0).tolist(), strict=True):
            pair["usage"] += weight
            pair["exposure"] += 1
            if weight * len(pairs) > 1:
                pair["used_at"] = t + 1
    return torch.stack(outputs)


def short_term_pairs(num_tokens: int, window: int) -> list[range]:
    """Return the tokens whose short-term pairs each token reads: t - h + 1 to t - 1 (eq. 10)."""
    return [range(max(0, t - window + 1), t) for t in range(num_tokens)]


def long_term_pairs(num_tokens: int, delay: int) -> list[range]:
    """Return the tokens whose long-term pairs each token reads: all up to t - m."""
    return [range(max(0, t - delay + 1)) for t in range(num_tokens)]


def naive_rms_norm(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Divide by the root of the mean square over the last axis, then apply a learnt scale."""
    return hidden_states / torch.sqrt(hidden_states.square().mean(-1, keepdim=True) + eps) * weight


def naive_logits_v2(
    state_dict: dict[str, torch.Tensor],
    config: Any,
    input_ids: torch.Tensor,
    delay: int | None = None,
    pairs: dict[str, list[tuple[list[torch.Tensor], list[torch.Tensor]]]] | None = None,
    bound: tuple[int, Any] | None = None,
) -> torch.Tensor:
    """Return the logits `(T, vocab_size)` of one unpadded text `(T,)`, without dropout.

    Args:
        state_dict: of a `MemoryMosaicV2ForCausalLM`.
        config: its configuration.
        delay (`int`, *optional*): m; that of inference when absent.
        pairs (*optional*): keys and values of joined texts, for each head of each long-term memory, by its name.
            Those of this text are added to them.
        bound (*optional*): number of pairs that each long-term head holds at most, and the policy, or
            function of a pair, by which others go.
    """
    num_tokens = len(input_ids)
    visible = {
        "short_term": short_term_pairs(num_tokens, config.short_term_window),
        "long_term": long_term_pairs(num_tokens, delay or config.long_term_delay),
    }
    naive_normalise = naive_rms_norm if config.norm_type == "rms_norm" else naive_layer_norm

    def linear(name: str, inputs: torch.Tensor) -> torch.Tensor:
        outputs = inputs @ state_dict[f"{name}.weight"].T
        return outputs + state_dict[f"{name}.bias"] if f"{name}.bias" in state_dict else outputs

    def norm(name: str, inputs: torch.Tensor) -> torch.Tensor:
        return naive_normalise(inputs, state_dict[f"{name}.weight"], state_dict.get(f"{name}.bias"), config.norm_eps)

    def heads(inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return inputs.split(config.head_dim, dim=-1)

    def gates(name: str, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if config.gated_keys:
            return linear(f"{name}.gate_proj", inputs), linear(f"{name}.leak_proj", inputs)
        leaks = (10 * state_dict[f"{name}.key_leak"]).expand(num_tokens, -1)
        return torch.zeros_like(leaks), leaks

    def memory(level: str, name: str, inputs: torch.Tensor) -> list[torch.Tensor]:
        log_gates, leaks = gates(name, inputs)
        k_states, v_states = heads(linear(f"{name}.k_proj", inputs)), heads(linear(f"{name}.v_proj", inputs))
        of_bandwidth = [state_dict.get(f"{name}.bandwidth_{part}") for part in ("scale", "offset", "exponent")]
        outputs = []
        for head in range(len(k_states)):
            theta: Any = [None if part is None else part.expand(len(k_states))[head] for part in of_bandwidth]
            keys = naive_gated_keys(k_states[head], log_gates[:, head], leaks[:, head])
            scale, mix = (state_dict[f"{name}.{part}"][head] for part in ("value_scale", "value_mix"))
            others, counts_all = None, config.bandwidth_count == "total"
            if bound is not None and level == "long_term":
                lengths = (scale, mix, delay or config.long_term_delay)
                outputs.append(naive_bounded_head(keys, v_states[head], tuple(theta), *lengths, *bound, counts_all))
                continue
            if pairs is not None and level == "long_term":
                others = pairs.setdefault(name, [([], []) for _ in k_states])[head]
            outputs.append(
                naive_head(keys, v_states[head], visible[level], tuple(theta), scale, mix, counts_all, others)
            )
        return outputs

    def contextual(name: str, inputs: torch.Tensor) -> torch.Tensor:
        numbers = {"short_term": config.num_short_term_heads, "long_term": config.num_long_term_heads}
        retrieved = [memory(level, f"{name}.{level}", inputs) for level, number in numbers.items() if number]
        return linear(f"{name}.o_proj", torch.cat(sum(retrieved, []), dim=-1))

    def persistent(name: str, inputs: torch.Tensor) -> torch.Tensor:
        if config.persistent_memory_type == "swiglu":
            gate, up = linear(f"{name}.gate_proj", inputs), linear(f"{name}.up_proj", inputs)
            return linear(f"{name}.down_proj", gate * torch.sigmoid(gate) * up)
        parts = ("slot_keys", "slot_values", "key_leak", "key_scale", "value_scale")
        of_heads = zip(
            heads(linear(f"{name}.k_proj", inputs)), *(state_dict[f"{name}.{part}"] for part in parts), strict=True
        )
        return linear(f"{name}.o_proj", torch.cat([naive_persistent_memory(*head) for head in of_heads], dim=-1))

    hidden_states = state_dict["model.embed_tokens.weight"][input_ids]
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        normed = norm(f"{layer}.contextual_norm", hidden_states)
        hidden_states = hidden_states + contextual(f"{layer}.contextual_memory", normed)
        normed = norm(f"{layer}.persistent_norm", hidden_states)
        hidden_states = hidden_states + persistent(f"{layer}.persistent_memory", normed)
    return norm("model.norm", hidden_states) @ state_dict["lm_head.weight"].T / config.logits_scaling
