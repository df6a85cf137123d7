"""IQ3_XXS and IQ3_S: groups of 4 weights on grids of 256 and 512 entries, with signs. 256 weights in 98 and 110 bytes:
3.06 and 3.44 bits each.

IQ3_XXS: x = d/4 * (2*ls+1) * w, |w| from 4 to 62. 64 indices, then for every 32 weights 32 bits: four times 7 of signs
and ls. IQ3_S: x = d * (2*ls+1) * w, |w| odd, up to 15. 64 times 8 bits of an index, their ninth bits, the signs of each
8 weights, ls for every 32.
Source: ggml src/ggml-common.h @d99724f, block_iq3_xxs, block_iq3_s; dequantize_row_iq3_xxs, dequantize_row_iq3_s in
ggml-quants.c.
"""

import numpy as np

from quant.block_format import REPACK, block_layout, offsets
from quant.formats import codebooks
from quant.formats.grids import (
    fields_of,
    four_sevens,
    grid_format,
    load_fields,
    negative,
    odd_numbers,
    signed_values,
    store_turned,
    two_entries_of,
    with_eighth_bits,
)
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, SIGNED_BYTES
from quant.gemm.repack import SCALES as K_BLOCK_SCALES
from quant.simd.memory import load_f16_everywhere, load_i8x32, load_i8x64, load_i64, load_u8, load_u32, store_f32x16
from quant.simd.permutes import bits_from, bytes_of, first_of_4, fours_apart, mask_of, table_of, with_bits
from quant.simd.rows16 import gather, half_to_f32, transpose
from quant.target.jit import inline, kernel

LAYOUT_XXS = block_layout(98, d="<f2", qs="96u1")
LAYOUT_S = block_layout(110, d="<f2", qs="64u1", qh="8u1", signs="32u1", scales="4u1")
D, QS = offsets(LAYOUT_XXS)
BYTES_XXS, BYTES_S = LAYOUT_XXS.itemsize, LAYOUT_S.itemsize
WORDS = QS + 64  # the last 32 bytes of IQ3_XXS's qs
QH, SIGNS, SCALES = offsets(LAYOUT_S)[2:]


def _weights(name: str, indices: np.ndarray, signs: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 (..., 256) of indices (..., 64), bytes of signs (..., 32) and scales (..., 8)."""
    is_negative = np.unpackbits(signs[..., None], axis=-1, bitorder="little").reshape(*indices.shape, 4)
    w = codebooks.grid(name)[indices] * (1 - 2 * is_negative.astype(np.int8))
    return (scale[..., None] * w.reshape(*scale.shape, 32).astype(np.float32)).reshape(*scale.shape[:-1], -1)


def unpack_xxs(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*98) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT_XXS)
    indices, words = raw["qs"][..., :64], np.ascontiguousarray(raw["qs"][..., 64:]).view("<u4")
    signs = codebooks.ksigns()[words[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127]
    scale = raw["d"].astype(np.float32)[..., None] * (np.float32(0.5) + (words >> 28).astype(np.float32))
    x = _weights("IQ3_XXS", indices, signs.reshape(*raw.shape, 32), scale * np.float32(0.5))
    return x.reshape(*blocks.shape[:-1], -1)


def unpack_s(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*110) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT_S)
    ninth = np.unpackbits(raw["qh"], axis=-1, bitorder="little").astype(np.uint16)
    ls = np.stack([raw["scales"] & 15, raw["scales"] >> 4], -1).reshape(*raw.shape, 8)
    scale = raw["d"].astype(np.float32)[..., None] * (1 + 2 * ls).astype(np.float32)
    return _weights("IQ3_S", raw["qs"] | ninth << 8, raw["signs"], scale).reshape(*blocks.shape[:-1], -1)


@inline
def _d(block):
    return load_f16_everywhere(block + D)


_entries_xxs, _entries_s = (two_entries_of(codebooks.grid(name)) for name in ("IQ3_XXS", "IQ3_S"))


@inline
def _group_xxs(block, g):
    qs = block + QS + 2 * g
    return _entries_xxs(load_u8(qs), load_u8(qs + 1))


@inline
def _bits_xxs(block, k):
    words = block + WORDS + 8 * k
    return with_eighth_bits(four_sevens(load_u32(words)) | four_sevens(load_u32(words + 4)) << 32)


@inline
def _group_s(block, g):
    qs, ninth = block + QS + 2 * g, load_u8(block + QH + g // 4) >> 2 * (g % 4)
    return _entries_s(load_u8(qs) | (ninth & 1) << 8, load_u8(qs + 1) | (ninth & 2) << 7)


@inline
def _bits_s(block, k):
    return load_i64(block + SIGNS + 8 * k)


_fields_of_words = load_fields(32, [i // 2 for i in range(16)], [28] * 16)
_nibble_fields = load_fields(32, [0] * 16, [4 * (i // 2) for i in range(16)])


@inline
def _fields_xxs(block):
    return _fields_of_words(block + WORDS)


@inline
def _fields_s(block):
    return _nibble_fields(block + SCALES)


# ---- where bytes can be permuted -------------------------------------------------------------------------------------

# A group's weights 2 and 0 make a byte of 6 bits, its weights 3 and 1 another. Its signs are bits 1 to 4 of a byte, one
# of which takes the place of a bit of the other field.
_FIELDS = (3, 1), (3, 2), (0, 3), (0, 4)  # shift and sign of weights 0 to 3


def _tables(name: str):
    """Lookups of both bytes of an index, and of the four weights."""
    codes = [table_of(fields_of(name, places, 3)) for places in ((2, 0), (3, 1))]
    values = np.unique(codebooks.grid(name))
    return codes + [table_of(signed_values(values, shift, 3, sign)) for shift, sign in _FIELDS]


_even_xxs, _odd_xxs, _first_xxs, _second_xxs, _third_xxs, _fourth_xxs = _tables("IQ3_XXS")
_even_s, _odd_s, _first_s, _second_s, _third_s, _fourth_s = _tables("IQ3_S")
_times_xxs, _times_s = odd_numbers(4, 0.25), odd_numbers(4, 1.0)
_sign_1, _sign_2, _sign_3, _sign_4 = (with_bits(1 << sign) for _, sign in _FIELDS)
_signs_of_sevens = table_of(codebooks.ksigns())
_sevens = bits_from([0, 0, 7, 7, 14, 14, 21, 21])
_halves_of_bytes = bits_from([16 * i + at for i in range(4) for at in (-1, 3)])
_halves_of_4_bytes = bits_from([4 * i - 1 for i in range(8)])


@inline
def _fourths_xxs(index, signs):
    """Weights + 128 of 64 indices: each one's first, second and so on."""
    even, odd = _even_xxs(index), _odd_xxs(index)
    return (
        _first_xxs(_sign_1(even, signs)),
        _second_xxs(_sign_2(odd, signs)),
        _third_xxs(_sign_3(even, signs)),
        _fourth_xxs(_sign_4(odd, signs)),
    )


@inline
def _fourths_s(index, ninth, signs):
    """The same; a mask of the indices' ninth bits."""
    even, odd = _even_s(index, ninth), _odd_s(index, ninth)
    return (
        _first_s(_sign_1(even, signs)),
        _second_s(_sign_2(odd, signs)),
        _third_s(_sign_3(even, signs)),
        _fourth_s(_sign_4(odd, signs)),
    )


@inline
def _block_xxs(block):
    sevens = _sevens(fours_apart(load_i8x32(block + WORDS)))
    return _fourths_xxs(load_i8x64(block + QS), _halves_of_bytes(_signs_of_sevens(sevens)))


@inline
def _block_s(block):
    signs = _halves_of_4_bytes(fours_apart(load_i8x32(block + SIGNS)))
    return _fourths_s(load_i8x64(block + QS), load_i64(block + QH), signs)


@inline
def _four_xxs(a, b, c, d):
    return _block_xxs(a), _block_xxs(b), _block_xxs(c), _block_xxs(d)


@inline
def _four_s(a, b, c, d):
    return _block_s(a), _block_s(b), _block_s(c), _block_s(d)


# Of 16 rows' words: signs of 16 columns as above, for the first or the second half of 32.
_sevens_of_first, _sevens_of_last = (
    bits_from([at + i for at in (0, 32) for i in (h, h, h + 7, h + 7)]) for h in (0, 14)
)
_fours_of_first, _fours_of_last = (bits_from([at + 4 * i - 1 for at in (h, h + 32) for i in range(4)]) for h in (0, 16))
_ninth_of_first, _ninth_of_last = mask_of([1, 2, 4, 8]), mask_of([16, 32, 64, 128])


@inline
def _store_xxs(first, second, word, d, out):
    """A k-block: two words of indices a row, one of signs with ls."""
    store_f32x16(out + K_BLOCK_SCALES, _times_xxs(word >> 28) * d)
    word = bytes_of(word)
    signs = _halves_of_bytes(_signs_of_sevens(_sevens_of_first(word)))
    store_turned(_fourths_xxs(bytes_of(first), signs), 64, out)
    signs = _halves_of_bytes(_signs_of_sevens(_sevens_of_last(word)))
    store_turned(_fourths_xxs(bytes_of(second), signs), 64, out + 256)


@kernel(REPACK, "avx512_vnni")
def _repack_xxs(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_XXS * b
        d = half_to_f32(gather(rows, block + D))
        for i in range(2):
            w0, w1, w2, w3 = transpose(rows, block + WORDS + 16 * i)
            i0, i1, i2, i3 = transpose(rows, block + QS + 32 * i)
            _store_xxs(i0, i1, w0, d, out)
            _store_xxs(i2, i3, w1, d, out + K_BLOCK_BYTES)
            i0, i1, i2, i3 = transpose(rows, block + QS + 32 * i + 16)
            _store_xxs(i0, i1, w2, d, out + 2 * K_BLOCK_BYTES)
            _store_xxs(i2, i3, w3, d, out + 3 * K_BLOCK_BYTES)
            out += 4 * K_BLOCK_BYTES


@inline
def _store_s(first, second, upper, word, nibbles, d, out):
    """The same: two words of indices, ninth bits in the lowest byte, a word of signs, ls in the lowest nibble."""
    store_f32x16(out + K_BLOCK_SCALES, _times_s(nibbles) * d)
    upper, word = first_of_4(upper), bytes_of(word)
    store_turned(_fourths_s(bytes_of(first), _ninth_of_first(upper), _fours_of_first(word)), 64, out)
    store_turned(_fourths_s(bytes_of(second), _ninth_of_last(upper), _fours_of_last(word)), 64, out + 256)


@kernel(REPACK, "avx512_vnni")
def _repack_s(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_S * b
        d, nibbles = half_to_f32(gather(rows, block + D)), gather(rows, block + SCALES)
        for i in range(2):
            w0, w1, w2, w3 = transpose(rows, block + SIGNS + 16 * i)
            upper = gather(rows, block + QH + 4 * i)
            i0, i1, i2, i3 = transpose(rows, block + QS + 32 * i)
            _store_s(i0, i1, upper, w0, nibbles, d, out)
            _store_s(i2, i3, upper >> 8, w1, nibbles >> 4, d, out + K_BLOCK_BYTES)
            i0, i1, i2, i3 = transpose(rows, block + QS + 32 * i + 16)
            _store_s(i0, i1, upper >> 16, w2, nibbles >> 8, d, out + 2 * K_BLOCK_BYTES)
            _store_s(i2, i3, upper >> 24, w3, nibbles >> 12, d, out + 3 * K_BLOCK_BYTES)
            nibbles, out = nibbles >> 16, out + 4 * K_BLOCK_BYTES


IQ3_XXS = grid_format(
    "IQ3_XXS", LAYOUT_XXS, unpack_xxs, group=_group_xxs, bits=_bits_xxs, marked=negative, d=_d, fields=_fields_xxs,
    n_bits=4, unit=0.25, kind=SIGNED_BYTES, offset=128, four_rows=_four_xxs,
    repack=_repack_xxs,
)  # fmt: skip
IQ3_S = grid_format(
    "IQ3_S", LAYOUT_S, unpack_s, group=_group_s, bits=_bits_s, marked=negative, d=_d, fields=_fields_s, n_bits=4,
    unit=1.0, kind=SIGNED_BYTES, offset=128, four_rows=_four_s,
    repack=_repack_s,
)  # fmt: skip
