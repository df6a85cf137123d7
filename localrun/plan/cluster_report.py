"""The answer to `localrun plan cluster` as one JSON document."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError
from localrun.plan import flows, topology
from localrun.plan.cluster import (
    Load,
    expert_parallel,
    layer_compute_s,
    load_device,
    split_sizes,
    with_compute,
)
from localrun.plan.shapes import ModelShape, load_model

_LEAST, _MOST = 1e-6, 1e18  # of rates: slower and faster than any network or any users, and sums stay finite


@dataclass(frozen=True)
class Wanted:
    """What to compute: the options of the command. bytes_per_s and hidden_size replace the device's and the model's."""

    model: str = "deepseek-v3"
    device: str = "h800"
    bytes_per_s: float | None = None
    n_tokens: int = 32
    hidden_size: int | None = None
    ctx: int = 4096
    acceptance: float = 0.85
    requests_per_s: float = 10.0
    prompt_tokens: int = 4096
    reply_tokens: int = 1024
    utilisation: float = 0.4
    units: tuple[int, int] = (32, 320)
    ports: int = 64
    planes: int = 8
    endpoints: int | None = None
    prices: Path | None = None
    fabric: str = "4x4x4x4"


def model_of(wanted: Wanted) -> ModelShape:
    """Raises LocalrunError."""
    return load_model(wanted.model)


def make_report(wanted: Wanted) -> dict[str, Any]:
    """Everything `localrun plan cluster` prints. Raises LocalrunError on settings that make no sense."""
    _check(wanted)
    fabric = parse_fabric(wanted.fabric)
    networks = topology.compare(wanted.ports, wanted.planes, wanted.endpoints)
    prices = topology.load_prices(wanted.prices)
    model, device = model_of(wanted), load_device(wanted.device)
    rate = wanted.bytes_per_s or device.network_bytes_per_s
    ideal = expert_parallel(model, rate, wanted.n_tokens, hidden_size=wanted.hidden_size)
    limit = with_compute(ideal, layer_compute_s(model, device, wanted.n_tokens, wanted.ctx))
    load = Load(wanted.requests_per_s, wanted.prompt_tokens, wanted.reply_tokens)
    split = split_sizes(model, device, limit, load, utilisation=wanted.utilisation, units=wanted.units)
    return {
        "model": model.name,
        "device": device.name,
        "expert_parallel": {
            "gb_per_s": rate / 1e9,
            "bytes_per_step": ideal.bytes_per_step,
            "step_s": ideal.step_s,
            "ideal_layer_s": ideal.layer_s,
            "ideal_token_s": ideal.token_s,
            "ideal_tokens_per_s": 1 / ideal.token_s,
            "acceptance": wanted.acceptance,
            "ideal_mtp_tokens_per_s": ideal.with_mtp(wanted.acceptance),
            "layer_compute_s": limit.layer_compute_s,
            "token_s": limit.token_s,
            "token_without_overlap_s": limit.token_without_overlap_s,
        },
        "split": asdict(split),
        "topologies": topology.as_rows(networks, prices),
        "prices": asdict(prices),
        "fabric": f"{fabric.planes} planes of {fabric.leaves} leaves, {fabric.spines} spines, {fabric.nodes} nodes",
        "failures": {name: asdict(kept) for name, kept in flows.robustness(fabric).items()},
        "failures_without_rerouting": {
            name: asdict(kept) for name, kept in flows.robustness(fabric, reroute=False).items()
        },
        "isolation": flows.isolation(fabric),
    }


def _check(wanted: Wanted) -> None:
    for name in ("n_tokens", "ctx", "prompt_tokens", "reply_tokens", "hidden_size"):
        value = getattr(wanted, name)
        if value is not None and not 1 <= value <= 10**9:
            raise LocalrunError(f"{name.removeprefix('n_').removesuffix('_size')} {value}; expected 1 to 10^9")
    for unit in wanted.units:
        if not 1 <= unit <= 10**6:
            raise LocalrunError(f"a unit of {unit} devices; expected 1 to 10^6")
    for name in ("bytes_per_s", "requests_per_s"):
        value = getattr(wanted, name)
        if value is not None and not _LEAST <= value <= _MOST:
            raise LocalrunError(f"{name.removesuffix('_per_s')} a second {value}; expected {_LEAST:g} to {_MOST:g}")
    for name, least in (("acceptance", 0.0), ("utilisation", 1e-6)):
        if not least <= getattr(wanted, name) <= 1:
            raise LocalrunError(f"{name} {getattr(wanted, name)}; expected 0 to 1")


def parse_fabric(text: str) -> flows.Fabric:
    """ "4x8x4x4" -> 4 planes of 8 leaves and 4 spines, 4 nodes a leaf. Raises LocalrunError."""
    if not re.fullmatch(r"\d{1,4}x\d{1,4}x\d{1,4}x\d{1,4}", text):
        raise LocalrunError(f"--fabric {text!r}; expected planes, leaves, spines and nodes a leaf, such as 4x4x4x4")
    return flows.Fabric(*map(int, text.split("x")))
