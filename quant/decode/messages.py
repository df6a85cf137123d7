"""What ranks tell each other of a layer's experts: tokens' vectors and the router's choice, and sums back.

A message to a rank: HEADER, then int64 (T, K) ids, float32 (T, K) weights, and T vectors. A message back: HEADER, then
T vectors. Vectors travel as one of three types:
    f32     as they are
    bf16    rounded to bfloat16
    fp8     E4M3, 128 columns with a scale of their own in float32 behind the vector (DeepSeek-V3, arXiv 2412.19437,
            section 3.3.2); sums come back as bf16
"""

from dataclasses import dataclass

import numpy as np

from quant.decode.message_sizes import BACK as BACK_TYPES
from quant.decode.message_sizes import HEADER_BYTES, TILE
from quant.simd.e4m3 import LARGEST, load_e4m3x16, store_e4m3x16
from quant.simd.floats import hmax
from quant.simd.memory import (
    bits_to_f32,
    load_bf16x16,
    load_f32,
    load_f32x16,
    load_u16,
    store_bf16,
    store_bf16x16,
    store_f32,
    store_f32x16,
)
from quant.simd.struct import i64, struct
from quant.simd.vectors import copy
from quant.target.jit import inline, kernel
from quant.target.kernel import Kernel

# What a message begins with.
HEADER = struct(
    "MessageHeader",
    kind=i64,
    layer=i64,
    n_tokens=i64,
    number=i64,  # of the exchange, from 1 on
    busy_ns=i64,  # of a message back: how long the rank worked
    spare=i64,
    more=i64,
    last=i64,
)
STEP, MANY, END = 1, 2, 3  # kinds: experts of a step, of many tokens, no more
TO, BACK, TO_MANY, BACK_MANY, CONTROL = 1, 2, 3, 4, 5  # tags
assert HEADER.size == HEADER_BYTES


@kernel("void(int64, int64, int64)")
def _copy(x, n, out):
    copy(x, n, out)


@kernel("void(int64, int64, int64)")
def _pack_bf16(x, n, out):
    for i in range(0, n // 16 * 16, 16):
        store_bf16x16(out + 2 * i, load_f32x16(x + 4 * i))
    for i in range(n // 16 * 16, n):
        store_bf16(out + 2 * i, load_f32(x + 4 * i))


@kernel("void(int64, int64, int64)")
def _unpack_bf16(at, n, out):
    for i in range(0, n // 16 * 16, 16):
        store_f32x16(out + 4 * i, load_bf16x16(at + 2 * i))
    for i in range(n // 16 * 16, n):
        store_f32(out + 4 * i, bits_to_f32(load_u16(at + 2 * i) << 16))


@inline
def _largest(x, first, end):
    """The largest magnitude of columns first..end."""
    largest = np.float32(0.0)
    for i in range(first, end, 16):
        largest = max(largest, hmax(abs(load_f32x16(x + 4 * i))))
    return largest


@kernel("void(int64, int64, int64)")
def _pack_fp8(x, n, out):
    for first in range(0, n, TILE):
        end = min(n, first + TILE)
        largest = _largest(x, first, end)
        inverse = np.float32(LARGEST) / largest if largest > 0 else np.float32(0.0)
        for i in range(first, end, 16):
            store_e4m3x16(out + i, load_f32x16(x + 4 * i) * inverse)
        store_f32(out + n + first // TILE * 4, largest * np.float32(1 / LARGEST))


@kernel("void(int64, int64, int64)")
def _unpack_fp8(at, n, out):
    for first in range(0, n, TILE):
        scale = load_f32(at + n + first // TILE * 4)
        for i in range(first, min(n, first + TILE), 16):
            store_f32x16(out + 4 * i, load_e4m3x16(at + i) * scale)


@dataclass(frozen=True)
class VectorType:
    """How vectors travel.

    Attributes:
        pack, unpack: void(from, n, to): float32 to what travels, and back.
        columns: what n is a multiple of.
    """

    name: str
    pack: Kernel
    unpack: Kernel
    columns: int = 1

    @property
    def back(self) -> "VectorType":
        """How sums come back."""
        return TYPES[BACK_TYPES[self.name]]


TYPES = {
    type_.name: type_
    for type_ in (
        VectorType("f32", _copy, _copy),
        VectorType("bf16", _pack_bf16, _unpack_bf16),
        VectorType("fp8", _pack_fp8, _unpack_fp8, 16),
    )
}
