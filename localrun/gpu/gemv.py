"""y = W x for 1 to 8 tokens: every weight is read once for all of them, from its blocks. Sums in float32, in a fixed order.

Also what reads rows without multiplying (embedding, dense) and the product with a transposed matrix. One matrix, or one
a group (attention heads). Letters: T tokens, G groups, R rows and U units (blocks.py) of a tile.
"""

import torch
import torch
import triton
import triton.language as tl

from localrun.gpu import blocks
from localrun.gpu.matrix import Matrix, n_processors

MOST_TOKENS = 8
# Rows and units of a tile by the bytes of a word: 8 sums a token and thread, and 16 to 32 bytes of weights under way in each.
TILES = {4: (16, 16), 2: (16, 8), 1: (8, 8)}
_TRANSPOSED_TILES = {4: (32, 4), 2: (32, 4), 1: (16, 4)}
_WARPS = 4
_PROGRAMS = 8  # a multiprocessor: enough of them to keep the memory busy


@triton.jit
def _activations(x, low, high, n_cols, B: tl.constexpr, WORD: tl.constexpr):
    """x[low + WORD * i + B] and x[high + ...], 0 past the end: float32 (1, U, N)."""
    i = tl.arange(0, 16 // WORD)[None, None, :] * WORD + B
    x_low = tl.load(x + low + i, mask=low + i < n_cols, other=0.0)
    x_high = tl.load(x + high + i, mask=high + i < n_cols, other=0.0)
    return x_low, x_high


@triton.jit
def _add(
    total, x, low, high, n_cols, q_low, q_high, b_low, b_high, s_low, m_low, s_high, m_high,
    FORMAT: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """total (R, U, N) and the products of a tile with one token's x."""
    dot_low = tl.zeros_like(total)
    dot_high = tl.zeros_like(total)
    sum_low = tl.zeros((1, total.shape[1], total.shape[2]), tl.float32)
    sum_high = tl.zeros((1, total.shape[1], total.shape[2]), tl.float32)
    for b in tl.static_range(WORD):
        x_low, x_high = _activations(x, low, high, n_cols, b, WORD)
        u_low, u_high = blocks.plane(q_low, q_high, b_low, b_high, b, FORMAT)
        dot_low += u_low * x_low
        dot_high += u_high * x_high
        sum_low += x_low
        sum_high += x_high
    # The u are too high by ONE, which all have in common: taken off once for all planes.
    ONE: tl.constexpr = 0.0 if WORD == 1 and FORMAT != "MXFP4" else 1.0
    total += dot_low * s_low - (m_low + ONE * s_low) * sum_low
    return total + (dot_high * s_high - (m_high + ONE * s_high) * sum_high)


@triton.jit
def row_sums(
    w, row, first, last, stride, n_cols, scales, x, x_stride,
    FORMAT: tl.constexpr, WORD: tl.constexpr, T: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Eight float32 (R,): the products of rows with the tokens x + t * x_stride, over units first..last; zeros past T.

    row: int32 (R,), each within the matrix.
    """
    N: tl.constexpr = 16 // WORD
    # Names, not a list: Triton keeps what a loop carries in names.
    a0 = tl.zeros((R, U, N), tl.float32)
    a1 = tl.zeros((R, U, N), tl.float32)
    a2 = tl.zeros((R, U, N), tl.float32)
    a3 = tl.zeros((R, U, N), tl.float32)
    a4 = tl.zeros((R, U, N), tl.float32)
    a5 = tl.zeros((R, U, N), tl.float32)
    a6 = tl.zeros((R, U, N), tl.float32)
    a7 = tl.zeros((R, U, N), tl.float32)
    for start in range(first, last, U):
        unit = start + tl.arange(0, U)[None, :, None]
        low, high = blocks.columns(unit, FORMAT)
        # Past the end the last unit is read again, times zeros.
        low, high = tl.where(unit < last, low, n_cols), tl.where(unit < last, high, n_cols)
        unit = tl.minimum(unit, last - 1)
        ql, qh, bl, bh, sl, ml, sh, mh = blocks.unit(w, row[:, None, None], unit, stride, n_cols, scales, FORMAT)
        a0 = _add(a0, x, low, high, n_cols, ql, qh, bl, bh, sl, ml, sh, mh, FORMAT, WORD)
        if T > 1:
            a1 = _add(a1, x + x_stride, low, high, n_cols, ql, qh, bl, bh, sl, ml, sh, mh, FORMAT, WORD)
        if T > 2:
            a2 = _add(a2, x + 2 * x_stride, low, high, n_cols, ql, qh, bl, bh, sl, ml, sh, mh, FORMAT, WORD)
        if T > 3:
            a3 = _add(a3, x + 3 * x_stride, low, high, n_cols, ql, qh, bl, bh, sl, ml, sh, mh, FORMAT, WORD)
        if T > 4:
            a4 = _add(a4, x + 4 * x_stride, low, high, n_cols, ql, qh, bl, bh, sl, ml, sh, mh, FORMAT, WORD)
        if T > 5:
            a5 = _add(a5, x + 5 * x_stride, low, high, n_cols, ql, qh, bl, bh, sl, ml, sh, mh, FORMAT, WORD)
        if T > 6:
            a6 = _add(a6, x + 6 * x_stride, low, high, n_cols, ql, qh, bl, bh, sl, ml, sh, mh, FORMAT, WORD)
        if T > 7:
            a7 = _add(a7, x + 7 * x_stride, low, high, n_cols, ql, qh, bl, bh, sl, ml, sh, mh, FORMAT, WORD)
    return _sum(a0), _sum(a1), _sum(a2), _sum(a3), _sum(a4), _sum(a5), _sum(a6), _sum(a7)


@triton.jit
def _sum(total):
    return tl.sum(tl.sum(total, axis=2), axis=1)


@triton.jit
def _multiply(
    w, scales, x, out, n_rows, n_cols, n_units, stride, group_bytes, scale_stride,
    FORMAT: tl.constexpr, BYTES: tl.constexpr, WORD: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    U: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out[part, t, g, r] = W[g, r] . x[t, g] over a part of the columns. Grid: tiles of rows, parts, groups."""
    row0, part, group, n_groups = tl.program_id(0) * R, tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    n_here = tl.minimum(n_rows - row0, R)
    i = tl.arange(0, R)
    w += group.to(tl.int64) * group_bytes + row0.to(tl.int64) * stride * BYTES
    scales += row0 // 128 * scale_stride
    span = tl.cdiv(tl.cdiv(n_units, SPLIT), U) * U
    first = part * span
    last = tl.minimum(first + span, n_units)
    y0, y1, y2, y3, y4, y5, y6, y7 = row_sums(
        w, tl.minimum(i, n_here - 1), first, last, stride, n_cols, scales, x + group * n_cols, n_groups * n_cols,
        FORMAT, WORD, T, R, U,
    )  # fmt: skip
    per_token = n_groups * n_rows
    at = out + (part * T * n_groups + group) * n_rows + row0 + i
    here = i < n_here
    tl.store(at, y0, mask=here)
    if T > 1:
        tl.store(at + per_token, y1, mask=here)
    if T > 2:
        tl.store(at + 2 * per_token, y2, mask=here)
    if T > 3:
        tl.store(at + 3 * per_token, y3, mask=here)
    if T > 4:
        tl.store(at + 4 * per_token, y4, mask=here)
    if T > 5:
        tl.store(at + 5 * per_token, y5, mask=here)
    if T > 6:
        tl.store(at + 6 * per_token, y6, mask=here)
    if T > 7:
        tl.store(at + 7 * per_token, y7, mask=here)


@triton.jit
def _expand_rows(
    w, scales, rows, out, n_rows, n_cols, n_units, stride, group_bytes, scale_stride,
    FORMAT: tl.constexpr, BYTES: tl.constexpr, WORD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """out[i] = row rows[i] of all groups' rows in order. Grid: i, tiles of units."""
    i, unit0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * U
    row = tl.load(rows + i).to(tl.int64)
    group, row = row // n_rows, row % n_rows
    w += group * group_bytes + row * stride * BYTES
    scales += row // 128 * scale_stride
    unit = unit0 + tl.arange(0, U)[None, :, None]
    low, high = blocks.columns(unit, FORMAT)
    low, high = tl.where(unit < n_units, low, n_cols), tl.where(unit < n_units, high, n_cols)
    unit = tl.minimum(unit, n_units - 1)
    zero = tl.zeros((1, 1, 1), tl.int32)
    ql, qh, bl, bh, sl, ml, sh, mh = blocks.unit(w, zero, unit, stride, n_cols, scales, FORMAT)
    out += i * n_cols
    for b in tl.static_range(WORD):
        at = tl.arange(0, 16 // WORD)[None, None, :] * WORD + b
        w_low, w_high = blocks.weights(ql, qh, bl, bh, sl, ml, sh, mh, b, FORMAT)
        tl.store(out + low + at, w_low, mask=low + at < n_cols)
        tl.store(out + high + at, w_high, mask=high + at < n_cols)


@triton.jit
def _multiply_transposed(
    w, scales, x, out, n_rows, n_cols, n_units, stride, group_bytes,
    FORMAT: tl.constexpr, WORD: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """out[t, g] = W[g]^T x[t, g]. Grid: tokens, tiles of units, groups.

    Tokens come first, so that those that read the same weights run side by side and all but one find them in the cache.
    """
    t, unit0, group = tl.program_id(0), tl.program_id(1) * U, tl.program_id(2)
    n_groups = tl.num_programs(2)
    w += group.to(tl.int64) * group_bytes
    x += (t * n_groups + group) * n_rows
    out += (t * n_groups + group) * n_cols
    unit = unit0 + tl.arange(0, U)[None, :, None]
    low, high = blocks.columns(unit, FORMAT)
    low, high = tl.where(unit < n_units, low, n_cols), tl.where(unit < n_units, high, n_cols)
    unit = tl.minimum(unit, n_units - 1)
    for b in tl.static_range(WORD):
        sum_low = tl.zeros((R, U, 16 // WORD), tl.float32)
        sum_high = tl.zeros((R, U, 16 // WORD), tl.float32)
        for start in range(0, n_rows, R):
            row = start + tl.arange(0, R)[:, None, None]
            factor = tl.load(x + row, mask=row < n_rows, other=0.0)
            row = tl.minimum(row, n_rows - 1)
            ql, qh, bl, bh, sl, ml, sh, mh = blocks.unit(w, row, unit, stride, n_cols, scales, FORMAT)
            w_low, w_high = blocks.weights(ql, qh, bl, bh, sl, ml, sh, mh, b, FORMAT)
            sum_low += w_low * factor
            sum_high += w_high * factor
        at = tl.arange(0, 16 // WORD)[None, None, :] * WORD + b
        tl.store(out + low + at, tl.sum(sum_low, axis=0)[None, :, :], mask=low + at < n_cols)
        tl.store(out + high + at, tl.sum(sum_high, axis=0)[None, :, :], mask=high + at < n_cols)


def parts(matrix: Matrix, rows: int, units: int, device: torch.device) -> int:
    """Into how many parts to split the columns, so that few rows occupy the whole device."""
    programs = -(-matrix.n_rows // rows) * matrix.n_groups
    count = 1
    while count < 16 and programs * count < _PROGRAMS * n_processors(device) and 2 * count * units < matrix.n_units:
        count *= 2
    return count


def multiply(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """float32 (T, G, n_cols), T from 1 to MOST_TOKENS -> (T, G, n_rows)."""
    n_tokens, layout = x.shape[0], matrix.layout
    rows, units = TILES[layout.word]
    n_parts = parts(matrix, rows, units, x.device)
    out = torch.empty(n_parts, n_tokens, matrix.n_groups, matrix.n_rows, device=x.device)
    _multiply[-(-matrix.n_rows // rows), n_parts, matrix.n_groups](
        matrix.data, matrix.scale_pointer, x, out, matrix.n_rows, matrix.n_cols, matrix.n_units, matrix.stride,
        matrix.group_bytes, matrix.scale_stride, layout.name, layout.block_bytes, layout.word, n_tokens, rows, units,
        n_parts, num_warps=_WARPS,
    )  # fmt: skip
    return out[0] if n_parts == 1 else out.sum(0)


def expand_rows(matrix: Matrix, rows: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of all groups' in order, int64 (n,) on the device -> (n, n_cols)."""
    layout, units = matrix.layout, 32
    out = torch.empty(rows.shape[0], matrix.n_cols, dtype=dtype, device=rows.device)
    _expand_rows[rows.shape[0], -(-matrix.n_units // units)](
        matrix.data, matrix.scale_pointer, rows, out, matrix.n_rows, matrix.n_cols, matrix.n_units, matrix.stride,
        matrix.group_bytes, matrix.scale_stride, layout.name, layout.block_bytes, layout.word, units, num_warps=_WARPS,
    )  # fmt: skip
    return out


def multiply_transposed(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """float32 (T, G, n_rows) -> (T, G, n_cols), T of a few: W[g]^T x[t, g]."""
    n_tokens, layout = x.shape[0], matrix.layout
    rows, units = _TRANSPOSED_TILES[layout.word]
    out = torch.empty(n_tokens, matrix.n_groups, matrix.n_cols, device=x.device)
    _multiply_transposed[n_tokens, -(-matrix.n_units // units), matrix.n_groups](
        matrix.data, matrix.scale_pointer, x, out, matrix.n_rows, matrix.n_cols, matrix.n_units, matrix.stride,
        matrix.group_bytes, layout.name, layout.word, rows, units, num_warps=_WARPS,
    )  # fmt: skip
    return out
