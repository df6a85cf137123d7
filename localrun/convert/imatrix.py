"""Importance matrices: the mean square of what each column of a matrix is multiplied with, per expert for stacked ones.

The format is llama.cpp's GGUF one (tools/imatrix/imatrix.cpp of https://github.com/ggml-org/llama.cpp @3f545becc):
general.type "imatrix"; for each matrix <name>.in_sum2 (slices, columns), sums of squares, <name>.counts (slices, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localrun.convert.targets import Target
from localrun.errors import GGUFError
from localrun.gguf import GGUFFile, Tensor, open_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importances:
    """The importances of all targets that have some.

    Attributes:
        by_name: target -> float32 (slices, n_cols); NaN rows for slices that the text never reached.
        unreached: target -> numbers of such slices.
        missing: matrices of layers that the file has nothing for, such as those for multi-token prediction.
    """

    by_name: dict[str, np.ndarray]
    unreached: dict[str, list[int]]
    missing: list[str]


def read_imatrix(path: Path, targets: list[Target]) -> Importances:
    """The importances for these targets.

    Raises GGUFError if the file is no imatrix, or one of its matrices does not fit its target.
    """
    by_name, unreached = {}, {}
    with open_gguf(path) as file:
        if file.string("general.type", "") != "imatrix":
            raise GGUFError(f"{path}: key 'general.type' is {file.string('general.type', None)!r}, expected 'imatrix'")
        for target in targets:
            if target.name + _SUMS in file.tensors:
                mean = _mean(file, target)
                by_name[target.name] = mean
                missed = np.flatnonzero(np.isnan(mean[:, 0])).tolist()
                if missed:
                    unreached[target.name] = missed
    if not by_name:
        raise GGUFError(f"{path}: has no importances for any tensor of this model")
    matrices = [target.name for target in targets if len(target.shape) > 1 and target.name.startswith("blk.")]
    return Importances(by_name, unreached, [name for name in matrices if name not in by_name])


def _mean(file: GGUFFile, target: Target) -> np.ndarray:
    n_slices = target.n_rows // target.shape[-2] if len(target.shape) > 1 else 1
    sums = _floats(file, target.name + _SUMS).reshape(-1)
    counts = _floats(file, target.name + _COUNTS).reshape(-1)
    if sums.size != n_slices * target.n_cols or counts.size not in (1, n_slices):
        expected = f"{n_slices * target.n_cols} and {n_slices}"
        found = f"{sums.size} sums and {counts.size} counts"
        raise GGUFError(f"{file.path}: '{target.name}' has {found}, expected {expected}")
    counts = np.broadcast_to(counts, n_slices)[:, None]
    if not (np.isfinite(sums).all() and np.isfinite(counts).all() and (sums >= 0).all()):
        raise GGUFError(f"{file.path}: '{target.name}' has importances that are not finite or below 0")
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(counts > 0, sums.reshape(n_slices, -1) / counts, np.nan).astype(np.float32)


def _floats(file: GGUFFile, name: str) -> np.ndarray:
    tensor: Tensor | None = file.tensors.get(name)
    if tensor is None or tensor.type.name != "F32":
        found = "missing" if tensor is None else tensor.type.name
        raise GGUFError(f"{file.path}: tensor '{name}' is {found}, expected F32")
    return tensor.data.view(np.float32).copy()
