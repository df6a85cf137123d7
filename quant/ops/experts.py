"""The routed experts of one layer: down(silu(gate x) * up x) for the chosen ones, weighted and summed. Biases, and
another activation, are those of ExpertMatrices.

Three jobs for any number of tokens, which are grouped by expert: the inputs' q8 rows; gate and up with SwiGLU and the
rounding of its result; down. The rows of all active experts are one pool of work items. A worker owns the output rows
it sums into, so the order of summation does not depend on the number of workers.
"""

import numpy as np

from quant.gemm import experts as packed_experts
from quant.gemm import packed
from quant.gemm.experts import Pairs, pairs_by_expert
from quant.gemv.activations import q8_bytes, write_q8
from quant.matrix import MATRIX, ExpertMatrices, QuantMatrix
from quant.ops.multiply import multiply_rows, scratch_bytes, write_q8_rows
from quant.simd.gated import ACTIVATION, gated
from quant.simd.memory import store_f32
from quant.simd.struct import address, atomic, boolean, f32, i64, pointer, struct
from quant.simd.vectors import scale_add
from quant.target.jit import inline, kernel
from quant.threads.numa import ITEMS, Items, take
from quant.threads.pool import Pool, worker_bytes
from quant.threads.work_items import rows_of_item, work_items

# A pair is a token and one of its experts; pairs are in the order of experts. Tables hold addresses by pair.
EXPERTS = struct(
    "Experts",
    gate=MATRIX,
    up=MATRIX,
    down=MATRIX,
    tokens_taken=atomic,
    up_items=ITEMS,
    down_items=ITEMS,
    up_integer=boolean,  # what gate and up read
    down_integer=boolean,
    hidden=i64,
    inner=i64,
    n_tokens=i64,
    n_active=i64,
    active=pointer(i64),  # (n_active,): experts
    start=pointer(i64),  # (n_active + 1,): their first pairs
    token=pointer(i64),  # by pair
    weight=pointer(f32),  # by pair
    gate_bias=address,  # float32 (experts, inner), or 0
    up_bias=address,
    down_bias=address,  # float32 (experts, hidden), or 0
    activation=ACTIVATION,
    x=address,
    x_q8=address,  # by token
    x_q8_bytes=i64,
    x_table=pointer(i64),
    inner_q8=address,  # by pair
    inner_q8_bytes=i64,
    inner_table=pointer(i64),
    gate_out=address,  # float32 (pairs, inner)
    gate_table=pointer(i64),
    up_out=address,
    up_table=pointer(i64),
    out=address,
    up_rows=i64,  # of a work item
    down_rows=i64,
    scratch=address,
    scratch_bytes=i64,
    sums=address,  # a worker's float32 (most pairs of an expert, down_rows)
    sums_bytes=i64,
    sums_table=pointer(i64),
)


@inline
def _gate_and_up(a, group, first, n_rows, scratch):
    """Rows of gate and up of one active expert for its tokens, SwiGLU, and the q8 rows of the result."""
    inner, expert, begin, end = a.inner, a.active[group], a.start[group], a.start[group + 1]
    x, n_tokens = a.x_table + begin, end - begin
    multiply_rows(a.gate, expert, first, n_rows, a.hidden, n_tokens, x, a.gate_table + begin, 4 * first, scratch)
    multiply_rows(a.up, expert, first, n_rows, a.hidden, n_tokens, x, a.up_table + begin, 4 * first, scratch)
    for pair in range(begin, end):
        gate_out, up_out = a.gate_out + 4 * inner * pair, a.up_out + 4 * inner * pair
        if a.gate_bias != 0:
            scale_add(1.0, a.gate_bias + 4 * (inner * expert + first), n_rows, gate_out + 4 * first)
            scale_add(1.0, a.up_bias + 4 * (inner * expert + first), n_rows, up_out + 4 * first)
        gated(a.activation, gate_out + 4 * first, up_out + 4 * first, n_rows, gate_out + 4 * first)
        q8 = a.inner_q8 + a.inner_q8_bytes * pair
        write_q8(gate_out, first, first + n_rows, inner, a.down_integer, q8)


@inline
def _sum_down(a, first, n_rows, scratch, sums, sums_table):
    """Output rows first..first+n_rows of every token: the weighted sum of its experts' down rows."""
    hidden = a.hidden
    for t in range(a.n_tokens):
        for i in range(first, first + n_rows):
            store_f32(a.out + 4 * (hidden * t + i), np.float32(0.0))
    for group in range(a.n_active):
        begin, end = a.start[group], a.start[group + 1]
        q8 = a.inner_table + begin
        multiply_rows(a.down, a.active[group], first, n_rows, a.inner, end - begin, q8, sums_table, 0, scratch)
        for pair in range(begin, end):
            row_sums, out = sums + 4 * a.down_rows * (pair - begin), a.out + 4 * (hidden * a.token[pair] + first)
            scale_add(a.weight[pair], row_sums, n_rows, out)
            if a.down_bias != 0:
                scale_add(a.weight[pair], a.down_bias + 4 * (hidden * a.active[group] + first), n_rows, out)


@kernel("void(int64, int64)")
def _quantize_inputs(arguments, worker):
    """The first job of run(): the tokens' q8 rows."""
    a = EXPERTS(arguments)
    for t in work_items(a.tokens_taken, a.n_tokens):
        write_q8_rows(a.x + 4 * a.hidden * t, 1, a.hidden, a.up_integer, 0, a.x_q8 + a.x_q8_bytes * t)


@kernel("void(int64, int64)")
def _run_up(arguments, worker):
    """The second job: gate and up of all active experts."""
    a = EXPERTS(arguments)
    scratch, rows = a.scratch + a.scratch_bytes * worker, a.up_rows
    items = (a.inner + rows - 1) // rows
    item = take(a.up_items, worker)
    while item >= 0:
        first = item % items * rows
        _gate_and_up(a, item // items, first, min(rows, a.inner - first), scratch)
        item = take(a.up_items, worker)


@kernel("void(int64, int64)")
def _run_down(arguments, worker):
    """The third job: down, and the weighted sums."""
    a = EXPERTS(arguments)
    scratch, rows = a.scratch + a.scratch_bytes * worker, a.down_rows
    sums, most = a.sums + a.sums_bytes * worker, a.sums_bytes // (4 * rows)
    sums_table = a.sums_table + most * worker
    for i in range(most):
        sums_table[i] = sums + 4 * rows * i
    item = take(a.down_items, worker)
    while item >= 0:
        _sum_down(a, rows * item, min(rows, a.hidden - rows * item), scratch, sums, sums_table)
        item = take(a.down_items, worker)


def _item_rows(matrix: QuantMatrix, n_rows: int, n_workers: int) -> int:
    """Rows of a work item, of n_rows in all: a multiple of 32, so that groups of activations stay whole."""
    return rows_of_item(matrix.row_bytes, n_rows, n_workers, 32)


def run(pool: Pool, experts: ExpertMatrices, x: int, ids: np.ndarray, weights: np.ndarray, out: int) -> None:
    """out[t] = sum over k of weights[t, k] * expert ids[t, k] of x[t].

    Args:
        x: address of float32 (T, D).
        ids: int64 (T, K), each below the number of experts; pairs with -1 are left out.
        weights: float32 (T, K).
        out: address of float32 (T, D).
    """
    formats = [matrix.format for matrix in (experts.gate, experts.up, experts.down)]
    packed_formats = [packed.find(format_) for format_ in formats]
    pairs = pairs_by_expert(ids, weights)
    n_active = pairs.experts.size
    if all(packed_formats) and n_active and pairs.token.size >= packed.tokens_from(*formats) * n_active:
        packed_experts.run(pool, experts, packed_formats, x, len(ids), pairs, out)
    else:
        _run(pool, experts, x, len(ids), pairs, out)


def _run(pool: Pool, experts: ExpertMatrices, x: int, n_tokens: int, pairs: Pairs, out: int) -> None:
    """run() by rows of blocks as they lie in memory."""
    gate, up, down = experts.gate, experts.up, experts.down
    hidden, inner, n_pairs, n_active = gate.n_cols, gate.n_rows, pairs.token.size, pairs.experts.size
    x_bytes, inner_bytes = q8_bytes(hidden), q8_bytes(inner)
    x_q8, inner_q8 = pool.buffer("q8", x_bytes * n_tokens), pool.buffer("inner q8", inner_bytes * n_pairs)
    gate_out, up_out = (pool.buffer(name, 4 * inner * n_pairs) for name in ("gate out", "up out"))
    per_worker = max(scratch_bytes(gate), scratch_bytes(down))
    of_node = -(-inner // pool.spread.n_nodes // 32) * 32  # rows of an expert: each node has some
    up_rows = min(_item_rows(gate, inner * n_active, pool.n_workers), of_node)
    down_rows = _item_rows(down, hidden, pool.n_workers)
    per_expert, n_down = -(-inner // up_rows), -(-hidden // down_rows)
    up_items = Items(pool.spread, per_expert * n_active, per_expert)
    down_items = Items(pool.spread, n_down, n_down)
    sums_bytes = worker_bytes(4 * down_rows * pairs.most)
    pair = np.arange(n_pairs, dtype=np.int64)
    x_table, inner_table, gate_table, up_table = np.stack(
        [x_q8 + x_bytes * pairs.token, inner_q8 + inner_bytes * pair, gate_out + 4 * inner * pair,
         up_out + 4 * inner * pair]
    )  # fmt: skip
    arguments = EXPERTS.pack(
        gate=gate.struct, up=up.struct, down=down.struct, tokens_taken=0,
        up_items=up_items.struct, down_items=down_items.struct,
        up_integer=gate.format.integer or up.format.integer, down_integer=down.format.integer,
        hidden=hidden, inner=inner, n_tokens=n_tokens, n_active=n_active,
        active=pairs.experts.ctypes.data, start=pairs.start.ctypes.data,
        token=pairs.token.ctypes.data, weight=pairs.weight.ctypes.data,
        **experts.bias_addresses, activation=experts.activation.struct,
        x=x, x_q8=x_q8, x_q8_bytes=x_bytes, x_table=x_table.ctypes.data,
        inner_q8=inner_q8, inner_q8_bytes=inner_bytes, inner_table=inner_table.ctypes.data,
        gate_out=gate_out, gate_table=gate_table.ctypes.data, up_out=up_out, up_table=up_table.ctypes.data,
        out=out, up_rows=up_rows, down_rows=down_rows,
        scratch=pool.buffer("scratch", per_worker * pool.n_workers), scratch_bytes=per_worker,
        sums=pool.buffer("sums", sums_bytes * pool.n_workers), sums_bytes=sums_bytes,
        sums_table=pool.buffer("sums table", 8 * (sums_bytes // (4 * down_rows)) * pool.n_workers),
    )  # fmt: skip
    if n_tokens == 1:
        _quantize_inputs.ctypes(arguments.ctypes.data, 0)
    else:
        pool.run(_quantize_inputs.address, arguments)
    pool.run(_run_up.address, arguments)
    pool.run(_run_down.address, arguments)
