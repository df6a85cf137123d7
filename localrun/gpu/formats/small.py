"""Units of plain floats and of formats with small blocks: 32 weights, or 64, 128 and 256 with a scale for all.

Shapes and returned values as blocks.unit() says.
"""

import triton
import triton.language as tl

from localrun.gpu.formats.loads import f16, f16_pair, float_bits, u16


@triton.jit
def unit_float(w, row, unit, stride, n_cols, FORMAT: tl.constexpr):
    """32 numbers as they are; columns past the row's end are read from its last one."""
    if FORMAT == "F32":
        w = w.to(tl.pointer_type(tl.float32))
    elif FORMAT == "F16":
        w = w.to(tl.pointer_type(tl.float16))
    elif FORMAT == "BF16":
        w = w.to(tl.pointer_type(tl.bfloat16))
    column = unit * 32 + tl.arange(0, 16)[None, None, :]
    low = tl.load(w + row * stride + tl.minimum(column, n_cols - 1))
    high = tl.load(w + row * stride + tl.minimum(column + 16, n_cols - 1))
    return low, high


@triton.jit
def unit_mxfp4(w, row, unit, stride):
    """A unit is a block of 17 bytes: words are bytes."""
    at = w + (row * stride + unit) * 17
    codes = tl.load(at + 1 + tl.arange(0, 16)[None, None, :]).to(tl.uint32)
    e = tl.load(at).to(tl.uint32)
    # 2^(e-128); e below 2 gives a subnormal.
    scale = float_bits(tl.where(e < 2, 0x00200000 << tl.minimum(e, 1), (tl.maximum(e, 1) - 1) << 23))
    return codes, scale * 32.0, scale * 44.0


@triton.jit
def _scale_nvfp4(d, sub):
    """Half of what byte `sub` of a word says: E4M3 without a sign, and 0 where that is NaN."""
    code = d >> (8 * sub) & 255
    bits = tl.where(code == 0x7F, 0, (code & 0x7F) << 7)  # as f16, whose exponent's bias is 8 more
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 128.0


@triton.jit
def unit_nvfp4(w, row, unit, stride):
    """Half a block: a half has 8 bytes, whose low nibbles come first."""
    w32 = w.to(tl.pointer_type(tl.uint32))
    n4 = tl.arange(0, 4)[None, None, :]
    at, sub = (row * stride + unit // 2) * 9, unit % 2 * 2
    d = tl.load(w32 + at)
    s_low, s_high = _scale_nvfp4(d, sub), _scale_nvfp4(d, sub + 1)
    low, high = tl.load(w32 + at + 1 + sub * 2 + n4 % 2), tl.load(w32 + at + 3 + sub * 2 + n4 % 2)
    # weights() takes the low half's codes from bit 0 on, the high one's from bit 4.
    low, high = tl.where(n4 < 2, low, low >> 4), tl.where(n4 < 2, high << 4, high)
    return low, high, s_low * 32.0, s_low * 44.0, s_high * 32.0, s_high * 44.0


@triton.jit
def _ternary_digit(byte, n):
    """Digit n in base 3 of bytes that are fractions in 256ths."""
    power = tl.where(n == 0, 1, tl.where(n == 1, 3, tl.where(n == 2, 9, tl.where(n == 3, 27, 81))))
    return ((byte.to(tl.uint32) * power & 255) * 3 >> 8).to(tl.uint32)


@triton.jit
def unit_tq1(w, row, unit, stride):
    """TQ1_0: 32 digits, of which byte and number follow from the unit: see the module of quant."""
    n16 = tl.arange(0, 16)[None, None, :]
    at, j = w + (row * stride + unit // 8) * 54, unit % 8
    d = f16((at + 52).to(tl.pointer_type(tl.uint16)))
    low = tl.load(at + tl.where(j < 5, 0, 32) + n16)
    high = tl.load(at + tl.where(j < 5, 16 + n16, tl.where(j < 7, 32 + n16, 48 + n16 % 4)))
    low = _ternary_digit(low, tl.where(j < 5, j, 2 * (j - 5)))
    high = _ternary_digit(high, tl.where(j < 5, j, tl.where(j < 7, 2 * j - 9, n16 // 4)))
    return low, high, d * 4.0, d * 5.0


@triton.jit
def unit_tq2(w, row, unit, stride):
    """TQ2_0: bit pairs as Q2_K's, one scale."""
    w16 = w.to(tl.pointer_type(tl.uint16))
    n8 = tl.arange(0, 8)[None, None, :]
    block = row * stride + unit // 8
    d = f16(w16 + block * 33 + 32)
    codes = u16(w16 + block * 33 + unit % 8 // 4 * 16 + unit % 2 * 8 + n8) >> (unit % 4 // 2 * 2)
    return codes, d * 4.0, d * 5.0


@triton.jit
def unit_q1(w, row, unit, stride):
    """Q1_0: a half is 16 bits."""
    w16 = w.to(tl.pointer_type(tl.uint16))
    n8 = tl.arange(0, 8)[None, None, :]
    at = w16 + (row * stride + unit // 4) * 9
    low, high = u16(at + 1 + unit % 4 * 2), u16(at + 2 + unit % 4 * 2)
    d = f16(at)
    return low >> (2 * n8), high >> (2 * n8), d * 4.0, d * 5.0


@triton.jit
def unit_32(w, row, unit, stride, FORMAT: tl.constexpr):
    """A unit is a block: words of both halves, fifth bits of both, scale, offset."""
    block = row * stride + unit
    w16 = w.to(tl.pointer_type(tl.uint16))
    w32 = w.to(tl.pointer_type(tl.uint32))
    n8 = tl.arange(0, 8)[None, None, :]
    n4 = tl.arange(0, 4)[None, None, :]
    if FORMAT == "Q8_0":
        scale = f16(w16 + block * 17)
        low = u16(w16 + block * 17 + 1 + n8)
        high = u16(w16 + block * 17 + 9 + n8)
        return low, high, low, high, scale * 256.0, scale * 384.0
    elif FORMAT == "Q4_1":
        scale, minimum = f16_pair(tl.load(w32 + block * 5))
        codes = tl.load(w32 + block * 5 + 1 + n4)
        return codes, codes, codes, codes, scale * 16.0, scale * 16.0 - minimum
    elif FORMAT == "Q5_1":
        scale, minimum = f16_pair(tl.load(w32 + block * 6))
        fifth = tl.load(w32 + block * 6 + 1)
        codes = tl.load(w32 + block * 6 + 2 + n4)
        return codes, codes, fifth >> (4 * n4), fifth >> (4 * n4 + 16), scale * 32.0, scale * 32.0 - minimum
    elif FORMAT == "Q5_0":
        scale = f16(w16 + block * 11)
        low, high = u16(w16 + block * 11 + 1), u16(w16 + block * 11 + 2)
        codes = u16(w16 + block * 11 + 3 + n8)
        return codes, codes, low >> (2 * n8), high >> (2 * n8), scale * 32.0, scale * 48.0
    else:  # Q4_0, IQ4_NL
        scale = f16(w16 + block * 9)
        codes = u16(w16 + block * 9 + 1 + n8)
        if FORMAT == "Q4_0":
            return codes, codes, codes, codes, scale * 16.0, scale * 24.0
        else:
            return codes, codes, codes, codes, scale * 256.0, scale * 384.0
