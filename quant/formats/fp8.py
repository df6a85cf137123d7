"""FP8 E4M3 with a scale a block of rows and columns, as published checkpoints have it: a source, never a result.

A byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, NaN is all ones (OCP 8-bit Floating Point
Specification 1.0, E4M3). A weight is its byte's value times the scale of its block; blocks at the edges are cut off.
"""

import numpy as np

from quant.errors import QuantError
from quant.simd.e4m3 import load_e4m3x16
from quant.simd.memory import load_f32, load_u8, store_f32, store_f32x16
from quant.target.jit import kernel


def _values() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(code & 127) == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)


VALUES = _values()  # float32 (256,): what each byte means


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def _expand(codes, n_rows, n_cols, scales, first_row, block_rows, block_cols, values, out):
    n_block_cols = (n_cols + block_cols - 1) // block_cols
    for r in range(n_rows):
        row_scales = scales + 4 * n_block_cols * ((first_row + r) // block_rows)
        for block in range(n_block_cols):
            scale = load_f32(row_scales + 4 * block)
            first, last = n_cols * r + block_cols * block, n_cols * r + min(n_cols, block_cols * (block + 1))
            whole = first + (last - first) // 16 * 16
            for c in range(first, whole, 16):
                store_f32x16(out + 4 * c, load_e4m3x16(codes + c) * scale)
            for c in range(whole, last):
                store_f32(out + 4 * c, load_f32(values + 4 * load_u8(codes + c)) * scale)


def expand(codes: np.ndarray, scales: np.ndarray, first_row: int, block: tuple[int, int], out: np.ndarray) -> None:
    """out = the weights of some rows of a matrix.

    Args:
        codes: uint8 (R, C), C order.
        scales: float32, C order: one for each block of the whole matrix, by rows of blocks.
        first_row: where in the matrix the rows start.
        block: rows and columns that share a scale.
        out: float32 (R, C), C order.

    Raises:
        QuantError: there are too few scales, or the arrays don't fit each other.
    """
    n_rows, n_cols = codes.shape
    n_scales = -(-(first_row + n_rows) // block[0]) * -(-n_cols // block[1])
    arrays = ((codes, np.uint8), (scales, np.float32), (out, np.float32))
    if any(array.dtype != dtype or not array.flags.c_contiguous for array, dtype in arrays) or out.shape != codes.shape:
        raise QuantError("codes, scales and out must be uint8, float32 and float32, in C order, codes and out alike")
    if scales.size < n_scales:
        raise QuantError(f"{scales.size} scales for rows to {first_row + n_rows} of {n_cols}; expected {n_scales}")
    _expand.ctypes(
        codes.ctypes.data, n_rows, n_cols, scales.ctypes.data, first_row, *block, VALUES.ctypes.data, out.ctypes.data
    )
