"""float32 rows to the bytes of a type, slice by slice, each with its own importance."""

from __future__ import annotations

import numpy as np

from localrun.convert.errors import CheckpointError
from localrun.convert.targets import Target, Unit
from quant import formats
from quant.pool import Pool

F16_MAX = 65504.0


def pack_unit(
    pool: Pool, rows: np.ndarray, target: Target, unit: Unit, type_: str, importance: np.ndarray | None
) -> np.ndarray:
    """uint8, 1-D: the unit's rows in a type.

    Args:
        rows: float32 (n_rows, n_cols), finite, C order; or uint8, already in the type.
        importance: float32 (slices of the target, n_cols), NaN in the rows of slices without one; or None.

    Raises CheckpointError if a value is too large for F16.
    """
    if rows.dtype == np.uint8:
        return rows.reshape(-1)
    if type_ == "F32":
        return rows.reshape(-1).view(np.uint8)
    if type_ == "F16" and np.abs(rows).max() > F16_MAX:
        raise CheckpointError(
            f"'{target.name}' has a weight of {np.abs(rows).max():g}, too large for F16; BF16 holds it"
        )
    format_ = formats.get(type_)
    out = np.empty((len(rows), format_.row_bytes(target.n_cols)), np.uint8)
    if importance is None:
        _pack(pool, format_, rows, out, None)
        return out.reshape(-1)
    slice_rows = target.shape[-2]
    at = 0
    while at < len(rows):
        index, row = divmod(unit.first_row + at, slice_rows)
        stop = min(at + slice_rows - row, len(rows))
        weights = importance[index]
        _pack(pool, format_, rows[at:stop], out[at:stop], None if np.isnan(weights[0]) else weights)
        at = stop
    return out.reshape(-1)


def _pack(
    pool: Pool, format_: formats.Format, rows: np.ndarray, out: np.ndarray, importance: np.ndarray | None
) -> None:
    from quant.pack import pack

    address = 0 if importance is None else importance.ctypes.data
    pack(pool, format_, rows.ctypes.data, len(rows), rows.shape[1], out.ctypes.data, address)
