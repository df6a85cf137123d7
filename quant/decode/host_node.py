"""Routed experts as C functions for threads that are not ours: a GPU's driver calls one a layer, as a node of a graph.

The choice of experts is made elsewhere and lies in memory, as do the inputs. Such a call runs a program of the layer's
two phases on the workers, as worker 0, and returns when the sum is there: no Python, no GIL, no lock. Where other ranks
have shares of a layer, they are told in its first phase, and a third one adds their sums. Whoever may cause such calls
holds Pool.exclusive() meanwhile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quant.decode.experts import NOBODY, Told, expert_phases
from quant.decode.linear import Input
from quant.decode.program import MOST_TOKENS, PROGRAM, STEP, Phase, Phases, reset
from quant.decode.router import Choice
from quant.errors import QuantError
from quant.matrix import ExpertMatrices
from quant.simd.struct import address, i64, struct
from quant.target.jit import kernel
from quant.threads.pool import Pool, aligned_bytes, dispatch

# What a call is told by the address of.
NODE = struct("Node", control=address, job=address, program=address, n_tokens=i64)


@kernel("void(int64)")
def _run(node):
    """Run a program for so many tokens."""
    a = NODE(node)
    program = PROGRAM(a.program)
    program.n_tokens = a.n_tokens
    reset(program, a.n_tokens, 1)
    dispatch(a.control, a.job, a.program)


@dataclass(frozen=True)
class OtherRanks:
    """Those that have shares of a layer.

    Attributes:
        told: what they are told.
        owners: as Router has them.
        collect: gives the phase that adds their sums to float32 (T, D) at an address.
    """

    told: Told
    owners: int
    collect: Callable[[int], Phase]


class ExpertNodes:
    """The experts of some layers over the same buffers, which layers use one after the other. T: MOST_TOKENS.

    Attributes:
        function: address of the C function void(int64) of all calls.
    """

    def __init__(
        self, pool: Pool, layers: Sequence[ExpertMatrices], top_k: int, x: int, ids: int, weights: int, out: int,
        others: Sequence[OtherRanks | None] = (),
    ):  # fmt: skip
        """The pool, the weights and the buffers must stay.

        Args:
            x: address of float32 (T, D), normed.
            ids: address of int64 (T, top_k); pairs with -1 are left out.
            weights: address of float32 (T, top_k).
            out: address of float32 (T, D) for the weighted sum.
            others: of each layer; none where all experts are here.

        Raises:
            QuantError: layers of different widths.
        """
        if len({layer.gate.n_cols for layer in layers}) > 1:
            raise QuantError("experts of different widths do not share buffers")
        self._pool = pool
        most_inner = max(layer.gate.n_rows for layer in layers)
        gate_out, up_out = (aligned_bytes(4 * MOST_TOKENS * top_k * most_inner) for _ in range(2))
        self._programs = [Phases(pool) for _ in layers]
        for program, experts, ranks in zip(self._programs, layers, others or [None] * len(layers), strict=True):
            choice = Choice(ids, weights, experts.gate.n_groups, top_k, ranks.owners if ranks else 0)
            between = program.keep(gate_out), program.keep(up_out)
            told = ranks.told if ranks else NOBODY
            phases = expert_phases(
                Input(x), choice, experts, *between, None, out, pool.n_workers, replaces=True, told=told
            )
            for phase in phases:
                program.add(phase)
            if ranks:
                program.add(ranks.collect(out))
        work = aligned_bytes(max(program.work_bytes for program in self._programs) * pool.n_workers)
        for program in self._programs:
            program.finish(work)
        self._nodes = [
            [
                NODE.pack(control=pool.control, job=STEP.address, program=program.address, n_tokens=n_tokens)
                for n_tokens in range(1, MOST_TOKENS + 1)
            ]
            for program in self._programs
        ]

    @property
    def function(self) -> int:
        """Address of what a graph calls, with that of a node's arguments."""
        return _run.address

    def argument(self, layer: int, n_tokens: int) -> int:
        """What to call `function` with, for the layer-th of the layers and the first n_tokens of the buffers."""
        return self._nodes[layer][n_tokens - 1].ctypes.data
