# SPDX-License-Identifier: Apache-2.0
"""The benchmark of memory models: its counts and conclusions, apart from the seconds."""

import json

import pytest
import torch

from benchmarks import memory_models
from training.paths import CLONE
from training.tables import table_of


def rows_of(**lower_quartiles):
    lengths = (512, 1024, 4096)
    return [
        {"tokens": num_tokens, **{what: {"ratio_quartiles": [low[i], 9.0]} for what, low in lower_quartiles.items()}}
        for i, num_tokens in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    ("lower_quartiles", "start"),
    [
        ((0.9, 1.1, 1.2), 1024),
        ((1.1, 1.2, 1.3), 512),
        ((1.1, 0.9, 1.3), 4096),
        ((0.8, 1.2, 1.0), None),
    ],
)
def test_it_pays_from_the_length_on_that_is_faster_with_all_longer_ones(lower_quartiles, start):
    rows = rows_of(prefill=lower_quartiles, decode=(0.5, 0.5, 0.5))
    assert memory_models.pays_from(rows[::-1], "prefill") == start
    assert memory_models.pays_from(rows, "decode") is None


@torch.no_grad()
@pytest.mark.parametrize("name", [*memory_models.ENCODERS, memory_models.FULL])
def test_pairs_held_are_those_that_the_cache_holds(name, monkeypatch):
    monkeypatch.setattr(memory_models, "CHUNK_LENGTH", 8)
    model = memory_models.build(name)
    cache, held = memory_models.read(model, 32), []
    for _ in range(8):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
        layers = getattr(cache, "row", cache).layers
        held.append(max(layer.keys.shape[-2] for layer in layers))
    assert max(held) == memory_models.slots(model, 32)


def test_the_committed_report_fills_its_block():
    report = json.loads((CLONE / "benchmarks" / "memory_models.json").read_text(encoding="utf-8"))
    assert {row["tokens"] for row in report["rows"]} == set(memory_models.LENGTHS)
    for row in report["rows"]:
        model = memory_models.build(row["encoder"])
        assert row["slots"]["ours"] == memory_models.slots(model, row["tokens"])
        ratio = [memory_models.multiplications(name, row["tokens"]) for name in (memory_models.FULL, row["encoder"])]
        assert row["formula"] == pytest.approx(ratio[0] / ratio[1])
    assert table_of("memory_speed") == memory_models.table(report)
