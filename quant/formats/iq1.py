"""IQ1_S and IQ1_M: groups of 8 weights -1, 0 or 1 on a grid of 2048 entries, moved by an eighth up or down. 256 weights
in 50 and 56 bytes: 1.56 and 1.75 bits each.

x = d * (2*s+1) * (w + delta), delta = 1/8 or -1/8; as integers: d/8 * (2*s+1) * (8*w + 1 or -1). IQ1_S: 8 bits of each
index, then for every 32 weights 16: four times 3 of the indices' upper bits, 3 of s and delta's sign. IQ1_M: 8 bits of
each index, then 4: its upper 3 and delta's sign; then 4 words of 16 bits: four times 3 of s, one for every 16 weights,
and 4 of d.
Source: ggml src/ggml-common.h @d99724f, block_iq1_s, block_iq1_m; dequantize_row_iq1_s, dequantize_row_iq1_m in
ggml-quants.c.
"""

import numpy as np

from quant.block_format import REPACK, block_layout, offsets
from quant.formats import codebooks
from quant.formats.grids import entry_of, fields_of, grid_format, load_fields, odd_numbers, signed_values, store_turned
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, SYMMETRIC, TWO_SCALES
from quant.gemm.repack import SCALES as K_BLOCK_SCALES
from quant.gemv.activations import EVEN_SUMS, EVERY_EIGHTH, NINEFOLD_SUMS, ODD_SUMS, SCALES_OF_32, STARTS_32
from quant.simd.dots import dot_u8
from quant.simd.floats import fma, lookup_f32, splat_f32x16, to_f32
from quant.simd.ints import join, shifted, where_bits, zero_i32x16
from quant.simd.memory import (
    f16_in_halves,
    f16_to_f32,
    load_f16_everywhere,
    load_f16_in_halves,
    load_f32x16,
    load_i8x16,
    load_i8x32,
    load_i8x64,
    load_i32x16,
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    store_f32x16,
)
from quant.simd.permutes import (
    at_least_mask,
    bits_from,
    both_of_table,
    bytes_of,
    mask_of,
    table_of,
    widened_words,
    with_bits,
)
from quant.simd.rows16 import gather, half_to_f32, transpose
from quant.simd.words import (
    add_words,
    add_words_where,
    dot_words,
    fields_of_words,
    odd_of_twice,
    pair_products,
    widened_bytes,
    words_without,
)
from quant.target.jit import inline, kernel

LAYOUT_S = block_layout(50, d="<f2", qs="32u1", qh="8<u2")
LAYOUT_M = block_layout(56, qs="32u1", qh="16u1", scales="8u1")
D, QS_S, QH_S = offsets(LAYOUT_S)
QS_M, QH_M, SCALES = offsets(LAYOUT_M)
BYTES_S, BYTES_M = LAYOUT_S.itemsize, LAYOUT_M.itemsize
DELTA = np.float32(0.125)


def d_of_m(raw: np.ndarray) -> np.ndarray:
    """float16 (...) of blocks of IQ1_M: the upper 4 bits of each of its words, lowest first."""
    words = np.ascontiguousarray(raw["scales"]).view("<u2") >> 12 << np.arange(0, 16, 4, dtype=np.uint16)
    return np.bitwise_or.reduce(words, -1).view(np.float16)


def _weights(indices: np.ndarray, is_down: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 (..., 256) of indices and signs of delta (..., 32) and scales (..., 8 or 16)."""
    w = codebooks.grid("IQ1_S")[indices].astype(np.float32) + np.where(is_down, -DELTA, DELTA)[..., None]
    return (scale[..., None] * w.reshape(*scale.shape, -1)).reshape(*scale.shape[:-1], -1)


def unpack_s(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*50) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT_S)
    qh = raw["qh"]
    upper = (qh[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(*raw.shape, 32)
    scale = raw["d"].astype(np.float32)[..., None] * (2 * (qh >> 12 & 7) + 1).astype(np.float32)
    x = _weights(raw["qs"] | upper << 8, np.repeat(qh >> 15, 4, -1) == 1, scale)
    return x.reshape(*blocks.shape[:-1], -1)


def unpack_m(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*56) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT_M)
    nibbles = np.stack([raw["qh"] & 15, raw["qh"] >> 4], -1).reshape(*raw.shape, 32)
    words = np.ascontiguousarray(raw["scales"]).view("<u2")
    s = (words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(*raw.shape, 16)
    scale = d_of_m(raw).astype(np.float32)[..., None] * (2 * s + 1).astype(np.float32)
    indices = raw["qs"] | (nibbles & 7).astype(np.uint16) << 8
    return _weights(indices, nibbles > 7, scale).reshape(*blocks.shape[:-1], -1)


_entry = entry_of(8 * codebooks.grid("IQ1_S") + 1)


@inline
def _lower(v):
    """8*w + 1 - 2"""
    return v - 2


@inline
def _d_s(block):
    return load_f16_everywhere(block + D)


@inline
def _bits_of_d(block):
    words = load_i64(block + SCALES)
    return words >> 12 & 15 | words >> 24 & 0xF0 | words >> 36 & 0xF00 | words >> 48 & 0xF000


@inline
def _d_m(block):
    return splat_f32x16(f16_to_f32(_bits_of_d(block)))


@inline
def _group_s(block, g):
    upper = load_u16(block + QH_S + g // 4 * 2) >> 3 * (g % 4) & 7
    return _entry(load_u8(block + QS_S + g) | upper << 8)


@inline
def _bits_s(block, k):
    qh = load_u32(block + QH_S + 4 * k)
    return (qh >> 15 & 1) * 0xFFFFFFFF | ((qh >> 31) * 0xFFFFFFFF) << 32


@inline
def _group_m(block, g):
    upper = load_u8(block + QH_M + g // 2) >> 4 * (g % 2) & 7
    return _entry(load_u8(block + QS_M + g) | upper << 8)


@inline
def _bits_m(block, k):
    qh = load_u32(block + QH_M + 4 * k)
    qh = (qh | qh << 16) & 0x0000FFFF0000FFFF
    qh = (qh | qh << 8) & 0x00FF00FF00FF00FF
    return (((qh | qh << 4) >> 3) & 0x0101010101010101) * 255


_fields_of_qh = load_fields(16, [i // 2 for i in range(16)], [12] * 16)
_fields_of_scales = load_fields(16, [i // 4 for i in range(16)], [3 * (i % 4) for i in range(16)])


@inline
def _fields_s(block):
    return _fields_of_qh(block + QH_S)


@inline
def _fields_m(block):
    return _fields_of_scales(block + SCALES)


# ---- where bytes can be permuted -------------------------------------------------------------------------------------

# As in iq2.py a group's first four weights make a byte, its others another, the fourth field shifted down by 2. Delta's
# sign is bit 4, or of the second weight, whose field that is in, bit 2. Three bits of an index and delta's sign are
# bits 1 to 4 of a byte: a mask of the lowest bit would take a shift.
_PLACES = 2, 0, 1, 3
_UP, _DOWN = (-7, 1, 9), (-9, -1, 7)
_first, _second, _third, _fourth = (
    table_of(signed_values(_UP, shift, 2, sign, _DOWN)) for shift, sign in ((2, 4), (4, 2), (0, 4), (4, 2))
)
_delta_2, _delta_4 = with_bits(1 << 2), with_bits(1 << 4)
_first_halves = both_of_table(fields_of("IQ1_S", _PLACES, 2))
_up_3, _down_2, _down_4 = shifted(3, 3), shifted(-2, -2), shifted(-4, -4)


def _runs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables of 128 bytes for a group's second half: entries are in its order, and change once in 16 at most.

    Number of the half at the first of each 16 entries, where among them the next one begins (16: nowhere), fields.
    """
    fields = fields_of("IQ1_S", [4 + place for place in _PLACES], 2)
    starts = np.flatnonzero(np.diff(fields, prepend=fields[0] ^ 1))
    number = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(fields))).reshape(128, 16)
    assert (number[:, -1] - number[:, 0] < 2).all()
    distinct = np.zeros(128, np.uint8)
    distinct[: len(starts)] = fields[starts]
    return number[:, 0].astype(np.uint8), (number == number[:, :1]).sum(1).astype(np.uint8), distinct


_number, _change, _fields = (table_of(table) for table in _runs())


@inline
def _second_half(index, upper):
    """Fields of groups' last four weights."""
    sixteen = _down_4(index) & 15 | _up_3(upper) & 112
    number = _number(sixteen)
    return _fields(where_bits(at_least_mask(index & 15, _change(sixteen)), number + 1, number))


@inline
def _fourths(codes, deltas):
    """Weights + 128 of a block: every fourth column from 0, 1, 2 and 3 on."""
    most = _delta_4(codes, deltas)
    return _first(most), _second(_delta_2(codes, _down_2(deltas))), _third(most), _fourth(_down_2(most))


_odd = odd_numbers(3, 0.125)
_ninth, _tenth, _eleventh = mask_of([2]), mask_of([4]), mask_of([8])


@inline
def _masks(upper):
    return _ninth(upper), _tenth(upper), _eleventh(upper)


_threes_of_rows = bits_from([at + 3 * i - 1 for at in (0, 32) for i in range(4)])
# By 3 bits of s and delta's sign: 2*s + 1; what the sum of -128*q is to be multiplied by.
_FOURTH = np.float32(0.25)
_scale_s = lookup_f32([2 * s + 1 for s in range(8)] * 2)
_eighths = lookup_f32([7 / 1024] * 8 + [9 / 1024] * 8)


@inline
def _index_s(a, b):
    """Of two blocks' groups: indices, their upper 3 bits; of each 32 weights 16 bits of qh."""
    qh = widened_words(join(load_i8x16(a + QH_S), load_i8x16(b + QH_S)))
    return join(load_i8x32(a + QS_S), load_i8x32(b + QS_S)), _threes_of_rows(bytes_of(qh)), qh


@inline
def _four_s(a, b, c, d):
    first, upper, qh = _index_s(a, b)
    second, more_upper, more_qh = _index_s(c, d)
    high, more_high = _second_half(first, upper), _second_half(second, more_upper)
    low = _first_halves(first, second, _masks(upper), _masks(more_upper))
    pair = low[0], high, qh, load_f16_in_halves(a + D, b + D)
    return pair, (low[1], more_high, more_qh, load_f16_in_halves(c + D, d + D))


@inline
def _add_s(weights, k_block, total):
    """weights: of two blocks codes of groups' halves, qh, d. A lane adds up 32 columns of one block.

    A code's fields are multiplied by twos, as w + 1 times 1 and 4.
    """
    low, high, qh, d = weights
    q, zero, low_2, high_2 = k_block + EVERY_EIGHTH, zero_i32x16(), _down_4(low), _down_4(high)
    fours = dot_u8(dot_u8(zero, low & 12, load_i8x64(q)), high & 12, load_i8x64(q + 256))
    fours = dot_u8(dot_u8(fours, low_2 & 12, load_i8x64(q + 192)), high_2 & 12, load_i8x64(q + 448))
    ones = dot_u8(dot_u8(zero, low & 3, load_i8x64(q + 128)), high & 3, load_i8x64(q + 384))
    ones = dot_u8(dot_u8(ones, low_2 & 3, load_i8x64(q + 64)), high_2 & 3, load_i8x64(q + 320))
    dots = fma(to_f32(fours), _FOURTH, to_f32(ones))
    # The 1 in w + 1 and delta: the sum of q times -7/8 or -9/8. A start is -128 of it.
    sums = to_f32(load_i32x16(k_block + STARTS_32))
    dots = fma(_eighths(qh >> 12), sums, dots)
    return fma(dots, _scale_s(qh >> 12) * d * load_f32x16(k_block + SCALES_OF_32), total)


_nibbles_of_words = bits_from([at + i for at in range(0, 64, 16) for i in (-1, 3)])
_even_up, _odd_up = words_without(1 << 3), words_without(1 << 7)
_threes = fields_of_words([i // 4 for i in range(32)], [3 * (i % 4) for i in range(32)])


@inline
def _scales_m(a, b):
    """Of two blocks 2*s + 1 of each 16 weights, as words."""
    s = _threes(load_i64(a + SCALES), load_i64(b + SCALES))
    return odd_of_twice(add_words(s, s))


@inline
def _pair_m(a, b, index, low, upper, nibbles):
    """What _add_m takes."""
    d = f16_in_halves(_bits_of_d(a) | _bits_of_d(b) << 16)
    return low, _second_half(index, upper), _even_up(nibbles), _odd_up(nibbles), _scales_m(a, b), d


@inline
def _four_m(a, b, c, d):
    first, second = join(load_i8x32(a + QS_M), load_i8x32(b + QS_M)), join(load_i8x32(c + QS_M), load_i8x32(d + QS_M))
    nibbles = widened_bytes(join(load_i8x16(a + QH_M), load_i8x16(b + QH_M)))
    more_nibbles = widened_bytes(join(load_i8x16(c + QH_M), load_i8x16(d + QH_M)))
    upper, more_upper = _nibbles_of_words(nibbles), _nibbles_of_words(more_nibbles)
    low = _first_halves(first, second, _masks(upper), _masks(more_upper))
    pair = _pair_m(a, b, first, low[0], upper, nibbles)
    return pair, _pair_m(c, d, second, low[1], more_upper, more_nibbles)


@inline
def _add_m(weights, k_block, total):
    """weights: of two blocks codes of groups' halves, where delta is up, scales, d. A word adds up 16 columns.

    A code's fields are multiplied by twos, as w + 1 times 1 and 4. Words hold sums of 8*w + 1 or -1, below 2**15.
    """
    low, high, even_up, odd_up, scales, d = weights
    q, low_2, high_2 = k_block + EVERY_EIGHTH, _down_4(low), _down_4(high)
    fours = add_words(pair_products(low & 12, load_i8x64(q)), pair_products(high & 12, load_i8x64(q + 256)))
    fours = add_words(fours, pair_products(low_2 & 12, load_i8x64(q + 192)))
    fours = add_words(fours, pair_products(high_2 & 12, load_i8x64(q + 448)))
    ones = add_words(pair_products(low & 3, load_i8x64(q + 128)), pair_products(high & 3, load_i8x64(q + 384)))
    ones = add_words(ones, pair_products(low_2 & 3, load_i8x64(q + 64)))
    ones = add_words(ones, pair_products(high_2 & 3, load_i8x64(q + 320)))
    ones = add_words(ones, ones)
    sums = add_words(add_words(ones, ones), fours)
    # The 1 in w + 1 and delta: the sum of q times -9, or -7 where delta is up.
    rest = add_words_where(load_i8x64(k_block + NINEFOLD_SUMS), load_i8x64(k_block + EVEN_SUMS), even_up)
    rest = add_words_where(rest, load_i8x64(k_block + ODD_SUMS), odd_up)
    dots = dot_words(add_words(add_words(sums, sums), rest), scales)
    return fma(to_f32(dots) * DELTA, d * load_f32x16(k_block + SCALES_OF_32), total)


# Of 16 rows' words of 16 bits:
_last_of_rows = bits_from([at + 11 for at in (0, 32) for _ in range(4)])
_nibbles_of_rows = bits_from([at + 4 * i - 1 for at in (0, 32) for i in range(4)])


@inline
def _store_k_block(low, high, deltas, out):
    """32 columns of 16 rows; byte 4r+i is group i of row r."""
    store_turned(_fourths(low, deltas), 128, out)
    store_turned(_fourths(high, deltas), 128, out + 64)


@inline
def _store_k_blocks(index, next_index, upper, next_upper, deltas, next_deltas, out):
    """Two at a time: they share loads of the table."""
    index, next_index = bytes_of(index), bytes_of(next_index)
    low = _first_halves(index, next_index, _masks(upper), _masks(next_upper))
    _store_k_block(low[0], _second_half(index, upper), deltas, out)
    _store_k_block(low[1], _second_half(next_index, next_upper), next_deltas, out + K_BLOCK_BYTES)


@inline
def _store_s(index, next_index, qh, d, out):
    """Two k-blocks of words of indices, and of qh."""
    store_f32x16(out + K_BLOCK_SCALES, _odd(qh >> 12) * d)
    store_f32x16(out + K_BLOCK_BYTES + K_BLOCK_SCALES, _odd(qh >> 28) * d)
    qh, next_qh = bytes_of(qh), bytes_of(qh >> 16)
    upper, next_upper = _threes_of_rows(qh), _threes_of_rows(next_qh)
    _store_k_blocks(index, next_index, upper, next_upper, _last_of_rows(qh), _last_of_rows(next_qh), out)


@kernel(REPACK, "avx512_vnni")
def _repack_s(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_S * b
        d = half_to_f32(gather(rows, block + D))
        for i in range(2):
            i0, i1, i2, i3 = transpose(rows, block + QS_S + 16 * i)
            first, second = gather(rows, block + QH_S + 8 * i), gather(rows, block + QH_S + 8 * i + 4)
            _store_s(i0, i1, first, d, out)
            _store_s(i2, i3, second, d, out + 2 * K_BLOCK_BYTES)
            out += 4 * K_BLOCK_BYTES


@inline
def _store_m(index, next_index, qh, s, d, out):
    """Two k-blocks of words of indices, of qh, and of s."""
    for half in range(2):
        store_f32x16(out + K_BLOCK_SCALES + 64 * half, _odd(s >> 3 * half) * d)
        store_f32x16(out + K_BLOCK_BYTES + K_BLOCK_SCALES + 64 * half, _odd(s >> 3 * half + 6) * d)
    nibbles, next_nibbles = _nibbles_of_rows(bytes_of(qh)), _nibbles_of_rows(bytes_of(qh >> 16))
    _store_k_blocks(index, next_index, nibbles, next_nibbles, nibbles, next_nibbles, out)


@kernel(REPACK, "avx512_vnni")
def _repack_m(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_M * b
        s, next_s = gather(rows, block + SCALES), gather(rows, block + SCALES + 4)
        d = s >> 12 & 15 | s >> 24 & 0xF0 | next_s >> 4 & 0xF00 | next_s >> 16 & 0xF000
        d = half_to_f32(d)
        for i in range(2):
            i0, i1, i2, i3 = transpose(rows, block + QS_M + 16 * i)
            first, second = gather(rows, block + QH_M + 8 * i), gather(rows, block + QH_M + 8 * i + 4)
            _store_m(i0, i1, first, s, d, out)
            _store_m(i2, i3, second, s >> 16, d, out + 2 * K_BLOCK_BYTES)
            s, out = next_s, out + 4 * K_BLOCK_BYTES


IQ1_S = grid_format(
    "IQ1_S", LAYOUT_S, unpack_s, group=_group_s, bits=_bits_s, marked=_lower, d=_d_s, fields=_fields_s, n_bits=3,
    unit=0.125, kind=SYMMETRIC, offset=9, four_rows=_four_s, add=_add_s,
    repack=_repack_s,
)  # fmt: skip
IQ1_M = grid_format(
    "IQ1_M", LAYOUT_M, unpack_m, group=_group_m, bits=_bits_m, marked=_lower, d=_d_m, fields=_fields_m, n_bits=3,
    unit=0.125, kind=TWO_SCALES, offset=9, four_rows=_four_m, add=_add_m,
    repack=_repack_m,
)  # fmt: skip
