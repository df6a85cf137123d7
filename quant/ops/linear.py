"""y = W x for quantised matrices: one, or one a group (attention heads), straight from their blocks.

Matrices are addresses into memory that somebody else keeps mapped; inputs and outputs are addresses of float32 in C
order.
"""

import numpy as np

from quant.errors import QuantError
from quant.gemm import linear as packed_linear
from quant.gemm import packed
from quant.gemv.activations import q8_bytes
from quant.matrix import MATRIX, QuantMatrix, check_single_rows, row_address
from quant.ops.multiply import multiply_rows, scratch_bytes, write_q8_rows
from quant.simd.floats import fma, splat_f32x16, zero_f32x16
from quant.simd.memory import load_f32, load_f32x16, store_f32x16
from quant.simd.struct import address, atomic, boolean, i64, pointer, struct
from quant.target.jit import kernel
from quant.threads.atomics import call_3
from quant.threads.numa import ITEMS, Items, take
from quant.threads.pool import Pool, worker_bytes
from quant.threads.work_items import rows_of_item, work_items

MULTIPLY = struct(
    "Multiply",
    matrix=MATRIX,
    items=ITEMS,
    integer=boolean,
    n_groups=i64,
    n_rows=i64,
    n_cols=i64,
    n_tokens=i64,
    x=address,
    out=address,
    q8_bytes=i64,
    q8=address,
    q8_table=pointer(i64),  # of each group's tokens, one group after the other: addresses of q8 rows
    out_table=pointer(i64),  # and of outputs
    item_rows=i64,
    scratch=address,
    scratch_bytes=i64,
)


@kernel("void(int64)")
def _prepare(arguments):
    """What comes before the job: q8 rows, and the tables."""
    a = MULTIPLY(arguments)
    for group in range(a.n_groups):
        for t in range(a.n_tokens):
            at, i = a.n_tokens * group + t, a.n_groups * t + group
            a.q8_table[at] = a.q8 + a.q8_bytes * i
            a.out_table[at] = a.out + 4 * a.n_rows * i
    write_q8_rows(a.x, a.n_groups * a.n_tokens, a.n_cols, a.integer, a.q8_bytes, a.q8)


@kernel("void(int64, int64)")
def _multiply(arguments, worker):
    """The job of multiply()."""
    a = MULTIPLY(arguments)
    n_rows, n_tokens, item_rows = a.n_rows, a.n_tokens, a.item_rows
    scratch = a.scratch + a.scratch_bytes * worker
    items = (n_rows + item_rows - 1) // item_rows
    item = take(a.items, worker)
    while item >= 0:
        group, first = item // items, item % items * item_rows
        q8, outs = a.q8_table + n_tokens * group, a.out_table + n_tokens * group
        count = min(item_rows, n_rows - first)
        multiply_rows(a.matrix, group, first, count, a.n_cols, n_tokens, q8, outs, 4 * first, scratch)
        item = take(a.items, worker)


def item_rows(pool: Pool, matrix: QuantMatrix, n_tokens: int) -> int:
    """Rows that a worker takes at a time."""
    if n_tokens >= matrix.expand_from:
        return matrix.expand_rows
    multiple, n_rows = max(4, matrix.format.rows), matrix.n_rows * matrix.n_groups
    return rows_of_item(matrix.row_bytes, n_rows, pool.n_workers, multiple)


def multiply(pool: Pool, matrix: QuantMatrix, x: int, n_tokens: int, out: int) -> None:
    """out[t, g] = matrix[g] @ x[t, g].

    Of several groups NUMA nodes have whole ones, as heads' matrices lie for steps. Of V4's grouped outputs steps
    share out each group's rows (decode/stream_rows.py), so that here some are read from another node.

    Args:
        x: address of float32 (n_tokens, n_groups, n_cols).
        out: address of float32 (n_tokens, n_groups, n_rows).
    """
    packed_format = packed.find(matrix.format) if n_tokens >= packed.tokens_from(matrix.format) else None
    if packed_format is not None:
        packed_linear.multiply(pool, matrix, packed_format, x, n_tokens, out)
        return
    n_inputs = n_tokens * matrix.n_groups
    per_row, per_worker = q8_bytes(matrix.n_cols), scratch_bytes(matrix)
    rows = item_rows(pool, matrix, n_tokens)
    n_items = matrix.n_groups * -(-matrix.n_rows // rows)
    items = Items(pool.spread, n_items, n_items)
    arguments = MULTIPLY.pack(
        matrix=matrix.struct, items=items.struct, integer=matrix.format.integer,
        n_groups=matrix.n_groups, n_rows=matrix.n_rows, n_cols=matrix.n_cols, n_tokens=n_tokens, x=x, out=out,
        q8_bytes=per_row, q8=pool.buffer("q8", per_row * n_inputs),
        q8_table=pool.buffer("q8 table", 8 * n_inputs), out_table=pool.buffer("out table", 8 * n_inputs),
        item_rows=rows,
        scratch=pool.buffer("scratch", per_worker * pool.n_workers), scratch_bytes=per_worker,
    )  # fmt: skip
    _prepare.ctypes(arguments.ctypes.data)
    pool.run(_multiply.address, arguments)


TRANSPOSED = struct(
    "MultiplyTransposed",
    matrix=MATRIX,
    counter=atomic,
    n_groups=i64,
    n_rows=i64,
    n_cols=i64,
    n_tokens=i64,
    x=address,
    out=address,
    scratch=address,  # a row of float32 for each worker
    scratch_bytes=i64,
)


@kernel("void(int64, int64)")
def _multiply_transposed(arguments, worker):
    """The job of multiply_transposed(): a worker takes a group at a time."""
    a = TRANSPOSED(arguments)
    n_groups, n_rows, n_cols, n_tokens, x, out = a.n_groups, a.n_rows, a.n_cols, a.n_tokens, a.x, a.out
    row, n_blocks = a.scratch + a.scratch_bytes * worker, a.n_cols // a.matrix.block
    for group in work_items(a.counter, n_groups):
        for t in range(n_tokens):
            for c in range(0, n_cols, 16):
                store_f32x16(out + 4 * ((t * n_groups + group) * n_cols + c), zero_f32x16())
        for r in range(n_rows):
            call_3(a.matrix.expand, row_address(a.matrix, group, r), n_blocks, row)
            for t in range(n_tokens):
                factor = splat_f32x16(load_f32(x + 4 * ((t * n_groups + group) * n_rows + r)))
                total = out + 4 * (t * n_groups + group) * n_cols
                for c in range(0, n_cols, 16):
                    summed = fma(factor, load_f32x16(row + 4 * c), load_f32x16(total + 4 * c))
                    store_f32x16(total + 4 * c, summed)


def multiply_transposed(pool: Pool, matrix: QuantMatrix, x: int, n_tokens: int, out: int) -> None:
    """out[t, g] = matrix[g].T @ x[t, g], in float32.

    Args:
        x: address of float32 (n_tokens, n_groups, n_rows).
        out: address of float32 (n_tokens, n_groups, n_cols).

    Raises:
        QuantError: n_cols is no multiple of 16, or the matrix's rows are interleaved.
    """
    check_single_rows(matrix)
    if matrix.n_cols % 16:
        raise QuantError(f"rows of {matrix.n_cols} weights; a transposed product needs multiples of 16")
    per_worker = worker_bytes(4 * matrix.n_cols)
    arguments = TRANSPOSED.pack(
        matrix=matrix.struct, counter=0,
        n_groups=matrix.n_groups, n_rows=matrix.n_rows, n_cols=matrix.n_cols, n_tokens=n_tokens, x=x, out=out,
        scratch=pool.buffer("scratch", per_worker * pool.n_workers), scratch_bytes=per_worker,
    )  # fmt: skip
    pool.run(_multiply_transposed.address, arguments)


EXPAND_ROWS = struct(
    "ExpandRows",
    counter=atomic,
    expand=address,  # the kernel
    n_blocks=i64,  # of a row
    rows=pointer(i64),  # their addresses
    n_rows=i64,
    out=address,
    out_bytes=i64,
)
_EXPANDED_TOGETHER = 16  # rows of a work item


@kernel("void(int64, int64)")
def _expand_rows(arguments, worker):
    """The job of expand_rows()."""
    a = EXPAND_ROWS(arguments)
    for first in work_items(a.counter, a.n_rows, _EXPANDED_TOGETHER):
        for r in range(first, min(first + _EXPANDED_TOGETHER, a.n_rows)):
            call_3(a.expand, a.rows[r], a.n_blocks, a.out + a.out_bytes * r)


def expand_rows(pool: Pool, matrix: QuantMatrix, rows: np.ndarray, out: int) -> None:
    """out[i] = the rows[i]-th row of the first group, or of all groups' rows in order, in float32.

    Args:
        rows: int64 (n,), each below n_groups * n_rows.
        out: address of float32 (n, n_cols).

    Raises:
        QuantError: rows are interleaved.
    """
    check_single_rows(matrix)
    group, row = np.divmod(rows.astype(np.int64), matrix.n_rows)
    addresses = matrix.address + group * matrix.group_bytes + row * matrix.row_bytes
    arguments = EXPAND_ROWS.pack(
        counter=0, expand=matrix.format.expand_address, n_blocks=matrix.n_cols // matrix.format.block,
        rows=addresses.ctypes.data, n_rows=len(rows), out=out, out_bytes=4 * matrix.n_cols,
    )  # fmt: skip
    pool.run(_expand_rows.address, arguments)
