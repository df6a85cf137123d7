"""Units of IQ1, IQ2 and IQ3: entries of a grid, with signs and scales.

Shapes and returned values as blocks.unit() says.
"""

import triton
import triton.language as tl

from localrun.gpu.formats.loads import byte, f16, u16


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
def unit_grid(w, row, unit, stride, grid, FORMAT: tl.constexpr, BYTES: tl.constexpr):
    """IQ2, IQ3: words of the grid, 4 bits of signs of the low half's and above them of the high half's, scales."""
    n = tl.arange(0, 4)[None, None, :]
    block, sub = row * stride + unit // 8, unit % 8
    at = w + block * BYTES
    w16 = w.to(tl.pointer_type(tl.uint16)) + block * (BYTES // 2)
    d = f16(w16)
    qs = at + 2 + 8 * sub
    if FORMAT == "IQ2_XXS" or FORMAT == "IQ3_XXS":
        words = w16 + 3 + 4 * sub if FORMAT == "IQ2_XXS" else w16 + 33 + 2 * sub
        word = u16(words) | u16(words + 1) << 16
        signs_low = _eight_signs(word >> (7 * (n // 2)) & 127)
        signs_high = _eight_signs(word >> (7 * (n // 2) + 14) & 127)
        s_low = d * ((word >> 28) * 2 + 1).to(tl.float32) * (0.125 if FORMAT == "IQ2_XXS" else 0.25)
        s_high = s_low
        if FORMAT == "IQ2_XXS":
            low, high = _grid_words(grid, byte(qs + n // 2), byte(qs + n // 2 + 2), n)
        else:
            low = tl.load(grid + byte(qs + n)).to(tl.uint32)
            high = tl.load(grid + byte(qs + n + 4)).to(tl.uint32)
    elif FORMAT == "IQ3_S":
        ninth = byte(at + 66 + sub) >> n
        signs_low, signs_high = byte(at + 74 + 4 * sub + n // 2), byte(at + 76 + 4 * sub + n // 2)
        s_low = d * ((byte(at + 106 + sub // 2) >> (sub % 2 * 4) & 15) * 2 + 1).to(tl.float32)
        s_high = s_low
        low = tl.load(grid + (byte(qs + n) | (ninth & 1) << 8)).to(tl.uint32)
        high = tl.load(grid + (byte(qs + n + 4) | (ninth >> 4 & 1) << 8)).to(tl.uint32)
    else:
        scales = byte(at + (BYTES - 8) + sub)
        s_low = d * ((scales & 15) * 2 + 1).to(tl.float32) * 0.125
        s_high = d * ((scales >> 4) * 2 + 1).to(tl.float32) * 0.125
        if FORMAT == "IQ2_XS":
            first, second = u16(w16 + 1 + 4 * sub + n // 2), u16(w16 + 3 + 4 * sub + n // 2)
            signs_low, signs_high = _eight_signs(first >> 9), _eight_signs(second >> 9)
            low, high = _grid_words(grid, first & 511, second & 511, n)
        else:
            upper, qs = byte(at + 66 + sub) >> (2 * (n // 2)), at + 2 + 4 * sub + n // 2
            signs_low, signs_high = byte(qs + 32), byte(qs + 34)
            first, second = byte(qs) | (upper & 3) << 8, byte(qs + 2) | (upper >> 4 & 3) << 8
            low, high = _grid_words(grid, first, second, n)
    shift = n % 2 * 4
    signs = signs_low >> shift & 15 | (signs_high >> shift & 15) << 4
    return low, high, signs, signs, s_low * 128.0, s_low * 192.0, s_high * 128.0, s_high * 192.0


@triton.jit
def unit_1s(w, row, unit, stride, grid):
    """IQ1_S: words of the grid, whether an eighth is subtracted as 8 bits, scales."""
    n = tl.arange(0, 4)[None, None, :]
    block, sub = row * stride + unit // 8, unit % 8
    w16 = w.to(tl.pointer_type(tl.uint16)) + block * 25
    qh, qs = u16(w16 + 17 + sub), w + block * 50 + 2 + 4 * sub + n // 2
    upper = qh >> (3 * (n // 2))
    low, high = _grid_words(grid, byte(qs) | (upper & 7) << 8, byte(qs + 2) | (upper >> 6 & 7) << 8, n)
    scale = f16(w16) * ((qh >> 12 & 7) * 2 + 1).to(tl.float32) * 32.0
    down = (qh >> 15) * 255 | n * 0
    return low, high, down, down, scale, scale * 1.5, scale, scale * 1.5


@triton.jit
def unit_1m(w, row, unit, stride, grid):
    """IQ1_M: the same, with a bit for every 8 weights, and the block's d in the scales' upper bits."""
    n = tl.arange(0, 4)[None, None, :]
    block, sub = row * stride + unit // 8, unit % 8
    at = w + block * 56
    scales = w.to(tl.pointer_type(tl.uint16)) + block * 28 + 24
    d = u16(scales) >> 12 | u16(scales + 1) >> 12 << 4 | u16(scales + 2) >> 12 << 8 | u16(scales + 3) >> 12 << 12
    d = d.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 32.0
    s = u16(scales + sub // 2) >> (sub % 2 * 6)
    first, second = byte(at + 32 + 2 * sub) >> (4 * (n // 2)), byte(at + 33 + 2 * sub) >> (4 * (n // 2))
    qs = at + 4 * sub + n // 2
    low, high = _grid_words(grid, byte(qs) | (first & 7) << 8, byte(qs + 2) | (second & 7) << 8, n)
    down = (first >> 3 & 1) * 15 | (second >> 3 & 1) * 240
    s_low, s_high = d * ((s & 7) * 2 + 1).to(tl.float32), d * ((s >> 3 & 7) * 2 + 1).to(tl.float32)
    return low, high, down, down, s_low, s_low * 1.5, s_high, s_high * 1.5
