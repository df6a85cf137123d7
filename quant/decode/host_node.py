"""Routed experts as C functions for threads that are not ours: a GPU's driver calls one a layer, as a node of a graph.

The choice of experts is made elsewhere and lies in memory, as do the inputs. Such a call runs a program of the layer's
two phases on the workers, as worker 0, and returns when the sum is there: no Python, no GIL, no lock. Whoever may cause
such calls holds Pool.exclusive() meanwhile.
"""

from collections.abc import Sequence

import numpy as np

from quant.decode.experts import Choice, expert_phases
from quant.decode.linear import Input
from quant.decode.program import MOST_TOKENS, N_TOKENS, STEP, Phases, reset
from quant.errors import QuantError
from quant.matrix import ExpertMatrices
from quant.simd.memory import load_i64, store_i64
from quant.target.jit import kernel
from quant.threads.pool import Pool, aligned_bytes, dispatch

# What a call is told by the address of.
CONTROL, JOB, PROGRAM, TOKENS = range(0, 32, 8)


@kernel("void(int64)")
def _run(record):
    """Run a program for so many tokens."""
    program, n_tokens = load_i64(record + PROGRAM), load_i64(record + TOKENS)
    store_i64(program + N_TOKENS, n_tokens)
    reset(program, n_tokens, 1)
    dispatch(load_i64(record + CONTROL), load_i64(record + JOB), program)


class ExpertNodes:
    """The experts of some layers over the same buffers, which layers use one after the other. T: MOST_TOKENS.

    Attributes:
        function: address of the C function void(int64) of all calls.
    """

    def __init__(
        self, pool: Pool, layers: Sequence[ExpertMatrices], top_k: int, x: int, ids: int, weights: int, out: int
    ):
        """The pool, the weights and the buffers must stay.

        Args:
            x: address of float32 (T, D), normed.
            ids: address of int64 (T, top_k); pairs with -1 are left out.
            weights: address of float32 (T, top_k).
            out: address of float32 (T, D) for the weighted sum.

        Raises:
            QuantError: layers of different widths.
        """
        if len({layer.gate.n_cols for layer in layers}) > 1:
            raise QuantError("experts of different widths do not share buffers")
        self._pool = pool
        most_inner = max(layer.gate.n_rows for layer in layers)
        gated, upped = (aligned_bytes(4 * MOST_TOKENS * top_k * most_inner) for _ in range(2))
        self._programs = [Phases(pool) for _ in layers]
        for program, experts in zip(self._programs, layers, strict=True):
            choice = Choice(ids, weights, experts.gate.n_groups, top_k)
            between = program.keep(gated), program.keep(upped)
            for phase in expert_phases(Input(x), choice, experts, *between, None, out, pool.n_workers, instead=True):
                program.add(phase)
        work = aligned_bytes(max(program.work_bytes for program in self._programs) * pool.n_workers)
        for program in self._programs:
            program.finish(work)
        self._records = np.array(
            [
                [[pool.control, STEP.address, program.address, n_tokens] for n_tokens in range(1, MOST_TOKENS + 1)]
                for program in self._programs
            ],
            np.int64,
        )

    @property
    def function(self) -> int:
        return _run.address

    def argument(self, layer: int, n_tokens: int) -> int:
        """What to call `function` with, for the layer-th of the layers and the first n_tokens of the buffers."""
        return self._records[layer, n_tokens - 1].ctypes.data
