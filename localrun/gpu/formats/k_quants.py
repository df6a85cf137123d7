"""Units of the K-quants and of IQ4_XS: 256 weights with scales for every 16 or 32.

Shapes and returned values as blocks.unit() says.
"""

import triton
import triton.language as tl

from localrun.gpu.formats.loads import f16, f16_pair, u16


@triton.jit
def unit_2k(w, row, unit, stride):
    """Q2_K: 2 of the 4 bit pairs in 16 bytes of qs, those of sub-blocks 64 weights apart."""
    w32 = w.to(tl.pointer_type(tl.uint32))
    n4 = tl.arange(0, 4)[None, None, :]
    block = row * stride + unit // 8
    half, quarter = unit % 8 // 4, unit % 4 // 2
    d, dmin = f16_pair(tl.load(w32 + block * 21 + 20))
    at = w + block * 84 + half * 8 + unit % 4
    low, high = tl.load(at).to(tl.uint32), tl.load(at + 4).to(tl.uint32)
    s_low, s_high = d * (low & 15).to(tl.float32) * 4.0, d * (high & 15).to(tl.float32) * 4.0
    m_low, m_high = s_low + dmin * (low >> 4).to(tl.float32), s_high + dmin * (high >> 4).to(tl.float32)
    codes = tl.load(w32 + block * 21 + 4 + half * 8 + unit % 2 * 4 + n4) >> (2 * quarter)
    return codes, s_low, m_low, s_high, m_high


@triton.jit
def _scale_3k(w, block, sub):
    """sc-32 of a sub-block of Q3_K, float32."""
    low = tl.load(w + block * 110 + 96 + sub % 8).to(tl.int32) >> (sub // 8 * 4) & 15
    high = tl.load(w + block * 110 + 104 + sub % 4).to(tl.int32) >> (sub // 4 * 2) & 3
    return ((low | high << 4) - 32).to(tl.float32)


@triton.jit
def unit_3k(w, row, unit, stride):
    """Q3_K: as Q2_K, with third bits from hmask."""
    w16 = w.to(tl.pointer_type(tl.uint16))
    n8 = tl.arange(0, 8)[None, None, :]
    block = row * stride + unit // 8
    half, quarter = unit % 8 // 4, unit % 4 // 2
    d = f16(w16 + block * 55 + 54) * 8.0
    sub = half * 8 + unit % 4
    s_low, s_high = d * _scale_3k(w, block, sub), d * _scale_3k(w, block, sub + 4)
    codes = u16(w16 + block * 55 + 16 + half * 16 + unit % 2 * 8 + n8) >> (2 * quarter)
    third = u16(w16 + block * 55 + unit % 2 * 8 + n8) >> (4 * half + quarter)
    return codes, codes, third, third >> 2, s_low, s_low * 1.5, s_high, s_high * 1.5


@triton.jit
def unit_4k(w, row, unit, stride, FORMAT: tl.constexpr):
    """Q4_K, Q5_K: 16 of the 32 bytes of a pair of sub-blocks; the first one's codes are the low nibbles."""
    w32 = w.to(tl.pointer_type(tl.uint32))
    n4 = tl.arange(0, 4)[None, None, :]
    WORDS: tl.constexpr = 36 if FORMAT == "Q4_K" else 44
    at = (row * stride + unit // 8) * WORDS
    pair = unit % 8 // 2
    d, dmin = f16_pair(tl.load(w32 + at))
    s, m, both = tl.load(w32 + at + 1), tl.load(w32 + at + 2), tl.load(w32 + at + 3)
    # 6 bits each: of sub-blocks 0-3 in bytes of their own, of 4-7 with the upper two bits in those bytes.
    shift = pair % 2 * 16
    s = tl.where(pair < 2, s & 0x3F3F3F3F, (both & 0x0F0F0F0F) | (s >> 2 & 0x30303030)) >> shift
    m = tl.where(pair < 2, m & 0x3F3F3F3F, (both >> 4 & 0x0F0F0F0F) | (m >> 2 & 0x30303030)) >> shift
    s_low, s_high = d * (s & 255).to(tl.float32), d * (s >> 8 & 255).to(tl.float32)
    m_low, m_high = dmin * (m & 255).to(tl.float32), dmin * (m >> 8 & 255).to(tl.float32)
    RANGE: tl.constexpr = 16.0 if FORMAT == "Q4_K" else 32.0
    s_low, s_high = s_low * RANGE, s_high * RANGE
    m_low, m_high = s_low + m_low, s_high + m_high
    codes = tl.load(w32 + at + (WORDS - 32) + unit % 8 * 4 + n4)
    if FORMAT == "Q4_K":
        return codes, codes, codes, codes, s_low, m_low, s_high, m_high
    else:
        fifth = tl.load(w32 + at + 4 + unit % 2 * 4 + n4) >> (2 * pair)
        return codes, codes, fifth, fifth >> 1, s_low, m_low, s_high, m_high


@triton.jit
def unit_6k(w, row, unit, stride):
    """Q6_K: 16 bytes of ql; low nibbles are of one sub-block of 16, high ones of the sub-block 64 weights on."""
    w16 = w.to(tl.pointer_type(tl.uint16))
    n8 = tl.arange(0, 8)[None, None, :]
    block = row * stride + unit // 8
    half, quarter = unit % 8 // 4, unit % 4 // 2
    d = f16(w16 + block * 105 + 104)
    at = w + block * 210 + 192 + half * 8 + unit % 4
    s_low = d * tl.load(at).to(tl.int8, bitcast=True).to(tl.float32)
    s_high = d * tl.load(at + 4).to(tl.int8, bitcast=True).to(tl.float32)
    codes = u16(w16 + block * 105 + unit % 8 * 8 + n8)
    upper = u16(w16 + block * 105 + 64 + half * 16 + unit % 2 * 8 + n8) >> (2 * quarter)
    return codes, codes, upper, upper >> 4, s_low * 64.0, s_low * 96.0, s_high * 64.0, s_high * 96.0


@triton.jit
def unit_4xs(w, row, unit, stride):
    """IQ4_XS: 16 bytes of a sub-block; its scale has 4 bits in scales_l and 2 in scales_h."""
    w32 = w.to(tl.pointer_type(tl.uint32))
    n4 = tl.arange(0, 4)[None, None, :]
    at = (row * stride + unit // 8) * 34
    sub = unit % 8
    first = tl.load(w32 + at)
    d, _ = f16_pair(first)
    scale = (tl.load(w32 + at + 1) >> (4 * sub) & 15) | ((first >> 16) >> (2 * sub) & 3) << 4
    scale = d * (scale.to(tl.float32) - 32.0)
    codes = tl.load(w32 + at + 2 + sub * 4 + n4)
    return codes, scale * 256.0, scale * 384.0
