# SPDX-License-Identifier: Apache-2.0
"""Memory Mosaics as the paper writes them: one token, one head, one stored pair at a time.

Read it beside arXiv 2405.06394. `ops_` and `modeling_memory_mosaic.py` must equal it in value and in gradient: this
file is the statement, those are the implementation. Nothing here is fast, and nothing is shared with them. Every
function takes plain tensors of any floating dtype (float64 for comparisons) and is differentiable. This file does not
travel to the Hub.
"""

from typing import Any

import torch


def naive_leaky_average(states: torch.Tensor, leak: torch.Tensor) -> torch.Tensor:
    """Return the leaky sums `(T, D)` of states `(T, D)`, for a scalar leak >= 0.

    Eq. 7: s_t = states_t + exp(-leak) s_(t-1), s_(-1) = 0.
    """
    sums: list[torch.Tensor] = []
    for t, state in enumerate(states):
        sums.append(state if t == 0 else state + torch.exp(-leak) * sums[t - 1])
    return torch.stack(sums)


def naive_norm(vector: torch.Tensor) -> torch.Tensor:
    """Scale a vector `(D,)` to unit length; zero stays zero."""
    length = vector.norm()
    # Division by a length of 0 would give NaN, as in the authors' code.
    return vector / length if length > 0 else vector


def naive_kernel_smoothing(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], value_width: int
) -> torch.Tensor:
    """Return the mean `(value_width,)` of stored values, weighted by exp(query . key); zero if no pair is stored.

    Eq. 2 and 3.
    """
    if not keys:
        return query.new_zeros(value_width)
    scores = torch.stack([query @ key for key in keys])
    # Subtracting the largest score changes no weight and keeps exp() finite.
    weights = torch.exp(scores - scores.max())
    weights = weights / weights.sum()
    weighted = [weight * value for weight, value in zip(weights, values, strict=True)]
    return sum(weighted, query.new_zeros(value_width))


def naive_keys(states: torch.Tensor, key_leak: torch.Tensor, key_scale: torch.Tensor, power: int = 1) -> torch.Tensor:
    """Return the keys `(T, D)` of one memory: leaky sums of projected inputs at length exp(min(10 a, 5)) ** power."""
    # Stored scalars are divided by 10, so that Adam moves them ten times as fast. The cap is the authors'.
    length = torch.exp((10 * key_scale).clamp(max=5)) ** power
    return torch.stack([length * naive_norm(s) for s in naive_leaky_average(states, (10 * key_leak).abs())])


def naive_query_scale(num_pairs: int, bandwidth_exponent: float, bandwidth_start: int) -> float:
    """Return the growth of the kernel's inverse temperature with the number of pairs that are stored.

    Not in the paper, whose kernel does not depend on that number (exponent 0). Memory Mosaics v2 has such a growth.
    """
    return float((max(num_pairs, bandwidth_start) / bandwidth_start) ** bandwidth_exponent)


def naive_contextual_memory(
    k_states: torch.Tensor,
    v_states: torch.Tensor,
    key_leak: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    value_mix: torch.Tensor,
    bandwidth_exponent: float = 0.0,
    bandwidth_start: int = 1,
    pairs: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Return the outputs `(T, D)` of one contextual memory with projected inputs `(T, D)` (eq. 7 and 8).

    Token t retrieves from the pairs of tokens before it, then stores its own. A pair's value looks one token ahead,
    so it completes when that token arrives: token t completes the pair of token t - 1, then reads.

    `pairs` are keys and values that were stored before, by other texts. Those of this text are added to them.
    """
    keys = naive_keys(k_states, key_leak, key_scale)
    stored_keys, stored_values = ([], []) if pairs is None else pairs
    outputs = []
    for t in range(len(keys)):
        if t > 0:
            blend = value_mix * v_states[t - 1] + (1 - value_mix) * v_states[t]
            stored_keys.append(keys[t - 1])
            stored_values.append(torch.exp(10 * value_scale) * naive_norm(blend))
        query = naive_query_scale(len(stored_keys), bandwidth_exponent, bandwidth_start) * keys[t]
        outputs.append(naive_kernel_smoothing(query, stored_keys, stored_values, v_states.shape[1]))
    return torch.stack(outputs)


def naive_ratings(pairs: list[dict[str, Any]], policy: Any) -> list[float]:
    """Return what a policy, or a function of one pair, rates the pairs of a bounded memory with. Not in the paper."""
    rate: dict[str, Any] = {
        "fifo": lambda pair: pair["born"],
        "lru": lambda pair: pair["used_at"],
        "usage": lambda pair: pair["usage"] / max(1, pair["exposure"]),
        "surprise": lambda pair: pair["error"],
    }
    return [policy(pair) if callable(policy) else rate[policy](pair) for pair in pairs]


def naive_bounded_memory(
    k_states: torch.Tensor,
    v_states: torch.Tensor,
    key_leak: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    value_mix: torch.Tensor,
    max_pairs: int,
    policy: Any,
) -> torch.Tensor:
    """Return the outputs `(T, D)` of [`naive_contextual_memory`] if it holds at most so many pairs. Not in the paper.

    Before a pair is stored that does not fit, a sixteenth of the pairs go, and one at least: those that the policy
    rates lowest, of pairs that are rated alike the older ones.
    """
    keys = naive_keys(k_states, key_leak, key_scale)
    pairs: list[dict[str, Any]] = []
    outputs: list[torch.Tensor] = []
    for t in range(len(keys)):
        if t > 0:
            if len(pairs) == max_pairs:
                ratings = naive_ratings(pairs, policy)
                order = sorted(range(max_pairs), key=lambda index: ratings[index])
                pairs = [pairs[index] for index in sorted(order[max(1, max_pairs // 16) :])]
            value = value_mix * v_states[t - 1] + (1 - value_mix) * v_states[t]
            value = torch.exp(10 * value_scale) * naive_norm(value)
            error = float((outputs[t - 1] - value).square().sum() / value.square().sum())
            new = {"key": keys[t - 1], "value": value, "error": error}
            pairs.append(new | {"born": t + 1, "used_at": t + 1, "usage": 0.0, "exposure": 0})
        outputs.append(
            naive_kernel_smoothing(
                keys[t], [pair["key"] for pair in pairs], [pair["value"] for pair in pairs], v_states.shape[1]
            )
        )
        scores = torch.stack([keys[t] @ pair["key"] for pair in pairs]) if pairs else keys.new_zeros(0)
        for pair, weight in zip(pairs, scores.softmax(0).tolist(), strict=True):
            pair["usage"] += weight
            pair["exposure"] += 1
            if weight * len(pairs) > 1:
                pair["used_at"] = t + 1
    return torch.stack(outputs)


def naive_persistent_memory(
    k_states: torch.Tensor,
    slot_keys: torch.Tensor,
    slot_values: torch.Tensor,
    key_leak: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
) -> torch.Tensor:
    """Return the outputs `(T, D)` of one persistent memory: smoothing over N learnt pairs, keys and values `(N, D)`.

    The learnt keys carry no scale, so the query carries the scale of both.
    """
    queries = naive_keys(k_states, key_leak, key_scale, power=2)
    outputs = [naive_kernel_smoothing(q, list(slot_keys), list(slot_values), slot_values.shape[1]) for q in queries]
    # Learnt values carry no scale either, so that their mean takes it.
    return torch.exp(10 * value_scale) * torch.stack(outputs)


def naive_layer_norm(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Normalise to zero mean and unit variance over the last axis, then apply a learnt scale and, if any, a shift."""
    centred = hidden_states - hidden_states.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    return normed * weight + (0 if bias is None else bias)


def naive_logits(
    state_dict: dict[str, torch.Tensor],
    config: Any,
    input_ids: torch.Tensor,
    pairs: dict[str, list[tuple[list[torch.Tensor], list[torch.Tensor]]]] | None = None,
    bound: tuple[int, Any] | None = None,
) -> torch.Tensor:
    """Return the logits `(T, vocab_size)` of one unpadded text `(T,)`, without dropout.

    Args:
        state_dict: of a `MemoryMosaicForCausalLM`.
        config: its configuration.
        pairs (*optional*): keys and values that other texts have stored, for each head of each contextual memory, by
            its name. Those of this text are added to them.
        bound (*optional*): number of pairs that each head holds at most, and the policy, or function of a pair, by
            which others go.
    """
    pairs = {} if pairs is None else pairs

    def linear(name: str, inputs: torch.Tensor) -> torch.Tensor:
        outputs = inputs @ state_dict[f"{name}.weight"].T
        return outputs + state_dict[f"{name}.bias"] if f"{name}.bias" in state_dict else outputs

    def norm(name: str, inputs: torch.Tensor) -> torch.Tensor:
        return naive_layer_norm(
            inputs, state_dict[f"{name}.weight"], state_dict.get(f"{name}.bias"), config.layer_norm_eps
        )

    def heads(inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return inputs.split(config.head_dim, dim=-1)

    def contextual(name: str, inputs: torch.Tensor) -> torch.Tensor:
        scalars = [state_dict[f"{name}.{s}"] for s in ("key_leak", "key_scale", "value_scale", "value_mix")]
        k_states, v_states = heads(linear(f"{name}.k_proj", inputs)), heads(linear(f"{name}.v_proj", inputs))
        stored = pairs.setdefault(name, [([], []) for _ in k_states])
        others: dict[str, Any] = {n: getattr(config, n) for n in ("bandwidth_exponent", "bandwidth_start")}
        outputs = []
        for k, v, leak, key_scale, value_scale, mix, own in zip(k_states, v_states, *scalars, stored, strict=True):
            memory = (k, v, leak, key_scale, value_scale, mix)
            if bound is None:
                outputs.append(naive_contextual_memory(*memory, **others, pairs=own))
            else:
                outputs.append(naive_bounded_memory(*memory, *bound))
        return linear(f"{name}.o_proj", torch.cat(outputs, dim=-1))

    def persistent(name: str, inputs: torch.Tensor) -> torch.Tensor:
        per_head = ("slot_keys", "slot_values", "key_leak", "key_scale", "value_scale")
        memories = zip(
            heads(linear(f"{name}.k_proj", inputs)), *(state_dict[f"{name}.{p}"] for p in per_head), strict=True
        )
        return linear(f"{name}.o_proj", torch.cat([naive_persistent_memory(*memory) for memory in memories], dim=-1))

    # No positions are added: order enters by the leaky sums and by the pairs.
    hidden_states = state_dict["model.embed_tokens.weight"][input_ids]
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        hidden_states = hidden_states + contextual(
            f"{layer}.contextual_memory", norm(f"{layer}.contextual_norm", hidden_states)
        )
        hidden_states = hidden_states + persistent(
            f"{layer}.persistent_memory", norm(f"{layer}.persistent_norm", hidden_states)
        )
    # The scale of the logits is in the authors' code, not in the paper.
    return norm("model.norm", hidden_states) @ state_dict["lm_head.weight"].T / config.logits_scaling
