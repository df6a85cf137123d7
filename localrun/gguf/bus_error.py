"""A line instead of a crash where a mapped file is cut short: reading what is no longer there raises SIGBUS.

A handler of that signal cannot go on, and no Python code may run in it. So it is two calls of the system's, write and
_exit, compiled by LLVM. A program that uses this package as a library has handlers of its own to think of: nothing is
installed unless it asks. Windows keeps a mapped file from being cut short.
"""

from __future__ import annotations

import ctypes
import signal
from contextlib import suppress
from typing import Any

from localrun.hardware import free_addresses

_ROOM_BYTES = 256 << 20  # of address space: the library has 170 MB, and ends a process in which it finds too little
_HANDLER = """
declare i64 @write(i32, i64, i64)
declare void @_exit(i32)
define void @on_bus_error(i32 %signal) {{
  call i64 @write(i32 2, i64 {address}, i64 {length})
  call void @_exit(i32 1)
  unreachable
}}
"""
_kept: list[Any] = []  # lines and machine code: the handler may run as long as the process lives


def exit_with(line: str) -> None:
    """From now on a bus error in any thread writes line to stderr and ends the process with exit code 1.

    Not where LLVM cannot be loaded or has no room: what needs it for more than this says so.
    """
    if hasattr(signal, "SIGBUS") and free_addresses() > _ROOM_BYTES:
        with suppress(OSError, ImportError):
            _install(line)


def _install(line: str) -> None:
    import llvmlite.binding as llvm

    text = ctypes.create_string_buffer(f"{line}\n".encode("utf-8", "replace"))
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    code = llvm.parse_assembly(_HANDLER.format(address=ctypes.addressof(text), length=len(text) - 1))
    engine = llvm.create_mcjit_compiler(code, llvm.Target.from_default_triple().create_target_machine())
    engine.finalize_object()
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    install(signal.SIGBUS, engine.get_function_address("on_bus_error"))
    _kept.extend([text, engine])
