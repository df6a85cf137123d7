"""Compiled kernels on disk: a file each, in a folder that can't go stale, checked before its code is run.

Numba's own cache does not see edits in another module than the kernel's, nor NUMBA_BOUNDSCHECK, nor the ISA level that
chose the intrinsics (measured: docs/lab-notes.md), and takes a cut file for code. So the folder is named after all that
shapes a kernel. A file is a SHA-256 of its name and the rest; the rest is a pickled MachineCode. It is loaded without
Numba's compiler, which takes half a second to get ready.

Who can write such a file can run code here. So a folder or file that belongs to another user than this one or root, or
that others may write to, is not used. Without a folder kernels serve this process alone. What the user should know of
any of this is logged, once a process.
"""

import functools
import hashlib
import logging
import os
import pickle
import stat
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding as llvm
import numba
from numba import config
from numba.core import registry
from numba.core.compiler import CompileResult

from quant.target import isa, tuning
from quant.target.cache_base import cache_base

_PACKAGE = Path(__file__).resolve().parents[1]  # quant: an edit anywhere in it may change any kernel
_DIGEST_BYTES = hashlib.sha256().digest_size
_SUFFIX = ".kernel"


@functools.cache
def _say_once(line: str) -> None:
    logging.getLogger(__name__).warning("%s", line)


# ---- the folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """Where kernels are kept; why they can't be used or kept there ("" if they can)."""

    path: Path
    refusal: str = ""


def _fingerprint() -> str:
    """A name that changes whenever compiled kernels could: sources, compiler, what it compiles for, tuning, level."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    target = registry.cpu_target.target_context.codegen().magic_tuple()  # triple, CPU, its features
    distances = tuning.found().tuning.compiled_in
    digest.update(f"{numba.__version__} {sys.version_info[:2]} {config.BOUNDSCHECK} {target} {distances}".encode())
    return f"{digest.hexdigest()[:16]}-{isa.LEVEL}"


def _refusal(status: os.stat_result) -> str:
    """Why code from a file or folder is not run; "" if it is."""
    if status.st_uid not in (0, os.geteuid()):
        return "it belongs to another user"
    return "others may write to it" if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


@functools.cache
def folder() -> Folder:
    """In $LOCALRUN_CACHE, else in the user's cache. Made here if it can be."""
    base, name = cache_base(), Path("kernels") / _fingerprint()
    if base is None:
        return Folder(name, "there is no home folder")
    path = base / name
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        return Folder(path, _refusal(path.stat()))
    except OSError as error:
        return Folder(path, error.strerror)


# ---- a kernel's file -------------------------------------------------------------------------------------------------


class _Damaged(Exception):
    """The digest is not that of the file's name and of what follows."""


def _digest(path: Path, payload: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + b"\0" + payload).digest()


def _read(path: Path) -> bytes:
    """What stands behind the digest. Raises _Damaged, OSError."""
    with path.open("rb") as file:
        if refusal := _refusal(os.fstat(file.fileno())):
            raise PermissionError(None, refusal)
        content = file.read()
    payload = content[_DIGEST_BYTES:]
    if _digest(path, payload) != content[:_DIGEST_BYTES]:
        raise _Damaged
    return payload


def _write(path: Path, payload: bytes) -> None:
    """Whole or not at all. Raises OSError."""
    number, name = tempfile.mkstemp(dir=path.parent)
    try:
        with open(number, "wb") as file:
            os.fchmod(number, 0o644)
            file.write(_digest(path, payload) + payload)
        os.replace(name, path)
    except OSError:
        with suppress(OSError):
            os.unlink(name)
        raise


class MachineCode(NamedTuple):
    """A compiled kernel: an object file, its function's name in there, and what it calls by name."""

    content: bytes
    function: str
    called: list[str]


def _machine_code(result: CompileResult) -> MachineCode:
    library = result.library
    library._ensure_finalized()
    called = [f.name for f in library._final_module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    return MachineCode(library._get_compiled_object(), result.fndesc.llvm_cfunc_wrapper_name, called)


def _address_of(code: MachineCode) -> int:
    """The loaded code's address; 0 if something that it calls is not there: LLVM would end the process."""
    engine = registry.cpu_target.target_context.codegen()._engine._ee
    if any(llvm.address_of_symbol(name) is None for name in code.called):
        return 0
    engine.add_object_file(llvm.ObjectFileRef.from_data(code.content))
    engine.finalize_object()
    return engine.get_function_address(code.function)


def load(name: str) -> int:
    """The address of the kernel of that name as it was compiled before; 0 if it must be compiled."""
    if folder().refusal:
        return 0
    try:
        return _address_of(MachineCode(*pickle.loads(_read(folder().path / f"{name}{_SUFFIX}"))))
    except FileNotFoundError:
        pass
    except _Damaged:
        _say_once(f"compiled kernels in {folder().path} were damaged; they are compiled anew")
    except OSError as error:
        _say_once(f"compiled kernels in {folder().path} are not used: {error.strerror}")
    return 0


def keep(name: str, result: CompileResult) -> None:
    """Keep a kernel for the next process, if that can be."""
    path, why = folder().path, folder().refusal
    if not why:
        try:
            _write(path / f"{name}{_SUFFIX}", pickle.dumps(tuple(_machine_code(result))))
        except OSError as error:
            why = error.strerror
    if why:
        _say_once(
            f"compiled kernels can't be kept in {path} ({why}), so every start compiles them; set LOCALRUN_CACHE "
            "to a folder of your own"
        )


def has(name: str) -> bool:
    """Whether there is a file of that kernel, damaged or not."""
    return not folder().refusal and (folder().path / f"{name}{_SUFFIX}").exists()


def kept() -> int:
    """How many compiled kernels are there from before."""
    return 0 if folder().refusal else sum(path.suffix == _SUFFIX for path in folder().path.iterdir())


def damaged() -> int:
    """How many of them can't be used. Reads them all."""
    count = 0
    for path in [] if folder().refusal else folder().path.glob(f"*{_SUFFIX}"):
        try:
            _read(path)
        except (_Damaged, OSError):
            count += 1
    return count
