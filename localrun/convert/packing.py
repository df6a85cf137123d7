"""float32 rows to the bytes of a type, slice by slice, each with its own importance."""

from __future__ import annotations

import numpy as np

from localrun.convert.targets import Target, Unit
from quant.block_format import Format
from quant.formats import registry
from quant.threads.pool import Pool


class BadWeight(Exception):
    """A weight that cannot be packed: where in the unit, and its value."""

    def __init__(self, row: int, column: int, value: float) -> None:
        super().__init__(row, column, value)
        self.row, self.column, self.value = row, column, value


def pack_unit(
    pool: Pool, rows: np.ndarray, target: Target, unit: Unit, type_: str, importance: np.ndarray | None
) -> np.ndarray:
    """uint8, 1-D: the unit's rows in a plain type.

    Args:
        rows: float32 (n_rows, n_cols), C order.
        importance: float32 (slices of the target, n_cols), NaN in the rows of slices without one; or None.

    Raises BadWeight if a weight is not finite, or beyond what the type can hold.
    """
    format_ = registry.get(type_)
    out = np.empty((len(rows), format_.row_bytes(target.n_cols)), np.uint8)
    if importance is None:
        _pack(pool, format_, rows, out, None, 0)
        return out.reshape(-1)
    slice_rows = target.shape[-2]
    at = 0
    while at < len(rows):
        index, row = divmod(unit.first_row + at, slice_rows)
        stop = min(at + slice_rows - row, len(rows))
        weights = None if np.isnan(importance[index, 0]) else importance[index]
        _pack(pool, format_, rows[at:stop], out[at:stop], weights, at)
        at = stop
    return out.reshape(-1)


def _pack(
    pool: Pool,
    format_: Format,
    rows: np.ndarray,
    out: np.ndarray,
    importance: np.ndarray | None,
    first: int,
) -> None:
    """Packs rows, the first of which is number `first` of the unit."""
    from quant.quantize.tensor import pack

    address = 0 if importance is None else importance.ctypes.data
    wrong = pack(pool, format_, rows.ctypes.data, len(rows), rows.shape[1], out.ctypes.data, address)
    if wrong >= 0:
        row, column = divmod(wrong, rows.shape[1])
        raise BadWeight(first + row, column, float(rows[row, column]))
