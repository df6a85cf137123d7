"""Routed experts as C functions with a given choice, called by foreign threads, against quant.ops.experts.run."""

from __future__ import annotations

import ctypes
import threading
from contextlib import closing

import kernels
import numpy as np
import pytest

from quant.decode.host_node import ExpertNodes
from quant.decode.program import MOST_TOKENS
from quant.errors import QuantError
from quant.matrix import ExpertMatrices
from quant.ops import experts
from quant.simd.memory import load_i64
from quant.target.jit import kernel
from quant.threads.pool import Pool, dispatch

HIDDEN, TOP_K = 64, 3


class Layers:
    """Random experts of some layers, and the buffers that their nodes share."""

    def __init__(self, pool: Pool, *shapes: tuple[str, int, int], top_k: int = TOP_K) -> None:
        """shapes: type, experts, inner."""
        rng = np.random.default_rng(len(shapes))
        self.pool, self.top_k, self.layers = pool, top_k, []
        for type_, n_experts, inner in shapes:
            shape, down_shape = (n_experts, inner, HIDDEN), (n_experts, HIDDEN, inner)
            matrices = [kernels.random_weight(type_, s, rng)[0] for s in (shape, shape, down_shape)]
            self.layers.append(ExpertMatrices(*matrices))
        self.x = rng.standard_normal((MOST_TOKENS, HIDDEN)).astype(np.float32) / np.float32(np.sqrt(HIDDEN))
        self.ids = np.zeros((MOST_TOKENS, top_k), np.int64)
        self.weights = rng.random((MOST_TOKENS, top_k)).astype(np.float32)
        self.out = np.full((MOST_TOKENS, HIDDEN), np.nan, np.float32)
        buffers = (array.ctypes.data for array in (self.x, self.ids, self.weights, self.out))
        self.nodes = ExpertNodes(pool, self.layers, top_k, *buffers)

    def choose(self, rng: np.random.Generator, layer: int, here: float) -> None:
        """A choice of which the fraction `here` is of this layer."""
        n_experts = self.layers[layer].gate.n_groups
        self.ids[:] = [rng.permutation(n_experts)[: self.top_k] for _ in range(MOST_TOKENS)]
        self.ids[rng.random(self.ids.shape) >= here] = -1

    def call(self, layer: int, n_tokens: int) -> None:
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.nodes.function)
        with self.pool.exclusive():
            function(self.nodes.argument(layer, n_tokens))

    def expected(self, layer: int, n_tokens: int) -> np.ndarray:
        out = np.full((n_tokens, HIDDEN), np.nan, np.float32)
        ids, weights = self.ids[:n_tokens].copy(), self.weights[:n_tokens].copy()
        experts.run(self.pool, self.layers[layer], self.x.ctypes.data, ids, weights, out.ctypes.data)
        return out


def assert_close(found: np.ndarray, expected: np.ndarray, integer: bool) -> None:
    # Float32 sums in another order; where that tips an 8-bit rounding of `inner`, one step of 1/127 in one of 32 terms.
    tolerance = 2e-3 if integer else 2**-20
    assert np.abs(found - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-9)


@pytest.mark.parametrize("here", [1.0, 0.5, 0.0], ids=["all here", "half", "none"])
@pytest.mark.parametrize("n_tokens", range(1, MOST_TOKENS + 1))
@pytest.mark.parametrize("type_", ["F32", "Q8_0"])
def test_nodes_are_experts_run(pool: Pool, type_: str, n_tokens: int, here: float) -> None:
    """Tokens that are not there, and what was in `out`, change nothing."""
    layers, rng = Layers(pool, (type_, 8, 32)), np.random.default_rng(n_tokens)
    for _ in range(5):
        layers.choose(rng, 0, here)
        layers.out[:] = np.nan
        layers.call(0, n_tokens)
        assert_close(layers.out[:n_tokens], layers.expected(0, n_tokens), type_ != "F32")
        assert np.isnan(layers.out[n_tokens:]).all()


@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (5, 5), (160, 6), (384, 8)])
def test_any_number_of_experts(pool: Pool, n_experts: int, top_k: int) -> None:
    layers, rng = Layers(pool, ("F32", n_experts, 16), top_k=top_k), np.random.default_rng(0)
    layers.choose(rng, 0, 0.8)
    layers.call(0, MOST_TOKENS)
    assert_close(layers.out, layers.expected(0, MOST_TOKENS), False)


def test_layers_of_different_shapes_share_buffers(pool: Pool) -> None:
    layers, rng = Layers(pool, ("F32", 8, 32), ("Q8_0", 4, 96), ("Q4_0", 16, 64)), np.random.default_rng(1)
    for _ in range(5):
        for index in (0, 1, 2):
            layers.choose(rng, index, 0.7)
            layers.call(index, 1 + index)
            assert_close(layers.out[: 1 + index], layers.expected(index, 1 + index), index > 0)


def test_ids_of_no_expert_are_left_out(pool: Pool) -> None:
    """Whatever is in the buffer, no memory outside of the experts is read."""
    layers = Layers(pool, ("F32", 8, 32))
    layers.ids[:5] = [[3, 8, -1], [2**62, -(2**63), 7], [0, 1, 2], [9, 9, 9], [5, 384, 5]]
    layers.call(0, 5)
    found = layers.out[:5].copy()
    layers.ids[(layers.ids < 0) | (layers.ids >= 8)] = -1
    assert_close(found, layers.expected(0, 5), False)


def test_nan_reaches_the_sum(pool: Pool) -> None:
    """Of the token that it is in."""
    layers = Layers(pool, ("F32", 8, 32))
    layers.ids[:], layers.x[1, 3] = [0, 1, 2], np.nan
    layers.call(0, 3)
    assert np.isnan(layers.out[1]).all() and np.isfinite(layers.out[[0, 2]]).all()


@pytest.mark.parametrize("n_workers", [1, 2, 3, 5])
def test_workers_do_not_change_the_sum(pool: Pool, n_workers: int) -> None:
    with closing(Pool(n_workers)) as others:
        found = []
        for each in (pool, others):
            layers = Layers(each, ("Q8_0", 8, 96))
            layers.choose(np.random.default_rng(2), 0, 0.9)
            layers.call(0, MOST_TOKENS)
            found.append(layers.out)
    assert np.array_equal(*found)


def test_a_foreign_thread_calls_while_python_holds_the_gil(pool: Pool) -> None:
    """PyDLL keeps the GIL during the call: a node that wanted it would wait for ever."""
    layers = Layers(pool, ("F32", 8, 32))
    layers.choose(np.random.default_rng(3), 0, 1.0)
    with pool.exclusive():
        ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(layers.nodes.function)(layers.nodes.argument(0, 2))
    assert_close(layers.out[:2], layers.expected(0, 2), False)


def test_widths_that_differ_are_refused(pool: Pool) -> None:
    narrow = Layers(pool, ("F32", 4, 32)).layers[0]
    wide = ExpertMatrices(
        *(kernels.random_weight("F32", s, np.random.default_rng(0))[0] for s in [(4, 32, 96)] * 2 + [(4, 96, 32)])
    )
    with pytest.raises(QuantError, match="different widths"):
        ExpertNodes(pool, [narrow, wide], 1, 0, 0, 0, 0)


# ---- the pool --------------------------------------------------------------------------------------------------------


@kernel("void(int64, int64)")
def _nothing(arguments, worker):
    pass


@kernel("void(int64)")
def _twice(record):
    """What a node does: hand out jobs without the pool's lock."""
    dispatch(load_i64(record), load_i64(record + 8), 0)
    dispatch(load_i64(record), load_i64(record + 8), 0)


def test_exclusive_keeps_other_jobs_out() -> None:
    with closing(Pool(2)) as pool:
        record, done = np.array([pool.control, _nothing.address], np.int64), threading.Event()

        def other() -> None:
            pool.run(_nothing.address, record)
            done.set()

        with pool.exclusive():
            thread = threading.Thread(target=other)
            thread.start()
            kernels.call(_twice, record)
            assert not done.wait(0.05)
        assert done.wait(10)
        thread.join()
