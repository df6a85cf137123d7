"""How fast the workers can read memory: the roof of every kernel that is bound by weights.

The kernel does nothing but load 64 bytes at a time; loads are combined by exclusive or, so that none can be left out.
Prefetching 4 KB ahead, as the weight kernels do, reads 3% more than without (docs/lab-notes.md).
"""

import statistics
import time
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import types

from quant.errors import QuantError
from quant.simd.core import I32, I64, Vector, constant, define, load
from quant.simd.memory import load_i64, prefetch, store_i64
from quant.target.jit import kernel
from quant.threads.atomics import atomic_add
from quant.threads.pool import Pool, aligned_bytes

_STEP = 256  # bytes a turn of the loop
_UNIT = 256 << 10  # bytes that a worker takes at a time
_SPAN = 32 << 20  # bytes a worker between two looks at the clock: 1-3 ms, so that some spans are undisturbed
_AHEAD = 4096

_i64x8 = Vector(I64, 8, "i64x8")


def _fold(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    """The exclusive or of all lanes."""
    folded = builder.extract_element(v, I32(0))
    for lane in range(1, 8):
        folded = builder.xor(folded, builder.extract_element(v, I32(lane)))
    return folded


_load = define(_i64x8, (types.int64,), lambda b, p: load(b, p, _i64x8.ir))
_zero = define(_i64x8, (), lambda b: constant(_i64x8.ir, 0))
_xor = define(_i64x8, (_i64x8, _i64x8), lambda b, x, y: b.xor(x, y))
_fold_xor = define(types.int64, (_i64x8,), _fold)

# Where the jobs find their arguments, int64 each; one result a worker behind them.
COUNTER, ADDRESS, N_BYTES, RESULTS = range(0, 4 * 8, 8)


@kernel("void(int64, int64)")
def _read(a, worker):
    """Exclusive or of all 64-bit words of N_BYTES, a multiple of _STEP, from ADDRESS."""
    end = load_i64(a + ADDRESS) + load_i64(a + N_BYTES)
    s0, s1, s2, s3 = _zero(), _zero(), _zero(), _zero()
    while True:
        first = load_i64(a + ADDRESS) + atomic_add(a + COUNTER, _UNIT)
        if first >= end:
            break
        for p in range(first, min(first + _UNIT, end), _STEP):
            for line in range(p + _AHEAD, p + _AHEAD + _STEP, 64):
                prefetch(line)
            s0, s1 = _xor(s0, _load(p)), _xor(s1, _load(p + 64))
            s2, s3 = _xor(s2, _load(p + 128)), _xor(s3, _load(p + 192))
    store_i64(a + RESULTS + 8 * worker, _fold_xor(_xor(_xor(s0, s1), _xor(s2, s3))))


@kernel("void(int64, int64)")
def _fill(a, worker):
    """Write its own address to every line of 64 bytes: no page is like another, or shared with any."""
    end = load_i64(a + ADDRESS) + load_i64(a + N_BYTES)
    while True:
        first = load_i64(a + ADDRESS) + atomic_add(a + COUNTER, _UNIT)
        if first >= end:
            break
        for p in range(first, min(first + _UNIT, end), 64):
            store_i64(p, p)


def _arguments(pool: Pool, address: int, n_bytes: int) -> np.ndarray:
    return np.array([0, address, n_bytes, *[0] * pool.n_workers], np.int64)


def buffer(pool: Pool, n_bytes: int) -> np.ndarray:
    """uint8 (n_bytes,) to read from, 64-byte aligned, every page in RAM and near the worker that first wrote to it."""
    array = aligned_bytes(n_bytes)
    pool.run(_fill.address, _arguments(pool, array.ctypes.data, n_bytes // 64 * 64))
    return array


def read(pool: Pool, address: int, n_bytes: int) -> int:
    """The exclusive or of the 64-bit words of n_bytes, a multiple of 256, at address. Raises QuantError."""
    if n_bytes % _STEP:
        raise QuantError(f"{n_bytes} bytes to read; expected a multiple of {_STEP}")
    arguments = _arguments(pool, address, n_bytes)
    pool.run(_read.address, arguments)
    return int(np.bitwise_xor.reduce(arguments[RESULTS // 8 :]))


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second, over many spans of some milliseconds each."""

    best: float
    median: float


def read_bandwidth(pool: Pool, address: int, n_bytes: int, passes: int = 3) -> Bandwidth:
    """How fast all workers together read n_bytes at address, again and again.

    The range should be several times the caches, or they are measured. A first pass, which may have to bring the pages
    in, does not count. Raises QuantError if there is less than a loop's worth to read.
    """
    n_bytes -= n_bytes % _STEP
    if not n_bytes:
        raise QuantError(f"too little to measure; expected {_STEP} bytes or more")
    n_spans = max(1, n_bytes // (_SPAN * pool.n_workers))
    span = n_bytes // n_spans // _STEP * _STEP
    read(pool, address, n_bytes)
    rates = []
    for _ in range(passes):
        for first in range(address, address + n_spans * span, span):
            start = time.perf_counter()
            read(pool, first, span)
            rates.append(span / (time.perf_counter() - start))
    return Bandwidth(max(rates), statistics.median(rates))
