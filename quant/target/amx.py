"""AMX tiles: their instructions as LLVM calls, their configuration, and whether this process may use them.

Eight registers of up to 16 rows of 64 bytes. One dot product adds a (rows, K) block of signed bytes times a block of
unsigned ones to (rows, 16) sums of 32 bits. LDTILECFG sets the registers' shapes; TILERELEASE returns them to their
initial state, in which a context switch need not save their 8 KB. Sources: Intel 64 and IA-32 Architectures Software
Developer's Manual, volume 1, "Programming with Intel AMX", and volume 2 for each instruction.

The kernel lets a process use tiles once it has asked; what it grants holds for all threads, those that exist
included. Source: Linux, Documentation/arch/x86/xstate.rst.
"""

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Sequence

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import cgutils

TILES, MOST_ROWS, MOST_BYTES = 8, 16, 64  # registers, rows of one, bytes of a row: palette 1
CONFIG_BYTES = 64

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18


def config(shapes: Sequence[tuple[int, int]]) -> bytes:
    """What LDTILECFG reads. shapes: (rows, bytes of a row) of the registers in order; those behind stay unusable."""
    rows, row_bytes = np.zeros(16, np.uint8), np.zeros(16, np.uint16)
    for t, shape in enumerate(shapes):
        rows[t], row_bytes[t] = shape
    return bytes([1]) + bytes(15) + row_bytes.tobytes() + rows.tobytes()


class Tiles:
    """Emits tile instructions. Registers are numbers below TILES, addresses and strides int64 values.

    `file` is the address of FILE_BYTES of a worker's own for a tile file in memory: none here, see amx_emulated.
    """

    FILE_BYTES = 0

    def __init__(self, builder: ir.IRBuilder, file: ir.Value):
        self.builder, self.file = builder, file

    def configure(self, address: ir.Value) -> None:
        """Take the shapes from a config() in memory; all tiles become zero. Slow: once for many products."""
        self._call("ldtilecfg", self._pointer(address))

    def release(self) -> None:
        """Return to the initial state."""
        self._call("tilerelease")

    def zero(self, t: int) -> None:
        """t = 0"""
        self._call("tilezero", _I8(t))

    def load(self, t: int, address: ir.Value, stride: int) -> None:
        """t = rows in memory, `stride` bytes from one to the next."""
        self._call("tileloadd64", _I8(t), self._pointer(address), _I64(stride))

    def store(self, t: int, address: ir.Value, stride: int) -> None:
        """Write t's rows."""
        self._call("tilestored64", _I8(t), self._pointer(address), _I64(stride))

    def add_product(self, c: int, a: int, b: int) -> None:
        """c[m, n] += sum over k of a[m, k] * b[k // 4, 4*n + k % 4]: a signed and b unsigned bytes, c in 32 bits."""
        self._call("tdpbsud", _I8(c), _I8(a), _I8(b))

    def _pointer(self, address: ir.Value) -> ir.Value:
        return self.builder.inttoptr(address, _I8.as_pointer())

    def _call(self, name: str, *operands: ir.Value) -> None:
        function_type = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        function = cgutils.get_or_insert_function(self.builder.module, function_type, f"llvm.x86.{name}")
        self.builder.call(function, operands)


# ---- whether they work -----------------------------------------------------------------------------------------------


def refusal() -> str:
    """Why this process can't use the tiles that its CPU has; "" if it can. Asks the kernel, then tries a product."""
    denied = _request_permission()
    if denied:
        return f"the operating system does not grant AMX tiles ({denied})"
    return "" if _trial_agrees() else "a trial product with AMX tiles came out wrong"


def _request_permission() -> str:
    """Ask the kernel for tiles; what it objects, "" for nothing. Before a thread's first tile instruction."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"not known how to ask {platform.system()} on {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_long(n) for n in (_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA))
    return os.strerror(ctypes.get_errno()) if libc.syscall(*arguments) else ""


def _trial_agrees() -> bool:
    """Whether a product in a thread of its own, as workers are, equals NumPy's."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (11, 32), np.int8), rng.integers(0, 256, (8, 16, 4), np.uint8)
    found, shapes = np.zeros((11, 16), np.int32), np.frombuffer(config([(11, 64), (11, 32), (8, 64)]), np.uint8)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten()
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(_trial_module())), target)
    engine.finalize_object()
    trial = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(engine.get_function_address("trial"))
    thread = threading.Thread(target=trial, args=[array.ctypes.data for array in (shapes, a, b, found)])
    thread.start()
    thread.join()
    return np.array_equal(found, a.astype(np.int32) @ b.transpose(0, 2, 1).reshape(32, 16).astype(np.int32))


def _trial_module() -> ir.Module:
    """trial(config, a, b, out)"""
    module = ir.Module()
    module.triple = llvm.get_default_triple()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64] * 4), "trial")
    builder = ir.IRBuilder(function.append_basic_block())
    shapes, a, b, out = function.args
    tiles = Tiles(builder, _I64(0))
    tiles.configure(shapes)
    tiles.zero(0)
    tiles.load(1, a, 32)
    tiles.load(2, b, 64)
    tiles.add_product(0, 1, 2)
    tiles.store(0, out, 64)
    tiles.release()
    builder.ret_void()
    return module
