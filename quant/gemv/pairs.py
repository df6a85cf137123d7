"""Row loops of formats that decode two rows' blocks together, four rows at a time; those of all others are in plain.py.

Decoded bytes of both rows lie side by side, so that one lookup serves both; the two pairs share loads of activations.
"""

from collections.abc import Callable

from quant.batch import MAX_BATCH
from quant.block_format import GEMV, GEMV_BATCH
from quant.gemv.activations import K_BLOCK_BYTES, k_blocks_at
from quant.gemv.plain import prefetch_four, prefetch_start, specialize
from quant.simd.floats import first_8, hsum, last_8, zero_f32x16
from quant.simd.memory import load_f32x16, load_i64, stack, store_f32, store_f32x16
from quant.target.jit import inline, kernel

_sums = stack(256 * MAX_BATCH)

# ---- what a pair of rows adds up: float lanes of each ----------------------------------------------------------------


@inline
def _zero_halves():
    return zero_f32x16()


@inline
def _halves(total):
    return hsum(first_8(total)), hsum(last_8(total))


@inline
def _zero_two():
    return zero_f32x16(), zero_f32x16()


@inline
def _load_two(at):
    return load_f32x16(at), load_f32x16(at + 64)


@inline
def _store_two(at, total):
    store_f32x16(at, total[0])
    store_f32x16(at + 64, total[1])


@inline
def _two(total):
    return hsum(total[0]), hsum(total[1])


# Rows are the halves of one vector, or have a vector each.
HALVES = {"zero": _zero_halves, "load_total": load_f32x16, "store_total": store_f32x16, "sums_of": _halves}
TWO = {"zero": _zero_two, "load_total": _load_two, "store_total": _store_two, "sums_of": _two}

# ---- loops -----------------------------------------------------------------------------------------------------------

# What specialize() gives the two templates below; kernels() describes them.
STRIDE = 256
weights = add_k_block = None
zero = load_total = store_total = sums_of = None


def _gemv(w, n_rows, n_cols, q8, out):
    n_k_blocks, k_blocks, row_bytes = n_cols // 256, q8 + k_blocks_at(n_cols), n_cols // 256 * STRIDE
    sums, last = _sums(), prefetch_start(w, n_rows * row_bytes)
    for r in range(0, n_rows, 4):
        # Behind the last row it is computed again.
        r1, r2, r3 = min(r + 1, n_rows - 1), min(r + 2, n_rows - 1), min(r + 3, n_rows - 1)
        b0, b1, b2, b3 = w + row_bytes * r, w + row_bytes * r1, w + row_bytes * r2, w + row_bytes * r3
        store_total(sums, zero())
        store_total(sums + 128, zero())
        for b in range(n_k_blocks):
            k_block, at = k_blocks + K_BLOCK_BYTES * b, STRIDE * b
            prefetch_four((b0, b1, b2, b3), at, row_bytes, last, STRIDE)
            decoded = weights(b0 + at, b1 + at, b2 + at, b3 + at)
            store_total(sums, add_k_block(decoded[0], k_block, load_total(sums)))
            store_total(sums + 128, add_k_block(decoded[1], k_block, load_total(sums + 128)))
        s0, s1 = sums_of(load_total(sums))
        s2, s3 = sums_of(load_total(sums + 128))
        store_f32(out + 4 * r, s0)
        store_f32(out + 4 * r1, s1)
        store_f32(out + 4 * r2, s2)
        store_f32(out + 4 * r3, s3)


def _gemv_batch(w, n_rows, n_cols, q8_rows, outs, offset, n_tokens):
    n_k_blocks, k_blocks, row_bytes = n_cols // 256, k_blocks_at(n_cols), n_cols // 256 * STRIDE
    sums, last = _sums(), prefetch_start(w, n_rows * row_bytes)
    for r in range(0, n_rows, 4):
        r1, r2, r3 = min(r + 1, n_rows - 1), min(r + 2, n_rows - 1), min(r + 3, n_rows - 1)
        b0, b1, b2, b3 = w + row_bytes * r, w + row_bytes * r1, w + row_bytes * r2, w + row_bytes * r3
        for t in range(2 * n_tokens):
            store_total(sums + 128 * t, zero())
        for b in range(n_k_blocks):
            at = STRIDE * b
            prefetch_four((b0, b1, b2, b3), at, row_bytes, last, STRIDE)
            decoded = weights(b0 + at, b1 + at, b2 + at, b3 + at)
            for t in range(n_tokens):
                k_block, to = load_i64(q8_rows + 8 * t) + k_blocks + K_BLOCK_BYTES * b, sums + 256 * t
                store_total(to, add_k_block(decoded[0], k_block, load_total(to)))
                store_total(to + 128, add_k_block(decoded[1], k_block, load_total(to + 128)))
        for t in range(n_tokens):
            out = load_i64(outs + 8 * t) + offset
            s0, s1 = sums_of(load_total(sums + 256 * t))
            s2, s3 = sums_of(load_total(sums + 256 * t + 128))
            store_f32(out + 4 * r, s0)
            store_f32(out + 4 * r1, s1)
            store_f32(out + 4 * r2, s2)
            store_f32(out + 4 * r3, s3)


def kernels(name: str, stride: int, weights: Callable, add_k_block: Callable, totals: dict[str, Callable]):
    """gemv and gemv_batch of a format.

    Args:
        name: of the format.
        stride: bytes of 256 weights.
        weights: inline (four addresses) -> two tuples of vectors: 256 decoded weights of each of two rows.
        add_k_block: inline (one of them, address of a k-block, total of two rows) -> total.
        totals: HALVES or TWO.
    """
    names = {"STRIDE": stride, "weights": weights, "add_k_block": add_k_block, **totals}
    return (
        kernel(GEMV)(specialize(_gemv, f"gemv_{name}", **names)),
        kernel(GEMV_BATCH)(specialize(_gemv_batch, f"gemv_batch_{name}", **names)),
    )
