"""IQ2_XXS, IQ2_XS and IQ2_S: groups of 8 weights on grids of 256, 512 and 1024 entries, with signs. 256 weights in 66,
74 and 82 bytes: 2.06, 2.31 and 2.56 bits each.

x = d/8 * (2*ls+1) * w, w of magnitude 8, 25 or 43. IQ2_XXS: 8 bytes for every 32 weights, four indices, then 32 bits:
four times 7 of signs and ls. IQ2_XS: 16 bits a group, 9 of index and 7 of signs; ls for every 16. IQ2_S: 8 bits of each
index, then the signs of each group, then the indices' upper 2 bits; ls as in IQ2_XS.
Source: ggml src/ggml-common.h @d99724f, block_iq2_xxs, block_iq2_xs, block_iq2_s; dequantize_row_iq2_xxs and so on in
ggml-quants.c.
"""

from collections.abc import Callable

import numpy as np

from quant.block_format import REPACK, block_layout, offsets
from quant.formats import codebooks
from quant.formats.grids import (
    add_eighths,
    entry_of,
    fields_of,
    four_sevens,
    grid_format,
    load_fields,
    negative,
    odd_numbers,
    signed_values,
    store_turned,
    with_eighth_bits,
)
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, SIGNED_BYTES, TWO_SCALES
from quant.gemm.repack import SCALES
from quant.simd.ints import shifted
from quant.simd.memory import (
    load_f16_everywhere,
    load_f16_in_halves,
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
    bits_from,
    both_of_table,
    bytes_of,
    eights_in_turn,
    even_bytes,
    even_of_8,
    even_words,
    first_of_4,
    interleave_high,
    interleave_low,
    mask_of,
    odd_bytes,
    odd_of_8,
    odd_words,
    spread_bytes,
    table_of,
    with_bits,
)
from quant.simd.rows16 import gather, half_to_f32, transpose
from quant.target.jit import inline, kernel

LAYOUT_XXS = block_layout(66, d="<f2", qs="32<u2")
LAYOUT_XS = block_layout(74, d="<f2", qs="32<u2", scales="8u1")
LAYOUT_S = block_layout(82, d="<f2", qs="64u1", qh="8u1", scales="8u1")
D, QS = offsets(LAYOUT_XXS)
SCALES_XS, QH, SCALES_S = offsets(LAYOUT_XS)[2], *offsets(LAYOUT_S)[2:]
SIGNS_S = QS + 32  # the second half of qs
BYTES_XXS, BYTES_XS, BYTES_S = LAYOUT_XXS.itemsize, LAYOUT_XS.itemsize, LAYOUT_S.itemsize
UNIT = 0.125


def _weights(name: str, indices: np.ndarray, signs: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 (..., 256) of indices and bytes of signs (..., 32) and scales (..., 8 or 16)."""
    is_negative = np.unpackbits(signs[..., None], axis=-1, bitorder="little")
    w = codebooks.grid(name)[indices] * (1 - 2 * is_negative.astype(np.int8))
    return (scale[..., None] * w.reshape(*scale.shape, -1).astype(np.float32)).reshape(*scale.shape[:-1], -1)


def _scale(raw: np.ndarray, ls: np.ndarray) -> np.ndarray:
    return raw["d"].astype(np.float32)[..., None] * (np.float32(0.5) + ls.astype(np.float32)) * np.float32(0.25)


def _nibbles(scales: np.ndarray) -> np.ndarray:
    """(..., 16) of bytes (..., 8), low ones first."""
    return np.stack([scales & 15, scales >> 4], -1).reshape(*scales.shape[:-1], 16)


def unpack_xxs(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*66) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT_XXS)
    words = np.ascontiguousarray(raw["qs"]).view("<u4").reshape(*raw.shape, 8, 2)
    indices = np.ascontiguousarray(words[..., 0]).view(np.uint8).reshape(*raw.shape, 32)
    sevens = words[..., 1:] >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    signs = codebooks.ksigns()[sevens].reshape(*raw.shape, 32)
    return _weights("IQ2_XXS", indices, signs, _scale(raw, words[..., 1] >> 28)).reshape(*blocks.shape[:-1], -1)


def unpack_xs(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*74) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT_XS)
    signs = codebooks.ksigns()[raw["qs"] >> 9]
    scale = _scale(raw, _nibbles(raw["scales"]))
    return _weights("IQ2_XS", raw["qs"] & 511, signs, scale).reshape(*blocks.shape[:-1], -1)


def unpack_s(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*82) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT_S)
    low, signs = np.split(raw["qs"], 2, -1)
    high = (raw["qh"][..., None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(*raw.shape, 32)
    scale = _scale(raw, _nibbles(raw["scales"]))
    return _weights("IQ2_S", low | high.astype(np.uint16) << 8, signs, scale).reshape(*blocks.shape[:-1], -1)


@inline
def _d(block):
    return load_f16_everywhere(block + D)


_entry_xxs, _entry_xs, _entry_s = (entry_of(codebooks.grid(name)) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S"))


@inline
def _group_xxs(block, g):
    return _entry_xxs(load_u8(block + QS + 8 * (g // 4) + g % 4))


@inline
def _bits_xxs(block, k):
    words = block + QS + 16 * k
    return with_eighth_bits(four_sevens(load_u32(words + 4)) | four_sevens(load_u32(words + 12)) << 32)


@inline
def _group_xs(block, g):
    return _entry_xs(load_u16(block + QS + 2 * g) & 511)


@inline
def _four_bytes(words):
    """The low bytes of four 16-bit words."""
    words = (words | words >> 8) & 0x0000FFFF0000FFFF
    return (words | words >> 16) & 0xFFFFFFFF


@inline
def _bits_xs(block, k):
    first, second = load_i64(block + QS + 16 * k) >> 9, load_i64(block + QS + 16 * k + 8) >> 9
    sevens = _four_bytes(first & 0x007F007F007F007F) | _four_bytes(second & 0x007F007F007F007F) << 32
    return with_eighth_bits(sevens)


@inline
def _group_s(block, g):
    high = load_u8(block + QH + g // 4) >> 2 * (g % 4) & 3
    return _entry_s(load_u8(block + QS + g) | high << 8)


@inline
def _bits_s(block, k):
    return load_i64(block + SIGNS_S + 8 * k)


_nibble_fields = load_fields(32, [i // 8 for i in range(16)], [4 * (i % 8) for i in range(16)])
_fields_of_words = load_fields(32, [i // 2 * 2 + 1 for i in range(16)], [28] * 16)


@inline
def _fields_xxs(block):
    return _fields_of_words(block + QS)


@inline
def _fields_xs(block):
    return _nibble_fields(block + SCALES_XS)


@inline
def _fields_s(block):
    return _nibble_fields(block + SCALES_S)


# ---- where bytes can be permuted -------------------------------------------------------------------------------------

_values = np.unique(codebooks.grid("IQ2_S"))
# A group's first four weights make a byte, its others another; the fourth field is shifted down by 2. Signs are 4 bits
# of a byte: two by two they take the place of another field.
_PLACES = 2, 0, 1, 3
_first, _second, _third, _fourth = (
    table_of(signed_values(_values, shift, 2, sign)) for shift, sign in ((2, 0), (4, 1), (0, 2), (4, 1))
)
_odd = odd_numbers(4, UNIT)
_first_signs, _last_signs = with_bits(0b0011), with_bits(0b1100)
_signs_of_sevens = table_of(codebooks.ksigns())
_sevens = bits_from([0, 7, 14, 21, 32, 39, 46, 53])


def _codes_of(name: str, lookup: Callable = table_of):
    """Lookups of the bytes of a group's first weights and of its last."""
    return (lookup(fields_of(name, [4 * half + place for place in _PLACES], 2)) for half in range(2))


_low_xxs, _high_xxs = _codes_of("IQ2_XXS")
_lows_xs, _highs_xs = _codes_of("IQ2_XS", both_of_table)
_lows_s, _highs_s = _codes_of("IQ2_S", both_of_table)
_move_1, _move_2, _move_4 = (shifted(-n, -n) for n in (1, 2, 4))


@inline
def _fourths(codes, signs):
    """Weights + 128 of a block: every fourth column from 0, 1, 2 and 3 on."""
    first, last = _first_signs(codes, signs), _last_signs(codes, signs)
    return _first(first), _second(first), _third(last), _fourth(_move_2(last))


@inline
def _two_blocks(low, high, signs):
    """Of bytes of groups, 8 of one block and 8 of another in turn: codes of their halves, and signs."""
    upper = _move_4(signs)
    return (
        _fourths(interleave_low(low, high), interleave_low(signs, upper)),
        _fourths(interleave_high(low, high), interleave_high(signs, upper)),
    )


@inline
def _two_xxs(a, b):
    """Of both blocks all groups' first weights, second ones and so on; scales."""
    first, second = load_i32x16(a + QS), load_i32x16(b + QS)
    index, words = bytes_of(even_words(first, second)), odd_words(first, second)
    signs = _signs_of_sevens(_sevens(bytes_of(words)))
    return (
        *_fourths(_low_xxs(index), signs),
        *_fourths(_high_xxs(index), _move_4(signs)),
        _odd(words >> 28) * load_f16_in_halves(a + D, b + D),
    )


_ninth_bits = mask_of([1])


@inline
def _four_xxs(a, b, c, d):
    return _two_xxs(a, b), _two_xxs(c, d)


@inline
def _four_blocks(low, high, first_signs, second_signs):
    a, b = _two_blocks(low[0], high[0], first_signs)
    c, d = _two_blocks(low[1], high[1], second_signs)
    return a, b, c, d


@inline
def _index_xs(a, b):
    """Indices' lower 8 bits, their ninth ones, signs."""
    a, b = load_i8x64(a + QS), load_i8x64(b + QS)
    index, upper = even_bytes(a, b), odd_bytes(a, b)
    return index, (_ninth_bits(upper),), _signs_of_sevens(_move_1(upper))


def _four_of(index, lows, highs):
    """What reads four rows: a function of two rows' indices, and the tables of both halves of what they name."""

    @inline
    def four(a, b, c, d):
        first, masks, signs = index(a, b)
        second, more_masks, more_signs = index(c, d)
        low, high = lows(first, second, masks, more_masks), highs(first, second, masks, more_masks)
        return _four_blocks(low, high, signs, more_signs)

    return four


_four_xs = _four_of(_index_xs, _lows_xs, _highs_xs)
_ninth_of_4, _tenth_of_4 = mask_of([1, 4, 16, 64]), mask_of([2, 8, 32, 128])


@inline
def _index_s(a, b):
    """Indices' lower 8 bits, their ninth and tenth ones, signs."""
    upper = spread_bytes(load_i64(a + QH), load_i64(b + QH))
    index = eights_in_turn(load_i8x32(a + QS), load_i8x32(b + QS))
    signs = eights_in_turn(load_i8x32(a + SIGNS_S), load_i8x32(b + SIGNS_S))
    return index, (_ninth_of_4(upper), _tenth_of_4(upper)), signs


_four_s = _four_of(_index_s, _lows_s, _highs_s)


@inline
def _store_k_block(low, high, signs, out):
    """32 columns of 16 rows; byte 4r+i is group i of row r."""
    store_turned(_fourths(low, signs), 128, out)
    store_turned(_fourths(high, _move_4(signs)), 128, out + 64)


@inline
def _store_xxs(index, word, d, out):
    """A k-block of indices and of signs with ls, a word a row."""
    index, signs = bytes_of(index), _signs_of_sevens(_sevens(bytes_of(word)))
    store_f32x16(out + SCALES, _odd(word >> 28) * d)
    _store_k_block(_low_xxs(index), _high_xxs(index), signs, out)


@kernel(REPACK, "avx512_vnni")
def _repack_xxs(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_XXS * b
        d = half_to_f32(gather(rows, block + D))
        for i in range(4):
            index, word, next_index, next_word = transpose(rows, block + QS + 16 * i)
            _store_xxs(index, word, d, out)
            _store_xxs(next_index, next_word, d, out + K_BLOCK_BYTES)
            out += 2 * K_BLOCK_BYTES


@inline
def _store_scales(nibbles, d, out):
    """d * (2*ls + 1) of the lowest two nibbles."""
    store_f32x16(out + SCALES, _odd(nibbles) * d)
    store_f32x16(out + SCALES + 64, _odd(nibbles >> 4) * d)


@inline
def _fields_of_xs(first, second):
    """Of two 16-bit fields a word: the indices' lower 8 bits, their ninth ones, signs."""
    upper = odd_of_8(first, second)
    return even_of_8(first, second), (_ninth_bits(upper),), _signs_of_sevens(_move_1(upper))


@inline
def _store_xs(first, second, third, fourth, out):
    """Two k-blocks of two 16-bit fields a word."""
    index, masks, signs = _fields_of_xs(first, second)
    next_index, next_masks, next_signs = _fields_of_xs(third, fourth)
    low, high = _lows_xs(index, next_index, masks, next_masks), _highs_xs(index, next_index, masks, next_masks)
    _store_k_block(low[0], high[0], signs, out)
    _store_k_block(low[1], high[1], next_signs, out + K_BLOCK_BYTES)


@kernel(REPACK, "avx512_vnni")
def _repack_xs(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_XS * b
        d = half_to_f32(gather(rows, block + D))
        for i in range(2):
            nibbles = gather(rows, block + SCALES_XS + 4 * i)
            for k in range(2):
                first, second, third, fourth = transpose(rows, block + QS + 32 * i + 16 * k)
                _store_xs(first, second, third, fourth, out)
                _store_scales(nibbles, d, out)
                _store_scales(nibbles >> 8, d, out + K_BLOCK_BYTES)
                nibbles, out = nibbles >> 16, out + 2 * K_BLOCK_BYTES


@inline
def _store_s(index, next_index, signs, next_signs, upper, nibbles, d, out):
    """Two k-blocks of words of indices and signs, and in the lowest bytes their upper bits and two nibbles of ls."""
    index, next_index = bytes_of(index), bytes_of(next_index)
    first, second = first_of_4(upper), first_of_4(upper >> 8)
    masks, next_masks = (_ninth_of_4(first), _tenth_of_4(first)), (_ninth_of_4(second), _tenth_of_4(second))
    low, high = _lows_s(index, next_index, masks, next_masks), _highs_s(index, next_index, masks, next_masks)
    _store_scales(nibbles, d, out)
    _store_scales(nibbles >> 8, d, out + K_BLOCK_BYTES)
    _store_k_block(low[0], high[0], bytes_of(signs), out)
    _store_k_block(low[1], high[1], bytes_of(next_signs), out + K_BLOCK_BYTES)


@kernel(REPACK, "avx512_vnni")
def _repack_s(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_S * b
        d = half_to_f32(gather(rows, block + D))
        for i in range(2):
            i0, i1, i2, i3 = transpose(rows, block + QS + 16 * i)
            s0, s1, s2, s3 = transpose(rows, block + SIGNS_S + 16 * i)
            upper, nibbles = gather(rows, block + QH + 4 * i), gather(rows, block + SCALES_S + 4 * i)
            _store_s(i0, i1, s0, s1, upper, nibbles, d, out)
            _store_s(i2, i3, s2, s3, upper >> 16, nibbles >> 16, d, out + 2 * K_BLOCK_BYTES)
            out += 4 * K_BLOCK_BYTES


IQ2_XXS = grid_format(
    "IQ2_XXS", LAYOUT_XXS, unpack_xxs, group=_group_xxs, bits=_bits_xxs, marked=negative, d=_d, fields=_fields_xxs,
    n_bits=4, unit=UNIT, kind=SIGNED_BYTES, offset=128, four_rows=_four_xxs, add=add_eighths, repack=_repack_xxs,
)  # fmt: skip
IQ2_XS = grid_format(
    "IQ2_XS", LAYOUT_XS, unpack_xs, group=_group_xs, bits=_bits_xs, marked=negative, d=_d, fields=_fields_xs, n_bits=4,
    unit=UNIT, kind=TWO_SCALES, offset=43, four_rows=_four_xs, repack=_repack_xs, level="avx512_vnni",
)  # fmt: skip
IQ2_S = grid_format(
    "IQ2_S", LAYOUT_S, unpack_s, group=_group_s, bits=_bits_s, marked=negative, d=_d, fields=_fields_s, n_bits=4,
    unit=UNIT, kind=TWO_SCALES, offset=43, four_rows=_four_s, repack=_repack_s, level="avx512_vnni",
)  # fmt: skip
