"""llama.cpp's own quantiser on a file, in a process of its own: what it throws ends that process."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


class QuantizeError(RuntimeError):
    """llama.cpp refused; the message is the end of its log."""


def quantize(
    source: Path, destination: Path, ftype: str, importances: dict[str, np.ndarray] | None = None, threads: int = 2
) -> None:
    """Write destination from source.

    Args:
        ftype: as in llama.h, less LLAMA_FTYPE_MOSTLY_: "Q4_K_M".
        importances: tensor name -> float32, the mean squares of all slices, as llama-quantize makes them of a file.
    """
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, **(importances or {}))
        file.flush()
        request = [str(source), str(destination), ftype, file.name, threads]
        done = subprocess.run([sys.executable, __file__, json.dumps(request)], capture_output=True, text=True)
    if done.returncode:
        raise QuantizeError("\n".join(done.stderr.strip().splitlines()[-6:]))


def _quantize(source: str, destination: str, ftype: str, importances: str, threads: int) -> None:
    """Runs in the child."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    arrays = np.load(importances)
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays.files) + 1))()  # ends with one without a name
    kept = {name: np.ascontiguousarray(arrays[name], np.float32) for name in arrays.files}
    for entry, (name, values) in zip(entries, kept.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if kept:
        params.imatrix = entries
    status = llama_cpp.llama_model_quantize(source.encode(), destination.encode(), params)
    if status:
        raise SystemExit(f"llama_model_quantize returned {status}")


if __name__ == "__main__":
    _quantize(*json.loads(sys.argv[1]))
