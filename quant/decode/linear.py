"""Phases of matrix rows: a few matrices times one vector a token, which is taken as it is, normed, or gated first.

Vectors of a step's tokens lie one behind the other, float32 (MOST_TOKENS, n).
"""

from dataclasses import dataclass

import numpy as np

from quant.decode.program import (
    ARGUMENTS,
    HEAD_FROM,
    MOST_TOKENS,
    PHASE_BYTES,
    STATE,
    Phase,
    float_bits,
    padded,
    tokens_of,
)
from quant.errors import QuantError
from quant.gemv.activations import q8_bytes, write_q8
from quant.matrix import ADDRESS, GEMV, GEMV_BATCH, GROUP_BYTES, MATRIX_BYTES, ROW_BYTES, QuantMatrix
from quant.simd.memory import bits_to_f32, load_i64, stack, store_i64
from quant.simd.vectors import copy, rms_norm, scale_add, swiglu
from quant.target.jit import Kernel, inline, kernel
from quant.threads.atomics import call_5, call_7

_UNIT_BYTES = 1 << 19  # weights that a worker takes at a time: long enough to stream, short enough to share out
_UNITS_PER_WORKER = 4  # at least, so that workers end together

# Arguments: the vector; a norm's weight or a gate's other half; a second vector to be normed; then the matrices.
(
    X, SECOND, EPSILON, BESIDE, BESIDE_NORM, N_COLS, RECORD, TEMPORARY, TOKEN_BYTES, ROUNDED, RESIDUAL, IS_HEAD,
    N_MATRICES,
) = range(ARGUMENTS, ARGUMENTS + 13 * 8, 8)  # fmt: skip
MATRICES = ARGUMENTS + 13 * 8
# A matrix: ops/multiply.py's fields, then these.
N_ROWS, UNIT_ROWS, FIRST_UNIT, OUT, INTEGER = range(MATRIX_BYTES, MATRIX_BYTES + 40, 8)
MATRIX_SIZE = MATRIX_BYTES + 40
MOST_MATRICES = (PHASE_BYTES - MATRICES) // MATRIX_SIZE

# ---- rows of one matrix times a few records --------------------------------------------------------------------------

token_tables = stack(16 * MOST_TOKENS)  # addresses of tokens' records, then of their outputs


@inline
def set_token(tables, i, record, out):
    """The record and the output of the i-th token."""
    store_i64(tables + 8 * i, record)
    store_i64(tables + 8 * (MOST_TOKENS + i), out)


@inline
def multiply(matrix, group, first, n_rows, n_cols, tables, n_tokens):
    """out[r] = row first+r of a group of the matrix times the record, for the first n_tokens of the tables."""
    w = load_i64(matrix + ADDRESS) + load_i64(matrix + GROUP_BYTES) * group + load_i64(matrix + ROW_BYTES) * first
    outs = tables + 8 * MOST_TOKENS
    if n_tokens == 1:
        call_5(load_i64(matrix + GEMV), w, n_rows, n_cols, load_i64(tables), load_i64(outs))
    else:
        call_7(load_i64(matrix + GEMV_BATCH), w, n_rows, n_cols, tables, outs, 0, n_tokens)


# ---- the phase -------------------------------------------------------------------------------------------------------
# A worker's memory has TOKEN_BYTES a token: its vector, its record, then rows that are to be added to the residual.


@inline
def _first_token(phase):
    """The first token that there is anything to do for."""
    return load_i64(load_i64(phase + STATE) + HEAD_FROM) if load_i64(phase + IS_HEAD) != 0 else 0


@inline
def _round(phase, own):
    """The activation record of the vector at `own`, if a matrix of the phase wants one."""
    n_cols = load_i64(phase + N_COLS)
    if load_i64(phase + ROUNDED) != 0:
        write_q8(own, 0, n_cols, n_cols, True, own + load_i64(phase + RECORD))


@kernel("void(int64, int64)")
def _prepare_plain(phase, work):
    n_cols = load_i64(phase + N_COLS)
    for t in range(_first_token(phase), tokens_of(phase)):
        own = work + load_i64(phase + TOKEN_BYTES) * t
        copy(load_i64(phase + X) + 4 * n_cols * t, n_cols, own)
        _round(phase, own)


@kernel("void(int64, int64)")
def _prepare_norm(phase, work):
    n_cols, epsilon = load_i64(phase + N_COLS), bits_to_f32(load_i64(phase + EPSILON))
    for t in range(_first_token(phase), tokens_of(phase)):
        own = work + load_i64(phase + TOKEN_BYTES) * t
        rms_norm(load_i64(phase + X) + 4 * n_cols * t, load_i64(phase + SECOND), epsilon, n_cols, own)
        _round(phase, own)


@kernel("void(int64, int64)")
def _prepare_two_norms(phase, work):
    half, epsilon = load_i64(phase + N_COLS) // 2, bits_to_f32(load_i64(phase + EPSILON))
    for t in range(_first_token(phase), tokens_of(phase)):
        own, at = work + load_i64(phase + TOKEN_BYTES) * t, 4 * half * t
        rms_norm(load_i64(phase + X) + at, load_i64(phase + SECOND), epsilon, half, own)
        rms_norm(load_i64(phase + BESIDE) + at, load_i64(phase + BESIDE_NORM), epsilon, half, own + 4 * half)
        _round(phase, own)


@kernel("void(int64, int64)")
def _prepare_gated(phase, work):
    n_cols = load_i64(phase + N_COLS)
    for t in range(_first_token(phase), tokens_of(phase)):
        own, at = work + load_i64(phase + TOKEN_BYTES) * t, 4 * n_cols * t
        swiglu(load_i64(phase + X) + at, load_i64(phase + SECOND) + at, n_cols, own)
        _round(phase, own)


@inline
def _matrix_of(phase, unit):
    """The matrix that a unit is rows of."""
    matrix = phase + MATRICES
    for _ in range(1, load_i64(phase + N_MATRICES)):
        if unit < load_i64(matrix + MATRIX_SIZE + FIRST_UNIT):
            break
        matrix += MATRIX_SIZE
    return matrix


@kernel("void(int64, int64, int64)")
def _run(phase, unit, work):
    matrix, from_token, n_tokens = _matrix_of(phase, unit), _first_token(phase), tokens_of(phase)
    first = (unit - load_i64(matrix + FIRST_UNIT)) * load_i64(matrix + UNIT_ROWS)
    n_rows = min(load_i64(matrix + UNIT_ROWS), load_i64(matrix + N_ROWS) - first)
    record = load_i64(phase + RECORD) if load_i64(matrix + INTEGER) != 0 else 0
    is_residual, temporary = load_i64(phase + RESIDUAL) != 0, load_i64(phase + TEMPORARY)
    out, out_bytes = load_i64(matrix + OUT) + 4 * first, 4 * load_i64(matrix + N_ROWS)
    if from_token == n_tokens:
        return
    tables = token_tables()
    for t in range(from_token, n_tokens):
        own = work + load_i64(phase + TOKEN_BYTES) * t
        set_token(tables, t - from_token, own + record, own + temporary if is_residual else out + out_bytes * t)
    multiply(matrix, 0, first, n_rows, load_i64(phase + N_COLS), tables, n_tokens - from_token)
    if is_residual:
        for t in range(from_token, n_tokens):
            scale_add(1.0, work + load_i64(phase + TOKEN_BYTES) * t + temporary, n_rows, out + out_bytes * t)


@dataclass(frozen=True)
class Input:
    """A token's vector of a phase: addresses of float32 (MOST_TOKENS, n_cols), of norms' weights (n_cols,).

    x; or rms_norm(x) * norm; or silu(x) * up; or rms_norm(x) * norm and rms_norm(beside) * beside_norm behind it, half
    of the columns each.
    """

    x: int
    norm: int = 0
    epsilon: float = 0.0
    up: int = 0
    beside: int = 0
    beside_norm: int = 0


def unit_rows(weight: QuantMatrix, n_bytes: int, n_workers: int) -> int:
    """Rows that a worker takes at a time in a phase of n_bytes of weights, a multiple of 8 and of interleaved rows."""
    wanted, multiple = min(_UNIT_BYTES, n_bytes // (_UNITS_PER_WORKER * n_workers)), max(8, weight.format.rows)
    return max(multiple, wanted // weight.row_bytes // multiple * multiple)


def rows_phase(
    input_: Input,
    matrices: list[tuple[QuantMatrix, int]],
    n_workers: int,
    residual: bool = False,
    is_head: bool = False,
) -> Phase:
    """A phase that computes W x of each (W, address of its float32 output), or adds it there if `residual`.

    Of a head it does so from the step's token head_from on.

    Raises QuantError if there are more matrices than a phase holds, or their columns differ.
    """
    n_cols = matrices[0][0].n_cols
    if len(matrices) > MOST_MATRICES or any(weight.n_cols != n_cols for weight, _ in matrices):
        raise QuantError(f"{len(matrices)} matrices do not share a phase")
    n_bytes = sum(weight.n_rows * weight.row_bytes for weight, _ in matrices)
    record = padded(4 * n_cols)
    temporary = record + q8_bytes(n_cols)
    rounded = any(weight.format.integer for weight, _ in matrices)
    words, n_units, most_rows = [], 0, 0
    for weight, out in matrices:
        rows = unit_rows(weight, n_bytes, n_workers)
        words += [*weight.fields, weight.n_rows, rows, n_units, out, weight.format.integer]
        n_units += -(-weight.n_rows // rows)
        most_rows = max(most_rows, rows)
    token_bytes = temporary + padded(4 * most_rows * residual)
    head = [
        input_.x, input_.norm or input_.up, float_bits(input_.epsilon), input_.beside, input_.beside_norm, n_cols,
        record, temporary, token_bytes, rounded, residual, is_head, len(matrices),
    ]  # fmt: skip
    return Phase(_preparation(input_), _run, n_units, [*head, *words], token_bytes * MOST_TOKENS)


def _preparation(input_: Input) -> Kernel:
    """The kernel that prepares such an input."""
    if input_.beside:
        return _prepare_two_norms
    if input_.norm:
        return _prepare_norm
    return _prepare_gated if input_.up else _prepare_plain


@kernel("void(int64, int64, int64, int64, int64)")
def _norm_row(x, norm, epsilon, n_cols, out):
    rms_norm(x, norm, bits_to_f32(epsilon), n_cols, out)


def normed(input_: Input, first: int, last: int, n_cols: int) -> np.ndarray:
    """float32 (last - first, n_cols): a normed input as its phase has it, of the step's tokens first..last."""
    out = np.empty((last - first, n_cols), np.float32)
    for t, row in enumerate(out, first):
        x = input_.x + 4 * n_cols * t
        _norm_row.ctypes(x, input_.norm, float_bits(input_.epsilon), n_cols, row.ctypes.data)
    return out
