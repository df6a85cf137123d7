"""How the blocks of each GGUF format become weights inside Triton kernels, from the file's bytes as they are.

A row is a sequence of units: 32 weights, two halves (low, high) of 16. Where the format has nibbles, one string of 16
bytes holds both. unit() loads the bytes of many units as words, as wide as a block's alignment allows, each once, and
with them what a half's weights share; weights() takes byte b out of every word. A word of n bytes thus gives n planes
of weights, and a plane's element i is the half's weight n * i + b: activations come in the same order.

Integer codes are written into the mantissa of 1.0, u = 1 + code / 2^bits: a shift and one logical operation instead
of a conversion at a fraction of their rate. A weight is scale * u - offset, in float32.

Shapes: R rows, U units, N words in 16 bytes. Source of the layouts: the modules of quant, one a format.
"""

import triton
import triton.language as tl

from localrun.gpu.formats.grids import unit_1m, unit_1s, unit_grid
from localrun.gpu.formats.k_quants import unit_2k, unit_3k, unit_4k, unit_4xs, unit_6k
from localrun.gpu.formats.loads import float_bits
from localrun.gpu.formats.small import unit_32, unit_float, unit_mxfp4, unit_nvfp4, unit_q1, unit_tq1, unit_tq2

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
        low, high = unit_float(w, row, unit, stride, n_cols, FORMAT)
        one = tl.full((1, 1, 1), 1.0, tl.float32)
        return low, high, low, high, one, one, one, one
    elif FORMAT == "FP8_E4M3":
        low, high = unit_float(w, row, unit, stride, n_cols, FORMAT)
        scale = tl.load(scales + unit // 4) * 256.0
        return low, high, low, high, scale, scale, scale, scale
    elif FORMAT == "Q4_K" or FORMAT == "Q5_K":
        return unit_4k(w, row, unit, stride, FORMAT)
    elif FORMAT == "Q2_K":
        codes, s_low, m_low, s_high, m_high = unit_2k(w, row, unit, stride)
        return codes, codes, codes, codes, s_low, m_low, s_high, m_high
    elif FORMAT == "Q3_K":
        return unit_3k(w, row, unit, stride)
    elif FORMAT == "Q6_K":
        return unit_6k(w, row, unit, stride)
    elif FORMAT == "IQ1_S":
        return unit_1s(w, row, unit, stride, scales)
    elif FORMAT == "IQ1_M":
        return unit_1m(w, row, unit, stride, scales)
    elif FORMAT == "IQ2_XXS":
        return unit_grid(w, row, unit, stride, scales, FORMAT, 66)
    elif FORMAT == "IQ2_XS":
        return unit_grid(w, row, unit, stride, scales, FORMAT, 74)
    elif FORMAT == "IQ2_S":
        return unit_grid(w, row, unit, stride, scales, FORMAT, 82)
    elif FORMAT == "IQ3_XXS":
        return unit_grid(w, row, unit, stride, scales, FORMAT, 98)
    elif FORMAT == "IQ3_S":
        return unit_grid(w, row, unit, stride, scales, FORMAT, 110)
    elif FORMAT == "IQ4_XS":
        codes, scale, offset = unit_4xs(w, row, unit, stride)
        return codes, codes, codes, codes, scale, offset, scale, offset
    elif FORMAT == "MXFP4":
        codes, scale, offset = unit_mxfp4(w, row, unit, stride)
        return codes, codes, codes, codes, scale, offset, scale, offset
    elif FORMAT == "NVFP4":
        low, high, s_low, m_low, s_high, m_high = unit_nvfp4(w, row, unit, stride)
        return low, high, low, high, s_low, m_low, s_high, m_high
    elif FORMAT == "TQ1_0":
        low, high, scale, offset = unit_tq1(w, row, unit, stride)
        return low, high, low, high, scale, offset, scale, offset
    elif FORMAT == "TQ2_0":
        codes, scale, offset = unit_tq2(w, row, unit, stride)
        return codes, codes, codes, codes, scale, offset, scale, offset
    elif FORMAT == "Q1_0":
        low, high, scale, offset = unit_q1(w, row, unit, stride)
        return low, high, low, high, scale, offset, scale, offset
    else:
        low, high, low_bits, high_bits, scale, offset = unit_32(w, row, unit, stride, FORMAT)
        return low, high, low_bits, high_bits, scale, offset, scale, offset


@triton.jit
def _fraction(code, BITS: tl.constexpr):
    """1 + code / 2^BITS"""
    return float_bits((code << (23 - BITS)) | 0x3F800000)


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
