"""Rows of one quantised matrix times a few or many tokens: the step that linear.py and experts.py share.

One token: the format's gemv. A few: its gemv_batch, which decodes each block once for all of them; more go in passes
over rows that stay in the cache. Many: rows are expanded to float32 in a worker's scratch memory, a few at a
time, and each expanded row serves all tokens. All read the same activation records, so they agree to float32 rounding.
"""

from quant.gemm.float_tile import multiply
from quant.gemv.activations import write_q8
from quant.gemv.plain import MAX_BATCH
from quant.matrix import ADDRESS, BLOCK, EXPAND, GEMV, GEMV_BATCH, GROUP_BYTES, INTERLEAVED, ROW_BYTES
from quant.simd.memory import load_i64
from quant.target.jit import inline
from quant.threads.atomics import call_3, call_5, call_7
from quant.threads.pool import worker_bytes

# From here on expanding a row costs less than decoding it for a few tokens at a time (docs/lab-notes.md).
GEMM_TOKENS, GEMM_TOKENS_OF_FLOATS = 16, 6
_PASS_BYTES = 1 << 16  # of weights that several passes of a few tokens share: they stay in L2
SCRATCH_BYTES = 1 << 18  # expanded rows of one worker: beside a token block in L2
_TOKEN_BLOCK_BYTES = 1 << 19  # records that stay in L2 while the expanded rows pass over them


@inline
def expands(block, interleaved, n_tokens):
    """Whether n_tokens are many for a format with blocks of so many weights, so many rows of which lie interleaved."""
    return interleaved == 1 and n_tokens >= (GEMM_TOKENS_OF_FLOATS if block == 1 else GEMM_TOKENS)


def scratch_rows(n_cols: int) -> int:
    """How many rows of n_cols are expanded at a time."""
    return max(4, min(64, SCRATCH_BYTES // (4 * n_cols) // 4 * 4))


def scratch_bytes(n_cols: int) -> int:
    """From one worker's scratch memory, for rows of n_cols, to the next one's."""
    return worker_bytes(4 * n_cols * scratch_rows(n_cols))


@inline
def write_q8_rows(x, n_inputs, n_cols, integer, q8_bytes, records):
    """The records of n_inputs contiguous float32 rows at x."""
    for i in range(n_inputs):
        write_q8(x + 4 * n_cols * i, 0, n_cols, n_cols, integer, records + q8_bytes * i)


@inline
def multiply_rows(matrix, group, first, n_rows, n_cols, n_tokens, records, outs, offset, scratch):
    """outs[t][offset + 4*r] = row first+r . records[t], for n_rows rows of one group of the matrix.

    matrix: address of its fields. records, outs: addresses of n_tokens addresses. scratch: of scratch_bytes.
    """
    row_bytes = load_i64(matrix + ROW_BYTES)
    w = load_i64(matrix + ADDRESS) + load_i64(matrix + GROUP_BYTES) * group + row_bytes * first
    if n_tokens == 1:
        call_5(load_i64(matrix + GEMV), w, n_rows, n_cols, load_i64(records), load_i64(outs) + offset)
        return
    interleaved = load_i64(matrix + INTERLEAVED)
    if not expands(load_i64(matrix + BLOCK), interleaved, n_tokens) or n_cols % 16 != 0:
        step = n_rows if n_tokens <= MAX_BATCH else max(1, _PASS_BYTES // (row_bytes * interleaved)) * interleaved
        for r in range(0, n_rows, step):
            at, count = offset + 4 * r, min(step, n_rows - r)
            for t in range(0, n_tokens, MAX_BATCH):
                few, tokens = load_i64(matrix + GEMV_BATCH), min(MAX_BATCH, n_tokens - t)
                call_7(few, w + row_bytes * r, count, n_cols, records + 8 * t, outs + 8 * t, at, tokens)
        return
    step = max(4, min(64, SCRATCH_BYTES // (4 * n_cols) // 4 * 4))
    token_block = max(8, _TOKEN_BLOCK_BYTES // (4 * n_cols))
    row_blocks = n_cols // load_i64(matrix + BLOCK)
    for r in range(0, n_rows, step):
        count = min(step, n_rows - r)
        call_3(load_i64(matrix + EXPAND), w + row_bytes * r, count * row_blocks, scratch)
        for t in range(0, n_tokens, token_block):
            tokens = min(token_block, n_tokens - t)
            multiply(scratch, count, n_cols, tokens, records + 8 * t, outs + 8 * t, offset + 4 * r)
