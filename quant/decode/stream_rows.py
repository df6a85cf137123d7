"""Phases of matrix rows that DeepSeek-V4 alone has: weights of streams, rows times a mix of streams, grouped rows."""

from dataclasses import replace
from typing import Any

from quant.decode.linear import (
    ROWS,
    Input,
    first_token,
    item_rows,
    multiply,
    multiply_at,
    quantize,
    rows_phase,
    set_token,
    token_tables,
)
from quant.decode.parts import Part
from quant.decode.program import HEADER, NOTHING, PHASE, Phase, tokens_of
from quant.decode.streams import N_STREAMS, Streams, sublayer_input
from quant.errors import QuantError
from quant.gemv.activations import q8_bytes
from quant.matrix import MATRIX, QuantMatrix, row_address
from quant.simd.struct import address, i64, struct
from quant.simd.vectors import rms_norm
from quant.target.jit import kernel

# ---- streams times the rows that weigh them --------------------------------------------------------------------------

PRODUCTS = struct(
    "StreamProducts",
    phase=PHASE,
    matrix=MATRIX,  # of floats
    x=address,  # float32 (MOST_TOKENS, N_STREAMS, width)
    width=i64,
    stream_bytes=i64,  # of a row's part
    n_rows=i64,
    item_rows=i64,
    out=address,  # float32 (MOST_TOKENS, N_STREAMS, n_rows)
)


@kernel("void(int64, int64, int64)")
def _run_products(phase, item, work):
    """Some rows' parts times one stream: narrow matrices make few rows, so their columns are divided too."""
    a, tables = PRODUCTS(phase), token_tables()
    stream, first = item % N_STREAMS, item // N_STREAMS * a.item_rows
    for row in range(first, min(first + a.item_rows, a.n_rows)):
        for t in range(tokens_of(a)):
            i = N_STREAMS * t + stream
            set_token(tables, t, a.x + 4 * a.width * i, a.out + 4 * (a.n_rows * i + row))
        w = row_address(a.matrix, 0, row) + a.stream_bytes * stream
        multiply_at(a.matrix, w, 1, a.width, tables, tokens_of(a))


def stream_products_phase(streams: Streams, fn: QuantMatrix, n_workers: int) -> Phase:
    """The streams times fn (n_weights, 4 D), stream by stream.

    Raises QuantError unless fn's values are floats.
    """
    width = fn.n_cols // N_STREAMS
    if fn.format.integer or fn.n_cols % (N_STREAMS * fn.format.block):
        raise QuantError(f"weights of streams in {fn.format.name}; they are read from F32, F16 or BF16")
    rows = -(-fn.n_rows // n_workers)
    arguments = PRODUCTS.pack(
        phase=HEADER, matrix=fn.struct, x=streams.x, width=width, stream_bytes=fn.row_bytes // N_STREAMS,
        n_rows=fn.n_rows, item_rows=rows, out=streams.products,
    )  # fmt: skip
    return Phase(NOTHING, _run_products, N_STREAMS * -(-fn.n_rows // rows), arguments, 0)


# ---- rows times a mix of streams -------------------------------------------------------------------------------------


@kernel("void(int64, int64)")
def _prepare_streams(phase, work):
    a = ROWS(phase)
    for t in range(first_token(a), tokens_of(a)):
        own = work + a.token_bytes * t
        sublayer_input(a.streams, t, a.n_cols, own, own + a.temporary)
        rms_norm(own, a.second, a.epsilon, a.n_cols, own)
        quantize(a, own)


def stream_rows_phase(input_: Input, matrices: list[tuple[QuantMatrix, int]], n_workers: int, **options: Any) -> Phase:
    """As rows_phase, of an input with streams."""
    return replace(rows_phase(input_, matrices, n_workers, **options), prepare=_prepare_streams)


# ---- groups of rows, each times a vector of its own ------------------------------------------------------------------

GROUPS = struct(
    "Groups",
    phase=PHASE,
    matrix=MATRIX,
    n_groups=i64,
    n_rows=i64,  # of a group
    n_cols=i64,
    item_rows=i64,
    q8=address,  # rows (MOST_TOKENS, n_groups), q8_bytes apart
    q8_bytes=i64,
    out=address,  # float32 (MOST_TOKENS, n_groups, n_rows)
)


@kernel("void(int64, int64, int64)")
def _run_groups(phase, item, work):
    a, tables = GROUPS(phase), token_tables()
    per_group = (a.n_rows + a.item_rows - 1) // a.item_rows
    group, first = item // per_group, item % per_group * a.item_rows
    for t in range(tokens_of(a)):
        i = a.n_groups * t + group
        set_token(tables, t, a.q8 + a.q8_bytes * i, a.out + 4 * (a.n_rows * i + first))
    multiply(a.matrix, group, first, min(a.item_rows, a.n_rows - first), a.n_cols, tables, tokens_of(a))


def groups_phase(matrix: QuantMatrix, q8: int, out: int, n_workers: int) -> Phase:
    """Each group of rows of a matrix (G, R, C) times a q8 row of its own: float32 (MOST_TOKENS, G, R) at `out`.

    q8: address of rows (MOST_TOKENS, G), which phases before have written.
    """
    rows, *_ = item_rows([matrix] * matrix.n_groups, n_workers)
    arguments = GROUPS.pack(
        phase=HEADER, matrix=matrix.struct, n_groups=matrix.n_groups, n_rows=matrix.n_rows, n_cols=matrix.n_cols,
        item_rows=rows, q8=q8, q8_bytes=q8_bytes(matrix.n_cols), out=out,
    )  # fmt: skip
    per_group, parts = -(-matrix.n_rows // rows), [Part(matrix, rows)]
    return Phase(NOTHING, _run_groups, matrix.n_groups * per_group, arguments, 0, period=per_group, weights=parts)
