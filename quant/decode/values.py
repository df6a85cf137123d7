"""The phase behind attention: heads' results, of splits combined in order.

MLA moves them out of latent space with v_b. DeepSeek-V4, whose values are keys, rotates them back by the token's
position, and quantises them for a matrix whose groups of rows read some heads' results each.
"""

import math
from dataclasses import dataclass

import numpy as np

from quant.decode.attention import PARTIAL, SEEN, VALUES_AT, Heads, seen_by
from quant.decode.linear import multiply, set_token, token_tables
from quant.decode.parts import GroupPart
from quant.decode.program import (
    HEADER,
    MAX_SPLITS,
    MOST_TOKENS,
    NOTHING,
    PHASE,
    Phase,
    padded,
    splits_of,
    tokens_of,
)
from quant.decode.queries import rotations_of, turn
from quant.errors import QuantError
from quant.gemv.activations import Q8_BLOCK, q8_bytes, write_q8
from quant.matrix import MATRIX, QuantMatrix
from quant.simd.memory import store_f32
from quant.simd.struct import address, boolean, f32, i64, pointer, struct
from quant.simd.vectors import scale, scale_add
from quant.target.jit import inline, kernel

_NEVER = float("-inf")

PROJECT_VALUES = struct(
    "ProjectValues",
    phase=PHASE,
    partials=address,
    partial_bytes=i64,
    n_heads=i64,
    width=i64,  # of a head's combined result
    seen=SEEN,
    sinks=pointer(f32),  # (n_heads,)
    has_sinks=boolean,
    out=address,  # float32 (MOST_TOKENS, n_heads, out_width)
    out_width=i64,
    n_unrotated=i64,  # last values of a result that are rotated back by the token's position
    first_frequency=i64,
    q8_rows=address,  # (MOST_TOKENS, n_heads / per_row): results of so many heads, quantised; or 0
    per_row=i64,
    q8_row_bytes=i64,
    rows_integer=boolean,
    q8=i64,  # where in a token's work memory, behind the combined result
    token_bytes=i64,
    has_v_b=boolean,
    v_b_integer=boolean,
    v_b=MATRIX,
)


@inline
def _combine(a, head, token, out):
    """A head's result float32 (width,): the splits of the token's context, in order."""
    n_splits, stride = splits_of(seen_by(a, token)), a.partial_bytes * a.n_heads
    first = a.partials + a.partial_bytes * (a.n_heads * MAX_SPLITS * token + head)
    largest = np.float32(_NEVER)
    for s in range(n_splits):
        largest = max(largest, PARTIAL(first + stride * s).maximum)
    for i in range(a.width):
        store_f32(out + 4 * i, np.float32(0.0))
    total = np.float32(0.0)
    if a.has_sinks:
        largest = max(largest, a.sinks[head])
        total = np.float32(math.exp(a.sinks[head] - largest))
    for s in range(n_splits):
        partial = PARTIAL(first + stride * s)
        factor = np.float32(math.exp(partial.maximum - largest))
        total += factor * partial.sum
        scale_add(factor, first + stride * s + VALUES_AT, a.width, out)
    scale(np.float32(1.0) / total, a.width, out)


@inline
def _finish(a, head, t, out):
    """A head's result rotated back, and its part of a q8 row."""
    width, n_rope = a.width, a.n_unrotated
    if n_rope > 0:
        x = out + 4 * (width - n_rope)
        turn(x, rotations_of(a, t, a.first_frequency), n_rope, np.float32(-1.0), x, 2, 1)
    if a.q8_rows != 0:
        column, q8 = head % a.per_row * width, a.n_heads // a.per_row * t + head // a.per_row
        row = a.q8_rows + a.q8_row_bytes * q8
        write_q8(out - 4 * column, column, column + width, a.per_row * width, a.rows_integer, row)


@kernel("void(int64, int64, int64)")
def _run_project_values(phase, item, work):
    """Item h: head h's results and, for MLA, moved out of latent space by v_b."""
    a = PROJECT_VALUES(phase)
    tables, n_tokens = token_tables(), tokens_of(a)
    for t in range(n_tokens):
        out = a.out + 4 * a.out_width * (a.n_heads * t + item)
        if not a.has_v_b:
            _combine(a, item, t, out)
            _finish(a, item, t, out)
        else:
            own = work + a.token_bytes * t
            _combine(a, item, t, own)
            write_q8(own, 0, a.width, a.width, a.v_b_integer, own + a.q8)
            set_token(tables, t, own + a.q8, out)
    if a.has_v_b:
        multiply(a.v_b, item, 0, a.out_width, a.width, tables, n_tokens)


@dataclass(frozen=True)
class GroupedOutput:
    """Results that are rotated back, and quantised for a matrix whose groups of rows read those of some heads each.

    Attributes:
        n_rope: the last values of a result, which are rotated by the program's frequencies from first_frequency on.
        matrix: (G, rows, H * V / G).
        q8: address of q8 rows (MOST_TOKENS, G).
    """

    n_rope: int
    first_frequency: int
    matrix: QuantMatrix
    q8: int


def project_values_phase(
    heads: Heads, partials: int, v_b: QuantMatrix | None, out: int, output: GroupedOutput | None = None
) -> Phase:
    """Heads' results float32 (MOST_TOKENS, H, V) at `out`: splits combined, times v_b (H, V, C) where there is one.

    Without one they may become q8 rows of a grouped output's.

    Raises QuantError if heads share 32 columns of one.
    """
    if output is not None and output.matrix.format.integer and heads.value_width % Q8_BLOCK:
        raise QuantError(f"{output.matrix.format.name} over heads of {heads.value_width} values: a multiple of 32")
    grouped = {"n_unrotated": 0, "first_frequency": 0, "q8_rows": 0, "per_row": 1, "q8_row_bytes": 0}
    if output is not None:
        grouped = {
            "n_unrotated": output.n_rope, "first_frequency": output.first_frequency, "q8_rows": output.q8,
            "per_row": heads.n_heads // output.matrix.n_groups, "q8_row_bytes": q8_bytes(output.matrix.n_cols),
        }  # fmt: skip
    width = heads.value_width
    q8, token_bytes = padded(4 * width), padded(4 * width) + q8_bytes(width)
    arguments = PROJECT_VALUES.pack(
        phase=HEADER, partials=partials, partial_bytes=heads.partial_bytes, n_heads=heads.n_heads, width=width,
        seen=heads.seen, sinks=heads.sinks, has_sinks=heads.sinks != 0,
        out=out, out_width=v_b.n_rows if v_b else width, **grouped,
        rows_integer=bool(output and output.matrix.format.integer), q8=q8, token_bytes=token_bytes,
        has_v_b=v_b is not None, v_b_integer=bool(v_b and v_b.format.integer),
        v_b=v_b.struct if v_b else MATRIX.zeros(),
    )  # fmt: skip
    parts = [GroupPart(v_b)] if v_b else []
    return Phase(NOTHING, _run_project_values, heads.n_heads, arguments, token_bytes * MOST_TOKENS, weights=parts)
