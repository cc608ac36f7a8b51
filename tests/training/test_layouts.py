# SPDX-License-Identifier: Apache-2.0
"""What a layout costs a device: what is counted is what a model has, keeps and sends."""

import pytest
import torch
from helpers.kinds import KINDS
from typer.testing import CliRunner

from modeling_memory_mosaic import context_parallel, layout_memory_mosaic
from training.__main__ import app
from training.cost import activation_bytes
from training.layouts import Layout, Micro, exchanged_bytes, large_configs, memory_bytes, price, table
from training.paths import CONFIGURATION


@pytest.mark.parametrize("name", ["mosaic", "mosaic v2"])
def test_one_device_holds_what_training_holds(name):
    model = KINDS[name].make(num_hidden_layers=3, long_term_delay_range=None)
    micro = Micro(2, 64, "no", checkpointing=False)
    sizes = memory_bytes(model.config, Layout(), micro)
    assert sizes["state"] == 16 * model.num_parameters() and sizes["gathered_weights"] == 0
    assert sizes["activations"] == pytest.approx(activation_bytes(model.config, 2, 64), rel=1e-3)
    assert sum(exchanged_bytes(model.config, Layout(), micro).values()) == 0


def test_shards_divide_the_state_and_replicas_do_not():
    config, micro = KINDS["mosaic"].make(num_attention_heads=4).config, Micro(1, 64)
    one, eight, copies = (
        memory_bytes(config, layout, micro)["state"]
        for layout in (Layout(), Layout(shards=2, heads=2, texts=2), Layout(8))
    )
    assert one == copies == 8 * eight


def test_what_shared_texts_send_is_counted(monkeypatch):
    """The collectives of one process of four, in float32, where a backward pass sends what a forward pass does."""
    sent, processes = [], 4

    def all_gather(whole, own, group):
        sent.append(own.numel() * own.element_size() * (processes - 1))
        whole.copy_(own.repeat(processes))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: processes)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 1)
    monkeypatch.setattr(layout_memory_mosaic, "collective", lambda *names: all_gather)
    model, inputs = KINDS["mosaic"].make(), torch.ones(2, 64, dtype=torch.long)
    with torch.no_grad(), context_parallel(model, group="any"):
        model(input_ids=inputs)
    counted = exchanged_bytes(model.config, Layout(texts=processes), Micro(2, 64, "no", checkpointing=False))["texts"]
    assert 2 * sum(sent[1:]) == counted  # the first one compares the texts


def test_layouts_that_do_not_fit_are_refused():
    config = KINDS["mosaic"].make().config
    with pytest.raises(ValueError, match="2 heads cannot share 3 heads and 64 tokens"):
        price(config, Layout(heads=2), Micro(1, 64))
    for text in ("shard=8", "shards=0", "shards", "shards=8;texts=2"):
        with pytest.raises(ValueError, match="give numbers of replicas, shards, heads, texts"):
            Layout.parse(text)
    assert Layout.parse("shards=8, texts=2") == Layout(shards=8, texts=2)


def test_dry_run_prices_a_layout():
    recipe = str(CONFIGURATION / "recipe" / "smoke.yaml")
    result = CliRunner().invoke(app, ["dry-run", recipe, "--layout", "shards=2,texts=2"])
    assert result.exit_code == 0, result.output
    assert "'devices': 4" in result.output and "memory_state_gb" in result.output


@pytest.mark.parametrize("name", ["v1, 10 B", "v2, 10 B"])
def test_sizes_of_the_page_are_what_they_are_called(name):
    assert price(large_configs()[name], Layout(shards=8), Micro(1, 8))["memory_state_gb"] == pytest.approx(
        20, rel=0.05
    )


@pytest.mark.slow
def test_the_table_of_the_page_is_what_is_counted():
    assert table() in (CONFIGURATION / "accelerate" / "README.md").read_text(encoding="utf-8")
