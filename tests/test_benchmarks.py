# SPDX-License-Identifier: Apache-2.0
"""The benchmark of memory models: its counts and conclusions, apart from the seconds."""

import functools
import json

import pytest
import torch
from helpers.kinds import KINDS
from helpers.models import make_ids
from torch.nn import functional

from benchmarks import gpu, memory_models, roofline, searched_memories, speed, speed_v2, stored_memories
from modeling_memory_mosaic import retrieval_memory_mosaic
from modeling_memory_mosaic.modeling_memory_mosaic import MemoryMosaicPreTrainedModel
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


@pytest.mark.parametrize("what", ["training step", "prefill", "decode"])
@pytest.mark.parametrize("how", ["eager", speed.DEFAULT_DROPOUT, pytest.param(speed.COMPILED, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("ours", "peers"), [("mosaic", speed.PEERS), (speed_v2.OURS, speed_v2.PEERS)])
def test_every_case_of_the_speed_benchmark_runs_small(what, how, ours, peers, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(speed, "peak_memory", lambda *arguments: 1.0)
    case = speed.Case(what, 2, 12, how)
    rows = list(speed.of_case(case, speed.SMALL_SIZES, 2, ours, peers))
    assert [row["peer"] for row in rows] == [speed.NAMES[name] for name in peers]
    for row in rows:
        assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
        assert len(speed.cells(row)) == len(speed.COLUMNS)
        assert ("products_of_ours" in row) == (what == "training step" and how == "eager")


MACHINE = {"threads": 1, "cpu": "none", "rounds": 1, "versions": {"torch": "none"}, "parameters": 1000}


def test_the_benchmark_of_stored_memories_runs_small(monkeypatch):
    monkeypatch.setattr(stored_memories, "CASES", {(1, 20): 1e-9, (2, 12): 1e9})
    rows = stored_memories.measure(1, cases=[(1, 20), (2, 12)], sizes=speed.SMALL_SIZES)
    assert [(row["texts"], row["tokens"], row["beside"]) for row in rows] == [
        (number, length, other) for number, length in ((1, 20), (2, 12)) for other in ("the same model", "Llama")
    ]
    for row in rows:
        assert row["bytes"] > 0 and row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
    report = json.loads(json.dumps(MACHINE | {"rows": rows}))
    page = stored_memories.table(report)
    assert page.count("\n| ") == 1 + 1 + len(rows) and len(stored_memories.cells(rows[0])) == len(
        stored_memories.COLUMNS
    )
    assert "Met: 1 x 20 beside the same model (" in page and "Missed: 2 x 12 beside the same model (" in page


def test_the_committed_report_of_stored_memories_fills_its_block():
    report = json.loads((CLONE / "benchmarks" / "stored_memories.json").read_text(encoding="utf-8"))
    assert {(row["texts"], row["tokens"]) for row in report["rows"]} == stored_memories.CASES.keys()
    assert table_of("stored_memories") == stored_memories.table(report)


@pytest.mark.parametrize("variant", ["mosaic", "mosaic v2"])
def test_the_benchmark_of_searched_memories_runs_small(variant, monkeypatch):
    monkeypatch.setattr(searched_memories, "PART_LENGTH", 25)
    monkeypatch.setattr(searched_memories, "NUM_DECODED", 2)
    monkeypatch.setattr(retrieval_memory_mosaic, "FEWEST_PAIRS", 10)
    model, indexes = KINDS[variant].make(), ["clusters", "exact", "lsh"]
    rows = searched_memories.measure(model, make_ids(75), make_ids(1, 4, seed=1), indexes, rounds=1)
    num_tolerances, num_shares = len(searched_memories.TOLERANCES), len(searched_memories.SHARES)
    assert [row["index"] for row in rows[:-num_shares]] == [name for name in indexes for _ in range(num_tolerances)]
    assert [row["max_share"] for row in rows[-num_shares:]] == [*searched_memories.SHARES]
    for row in rows:
        assert row["made"] > 0 and 0 <= row["visited"] <= row.get("max_share", 1)
        assert len(searched_memories.cells(row)) == len(searched_memories.COLUMNS)
    page = searched_memories.table(json.loads(json.dumps(MACHINE | {"recipe": "none", "pairs": 75, "rows": rows})))
    assert page.count("\n| ") == 1 + 1 + len(rows)


def test_the_straight_line_of_decoding_is_found():
    lengths = (64, 512, 2048, 8192)
    rows = [{"num_tokens": n, "ours": s * (0.005 + 2e-7 * n)} for n in lengths for s in (0.9, 1.1)]
    line = speed.over_length(rows, rate=1e10)
    assert line["intercept"] == pytest.approx(0.005) and line["slope"] == pytest.approx(2e-4)
    assert line["deviation"] < 1e-9


def test_operations_of_a_step_are_those_of_its_matrix_products():
    """Forward and backward of a linear layer are three products, of attention seven, half of each if causal."""
    linear, vectors = torch.nn.Linear(5, 7, bias=False), torch.randn(3, 5, requires_grad=True)
    assert roofline.flops_of(lambda: linear(vectors).sum().backward()) == 3 * 2 * (3 * 5 * 7)
    query = torch.randn(2, 3, 40, 8, requires_grad=True)

    def attend(is_causal):
        return functional.scaled_dot_product_attention(query, query, query, is_causal=is_causal).sum().backward()

    assert roofline.flops_of(lambda: attend(False)) == 7 * 2 * (6 * 40 * 8 * 40)
    assert roofline.flops_of(lambda: attend(True)) == 7 * (6 * 40 * 8 * 40)
    left, right, total = torch.randn(2, 3, 5), torch.randn(2, 5, 7), torch.zeros(2, 3, 7)
    assert roofline.flops_of(lambda: total.baddbmm_(left, right)) == 2 * 2 * (3 * 5 * 7)
    assert roofline.flops_of(lambda: total[0].addmm_(left[0], right[0])) == 2 * (3 * 5 * 7)


def test_the_benchmark_of_a_gpu_runs_small_on_a_cpu(monkeypatch, tmp_path):
    """So that a lent GPU is not spent on mistakes: the same code, in seconds."""
    monkeypatch.setattr(MemoryMosaicPreTrainedModel, "_supports_flash_attn", False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(gpu, "ways", lambda: [gpu.Way(torch.float32, "sdpa"), gpu.Way(torch.bfloat16, "eager")])
    monkeypatch.setattr(gpu, "NUM_DECODED", 2)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {"small": sizes, "large": {"tiny": sizes}, "lengths": (16, 32), "tokens_per_step": 64, "rounds": 1}
    report = gpu.Report(tmp_path / "gpu.json", seconds=60, gpu="none")
    gpu.measure("cpu", report, **small)
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert written == report.content
    assert [row["ok"] for row in written["correctness"]] == [True, True] and not written["left_out"]
    assert [row["num_tokens"] for row in written["speed"]] == [16, 32]
    late = gpu.Report(None, seconds=-1)
    gpu.measure("cpu", late, **small)
    assert late.content["left_out"] == [
        "float32, sdpa",
        "bfloat16, eager",
        "tiny, 16 tokens, sdpa",
        "tiny, 32 tokens, sdpa",
    ]
    monkeypatch.setitem(gpu.BOUNDS, torch.bfloat16, 1e-9)
    with pytest.raises(RuntimeError, match="bfloat16, eager"):
        gpu.measure("cpu", gpu.Report(None, seconds=60), **small)
