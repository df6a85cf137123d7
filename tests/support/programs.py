"""Programs of a few phases for the tests of decode, workers that come late to theirs, and pieces of contexts."""

from __future__ import annotations

import dataclasses
from contextlib import closing

import kernels
import numpy as np
from kernels import floats
from numba import types

from quant.decode.linear import Input, rows_phase
from quant.decode.program import MAX_SPLITS, PHASE, PHASE_BYTES, PROGRAM, Phase, Program, split_begin, splits_of
from quant.formats import registry
from quant.matrix import QuantMatrix, quant_matrix
from quant.simd.memory import store_i64
from quant.simd.struct import address, i64, struct
from quant.target.jit import kernel
from quant.threads.atomics import atomic_add, atomic_load, call_2, call_3
from quant.threads.pool import Pool


def small_program(pool: Pool, x: np.ndarray | None = None, n_frequencies: int = 1) -> Program:
    """A program whose tokens are the rows of x, or the vector x, without phases."""
    x = np.zeros((1, 16), np.float32) if x is None else np.atleast_2d(x)
    weight = quant_matrix(x.ravel().view(np.uint8), registry.get("F32"), x.shape)
    return Program(pool, weight, np.linspace(0.1, 1, n_frequencies), 1.0, 1)


def rows_by_step(
    weights: list[QuantMatrix], kind: str, x: np.ndarray, second: np.ndarray, residual: bool, n_workers: int
) -> list[np.ndarray]:
    """Each matrix times the input of this kind, float32; with `residual` added to vectors of 0.25."""
    with closing(Pool(n_workers)) as pool:
        program = small_program(pool, x)
        address = program.keep(second)
        plain = Input(program.x)
        input_ = {"plain": plain, "norm": Input(program.x, address, 0.01), "gated": Input(program.x, up=address)}[kind]
        outs = [program.vector(weight.n_rows + 16) for weight in weights]
        found = [floats(out, weight.n_rows + 16) for weight, out in zip(weights, outs, strict=True)]
        for vector in found:
            vector[:] = 0.25
        program.add(rows_phase(input_, list(zip(weights, outs, strict=True)), n_workers, residual))
        program.finish()
        program.run([0], [0], np.zeros(1, np.int64))
        assert all(np.all(vector[-16:] == 0.25) for vector in found)
        return [vector[:-16].copy() for vector in found]


@kernel("void(int64, int64, int64)")
def _pieces(n_cached, unit, out):
    store_i64(out, splits_of(n_cached))
    for split in range(splits_of(n_cached) + 1):
        store_i64(out + 8 * split + 8, split_begin(n_cached, split, unit))


def pieces(n_cached: int, unit: int = 1) -> list[int]:
    """Where a context's splits begin, and the end of the last one, as kernels have it."""
    out = np.zeros(MAX_SPLITS + 2, np.int64)
    kernels.call(_pieces, n_cached, unit, out)
    return out[1 : out[0] + 2].tolist()


_sleep = types.ExternalFunction("usleep", types.int32(types.uint32))
LATE_PHASE = struct("Late", late_workers=i64, missed=address, prepare=address, run=address)
_AT = PHASE_BYTES - LATE_PHASE.size  # behind the arguments of the phase itself


@kernel("void(int64, int64)")
def _late_prepare(phase, work):
    """Workers of a set sleep before they prepare; counts those whose phase has then gone by without them."""
    late, own = LATE_PHASE(phase + _AT), PHASE(phase)
    program = PROGRAM(own.program)
    worker = (work - program.work) // program.work_bytes
    if (late.late_workers >> worker) & 1:
        _sleep(types.uint32(200))
        if atomic_load(own.taken) >= own.n_items:
            atomic_add(late.missed, 1)
    call_2(late.prepare, phase, work)


@kernel("void(int64, int64, int64)")
def _late_run(phase, item, work):
    """Some items take long."""
    if (item + phase // PHASE_BYTES) % 5 == 0:
        _sleep(types.uint32(100))
    call_3(LATE_PHASE(phase + _AT).run, phase, item, work)


def add_late(late_workers: int, missed: np.ndarray):
    """Program.add for phases to which the workers in the set of bits `late_workers` come late."""
    add = Program.add

    def add_one(program: Program, phase: Phase, name: str = "") -> None:
        words = np.zeros(PHASE_BYTES // 8, np.int64)
        words[: len(phase.arguments)] = phase.arguments
        words[_AT // 8 :] = LATE_PHASE.pack(
            late_workers=late_workers, missed=missed.ctypes.data, prepare=phase.prepare.address, run=phase.run.address
        )
        add(program, dataclasses.replace(phase, prepare=_late_prepare, run=_late_run, arguments=words), name)

    return add_one


LATE = {"the caller": 0b1, "the second": 0b10, "all but the caller": 0b1110, "all": 0b1111}
