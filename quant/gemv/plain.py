"""The row loops of the decode kernels, shared by all formats: rows of blocks times one q8 row, or a small batch.

A format says how it decodes 256 weights at a time and multiplies them with a k-block of a q8 row, in float32 lanes
whose sum is the product. What is left of a row that is no multiple of 256 goes by single blocks.
"""

from collections.abc import Callable
from types import FunctionType

from quant.batch import MAX_BATCH
from quant.block_format import GEMV, GEMV_BATCH
from quant.gemv.activations import K_BLOCK_BYTES, k_blocks_at
from quant.simd.floats import hsum, zero_f32x16
from quant.simd.memory import load_f32x16, load_i64, prefetch, prefetch_near, stack, store_f32, store_f32x16
from quant.target.jit import inline, kernel

AHEAD = 8192  # bytes between the weights in use and those on their way from RAM to L2
NEAR = 3456  # and those on their way to L1: behind arithmetic in the queues, loads come too late for that
_sums = stack(64 * MAX_BATCH)


def specialize(template: Callable, name: str, **names: object) -> Callable:
    """A copy of the function `template`, called `name`, whose global names have these meanings.

    Numba caches it on disk, as it can't a closure over compiled functions.
    """
    copy = FunctionType(template.__code__, {**template.__globals__, **names}, name)
    copy.__qualname__ = name
    return copy


# What specialize() gives the two templates below; kernels() describes them.
STRIDE, TOGETHER, SINGLE = 256, 4, 32
weights = add_k_block = add_block = None


@inline
def prefetch_start(w, n_bytes):
    """Ask for the first of n_bytes of weights at w; returns the address of the last line, for later().

    What follows the last row is another worker's. Both together read units of 64-128 KB 3-5% faster.
    """
    for byte in range(0, min(AHEAD, n_bytes), 64):
        prefetch(w + byte)
    return w + n_bytes - 64


@inline
def later(w, last):
    """The two addresses to prefetch while the weights at w are in use: AHEAD and NEAR of w, but not beyond `last`."""
    return min(w + AHEAD, last), min(w + NEAR, last)


@inline
def prefetch_both(addresses, first, end):
    """Ask for lines of both: counted from there, those that begin in first..end.

    A few at a time, between the arithmetic: in a burst they hold the buffers that loads need (docs/lab-notes.md).
    """
    ahead, near = addresses
    for byte in range((first + 63) // 64 * 64, (end + 63) // 64 * 64, 64):
        prefetch(ahead + byte)
        prefetch_near(near + byte)


def _gemv(w, n_rows, n_cols, q8, out):
    n_k_blocks, k_blocks = n_cols // 256, q8 + k_blocks_at(n_cols)
    block, last = w, prefetch_start(w, n_rows * (n_cols * STRIDE // 256))
    for r in range(n_rows):
        total = zero_f32x16()
        for b in range(0, n_k_blocks // TOGETHER * TOGETHER, TOGETHER):
            addresses = later(block, last)
            for j in range(TOGETHER):
                prefetch_both(addresses, STRIDE * j, STRIDE * (j + 1))
                total = add_k_block(weights(block), k_blocks + K_BLOCK_BYTES * (b + j), total)
                block += STRIDE
        for b in range(n_k_blocks // TOGETHER * TOGETHER, n_k_blocks):
            prefetch_both(later(block, last), 0, STRIDE)
            total = add_k_block(weights(block), k_blocks + K_BLOCK_BYTES * b, total)
            block += STRIDE
        for i in range(256 // SINGLE * n_k_blocks, n_cols // SINGLE):
            prefetch_both(later(block, last), 0, STRIDE * SINGLE // 256)
            total = add_block(block, q8, n_cols, i, total)
            block += STRIDE * SINGLE // 256
        store_f32(out + 4 * r, hsum(total))


def _gemv_batch(w, n_rows, n_cols, q8_rows, outs, offset, n_tokens):
    n_k_blocks, k_blocks = n_cols // 256, k_blocks_at(n_cols)
    block, sums, last = w, _sums(), prefetch_start(w, n_rows * (n_cols * STRIDE // 256))
    for r in range(n_rows):
        for t in range(n_tokens):
            store_f32x16(sums + 64 * t, zero_f32x16())
        for b in range(n_k_blocks):
            prefetch_both(later(block, last), 0, STRIDE)
            decoded = weights(block)
            for t in range(n_tokens):
                k_block = load_i64(q8_rows + 8 * t) + k_blocks + K_BLOCK_BYTES * b
                store_f32x16(sums + 64 * t, add_k_block(decoded, k_block, load_f32x16(sums + 64 * t)))
            block += STRIDE
        for i in range(256 // SINGLE * n_k_blocks, n_cols // SINGLE):
            prefetch_both(later(block, last), 0, STRIDE * SINGLE // 256)
            for t in range(n_tokens):
                total = add_block(block, load_i64(q8_rows + 8 * t), n_cols, i, load_f32x16(sums + 64 * t))
                store_f32x16(sums + 64 * t, total)
            block += STRIDE * SINGLE // 256
        for t in range(n_tokens):
            store_f32(load_i64(outs + 8 * t) + offset + 4 * r, hsum(load_f32x16(sums + 64 * t)))


@inline
def no_block(block, q8, n_cols, i, total):
    """add_block of formats whose rows are multiples of 256."""
    return total


def kernels(
    name: str,
    stride: int,
    weights: Callable,
    add_k_block: Callable,
    add_block: Callable = no_block,
    together: int = 4,
    single: int = 32,
):
    """gemv and gemv_batch of a format.

    Args:
        name: of the format.
        stride: bytes of 256 weights.
        weights: inline (address) -> a tuple of vectors: 256 decoded weights.
        add_k_block: inline (weights, address of a k-block, total f32x16) -> total.
        add_block: inline (address, q8 row, n_cols, i, total f32x16) -> total, for block i of `single` columns.
        together: k-blocks in one turn of gemv's loop, prefetched as one range: 4 unless they need too many registers.
        single: weights of a block, where rows need not be multiples of 256.
    """
    names = {
        "STRIDE": stride, "TOGETHER": together, "SINGLE": single,
        "weights": weights, "add_k_block": add_k_block, "add_block": add_block,
    }  # fmt: skip
    return (
        kernel(GEMV)(specialize(_gemv, f"gemv_{name}", **names)),
        kernel(GEMV_BATCH)(specialize(_gemv_batch, f"gemv_batch_{name}", **names)),
    )
