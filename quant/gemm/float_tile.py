"""A register tile: several rows times several tokens in float32, the inner loop of every matrix-matrix product.

One intrinsic emits the whole loop with its accumulators unrolled, which a Python loop over vector variables can't.
"""

from llvmlite import ir
from numba import types

from quant.simd.core import F32, I64, constant, define, load, store
from quant.simd.floats import emit_hsum
from quant.simd.register_tile import add_products, register_tile
from quant.target import isa
from quant.target.jit import inline

# Vectors of the machine's own width; accumulators and operands must fit its 32 (AVX-512) or 16 registers.
LANES = 16 if isa.has("avx512_vnni") else 8 if isa.has("avx2") else 4
ROWS = 4
TOKENS = 4 if isa.has("avx512_vnni") else 3
_VECTOR = ir.VectorType(F32, LANES)


def _tile(n_rows: int, n_tokens: int):
    """An intrinsic void(w, n_cols, inputs, outs, offset): outs[t][offset + 4*r] = w[r] . inputs[t], all float32.

    w: n_rows contiguous rows of n_cols, a multiple of 16. inputs, outs: addresses of n_tokens addresses.
    """

    def emit(builder, w, n_cols, inputs, outs, offset) -> None:
        rows = [builder.add(w, builder.mul(n_cols, I64(4 * r))) for r in range(n_rows)]
        tokens = [load(builder, builder.add(inputs, I64(8 * t)), I64) for t in range(n_tokens)]
        zero = constant(_VECTOR, 0.0)

        def add(index, totals):
            at = builder.mul(index, I64(4 * LANES))
            xs = [load(builder, builder.add(token, at), _VECTOR) for token in tokens]
            weights = (load(builder, builder.add(row, at), _VECTOR) for row in rows)
            return add_products(builder, totals, weights, xs)

        n_vectors = builder.udiv(n_cols, I64(LANES))
        totals = register_tile(builder, n_vectors, [[zero] * n_tokens for _ in rows], add)
        for t in range(n_tokens):
            out = builder.add(load(builder, builder.add(outs, I64(8 * t)), I64), offset)
            for r in range(n_rows):
                store(builder, builder.add(out, I64(4 * r)), emit_hsum(builder, totals[r][t]))

    return define(types.void, (types.int64,) * 5, emit)


_full, _one_token, _one_row, _single = _tile(ROWS, TOKENS), _tile(ROWS, 1), _tile(1, TOKENS), _tile(1, 1)


@inline
def multiply(w, n_rows, n_cols, n_tokens, inputs, outs, offset):
    """outs[t][offset + 4*r] = w[r] . inputs[t] for float32 rows w (n_rows, n_cols), n_cols a multiple of 16."""
    full_rows, full_tokens = n_rows // ROWS * ROWS, n_tokens // TOKENS * TOKENS
    for r in range(0, full_rows, ROWS):
        row, at = w + 4 * n_cols * r, offset + 4 * r
        for t in range(0, full_tokens, TOKENS):
            _full(row, n_cols, inputs + 8 * t, outs + 8 * t, at)
        for t in range(full_tokens, n_tokens):
            _one_token(row, n_cols, inputs + 8 * t, outs + 8 * t, at)
    for r in range(full_rows, n_rows):
        row, at = w + 4 * n_cols * r, offset + 4 * r
        for t in range(0, full_tokens, TOKENS):
            _one_row(row, n_cols, inputs + 8 * t, outs + 8 * t, at)
        for t in range(full_tokens, n_tokens):
            _single(row, n_cols, inputs + 8 * t, outs + 8 * t, at)
