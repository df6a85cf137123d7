"""How long messages take between ranks: what `localrun plan --link` reckons with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from localrun.ranks.echo import end, exchange_s
from quant.decode.message_sizes import back_bytes, message_bytes

if TYPE_CHECKING:
    from mpi4py import MPI

# A layer's messages of one token of DeepSeek-V3: what goes out in BF16, and back in float32, the longest.
OUT_BYTES, BACK_BYTES = message_bytes("bf16", 7168, 8, n_tokens=1), back_bytes("f32", 7168, n_tokens=1)
_EMPTY_BYTES, _LARGE_BYTES = 64, 1 << 22
_TIMES, _LARGE_TIMES, _BURST, _WARM_UP = 1000, 20, 100, 50


def measure_links(comm: MPI.Intracomm, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each rank but the first: medians and 90th percentiles, in seconds, and bytes/s."""
    found = [{"rank": names[rank]} | _measure(comm, rank) for rank in range(1, comm.size)]
    end(comm)
    return found


def _measure(comm: MPI.Intracomm, rank: int) -> dict[str, float]:
    exchange_s(comm, rank, OUT_BYTES, BACK_BYTES, _WARM_UP)
    empty = exchange_s(comm, rank, _EMPTY_BYTES, _EMPTY_BYTES, _TIMES)
    layer = exchange_s(comm, rank, OUT_BYTES, BACK_BYTES, _TIMES)
    burst = exchange_s(comm, rank, _EMPTY_BYTES, _EMPTY_BYTES, _TIMES // _BURST, n_out=_BURST)
    large = exchange_s(comm, rank, _LARGE_BYTES, _EMPTY_BYTES, _LARGE_TIMES)
    round_trip_s = float(np.median(empty))
    return {
        "round_trip_s": round_trip_s,
        "round_trip_p90_s": float(np.quantile(empty, 0.9)),
        "layer_s": float(np.median(layer)),
        "layer_p90_s": float(np.quantile(layer, 0.9)),
        "message_s": min(float(np.median(burst)) / _BURST, round_trip_s / 2),
        "bytes_per_s": _LARGE_BYTES / float(np.median(large)),
    }


def link_document(found: Sequence[dict[str, Any]], title: str) -> dict[str, Any]:
    """The slowest of these as a file that plan's --link reads."""
    slowest = max(found, key=lambda each: each["layer_s"])
    source = f"measured by localrun doctor, {slowest['rank']}"
    numbers = {key: {"value": slowest[key], "source": source} for key in ("round_trip_s", "message_s", "bytes_per_s")}
    return {"title": title} | numbers
