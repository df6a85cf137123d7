"""How fast the workers can read memory: the roof of every kernel that is bound by weights.

The kernel does nothing but load 64 bytes at a time; loads are combined by exclusive or, so that none can be left out.
Prefetching 4 KB ahead, as the weight kernels do, reads 3% more than without (docs/lab-notes.md).
"""

import mmap
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import types

from quant.errors import QuantError
from quant.simd.core import I32, I64, Vector, constant, define, load
from quant.simd.memory import prefetch, store_i64
from quant.simd.struct import atomic, i64, pointer, struct
from quant.target.jit import kernel
from quant.threads.pool import Pool, aligned_bytes
from quant.threads.work_items import work_items

_STEP = 256  # bytes a turn of the loop
_ITEM = 256 << 10  # bytes of a work item
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

READ = struct("Read", counter=atomic, address=i64, n_bytes=i64, results=pointer(i64))


@kernel("void(int64, int64)")
def _read(arguments, worker):
    """Exclusive or of all 64-bit words of n_bytes, a multiple of _STEP, from the address, to the worker's result."""
    a = READ(arguments)
    s0, s1, s2, s3 = _zero(), _zero(), _zero(), _zero()
    for item in work_items(a.counter, a.n_bytes, _ITEM):
        for p in range(a.address + item, a.address + min(item + _ITEM, a.n_bytes), _STEP):
            for line in range(p + _AHEAD, p + _AHEAD + _STEP, 64):
                prefetch(line)
            s0, s1 = _xor(s0, _load(p)), _xor(s1, _load(p + 64))
            s2, s3 = _xor(s2, _load(p + 128)), _xor(s3, _load(p + 192))
    a.results[worker] = _fold_xor(_xor(_xor(s0, s1), _xor(s2, s3)))


@kernel("void(int64, int64)")
def _fill(arguments, worker):
    """Write its own address to every line of 64 bytes: no page is like another, or shared with any."""
    a = READ(arguments)
    for item in work_items(a.counter, a.n_bytes, _ITEM):
        for p in range(a.address + item, a.address + min(item + _ITEM, a.n_bytes), 64):
            store_i64(p, p)


def buffer(pool: Pool, n_bytes: int, as_mapped: bool = False) -> np.ndarray:
    """uint8 (n_bytes,) to read from, 64-byte aligned, every page in RAM and near the worker that first wrote to it.

    as_mapped: in small pages, as a file's map has them, which are read more slowly than large ones.
    """
    array = _small_pages(n_bytes) if as_mapped else aligned_bytes(n_bytes)
    pool.run(_fill.address, READ.pack(counter=0, address=array.ctypes.data, n_bytes=n_bytes // 64 * 64, results=0))
    return array


def _small_pages(n_bytes: int) -> np.ndarray:
    memory = mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a system without large pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def read(pool: Pool, address: int, n_bytes: int) -> int:
    """The exclusive or of the 64-bit words of n_bytes, a multiple of 256, at address. Raises QuantError."""
    if n_bytes % _STEP:
        raise QuantError(f"{n_bytes} bytes to read; expected a multiple of {_STEP}")
    results = np.zeros(pool.n_workers, np.int64)
    pool.run(_read.address, READ.pack(counter=0, address=address, n_bytes=n_bytes, results=results.ctypes.data))
    return int(np.bitwise_xor.reduce(results))


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
