"""y = W x for many tokens on tensor cores: float16 operands, float32 sums.

Weights are expanded tile by tile in registers. Activations are brought into the order in which planes of
formats/blocks.py come, so that a plane's are consecutive, and divided by a scale a token: float16 would otherwise
overflow at 65504, which activations of large models reach. Its rounding, 2^-11 of a value, is less than that of any
8-bit activation. Letters: T tokens (of a tile: BT), G groups, R rows and U units of a tile, N words a half.
"""

import torch
import triton
import triton.language as tl

from localrun.gpu import tiles
from localrun.gpu.formats import blocks
from localrun.gpu.formats.layout import Layout
from localrun.gpu.matrices.gemv import units_of
from localrun.gpu.matrices.matrix import Matrix
from localrun.gpu.tiles import Many

_WARPS = 4  # of what only moves activations
_LARGEST = 1024.0  # what a token's largest activation becomes: far from float16's limit, with room below


@triton.jit
def _arrange(
    x, out, scale, n_cols, n_padded,
    FORMAT: tl.constexpr, WORD: tl.constexpr, U: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """A row of x as float16 in the order of planes (tile, byte, half, unit, word), zeros past its end. Grid: rows."""
    t = tl.program_id(0).to(tl.int64)
    x += t * n_cols
    out += t * n_padded
    i = tl.arange(0, 1024)
    size = tl.zeros((1024,), tl.float32)
    for first in range(0, n_cols, 1024):
        size = tl.maximum(size, tl.abs(tl.load(x + first + i, mask=first + i < n_cols, other=0.0)))
    largest = tl.max(size, axis=0)
    largest = tl.where(largest > 0.0, largest, 1.0)
    tl.store(scale + t, largest / LARGEST)
    N: tl.constexpr = 16 // WORD
    for first in range(0, n_padded, 1024):
        at = first + i
        place = at % (32 * U)
        low, high = blocks.columns(at // (32 * U) * U + place // N % U, FORMAT)
        column = tl.where(place // (U * N) % 2 == 0, low, high) + place % N * WORD + place // (2 * U * N)
        value = tl.load(x + column, mask=(at < n_padded) & (column < n_cols), other=0.0)
        tl.store(out + at, (value * (LARGEST / largest)).to(tl.float16), mask=at < n_padded)


@triton.jit
def tile_products(
    w, row, stride, n_cols, n_units, scales, a, a_row,
    FORMAT: tl.constexpr, WORD: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Float32 (R, BT): rows of a matrix times arranged activations.

    row: int32 (R,). a_row: int64 (BT,), where in `a` each token's activations start.
    """
    HALF: tl.constexpr = U * (16 // WORD)
    total = tl.zeros((R, BT), tl.float32)
    at = a + a_row[None, :] + tl.arange(0, HALF)[:, None]
    for start in range(0, n_units, U):
        unit = tl.minimum(start + tl.arange(0, U)[None, :, None], n_units - 1)
        ql, qh, bl, bh, sl, ml, sh, mh = blocks.unit(w, row[:, None, None], unit, stride, n_cols, scales, FORMAT)
        for b in tl.static_range(WORD):
            w_low, w_high = blocks.weights(ql, qh, bl, bh, sl, ml, sh, mh, b, FORMAT)
            w_low, w_high = w_low.to(tl.float16).reshape(R, HALF), w_high.to(tl.float16).reshape(R, HALF)
            total = tl.dot(w_low, tl.load(at + 32 * start + 2 * b * HALF), total)
            total = tl.dot(w_high, tl.load(at + 32 * start + (2 * b + 1) * HALF), total)
    return total


@triton.jit
def _multiply(
    w, scales, a, a_scale, out, n_tokens, n_rows, n_cols, n_units, n_padded, stride, group_bytes, scale_stride,
    FORMAT: tl.constexpr, BYTES: tl.constexpr, WORD: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """out[t, g, r] = W[g, r] . x[t, g]. Grid: tiles of tokens, tiles of rows, groups."""
    t0, row0, group = tl.program_id(0) * BT, tl.program_id(1) * R, tl.program_id(2)
    n_groups = tl.num_programs(2)
    w += group.to(tl.int64) * group_bytes + row0.to(tl.int64) * stride * BYTES
    scales += row0 // 128 * scale_stride
    i, t = tl.arange(0, R), t0 + tl.arange(0, BT)
    row = tl.minimum(i, n_rows - row0 - 1)
    record = tl.minimum(t, n_tokens - 1).to(tl.int64) * n_groups + group
    total = tile_products(w, row, stride, n_cols, n_units, scales, a, record * n_padded, FORMAT, WORD, BT, R, U)
    total *= tl.load(a_scale + record)[None, :]
    here = (row0 + i < n_rows)[:, None] & (t < n_tokens)[None, :]
    tl.store(out + (record * n_rows)[None, :] + (row0 + i)[:, None], total, mask=here)


def tile_tokens(tile: Many, n_tokens: int) -> int:
    """Tokens of a tile: tl.dot takes 16 at least."""
    return max(16, min(tile.tokens, triton.next_power_of_2(n_tokens)))


def arrange(x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (n, n_cols) as the kernels of a format read it: float16 (n, padded), and a float32 scale a row."""
    n, n_cols = x.shape
    units = units_of(tiles.of(x.device).many, layout)
    n_padded = -(-n_cols // (32 * units)) * 32 * units
    out = torch.empty(n, n_padded, dtype=torch.float16, device=x.device)
    scale = torch.empty(n, device=x.device)
    _arrange[n,](x, out, scale, n_cols, n_padded, layout.name, layout.word, units, _LARGEST, num_warps=_WARPS)
    return out, scale


def multiply(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """float32 (T, G, n_cols) -> (T, G, n_rows)."""
    n_tokens, layout = x.shape[0], matrix.layout
    a, scale = arrange(x.reshape(-1, matrix.n_cols), layout)
    out = torch.empty(n_tokens, matrix.n_groups, matrix.n_rows, device=x.device)
    tile = tiles.of(x.device).many
    tokens = tile_tokens(tile, n_tokens)
    _multiply[-(-n_tokens // tokens), -(-matrix.n_rows // tile.rows), matrix.n_groups](
        matrix.data, matrix.scale_pointer, a, scale, out, n_tokens, matrix.n_rows, matrix.n_cols, matrix.n_units,
        a.shape[1], matrix.stride, matrix.group_bytes, matrix.scale_stride, layout.name, layout.block_bytes,
        layout.word, tokens, tile.rows, units_of(tile, layout), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
