"""A decode step's hyper-connections: the way into a sublayer and out of it, against formulas in float64.

Letters: T tokens, D width of a stream; streams are (T, 4, D).
"""

from __future__ import annotations

from contextlib import closing

import kernels
import numpy as np
import pytest
from kernels import floats

from quant.decode.linear import Input, rows_phase
from quant.decode.program import Program
from quant.decode.stream_rows import stream_products_phase, stream_rows_phase
from quant.decode.streams import N_WEIGHTS, Streams
from quant.errors import QuantError
from quant.threads.pool import Pool

pytestmark = pytest.mark.levels

EPSILON, NORM_EPSILON, ITERATIONS = 1e-6, 1e-6, 20
TOLERANCE = 3e-6  # sums of some hundred float32 products, 40 divisions by sums among them


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def way_in(x: np.ndarray, fn: np.ndarray, base: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, ...]:
    """A token's mix (D,), weights of the output (4,), and the old streams' (4, 4), of x (4, D)."""
    v = fn @ (x.ravel() / np.sqrt(np.mean(x**2) + NORM_EPSILON))
    into = sigmoid(v[:4] * scale[0] + base[:4]) + EPSILON
    out = 2 * sigmoid(v[4:8] * scale[1] + base[4:8])
    m = np.exp((v[8:] * scale[2] + base[8:]).reshape(4, 4))
    m = m / m.sum(1, keepdims=True) + EPSILON
    for i in range(ITERATIONS):
        m = m / (m.sum(1, keepdims=True) + EPSILON) if i else m
        m = m / (m.sum(0, keepdims=True) + EPSILON)
    return into @ x, out, m


class Sublayer:
    """x + W norm(x) of streams; D columns."""

    def __init__(self, width: int, type_: str = "F32"):
        rng = np.random.default_rng(width)
        self.width = width
        self.tokens, self.x = kernels.random_weight("F32", (1, 8, width), rng)
        self.fn, self.fn_values = kernels.random_weight(type_, (1, N_WEIGHTS, 4 * width), rng)
        self.w, self.w_values = kernels.random_weight("F32", (1, width, width), rng)
        self.base, self.norm = (rng.standard_normal(n).astype(np.float32) for n in (N_WEIGHTS, width))
        self.scale = np.array([0.1, 0.2, 0.3], np.float32)

    def run(self, n_workers: int, together: int, n_tokens: int = 8, depth: int = 2) -> np.ndarray:
        """float32 (T, 4, D): the streams after the same sublayer `depth` times."""
        with closing(Pool(n_workers)) as pool:
            program = Program(pool, self.tokens, np.ones(1), 1.0, 1, n_copies=4)
            streams = Streams(
                program.x, program.vector(4 * N_WEIGHTS), N_WEIGHTS, program.keep(self.base), program.keep(self.scale),
                EPSILON, NORM_EPSILON, ITERATIONS, program.vector(N_WEIGHTS),
            )  # fmt: skip
            mixed, y = program.vector(self.width), program.vector(self.width)
            for _ in range(depth):
                program.add(stream_products_phase(streams, self.fn, n_workers))
                input_ = Input(mixed, program.keep(self.norm), NORM_EPSILON, streams=streams)
                program.add(stream_rows_phase(input_, [(self.w, y)], n_workers))
                # What was kept is the input: that times W is the output once more.
                program.add(rows_phase(Input(mixed), [(self.w, y)], n_workers, into=streams))
            program.finish()
            x, rows = floats(program.x, together, 4, self.width), []
            for first in range(0, n_tokens, together):
                program.run(range(first, first + together), range(together), np.zeros(1, np.int64))
                rows.append(x.copy())
            return np.concatenate(rows)

    def expected(self, depth: int = 2) -> np.ndarray:
        """float64 (T, 4, D)."""
        states = np.repeat(self.x[0][:, None], 4, 1)
        for t, _ in np.ndindex(len(states), depth):
            x, out, m = way_in(states[t], self.fn_values[0], self.base.astype(float), self.scale.astype(float))
            normed = x / np.sqrt(np.mean(x**2) + NORM_EPSILON) * self.norm
            states[t] = out[:, None] * (self.w_values[0] @ normed) + m.T @ states[t]
        return states


@pytest.mark.parametrize(("width", "type_"), [(64, "F32"), (200, "F32"), (64, "F16")])
def test_a_sublayer(width: int, type_: str) -> None:
    layer = Sublayer(width, type_)
    found, expected = layer.run(2, 8), layer.expected()
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert np.abs(found[:, 0] - found[:, 1]).max() > 1e-2  # streams part
    for n_workers, together in [(1, 1), (3, 2)]:
        assert np.array_equal(layer.run(n_workers, together), found)


def test_weights_of_streams_are_floats() -> None:
    fn, _ = kernels.random_weight("Q8_0", (1, N_WEIGHTS, 256), np.random.default_rng(0))
    with pytest.raises(QuantError, match="weights of streams in Q8_0; they are read from F32, F16 or BF16"):
        stream_products_phase(Streams(0, 0, N_WEIGHTS, 0, 0, 0.0, 0.0, 1, 0), fn, 2)
