"""Row loops of formats that decode two blocks of 256 weights at a time; those of all others are in plain.py."""

from collections.abc import Callable

from quant.batch import MAX_BATCH
from quant.block_format import GEMV, GEMV_BATCH
from quant.gemv.activations import K_BLOCK_BYTES, k_blocks_at
from quant.gemv.plain import later, prefetch_both, prefetch_start, specialize
from quant.simd.floats import hsum, zero_f32x16
from quant.simd.memory import load_f32x16, load_i64, stack, store_f32, store_f32x16
from quant.target.jit import kernel

_sums = stack(64 * MAX_BATCH)

# What specialize() gives the two templates below; kernels() describes them.
STRIDE = 256
weights = add_k_block = None


def _gemv(w, n_rows, n_cols, q8, out):
    n_k_blocks, k_blocks = n_cols // 256, q8 + k_blocks_at(n_cols)
    block, last = w, prefetch_start(w, n_rows * n_k_blocks * STRIDE)
    for r in range(n_rows):
        total = zero_f32x16()
        for b in range(0, n_k_blocks // 2 * 2, 2):
            prefetch_both(later(block, last), 0, 2 * STRIDE)
            first, second = weights(block, block + STRIDE)
            total = add_k_block(first, k_blocks + K_BLOCK_BYTES * b, total)
            total = add_k_block(second, k_blocks + K_BLOCK_BYTES * (b + 1), total)
            block += 2 * STRIDE
        if n_k_blocks % 2:
            prefetch_both(later(block, last), 0, STRIDE)
            first, _ = weights(block, block)
            total = add_k_block(first, k_blocks + K_BLOCK_BYTES * (n_k_blocks - 1), total)
            block += STRIDE
        store_f32(out + 4 * r, hsum(total))


def _gemv_batch(w, n_rows, n_cols, q8_rows, outs, offset, n_tokens):
    n_k_blocks, k_blocks = n_cols // 256, k_blocks_at(n_cols)
    block, sums, last = w, _sums(), prefetch_start(w, n_rows * n_k_blocks * STRIDE)
    for r in range(n_rows):
        for t in range(n_tokens):
            store_f32x16(sums + 64 * t, zero_f32x16())
        for b in range(0, n_k_blocks // 2 * 2, 2):
            prefetch_both(later(block, last), 0, 2 * STRIDE)
            first, second = weights(block, block + STRIDE)
            for t in range(n_tokens):
                k_block = load_i64(q8_rows + 8 * t) + k_blocks + K_BLOCK_BYTES * b
                total = add_k_block(first, k_block, load_f32x16(sums + 64 * t))
                store_f32x16(sums + 64 * t, add_k_block(second, k_block + K_BLOCK_BYTES, total))
            block += 2 * STRIDE
        if n_k_blocks % 2:
            prefetch_both(later(block, last), 0, STRIDE)
            first, _ = weights(block, block)
            for t in range(n_tokens):
                k_block = load_i64(q8_rows + 8 * t) + k_blocks + K_BLOCK_BYTES * (n_k_blocks - 1)
                store_f32x16(sums + 64 * t, add_k_block(first, k_block, load_f32x16(sums + 64 * t)))
            block += STRIDE
        for t in range(n_tokens):
            store_f32(load_i64(outs + 8 * t) + offset + 4 * r, hsum(load_f32x16(sums + 64 * t)))


def kernels(name: str, stride: int, weights: Callable, add_k_block: Callable):
    """gemv and gemv_batch of a format.

    Args:
        name: of the format.
        stride: bytes of 256 weights.
        weights: inline (address, address) -> two tuples of vectors: 256 decoded weights each.
        add_k_block: inline (one of them, address of a k-block, total f32x16) -> total.
    """
    names = {"STRIDE": stride, "weights": weights, "add_k_block": add_k_block}
    return (
        kernel(GEMV)(specialize(_gemv, f"gemv_{name}", **names)),
        kernel(GEMV_BATCH)(specialize(_gemv_batch, f"gemv_batch_{name}", **names)),
    )
