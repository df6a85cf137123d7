"""The row loops of the decode kernels, shared by all formats: rows of blocks times one q8 row, or a small batch.

A format says how it decodes 256 weights at a time and multiplies them with a k-block of a q8 row, in float32 lanes
whose sum is the product. What is left of a row that is no multiple of 256 goes by single blocks.
"""

from collections.abc import Callable
from types import FunctionType

from quant.batch import MAX_BATCH
from quant.block_format import GEMV, GEMV_BATCH
from quant.gemv.activations import K_BLOCK_BYTES, k_blocks_at
from quant.simd.floats import hsum, zero_f32x8, zero_f32x16
from quant.simd.memory import (
    load_f32x8,
    load_f32x16,
    load_i64,
    prefetch,
    prefetch_near,
    stack,
    store_f32,
    store_f32x8,
    store_f32x16,
)
from quant.target import tuning
from quant.target.jit import inline, kernel
from quant.target.kernel import Kernel

AHEAD = 8192  # bytes between the weights in use and those on their way from RAM to L2
NEAR_OF_ROW = 768  # and those on their way to L1, of each of four rows; of one row NEAR, which depends on the CPU
_sums = stack(64 * MAX_BATCH)


def specialize(template: Callable, name: str, **names: object) -> Callable:
    """A copy of the function `template`, called `name`, whose global names have these meanings.

    Numba caches it on disk, as it can't a closure over compiled functions.
    """
    copy = FunctionType(template.__code__, {**template.__globals__, **names}, name)
    copy.__qualname__ = name
    return copy


# What specialize() gives the two templates below; kernels() describes them. NEAR: bytes between the weights in use and
# those on their way to L1: behind arithmetic in the queues, loads come too late for that.
STRIDE, TOGETHER, SINGLE, NEAR = 256, 4, 32, 0
weights = add_k_block = add_block = dots = add_dots = None
zero_total = load_total = store_total = None


@inline
def prefetch_start(w, n_bytes):
    """Ask for the first of n_bytes of weights at w; returns the address of the last line, for later().

    What follows the last row is another worker's. Both together read units of 64-128 KB 3-5% faster.
    """
    for byte in range(0, min(AHEAD, n_bytes), 64):
        prefetch(w + byte)
    return w + n_bytes - 64


@inline
def later(w, last, near):
    """The two addresses to prefetch while the weights at w are in use: AHEAD and near of w, but not beyond `last`."""
    return min(w + AHEAD, last), min(w + near, last)


@inline
def prefetch_both(addresses, first, end):
    """Ask for lines of both: counted from there, those that begin in first..end.

    A few at a time, between the arithmetic: in a burst they hold the buffers that loads need (docs/lab-notes.md).
    """
    ahead, near = addresses
    for byte in range((first + 63) // 64 * 64, (end + 63) // 64 * 64, 64):
        prefetch(ahead + byte)
        prefetch_near(near + byte)


@inline
def prefetch_four(rows, at, row_bytes, last, stride):
    """Ask for `stride` bytes of each of four rows, while those at `at` are in use."""
    ahead, near = min(rows[0] + 3 * row_bytes + AHEAD + 4 * at, last), at + NEAR_OF_ROW
    if near >= row_bytes:  # so far on in the next four rows
        near += 3 * row_bytes
    for byte in range(0, 4 * stride, 64):
        prefetch(ahead + byte)
    for byte in range(0, stride, 64):
        prefetch_near(rows[0] + near + byte)
        prefetch_near(rows[1] + near + byte)
        prefetch_near(rows[2] + near + byte)
        prefetch_near(rows[3] + near + byte)


def with_near(kernel_: Kernel, near: int) -> Kernel:
    """A row loop with another NEAR, to measure it."""
    return kernel(kernel_.signature)(specialize(kernel_.function, f"{kernel_.__name__}_near_{near}", NEAR=near))


def _gemv(w, n_rows, n_cols, q8, out):
    n_k_blocks, k_blocks = n_cols // 256, q8 + k_blocks_at(n_cols)
    block, last = w, prefetch_start(w, n_rows * (n_cols * STRIDE // 256))
    for r in range(n_rows):
        total = zero_f32x16()
        for b in range(0, n_k_blocks // TOGETHER * TOGETHER, TOGETHER):
            addresses = later(block, last, NEAR)
            for j in range(TOGETHER):
                prefetch_both(addresses, STRIDE * j, STRIDE * (j + 1))
                total = add_k_block(weights(block), k_blocks + K_BLOCK_BYTES * (b + j), total)
                block += STRIDE
        for b in range(n_k_blocks // TOGETHER * TOGETHER, n_k_blocks):
            prefetch_both(later(block, last, NEAR), 0, STRIDE)
            total = add_k_block(weights(block), k_blocks + K_BLOCK_BYTES * b, total)
            block += STRIDE
        for i in range(256 // SINGLE * n_k_blocks, n_cols // SINGLE):
            prefetch_both(later(block, last, NEAR), 0, STRIDE * SINGLE // 256)
            total = add_block(block, q8, n_cols, i, total)
            block += STRIDE * SINGLE // 256
        store_f32(out + 4 * r, hsum(total))


def _gemv_four_rows(w, n_rows, n_cols, q8, out):
    """gemv of four_rows(): a load of the k-block serves all four, and none waits for another's products."""
    n_k_blocks, k_blocks, row_bytes = n_cols // 256, q8 + k_blocks_at(n_cols), n_cols * STRIDE // 256
    last = prefetch_start(w, n_rows * row_bytes)
    for r in range(0, n_rows, 4):
        # Behind the last row it is computed again.
        r1, r2, r3 = min(r + 1, n_rows - 1), min(r + 2, n_rows - 1), min(r + 3, n_rows - 1)
        b0, b1, b2, b3 = w + row_bytes * r, w + row_bytes * r1, w + row_bytes * r2, w + row_bytes * r3
        t0, t1, t2, t3 = zero_total(), zero_total(), zero_total(), zero_total()
        for b in range(n_k_blocks):
            k_block, at = k_blocks + K_BLOCK_BYTES * b, STRIDE * b
            prefetch_four((b0, b1, b2, b3), at, row_bytes, last, STRIDE)
            w0, w1, w2, w3 = weights(b0 + at), weights(b1 + at), weights(b2 + at), weights(b3 + at)
            d0, d1, d2, d3 = dots(w0, k_block), dots(w1, k_block), dots(w2, k_block), dots(w3, k_block)
            t0 = add_dots(d0, w0, k_block, t0)
            t1 = add_dots(d1, w1, k_block, t1)
            t2 = add_dots(d2, w2, k_block, t2)
            t3 = add_dots(d3, w3, k_block, t3)
        for i in range(256 // SINGLE * n_k_blocks, n_cols // SINGLE):
            at = STRIDE * SINGLE // 256 * i
            t0 = add_block(b0 + at, q8, n_cols, i, t0)
            t1 = add_block(b1 + at, q8, n_cols, i, t1)
            t2 = add_block(b2 + at, q8, n_cols, i, t2)
            t3 = add_block(b3 + at, q8, n_cols, i, t3)
        store_f32(out + 4 * r, hsum(t0))
        store_f32(out + 4 * r1, hsum(t1))
        store_f32(out + 4 * r2, hsum(t2))
        store_f32(out + 4 * r3, hsum(t3))


def _gemv_batch(w, n_rows, n_cols, q8_rows, outs, offset, n_tokens):
    n_k_blocks, k_blocks = n_cols // 256, k_blocks_at(n_cols)
    block, sums, last = w, _sums(), prefetch_start(w, n_rows * (n_cols * STRIDE // 256))
    for r in range(n_rows):
        for t in range(n_tokens):
            store_total(sums + 64 * t, zero_total())
        for b in range(n_k_blocks):
            prefetch_both(later(block, last, NEAR), 0, STRIDE)
            decoded = weights(block)
            for t in range(n_tokens):
                k_block = load_i64(q8_rows + 8 * t) + k_blocks + K_BLOCK_BYTES * b
                store_total(sums + 64 * t, add_k_block(decoded, k_block, load_total(sums + 64 * t)))
            block += STRIDE
        for i in range(256 // SINGLE * n_k_blocks, n_cols // SINGLE):
            prefetch_both(later(block, last, NEAR), 0, STRIDE * SINGLE // 256)
            for t in range(n_tokens):
                total = add_block(block, load_i64(q8_rows + 8 * t), n_cols, i, load_total(sums + 64 * t))
                store_total(sums + 64 * t, total)
            block += STRIDE * SINGLE // 256
        for t in range(n_tokens):
            store_f32(load_i64(outs + 8 * t) + offset + 4 * r, hsum(load_total(sums + 64 * t)))


@inline
def no_block(block, q8, n_cols, i, total):
    """add_block of formats whose rows are multiples of 256."""
    return total


_TOTALS_16 = {"zero_total": zero_f32x16, "load_total": load_f32x16, "store_total": store_f32x16}
_TOTALS_8 = {"zero_total": zero_f32x8, "load_total": load_f32x8, "store_total": store_f32x8}


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
    return _specialized(name, _gemv, names | _TOTALS_16)


def four_rows(
    name: str,
    stride: int,
    weights: Callable,
    dots: Callable,
    add_dots: Callable,
    add_block: Callable = no_block,
    single: int = 256,
):
    """The same where gemv takes four rows at a time: for few bits a weight, when what rows share counts.

    Args:
        dots: inline (weights, address of a k-block) -> integer products.
        add_dots: inline (dots, weights, address of a k-block, total f32x8) -> total.
        name, stride, weights, add_block, single: as kernels(), but for totals of f32x8.
    """

    @inline
    def add_k_block(weights, k_block, total):
        return add_dots(dots(weights, k_block), weights, k_block, total)

    names = {
        "STRIDE": stride, "SINGLE": single, "weights": weights, "dots": dots, "add_dots": add_dots,
        "add_k_block": add_k_block, "add_block": add_block,
    }  # fmt: skip
    return _specialized(name, _gemv_four_rows, names | _TOTALS_8)


def _specialized(name: str, gemv: Callable, names: dict[str, object]):
    return row_loops(name, gemv, _gemv_batch, names)


def row_loops(name: str, gemv: Callable, gemv_batch: Callable, names: dict[str, object]):
    """Kernels of two templates, with this CPU's NEAR."""
    chosen = tuning.found().tuning
    return (
        kernel(GEMV)(specialize(gemv, f"gemv_{name}", **names, NEAR=chosen.near_one)),
        kernel(GEMV_BATCH)(specialize(gemv_batch, f"gemv_batch_{name}", **names, NEAR=chosen.near_few)),
    )
