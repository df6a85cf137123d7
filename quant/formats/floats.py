"""F32, F16 and BF16: plain rows of numbers. Products and sums in float32, activations as they are.

Quantising is a copy, or rounding to nearest, ties to even, as ggml rounds.
Source: IEEE 754; bfloat16 is the upper half of a float32.
"""

from collections.abc import Callable

import numpy as np

from quant.batch import MAX_BATCH
from quant.block_format import EXPAND, LARGEST_BF16, QUANTIZE, Format
from quant.gemv.plain import later, prefetch_both, prefetch_start, row_loops
from quant.simd.floats import fma, hsum, zero_f32x16
from quant.simd.memory import (
    bits_to_f32,
    load_bf16x16,
    load_f16,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i64,
    load_u16,
    stack,
    store_bf16,
    store_bf16x16,
    store_f16,
    store_f16x16,
    store_f32,
    store_f32x16,
)
from quant.target.jit import inline, kernel

_TURN = 256  # columns that each of a few tokens takes in turn, its sums in registers
_sums = stack(128 * MAX_BATCH)


@inline
def _load_bf16(address):
    return bits_to_f32(load_u16(address) << 16)


# What specialize() gives the two templates below; _kernels() describes them.
SIZE, NEAR = 4, 0
load_16 = load_1 = None


def _gemv(w, n_rows, n_cols, q8, out):
    last = prefetch_start(w, SIZE * n_cols * n_rows)
    for r in range(n_rows):
        row = w + SIZE * n_cols * r
        even, odd = zero_f32x16(), zero_f32x16()
        for i in range(0, n_cols - 31, 32):
            prefetch_both(later(row + SIZE * i, last, NEAR), 0, 32 * SIZE)
            even = fma(load_16(row + SIZE * i), load_f32x16(q8 + 4 * i), even)
            odd = fma(load_16(row + SIZE * (i + 16)), load_f32x16(q8 + 4 * (i + 16)), odd)
        tail = np.float32(0.0)
        for i in range(n_cols // 32 * 32, n_cols):
            tail += load_1(row + SIZE * i) * load_f32(q8 + 4 * i)
        store_f32(out + 4 * r, hsum(even) + hsum(odd) + tail)


def _gemv_batch(w, n_rows, n_cols, q8_rows, outs, offset, n_tokens):
    sums, last_line = _sums(), prefetch_start(w, SIZE * n_cols * n_rows)
    for r in range(n_rows):
        row = w + SIZE * n_cols * r
        for t in range(2 * n_tokens):
            store_f32x16(sums + 64 * t, zero_f32x16())
        for first in range(0, n_cols // 32 * 32, _TURN):
            last = min(first + _TURN, n_cols // 32 * 32)
            prefetch_both(later(row + SIZE * first, last_line, NEAR), 0, _TURN * SIZE)
            for t in range(n_tokens):
                x, own = load_i64(q8_rows + 8 * t), sums + 128 * t
                even, odd = load_f32x16(own), load_f32x16(own + 64)
                for i in range(first, last, 32):
                    even = fma(load_16(row + SIZE * i), load_f32x16(x + 4 * i), even)
                    odd = fma(load_16(row + SIZE * (i + 16)), load_f32x16(x + 4 * (i + 16)), odd)
                store_f32x16(own, even)
                store_f32x16(own + 64, odd)
        for t in range(n_tokens):
            tail = np.float32(0.0)
            for i in range(n_cols // 32 * 32, n_cols):
                tail += load_1(row + SIZE * i) * load_f32(load_i64(q8_rows + 8 * t) + 4 * i)
            total = hsum(load_f32x16(sums + 128 * t)) + hsum(load_f32x16(sums + 128 * t + 64)) + tail
            store_f32(load_i64(outs + 8 * t) + offset + 4 * r, total)


def _kernels(name: str, size: int, load_16: Callable, load_1: Callable):
    """gemv and gemv_batch of a format with `size` bytes a number, that these two load as float32."""
    names = {"SIZE": size, "load_16": load_16, "load_1": load_1}
    return row_loops(name, _gemv, _gemv_batch, names)


_f32_gemv, _f32_gemv_batch = _kernels("F32", 4, load_f32x16, load_f32)
_f16_gemv, _f16_gemv_batch = _kernels("F16", 2, load_f16x16, load_f16)
_bf16_gemv, _bf16_gemv_batch = _kernels("BF16", 2, load_bf16x16, _load_bf16)


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


# ---- quantising ------------------------------------------------------------------------------------------------------


@kernel(QUANTIZE)
def _f32_quantize(x, importance, n_blocks, out, scratch):
    for i in range(0, n_blocks - 15, 16):
        store_f32x16(out + 4 * i, load_f32x16(x + 4 * i))
    for i in range(n_blocks // 16 * 16, n_blocks):
        store_f32(out + 4 * i, load_f32(x + 4 * i))


@kernel(QUANTIZE)
def _f16_quantize(x, importance, n_blocks, out, scratch):
    for i in range(0, n_blocks - 15, 16):
        store_f16x16(out + 2 * i, load_f32x16(x + 4 * i))
    for i in range(n_blocks // 16 * 16, n_blocks):
        store_f16(out + 2 * i, load_f32(x + 4 * i))


@kernel(QUANTIZE)
def _bf16_quantize(x, importance, n_blocks, out, scratch):
    for i in range(0, n_blocks - 15, 16):
        store_bf16x16(out + 2 * i, load_f32x16(x + 4 * i))
    for i in range(n_blocks // 16 * 16, n_blocks):
        store_bf16(out + 2 * i, load_f32(x + 4 * i))


F32 = Format(
    "F32",
    1,
    np.dtype("<f4"),
    False,
    lambda b: b.view(np.float32),
    _f32_gemv,
    _f32_gemv_batch,
    _f32_expand,
    quantize=_f32_quantize,
    largest=float(np.finfo(np.float32).max),
)
F16 = Format(
    "F16",
    1,
    np.dtype("<f2"),
    False,
    lambda b: b.view(np.float16).astype(np.float32),
    _f16_gemv,
    _f16_gemv_batch,
    _f16_expand,
    quantize=_f16_quantize,
)
BF16 = Format(
    "BF16",
    1,
    np.dtype("<u2"),
    False,
    _unpack_bf16,
    _bf16_gemv,
    _bf16_gemv_batch,
    _bf16_expand,
    quantize=_bf16_quantize,
    largest=LARGEST_BF16,
)
