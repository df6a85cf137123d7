"""F32, F16 and BF16: plain rows of numbers. Products and sums in float32, activations as they are.

Source: IEEE 754; bfloat16 is the upper half of a float32.
"""

import numpy as np

from quant.formats import EXPAND, GEMV, Format
from quant.jit import inline, kernel
from quant.simd import (
    bits_to_f32,
    fma_f32x16,
    load_bf16x16,
    load_f16,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_u16,
    store_f32,
    store_f32x16,
    sum_f32x16,
    zero_f32x16,
)


@inline
def _load_bf16(address):
    return bits_to_f32(load_u16(address) << 16)


@kernel(GEMV)
def _f32_gemv(w, n_rows, n_cols, record, out):
    for r in range(n_rows):
        row = w + 4 * n_cols * r
        total = zero_f32x16()
        for i in range(0, n_cols - 15, 16):
            total = fma_f32x16(load_f32x16(row + 4 * i), load_f32x16(record + 4 * i), total)
        tail = np.float32(0.0)
        for i in range(n_cols // 16 * 16, n_cols):
            tail += load_f32(row + 4 * i) * load_f32(record + 4 * i)
        store_f32(out + 4 * r, sum_f32x16(total) + tail)


@kernel(GEMV)
def _f16_gemv(w, n_rows, n_cols, record, out):
    for r in range(n_rows):
        row = w + 2 * n_cols * r
        total = zero_f32x16()
        for i in range(0, n_cols - 15, 16):
            total = fma_f32x16(load_f16x16(row + 2 * i), load_f32x16(record + 4 * i), total)
        tail = np.float32(0.0)
        for i in range(n_cols // 16 * 16, n_cols):
            tail += load_f16(row + 2 * i) * load_f32(record + 4 * i)
        store_f32(out + 4 * r, sum_f32x16(total) + tail)


@kernel(GEMV)
def _bf16_gemv(w, n_rows, n_cols, record, out):
    for r in range(n_rows):
        row = w + 2 * n_cols * r
        total = zero_f32x16()
        for i in range(0, n_cols - 15, 16):
            total = fma_f32x16(load_bf16x16(row + 2 * i), load_f32x16(record + 4 * i), total)
        tail = np.float32(0.0)
        for i in range(n_cols // 16 * 16, n_cols):
            tail += _load_bf16(row + 2 * i) * load_f32(record + 4 * i)
        store_f32(out + 4 * r, sum_f32x16(total) + tail)


@kernel(EXPAND)
def _f32_expand(w, n_blocks, out):
    for i in range(n_blocks):
        store_f32(out + 4 * i, load_f32(w + 4 * i))


@kernel(EXPAND)
def _f16_expand(w, n_blocks, out):
    for i in range(0, n_blocks - 15, 16):
        store_f32x16(out + 4 * i, load_f16x16(w + 2 * i))
    for i in range(n_blocks // 16 * 16, n_blocks):
        store_f32(out + 4 * i, load_f16(w + 2 * i))


@kernel(EXPAND)
def _bf16_expand(w, n_blocks, out):
    for i in range(0, n_blocks - 15, 16):
        store_f32x16(out + 4 * i, load_bf16x16(w + 2 * i))
    for i in range(n_blocks // 16 * 16, n_blocks):
        store_f32(out + 4 * i, _load_bf16(w + 2 * i))


def _unpack_bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


F32 = Format("F32", 1, 4, False, lambda b: b.view(np.float32), _f32_gemv.address, _f32_expand.address)
F16 = Format(
    "F16", 1, 2, False, lambda b: b.view(np.float16).astype(np.float32), _f16_gemv.address, _f16_expand.address
)
BF16 = Format("BF16", 1, 2, False, _unpack_bf16, _bf16_gemv.address, _bf16_expand.address)
