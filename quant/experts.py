"""The routed experts of one layer: down(silu(gate x) * up x) for the chosen ones, weighted and summed.

One job for any number of tokens. Tokens are grouped by expert; the rows of all active experts form one pool of units,
first gate and up (with SwiGLU and the rounding of its result), then, behind a barrier, down. A worker owns the output
rows it sums into, so the order of summation does not depend on the number of workers.
"""

import math
from dataclasses import dataclass

import numpy as np

from quant.activations import record_bytes, write_record
from quant.atomics import atomic_add
from quant.errors import QuantError
from quant.jit import inline, kernel
from quant.linear import Weight, pack_arguments
from quant.pool import Pool, barrier
from quant.rows import GEMM_TOKENS, multiply_rows, scratch_bytes, scratch_rows, write_records
from quant.simd import load_f32, load_i64, store_f32, store_i64

_UNIT_BYTES = 1 << 17  # weights that a worker takes at a time


@dataclass(frozen=True)
class Experts:
    """The three stacked matrices: gate and up (E, I, D), down (E, D, I), in any formats."""

    gate: Weight
    up: Weight
    down: Weight

    def __post_init__(self):
        """Raises QuantError on shapes that don't belong together."""
        gate, up, down = self.gate, self.up, self.down
        shape = (gate.n_groups, gate.n_rows, gate.n_cols)
        if shape != (up.n_groups, up.n_rows, up.n_cols) or shape != (down.n_groups, down.n_cols, down.n_rows):
            raise QuantError("gate, up and down experts have shapes that do not belong together")


_FIELDS = (
    "control n_workers up_counter down_counter gate_gemv gate_expand gate_block up_gemv up_expand up_block "
    "down_gemv down_expand down_block in_integer down_integer gate up down gate_stride up_stride down_stride "
    "gate_row_bytes up_row_bytes down_row_bytes hidden inner n_tokens n_active active start token weight "
    "x x_record_bytes x_records x_table h_record_bytes h_records h_table gated gated_table upped upped_table "
    "out up_rows down_rows scratch scratch_bytes sums sums_bytes sums_table"
).split()
_AT = {name: 8 * i for i, name in enumerate(_FIELDS)}


def _field(name: str):
    """A kernel helper that reads one argument by name."""
    offset = _AT[name]

    @inline
    def read(arguments):
        return load_i64(arguments + offset)

    return read


(
    _control, _n_workers, _up_counter, _down_counter, _gate_gemv, _gate_expand, _gate_block, _up_gemv, _up_expand,
    _up_block, _down_gemv, _down_expand, _down_block, _in_integer, _down_integer, _gate, _up, _down, _gate_stride,
    _up_stride, _down_stride, _gate_row_bytes, _up_row_bytes, _down_row_bytes, _hidden, _inner, _n_tokens, _n_active,
    _active, _start, _token, _weight, _x, _x_record_bytes, _x_records, _x_table, _h_record_bytes, _h_records, _h_table,
    _gated, _gated_table, _upped, _upped_table, _out, _up_rows, _down_rows, _scratch, _scratch_bytes, _sums,
    _sums_bytes, _sums_table,
) = (_field(name) for name in _FIELDS)  # fmt: skip


@inline
def _gate_and_up(a, group, first, n_rows, scratch):
    """Rows of gate and up of one active expert for its tokens, SwiGLU, and the result's activation records."""
    inner, hidden = _inner(a), _hidden(a)
    expert = load_i64(_active(a) + 8 * group)
    begin, end = load_i64(_start(a) + 8 * group), load_i64(_start(a) + 8 * group + 8)
    gate = _gate(a) + _gate_stride(a) * expert + _gate_row_bytes(a) * first
    up = _up(a) + _up_stride(a) * expert + _up_row_bytes(a) * first
    x = _x_table(a) + 8 * begin
    multiply_rows(
        _gate_gemv(a), _gate_expand(a), _gate_block(a), gate, _gate_row_bytes(a),
        n_rows, hidden, end - begin, x, _gated_table(a) + 8 * begin, 4 * first, scratch,
    )  # fmt: skip
    multiply_rows(
        _up_gemv(a), _up_expand(a), _up_block(a), up, _up_row_bytes(a),
        n_rows, hidden, end - begin, x, _upped_table(a) + 8 * begin, 4 * first, scratch,
    )  # fmt: skip
    for pair in range(begin, end):
        gated, upped = _gated(a) + 4 * inner * pair, _upped(a) + 4 * inner * pair
        for i in range(first, first + n_rows):
            g = load_f32(gated + 4 * i)
            store_f32(gated + 4 * i, g / (np.float32(1.0) + math.exp(-g)) * load_f32(upped + 4 * i))
        record = _h_records(a) + _h_record_bytes(a) * pair
        write_record(gated, first, first + n_rows, inner, _down_integer(a) != 0, record)


@inline
def _sum_down(a, first, n_rows, scratch, sums, sums_table):
    """Output rows first..first+n_rows of every token: the weighted sum of its experts' down rows."""
    inner, hidden, token_of = _inner(a), _hidden(a), _token(a)
    for t in range(_n_tokens(a)):
        for i in range(first, first + n_rows):
            store_f32(_out(a) + 4 * (hidden * t + i), np.float32(0.0))
    for group in range(_n_active(a)):
        expert = load_i64(_active(a) + 8 * group)
        begin, end = load_i64(_start(a) + 8 * group), load_i64(_start(a) + 8 * group + 8)
        down = _down(a) + _down_stride(a) * expert + _down_row_bytes(a) * first
        multiply_rows(
            _down_gemv(a), _down_expand(a), _down_block(a), down, _down_row_bytes(a),
            n_rows, inner, end - begin, _h_table(a) + 8 * begin, sums_table, 0, scratch,
        )  # fmt: skip
        for pair in range(begin, end):
            weight = load_f32(_weight(a) + 4 * pair)
            out = _out(a) + 4 * (hidden * load_i64(token_of + 8 * pair) + first)
            row_sums = sums + 4 * _down_rows(a) * (pair - begin)
            for i in range(n_rows):
                store_f32(out + 4 * i, load_f32(out + 4 * i) + weight * load_f32(row_sums + 4 * i))


@kernel("void(int64, int64)")
def _run(arguments, worker):
    """The job of run(); arguments: _FIELDS."""
    a = arguments
    scratch = _scratch(a) + _scratch_bytes(a) * worker
    sums = _sums(a) + _sums_bytes(a) * worker
    most = _sums_bytes(a) // (4 * _down_rows(a))
    sums_table = _sums_table(a) + 8 * most * worker
    for i in range(most):
        store_i64(sums_table + 8 * i, sums + 4 * _down_rows(a) * i)
    write_records(
        _x(a), _n_tokens(a), _hidden(a), _in_integer(a) != 0, _x_record_bytes(a), _x_records(a), worker, _n_workers(a)
    )
    barrier(_control(a), _n_workers(a))
    rows = _up_rows(a)
    units = (_inner(a) + rows - 1) // rows
    while True:
        unit = atomic_add(_up_counter(a), 1)
        if unit >= units * _n_active(a):
            break
        first = unit % units * rows
        _gate_and_up(a, unit // units, first, min(rows, _inner(a) - first), scratch)
    barrier(_control(a), _n_workers(a))
    rows = _down_rows(a)
    while True:
        first = atomic_add(_down_counter(a), rows)
        if first >= _hidden(a):
            break
        _sum_down(a, first, min(rows, _hidden(a) - first), scratch, sums, sums_table)


def _unit_rows(matrix: Weight, n_units_wanted: int, most_tokens: int) -> int:
    """Rows that a worker takes at a time, a multiple of 32 so that activation groups stay whole."""
    if most_tokens >= GEMM_TOKENS:
        rows = scratch_rows(matrix.n_cols)
    else:
        rows = min(_UNIT_BYTES // matrix.row_bytes, matrix.n_rows // n_units_wanted)
    return max(32, rows // 32 * 32)


def run(pool: Pool, experts: Experts, x: int, ids: np.ndarray, weights: np.ndarray, out: int) -> None:
    """out[t] = sum over k of weights[t, k] * expert ids[t, k] of x[t].

    Args:
        x: address of float32 (T, D).
        ids: int64 (T, K), each below the number of experts.
        weights: float32 (T, K).
        out: address of float32 (T, D).
    """
    gate, up, down = experts.gate, experts.up, experts.down
    n_tokens, per_token = ids.shape
    order = np.argsort(ids, axis=None, kind="stable")
    active, start = np.unique(ids.ravel()[order], return_index=True)
    start = np.append(start, order.size).astype(np.int64)
    most = int(np.diff(start).max(initial=1))
    token = (order // per_token).astype(np.int64)
    sorted_weights = weights.ravel()[order].astype(np.float32)
    pairs = np.arange(order.size, dtype=np.int64)
    hidden, inner = gate.n_cols, gate.n_rows
    x_bytes, h_bytes = record_bytes(hidden), record_bytes(inner)
    x_records = pool.buffer("records", x_bytes * n_tokens)
    h_records = pool.buffer("inner records", h_bytes * order.size)
    gated, upped = (pool.buffer(name, 4 * inner * order.size) for name in ("gated", "upped"))
    per_worker = max(scratch_bytes(hidden), scratch_bytes(inner))
    down_rows = _unit_rows(down, 4 * pool.n_workers, most)
    sums_bytes = (4 * down_rows * most + 63) // 64 * 64
    sums_rows = sums_bytes // (4 * down_rows)
    counters = np.zeros(16, np.int64)  # on two cache lines
    tables = np.stack(
        [x_records + x_bytes * token, h_records + h_bytes * pairs, gated + 4 * inner * pairs, upped + 4 * inner * pairs]
    )
    values = {
        "control": pool.control, "n_workers": pool.n_workers,
        "up_counter": counters.ctypes.data, "down_counter": counters.ctypes.data + 64,
        "gate_gemv": gate.format.gemv, "gate_expand": gate.format.expand, "gate_block": gate.format.block,
        "up_gemv": up.format.gemv, "up_expand": up.format.expand, "up_block": up.format.block,
        "down_gemv": down.format.gemv, "down_expand": down.format.expand, "down_block": down.format.block,
        "in_integer": int(gate.format.integer or up.format.integer), "down_integer": int(down.format.integer),
        "gate": gate.address, "up": up.address, "down": down.address,
        "gate_stride": gate.group_bytes, "up_stride": up.group_bytes, "down_stride": down.group_bytes,
        "gate_row_bytes": gate.row_bytes, "up_row_bytes": up.row_bytes, "down_row_bytes": down.row_bytes,
        "hidden": hidden, "inner": inner, "n_tokens": n_tokens, "n_active": len(active),
        "active": active.ctypes.data, "start": start.ctypes.data,
        "token": token.ctypes.data, "weight": sorted_weights.ctypes.data,
        "x": x, "x_record_bytes": x_bytes, "x_records": x_records, "x_table": tables[0].ctypes.data,
        "h_record_bytes": h_bytes, "h_records": h_records, "h_table": tables[1].ctypes.data,
        "gated": gated, "gated_table": tables[2].ctypes.data,
        "upped": upped, "upped_table": tables[3].ctypes.data,
        "out": out, "up_rows": _unit_rows(gate, 2, most), "down_rows": down_rows,
        "scratch": pool.buffer("scratch", per_worker * pool.n_workers), "scratch_bytes": per_worker,
        "sums": pool.buffer("sums", sums_bytes * pool.n_workers), "sums_bytes": sums_bytes,
        "sums_table": pool.buffer("sums table", 8 * sums_rows * pool.n_workers),
    }  # fmt: skip
    pool.run(_run.address, pack_arguments(_FIELDS, values))
