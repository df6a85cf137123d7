"""The routed experts of one layer: down(silu(gate x) * up x) for the chosen ones, weighted and summed.

Two jobs for any number of tokens, which are grouped by expert: the rows of all active experts form one pool of units,
first gate and up (with SwiGLU and the rounding of its result), then down. A worker owns the output
rows it sums into, so the order of summation does not depend on the number of workers.
"""

import numpy as np

from quant.gemm import experts as packed_experts
from quant.gemm import packed
from quant.gemv.activations import q8_bytes, write_q8
from quant.matrix import MATRIX_BYTES, ExpertMatrices, QuantMatrix
from quant.ops.multiply import multiply_rows, scratch_bytes, write_q8_rows
from quant.simd.memory import load_f32, load_i64, store_f32, store_i64
from quant.simd.vectors import scale_add, swiglu
from quant.target.jit import inline, kernel
from quant.threads.atomics import atomic_add
from quant.threads.pool import Pool, worker_bytes

# What a worker takes at a time: its start is read without prefetching, so few starts, but workers should end together.
_UNIT_BYTES = 1 << 19
_UNITS_PER_WORKER = 8


# Where the job finds its arguments, int64 each: three matrices, then the rest.
GATE, UP, DOWN = range(0, 3 * MATRIX_BYTES, MATRIX_BYTES)
(
    TOKEN_COUNTER, UP_COUNTER, DOWN_COUNTER, IN_INTEGER, DOWN_INTEGER, HIDDEN, INNER, N_TOKENS, N_ACTIVE, ACTIVE, START,
    TOKEN, WEIGHT, X, X_RECORD_BYTES, X_RECORDS, X_TABLE, H_RECORD_BYTES, H_RECORDS, H_TABLE, GATED, GATED_TABLE,
    UPPED, UPPED_TABLE, OUT, UP_ROWS, DOWN_ROWS, SCRATCH, SCRATCH_BYTES, SUMS, SUMS_BYTES, SUMS_TABLE,
) = range(3 * MATRIX_BYTES, 3 * MATRIX_BYTES + 32 * 8, 8)  # fmt: skip


@inline
def _gate_and_up(a, group, first, n_rows, scratch):
    """Rows of gate and up of one active expert for its tokens, SwiGLU, and the result's activation records."""
    inner, hidden = load_i64(a + INNER), load_i64(a + HIDDEN)
    expert = load_i64(load_i64(a + ACTIVE) + 8 * group)
    begin, end = load_i64(load_i64(a + START) + 8 * group), load_i64(load_i64(a + START) + 8 * group + 8)
    x, n_tokens = load_i64(a + X_TABLE) + 8 * begin, end - begin
    gated_table, upped_table = load_i64(a + GATED_TABLE) + 8 * begin, load_i64(a + UPPED_TABLE) + 8 * begin
    multiply_rows(a + GATE, expert, first, n_rows, hidden, n_tokens, x, gated_table, 4 * first, scratch)
    multiply_rows(a + UP, expert, first, n_rows, hidden, n_tokens, x, upped_table, 4 * first, scratch)
    for pair in range(begin, end):
        gated, upped = load_i64(a + GATED) + 4 * inner * pair, load_i64(a + UPPED) + 4 * inner * pair
        swiglu(gated + 4 * first, upped + 4 * first, n_rows, gated + 4 * first)
        record = load_i64(a + H_RECORDS) + load_i64(a + H_RECORD_BYTES) * pair
        write_q8(gated, first, first + n_rows, inner, load_i64(a + DOWN_INTEGER) != 0, record)


@inline
def _sum_down(a, first, n_rows, scratch, sums, sums_table):
    """Output rows first..first+n_rows of every token: the weighted sum of its experts' down rows."""
    inner, hidden, token_of = load_i64(a + INNER), load_i64(a + HIDDEN), load_i64(a + TOKEN)
    for t in range(load_i64(a + N_TOKENS)):
        for i in range(first, first + n_rows):
            store_f32(load_i64(a + OUT) + 4 * (hidden * t + i), np.float32(0.0))
    for group in range(load_i64(a + N_ACTIVE)):
        expert = load_i64(load_i64(a + ACTIVE) + 8 * group)
        begin, end = load_i64(load_i64(a + START) + 8 * group), load_i64(load_i64(a + START) + 8 * group + 8)
        h = load_i64(a + H_TABLE) + 8 * begin
        multiply_rows(a + DOWN, expert, first, n_rows, inner, end - begin, h, sums_table, 0, scratch)
        for pair in range(begin, end):
            weight = load_f32(load_i64(a + WEIGHT) + 4 * pair)
            out = load_i64(a + OUT) + 4 * (hidden * load_i64(token_of + 8 * pair) + first)
            row_sums = sums + 4 * load_i64(a + DOWN_ROWS) * (pair - begin)
            scale_add(weight, row_sums, n_rows, out)


@kernel("void(int64, int64)")
def _write_records(arguments, worker):
    """The job before the others: the tokens' activation records."""
    a = arguments
    hidden, integer, per_record = load_i64(a + HIDDEN), load_i64(a + IN_INTEGER) != 0, load_i64(a + X_RECORD_BYTES)
    while True:
        t = atomic_add(load_i64(a + TOKEN_COUNTER), 1)
        if t >= load_i64(a + N_TOKENS):
            break
        write_q8_rows(
            load_i64(a + X) + 4 * hidden * t, 1, hidden, integer, per_record, load_i64(a + X_RECORDS) + per_record * t
        )


@kernel("void(int64, int64)")
def _run_up(arguments, worker):
    """The first job of run(): gate and up of all active experts."""
    a = arguments
    scratch = load_i64(a + SCRATCH) + load_i64(a + SCRATCH_BYTES) * worker
    rows = load_i64(a + UP_ROWS)
    units = (load_i64(a + INNER) + rows - 1) // rows
    while True:
        unit = atomic_add(load_i64(a + UP_COUNTER), 1)
        if unit >= units * load_i64(a + N_ACTIVE):
            break
        first = unit % units * rows
        _gate_and_up(a, unit // units, first, min(rows, load_i64(a + INNER) - first), scratch)


@kernel("void(int64, int64)")
def _run_down(arguments, worker):
    """The second job of run(): down, and the weighted sums."""
    a = arguments
    scratch = load_i64(a + SCRATCH) + load_i64(a + SCRATCH_BYTES) * worker
    rows = load_i64(a + DOWN_ROWS)
    sums = load_i64(a + SUMS) + load_i64(a + SUMS_BYTES) * worker
    most = load_i64(a + SUMS_BYTES) // (4 * rows)
    sums_table = load_i64(a + SUMS_TABLE) + 8 * most * worker
    for i in range(most):
        store_i64(sums_table + 8 * i, sums + 4 * rows * i)
    while True:
        first = atomic_add(load_i64(a + DOWN_COUNTER), rows)
        if first >= load_i64(a + HIDDEN):
            break
        _sum_down(a, first, min(rows, load_i64(a + HIDDEN) - first), scratch, sums, sums_table)


def _unit_rows(matrix: QuantMatrix, n_rows: int, n_workers: int) -> int:
    """Rows that a worker takes at a time of n_rows, a multiple of 32 so that activation groups stay whole."""
    rows = min(_UNIT_BYTES // matrix.row_bytes, n_rows // (_UNITS_PER_WORKER * n_workers))
    return max(32, rows // 32 * 32)


def run(pool: Pool, experts: ExpertMatrices, x: int, ids: np.ndarray, weights: np.ndarray, out: int) -> None:
    """out[t] = sum over k of weights[t, k] * expert ids[t, k] of x[t].

    Args:
        x: address of float32 (T, D).
        ids: int64 (T, K), each below the number of experts; pairs with -1 are left out.
        weights: float32 (T, K).
        out: address of float32 (T, D).
    """
    gate, up, down = experts.gate, experts.up, experts.down
    n_tokens, per_token = ids.shape
    formats = [matrix.format for matrix in (gate, up, down)]
    panel_formats = [packed.find(format_) for format_ in formats]
    order = ids.ravel().argsort(kind="stable")
    sorted_ids = ids.ravel()[order]
    start = np.flatnonzero(np.concatenate([[True], sorted_ids[1:] != sorted_ids[:-1], [True]]))
    active = sorted_ids[start[:-1]]
    if active[0] < 0:  # a group like any other, but for being computed
        active, start = active[1:], start[1:]
    if all(panel_formats) and active.size and order.size - start[0] >= packed.tokens_from(*formats) * active.size:
        packed_experts.run(pool, experts, panel_formats, x, ids, weights, out)
        return
    most = int(np.diff(start).max(initial=1))
    token = order // per_token
    sorted_weights = weights.ravel()[order].astype(np.float32)
    pairs = np.arange(order.size, dtype=np.int64)
    hidden, inner = gate.n_cols, gate.n_rows
    x_bytes, h_bytes = q8_bytes(hidden), q8_bytes(inner)
    x_records = pool.buffer("records", x_bytes * n_tokens)
    h_records = pool.buffer("inner records", h_bytes * order.size)
    gated, upped = (pool.buffer(name, 4 * inner * order.size) for name in ("gated", "upped"))
    per_worker = max(scratch_bytes(hidden), scratch_bytes(inner))
    up_rows = _unit_rows(gate, inner * active.size, pool.n_workers)
    down_rows = _unit_rows(down, hidden, pool.n_workers)
    sums_bytes = worker_bytes(4 * down_rows * most)
    sums_rows = sums_bytes // (4 * down_rows)
    counters = np.zeros(24, np.int64)  # on three cache lines
    tables = np.stack(
        [x_records + x_bytes * token, h_records + h_bytes * pairs, gated + 4 * inner * pairs, upped + 4 * inner * pairs]
    )
    values = {
        TOKEN_COUNTER: counters.ctypes.data,
        UP_COUNTER: counters.ctypes.data + 64, DOWN_COUNTER: counters.ctypes.data + 128,
        IN_INTEGER: int(gate.format.integer or up.format.integer), DOWN_INTEGER: int(down.format.integer),
        HIDDEN: hidden, INNER: inner, N_TOKENS: n_tokens, N_ACTIVE: len(active),
        ACTIVE: active.ctypes.data, START: start.ctypes.data,
        TOKEN: token.ctypes.data, WEIGHT: sorted_weights.ctypes.data,
        X: x, X_RECORD_BYTES: x_bytes, X_RECORDS: x_records, X_TABLE: tables[0].ctypes.data,
        H_RECORD_BYTES: h_bytes, H_RECORDS: h_records, H_TABLE: tables[1].ctypes.data,
        GATED: gated, GATED_TABLE: tables[2].ctypes.data,
        UPPED: upped, UPPED_TABLE: tables[3].ctypes.data,
        OUT: out, UP_ROWS: up_rows, DOWN_ROWS: down_rows,
        SCRATCH: pool.buffer("scratch", per_worker * pool.n_workers), SCRATCH_BYTES: per_worker,
        SUMS: pool.buffer("sums", sums_bytes * pool.n_workers), SUMS_BYTES: sums_bytes,
        SUMS_TABLE: pool.buffer("sums table", 8 * sums_rows * pool.n_workers),
    }  # fmt: skip
    arguments = np.empty(3 * MATRIX_BYTES // 8 + len(values), np.int64)
    arguments[: 3 * MATRIX_BYTES // 8] = [*gate.fields, *up.fields, *down.fields]
    for offset, value in values.items():
        arguments[offset // 8] = value
    if n_tokens == 1:
        _write_records.ctypes(arguments.ctypes.data, 0)
    else:
        pool.run(_write_records.address, arguments)
    pool.run(_run_up.address, arguments)
    pool.run(_run_down.address, arguments)
