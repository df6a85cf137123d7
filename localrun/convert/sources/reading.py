"""Bytes out of files and into float32, for both kinds of source: plain reads into memory that is used again.

Nothing is mapped: the pages of a map count as this process's memory, which must stay bounded whatever the model's size.
Nor does the system keep what was read: a checkpoint goes by once, and would push what others read often out of memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from localrun.convert.errors import CheckpointError
from quant.formats import registry
from quant.matrix import quant_matrix
from quant.ops.linear import expand_rows
from quant.threads.pool import Pool


class Reader:
    """One open file at a time, since the next tensor mostly is in the same; for one thread."""

    def __init__(self) -> None:
        self._open_file: tuple[Path, BinaryIO] | None = None
        self._pool = Pool(1)  # the reading thread itself, beside the packers'
        self._scratch = np.empty(0, np.uint8)

    def read(self, path: Path, offset: int, out: np.ndarray, tensor: str) -> None:
        """out, uint8 1-D = the bytes of a file from offset. Raises CheckpointError naming file and tensor."""
        try:
            file = self._file(path)
            file.seek(offset)
            n_read = file.readinto(out)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), offset, out.size, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(f"{path}: tensor '{tensor}': {error.strerror}") from None
        if n_read != out.size:
            raise CheckpointError(f"{path}: is cut off in tensor '{tensor}'; it was whole at the start")

    def fetch(self, path: Path, offset: int, n_bytes: int, tensor: str) -> np.ndarray:
        """uint8 (n_bytes,): the bytes of a file from offset, in memory that the next fetch overwrites."""
        if self._scratch.size < n_bytes:
            self._scratch = np.empty(n_bytes, np.uint8)
        self.read(path, offset, self._scratch[:n_bytes], tensor)
        return self._scratch[:n_bytes]

    def widen(self, raw: np.ndarray, type_: str, out: np.ndarray) -> None:
        """out, float32 (n_rows, n_cols) = the rows that are raw, uint8, in any format there are kernels for."""
        matrix = quant_matrix(raw, registry.get(type_), out.shape)
        expand_rows(self._pool, matrix, np.arange(len(out), dtype=np.int64), out.ctypes.data)

    def _file(self, path: Path) -> BinaryIO:
        if self._open_file is None or self._open_file[0] != path:
            self.close()
            self._open_file = path, path.open("rb", buffering=0)
        return self._open_file[1]

    def close(self) -> None:
        """Close the file that is open, if one is."""
        if self._open_file is not None:
            self._open_file[1].close()
        self._open_file = None
