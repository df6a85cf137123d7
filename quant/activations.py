"""Activations as the kernels read them: one record a token, float32 and 8 bits side by side.

A record of K columns: x f32[K] @0 | q i8[K] @4K | d f32[K/32] @5K | s f32[K/32] @5K+K/8, s = d * sum(q) of the 32.
Each 32 columns have a scale of their own in float32; llama.cpp's Q8_0 keeps it in 16 bits and its Q8_K shares one
among 256, so this rounding is at least as fine as either. For integer formats x holds the rounded values, d*q, so
that a matrix product over x and an integer one over q differ in float rounding alone.
"""

import numpy as np

from quant.jit import inline
from quant.simd import (
    i8_to_f32,
    largest_magnitude,
    load_f32,
    load_f32x32,
    mul_f32x32,
    round_to_i8,
    splat_f32x32,
    store_f32,
    store_f32x32,
    store_i8x32,
    sum_i8,
)

GROUP = 32  # columns that share a scale


def record_bytes(n_cols: int) -> int:
    """Bytes of one record, a multiple of 64."""
    return (5 * n_cols + 8 * (n_cols // GROUP) + 63) // 64 * 64


def round_ref(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reference: float32 (..., K) -> q int8 (..., K), d float32 (..., K/32)."""
    groups = x.reshape(*x.shape[:-1], -1, GROUP).astype(np.float32)
    largest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    q = np.rint(groups * inverse).astype(np.int8)
    return q.reshape(x.shape), (largest * np.float32(1 / 127))[..., 0]


@inline
def write_record(x, first, last, n_cols, integer, record):
    """Fill columns first..last of a record from float32 at x; both multiples of 32 if the format is integer."""
    if not integer:
        for i in range(first, last):
            store_f32(record + 4 * i, load_f32(x + 4 * i))
        return
    scales = record + 5 * n_cols
    sums = scales + 4 * (n_cols // 32)
    for group in range(first // 32, last // 32):
        values = load_f32x32(x + 128 * group)
        largest = largest_magnitude(values)
        inverse = np.float32(127.0) / largest if largest > 0 else np.float32(0.0)
        d = largest * np.float32(1 / 127)
        q = round_to_i8(mul_f32x32(values, splat_f32x32(inverse)))
        store_f32x32(record + 128 * group, mul_f32x32(i8_to_f32(q), splat_f32x32(d)))
        store_i8x32(record + 4 * n_cols + 32 * group, q)
        store_f32(scales + 4 * group, d)
        store_f32(sums + 4 * group, d * np.float32(sum_i8(q)))
