"""Hyper-connections: a token's state is four streams; a sublayer reads one mix of them and writes another back.

Where x + f(norm x) has one vector, here fn (24, 4 D) times the normed streams gives 24 weights: of each stream in the
sublayer's input; of the output in each stream; and 4 x 4, made doubly stochastic, by which old streams go over into new
ones. Workers make the weights for themselves (sublayer_input); an item of the phase that reads them keeps them for the
phase that writes the streams, column by column and in place (write_streams).
Source: transformers 5.24, models/deepseek_v4, class DeepseekV4HyperConnection (arXiv 2512.24880).
"""

import math
from dataclasses import dataclass

import numpy as np

from quant.simd.floats import exp, fma, fma_f32, maximum, picked
from quant.simd.memory import load_f32, load_f32x16, store_f32, store_f32x16
from quant.simd.struct import address, f32, i64, pointer, struct
from quant.simd.vectors import rms_factor
from quant.target.jit import inline

N_STREAMS = 4
N_WEIGHTS = 2 * N_STREAMS + N_STREAMS**2  # of a sublayer; the head has the first N_STREAMS
WEIGHTS_BYTES = 4 * N_WEIGHTS  # of a token
# Order of a token's weights: input (4,), output (4,), then [old stream][new stream].

STREAMS = struct(
    "Streams",
    x=address,  # float32 (MOST_TOKENS, N_STREAMS, width); 0 for none
    products=address,  # float32 (MOST_TOKENS, N_STREAMS, n_weights): each stream's columns of fn times it
    n_weights=i64,  # N_WEIGHTS, or N_STREAMS in the head
    base=address,  # float32 (n_weights,)
    scale=pointer(f32),  # of input, output and the 4 x 4
    epsilon=f32,
    norm_epsilon=f32,
    iterations=i64,
    weights=address,  # (MOST_TOKENS, N_WEIGHTS): kept
)


@dataclass(frozen=True)
class Streams:
    """The streams and one sublayer's way into and out of them, or the head's; T: MOST_TOKENS.

    Attributes:
        x: address of float32 (T, 4, D).
        products: address of float32 (T, 4, n_weights), where stream_products_phase leaves them.
        base, scale: addresses of float32 (n_weights,) and (3,), or (1,).
        epsilon, iterations: of the 4 x 4 weights' normalisation.
        norm_epsilon: of the streams' norm.
        weights: address of float32 (T, N_WEIGHTS), which the phases of a sublayer share.
    """

    x: int
    products: int
    n_weights: int
    base: int
    scale: int
    epsilon: float
    norm_epsilon: float
    iterations: int
    weights: int

    @property
    def struct(self) -> np.ndarray:
        """As phases see it."""
        return STREAMS.pack(**vars(self))


NO_STREAMS = STREAMS.zeros()


_pick_1, _pick_2, _pick_4, _pick_8 = (picked([i ^ n for i in range(16)]) for n in (1, 2, 4, 8))


@inline
def _row_sums(v):
    """In each lane the sum of its row of 4 x 4."""
    pair = v + _pick_1(v)
    return pair + _pick_2(pair)


@inline
def _column_sums(v):
    pair = v + _pick_4(v)
    return pair + _pick_8(pair)


@inline
def _doubly_stochastic(v, epsilon, iterations):
    """Sinkhorn and Knopp: the rows' softmax, then columns and rows divided by their sums in turn."""
    pair = maximum(v, _pick_1(v))
    v = exp(v - maximum(pair, _pick_2(pair)))
    v = v / _row_sums(v) + epsilon
    v = v / (_column_sums(v) + epsilon)
    for _ in range(iterations - 1):
        v = v / (_row_sums(v) + epsilon)
        v = v / (_column_sums(v) + epsilon)
    return v


@inline
def _set_weights(s, t, factor, weights):
    """Token t's weights, float32 (n_weights,), from its products with the streams; factor: of the streams' norm."""
    row, gates = 4 * s.n_weights, 8 * N_STREAMS
    products = s.products + N_STREAMS * row * t
    for i in range(0, min(row, gates), 4):
        at = products + i
        value = factor * (load_f32(at) + load_f32(at + row) + load_f32(at + 2 * row) + load_f32(at + 3 * row))
        value = value * s.scale[i // (4 * N_STREAMS)] + load_f32(s.base + i)
        gate = np.float32(1.0) / (np.float32(1.0) + math.exp(-value))
        store_f32(weights + i, gate + s.epsilon if i < 4 * N_STREAMS else np.float32(2.0) * gate)
    if row > gates:
        at = products + gates
        v = load_f32x16(at) + load_f32x16(at + row) + load_f32x16(at + 2 * row) + load_f32x16(at + 3 * row)
        v = v * factor * s.scale[2] + load_f32x16(s.base + gates)
        store_f32x16(weights + gates, _doubly_stochastic(v, s.epsilon, s.iterations))


@inline
def sublayer_input(s, t, width, out, weights):
    """out = the mix of token t's streams that the sublayer reads, float32 (width,); its weights, (n_weights,)."""
    x = s.x + 4 * N_STREAMS * width * t
    _set_weights(s, t, rms_factor(x, s.norm_epsilon, N_STREAMS * width), weights)
    first, second = load_f32(weights), load_f32(weights + 4)
    third, fourth = load_f32(weights + 8), load_f32(weights + 12)
    whole, row = width // 16 * 16, 4 * width
    for i in range(0, 4 * whole, 64):
        v = load_f32x16(x + i) * first
        v = fma(load_f32x16(x + row + i), second, v)
        v = fma(load_f32x16(x + 2 * row + i), third, v)
        store_f32x16(out + i, fma(load_f32x16(x + 3 * row + i), fourth, v))
    for i in range(4 * whole, row, 4):
        v = load_f32(x + i) * first + load_f32(x + row + i) * second
        store_f32(out + i, v + load_f32(x + 2 * row + i) * third + load_f32(x + 3 * row + i) * fourth)


@inline
def write_streams(s, t, first, n, width, y):
    """Columns first.. of token t's streams, after the sublayer's output there, float32 (n,)."""
    weights, row = s.weights + WEIGHTS_BYTES * t, 4 * width
    x, whole = s.x + N_STREAMS * row * t + 4 * first, n // 16 * 16
    for i in range(0, 4 * whole, 64):
        value = load_f32x16(y + i)
        a, b = load_f32x16(x + i), load_f32x16(x + row + i)
        c, d = load_f32x16(x + 2 * row + i), load_f32x16(x + 3 * row + i)
        for j in range(N_STREAMS):
            w = weights + 4 * j
            v = fma(b, load_f32(w + 48), fma(a, load_f32(w + 32), value * load_f32(w + 16)))
            store_f32x16(x + row * j + i, fma(d, load_f32(w + 80), fma(c, load_f32(w + 64), v)))
    for i in range(4 * whole, 4 * n, 4):
        value = load_f32(y + i)
        p, q, r, z = load_f32(x + i), load_f32(x + row + i), load_f32(x + 2 * row + i), load_f32(x + 3 * row + i)
        for j in range(N_STREAMS):
            w = weights + 4 * j
            v = fma_f32(q, load_f32(w + 48), fma_f32(p, load_f32(w + 32), value * load_f32(w + 16)))
            store_f32(x + row * j + i, fma_f32(z, load_f32(w + 80), fma_f32(r, load_f32(w + 64), v)))
