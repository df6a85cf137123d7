"""Carries out a plan: one thread reads and converts the next unit while all workers pack this one, another writes.

Memory holds a few units, whatever the model's size. Everything that could have been known before is checked in plan.py.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localrun.convert.errors import CheckpointError
from localrun.convert.output import Output, journal_path, remove_partial
from localrun.convert.packing import BadWeight, pack_unit
from localrun.convert.plan import Plan
from localrun.convert.targets import Unit, origin, read_blocks, read_unit
from localrun.errors import LocalrunError
from localrun.gguf import types as tensor_types
from quant.formats import registry
from quant.formats.interleave import interleave
from quant.threads.pool import Pool

_PENDING_WRITES = 2
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Progress:
    """How far a conversion is; bytes_in and bytes_out are of this run, weights of the whole."""

    weights: int
    total_weights: int
    bytes_in: int
    bytes_out: int
    tensor: str


def convert(
    plan: Plan,
    *,
    threads: int = 1,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
    sync_bytes: int | None = None,
) -> Progress:
    """Write the file or files of a plan; what it says at the end.

    Args:
        threads: packing workers.
        resume: go on where an earlier run ended; begin anew if there is none.
        force: replace files of that name, and what an earlier run left.
        progress: called after each unit.
        sync_bytes: written between two syncs.

    Raises LocalrunError. The destination is untouched then; what is written stays for resume, unless the source is at
    fault.
    """
    check_destination(plan, resume=resume, force=force)
    if force and not resume:
        remove_partial(plan.layout, journal_path(plan.destination))
    try:
        n_units, size = len(plan.units), [sync_bytes] if sync_bytes else []
        output = Output(plan.layout, plan.destination, plan.fingerprint, n_units, *size)
        return _run(plan, output, threads, progress)
    except OSError as error:
        raise _explain(error, plan) from None


def check_destination(plan: Plan, *, resume: bool, force: bool) -> None:
    """Raises LocalrunError if a file is in the way."""
    folder = plan.destination.absolute().parent
    if not folder.is_dir():
        raise LocalrunError(f"{plan.destination}: folder {folder} does not exist")
    for part in plan.layout.parts:
        if part.path.is_dir():
            raise LocalrunError(f"{part.path}: is a folder; expected the name of the file to write")
        if os.path.lexists(part.path) and not part.path.is_file():
            raise LocalrunError(f"{part.path}: is a device, a pipe or a broken link; expected the name of a file")
        if _is_read(part.path.resolve(), plan):
            raise LocalrunError(f"{part.path}: is the source itself; choose another name for the result")
        if part.path.exists() and not force and not (resume and journal_path(plan.destination).exists()):
            raise LocalrunError(f"{part.path}: exists already; --force replaces it")
    if journal_path(plan.destination).exists() and not (resume or force):
        raise LocalrunError(
            f"{plan.destination}: an unfinished conversion is there; --resume goes on, --force begins anew"
        )


def _is_read(path: Path, plan: Plan) -> bool:
    """Whether the conversion reads that file: of a checkpoint's folder, all but other results count."""
    sources = {each.resolve() for each in [*plan.source.files, *([plan.importances.path] if plan.importances else [])]}
    return path in sources or (path.parent == plan.source.path.resolve() and path.is_file() and path.suffix != ".gguf")


def _run(plan: Plan, output: Output, threads: int, progress: Callable[[Progress], None] | None) -> Progress:
    pool = Pool(threads)
    try:
        last = _Pipeline(plan, output, pool, progress).run()
        plan.check_sources()
        output.finish()
        return last
    except CheckpointError:
        output.discard()
        raise
    finally:
        output.close()
        pool.close()
        plan.source.close()


class _Pipeline:
    """Read, pack, write, each unit in turn."""

    def __init__(self, plan: Plan, output: Output, pool: Pool, progress: Callable[[Progress], None] | None) -> None:
        self._plan, self._output, self._pool, self._progress = plan, output, pool, progress
        self._bytes_in = self._bytes_out = 0
        self._importance_of: tuple[str, np.ndarray | None] = "", None
        self._weights = sum(self._n_weights(unit) for unit in plan.units[: output.done])
        largest = max(self._n_weights(unit) for unit in plan.units)
        self._buffers = [np.empty(largest, np.float32) for _ in range(2)]  # one is read into, the other packed from

    def run(self) -> Progress:
        """Everything that is not yet done. On an interrupt, what is written is noted for a later run."""
        work = self._plan.units[self._output.done :]
        pending: deque[Future[None]] = deque()
        last = self._state("")
        with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
            try:
                ahead = reader.submit(self._read, work[0], 0) if work else None
                for index, unit in enumerate(work):
                    rows = ahead.result()
                    if index + 1 < len(work):
                        ahead = reader.submit(self._read, work[index + 1], (index + 1) % 2)
                    pending.append(writer.submit(self._write, unit, self._pack(unit, rows)))
                    while len(pending) > _PENDING_WRITES:
                        pending.popleft().result()
                    last = self._count(unit)
                for write in pending:
                    write.result()
            except KeyboardInterrupt:
                writer.submit(self._output.sync).result()
                raise
        return last

    def _read(self, unit: Unit, which: int) -> np.ndarray:
        """float32 (n_rows, n_cols), a view of a buffer; uint8 where the source has the type already."""
        plan = self._plan
        target, source = plan.targets[unit.target], plan.source
        if target.from_type in source.block_types and target.from_type == _plain(plan.types[unit.target]):
            return read_blocks(source, unit)
        rows = self._buffers[which][: unit.n_rows * target.n_cols].reshape(unit.n_rows, target.n_cols)
        read_unit(source, target, unit, rows)
        return rows

    def _pack(self, unit: Unit, rows: np.ndarray) -> np.ndarray:
        """uint8, 1-D: the unit as it goes into the file. Raises CheckpointError if a weight cannot be packed."""
        type_ = self._plan.types[unit.target]
        blocks = rows if rows.dtype == np.uint8 else self._quantize(unit, rows, _plain(type_))
        if _plain(type_) == type_:
            return blocks
        return interleave(registry.get(type_), blocks, unit.n_rows, blocks.size // unit.n_rows).reshape(-1)

    def _quantize(self, unit: Unit, rows: np.ndarray, type_: str) -> np.ndarray:
        """uint8, 1-D: float32 rows in a plain type."""
        plan = self._plan
        target = plan.targets[unit.target]
        try:
            return pack_unit(self._pool, rows, target, unit, type_, self._importance(target.name))
        except BadWeight as bad:
            name, row, column = origin(unit, bad.row, bad.column) or (target.name, bad.row, bad.column)
            what = f"{plan.source.path}: tensor '{name}' has {bad.value:g} at row {row}, column {column}"
            reason = f", too large for {type_}; BF16 holds it" if np.isfinite(bad.value) else ""
            raise CheckpointError(what + reason) from None

    def _importance(self, name: str) -> np.ndarray | None:
        """A target's importances; those of the last target are kept, since units follow each other."""
        if name != self._importance_of[0]:
            importances = self._plan.importances or {}
            self._importance_of = name, importances.get(name)
        return self._importance_of[1]

    def _write(self, unit: Unit, data: np.ndarray) -> None:
        plan = self._plan
        place, target = plan.layout.places[unit.target], plan.targets[unit.target]
        self._output.write(place.part, place.offset + place.n_bytes // target.n_rows * unit.first_row, data)

    def _count(self, unit: Unit) -> Progress:
        """Adds a unit to what is done, and tells of it."""
        plan = self._plan
        target, place, tensors = plan.targets[unit.target], plan.layout.places[unit.target], plan.source.tensors
        self._weights += self._n_weights(unit)
        self._bytes_out += place.n_bytes // target.n_rows * unit.n_rows
        for piece in unit.pieces:
            source = tensors[piece.source]
            self._bytes_in += source.n_bytes // source.n_rows * (piece.stop - piece.start) // piece.step
        state = self._state(target.name)
        if self._progress is not None:
            self._progress(state)
        return state

    def _state(self, tensor: str) -> Progress:
        return Progress(self._weights, self._plan.n_weights, self._bytes_in, self._bytes_out, tensor)

    def _n_weights(self, unit: Unit) -> int:
        return unit.n_rows * self._plan.targets[unit.target].n_cols


def _plain(type_: str) -> str:
    """The name of the ggml type that a type is made of."""
    return tensor_types.plain(tensor_types.from_name(type_)).name


def _explain(error: OSError, plan: Plan) -> LocalrunError:
    """A system's error in one line that says what to do."""
    if error.errno in _NO_SPACE:
        needed = f"{plan.layout.size:,} bytes in all"
        return LocalrunError(f"{plan.destination}: the disk is full ({needed}); make room and go on with --resume")
    resumable = os.path.exists(journal_path(plan.destination))
    advice = "; --resume goes on from there" if resumable else ""
    return LocalrunError(f"{plan.destination}: cannot be written: {error.strerror}{advice}")
