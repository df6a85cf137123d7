"""Rows of one quantised matrix times a few or many tokens: what linear.py and experts.py share.

One token: the format's gemv. A small batch: its gemv_batch, which decodes each block once for all of them; more go in
passes over rows that stay in the cache. Many: rows are expanded to float32 in a worker's scratch memory, a few at a
time, and each expanded row serves all tokens. All read the same q8 rows, so they agree to float32 rounding.
"""

from quant.batch import MAX_BATCH
from quant.gemm.float_tile import multiply
from quant.gemv.activations import write_q8
from quant.matrix import QuantMatrix, row_address
from quant.simd.struct import address_of
from quant.target.jit import inline
from quant.threads.atomics import call_3, call_5, call_7
from quant.threads.pool import worker_bytes

_PASS_BYTES = 1 << 16  # of weights that several passes of small batches share: they stay in L2
_TOKEN_BLOCK_BYTES = 1 << 19  # inputs that stay in L2 while the expanded rows pass over them


def scratch_bytes(matrix: QuantMatrix) -> int:
    """From one worker's scratch memory, for rows of a matrix, to the next one's."""
    return worker_bytes(4 * matrix.n_cols * matrix.expand_rows)


@inline
def write_q8_rows(x, n_inputs, n_cols, integer, q8_bytes, q8):
    """n_inputs contiguous float32 rows at x as q8 rows, q8_bytes apart."""
    for i in range(n_inputs):
        write_q8(x + 4 * n_cols * i, 0, n_cols, n_cols, integer, q8 + q8_bytes * i)


@inline
def multiply_rows(matrix, group, first, n_rows, n_cols, n_tokens, q8, outs, offset, scratch):
    """outs[t][offset + 4*r] = row first+r . q8[t], for n_rows rows of one group of the matrix.

    matrix: a MATRIX. q8, outs: pointers to n_tokens addresses. scratch: of scratch_bytes.
    """
    w = row_address(matrix, group, first)
    if n_tokens == 1:
        call_5(matrix.gemv, w, n_rows, n_cols, q8[0], outs[0] + offset)
    elif n_tokens < matrix.expand_from:
        _multiply_batches(matrix, w, n_rows, n_cols, n_tokens, address_of(q8), address_of(outs), offset)
    else:
        _multiply_expanded(matrix, w, n_rows, n_cols, n_tokens, address_of(q8), address_of(outs), offset, scratch)


@inline
def _multiply_batches(matrix, w, n_rows, n_cols, n_tokens, q8, outs, offset):
    """Rows from w on as they lie in memory, for MAX_BATCH tokens at a time."""
    row_bytes, interleaved = matrix.row_bytes, matrix.interleaved
    stride = n_rows if n_tokens <= MAX_BATCH else max(1, _PASS_BYTES // (row_bytes * interleaved)) * interleaved
    for r in range(0, n_rows, stride):
        at, count = offset + 4 * r, min(stride, n_rows - r)
        for t in range(0, n_tokens, MAX_BATCH):
            tokens = min(MAX_BATCH, n_tokens - t)
            call_7(matrix.gemv_batch, w + row_bytes * r, count, n_cols, q8 + 8 * t, outs + 8 * t, at, tokens)


@inline
def _multiply_expanded(matrix, w, n_rows, n_cols, n_tokens, q8, outs, offset, scratch):
    """Rows from w on in float32, a block of tokens at a time."""
    stride, row_blocks = matrix.expand_rows, n_cols // matrix.block
    token_block = max(8, _TOKEN_BLOCK_BYTES // (4 * n_cols))
    for r in range(0, n_rows, stride):
        count = min(stride, n_rows - r)
        call_3(matrix.expand, w + matrix.row_bytes * r, count * row_blocks, scratch)
        for t in range(0, n_tokens, token_block):
            tokens = min(token_block, n_tokens - t)
            multiply(scratch, count, n_cols, tokens, q8 + 8 * t, outs + 8 * t, offset + 4 * r)
