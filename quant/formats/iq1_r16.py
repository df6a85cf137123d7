"""IQ1_S and IQ1_M widened: two bits a weight in place of an index, and 16 rows interleaved (interleave.py).

A weight is a code 0, 1 or 2, which needs no lookup; the rest is the plain block's. 256 weights in 70 and 76 bytes, 1.40
and 1.36 times the file's, made in RAM alone. x = d/8 * (2*s+1) * (8*code + 2*up - 9), up: that delta is 1/8, not -1/8.
IQ1_S: qs u8[64] @0, byte j of word w: columns 16w + 4k + j in bits 2k and 2k+1 | scales u8[4] @64, a nibble for 32
columns: s, and in bit 3 not up | d f16 @68. IQ1_M: qs | scales u8[8] @64, a nibble for 16 columns: s, and in bit 3 not
up of the first 8 | deltas u16 @72, not up of the last 8 | d f16 @74. A lane is a row.
"""

from dataclasses import replace

import numpy as np
from numba import types

from quant.block_format import ROWS, WIDEN, Format, PanelFormat, block_layout, offsets
from quant.formats import codebooks
from quant.formats import iq1 as plain
from quant.formats.interleave import interleaved
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, SYMMETRIC, TWO_SCALES
from quant.gemm.repack import SCALES as K_BLOCK_SCALES
from quant.gemm.repack import repacks
from quant.gemv.interleaved import FLOATS, WORDS, Block, Token, as_bytes, masked
from quant.simd.core import I32, I64, constant, define, load
from quant.simd.dots import emit_dot_u8
from quant.simd.floats import emit_fma, to_f32
from quant.simd.memory import (
    emit_table,
    load_f16x16,
    load_i32x16,
    load_i64,
    load_u8,
    load_u16,
    load_u16x16,
    store_f32x16,
    store_i16,
    store_i32,
    store_i32x16,
)
from quant.target.jit import inline, kernel

LAYOUT_S = block_layout(70, qs="64u1", scales="4u1", d="<f2")
LAYOUT_M = block_layout(76, qs="64u1", scales="8u1", deltas="<u2", d="<f2")
LAYOUT_S_BYTES, LAYOUT_M_BYTES = LAYOUT_S.itemsize, LAYOUT_M.itemsize
OFFSET = 9


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """uint8 (..., 8 or 16): scales of blocks (...)."""
    return np.stack([raw["scales"] & 15, raw["scales"] >> 4], -1).reshape(*raw.shape, -1)


def _unpack(raw: np.ndarray, sign: np.ndarray, d: np.ndarray) -> np.ndarray:
    """float32 (..., 256): sign (..., 32), whether delta is negative; d (...) float32."""
    codes = raw["qs"].reshape(*raw.shape, 16, 1, 4) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    w = codes.reshape(*raw.shape, 32, 8).astype(np.float32) - 1 + np.where(sign, -plain.DELTA, plain.DELTA)[..., None]
    scale = d[..., None] * (2 * (_nibbles(raw) & 7) + 1).astype(np.float32)
    return (scale[..., None] * w.reshape(*scale.shape, -1)).reshape(*raw.shape, 256)


def unpack_s(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*70) -> float32 (..., n*256), bit-equal to those of the plain blocks."""
    raw = blocks.view(LAYOUT_S)
    x = _unpack(raw, np.repeat(_nibbles(raw) > 7, 4, -1), raw["d"].astype(np.float32))
    return x.reshape(*blocks.shape[:-1], -1)


def unpack_m(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*76) -> float32 (..., n*256), bit-equal to those of the plain blocks."""
    raw = blocks.view(LAYOUT_M)
    last = raw["deltas"][..., None] >> np.arange(16, dtype=np.uint16) & 1
    sign = np.stack([_nibbles(raw) > 7, last == 1], -1).reshape(*raw.shape, 32)
    return _unpack(raw, sign, raw["d"].astype(np.float32)).reshape(*blocks.shape[:-1], -1)


# ---- from plain blocks -----------------------------------------------------------------------------------------------


def _codes() -> np.ndarray:
    """uint32 (2048,): of each entry, weight 4k + j + 1 in bits 2k and 2k+1 of byte j."""
    codes = (codebooks.grid("IQ1_S").reshape(-1, 2, 4) + 1).astype(np.uint8)
    return np.ascontiguousarray(codes[:, 0] | codes[:, 1] << 2).view("<u4")[:, 0]


_codes_of = define(
    types.int64,
    (types.int64,),
    lambda b, i: b.zext(load(b, b.add(emit_table(b, _codes()), b.mul(i, I64(4))), I32), I64),
)
QS_S, SCALES_S, D_S = offsets(LAYOUT_S)
QS_M, SCALES_M, DELTAS, D_M = offsets(LAYOUT_M)


@kernel(WIDEN)
def _widen_s(blocks, n_blocks, out):
    for _ in range(n_blocks):
        scales = 0
        for j in range(8):
            qh = load_u16(blocks + plain.QH_S + 2 * j)
            scales |= (qh >> 12) << 4 * j
            for i in range(2):
                qs = blocks + plain.QS_S + 4 * j + 2 * i
                first = load_u8(qs) | (qh >> 6 * i & 7) << 8
                second = load_u8(qs + 1) | (qh >> 6 * i + 3 & 7) << 8
                store_i32(out + QS_S + 8 * j + 4 * i, _codes_of(first) | _codes_of(second) << 4)
        store_i32(out + SCALES_S, scales)
        store_i16(out + D_S, load_u16(blocks + plain.D))
        blocks += plain.BYTES_S
        out += LAYOUT_S_BYTES


@kernel(WIDEN)
def _widen_m(blocks, n_blocks, out):
    for _ in range(n_blocks):
        d = deltas = 0
        for j in range(4):
            word, nibbles = load_u16(blocks + plain.SCALES + 2 * j), 0
            d |= (word >> 12) << 4 * j
            for i in range(4):
                at = 4 * j + i
                qh, qs = load_u8(blocks + plain.QH_M + at), blocks + plain.QS_M + 2 * at
                nibbles |= (word >> 3 * i & 7 | qh & 8) << 4 * i
                deltas |= (qh >> 7) << at
                first, second = load_u8(qs) | (qh & 7) << 8, load_u8(qs + 1) | (qh >> 4 & 7) << 8
                store_i32(out + QS_M + 4 * at, _codes_of(first) | _codes_of(second) << 4)
            store_i16(out + SCALES_M + 2 * j, nibbles)
        store_i16(out + DELTAS, deltas)
        store_i16(out + D_M, d)
        blocks += plain.BYTES_M
        out += LAYOUT_M_BYTES


# ---- products --------------------------------------------------------------------------------------------------------


def _up(builder, words, bit: int):
    """0x02020202 in the lanes in which this bit is not set."""
    is_up = builder.icmp_unsigned("==", masked(builder, words, 0, 1 << bit), constant(WORDS, 0))
    return builder.select(is_up, constant(WORDS, 0x02020202), constant(WORDS, 0))


def _raised(builder, words, k: int, up):
    """8*code + 2*up of 4 columns."""
    return as_bytes(builder, builder.or_(masked(builder, words, 2 * k - 3, 0x18181818), up))


def _scale(builder, words, shift: int):
    """2*s + 1, s from bit `shift` on."""
    return builder.sitofp(builder.or_(masked(builder, words, shift - 1, 14), constant(WORDS, 1)), FLOATS)


def _add_word(builder, block: Block, tokens: list[Token], dots: list, w: int, ups: list) -> list:
    """Products of 16 columns; ups: of the first 8 and the last."""
    words = block.words(ROWS * 4 * w)
    for k in range(4):
        weights = _raised(builder, words, k, ups[k // 2])
        columns = (token.columns(16 * w + 4 * k) for token in tokens)
        dots = [emit_dot_u8(builder, total, weights, x) for total, x in zip(dots, columns, strict=True)]
    return dots


def _scaled(builder, d, sums: list, totals: list) -> list:
    d = builder.fmul(d, constant(FLOATS, 0.125))
    return [emit_fma(builder, d, total, before) for total, before in zip(sums, totals, strict=True)]


def _add_block_s(block: Block, tokens: list[Token], totals: list) -> list:
    builder, sums = block.builder, [constant(FLOATS, 0.0)] * len(tokens)
    fields = block.words(ROWS * SCALES_S)
    for j in range(8):
        dots, up = [constant(WORDS, 0)] * len(tokens), _up(builder, fields, 4 * j + 3)
        for w in (2 * j, 2 * j + 1):
            dots = _add_word(builder, block, tokens, dots, w, [up, up])
        scale = _scale(builder, fields, 4 * j)
        for t, token in enumerate(tokens):
            terms = builder.fmul(builder.sitofp(dots[t], FLOATS), token.scale(j))
            terms = emit_fma(builder, constant(FLOATS, -9.0), token.scaled_sum(j), terms)
            sums[t] = emit_fma(builder, terms, scale, sums[t])
    return _scaled(builder, block.halves(ROWS * D_S), sums, totals)


def _add_block_m(block: Block, tokens: list[Token], totals: list) -> list:
    builder, sums = block.builder, [constant(FLOATS, 0.0)] * len(tokens)
    fields = [block.words(ROWS * SCALES_M), block.words(ROWS * (SCALES_M + 4))]
    deltas = block.shorts(ROWS * DELTAS)
    for w in range(16):
        ups = [_up(builder, fields[w // 8], 4 * (w % 8) + 3), _up(builder, deltas, w)]
        dots = _add_word(builder, block, tokens, [constant(WORDS, 0)] * len(tokens), w, ups)
        scale = _scale(builder, fields[w // 8], 4 * (w % 8))
        for t, token in enumerate(tokens):
            terms = emit_fma(builder, constant(FLOATS, -9.0), token.half_sum(w), builder.sitofp(dots[t], FLOATS))
            sums[t] = emit_fma(builder, builder.fmul(terms, token.scale(w // 2)), scale, sums[t])
    return _scaled(builder, block.halves(ROWS * D_M), sums, totals)


# ---- panels ----------------------------------------------------------------------------------------------------------


@inline
def _store_codes(words, k, up, out):
    """8*code + 2*up of 4 columns of 16 rows; up: 1 in the lanes where delta is."""
    store_i32x16(out, (words >> 2 * k & 0x03030303) * 8 | up * 0x02020202)


@inline
def _scales(fields, d):
    """d/8 * (2*s+1) of the lowest nibbles."""
    return to_f32((fields & 7) * 2 + 1) * (d * np.float32(0.125))


@repacks
def _repack_s(rows, n_blocks, out):
    block = load_i64(rows)
    for _ in range(n_blocks):
        fields, d = load_i32x16(block + ROWS * SCALES_S), load_f16x16(block + ROWS * D_S)
        for j in range(8):
            up = fields >> 3 & 1 ^ 1
            for g in range(8):
                words = load_i32x16(block + ROWS * 4 * (2 * j + g // 4))
                _store_codes(words, g % 4, up, out + 64 * g)
            store_f32x16(out + K_BLOCK_SCALES, _scales(fields, d))
            fields, out = fields >> 4, out + K_BLOCK_BYTES
        block += ROWS * LAYOUT_S_BYTES


@repacks
def _repack_m(rows, n_blocks, out):
    block = load_i64(rows)
    for _ in range(n_blocks):
        deltas, d = load_u16x16(block + ROWS * DELTAS), load_f16x16(block + ROWS * D_M)
        for w in range(16):
            fields = load_i32x16(block + ROWS * (SCALES_M + 4 * (w // 8))) >> 4 * (w % 8)
            words, to = load_i32x16(block + ROWS * 4 * w), out + 256 * (w % 2)
            for k in range(4):
                _store_codes(words, k, (fields >> 3 if k < 2 else deltas >> w) & 1 ^ 1, to + 64 * k)
            store_f32x16(out + K_BLOCK_SCALES + 64 * (w % 2), _scales(fields, d))
            out += K_BLOCK_BYTES * (w % 2)
        block += ROWS * LAYOUT_M_BYTES


def _format(of: Format, layout, unpack, add_block, panels, widen) -> Format:
    wide = replace(of, layout=layout, unpack=unpack)
    return replace(interleaved(wide, add_block, panels), widen=widen)


IQ1_S_R16 = _format(plain.IQ1_S, LAYOUT_S, unpack_s, _add_block_s, PanelFormat(SYMMETRIC, OFFSET, _repack_s), _widen_s)
IQ1_M_R16 = _format(plain.IQ1_M, LAYOUT_M, unpack_m, _add_block_m, PanelFormat(TWO_SCALES, OFFSET, _repack_m), _widen_m)
