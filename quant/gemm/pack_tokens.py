"""Packing of the inputs of a product into token panels: rounded once, then copied to every panel that needs them.

Two jobs. Rounded rows are short (quantize_tokens.py: 1.5 bytes a column), so that those of a prompt stay in L2 while
panels are written from front to back.
"""

import numpy as np

from quant.block_format import PanelFormat
from quant.gemm.packed import K_BLOCK, TOKEN_BYTES, token_block, write_group
from quant.gemm.quantize_tokens import BLOCK_BYTES, BLOCKS_TOGETHER, WORK_BYTES, round_row, row_bytes
from quant.simd.struct import address, atomic, i64, pointer, struct
from quant.target.jit import inline, kernel
from quant.threads.pool import Pool, worker_bytes
from quant.threads.work_items import work_items

_ITEM_INPUTS, _ITEM_TOKENS = 4, 24  # of a work item: inputs, and panels' tokens

_WORK_BYTES = worker_bytes(WORK_BYTES)

PACK_TOKENS = struct(
    "PackTokens",
    inputs_taken=atomic,
    tokens_taken=atomic,
    x=address,  # float32 (n_inputs, n_cols)
    n_inputs=i64,
    n_cols=i64,
    work=address,
    rounded=address,  # the inputs in 8 bits
    rounded_bytes=i64,
    n_tokens=i64,  # of all panels
    source=pointer(i64),  # by token: its input
    panel=pointer(i64),  # by token
    start=pointer(i64),  # by panel: its first token; one more
    kind=i64,  # of the weights' format
    offset=i64,
    panels=address,
)


@kernel("void(int64, int64)")
def _round(arguments, worker):
    """The first job of write_panels()."""
    a = PACK_TOKENS(arguments)
    work = a.work + _WORK_BYTES * worker
    for first in work_items(a.inputs_taken, a.n_inputs, _ITEM_INPUTS):
        for i in range(first, min(first + _ITEM_INPUTS, a.n_inputs)):
            round_row(a.x + 4 * a.n_cols * i, a.n_cols, a.rounded + a.rounded_bytes * i, work)


@inline
def _write_block(a, first, size):
    """The block of tokens first..first+size of all panels."""
    n_k_blocks, per_input, kind, offset, source = (
        a.n_cols // K_BLOCK,
        a.rounded_bytes,
        a.kind,
        a.offset,
        a.source + first,
    )
    at = a.panels + TOKEN_BYTES * n_k_blocks * first
    for k_block in range(n_k_blocks):
        skipped, g = BLOCK_BYTES * (k_block // BLOCKS_TOGETHER), k_block % BLOCKS_TOGETHER
        for i in range(size):
            write_group(kind, offset, a.rounded + per_input * source[i] + skipped, g, at, size, i)
        at += TOKEN_BYTES * size


@kernel("void(int64, int64)")
def _write(arguments, worker):
    """The second job of write_panels(): a worker writes the blocks that begin among its tokens."""
    a = PACK_TOKENS(arguments)
    for token in work_items(a.tokens_taken, a.n_tokens, _ITEM_TOKENS):
        for i in range(token, min(token + _ITEM_TOKENS, a.n_tokens)):
            begin, end = a.start[a.panel[i]], a.start[a.panel[i] + 1]
            first, size = token_block(i - begin, end - begin)
            if first == i - begin:
                _write_block(a, i, size)


def write_panels(
    pool: Pool,
    format_: PanelFormat,
    x: int,
    n_inputs: int,
    n_cols: int,
    source: np.ndarray,
    start: np.ndarray,
    panels: int,
) -> None:
    """Round inputs to 8 bits and write several token panels, one behind the other.

    Args:
        x: address of float32 (n_inputs, n_cols).
        source: int64 (n,): which input each token of all panels is.
        start: int64 (n_panels + 1,): first token of each panel.
        panels: address of tokens_bytes(n_cols, n).
    """
    per_input = row_bytes(n_cols)
    panel = np.repeat(np.arange(len(start) - 1), np.diff(start))
    arguments = PACK_TOKENS.pack(
        inputs_taken=0, tokens_taken=0, x=x, n_inputs=n_inputs, n_cols=n_cols,
        work=pool.buffer("rounding", _WORK_BYTES * pool.n_workers),
        rounded=pool.buffer("rounded inputs", per_input * n_inputs), rounded_bytes=per_input,
        n_tokens=len(source), source=source.ctypes.data, panel=panel.ctypes.data, start=start.ctypes.data,
        kind=format_.kind, offset=format_.offset, panels=panels,
    )  # fmt: skip
    pool.run(_round.address, arguments)
    pool.run(_write.address, arguments)
