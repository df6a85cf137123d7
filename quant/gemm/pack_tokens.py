"""Token panels of the inputs of a product: rounded once, then copied to every panel that needs them.

Two jobs. Rounded rows are short (quantize_tokens.py: 1.5 bytes a column), so that those of a prompt stay in L2 while
panels are written from front to back.
"""

import numpy as np

from quant.block_format import PanelFormat
from quant.gemm.packed import STEP, TOKEN_BYTES, token_block, write_group
from quant.gemm.quantize_tokens import BLOCK_BYTES, GROUPS, WORK_BYTES, round_row, row_bytes
from quant.simd.memory import load_i64
from quant.target.jit import inline, kernel
from quant.threads.atomics import atomic_add
from quant.threads.pool import Pool, worker_bytes

_UNIT_INPUTS, _UNIT_TOKENS = 4, 24  # that a worker takes at a time, of inputs and of panels' tokens

_WORK_BYTES = worker_bytes(WORK_BYTES)

# Where the jobs find their arguments.
(
    IN_COUNTER, IN_X, N_INPUTS, N_COLS, WORK, ROUNDED, ROUNDED_BYTES,
    COUNTER, N_TOKENS, SOURCE, GROUP, START, KIND, OFFSET, PANELS,
) = range(0, 15 * 8, 8)  # fmt: skip


@kernel("void(int64, int64)")
def _round(arguments, worker):
    """The first job of write_panels()."""
    a = arguments
    n_inputs, n_cols, per_input = load_i64(a + N_INPUTS), load_i64(a + N_COLS), load_i64(a + ROUNDED_BYTES)
    work = load_i64(a + WORK) + _WORK_BYTES * worker
    while True:
        first = atomic_add(load_i64(a + IN_COUNTER), _UNIT_INPUTS)
        if first >= n_inputs:
            break
        for i in range(first, min(first + _UNIT_INPUTS, n_inputs)):
            round_row(load_i64(a + IN_X) + 4 * n_cols * i, n_cols, load_i64(a + ROUNDED) + per_input * i, work)


@inline
def _write_block(a, first, size):
    """The block of tokens first..first+size of all panels."""
    n_steps, per_input = load_i64(a + N_COLS) // STEP, load_i64(a + ROUNDED_BYTES)
    kind, offset, source = load_i64(a + KIND), load_i64(a + OFFSET), load_i64(a + SOURCE) + 8 * first
    at = load_i64(a + PANELS) + TOKEN_BYTES * n_steps * first
    for step in range(n_steps):
        skipped, g = BLOCK_BYTES * (step // GROUPS), step % GROUPS
        for i in range(size):
            rounded = load_i64(a + ROUNDED) + per_input * load_i64(source + 8 * i) + skipped
            write_group(kind, offset, rounded, g, at, size, i)
        at += TOKEN_BYTES * size


@kernel("void(int64, int64)")
def _write(arguments, worker):
    """The second job of write_panels(): a worker writes the blocks that begin among its tokens."""
    a = arguments
    n_tokens, group, start = load_i64(a + N_TOKENS), load_i64(a + GROUP), load_i64(a + START)
    while True:
        token = atomic_add(load_i64(a + COUNTER), _UNIT_TOKENS)
        if token >= n_tokens:
            break
        for i in range(token, min(token + _UNIT_TOKENS, n_tokens)):
            at = start + 8 * load_i64(group + 8 * i)
            begin, end = load_i64(at), load_i64(at + 8)
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
    """Round inputs to 8 bits and write the token panels of several groups, one behind the other.

    Args:
        x: address of float32 (n_inputs, n_cols).
        source: int64 (n,): which input each token of all panels is.
        start: int64 (n_groups + 1,): first token of each panel.
        panels: address of tokens_bytes(n_cols, n).
    """
    counters, per_input = np.zeros(16, np.int64), row_bytes(n_cols)  # two cache lines
    group = np.repeat(np.arange(len(start) - 1), np.diff(start))
    arguments = (
        counters.ctypes.data, x, n_inputs, n_cols,
        pool.buffer("rounding", _WORK_BYTES * pool.n_workers),
        pool.buffer("rounded inputs", per_input * n_inputs), per_input,
        counters.ctypes.data + 64, len(source), source.ctypes.data, group.ctypes.data, start.ctypes.data,
        format_.kind, format_.offset, panels,
    )  # fmt: skip
    packed = np.array(arguments, np.int64)
    pool.run(_round.address, packed)
    pool.run(_write.address, packed)
