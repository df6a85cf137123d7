"""Float32 vectors in memory: RMS norm, SwiGLU, exponentials and f16 rows, 16 lanes at a time, any length.

Addresses are int64; nothing is aligned or padded unless a function says so.
"""

import math

import numpy as np
from llvmlite import ir

from quant.simd.core import (
    I32,
    call,
    constant,
    define,
    f32x16,
    fma_f32x16,
    load,
    load_f16,
    load_f16x16,
    load_f32,
    load_f32x16,
    mul_f32x16,
    shuffle,
    splat_f32x16,
    store_f32,
    store_f32x16,
    sum_f32x16,
    types,
    zero_f32x16,
)
from quant.target.jit import inline

_LOG2_E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is ln 2; the first has 9 bits, so n * high is exact
# exp(r) = 1 + r + r^2 * p(r) on |r| <= ln(2)/2, relative error 2e-8: the polynomial of Cephes' expf (S. Moshier).
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def _exp(builder, x):
    """e^x to float32 rounding; -infinity gives 0, above 88 the value at 88, NaN stays NaN."""
    vector = x.type

    def fma(a, b, c):
        return call(builder, "llvm.fma.v16f32", vector, a, b, c)

    low = builder.fcmp_ordered("<", x, constant(vector, -87.0))
    bounded = builder.select(builder.fcmp_ordered(">", x, constant(vector, 88.0)), constant(vector, 88.0), x)
    bounded = builder.select(low, constant(vector, -87.0), bounded)
    n = call(builder, "llvm.rint.v16f32", vector, builder.fmul(bounded, constant(vector, _LOG2_E)))
    r = fma(n, constant(vector, -_LN2_LOW), fma(n, constant(vector, -_LN2_HIGH), bounded))
    p = constant(vector, _EXP[0])
    for coefficient in _EXP[1:]:
        p = fma(p, r, constant(vector, coefficient))
    y = builder.fadd(fma(p, builder.fmul(r, r), r), constant(vector, 1.0))
    integers = ir.VectorType(I32, 16)
    # NaN has no integer: 0 then, and the sum below brings it back.
    n = builder.select(builder.fcmp_ordered("ord", n, n), n, constant(vector, 0.0))
    power = builder.shl(builder.add(builder.fptosi(n, integers), constant(integers, 127)), constant(integers, 23))
    return builder.select(low, constant(vector, 0.0), builder.fmul(y, builder.bitcast(power, vector)))


def _max(builder, v):
    """The largest lane, but for NaN."""
    while v.type.count > 1:
        half = v.type.count // 2
        low, high = shuffle(builder, v, None, range(half)), shuffle(builder, v, None, range(half, 2 * half))
        v = call(builder, f"llvm.maxnum.v{half}f32", low.type, low, high)
    return builder.extract_element(v, I32(0))


def _silu_times(builder, gate, up):
    """silu(gate) * up."""
    denominator = builder.fadd(_exp(builder, builder.fneg(gate)), constant(gate.type, 1.0))
    return builder.fmul(builder.fdiv(gate, denominator), up)


load_f64 = define(types.float64, (types.int64,), lambda b, p: load(b, p, ir.DoubleType()))
exp_f32x16 = define(f32x16, (f32x16,), _exp)
add_f32x16 = define(f32x16, (f32x16, f32x16), lambda b, x, y: b.fadd(x, y))
maximum_f32x16 = define(f32x16, (f32x16, f32x16), lambda b, x, y: call(b, "llvm.maxnum.v16f32", x.type, x, y))
max_f32x16 = define(types.float32, (f32x16,), _max)
silu_times_f32x16 = define(f32x16, (f32x16, f32x16), _silu_times)


@inline
def copy(x, n, out):
    """out = x, float32 (n,)."""
    for i in range(0, n // 16 * 16, 16):
        store_f32x16(out + 4 * i, load_f32x16(x + 4 * i))
    for i in range(n // 16 * 16, n):
        store_f32(out + 4 * i, load_f32(x + 4 * i))


@inline
def rms_norm(x, weight, epsilon, n, out):
    """out = x / sqrt(mean(x^2) + epsilon) * weight, all float32 (n,); out may be x."""
    whole = n // 16 * 16
    squares = zero_f32x16()
    for i in range(0, whole, 16):
        v = load_f32x16(x + 4 * i)
        squares = fma_f32x16(v, v, squares)
    total = sum_f32x16(squares)
    for i in range(whole, n):
        total += load_f32(x + 4 * i) * load_f32(x + 4 * i)
    factor = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(n) + epsilon))
    for i in range(0, whole, 16):
        v = mul_f32x16(load_f32x16(x + 4 * i), splat_f32x16(factor))
        store_f32x16(out + 4 * i, mul_f32x16(v, load_f32x16(weight + 4 * i)))
    for i in range(whole, n):
        store_f32(out + 4 * i, load_f32(x + 4 * i) * factor * load_f32(weight + 4 * i))


@inline
def swiglu(gate, up, n, out):
    """out = silu(gate) * up, all float32 (n,); out may be either."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        store_f32x16(out + 4 * i, silu_times_f32x16(load_f32x16(gate + 4 * i), load_f32x16(up + 4 * i)))
    for i in range(whole, n):
        g = load_f32(gate + 4 * i)
        store_f32(out + 4 * i, g / (np.float32(1.0) + math.exp(-g)) * load_f32(up + 4 * i))


@inline
def scale_add(factor, x, n, out):
    """out += factor * x, float32 (n,)."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        store_f32x16(out + 4 * i, fma_f32x16(splat_f32x16(factor), load_f32x16(x + 4 * i), load_f32x16(out + 4 * i)))
    for i in range(whole, n):
        store_f32(out + 4 * i, load_f32(out + 4 * i) + factor * load_f32(x + 4 * i))


@inline
def scale(factor, n, out):
    """out *= factor, float32 (n,)."""
    for i in range(0, n // 16 * 16, 16):
        store_f32x16(out + 4 * i, mul_f32x16(splat_f32x16(factor), load_f32x16(out + 4 * i)))
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
