"""The row loops of the decode kernels, shared by all formats: rows of blocks times one activation record, or a few.

A format says how it decodes 256 weights at a time and multiplies them with a record's step, in float32 lanes whose sum
is the product. What is left of a row that is no multiple of 256 goes by single blocks of 32.
"""

from collections.abc import Callable
from types import FunctionType

from quant.block_format import GEMV, GEMV_FEW
from quant.gemv.activations import STEP_BYTES, steps_at
from quant.simd.floats import hsum, zero_f32x16
from quant.simd.memory import load_f32x16, load_i64, prefetch, prefetch_near, stack, store_f32, store_f32x16
from quant.target.jit import inline, kernel

MOST_FEW = 5  # tokens of one gemv_few, whose sums are kept in memory: a step's token with four drafted ones
AHEAD = 8192  # bytes between the weights in use and those on their way from RAM to L2
NEAR = 3456  # and those on their way to L1: behind arithmetic in the queues, loads come too late for that
_sums = stack(64 * MOST_FEW)


def specialize(template: Callable, name: str, **names: object) -> Callable:
    """A copy of the function `template`, called `name`, whose global names have these meanings.

    Numba caches it on disk, as it can't a closure over compiled functions.
    """
    copy = FunctionType(template.__code__, {**template.__globals__, **names}, name)
    copy.__qualname__ = name
    return copy


# What specialize() gives the two templates below; kernels() describes them.
STRIDE, TOGETHER = 256, 4
weights = add_step = add_block = None


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
    """What to prefetch while the weights at w are in use: addresses AHEAD and NEAR of it, or the last line's."""
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


def _gemv(w, n_rows, n_cols, record, out):
    n_steps, steps = n_cols // 256, record + steps_at(n_cols)
    block, last = w, prefetch_start(w, n_rows * (n_cols * STRIDE // 256))
    for r in range(n_rows):
        total = zero_f32x16()
        for s in range(0, n_steps // TOGETHER * TOGETHER, TOGETHER):
            addresses = later(block, last)
            for i in range(TOGETHER):
                prefetch_both(addresses, STRIDE * i, STRIDE * (i + 1))
                total = add_step(weights(block), steps + STEP_BYTES * (s + i), total)
                block += STRIDE
        for s in range(n_steps // TOGETHER * TOGETHER, n_steps):
            prefetch_both(later(block, last), 0, STRIDE)
            total = add_step(weights(block), steps + STEP_BYTES * s, total)
            block += STRIDE
        for group in range(8 * n_steps, n_cols // 32):
            prefetch_both(later(block, last), 0, STRIDE // 8)
            total = add_block(block, record, n_cols, group, total)
            block += STRIDE // 8
        store_f32(out + 4 * r, hsum(total))


def _gemv_few(w, n_rows, n_cols, records, outs, offset, n_tokens):
    n_steps, steps = n_cols // 256, steps_at(n_cols)
    block, sums, last = w, _sums(), prefetch_start(w, n_rows * (n_cols * STRIDE // 256))
    for r in range(n_rows):
        for t in range(n_tokens):
            store_f32x16(sums + 64 * t, zero_f32x16())
        for s in range(n_steps):
            prefetch_both(later(block, last), 0, STRIDE)
            decoded = weights(block)
            for t in range(n_tokens):
                step = load_i64(records + 8 * t) + steps + STEP_BYTES * s
                store_f32x16(sums + 64 * t, add_step(decoded, step, load_f32x16(sums + 64 * t)))
            block += STRIDE
        for group in range(8 * n_steps, n_cols // 32):
            prefetch_both(later(block, last), 0, STRIDE // 8)
            for t in range(n_tokens):
                total = add_block(block, load_i64(records + 8 * t), n_cols, group, load_f32x16(sums + 64 * t))
                store_f32x16(sums + 64 * t, total)
            block += STRIDE // 8
        for t in range(n_tokens):
            store_f32(load_i64(outs + 8 * t) + offset + 4 * r, hsum(load_f32x16(sums + 64 * t)))


@inline
def no_block(block, record, n_cols, group, total):
    """add_block of formats whose rows are multiples of 256."""
    return total


def kernels(
    name: str,
    stride: int,
    weights: Callable,
    add_step: Callable,
    add_block: Callable = no_block,
    together: int = 4,
):
    """gemv and gemv_few of a format.

    Args:
        name: of the format.
        stride: bytes of 256 weights.
        weights: inline (address) -> a tuple of vectors: 256 decoded weights.
        add_step: inline (weights, address of a record's step, total f32x16) -> total.
        add_block: inline (address, record, n_cols, group, total f32x16) -> total, for one block of 32.
        together: steps in one turn of gemv's loop, prefetched as one range: 4 unless they need too many registers.
    """
    names = {
        "STRIDE": stride, "TOGETHER": together, "weights": weights, "add_step": add_step, "add_block": add_block,
    }  # fmt: skip
    return (
        kernel(GEMV)(specialize(_gemv, f"gemv_{name}", **names)),
        kernel(GEMV_FEW)(specialize(_gemv_few, f"gemv_few_{name}", **names)),
    )
