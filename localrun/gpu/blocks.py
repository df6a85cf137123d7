"""How the blocks of each GGUF format become weights inside Triton kernels, from the file's bytes as they are.

A row is a sequence of units: 32 weights, two halves (low, high) of 16. Where the format has nibbles, one string of 16
bytes holds both. unit() loads the bytes of many units as words, as wide as a block's alignment allows, each once, and
with them what a half's weights share; weights() takes byte b out of every word. A word of n bytes thus gives n planes
of weights, and a plane's element i is the half's weight n * i + b: activations come in the same order.

Integer codes are written into the mantissa of 1.0, u = 1 + code / 2^bits: a shift and one logical operation instead
of a conversion at a fraction of their rate. A weight is scale * u - offset, in float32.

Shapes: R rows, U units, N words in 16 bytes. Source of the layouts: the modules of quant, one a format.
"""

from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

from quant.formats import codebooks


@dataclass(frozen=True)
class Layout:
    """How kernels read a format.

    Attributes:
        name: ggml's, or FP8_E4M3 (one byte a weight, and a float32 scale for every 128 x 128).
        block: weights in a block.
        block_bytes: bytes of a block.
        word: bytes of a word, and planes of a half.
    """

    name: str
    block: int
    block_bytes: int
    word: int

    @property
    def n_words(self) -> int:
        """Words that hold the codes of a half (or of both)."""
        return 16 // self.word


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("F32", 1, 4, 1),
        Layout("F16", 1, 2, 1),
        Layout("BF16", 1, 2, 1),
        Layout("FP8_E4M3", 1, 1, 1),
        Layout("Q4_0", 32, 18, 2),
        Layout("Q4_1", 32, 20, 4),
        Layout("Q5_0", 32, 22, 2),
        Layout("Q5_1", 32, 24, 4),
        Layout("Q8_0", 32, 34, 2),
        Layout("Q2_K", 256, 84, 4),
        Layout("Q3_K", 256, 110, 2),
        Layout("Q4_K", 256, 144, 4),
        Layout("Q5_K", 256, 176, 4),
        Layout("Q6_K", 256, 210, 2),
        Layout("IQ4_NL", 32, 18, 2),
        Layout("IQ4_XS", 256, 136, 4),
        Layout("MXFP4", 32, 17, 1),
        Layout("NVFP4", 64, 36, 4),
        Layout("TQ1_0", 256, 54, 1),
        Layout("TQ2_0", 256, 66, 2),
        Layout("Q1_0", 128, 18, 2),
        Layout("IQ1_S", 256, 50, 4),
        Layout("IQ1_M", 256, 56, 4),
        Layout("IQ2_XXS", 256, 66, 4),
        Layout("IQ2_XS", 256, 74, 4),
        Layout("IQ2_S", 256, 82, 4),
        Layout("IQ3_XXS", 256, 98, 4),
        Layout("IQ3_S", 256, 110, 4),
    )
}


def grid(name: str) -> np.ndarray | None:
    """What kernels read beside the blocks of a format of grid entries: int32 (entries * 2 or 1), 4 bytes each; or None.

    Magnitudes; of IQ1 the weights eight times, plus 1, plus 128.
    """
    if name not in codebooks.SHAPES:
        return None
    entries = codebooks.grid(name)
    entries = 8 * entries.astype(np.int16) + 129 if name in ("IQ1_S", "IQ1_M") else entries
    return entries.astype(np.uint8).view(np.int32).reshape(-1)


# The grids of IQ4_NL (plus 128) and MXFP4 (plus 12), four bytes a word, first value lowest.
_IQ4 = tuple(tl.constexpr(word) for word in (0x3F2D1801, 0x766A5D4F, 0xA6998D81, 0xF1D9C5B5))
_E2M1 = tuple(tl.constexpr(word) for word in (0x0F0E0D0C, 0x18141210, 0x090A0B0C, 0x00040608))
_IQ4_0, _IQ4_1, _IQ4_2, _IQ4_3 = _IQ4
_E2M1_0, _E2M1_1, _E2M1_2, _E2M1_3 = _E2M1


@triton.jit
def columns(unit, FORMAT: tl.constexpr):
    """The first columns of the low and of the high halves of units."""
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        low = unit // 2 * 64 + unit % 2 * 16
        high = low + 32
    elif (FORMAT == "Q2_K" or FORMAT == "Q3_K") or (FORMAT == "Q6_K" or FORMAT == "TQ2_0"):
        low = unit // 4 * 128 + unit % 4 * 16
        high = low + 64
    else:
        low = unit * 32
        high = low + 16
    return low, high


@triton.jit
def _u16(address):
    return tl.load(address).to(tl.uint32)


@triton.jit
def _half(address):
    """f16, loaded as 16 bits, in float32."""
    return tl.load(address).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _half_pair(word):
    """The two f16 in a 32-bit word, in float32."""
    low = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _float_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _unit_float(w, row, unit, stride, n_cols, FORMAT: tl.constexpr):
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
def _unit_mxfp4(w, row, unit, stride):
    """A unit is a block of 17 bytes: words are bytes."""
    at = w + (row * stride + unit) * 17
    codes = tl.load(at + 1 + tl.arange(0, 16)[None, None, :]).to(tl.uint32)
    e = tl.load(at).to(tl.uint32)
    # 2^(e-128); e below 2 gives a subnormal.
    scale = _float_bits(tl.where(e < 2, 0x00200000 << tl.minimum(e, 1), (tl.maximum(e, 1) - 1) << 23))
    return codes, scale * 32.0, scale * 44.0


@triton.jit
def _scale_nvfp4(d, sub):
    """Half of what byte `sub` of a word says: E4M3 without a sign, and 0 where that is NaN."""
    code = d >> (8 * sub) & 255
    bits = tl.where(code == 0x7F, 0, (code & 0x7F) << 7)  # as f16, whose exponent's bias is 8 more
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 128.0


@triton.jit
def _unit_nvfp4(w, row, unit, stride):
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
def _unit_tq1(w, row, unit, stride):
    """TQ1_0: 32 digits, of which byte and number follow from the unit: see the module of quant."""
    n16 = tl.arange(0, 16)[None, None, :]
    at, j = w + (row * stride + unit // 8) * 54, unit % 8
    d = _half((at + 52).to(tl.pointer_type(tl.uint16)))
    low = tl.load(at + tl.where(j < 5, 0, 32) + n16)
    high = tl.load(at + tl.where(j < 5, 16 + n16, tl.where(j < 7, 32 + n16, 48 + n16 % 4)))
    low = _ternary_digit(low, tl.where(j < 5, j, 2 * (j - 5)))
    high = _ternary_digit(high, tl.where(j < 5, j, tl.where(j < 7, 2 * j - 9, n16 // 4)))
    return low, high, d * 4.0, d * 5.0


@triton.jit
def _unit_tq2(w, row, unit, stride):
    """TQ2_0: bit pairs as Q2_K's, one scale."""
    w16 = w.to(tl.pointer_type(tl.uint16))
    n8 = tl.arange(0, 8)[None, None, :]
    block = row * stride + unit // 8
    d = _half(w16 + block * 33 + 32)
    codes = _u16(w16 + block * 33 + unit % 8 // 4 * 16 + unit % 2 * 8 + n8) >> (unit % 4 // 2 * 2)
    return codes, d * 4.0, d * 5.0


@triton.jit
def _unit_q1(w, row, unit, stride):
    """Q1_0: a half is 16 bits."""
    w16 = w.to(tl.pointer_type(tl.uint16))
    n8 = tl.arange(0, 8)[None, None, :]
    at = w16 + (row * stride + unit // 4) * 9
    low, high = _u16(at + 1 + unit % 4 * 2), _u16(at + 2 + unit % 4 * 2)
    d = _half(at)
    return low >> (2 * n8), high >> (2 * n8), d * 4.0, d * 5.0


@triton.jit
def _unit_32(w, row, unit, stride, FORMAT: tl.constexpr):
    """A unit is a block: words of both halves, fifth bits of both, scale, offset."""
    block = row * stride + unit
    w16 = w.to(tl.pointer_type(tl.uint16))
    w32 = w.to(tl.pointer_type(tl.uint32))
    n8 = tl.arange(0, 8)[None, None, :]
    n4 = tl.arange(0, 4)[None, None, :]
    if FORMAT == "Q8_0":
        scale = _half(w16 + block * 17)
        low = _u16(w16 + block * 17 + 1 + n8)
        high = _u16(w16 + block * 17 + 9 + n8)
        return low, high, low, high, scale * 256.0, scale * 384.0
    elif FORMAT == "Q4_1":
        scale, minimum = _half_pair(tl.load(w32 + block * 5))
        codes = tl.load(w32 + block * 5 + 1 + n4)
        return codes, codes, codes, codes, scale * 16.0, scale * 16.0 - minimum
    elif FORMAT == "Q5_1":
        scale, minimum = _half_pair(tl.load(w32 + block * 6))
        fifth = tl.load(w32 + block * 6 + 1)
        codes = tl.load(w32 + block * 6 + 2 + n4)
        return codes, codes, fifth >> (4 * n4), fifth >> (4 * n4 + 16), scale * 32.0, scale * 32.0 - minimum
    elif FORMAT == "Q5_0":
        scale = _half(w16 + block * 11)
        low, high = _u16(w16 + block * 11 + 1), _u16(w16 + block * 11 + 2)
        codes = _u16(w16 + block * 11 + 3 + n8)
        return codes, codes, low >> (2 * n8), high >> (2 * n8), scale * 32.0, scale * 48.0
    else:  # Q4_0, IQ4_NL
        scale = _half(w16 + block * 9)
        codes = _u16(w16 + block * 9 + 1 + n8)
        if FORMAT == "Q4_0":
            return codes, codes, codes, codes, scale * 16.0, scale * 24.0
        else:
            return codes, codes, codes, codes, scale * 256.0, scale * 384.0


@triton.jit
def _unit_2k(w, row, unit, stride):
    """Q2_K: 2 of the 4 bit pairs in 16 bytes of qs, those of sub-blocks 64 weights apart."""
    w32 = w.to(tl.pointer_type(tl.uint32))
    n4 = tl.arange(0, 4)[None, None, :]
    block = row * stride + unit // 8
    half, quarter = unit % 8 // 4, unit % 4 // 2
    d, dmin = _half_pair(tl.load(w32 + block * 21 + 20))
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
def _unit_3k(w, row, unit, stride):
    """Q3_K: as Q2_K, with third bits from hmask."""
    w16 = w.to(tl.pointer_type(tl.uint16))
    n8 = tl.arange(0, 8)[None, None, :]
    block = row * stride + unit // 8
    half, quarter = unit % 8 // 4, unit % 4 // 2
    d = _half(w16 + block * 55 + 54) * 8.0
    sub = half * 8 + unit % 4
    s_low, s_high = d * _scale_3k(w, block, sub), d * _scale_3k(w, block, sub + 4)
    codes = _u16(w16 + block * 55 + 16 + half * 16 + unit % 2 * 8 + n8) >> (2 * quarter)
    third = _u16(w16 + block * 55 + unit % 2 * 8 + n8) >> (4 * half + quarter)
    return codes, codes, third, third >> 2, s_low, s_low * 1.5, s_high, s_high * 1.5


@triton.jit
def _unit_4k(w, row, unit, stride, FORMAT: tl.constexpr):
    """Q4_K, Q5_K: 16 of the 32 bytes of a pair of sub-blocks; the first one's codes are the low nibbles."""
    w32 = w.to(tl.pointer_type(tl.uint32))
    n4 = tl.arange(0, 4)[None, None, :]
    WORDS: tl.constexpr = 36 if FORMAT == "Q4_K" else 44
    at = (row * stride + unit // 8) * WORDS
    pair = unit % 8 // 2
    d, dmin = _half_pair(tl.load(w32 + at))
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
def _unit_6k(w, row, unit, stride):
    """Q6_K: 16 bytes of ql; low nibbles are of one sub-block of 16, high ones of the sub-block 64 weights on."""
    w16 = w.to(tl.pointer_type(tl.uint16))
    n8 = tl.arange(0, 8)[None, None, :]
    block = row * stride + unit // 8
    half, quarter = unit % 8 // 4, unit % 4 // 2
    d = _half(w16 + block * 105 + 104)
    at = w + block * 210 + 192 + half * 8 + unit % 4
    s_low = d * tl.load(at).to(tl.int8, bitcast=True).to(tl.float32)
    s_high = d * tl.load(at + 4).to(tl.int8, bitcast=True).to(tl.float32)
    codes = _u16(w16 + block * 105 + unit % 8 * 8 + n8)
    upper = _u16(w16 + block * 105 + 64 + half * 16 + unit % 2 * 8 + n8) >> (2 * quarter)
    return codes, codes, upper, upper >> 4, s_low * 64.0, s_low * 96.0, s_high * 64.0, s_high * 96.0


@triton.jit
def _unit_4xs(w, row, unit, stride):
    """IQ4_XS: 16 bytes of a sub-block; its scale has 4 bits in scales_l and 2 in scales_h."""
    w32 = w.to(tl.pointer_type(tl.uint32))
    n4 = tl.arange(0, 4)[None, None, :]
    at = (row * stride + unit // 8) * 34
    sub = unit % 8
    first = tl.load(w32 + at)
    d, _ = _half_pair(first)
    scale = (tl.load(w32 + at + 1) >> (4 * sub) & 15) | ((first >> 16) >> (2 * sub) & 3) << 4
    scale = d * (scale.to(tl.float32) - 32.0)
    codes = tl.load(w32 + at + 2 + sub * 4 + n4)
    return codes, scale * 256.0, scale * 384.0


@triton.jit
def _byte(address):
    return tl.load(address).to(tl.uint32)


@triton.jit
def _eight_signs(seven):
    """7 bits of signs, and the eighth, which makes the number of set ones even."""
    parity = seven ^ seven >> 4
    parity ^= parity >> 2
    return seven | ((parity ^ parity >> 1) & 1) << 7


@triton.jit
def _grid_words(grid, low, high, N):
    """The two words of entries of 8."""
    return tl.load(grid + 2 * low + N % 2).to(tl.uint32), tl.load(grid + 2 * high + N % 2).to(tl.uint32)


@triton.jit
def _unit_grid(w, row, unit, stride, grid, FORMAT: tl.constexpr, BYTES: tl.constexpr):
    """IQ2, IQ3: words of the grid, 4 bits of signs of the low half's and above them of the high half's, scales."""
    n = tl.arange(0, 4)[None, None, :]
    block, sub = row * stride + unit // 8, unit % 8
    at = w + block * BYTES
    w16 = w.to(tl.pointer_type(tl.uint16)) + block * (BYTES // 2)
    d = _half(w16)
    qs = at + 2 + 8 * sub
    if FORMAT == "IQ2_XXS" or FORMAT == "IQ3_XXS":
        words = w16 + 3 + 4 * sub if FORMAT == "IQ2_XXS" else w16 + 33 + 2 * sub
        word = _u16(words) | _u16(words + 1) << 16
        signs_low = _eight_signs(word >> (7 * (n // 2)) & 127)
        signs_high = _eight_signs(word >> (7 * (n // 2) + 14) & 127)
        s_low = d * ((word >> 28) * 2 + 1).to(tl.float32) * (0.125 if FORMAT == "IQ2_XXS" else 0.25)
        s_high = s_low
        if FORMAT == "IQ2_XXS":
            low, high = _grid_words(grid, _byte(qs + n // 2), _byte(qs + n // 2 + 2), n)
        else:
            low = tl.load(grid + _byte(qs + n)).to(tl.uint32)
            high = tl.load(grid + _byte(qs + n + 4)).to(tl.uint32)
    elif FORMAT == "IQ3_S":
        ninth = _byte(at + 66 + sub) >> n
        signs_low, signs_high = _byte(at + 74 + 4 * sub + n // 2), _byte(at + 76 + 4 * sub + n // 2)
        s_low = d * ((_byte(at + 106 + sub // 2) >> (sub % 2 * 4) & 15) * 2 + 1).to(tl.float32)
        s_high = s_low
        low = tl.load(grid + (_byte(qs + n) | (ninth & 1) << 8)).to(tl.uint32)
        high = tl.load(grid + (_byte(qs + n + 4) | (ninth >> 4 & 1) << 8)).to(tl.uint32)
    else:
        scales = _byte(at + (BYTES - 8) + sub)
        s_low = d * ((scales & 15) * 2 + 1).to(tl.float32) * 0.125
        s_high = d * ((scales >> 4) * 2 + 1).to(tl.float32) * 0.125
        if FORMAT == "IQ2_XS":
            first, second = _u16(w16 + 1 + 4 * sub + n // 2), _u16(w16 + 3 + 4 * sub + n // 2)
            signs_low, signs_high = _eight_signs(first >> 9), _eight_signs(second >> 9)
            low, high = _grid_words(grid, first & 511, second & 511, n)
        else:
            upper, qs = _byte(at + 66 + sub) >> (2 * (n // 2)), at + 2 + 4 * sub + n // 2
            signs_low, signs_high = _byte(qs + 32), _byte(qs + 34)
            first, second = _byte(qs) | (upper & 3) << 8, _byte(qs + 2) | (upper >> 4 & 3) << 8
            low, high = _grid_words(grid, first, second, n)
    shift = n % 2 * 4
    signs = signs_low >> shift & 15 | (signs_high >> shift & 15) << 4
    return low, high, signs, signs, s_low * 128.0, s_low * 192.0, s_high * 128.0, s_high * 192.0


@triton.jit
def _unit_1s(w, row, unit, stride, grid):
    """IQ1_S: words of the grid, whether an eighth is subtracted as 8 bits, scales."""
    n = tl.arange(0, 4)[None, None, :]
    block, sub = row * stride + unit // 8, unit % 8
    w16 = w.to(tl.pointer_type(tl.uint16)) + block * 25
    qh, qs = _u16(w16 + 17 + sub), w + block * 50 + 2 + 4 * sub + n // 2
    upper = qh >> (3 * (n // 2))
    low, high = _grid_words(grid, _byte(qs) | (upper & 7) << 8, _byte(qs + 2) | (upper >> 6 & 7) << 8, n)
    scale = _half(w16) * ((qh >> 12 & 7) * 2 + 1).to(tl.float32) * 32.0
    down = (qh >> 15) * 255 | n * 0
    return low, high, down, down, scale, scale * 1.5, scale, scale * 1.5


@triton.jit
def _unit_1m(w, row, unit, stride, grid):
    """IQ1_M: the same, with a bit for every 8 weights, and the block's d in the scales' upper bits."""
    n = tl.arange(0, 4)[None, None, :]
    block, sub = row * stride + unit // 8, unit % 8
    at = w + block * 56
    scales = w.to(tl.pointer_type(tl.uint16)) + block * 28 + 24
    d = _u16(scales) >> 12 | _u16(scales + 1) >> 12 << 4 | _u16(scales + 2) >> 12 << 8 | _u16(scales + 3) >> 12 << 12
    d = d.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 32.0
    s = _u16(scales + sub // 2) >> (sub % 2 * 6)
    first, second = _byte(at + 32 + 2 * sub) >> (4 * (n // 2)), _byte(at + 33 + 2 * sub) >> (4 * (n // 2))
    qs = at + 4 * sub + n // 2
    low, high = _grid_words(grid, _byte(qs) | (first & 7) << 8, _byte(qs + 2) | (second & 7) << 8, n)
    down = (first >> 3 & 1) * 15 | (second >> 3 & 1) * 240
    s_low, s_high = d * ((s & 7) * 2 + 1).to(tl.float32), d * ((s >> 3 & 7) * 2 + 1).to(tl.float32)
    return low, high, down, down, s_low, s_low * 1.5, s_high, s_high * 1.5


@triton.jit
def unit(w, row, unit, stride, n_cols, scales, FORMAT: tl.constexpr):
    """Units of rows.

    Args:
        w: uint8 pointer to row 0.
        row, unit: int32 (R, 1, 1) and (1, U, 1).
        stride: blocks in a row.
        n_cols: weights in a row.
        scales: of FP8 a float32 pointer to the row of scales that all rows share; of grid entries an int32 one to
            grid().

    Returns:
        Words of the low and high halves, what else weights() needs of them (R, U, N); scale and offset of the low half,
        then of the high one, float32 (R, U, 1).
    """
    if (FORMAT == "F32" or FORMAT == "F16") or FORMAT == "BF16":
        low, high = _unit_float(w, row, unit, stride, n_cols, FORMAT)
        one = tl.full((1, 1, 1), 1.0, tl.float32)
        return low, high, low, high, one, one, one, one
    elif FORMAT == "FP8_E4M3":
        low, high = _unit_float(w, row, unit, stride, n_cols, FORMAT)
        scale = tl.load(scales + unit // 4) * 256.0
        return low, high, low, high, scale, scale, scale, scale
    elif FORMAT == "Q4_K" or FORMAT == "Q5_K":
        return _unit_4k(w, row, unit, stride, FORMAT)
    elif FORMAT == "Q2_K":
        codes, s_low, m_low, s_high, m_high = _unit_2k(w, row, unit, stride)
        return codes, codes, codes, codes, s_low, m_low, s_high, m_high
    elif FORMAT == "Q3_K":
        return _unit_3k(w, row, unit, stride)
    elif FORMAT == "Q6_K":
        return _unit_6k(w, row, unit, stride)
    elif FORMAT == "IQ1_S":
        return _unit_1s(w, row, unit, stride, scales)
    elif FORMAT == "IQ1_M":
        return _unit_1m(w, row, unit, stride, scales)
    elif FORMAT == "IQ2_XXS":
        return _unit_grid(w, row, unit, stride, scales, FORMAT, 66)
    elif FORMAT == "IQ2_XS":
        return _unit_grid(w, row, unit, stride, scales, FORMAT, 74)
    elif FORMAT == "IQ2_S":
        return _unit_grid(w, row, unit, stride, scales, FORMAT, 82)
    elif FORMAT == "IQ3_XXS":
        return _unit_grid(w, row, unit, stride, scales, FORMAT, 98)
    elif FORMAT == "IQ3_S":
        return _unit_grid(w, row, unit, stride, scales, FORMAT, 110)
    elif FORMAT == "IQ4_XS":
        codes, scale, offset = _unit_4xs(w, row, unit, stride)
        return codes, codes, codes, codes, scale, offset, scale, offset
    elif FORMAT == "MXFP4":
        codes, scale, offset = _unit_mxfp4(w, row, unit, stride)
        return codes, codes, codes, codes, scale, offset, scale, offset
    elif FORMAT == "NVFP4":
        low, high, s_low, m_low, s_high, m_high = _unit_nvfp4(w, row, unit, stride)
        return low, high, low, high, s_low, m_low, s_high, m_high
    elif FORMAT == "TQ1_0":
        low, high, scale, offset = _unit_tq1(w, row, unit, stride)
        return low, high, low, high, scale, offset, scale, offset
    elif FORMAT == "TQ2_0":
        codes, scale, offset = _unit_tq2(w, row, unit, stride)
        return codes, codes, codes, codes, scale, offset, scale, offset
    elif FORMAT == "Q1_0":
        low, high, scale, offset = _unit_q1(w, row, unit, stride)
        return low, high, low, high, scale, offset, scale, offset
    else:
        low, high, low_bits, high_bits, scale, offset = _unit_32(w, row, unit, stride, FORMAT)
        return low, high, low_bits, high_bits, scale, offset, scale, offset


@triton.jit
def _fraction(code, BITS: tl.constexpr):
    """1 + code / 2^BITS"""
    return _float_bits((code << (23 - BITS)) | 0x3F800000)


@triton.jit
def _pick(code, a, b, c, d):
    """Byte number `code`, below 16, of four words."""
    word = tl.where(code < 8, tl.where(code < 4, a, b), tl.where(code < 12, c, d)).to(tl.uint32)
    return word >> (code % 4 * 8) & 255


@triton.jit
def e4m3_half(code):
    """2^-8 times what E4M3 bytes mean, f16: its exponent's field is one bit wider, and its bias 8 more."""
    size = code & 0x7F
    bits = tl.where(size == 0x7F, 0x7E00, size << 7) | (code & 0x80) << 8
    return bits.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _code(words, extra, SHIFT: tl.constexpr, B: tl.constexpr, FORMAT: tl.constexpr):
    """u of the codes at bit SHIFT of the words' bytes B."""
    if FORMAT == "Q8_0":
        u = _fraction((words >> (8 * B) & 255) ^ 128, 8)
    elif FORMAT == "FP8_E4M3":
        u = e4m3_half(words.to(tl.uint32)).to(tl.float32)
    elif (FORMAT == "F32" or FORMAT == "F16") or FORMAT == "BF16":
        u = words.to(tl.float32)
    elif FORMAT == "TQ1_0":
        u = _fraction(words, 2)
    elif FORMAT == "Q1_0":
        u = _fraction(words >> B & 1, 1)
    elif FORMAT == "Q2_K" or FORMAT == "TQ2_0":
        u = _fraction(words >> (8 * B + SHIFT) & 3, 2)
    elif FORMAT == "Q3_K":
        u = _fraction(words >> (8 * B + SHIFT) & 3 | (extra >> (8 * B) & 1) << 2, 3)
    elif FORMAT == "IQ1_S" or FORMAT == "IQ1_M":
        u = _fraction((words >> (8 * B) & 255) - (extra >> (B + SHIFT) & 1) * 2, 8)
    elif (FORMAT == "IQ2_XXS" or FORMAT == "IQ2_XS") or (
        (FORMAT == "IQ2_S" or FORMAT == "IQ3_XXS") or FORMAT == "IQ3_S"
    ):
        size = words >> (8 * B) & 255
        u = _fraction(tl.where((extra >> (B + SHIFT) & 1) != 0, 64 - size, 64 + size), 7)
    else:
        code = words >> (8 * B + SHIFT) & 15
        if FORMAT == "Q5_0" or FORMAT == "Q5_1":
            u = _fraction(code | (extra >> B & 1) << 4, 5)
        elif FORMAT == "Q5_K":
            u = _fraction(code | (extra >> (8 * B) & 1) << 4, 5)
        elif FORMAT == "Q6_K":
            u = _fraction(code | (extra >> (8 * B) & 3) << 4, 6)
        elif FORMAT == "IQ4_NL" or FORMAT == "IQ4_XS":
            u = _fraction(_pick(code, _IQ4_0, _IQ4_1, _IQ4_2, _IQ4_3), 8)
        elif FORMAT == "MXFP4" or FORMAT == "NVFP4":
            u = _fraction(_pick(code, _E2M1_0, _E2M1_1, _E2M1_2, _E2M1_3), 5)
        else:
            u = _fraction(code, 4)
    return u


@triton.jit
def weights(low, high, low_extra, high_extra, s_low, m_low, s_high, m_high, B: tl.constexpr, FORMAT: tl.constexpr):
    """Byte B of every word of the low and of the high halves as weights, float32 (R, U, N)."""
    u_low, u_high = _code(low, low_extra, 0, B, FORMAT), _code(high, high_extra, 4, B, FORMAT)
    if (FORMAT == "F32" or FORMAT == "F16") or FORMAT == "BF16":
        return u_low, u_high
    elif FORMAT == "FP8_E4M3":
        return u_low * s_low, u_high * s_high
    else:
        return u_low * s_low - m_low, u_high * s_high - m_high
