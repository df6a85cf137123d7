"""The routed experts of one layer for many tokens, through panels: experts.run's way from panel.tokens_from a head on.

Three jobs over tokens grouped by expert: write the inputs' panels; gate and up with SwiGLU, whose result becomes the
token panels of down; down with the weighted sums. A worker owns the output rows it sums into, so the order of
summation does not depend on the number of workers.
"""

import numpy as np

from quant.block_format import PanelFormat
from quant.gemm.pack_tokens import write_panels
from quant.gemm.packed import (
    KIND,
    MATRIX_BYTES,
    OFFSET,
    ROWS,
    SCRATCH_BYTES,
    STEP,
    TOKEN_BYTES,
    multiply_panels,
    panel_fields,
    token_block,
    tokens_bytes,
    write_group,
)
from quant.gemm.quantize_tokens import BLOCK_BYTES, GROUPS, WORK_BYTES, round_row, row_bytes
from quant.matrix import ADDRESS, GROUP_BYTES, ROW_BYTES, ExpertMatrices
from quant.simd.floats import fma, splat_f32x16, zero_f32x16
from quant.simd.memory import load_f32, load_f32x16, load_i64, store_f32x16
from quant.simd.vectors import silu
from quant.target.jit import inline, kernel
from quant.threads.atomics import atomic_add
from quant.threads.pool import Pool, worker_bytes

UP_ROWS = ROWS  # rows of gate and of up that a worker takes at a time: one step of down's token panels
DOWN_ROWS = 2 * ROWS

# Where the jobs find their arguments: three matrices, then the rest.
GATE, UP, DOWN = range(0, 3 * MATRIX_BYTES, MATRIX_BYTES)
(
    COUNTER, HIDDEN, INNER, N_TOKENS, N_ACTIVE, ACTIVE, START, TOKEN, WEIGHT, GATE_TOKENS, UP_TOKENS, DOWN_TOKENS, OUT,
    WORK, WORK_SIZE, SUMS, SUMS_BYTES, SCRATCH,
) = range(3 * MATRIX_BYTES, 3 * MATRIX_BYTES + 18 * 8, 8)  # fmt: skip


@inline
def _address(matrix, group, first):
    """Of a row."""
    return load_i64(matrix + ADDRESS) + load_i64(matrix + GROUP_BYTES) * group + load_i64(matrix + ROW_BYTES) * first


@inline
def _swiglu(a, begin, n_tokens, step, gated, upped, work):
    """silu(gate) * up of 32 rows, rounded, to one step of down's token panel. gated, upped: their sums, overwritten."""
    kind, offset, n_steps = load_i64(a + DOWN + KIND), load_i64(a + DOWN + OFFSET), load_i64(a + INNER) // STEP
    panel, rounded = load_i64(a + DOWN_TOKENS) + TOKEN_BYTES * n_steps * begin, work + WORK_BYTES
    for at in range(0, 4 * ROWS * n_tokens, 64):
        g, u = load_f32x16(gated + at), load_f32x16(upped + at)
        store_f32x16(gated + at, silu(g) * u)
    round_row(gated, STEP * n_tokens, rounded, work)
    first = 0
    while first < n_tokens:
        _, size = token_block(first, n_tokens)
        at = panel + TOKEN_BYTES * (n_steps * first + size * step)
        for i in range(first, first + size):
            write_group(kind, offset, rounded + BLOCK_BYTES * (i // GROUPS), i % GROUPS, at, size, i - first)
        first += size


@inline
def _up_unit(a, unit, upcoming, units, work, sums, scratch):
    """32 rows of gate and up of one active expert for all its tokens; those of the upcoming unit are prefetched."""
    hidden, active, start = load_i64(a + HIDDEN), load_i64(a + ACTIVE), load_i64(a + START)
    group, first = unit // units, unit % units * UP_ROWS
    expert = load_i64(active + 8 * group)
    begin = load_i64(start + 8 * group)
    n_tokens = load_i64(start + 8 * group + 8) - begin
    next_expert, next_first, n_ahead = expert, first, 0
    if upcoming < units * load_i64(a + N_ACTIVE):
        next_expert, next_first = load_i64(active + 8 * (upcoming // units)), upcoming % units * UP_ROWS
        n_ahead = UP_ROWS
    upped, skipped = sums + 4 * UP_ROWS * n_tokens, TOKEN_BYTES * (hidden // STEP) * begin
    for i in range(2):
        matrix, tokens, out = a + GATE, load_i64(a + GATE_TOKENS) + skipped, sums
        if i == 1:
            matrix, tokens, out = a + UP, load_i64(a + UP_TOKENS) + skipped, upped
        ahead, ahead_bytes = _address(matrix, next_expert, next_first), n_ahead * load_i64(matrix + ROW_BYTES)
        multiply_panels(matrix, expert, first, UP_ROWS, hidden, tokens, n_tokens, out, scratch, ahead, ahead_bytes)
    _swiglu(a, begin, n_tokens, first // STEP, sums, upped, work)


@kernel("void(int64, int64)")
def _run_up(arguments, worker):
    """The second job of run(). The next unit is taken before this one is done, so that it can be prefetched."""
    a = arguments
    work = load_i64(a + WORK) + load_i64(a + WORK_SIZE) * worker
    sums, scratch = (
        load_i64(a + SUMS) + load_i64(a + SUMS_BYTES) * worker,
        load_i64(a + SCRATCH) + SCRATCH_BYTES * worker,
    )
    units = load_i64(a + INNER) // UP_ROWS
    unit = atomic_add(load_i64(a + COUNTER), 1)
    while unit < units * load_i64(a + N_ACTIVE):
        upcoming = atomic_add(load_i64(a + COUNTER), 1)
        _up_unit(a, unit, upcoming, units, work, sums, scratch)
        unit = upcoming


@inline
def _add_weighted(a, begin, n_tokens, first, n_rows, sums):
    """out[token] += weight * sums, rows first.. of one expert's tokens."""
    hidden = load_i64(a + HIDDEN)
    for t in range(n_tokens):
        weight = splat_f32x16(load_f32(load_i64(a + WEIGHT) + 4 * (begin + t)))
        out = load_i64(a + OUT) + 4 * (hidden * load_i64(load_i64(a + TOKEN) + 8 * (begin + t)) + first)
        for r in range(0, n_rows, 16):
            row_sums = sums + 4 * (r // ROWS * ROWS * n_tokens + r % ROWS + ROWS * t)
            store_f32x16(out + 4 * r, fma(weight, load_f32x16(row_sums), load_f32x16(out + 4 * r)))


@inline
def _down_unit(a, first, upcoming, sums, scratch):
    """Output rows first.. of every token: the weighted sum of its experts' down rows."""
    hidden, inner, n_active = load_i64(a + HIDDEN), load_i64(a + INNER), load_i64(a + N_ACTIVE)
    n_rows = min(DOWN_ROWS, hidden - first)
    for t in range(load_i64(a + N_TOKENS)):
        for r in range(0, n_rows, 16):
            store_f32x16(load_i64(a + OUT) + 4 * (hidden * t + first + r), zero_f32x16())
    for group in range(n_active):
        begin, end = load_i64(load_i64(a + START) + 8 * group), load_i64(load_i64(a + START) + 8 * group + 8)
        tokens = load_i64(a + DOWN_TOKENS) + TOKEN_BYTES * (inner // STEP) * begin
        expert, next_first, following = load_i64(load_i64(a + ACTIVE) + 8 * group), first, group + 1
        if following == n_active:
            following, next_first = 0, upcoming
        next_expert = load_i64(load_i64(a + ACTIVE) + 8 * following)
        ahead = _address(a + DOWN, next_expert, next_first)
        ahead_bytes = load_i64(a + DOWN + ROW_BYTES) * min(DOWN_ROWS, max(0, hidden - next_first))
        multiply_panels(a + DOWN, expert, first, n_rows, inner, tokens, end - begin, sums, scratch, ahead, ahead_bytes)
        _add_weighted(a, begin, end - begin, first, n_rows, sums)


@kernel("void(int64, int64)")
def _run_down(arguments, worker):
    """The third job of run()."""
    a = arguments
    sums, scratch = (
        load_i64(a + SUMS) + load_i64(a + SUMS_BYTES) * worker,
        load_i64(a + SCRATCH) + SCRATCH_BYTES * worker,
    )
    first = atomic_add(load_i64(a + COUNTER), DOWN_ROWS)
    while first < load_i64(a + HIDDEN):
        upcoming = atomic_add(load_i64(a + COUNTER), DOWN_ROWS)
        _down_unit(a, first, upcoming, sums, scratch)
        first = upcoming


def run(
    pool: Pool,
    experts: ExpertMatrices,
    formats: list[PanelFormat],
    x: int,
    ids: np.ndarray,
    weights: np.ndarray,
    out: int,
) -> None:
    """out[t] = sum over k of weights[t, k] * expert ids[t, k] of x[t]; arguments as experts.run's.

    formats: of gate, up and down.
    """
    gate, up, down = experts.gate, experts.up, experts.down
    n_tokens, per_token = ids.shape
    order = np.argsort(ids, axis=None, kind="stable")
    active, counts = np.unique(ids, return_counts=True)
    start = np.concatenate([[0], np.cumsum(counts)])
    token, sorted_weights = order // per_token, weights.ravel()[order].astype(np.float32)
    skipped = int(active[0] < 0)  # groups in front whose panels are written, not multiplied
    computed, computed_start = active[skipped:], start[skipped:]
    hidden, inner, most = gate.n_cols, gate.n_rows, int(counts[skipped:].max())
    inputs = {}  # by what distinguishes token panels
    for i, format_ in enumerate(formats[:2]):
        key = format_.kind, format_.offset
        if key not in inputs:
            inputs[key] = pool.buffer(f"panels {i}", tokens_bytes(hidden, order.size))
            write_panels(pool, format_, x, n_tokens, hidden, token, start, inputs[key])
    gate_tokens, up_tokens = (inputs[format_.kind, format_.offset] for format_ in formats[:2])
    counters = np.zeros(16, np.int64)  # on two cache lines
    sums_bytes = worker_bytes(4 * max(2 * UP_ROWS, DOWN_ROWS) * most)
    work_size = worker_bytes(WORK_BYTES + row_bytes(UP_ROWS * most))
    arguments = np.array(
        (
            *gate.fields, *panel_fields(formats[0]), *up.fields, *panel_fields(formats[1]),
            *down.fields, *panel_fields(formats[2]),
            counters.ctypes.data, hidden, inner, n_tokens,
            len(computed), computed.ctypes.data, computed_start.ctypes.data,
            token.ctypes.data, sorted_weights.ctypes.data, gate_tokens, up_tokens,
            pool.buffer("inner panels", tokens_bytes(inner, order.size)), out,
            pool.buffer("work", work_size * pool.n_workers), work_size,
            pool.buffer("sums", sums_bytes * pool.n_workers), sums_bytes,
            pool.buffer("scratch", SCRATCH_BYTES * pool.n_workers),
        ),
        np.int64,
    )  # fmt: skip
    pool.run(_run_up.address, arguments)
    arguments[COUNTER // 8] += 64
    pool.run(_run_down.address, arguments)
