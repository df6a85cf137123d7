"""Phases of matrix rows: a few matrices times one vector a token, which is taken as it is, normed, gated, or mixed of
streams first.

Vectors of a step's tokens lie one behind the other, float32 (MOST_TOKENS, n).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quant.batch import MAX_BATCH
from quant.decode.parts import Part
from quant.decode.program import (
    HEADER,
    MOST_TOKENS,
    PHASE,
    PHASE_BYTES,
    Phase,
    padded,
    program_of,
    tokens_of,
)
from quant.decode.streams import (
    NO_STREAMS,
    STREAMS,
    WEIGHTS_BYTES,
    Streams,
    write_streams,
)
from quant.errors import QuantError
from quant.gemv.activations import q8_bytes, write_q8
from quant.matrix import MATRIX, QuantMatrix, row_address
from quant.simd.memory import load_i64, stack, store_i64
from quant.simd.struct import address, array, boolean, f32, i64, struct
from quant.simd.vectors import copy, rms_norm, scale_add, swiglu
from quant.target.jit import inline, kernel
from quant.target.kernel import Kernel
from quant.threads.atomics import call_5, call_7
from quant.threads.work_items import rows_of_items

# A worker's memory has token_bytes a token: its vector, its q8 row, then rows that are to be added to the residual, or
# the weights of its streams.
ROWS_MATRIX = struct(
    "RowsMatrix",
    matrix=MATRIX,
    n_rows=i64,
    item_rows=i64,
    first_item=i64,
    bias=address,  # float32 (n_rows,) that is added to each product; 0 for none
    out=address,
    integer=boolean,
)
_FIELDS = {
    "phase": PHASE,
    "x": address,
    "second": address,  # a norm's weight, or a gate's other half
    "epsilon": f32,
    "beside": address,  # a second vector to be normed
    "beside_norm": address,
    "n_cols": i64,
    "q8": i64,  # where in a token's memory
    "temporary": i64,
    "token_bytes": i64,
    "integer": boolean,  # whether a matrix wants the q8 row
    "residual": boolean,
    "is_head": boolean,
    "streams": STREAMS,  # that x is a mix of, or the residual
    "kept": address,  # float32 (MOST_TOKENS, n_cols) for what was prepared, or 0
    "n_matrices": i64,
}
MOST_MATRICES = (PHASE_BYTES - struct("RowsBegin", **_FIELDS).size) // ROWS_MATRIX.size
ROWS = struct("Rows", **_FIELDS, matrices=array(ROWS_MATRIX, MOST_MATRICES))

# ---- rows of one matrix times a few q8 rows --------------------------------------------------------------------------

token_tables = stack(16 * MOST_TOKENS)  # addresses of tokens' q8 rows, then of their outputs


@inline
def set_token(tables, i, q8, out):
    """The q8 row and the output of the i-th token."""
    store_i64(tables + 8 * i, q8)
    store_i64(tables + 8 * (MOST_TOKENS + i), out)


@inline
def multiply(matrix, group, first, n_rows, n_cols, tables, n_tokens):
    """out[r] = row first+r of a group of the matrix times the q8 row, for the first n_tokens of the tables."""
    multiply_at(matrix, row_address(matrix, group, first), n_rows, n_cols, tables, n_tokens)


@inline
def multiply_at(matrix, w, n_rows, n_cols, tables, n_tokens):
    """The same of n_rows rows at an address."""
    outs = tables + 8 * MOST_TOKENS
    for t in range(0, n_tokens, MAX_BATCH):
        some = min(MAX_BATCH, n_tokens - t)
        if some == 1:
            call_5(matrix.gemv, w, n_rows, n_cols, load_i64(tables + 8 * t), load_i64(outs + 8 * t))
        else:
            call_7(matrix.gemv_batch, w, n_rows, n_cols, tables + 8 * t, outs + 8 * t, 0, some)


# ---- the phase -------------------------------------------------------------------------------------------------------


@inline
def first_token(a):
    """The first token that there is anything to do for."""
    return program_of(a).head_from if a.is_head else 0


@inline
def quantize(a, own):
    """The q8 row of the vector at `own`, if a matrix of the phase wants one."""
    if a.integer:
        write_q8(own, 0, a.n_cols, a.n_cols, True, own + a.q8)


@kernel("void(int64, int64)")
def _prepare_plain(phase, work):
    a = ROWS(phase)
    for t in range(first_token(a), tokens_of(a)):
        own = work + a.token_bytes * t
        copy(a.x + 4 * a.n_cols * t, a.n_cols, own)
        quantize(a, own)


@kernel("void(int64, int64)")
def _prepare_norm(phase, work):
    a = ROWS(phase)
    for t in range(first_token(a), tokens_of(a)):
        own = work + a.token_bytes * t
        rms_norm(a.x + 4 * a.n_cols * t, a.second, a.epsilon, a.n_cols, own)
        quantize(a, own)


@kernel("void(int64, int64)")
def _prepare_two_norms(phase, work):
    a = ROWS(phase)
    half = a.n_cols // 2
    for t in range(first_token(a), tokens_of(a)):
        own, at = work + a.token_bytes * t, 4 * half * t
        rms_norm(a.x + at, a.second, a.epsilon, half, own)
        rms_norm(a.beside + at, a.beside_norm, a.epsilon, half, own + 4 * half)
        quantize(a, own)


@kernel("void(int64, int64)")
def _prepare_gated(phase, work):
    a = ROWS(phase)
    for t in range(first_token(a), tokens_of(a)):
        own, at = work + a.token_bytes * t, 4 * a.n_cols * t
        swiglu(a.x + at, a.second + at, a.n_cols, own)
        quantize(a, own)


@inline
def _keep(a, work):
    """What this worker has prepared, for phases to come: the vectors, and the weights of their streams."""
    for t in range(first_token(a), tokens_of(a)):
        own = work + a.token_bytes * t
        copy(own, a.n_cols, a.kept + 4 * a.n_cols * t)
        copy(own + a.temporary, a.streams.n_weights, a.streams.weights + WEIGHTS_BYTES * t)


@inline
def _matrix_of(a, item):
    """The ROWS_MATRIX that an item is rows of."""
    i = 0
    while i + 1 < a.n_matrices and item >= a.matrices[i + 1].first_item:
        i += 1
    return a.matrices[i]


@kernel("void(int64, int64, int64)")
def _run(phase, item, work):
    a = ROWS(phase)
    m, from_token, n_tokens = _matrix_of(a, item), first_token(a), tokens_of(a)
    first = (item - m.first_item) * m.item_rows
    n_rows = min(m.item_rows, m.n_rows - first)
    q8, temporary, is_residual = a.q8 if m.integer else 0, a.temporary, a.residual
    out, out_bytes = m.out + 4 * first, 4 * m.n_rows
    if from_token == n_tokens:
        return
    if a.kept != 0 and item == 0:
        _keep(a, work)
    tables = token_tables()
    for t in range(from_token, n_tokens):
        own = work + a.token_bytes * t
        set_token(tables, t - from_token, own + q8, own + temporary if is_residual else out + out_bytes * t)
    multiply(m.matrix, 0, first, n_rows, a.n_cols, tables, n_tokens - from_token)
    if m.bias != 0:
        for i in range(n_tokens - from_token):
            scale_add(1.0, m.bias + 4 * first, n_rows, load_i64(tables + 8 * (MOST_TOKENS + i)))
    if is_residual:
        for t in range(from_token, n_tokens):
            rows = work + a.token_bytes * t + temporary
            if a.streams.x != 0:
                write_streams(a.streams, t, first, n_rows, m.n_rows, rows)
            else:
                scale_add(1.0, rows, n_rows, out + out_bytes * t)


@dataclass(frozen=True)
class Input:
    """A token's vector of a phase: addresses of float32 (MOST_TOKENS, n_cols), of norms' weights (n_cols,).

    x; or rms_norm(x) * norm; or silu(x) * up; or rms_norm(x) * norm and rms_norm(beside) * beside_norm behind it, half
    of the columns each; or rms_norm(mix of streams) * norm, which goes to x, for phases to come (stream_rows.py).
    """

    x: int
    norm: int = 0
    epsilon: float = 0.0
    up: int = 0
    beside: int = 0
    beside_norm: int = 0
    streams: Streams | None = None


def item_rows(matrices: Sequence[QuantMatrix], n_workers: int) -> tuple[int, ...]:
    """Rows of a work item of each group of these matrices, in a phase of all of them."""
    sizes = tuple((matrix.n_rows, matrix.row_bytes) for matrix in matrices)
    return rows_of_items(sizes, n_workers, max(matrix.format.rows for matrix in matrices))


def rows_phase(
    input_: Input,
    matrices: list[tuple[QuantMatrix, int]],
    n_workers: int,
    residual: bool = False,
    is_head: bool = False,
    biases: Sequence[int] = (),
    into: Streams | None = None,
) -> Phase:
    """A phase that computes W x of each (W, address of its float32 output), or adds it there if `residual`.

    Of a head it does so from the step's token head_from on. biases: addresses of what is added to each W's product,
    float32 (out,); 0 for nothing, and none for all of them. into: streams that the one product is written to instead.

    Raises QuantError if there are more matrices than a phase holds, or their columns differ.
    """
    n_cols = matrices[0][0].n_cols
    if len(matrices) > MOST_MATRICES or any(weight.n_cols != n_cols for weight, _ in matrices):
        raise QuantError(f"{len(matrices)} matrices do not share a phase")
    residual, streams = residual or into is not None, into or input_.streams
    q8 = padded(4 * n_cols)
    temporary = q8 + q8_bytes(n_cols)
    packed, parts, n_items, most_rows = [], [], 0, 0
    divided = item_rows([weight for weight, _ in matrices], n_workers)
    for (weight, out), bias, rows in zip(matrices, biases or [0] * len(matrices), divided, strict=True):
        fields = {"n_rows": weight.n_rows, "item_rows": rows, "first_item": n_items, "bias": bias, "out": out}
        packed.append(ROWS_MATRIX.pack(matrix=weight.struct, integer=weight.format.integer, **fields))
        parts.append(Part(weight, rows, n_items))
        n_items += -(-weight.n_rows // rows)
        most_rows = max(most_rows, rows)
    token_bytes = temporary + padded(max(4 * most_rows * residual, WEIGHTS_BYTES))
    arguments = ROWS.pack(
        phase=HEADER, x=input_.x, second=input_.norm or input_.up, epsilon=input_.epsilon,
        beside=input_.beside, beside_norm=input_.beside_norm, n_cols=n_cols,
        q8=q8, temporary=temporary, token_bytes=token_bytes, integer=any(w.format.integer for w, _ in matrices),
        residual=residual, is_head=is_head, streams=streams.struct if streams else NO_STREAMS,
        kept=input_.x if input_.streams else 0, n_matrices=len(matrices), matrices=packed,
    )  # fmt: skip
    return Phase(_preparation(input_), _run, n_items, arguments, token_bytes * MOST_TOKENS, weights=parts)


def _preparation(input_: Input) -> Kernel:
    """The kernel that prepares such an input."""
    if input_.beside:
        return _prepare_two_norms
    if input_.norm:
        return _prepare_norm
    return _prepare_gated if input_.up else _prepare_plain


@kernel("void(int64, int64, float32, int64, int64)")
def _norm_row(x, norm, epsilon, n_cols, out):
    rms_norm(x, norm, epsilon, n_cols, out)


def normed(input_: Input, first: int, last: int, n_cols: int) -> np.ndarray:
    """float32 (last - first, n_cols): a normed input as its phase has it, of the step's tokens first..last."""
    out = np.empty((last - first, n_cols), np.float32)
    for t, row in enumerate(out, first):
        x = input_.x + 4 * n_cols * t
        _norm_row.ctypes(x, input_.norm, input_.epsilon, n_cols, row.ctypes.data)
    return out
