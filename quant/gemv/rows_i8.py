"""Rows of a cache of 8 bits: groups of values in bytes, each with a scale, and behind them what keeps 16 bits.

A group is a byte a value, a code of -127 to 127 raised by 128, and its scale, a float32: x = scale * code. Scales have
4 significant bits, so that their products with codes are exact in float16: a row that was expanded to it packs to the
same bytes again, and what is saved in 16 bits comes back as it was.
"""

import numpy as np

from quant.simd.exact import clamp, lane, rint
from quant.simd.floats import hmax, hsum, maximum, scaled_to_i16, splat_f32x16, to_f32, zero_f32x16
from quant.simd.memory import (
    bits_to_f32,
    load_f16,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i8x16,
    load_u32,
    store_f16,
    store_f16x16,
    store_f32,
    store_f32x16,
    store_low_i8x16,
)
from quant.target.jit import inline, kernel

GROUP = 16  # a group's values are a multiple of it
SCALE_BYTES = 4
_MOST, _RAISED = 127, 128
_LEAST_SCALE = 2.0**-21  # whose last bit is the least float16
_CUT = 0xFFFFF  # bits of a float32 behind the first 4


def row_bytes(width: int, group: int) -> int:
    """Of a row of `width` values, as many whole groups as there are in front."""
    n_groups = width // group
    return n_groups * (group + SCALE_BYTES) + 2 * (width - n_groups * group)


@inline
def _scale_for(most, at):
    """What takes codes up to `most`, 16 times the same; `at`: scratch of 4 bytes. NaN is not kept."""
    store_f32(at, lane(most / np.float32(_MOST), 0))
    return splat_f32x16(max(bits_to_f32((load_u32(at) + _CUT) & ~_CUT), np.float32(_LEAST_SCALE)))


@inline
def pack_group(x, n, out):
    """n float32, a multiple of 16, as a group at `out`, n + SCALE_BYTES bytes."""
    largest, total = zero_f32x16(), zero_f32x16()
    for i in range(0, n, 16):
        v = load_f32x16(x + 4 * i)
        largest, total = maximum(largest, abs(v)), total + v
    most = splat_f32x16(hmax(largest))
    scale = _scale_for(most, out + n)
    scale = _scale_for(rint(most / scale) * scale, out + n)  # as it is found again from what comes of `most`
    store_f32(out + n, lane(scale, 0) + np.float32(0.0) * hsum(total))  # NaN, if there is one
    for i in range(0, n, 16):
        code = clamp(load_f32x16(x + 4 * i) / scale, np.float32(-_MOST), np.float32(_MOST))
        store_low_i8x16(out + i, scaled_to_i16(code, splat_f32x16(np.float32(1.0))) ^ _RAISED)


@inline
def expand_row(row, group, n, padded, out):
    """float32 (padded,) of a group and n - group values of 16 bits behind it; zeros behind those."""
    scale = load_f32(row + group)
    for i in range(0, group, 16):
        store_f32x16(out + 4 * i, to_f32(load_i8x16(row + i) ^ _RAISED) * scale)
    row += group + SCALE_BYTES
    for i in range(n - group):
        store_f32(out + 4 * (group + i), load_f16(row + 2 * i))
    for i in range(n, padded):
        store_f32(out + 4 * i, np.float32(0.0))


@kernel("void(int64, int64, int64, int64, int64)")
def pack_rows(x, n_rows, width, group, out):
    """float32 (n_rows, width) as rows."""
    for _ in range(n_rows):
        for _ in range(width // group):
            pack_group(x, group, out)
            x, out = x + 4 * group, out + group + SCALE_BYTES
        for _ in range(width % group):
            store_f16(out, load_f32(x))
            x, out = x + 4, out + 2


@kernel("void(int64, int64, int64, int64, int64)")
def expand_rows(rows, n_rows, width, group, out):
    """float16 (n_rows, width) of rows."""
    rest = width % group
    for _ in range(n_rows):
        for _ in range(width // group):
            scale = load_f32(rows + group)
            for i in range(0, group, 16):
                store_f16x16(out + 2 * i, to_f32(load_i8x16(rows + i) ^ _RAISED) * scale)
            rows, out = rows + group + SCALE_BYTES, out + 2 * group
        for i in range(0, rest // 16 * 16, 16):
            store_f16x16(out + 2 * i, load_f16x16(rows + 2 * i))
        for i in range(rest // 16 * 16, rest):
            store_f16(out + 2 * i, load_f16(rows + 2 * i))
        rows, out = rows + 2 * rest, out + 2 * rest
