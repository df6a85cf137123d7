"""Formats with 16 rows interleaved: the same bytes in another order, so that a vector's lanes are rows.

Of 16 blocks, one below the other, each field lies word by word: word 0 of all 16 rows, then word 1. Blocks follow
along the columns, then come the next 16 rows. So 16 rows take the bytes they took, and start where they started, but a
row has no address of its own. Products need no sums over lanes, and what is done to scales and bits serves 16 rows.
"""

import numpy as np

from quant.block_format import ROWS, Format, PanelFormat
from quant.errors import QuantError
from quant.formats import registry
from quant.gemv.interleaved import AddBlock, kernels
from quant.simd.memory import load_i64, load_u8, load_u16, load_u32, store_i8, store_i16, store_i32, store_i32x16
from quant.simd.rows16 import transpose_strided
from quant.target.jit import inline, kernel


def words_of(layout: np.dtype) -> list[tuple[int, int]]:
    """The fields of a block as (bytes of a word, words), in their order: packed bits in fours, numbers one by one."""
    words = []
    for name in layout.names:
        number, shape = layout[name].base, layout[name].shape
        size = 4 if number == np.uint8 else number.itemsize
        words.append((size, number.itemsize * int(np.prod(shape)) // size))
    return words


def _plain_blocks(layout: np.dtype, blocks: np.ndarray) -> np.ndarray:
    """The reference: uint8 (..., R, row bytes) interleaved, R a multiple of 16, to plain rows of the same shape."""
    raw = blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] // ROWS, -1, ROWS * layout.itemsize)
    fields, at = [], 0
    for size, count in words_of(layout):
        field = raw[..., at : at + ROWS * size * count].reshape(*raw.shape[:-1], count, ROWS, size)
        fields.append(np.moveaxis(field, -2, -4).reshape(*raw.shape[:-2], ROWS, raw.shape[-2], count * size))
        at += ROWS * size * count
    return np.concatenate(fields, -1).reshape(blocks.shape)


def interleaved(plain: Format, add_block: AddBlock, panels: PanelFormat) -> Format:
    """The format with 16 rows of `plain` interleaved; its layout is that of one row's block.

    Args:
        add_block: see gemv.interleaved.kernels.
        panels: how its blocks become panels.
    """
    name = f"{plain.name}_R{ROWS}"
    gemv, gemv_batch = kernels(name, plain.block_bytes, add_block)

    def unpack(blocks: np.ndarray) -> np.ndarray:
        return plain.unpack(_plain_blocks(plain.layout, blocks))

    return Format(name, plain.block, plain.layout, True, unpack, gemv, gemv_batch, rows=ROWS, panels=panels)


@inline
def _copy_words(source, source_step, target, target_step, size):
    """16 words of 1, 2 or 4 bytes, so far apart."""
    if size == 4:
        for r in range(ROWS):
            store_i32(target + target_step * r, load_u32(source + source_step * r))
    elif size == 2:
        for r in range(ROWS):
            store_i16(target + target_step * r, load_u16(source + source_step * r))
    else:
        for r in range(ROWS):
            store_i8(target + target_step * r, load_u8(source + source_step * r))


@inline
def _interleave_words(row, row_bytes, words, count):
    """`count` words of 4 bytes of each of 16 rows, 4 at a time as far as they go."""
    fours = count // 4 * 4
    for i in range(0, fours, 4):
        w0, w1, w2, w3 = transpose_strided(row + 4 * i, row_bytes)
        store_i32x16(words + 64 * i, w0)
        store_i32x16(words + 64 * i + 64, w1)
        store_i32x16(words + 64 * i + 128, w2)
        store_i32x16(words + 64 * i + 192, w3)
    for i in range(fours, count):
        _copy_words(row + 4 * i, row_bytes, words + 64 * i, 4, 4)


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def _reorder(plain, n_groups, n_blocks, fields, n_fields, interleaved, back):
    """fields: address of n_fields times (bytes of a word, words), int64. back: from interleaved to plain."""
    block_bytes = 0
    for f in range(n_fields):
        block_bytes += load_i64(fields + 16 * f) * load_i64(fields + 16 * f + 8)
    row_bytes = block_bytes * n_blocks
    for group in range(n_groups):
        for b in range(n_blocks):
            row = plain + row_bytes * ROWS * group + block_bytes * b
            words = interleaved + (row_bytes * group + block_bytes * b) * ROWS
            for f in range(n_fields):
                size, count = load_i64(fields + 16 * f), load_i64(fields + 16 * f + 8)
                if size == 4 and back == 0:
                    _interleave_words(row, row_bytes, words, count)
                else:
                    for i in range(count):
                        if back != 0:
                            _copy_words(words + size * ROWS * i, size, row + size * i, row_bytes, size)
                        else:
                            _copy_words(row + size * i, row_bytes, words + size * ROWS * i, size, size)
                row += size * count
                words += size * ROWS * count


def _reordered(
    format_: Format, data: np.ndarray, n_rows: int, row_bytes: int, back: bool, out: np.ndarray | None = None
) -> np.ndarray:
    name, block_bytes = format_.name, format_.block_bytes
    if n_rows % ROWS or row_bytes % block_bytes:
        raise QuantError(f"{name}: {n_rows} rows of {row_bytes} bytes are no multiples of {ROWS} and {block_bytes}")
    if data.dtype != np.uint8 or not data.flags.c_contiguous or data.nbytes != n_rows * row_bytes:
        raise QuantError(f"{name}: {n_rows} rows of {row_bytes} contiguous bytes expected; found {data.nbytes}")
    out = np.empty((n_rows, row_bytes), np.uint8) if out is None else out
    if out.dtype != np.uint8 or not out.flags.c_contiguous or out.nbytes != data.nbytes:
        raise QuantError(f"{name}: a result of {data.nbytes} contiguous bytes expected; found {out.nbytes}")
    fields = np.array(words_of(format_.layout), np.int64)
    plain, interleaved = (out, data) if back else (data, out)
    sizes = n_rows // ROWS, row_bytes // block_bytes
    _reorder.ctypes(plain.ctypes.data, *sizes, fields.ctypes.data, len(fields), interleaved.ctypes.data, back)
    return out


def interleave(
    format_: Format, plain: np.ndarray, n_rows: int, row_bytes: int, out: np.ndarray | None = None
) -> np.ndarray:
    """The rows of a plain format as those of an interleaved one: uint8 (n_rows, bytes of a row in `format_`).

    Any 16 rows from a multiple of 16 on can be done by themselves. Takes no memory but the result's, and as much again
    where blocks are widened; leaves the GIL to others.

    Args:
        format_: the interleaved one.
        plain: uint8, contiguous, n_rows * row_bytes.
        row_bytes: of a plain row.
        out: where the result goes if not to new memory: uint8, contiguous, of its size.

    Raises:
        QuantError: the sizes do not fit, or n_rows is no multiple of 16.
    """
    if format_.widen:
        plain, row_bytes = _widened(format_, plain, n_rows, row_bytes)
    return _reordered(format_, plain, n_rows, row_bytes, False, out)


def _widened(format_: Format, plain: np.ndarray, n_rows: int, row_bytes: int) -> tuple[np.ndarray, int]:
    """The rows in blocks of the format's own, and bytes of a row."""
    size = registry.get(format_.name.removesuffix(f"_R{ROWS}")).block_bytes
    n_blocks, rest = divmod(row_bytes, size)
    if rest or plain.dtype != np.uint8 or not plain.flags.c_contiguous or plain.nbytes != n_rows * row_bytes:
        raise QuantError(
            f"{format_.name}: {n_rows} rows of {row_bytes} contiguous bytes do not fit; {plain.nbytes} found"
        )
    wide = np.empty(n_rows * n_blocks * format_.block_bytes, np.uint8)
    format_.widen.ctypes(plain.ctypes.data, n_rows * n_blocks, wide.ctypes.data)
    return wide, n_blocks * format_.block_bytes


def deinterleave(format_: Format, interleaved: np.ndarray, n_rows: int, row_bytes: int) -> np.ndarray:
    """The reverse of interleave: the same arguments, results and errors; none for widened blocks."""
    if format_.widen:
        raise QuantError(f"{format_.name}: rows are not put back")
    return _reordered(format_, interleaved, n_rows, row_bytes, True)
