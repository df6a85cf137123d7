"""What the planner says of DeepSeek-V4, against sums by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from localrun.limits import MARK_BYTES
from localrun.placement.sizes import mark_bytes
from localrun.plan import measure, report
from localrun.plan.fit import find_fit, with_ram
from localrun.plan.machine import load_machine
from localrun.plan.report import model_facts
from localrun.plan.shapes import from_config, load_model, n_bytes
from localrun.plan.speed import attention_flops

MXFP4 = 17 / 32  # bytes a weight


def test_bytes_of_flash() -> None:
    """21 layers of ratio 4, 20 of 128; 256 experts of 3 matrices, of which a token takes 6; BF16 compressors."""
    facts = model_facts(load_model("deepseek-v4-flash"))
    assert facts["type"] == "MXFP4_MOE"
    assert facts["kv_bytes_per_token"] == 2 * (21 * (512 + 128) // 4 + 20 * 512 // 128) == 6880
    parts = facts["parts"]
    assert parts["routed experts"]["bytes"] == 43 * 256 * 3 * 2048 * 4096 * MXFP4
    assert parts["routed experts"]["bytes_per_token"] == 43 * 6 * 3 * 2048 * 4096 * MXFP4
    matrices = 21 * 2 * 4096 * (1024 + 256) + 20 * 2 * 4096 * 512
    vectors = 21 * (4 * (1024 + 256) + 512 + 128) + 20 * (128 * 512 + 512)
    assert parts["compressors"]["bytes"] == 2 * matrices + 4 * vectors
    assert parts["embedding"]["bytes_per_token"] < 10_000  # rows of the embedding and of the tables of experts


def test_attention_by_hand() -> None:
    """Of 64 heads: 128 rows of the window, 512 chosen ones, all of ratio 128. Of an indexer: 64 times 128 a row."""
    model, ctx = load_model("deepseek-v4-flash"), 65536
    rows = 43 * 128 + 21 * 512 + 20 * ctx // 128
    assert attention_flops(model, ctx, 3) == 3 * (rows * 64 * 512 * 4 + 21 * (ctx // 4) * 64 * 128 * 2)
    short = 43 * 128 + (21 * 1024) // 4 + 20 * 1024 // 128  # all rows of ratio 4: none is scored
    assert attention_flops(model, 1024, 1) == short * 64 * 512 * 4


def test_no_mix_is_larger_than_the_checkpoint() -> None:
    model, machine = load_model("deepseek-v4-flash"), load_machine("desktop")
    found = find_fit(model, with_ram(machine, "192GB"), 8192)
    assert (found.chosen.type, found.next) == ("MXFP4_MOE", None)
    smaller = find_fit(model, with_ram(machine, "128GB"), 8192)
    assert n_bytes(smaller.chosen.tensors) < n_bytes(smaller.next.tensors) < n_bytes(found.chosen.tensors)


def test_marks_take_what_they_hold_and_no_more_than_they_may() -> None:
    config = load_model("deepseek-v4-flash").config
    rows = 43 * (128 + 32) * 512 * 2 + 21 * (8 + 32) * 2 * (1024 + 256) * 4 + 20 * (128 + 32) * 2 * 512 * 4
    assert mark_bytes(config, 512) == rows
    assert mark_bytes(config, 1 << 20) == MARK_BYTES
    assert mark_bytes(replace(config, attention="gqa"), 1 << 20) == 0


@pytest.mark.slow
def test_pro() -> None:
    facts = model_facts(load_model("deepseek-v4-pro"))
    assert facts["kv_bytes_per_token"] == 2 * (30 * (512 + 128) // 4 + 31 * 512 // 128) == 9848
    assert facts["parts"]["routed experts"]["bytes"] == 61 * 384 * 3 * 3072 * 7168 * MXFP4


def test_this_machine_is_measured_with_layers_of_its_kinds() -> None:
    """Tables of experts have no rates; probes have pooled rows, and heads that make whole groups."""
    flash = load_model("deepseek-v4-flash")
    assert {type_ for type_, *_ in measure._matrices(flash)} == {"BF16", "F32", "MXFP4", "Q8_0"}
    large = measure._probe_config(flash, 2)
    small = large | measure._small_heads(flash.config)
    for values in (large, small):
        shape = from_config(values, Path("probe"), "Q8_0")
        assert sorted(shape.config.compress_ratios) == [4, 128] and shape.config.num_attention_heads % 8 == 0
    assert not report._without_rates(flash, load_machine("10k-server"))
