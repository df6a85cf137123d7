"""Float32 rows in memory: RMS norm, SwiGLU, scaled sums and f16 rows, 16 lanes at a time, any length.

Addresses are int64; nothing is aligned or padded unless a function says so.
"""

import math

import numpy as np

from quant.simd.floats import exp, fma, fma_f32, hsum, zero_f32x16
from quant.simd.memory import load_f16, load_f16x16, load_f32, load_f32x16, store_f32, store_f32x16
from quant.target.jit import inline


@inline
def silu(x):
    """x * sigmoid(x), a vector."""
    return x / (exp(-x) + 1)


@inline
def copy(x, n, out):
    """out = x, float32 (n,)."""
    for i in range(0, n // 16 * 16, 16):
        store_f32x16(out + 4 * i, load_f32x16(x + 4 * i))
    for i in range(n // 16 * 16, n):
        store_f32(out + 4 * i, load_f32(x + 4 * i))


@inline
def rms_factor(x, epsilon, n):
    """1 / sqrt(mean(x^2) + epsilon) of float32 (n,)."""
    whole = n // 16 * 16
    squares = zero_f32x16()
    for i in range(0, whole, 16):
        v = load_f32x16(x + 4 * i)
        squares = fma(v, v, squares)
    total = hsum(squares)
    for i in range(whole, n):
        total += load_f32(x + 4 * i) * load_f32(x + 4 * i)
    return np.float32(1.0) / np.float32(math.sqrt(total / np.float32(n) + epsilon))


@inline
def weighted(x, factor, weight, n, out):
    """out = x * factor * weight, all float32 (n,) but the factor; out may be x."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        v = load_f32x16(x + 4 * i) * factor
        store_f32x16(out + 4 * i, v * load_f32x16(weight + 4 * i))
    for i in range(whole, n):
        store_f32(out + 4 * i, load_f32(x + 4 * i) * factor * load_f32(weight + 4 * i))


@inline
def layer_norm(x, weight, bias, epsilon, n, out):
    """out = (x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias, all float32 (n,); out may be x."""
    total = np.float32(0.0)
    for i in range(n):
        total += load_f32(x + 4 * i)
    mean, squares = total / np.float32(n), np.float32(0.0)
    for i in range(n):
        v = load_f32(x + 4 * i) - mean
        squares += v * v
    factor = np.float32(1.0) / np.float32(math.sqrt(squares / np.float32(n) + epsilon))
    for i in range(n):
        v = (load_f32(x + 4 * i) - mean) * factor
        store_f32(out + 4 * i, v * load_f32(weight + 4 * i) + load_f32(bias + 4 * i))


@inline
def rms_norm(x, weight, epsilon, n, out):
    """out = x / sqrt(mean(x^2) + epsilon) * weight, all float32 (n,); out may be x."""
    weighted(x, rms_factor(x, epsilon, n), weight, n, out)


@inline
def swiglu(gate, up, n, out):
    """out = silu(gate) * up, all float32 (n,); out may be either."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        g, u = load_f32x16(gate + 4 * i), load_f32x16(up + 4 * i)
        store_f32x16(out + 4 * i, silu(g) * u)
    for i in range(whole, n):
        g = load_f32(gate + 4 * i)
        store_f32(out + 4 * i, g / (np.float32(1.0) + math.exp(-g)) * load_f32(up + 4 * i))


@inline
def scale_add(factor, x, n, out):
    """out += factor * x, float32 (n,): rounded once, so that where a piece of a row ends changes nothing."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        store_f32x16(out + 4 * i, fma(np.float32(factor), load_f32x16(x + 4 * i), load_f32x16(out + 4 * i)))
    for i in range(whole, n):
        store_f32(out + 4 * i, fma_f32(np.float32(factor), load_f32(x + 4 * i), load_f32(out + 4 * i)))


@inline
def scale(factor, n, out):
    """out *= factor, float32 (n,)."""
    for i in range(0, n // 16 * 16, 16):
        store_f32x16(out + 4 * i, factor * load_f32x16(out + 4 * i))
    for i in range(n // 16 * 16, n):
        store_f32(out + 4 * i, factor * load_f32(out + 4 * i))


@inline
def expand_f16(row, n, padded, out):
    """float32 (padded,) of an f16 row of n values, zeros behind them."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        store_f32x16(out + 4 * i, load_f16x16(row + 2 * i))
    for i in range(whole, n):
        store_f32(out + 4 * i, load_f16(row + 2 * i))
    for i in range(n, padded):
        store_f32(out + 4 * i, np.float32(0.0))
