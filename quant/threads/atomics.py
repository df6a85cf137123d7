"""Atomics, pausing and calls by address: what threads need inside kernels, beside the SIMD vocabulary."""

import platform
import sys

import numba
from llvmlite import ir
from numba import types

from quant.simd.core import I64, call, define, pointer
from quant.target.jit import inline


def _atomic_store(builder, address, value) -> None:
    builder.store_atomic(value, pointer(builder, address, I64), "seq_cst", 8)


def _pause(builder) -> None:
    """Tell the core that this is a spin loop, where there is an instruction for it."""
    if platform.machine() in ("x86_64", "AMD64"):
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())


def _call_address(n_arguments: int):
    """An intrinsic that calls a C function void(int64 * n_arguments) by its address."""

    def emit(builder, function, *values) -> None:
        function_type = ir.FunctionType(ir.VoidType(), [I64] * n_arguments)
        builder.call(pointer(builder, function, function_type), values)

    return define(types.void, (types.int64,) * (n_arguments + 1), emit)


atomic_load = define(types.int64, (types.int64,), lambda b, p: b.load_atomic(pointer(b, p, I64), "seq_cst", 8))
atomic_store = define(types.void, (types.int64, types.int64), _atomic_store)
atomic_add = define(  # returns the value before
    types.int64, (types.int64, types.int64), lambda b, p, v: b.atomic_rmw("add", pointer(b, p, I64), v, "seq_cst")
)
pause = define(types.void, (), _pause)
call_1, call_2, call_3, call_5, call_7 = (_call_address(n) for n in (1, 2, 3, 5, 7))

_PATIENCE = 500  # pauses before a waiting thread offers its core: those it waits for may need it
give_way = types.ExternalFunction("sched_yield", types.int32())  # let another thread have this core, if one waits

_FUTEX_CALL = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if sys.platform == "linux" else None

if _FUTEX_CALL is not None:
    _syscall = types.ExternalFunction(
        "syscall",
        types.int64(*[types.int64] * 7),
    )
    _CALL, _WAIT_PRIVATE, _WAKE_PRIVATE = _FUTEX_CALL, 128, 129

    @inline
    def sleep_while_equal(address, value):
        """Sleep until woken, unless the low 32 bits at `address` already differ from value's; may wake early."""
        _syscall(_CALL, address, _WAIT_PRIVATE, value & 0x7FFFFFFF, 0, 0, 0)

    @inline
    def wake_all(address):
        """Wake every thread that sleeps on `address`."""
        _syscall(_CALL, address, _WAKE_PRIVATE, 0x7FFFFFFF, 0, 0, 0)

else:
    _usleep = types.ExternalFunction("usleep", types.int32(types.uint32))

    @inline
    def sleep_while_equal(address, value):
        """Sleep 50 microseconds: without futexes idle workers poll."""
        _usleep(numba.uint32(50))

    @inline
    def wake_all(address):
        """Nothing to do: sleepers poll."""


@inline
def wait_for(address, count):
    """Spin until the counter at `address` has reached count."""
    spins = 0
    while atomic_load(address) < count:
        if spins > _PATIENCE:
            give_way()
        else:
            pause()
        spins += 1
