"""Every figure of DeepSeek's published arithmetic, by a command. Source: arXiv 2412.19437 and 2505.09343."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from typing import Any

import pytest

from cli.main import run


@functools.cache
def plan(*args: str) -> dict[str, Any]:
    """What the command prints; the same command is run once."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(["plan", *args, "--json"]) == 0
    return json.loads(out.getvalue())


# --- table 1: KV cache, exactly


@pytest.mark.parametrize(
    ("model", "n_bytes"),
    [("deepseek-v3", 70_272), ("deepseek-r1", 70_272), ("qwen2.5-72b", 327_680), ("llama-3.1-405b", 516_096),
     ("qwen3-30b-a3b", 98_304), ("qwen3-235b-a22b", 192_512)],
)  # fmt: skip
def test_kv_bytes_a_token(model: str, n_bytes: int) -> None:
    rows = {row["model"]: row for row in plan("--kv-table")["kv"]}
    assert rows[model]["bytes_per_token"] == n_bytes


def test_kv_multiples_of_the_paper() -> None:
    sizes = {row["model"]: row["bytes_per_token"] for row in plan("--kv-table")["kv"]}
    assert round(sizes["qwen2.5-72b"] / sizes["deepseek-v3"], 2) == 4.66
    # the paper prints 7.28x; its own two sizes give 7.344
    assert sizes["llama-3.1-405b"] / sizes["deepseek-v3"] == pytest.approx(7.28, rel=0.01)


def test_kv_of_v2_lite_with_all_heads() -> None:
    """276,480 bytes instead of 31,104: what llama.cpp kept before it had latent attention."""
    row = next(row for row in plan("--kv-table")["kv"] if row["model"] == "deepseek-v2-lite")
    assert (row["bytes_per_token"], row["mha"]) == (31_104, 276_480)


# --- table 2: training cost a token at sequence length 4096, within 3%


@pytest.mark.parametrize(("model", "gflop"), [("deepseek-v2", 155), ("deepseek-v3", 250), ("llama-3.1-405b", 2448)])
def test_training_gflop(model: str, gflop: float) -> None:
    rows = {row["model"]: row for row in plan("--compute-table")["compute"]}
    assert rows[model]["training_gflop_per_token"] == pytest.approx(gflop, rel=0.03)  # what the issue allows
    assert rows[model]["published"] == gflop


def test_training_gflop_of_qwen_is_not_of_its_published_shape() -> None:
    """394 is less than 6 FLOPs a weight; it comes of Qwen1.5-72B's intermediate_size with Qwen2.5's 8 key heads."""
    row = next(row for row in plan("--compute-table")["compute"] if row["model"] == "qwen2.5-72b")
    assert 6 * row["parameters"] / 1e9 > 1.1 * row["published"]
    assert row["with_published_shape"] == pytest.approx(394, rel=0.03)
    assert row["training_gflop_per_token"] == pytest.approx(444.9, abs=0.1)  # 6 x 71.46 G + 16.1 of attention


# --- section 2.3.2: the limit of expert-parallel decoding


@pytest.mark.parametrize(
    ("device", "step_us", "layer_us", "token_ms", "tokens_per_s"),
    [("h800", 120.96, 241.92, 14.76, 67), ("gb200-nvl72", 6.72, 13.44, 0.82, 1200)],
)
def test_expert_parallel_limit(
    device: str,
    step_us: float,
    layer_us: float,
    token_ms: float,
    tokens_per_s: float,
) -> None:
    """With the paper's 7K = 7000 values a token."""
    limit = plan("cluster", "--device", device, "--hidden", "7000")["expert_parallel"]
    assert limit["bytes_per_step"] == (1 + 2) * 32 * 9 * 7000
    assert 1e6 * limit["step_s"] == pytest.approx(step_us, abs=5e-3)  # printed with two decimals
    assert 1e6 * limit["ideal_layer_s"] == pytest.approx(layer_us, abs=5e-3)
    assert 1e3 * limit["ideal_token_s"] == pytest.approx(token_ms, abs=5e-3)
    assert limit["ideal_tokens_per_s"] == pytest.approx(tokens_per_s, rel=0.02)  # "67", "approximately 1200"


def test_expert_parallel_limit_with_the_models_own_width() -> None:
    limit = plan("cluster")["expert_parallel"]
    assert 1e6 * limit["step_s"] == pytest.approx(3 * 32 * 9 * 7168 / 50e9 * 1e6)
    assert limit["token_s"] >= limit["ideal_token_s"]
    assert limit["token_without_overlap_s"] > limit["token_s"]


def test_drafted_tokens_of_full_gpu_serving() -> None:
    """1.8 times at 80-90% acceptance (section 2.3.3)."""
    limit = plan("cluster", "--acceptance", "0.85")["expert_parallel"]
    assert limit["ideal_mtp_tokens_per_s"] / limit["ideal_tokens_per_s"] == pytest.approx(1.8, abs=0.05)


# --- weights read a token


def parts(*args: str) -> dict[str, Any]:
    return plan("deepseek-v3", "--machine", "10k-server", *args)["model"]["parts"]


def test_experts_read_a_token() -> None:
    experts = parts()["routed experts"]
    assert experts["weights_per_token"] == 58 * 8 * 3 * 7168 * 2048  # 20.4 G
    # The 12.4 GB of the arithmetic are at the whole file's 4.85 bits; the experts' own mix is a little smaller.
    assert experts["bytes_per_token"] == pytest.approx(12.4e9, rel=0.015)
    at_4_5_bits = parts("--type", "Q4_0")["routed experts"]["bytes_per_token"]
    assert at_4_5_bits == pytest.approx(11.5e9, rel=0.005)
    assert 20 * at_4_5_bits / 1e9 == pytest.approx(230, rel=0.005)  # GB/s for 20 tokens/s
    assert 20 * experts["bytes_per_token"] / 1e9 == pytest.approx(250, rel=0.02)


def test_the_gpu_half() -> None:
    found = parts()
    weights = {name: part["weights"] / 1e9 for name, part in found.items()}
    assert weights["attention"] == pytest.approx(11.4, abs=0.05)
    assert weights["shared experts"] == pytest.approx(2.6, abs=0.05)
    assert weights["dense ffn"] == pytest.approx(1.2, abs=0.05)
    assert weights["head"] == pytest.approx(0.93, abs=0.005)
    half = sum(weights[name] for name in ("attention", "shared experts", "dense ffn", "head"))
    assert half == pytest.approx(16, abs=0.2)
    assert half * 8.5 / 8 == pytest.approx(17, abs=0.2)  # GB at Q8_0
    assert half * 4.5 / 8 == pytest.approx(9, abs=0.1)


def test_peak_of_twelve_channels() -> None:
    from localrun.plan.machine import load_machine

    memory = load_machine("10k-server").document["cpu"]["memory"]
    peak = memory["channels"] * memory["mega_transfers"] * 1e6 * 8
    assert peak == pytest.approx(461e9, rel=0.001)


def test_parameters() -> None:
    """As published, without the layer for multi-token prediction."""
    from localrun.plan.tables import compute_row

    published = {
        "deepseek-v3": (671e9, 37e9),
        "deepseek-v2": (236e9, 21e9),
        "deepseek-v2-lite": (15.7e9, 2.4e9),
        "kimi-k2": (1.03e12, 32e9),
        "qwen2.5-72b": (72.7e9, 71.5e9),
        "llama-3.1-405b": (405.9e9, 403.8e9),
    }
    for name, (total, active) in published.items():
        row = compute_row(name)
        assert row["parameters"] == pytest.approx(total, rel=0.005)
        assert row["active"] == pytest.approx(active, rel=0.025)  # some count the embedding as active, we do not


# --- table 3: networks


TABLE_3 = {
    "FT2": (2_048, 96, 2_048, 9, 4.39, 0.005),
    "MPFT": (16_384, 768, 16_384, 72, 4.39, 0.005),
    "FT3": (65_536, 5_120, 131_072, 491, 7.5, 0.05),
    "SF": (32_928, 1_568, 32_928, 146, 4.4, 0.05),
    "DF": (261_632, 16_352, 384_272, 1_522, 5.8, 0.05),
}


def test_networks() -> None:
    rows = {row["name"]: row for row in plan("cluster")["topologies"]}
    assert list(rows) == list(TABLE_3)
    for name, (endpoints, switches, links, million, thousand, rounding) in TABLE_3.items():
        row = rows[name]
        assert (row["endpoints"], row["switches"], row["links"]) == (endpoints, switches, links)
        assert row["cost"] / 1e6 == pytest.approx(million, abs=0.5)  # as printed
        assert row["cost_per_endpoint"] / 1e3 == pytest.approx(thousand, abs=rounding)
