"""Quantising to IQ1, IQ2 and IQ3: quantize/codebook.py has the search for all; here is what a block stores of it.

Source of the layouts: ggml src/ggml-common.h @d99724f, block_iq1_s up to block_iq3_s. By how many mean squares
a weight's importance is raised is ggml's (quantize_row_iq1_s_impl and its siblings in ggml-quants.c).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from quant.block_format import QUANTIZE, offsets
from quant.formats import codebooks
from quant.gemv.plain import specialize
from quant.quantize.codebook import BLOCK, CODES, ENTRIES, SIGNS, Book, D, entries_of, fit
from quant.quantize.search import mean
from quant.simd.exact import step_function
from quant.simd.memory import load_i32, load_i64, load_u8, load_u16, store_i8, store_i16, store_i32, store_i64
from quant.target.jit import inline, kernel
from quant.target.kernel import Kernel

# What specialize() gives the templates below.
BLOCK_BYTES = N_ENTRIES = N_COORDINATES = N_BOOKS = HIGHEST = SUB = N_CODES = VARIANCES = QS = QH = SCALES = 0
SIGNS_AT, IS_SIGNED, EVEN_SIGNS, STEP = 0, False, False, 1.0
entries = nearest = write = None


def _quantize(x, importance, n_blocks, out, scratch):
    average = mean(importance, BLOCK * n_blocks) if importance != 0 else np.float32(0.0)
    book = Book(entries(), N_ENTRIES, N_COORDINATES, N_BOOKS, HIGHEST, IS_SIGNED, EVEN_SIGNS, SUB, N_CODES, STEP)
    for b in range(n_blocks):
        block, columns = out + BLOCK_BYTES * b, importance + 4 * BLOCK * b if importance != 0 else 0
        fit(x + 4 * BLOCK * b, columns, average, VARIANCES, book, nearest, scratch)
        write(block, scratch)


# ---- what a block stores ---------------------------------------------------------------------------------------------


@inline
def _entry(scratch, g):
    return load_i32(scratch + ENTRIES + 4 * g)


@inline
def _write_d(block, scratch):
    """First of all, but in IQ1_M."""
    store_i16(block, load_u16(scratch + D))


@inline
def _sign_bits(scratch, g):
    """7 of them: the eighth follows."""
    return load_u8(scratch + SIGNS + g) & 127


@inline
def _signs_and_code(scratch, j):
    """The signs of 32 weights, 7 bits for 8, below the 4 bits of their scale."""
    first, second = _sign_bits(scratch, 4 * j), _sign_bits(scratch, 4 * j + 1)
    third, fourth = _sign_bits(scratch, 4 * j + 2), _sign_bits(scratch, 4 * j + 3)
    return first | second << 7 | third << 14 | fourth << 21 | load_u8(scratch + CODES + j) << 28


@inline
def _two_codes(scratch, i):
    return load_u8(scratch + CODES + 2 * i) | load_u8(scratch + CODES + 2 * i + 1) << 4


def _write_iq2_xxs(block, scratch):
    _write_d(block, scratch)
    for j in range(8):
        for g in range(4):
            store_i8(block + QS + 8 * j + g, _entry(scratch, 4 * j + g))
        store_i32(block + QS + 8 * j + 4, _signs_and_code(scratch, j))


def _write_iq2_xs(block, scratch):
    _write_d(block, scratch)
    for g in range(32):
        store_i16(block + QS + 2 * g, _entry(scratch, g) | _sign_bits(scratch, g) << 9)
    for i in range(8):
        store_i8(block + SCALES + i, _two_codes(scratch, i))


def _write_iq2_s(block, scratch):
    """qs: the low bytes of the entries, then the signs."""
    _write_d(block, scratch)
    for j in range(8):
        high = 0
        for g in range(4):
            entry = _entry(scratch, 4 * j + g)
            store_i8(block + QS + 4 * j + g, entry)
            store_i8(block + QS + 32 + 4 * j + g, load_u8(scratch + SIGNS + 4 * j + g))
            high |= entry >> 8 << 2 * g
        store_i8(block + QH + j, high)
        store_i8(block + SCALES + j, _two_codes(scratch, j))


def _write_iq3_xxs(block, scratch):
    """qs: the entries, then signs and scales."""
    _write_d(block, scratch)
    for g in range(64):
        store_i8(block + QS + g, _entry(scratch, g))
    for j in range(8):
        store_i32(block + QS + 64 + 4 * j, _signs_and_code(scratch, j))


def _write_iq3_s(block, scratch):
    _write_d(block, scratch)
    for j in range(8):
        high = 0
        for g in range(8):
            entry = _entry(scratch, 8 * j + g)
            store_i8(block + QS + 8 * j + g, entry)
            high |= entry >> 8 << g
        store_i8(block + QH + j, high)
    for i in range(4):
        store_i8(block + SCALES + i, _two_codes(scratch, i))
        store_i64(block + SIGNS_AT + 8 * i, load_i64(scratch + SIGNS + 8 * i))


def _write_iq1_s(block, scratch):
    """qh: the upper bits of four entries, the scale, which way the coordinates are shifted."""
    _write_d(block, scratch)
    for j in range(8):
        high = load_u8(scratch + CODES + j) << 12 | _entry(scratch, 4 * j) >> 11 << 15
        for g in range(4):
            entry = _entry(scratch, 4 * j + g)
            store_i8(block + QS + 4 * j + g, entry)
            high |= (entry >> 8 & 7) << 3 * g
        store_i16(block + QH + 2 * j, high)


def _write_iq1_m(block, scratch):
    """qh: the upper bits of two entries, each with which way its coordinates are shifted. d is in four parts."""
    for j in range(16):
        first, second = _entry(scratch, 2 * j), _entry(scratch, 2 * j + 1)
        store_i8(block + QS + 2 * j, first)
        store_i8(block + QS + 2 * j + 1, second)
        store_i8(block + QH + j, first >> 8 | second >> 8 << 4)
    d = load_u16(scratch + D)
    for i in range(4):
        word = (d >> 4 * i & 15) << 12
        for k in range(4):
            word |= load_u8(scratch + CODES + 4 * i + k) << 3 * k
        store_i16(block + SCALES + 2 * i, word)


# ---- kernels ---------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """Attributes: see codebook.Book and codebook.fit. coordinates: all that there are, rising."""

    write: Callable
    coordinates: Sequence[int]
    sub: int
    variances: int
    step: float
    even_signs: bool = False
    n_codes: int = 16
    n_books: int = 1


_DELTA = 0.125  # by which all coordinates of IQ1 are shifted, up or down
_KINDS = {
    "IQ1_S": _Kind(_write_iq1_s, (-1, 0, 1), 32, 2, 1.0, n_codes=8, n_books=2),
    "IQ1_M": _Kind(_write_iq1_m, (-1, 0, 1), 16, 2, 1.0, n_codes=8),
    "IQ2_XXS": _Kind(_write_iq2_xxs, (8, 25, 43), 32, 1, 1 / 8, even_signs=True),
    "IQ2_XS": _Kind(_write_iq2_xs, (8, 25, 43), 16, 1, 1 / 8, even_signs=True),
    "IQ2_S": _Kind(_write_iq2_s, (8, 25, 43), 16, 2, 1 / 8),
    "IQ3_XXS": _Kind(_write_iq3_xxs, (4, 12, 20, 28, 36, 44, 52, 62), 32, 2, 1 / 4, even_signs=True),
    "IQ3_S": _Kind(_write_iq3_s, range(1, 16, 2), 32, 2, 1.0),
}


def _entries(name: str) -> np.ndarray:
    """float32 (entries, coordinates): the grid; those of IQ1 shifted up, then down."""
    grid = codebooks.grid(name).astype(np.float32)
    return np.concatenate([grid + _DELTA, grid - _DELTA]) if name.startswith("IQ1") else grid


def _nearest(coordinates: Sequence[int]) -> Callable:
    """An inline function: which of the coordinates are nearest to 16 numbers."""
    step = step_function(coordinates)

    @inline
    def nearest(v):
        return step(v)

    return nearest


def quantizer(name: str, layout: np.dtype) -> Kernel:
    """The quantize kernel of a format of IQ1, IQ2 or IQ3 with this layout of its block."""
    kind, (n_entries, n_coordinates), is_signed = _KINDS[name], codebooks.SHAPES[name], name.startswith("IQ1")
    at = dict(zip(layout.names, offsets(layout), strict=True))
    names = {
        "QS": at["qs"], "QH": at.get("qh", 0), "SCALES": at.get("scales", 0),
        "SIGNS_AT": at.get("signs", 0), "BLOCK_BYTES": layout.itemsize, "N_COORDINATES": n_coordinates,
        "N_ENTRIES": n_entries * (1 + is_signed) // kind.n_books, "N_BOOKS": kind.n_books, "N_CODES": kind.n_codes,
        "HIGHEST": kind.coordinates[-1], "IS_SIGNED": is_signed, "SUB": kind.sub, "VARIANCES": kind.variances,
        "EVEN_SIGNS": kind.even_signs, "STEP": kind.step,
    }  # fmt: skip
    names |= {
        "entries": entries_of(partial(_entries, name)), "nearest": _nearest(kind.coordinates),
        "write": inline(specialize(kind.write, f"write_{name}", **names)),
    }  # fmt: skip
    return kernel(QUANTIZE)(specialize(_quantize, f"quantize_{name}", **names))
