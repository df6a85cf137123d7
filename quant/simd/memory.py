"""Loads, stores and prefetches: scalars and vectors at addresses, which are int64 and need no alignment."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from quant.simd.core import (
    F32,
    I8,
    I16,
    I32,
    I64,
    call,
    define,
    f32x8,
    f32x16,
    f32x32,
    i8x16,
    i8x32,
    i8x64,
    i32x8,
    i32x16,
    load,
    pointer,
    shuffle,
    splat,
    store,
)
from quant.simd.halves import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float

# ---- scalars ---------------------------------------------------------------------------------------------------------


def _single(builder, x):
    """A float32 as a vector of one lane."""
    return builder.insert_element(ir.Constant(ir.VectorType(F32, 1), ir.Undefined), x, I32(0))


def _store_low(bits: ir.IntType):
    """An intrinsic void(address, int64): its lowest bits."""
    return define(types.void, (types.int64, types.int64), lambda b, p, v: store(b, p, b.trunc(v, bits)))


def _store_as(narrow: Callable):
    """An intrinsic void(address, float32): in 16 bits."""
    return define(types.void, (types.int64, types.float32), lambda b, p, x: store(b, p, narrow(b, _single(b, x))))


load_u8 = define(types.int64, (types.int64,), lambda b, p: b.zext(load(b, p, I8), I64))
load_i8 = define(types.int64, (types.int64,), lambda b, p: b.sext(load(b, p, I8), I64))
load_u16 = define(types.int64, (types.int64,), lambda b, p: b.zext(load(b, p, I16), I64))
load_u32 = define(types.int64, (types.int64,), lambda b, p: b.zext(load(b, p, I32), I64))
load_i32 = define(types.int64, (types.int64,), lambda b, p: b.sext(load(b, p, I32), I64))
load_i64 = define(types.int64, (types.int64,), lambda b, p: load(b, p, I64))
load_f32 = define(types.float32, (types.int64,), lambda b, p: load(b, p, F32))
load_f16 = define(types.float32, (types.int64,), lambda b, p: half_to_float(b, load(b, p, I16)))
f16_to_f32 = define(types.float32, (types.int64,), lambda b, v: half_to_float(b, b.trunc(v, I16)))
bits_to_f32 = define(types.float32, (types.int64,), lambda b, v: b.bitcast(b.trunc(v, I32), F32))
store_i8, store_i16, store_i32 = _store_low(I8), _store_low(I16), _store_low(I32)
store_i64 = define(types.void, (types.int64, types.int64), store)
store_f32 = define(types.void, (types.int64, types.float32), store)
store_f16, store_bf16 = _store_as(float_to_half), _store_as(float_to_bfloat)

# ---- vectors ---------------------------------------------------------------------------------------------------------


def emit_load_f16x16(builder, address):
    """16 halves as float32."""
    return half_to_float(builder, load(builder, address, ir.VectorType(I16, 16)))


def _strided(type_: ir.VectorType, count: int):
    """emit(builder, address, stride): `count` vectors, `stride` bytes apart, joined."""

    def emit(builder, address, stride):
        parts = [load(builder, builder.add(address, builder.mul(stride, I64(i))), type_) for i in range(count)]
        while len(parts) > 1:
            width = range(2 * parts[0].type.count)
            parts = [shuffle(builder, a, b, width) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    return emit


def _load(vector):
    return define(vector, (types.int64,), lambda b, p: load(b, p, vector.ir))


def _store(vector):
    return define(types.void, (types.int64, vector), store)


load_i8x16, load_i8x32, load_i8x64, load_i32x16 = _load(i8x16), _load(i8x32), _load(i8x64), _load(i32x16)
load_i32x8 = _load(i32x8)
load_i16x16 = define(  # 16 of 16 bits with sign, as lanes of 32
    i32x16, (types.int64,), lambda b, p: b.sext(load(b, p, ir.VectorType(I16, 16)), i32x16.ir)
)
load_f32x8, load_f32x16, load_f32x32 = _load(f32x8), _load(f32x16), _load(f32x32)
store_i8x16, store_i8x32, store_i32x8, store_i32x16 = _store(i8x16), _store(i8x32), _store(i32x8), _store(i32x16)
store_f32x8, store_f32x16, store_f32x32 = _store(f32x8), _store(f32x16), _store(f32x32)
store_i8x64 = _store(i8x64)
store_low_i8x16 = define(types.void, (types.int64, i32x16), lambda b, p, v: store(b, p, b.trunc(v, i8x16.ir)))
store_low_i16x16 = define(  # of each lane the lower 16 bits
    types.void, (types.int64, i32x16), lambda b, p, v: store(b, p, b.trunc(v, ir.VectorType(I16, 16)))
)


def _store_low_i16x32(builder, address, first, second):
    first, second = (builder.bitcast(v, ir.VectorType(I16, 32)) for v in (first, second))
    store(builder, address, shuffle(builder, first, second, range(0, 64, 2)))


store_low_i16x32 = define(types.void, (types.int64, i32x16, i32x16), _store_low_i16x32)  # the same of two vectors


def _store_every(n: int):
    """An intrinsic void(address, i8x32): bytes i, i+n, ... for i in 0..n-1, 64 bytes apart."""
    words = ir.VectorType(ir.IntType(8 * 32 // n), n)

    def emit(builder, address, v):
        v = builder.bitcast(shuffle(builder, v, None, [i + n * k for i in range(n) for k in range(32 // n)]), words)
        for i in range(n):
            store(builder, builder.add(address, I64(64 * i)), builder.extract_element(v, I32(i)))

    return define(types.void, (types.int64, i8x32), emit)


store_every_fourth, store_every_eighth = _store_every(4), _store_every(8)
load_f16x16 = define(f32x16, (types.int64,), emit_load_f16x16)
load_bf16x16 = define(f32x16, (types.int64,), lambda b, p: bfloat_to_float(b, load(b, p, ir.VectorType(I16, 16))))
load_u16x16 = define(  # as 32-bit lanes
    i32x16, (types.int64,), lambda b, p: b.zext(load(b, p, ir.VectorType(I16, 16)), i32x16.ir)
)
store_f16x16 = define(types.void, (types.int64, f32x16), lambda b, p, x: store(b, p, float_to_half(b, x)))
store_bf16x16 = define(types.void, (types.int64, f32x16), lambda b, p, x: store(b, p, float_to_bfloat(b, x)))

load_twice = define(  # 32 bytes in either half
    i8x64, (types.int64,), lambda b, p: shuffle(b, load(b, p, i8x32.ir), None, [*range(32)] * 2)
)
load_quarters = define(i8x64, (types.int64, types.int64), _strided(i8x16.ir, 4))  # (address, stride)
load_halves = define(i8x64, (types.int64, types.int64), _strided(i8x32.ir, 2))  # (address, stride)


def _load_eight_everywhere(builder, address):
    return builder.bitcast(splat(builder, load(builder, address, I64), ir.VectorType(I64, 4)), i8x32.ir)


def _store_eights(builder, address, stride, v):
    eights = builder.bitcast(v, ir.VectorType(I64, 4))
    for i in range(4):
        at = builder.add(address, builder.mul(stride, I64(i)))
        store(builder, at, builder.extract_element(eights, I32(i)))


load_eight_everywhere = define(i8x32, (types.int64,), _load_eight_everywhere)  # 8 bytes, four times
load_16_twice = define(i8x32, (types.int64,), lambda b, p: shuffle(b, load(b, p, i8x16.ir), None, [*range(16)] * 2))
store_eights = define(types.void, (types.int64, types.int64, i8x32), _store_eights)  # 8 bytes each, `stride` apart


def load_i8x16_picked(lanes: Sequence[int]):
    """An intrinsic f32x16(address): 16 signed bytes in this order, as floats."""

    def emit(builder, address):
        picked = shuffle(builder, load(builder, address, i8x16.ir), None, lanes)
        return builder.sitofp(builder.sext(picked, i32x16.ir), f32x16.ir)

    return define(f32x16, (types.int64,), emit)


def load_words_picked(lanes: Sequence[int]):
    """An intrinsic i8x16(address, stride): the bytes of 4 words, `stride` bytes apart, in this order."""
    words = _strided(ir.VectorType(I8, 4), 4)
    return define(i8x16, (types.int64, types.int64), lambda b, p, n: shuffle(b, words(b, p, n), None, lanes))


def load_word_times(factors: Sequence[int]):
    """An intrinsic i8x16(address): the 4 bytes there times each of 4 factors, modulo 256."""
    bytes_ = ir.Constant(i8x16.ir, [factor for factor in factors for _ in range(4)])

    def emit(builder, address):
        word = load(builder, address, ir.VectorType(I8, 4))
        return builder.mul(shuffle(builder, word, None, [*range(4)] * 4), bytes_)

    return define(i8x16, (types.int64,), emit)


def _f16_pair(lanes: int):
    def emit(builder, address):
        pair = splat(builder, load(builder, address, I32), ir.VectorType(I32, lanes // 2))
        return half_to_float(builder, builder.bitcast(pair, ir.VectorType(I16, lanes)))

    return emit


def _f16_lanes(builder, address, lanes: int):
    return splat(builder, load(builder, address, I16), ir.VectorType(I16, lanes))


def _f16_everywhere(lanes: int):
    return lambda b, p: half_to_float(b, _f16_lanes(b, p, lanes))


load_f16_pair = define(f32x16, (types.int64,), _f16_pair(16))  # the two halves at the address, in turn over all lanes
load_f16_pair_in_8 = define(f32x8, (types.int64,), _f16_pair(8))  # the same in 8 lanes
load_f16_everywhere = define(f32x16, (types.int64,), _f16_everywhere(16))  # the half at the address in every lane
load_f16_in_halves = define(  # of two addresses: the half at each in one half of the lanes
    f32x16,
    (types.int64, types.int64),
    lambda b, p, q: half_to_float(b, shuffle(b, *(_f16_lanes(b, at, 8) for at in (p, q)), range(16))),
)


def _f16_in_halves(builder, both):
    words = builder.bitcast(builder.trunc(both, I32), ir.VectorType(I16, 2))
    return half_to_float(builder, shuffle(builder, words, None, [0] * 8 + [1] * 8))


f16_in_halves = define(f32x16, (types.int64,), _f16_in_halves)  # two halves in 32 bits: each in one half of the lanes
load_f16_in_8 = define(f32x8, (types.int64,), _f16_everywhere(8))  # the same in 8 lanes

# ---- caches, and memory of a kernel's own ----------------------------------------------------------------------------


def emit_prefetch(builder, address, locality: int) -> None:
    """Read; locality 2 is prefetcht1 (into L2), 3 is prefetcht0 (into L1)."""
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer(builder, address, I8), I32(0), I32(locality), I32(1))


# Streamed weights are first brought into L2: measured 1.4x over prefetcht0.
prefetch = define(types.void, (types.int64,), lambda b, p: emit_prefetch(b, p, 2))
prefetch_near = define(types.void, (types.int64,), lambda b, p: emit_prefetch(b, p, 3))


def emit_table(builder, values: np.ndarray):
    """The address of constants that lie beside the code, 64-byte aligned."""
    data = values.tobytes()
    name = f"table.{hashlib.sha256(data).hexdigest()[:16]}"
    table = builder.module.globals.get(name)
    if table is None:
        table = cgutils.global_constant(builder.module, name, ir.Constant(ir.ArrayType(I8, len(data)), bytearray(data)))
        table.unnamed_addr, table.align = True, 64
    return builder.ptrtoint(table, I64)


def stack(n_bytes: int) -> Callable:
    """An intrinsic int64(): the address of n_bytes that live as long as the kernel's call, 64-byte aligned."""

    def emit(builder):
        memory = cgutils.alloca_once(builder, ir.VectorType(I8, 64), size=(n_bytes + 63) // 64)
        memory.align = 64
        return builder.ptrtoint(memory, I64)

    return define(types.int64, (), emit)
