"""y = W x for 1 to 8 tokens: every weight is read once for all. Sums in float32, in a fixed order.

Where columns are split among programs, the one that is done last sums what all have left, in the parts' order: a launch
less, and the same sums whoever it is.

Also what reads rows without multiplying (embedding, dense) and the product with a transposed matrix. One matrix, or one
a group (attention heads). Letters: T tokens, G groups, R rows and U units (formats/blocks.py) of a tile.
"""

import torch
import triton
import triton.language as tl

from localrun.gpu import tiles
from localrun.gpu.formats import blocks
from localrun.gpu.formats.layout import Layout
from localrun.gpu.matrices.matrix import Matrix, n_processors
from localrun.gpu.tiles import Few, Many

MOST_TOKENS = 8
_PART_ROWS = 16
_TRANSPOSED_TILES = {4: (32, 4), 2: (32, 4), 1: (16, 4)}
_WARPS = 4


def units_of(tile: Few | Many, layout: Layout) -> int:
    """Units of a tile of a format."""
    return tile.units * layout.word // 4


def tile_rows(tile: Few, n_tokens: int) -> int:
    """Rows of a tile: many share a load of activations."""
    return tile.rows if n_tokens <= 4 else min(16, tile.rows)


@triton.jit
def _activations(x, low, high, n_cols, B: tl.constexpr, WORD: tl.constexpr, CUT: tl.constexpr):
    """x[low + WORD * i + B] and x[high + ...], float32 (1, U, N); with CUT 0 past the row's end."""
    i = tl.arange(0, 16 // WORD)[None, None, :] * WORD + B
    if CUT:
        x_low = tl.load(x + low + i, mask=low + i < n_cols, other=0.0)
        x_high = tl.load(x + high + i, mask=high + i < n_cols, other=0.0)
        return x_low, x_high
    else:
        return tl.load(x + low + i), tl.load(x + high + i)


@triton.jit
def row_sums(
    w, row, first, last, stride, n_cols, scales, x, x_stride,
    FORMAT: tl.constexpr, WORD: tl.constexpr, T: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Eight float32 (R,): the products of rows with the tokens x + t * x_stride, over units first..last; zeros past T.

    row: int32 (R,), each within the matrix.
    """
    N: tl.constexpr = 16 // WORD
    CUT: tl.constexpr = (FORMAT == "F32" or FORMAT == "F16") or (FORMAT == "BF16" or FORMAT == "FP8_E4M3")
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
        # Past the end the last unit is read again, and is nothing: by its scales, or by activations that are 0.
        here = unit < last
        low, high = blocks.columns(tl.minimum(unit, last - 1), FORMAT)
        if CUT:
            low, high = tl.where(here, low, n_cols), tl.where(here, high, n_cols)
        unit = tl.minimum(unit, last - 1)
        ql, qh, bl, bh, sl, ml, sh, mh = blocks.unit(w, row[:, None, None], unit, stride, n_cols, scales, FORMAT)
        if not CUT:
            sl, ml = tl.where(here, sl, 0.0), tl.where(here, ml, 0.0)
            sh, mh = tl.where(here, sh, 0.0), tl.where(here, mh, 0.0)
        for b in tl.static_range(WORD):
            w_low, w_high = blocks.weights(ql, qh, bl, bh, sl, ml, sh, mh, b, FORMAT)
            x_low, x_high = _activations(x, low, high, n_cols, b, WORD, CUT)
            a0 += w_low * x_low
            a0 += w_high * x_high
            if T > 1:
                x_low, x_high = _activations(x + 1 * x_stride, low, high, n_cols, b, WORD, CUT)
                a1 += w_low * x_low
                a1 += w_high * x_high
            if T > 2:
                x_low, x_high = _activations(x + 2 * x_stride, low, high, n_cols, b, WORD, CUT)
                a2 += w_low * x_low
                a2 += w_high * x_high
            if T > 3:
                x_low, x_high = _activations(x + 3 * x_stride, low, high, n_cols, b, WORD, CUT)
                a3 += w_low * x_low
                a3 += w_high * x_high
            if T > 4:
                x_low, x_high = _activations(x + 4 * x_stride, low, high, n_cols, b, WORD, CUT)
                a4 += w_low * x_low
                a4 += w_high * x_high
            if T > 5:
                x_low, x_high = _activations(x + 5 * x_stride, low, high, n_cols, b, WORD, CUT)
                a5 += w_low * x_low
                a5 += w_high * x_high
            if T > 6:
                x_low, x_high = _activations(x + 6 * x_stride, low, high, n_cols, b, WORD, CUT)
                a6 += w_low * x_low
                a6 += w_high * x_high
            if T > 7:
                x_low, x_high = _activations(x + 7 * x_stride, low, high, n_cols, b, WORD, CUT)
                a7 += w_low * x_low
                a7 += w_high * x_high
    return _sum(a0), _sum(a1), _sum(a2), _sum(a3), _sum(a4), _sum(a5), _sum(a6), _sum(a7)


@triton.jit
def _sum(total):
    return tl.sum(tl.sum(total, axis=2), axis=1)


@triton.jit
def _multiply(
    w, scales, x, out, partial, done, n_rows, n_cols, n_units, stride, group_bytes, scale_stride,
    FORMAT: tl.constexpr, BYTES: tl.constexpr, WORD: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    U: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out[t, g, r] = W[g, r] . x[t, g]. Grid: tiles of rows, parts of the columns, groups.

    partial: float32 (SPLIT, T, G, rows) for parts' sums, done: int32 (G, tiles), zeros before and after; neither is
    used where SPLIT is 1.
    """
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
    per_token, at, here = n_groups * n_rows, group * n_rows + row0 + i, i < n_here
    if SPLIT == 1:
        _store(out + at, per_token, here, y0, y1, y2, y3, y4, y5, y6, y7, T)
    else:
        _store(partial + part * T * per_token + at, per_token, here, y0, y1, y2, y3, y4, y5, y6, y7, T)
        tl.debug_barrier()  # all of the program's threads have stored before it counts itself
        done += group * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(done, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            tl.store(done, 0)
            for t in tl.static_range(T):
                total = tl.zeros((R,), tl.float32)
                for other in tl.static_range(SPLIT):  # past the L1 cache, which others' stores do not reach
                    total += tl.load(partial + (other * T + t) * per_token + at, mask=here, cache_modifier=".cg")
                tl.store(out + t * per_token + at, total, mask=here)


@triton.jit
def _store(at, per_token, here, y0, y1, y2, y3, y4, y5, y6, y7, T: tl.constexpr):
    """Of T tokens."""
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


def parts(matrix: Matrix, device: torch.device) -> int:
    """Into how many parts to split the columns, so that few rows occupy the whole device."""
    tile = tiles.of(device).few
    programs, units = -(-matrix.n_rows // _PART_ROWS) * matrix.n_groups, units_of(tile, matrix.layout)
    count = 1
    while count < 16 and programs * count < tile.programs * n_processors(device) and 2 * count * units < matrix.n_units:
        count *= 2
    return count


def multiply(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """float32 (T, G, n_cols), T from 1 to MOST_TOKENS -> (T, G, n_rows)."""
    n_tokens, layout = x.shape[0], matrix.layout
    tile = tiles.of(x.device).few
    rows, units = tile_rows(tile, n_tokens), units_of(tile, layout)
    n_parts = parts(matrix, x.device)
    out = torch.empty(n_tokens, matrix.n_groups, matrix.n_rows, device=x.device)
    partial, done = out, matrix.data
    if n_parts > 1:
        partial, done = torch.empty(n_parts, *out.shape, device=x.device), matrix.done
    _multiply[-(-matrix.n_rows // rows), n_parts, matrix.n_groups](
        matrix.data, matrix.scale_pointer, x, out, partial, done, matrix.n_rows, matrix.n_cols, matrix.n_units,
        matrix.stride, matrix.group_bytes, matrix.scale_stride, layout.name, layout.block_bytes, layout.word, n_tokens,
        rows, units, n_parts, num_warps=tile.warps,
    )  # fmt: skip
    return out


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
