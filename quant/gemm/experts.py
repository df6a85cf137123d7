"""The routed experts of one layer for many tokens, through packed panels.

Three jobs over tokens grouped by expert: write the inputs' panels; gate and up with SwiGLU, whose result becomes the
token panels of down; down with the weighted sums. A worker owns the output rows it sums into, so the order of
summation does not depend on the number of workers.
"""

from dataclasses import dataclass

import numpy as np

from quant.block_format import PanelFormat
from quant.gemm.pack_tokens import write_panels
from quant.gemm.packed import (
    K_BLOCK,
    PACKED_MATRIX,
    ROWS,
    SCRATCH_BYTES,
    TOKEN_BYTES,
    multiply_panels,
    packed_matrix,
    token_block,
    tokens_bytes,
    write_group,
)
from quant.gemm.quantize_tokens import BLOCK_BYTES, BLOCKS_TOGETHER, WORK_BYTES, round_row, row_bytes
from quant.matrix import ExpertMatrices, row_address
from quant.simd.floats import fma, splat_f32x16, zero_f32x16
from quant.simd.gated import ACTIVATION, gated
from quant.simd.memory import load_f32x16, store_f32x16
from quant.simd.struct import address, f32, i64, pointer, struct
from quant.simd.vectors import scale_add
from quant.target.jit import inline, kernel
from quant.threads.numa import ITEMS, Items, take
from quant.threads.pool import Pool, worker_bytes

UP_ROWS = ROWS  # rows of gate and of up in a work item: one k-block of down's token panels
DOWN_ROWS = 2 * ROWS

EXPERTS = struct(
    "PackedExperts",
    gate=PACKED_MATRIX,
    up=PACKED_MATRIX,
    down=PACKED_MATRIX,
    up_items=ITEMS,
    down_items=ITEMS,
    hidden=i64,
    inner=i64,
    n_tokens=i64,
    n_active=i64,
    active=pointer(i64),  # the fields of Pairs
    start=pointer(i64),
    token=pointer(i64),
    weight=pointer(f32),
    gate_bias=address,  # float32 (experts, inner), or 0
    up_bias=address,
    down_bias=address,  # float32 (experts, hidden), or 0
    activation=ACTIVATION,
    gate_tokens=address,  # token panels, by expert
    up_tokens=address,
    down_tokens=address,
    out=address,
    work=address,  # a worker's, to round in
    work_bytes=i64,
    sums=address,  # a worker's
    sums_bytes=i64,
    scratch=address,  # a worker's SCRATCH_BYTES
)


@dataclass(frozen=True)
class Pairs:
    """Pairs of a token and an expert that it chose, in the order of experts, then of tokens.

    Attributes:
        experts: int64 (n_active,), those that were chosen.
        start: int64 (n_active + 1,): the first pair of each; one more.
        token: int64 (n,), by pair.
        weight: float32 (n,), by pair.
    """

    experts: np.ndarray
    start: np.ndarray
    token: np.ndarray
    weight: np.ndarray

    @property
    def most(self) -> int:
        """Pairs of one expert, at most; at least 1."""
        return int(np.diff(self.start).max(initial=1))


def pairs_by_expert(ids: np.ndarray, weights: np.ndarray) -> Pairs:
    """The pairs of ids int64 and weights float32, both (T, K), but for those with -1."""
    order = ids.ravel().argsort(kind="stable")
    sorted_ids = ids.ravel()[order]
    first = np.searchsorted(sorted_ids, 0)
    order, sorted_ids = order[first:], sorted_ids[first:]
    start = np.flatnonzero(np.concatenate([[True], sorted_ids[1:] != sorted_ids[:-1], [True]])[: order.size + 1])
    weight = weights.ravel()[order].astype(np.float32)
    return Pairs(sorted_ids[start[:-1]], start, order // ids.shape[1], weight)


@inline
def _add_bias(bias, n_tokens, sums):
    """32 rows' biases, to the sums of each token."""
    for t in range(n_tokens):
        scale_add(1.0, bias, ROWS, sums + 4 * ROWS * t)


@inline
def _gated(a, expert, begin, n_tokens, k_block, gate_out, up_out, work):
    """silu(gate) * up of 32 rows, rounded, to a k-block of down's token panel. gate_out, up_out: sums, overwritten."""
    kind, offset, n_k_blocks = a.down.kind, a.down.offset, a.inner // K_BLOCK
    panel, rounded = a.down_tokens + TOKEN_BYTES * n_k_blocks * begin, work + WORK_BYTES
    if a.gate_bias != 0:
        first = 4 * (a.inner * expert + K_BLOCK * k_block)
        _add_bias(a.gate_bias + first, n_tokens, gate_out)
        _add_bias(a.up_bias + first, n_tokens, up_out)
    gated(a.activation, gate_out, up_out, ROWS * n_tokens, gate_out)
    round_row(gate_out, K_BLOCK * n_tokens, rounded, work)
    first = 0
    while first < n_tokens:
        _, size = token_block(first, n_tokens)
        at = panel + TOKEN_BYTES * (n_k_blocks * first + size * k_block)
        for i in range(first, first + size):
            write_group(
                kind, offset, rounded + BLOCK_BYTES * (i // BLOCKS_TOGETHER), i % BLOCKS_TOGETHER, at, size, i - first
            )
        first += size


@inline
def _run_up_item(a, item, upcoming, items, work, sums, scratch):
    """32 rows of gate and up of one active expert for all its tokens; those of the upcoming item are prefetched."""
    hidden, group, first = a.hidden, item // items, item % items * UP_ROWS
    expert, begin = a.active[group], a.start[group]
    n_tokens = a.start[group + 1] - begin
    next_expert, next_first, n_ahead = expert, first, 0
    if upcoming >= 0:
        next_expert, next_first, n_ahead = a.active[upcoming // items], upcoming % items * UP_ROWS, UP_ROWS
    up_out, skipped = sums + 4 * UP_ROWS * n_tokens, TOKEN_BYTES * (hidden // K_BLOCK) * begin
    for i in range(2):
        weights, tokens, out = a.gate, a.gate_tokens + skipped, sums
        if i == 1:
            weights, tokens, out = a.up, a.up_tokens + skipped, up_out
        ahead, ahead_bytes = row_address(weights.matrix, next_expert, next_first), n_ahead * weights.matrix.row_bytes
        multiply_panels(weights, expert, first, UP_ROWS, hidden, tokens, n_tokens, out, scratch, ahead, ahead_bytes)
    _gated(a, expert, begin, n_tokens, first // K_BLOCK, sums, up_out, work)


@kernel("void(int64, int64)")
def _run_up(arguments, worker):
    """The second job of run(). The next item is taken before this one is done, so that it can be prefetched."""
    a = EXPERTS(arguments)
    work, sums = a.work + a.work_bytes * worker, a.sums + a.sums_bytes * worker
    scratch, items = a.scratch + SCRATCH_BYTES * worker, a.inner // UP_ROWS
    item = take(a.up_items, worker)
    while item >= 0:
        upcoming = take(a.up_items, worker)
        _run_up_item(a, item, upcoming, items, work, sums, scratch)
        item = upcoming


@inline
def _add_weighted(a, expert, begin, n_tokens, first, n_rows, sums):
    """out[token] += weight * (sums + bias), rows first.. of one expert's tokens."""
    for t in range(n_tokens):
        weight = splat_f32x16(a.weight[begin + t])
        out = a.out + 4 * (a.hidden * a.token[begin + t] + first)
        for r in range(0, n_rows, 16):
            row_sums = sums + 4 * (r // ROWS * ROWS * n_tokens + r % ROWS + ROWS * t)
            store_f32x16(out + 4 * r, fma(weight, load_f32x16(row_sums), load_f32x16(out + 4 * r)))
        if a.down_bias != 0:
            scale_add(a.weight[begin + t], a.down_bias + 4 * (a.hidden * expert + first), n_rows, out)


@inline
def _run_down_item(a, item, upcoming, sums, scratch):
    """Output rows of every token: the weighted sum of its experts' down rows."""
    hidden, inner, n_active, first = a.hidden, a.inner, a.n_active, DOWN_ROWS * item
    n_rows = min(DOWN_ROWS, hidden - first)
    for t in range(a.n_tokens):
        for r in range(0, n_rows, 16):
            store_f32x16(a.out + 4 * (hidden * t + first + r), zero_f32x16())
    for group in range(n_active):
        begin, end, expert = a.start[group], a.start[group + 1], a.active[group]
        tokens = a.down_tokens + TOKEN_BYTES * (inner // K_BLOCK) * begin
        next_first, following = first, group + 1
        if following == n_active:
            following, next_first = 0, DOWN_ROWS * upcoming if upcoming >= 0 else hidden
        ahead = row_address(a.down.matrix, a.active[following], next_first)
        ahead_bytes = a.down.matrix.row_bytes * min(DOWN_ROWS, max(0, hidden - next_first))
        multiply_panels(a.down, expert, first, n_rows, inner, tokens, end - begin, sums, scratch, ahead, ahead_bytes)
        _add_weighted(a, expert, begin, end - begin, first, n_rows, sums)


@kernel("void(int64, int64)")
def _run_down(arguments, worker):
    """The third job of run()."""
    a = EXPERTS(arguments)
    sums, scratch = a.sums + a.sums_bytes * worker, a.scratch + SCRATCH_BYTES * worker
    item = take(a.down_items, worker)
    while item >= 0:
        upcoming = take(a.down_items, worker)
        _run_down_item(a, item, upcoming, sums, scratch)
        item = upcoming


def run(
    pool: Pool, experts: ExpertMatrices, formats: list[PanelFormat], x: int, n_tokens: int, pairs: Pairs, out: int
) -> None:
    """out[t] = sum over its pairs of weight * expert of x[t].

    Args:
        formats: of gate, up and down.
        x, out: addresses of float32 (T, D).
        pairs: one at least.
    """
    hidden, inner, n_pairs = experts.gate.n_cols, experts.gate.n_rows, pairs.token.size
    inputs = {}  # by what distinguishes token panels
    for i, format_ in enumerate(formats[:2]):
        key = format_.kind, format_.offset
        if key not in inputs:
            inputs[key] = pool.buffer(f"panels {i}", tokens_bytes(hidden, n_pairs))
            write_panels(pool, format_, x, n_tokens, hidden, pairs.token, pairs.start, inputs[key])
    gate_tokens, up_tokens = (inputs[format_.kind, format_.offset] for format_ in formats[:2])
    gate, up, down = map(packed_matrix, (experts.gate, experts.up, experts.down), formats)
    per_expert, n_down = inner // UP_ROWS, -(-hidden // DOWN_ROWS)
    up_items = Items(pool.spread, per_expert * pairs.experts.size, per_expert)
    down_items = Items(pool.spread, n_down, n_down)
    sums_bytes = worker_bytes(4 * max(2 * UP_ROWS, DOWN_ROWS) * pairs.most)
    work_bytes = worker_bytes(WORK_BYTES + row_bytes(UP_ROWS * pairs.most))
    arguments = EXPERTS.pack(
        gate=gate, up=up, down=down, up_items=up_items.struct, down_items=down_items.struct,
        hidden=hidden, inner=inner, n_tokens=n_tokens, n_active=pairs.experts.size,
        active=pairs.experts.ctypes.data, start=pairs.start.ctypes.data,
        token=pairs.token.ctypes.data, weight=pairs.weight.ctypes.data,
        **experts.bias_addresses, activation=experts.activation.struct,
        gate_tokens=gate_tokens, up_tokens=up_tokens,
        down_tokens=pool.buffer("inner panels", tokens_bytes(inner, n_pairs)), out=out,
        work=pool.buffer("work", work_bytes * pool.n_workers), work_bytes=work_bytes,
        sums=pool.buffer("sums", sums_bytes * pool.n_workers), sums_bytes=sums_bytes,
        scratch=pool.buffer("scratch", SCRATCH_BYTES * pool.n_workers),
    )  # fmt: skip
    pool.run(_run_up.address, arguments)
    pool.run(_run_down.address, arguments)
