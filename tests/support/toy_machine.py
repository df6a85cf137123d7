"""A machine of round numbers for the planner's tests."""

from __future__ import annotations

from typing import Any

from localrun.plan.machine import Machine, parse_machine

TYPES = ("F32", "F16", "Q8_0", "Q4_K", "Q5_0", "Q6_K")


def toy(read: float = 1e11, gemv: float = 1e15, **changes: Any) -> Machine:
    """A machine whose memory, and nothing else, takes time unless told otherwise."""
    kernels = [{"type": t, "n_cols": 1024, "gemv": gemv, "expand": 1e15, "gemm": 1e15} for t in TYPES]
    cpu = {
        "cores": 4,
        "memory": {"read_bytes_per_s": read},
        "kernels": kernels,
        "attention_decode_flops": 1e18,
        "attention_prefill_flops": 1e18,
        "activation_bytes_per_s": 1e18,
        "layer_s": 0,
        "chunk_layer_s": 0,
        "process_bytes": 0,
    }
    return parse_machine({"title": "toy", "ram_bytes": 1e12, "cpu": cpu | changes}, "toy", "toy")
