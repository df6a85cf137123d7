"""Keys and values of latent attention, rebuilt from the cache for all its tokens and rounded to 16-bit integers.

Of each head k_b latent, then the rotated part that all heads share, and v_b latent: products of 16-bit integers, too
(gemm/lanes_i16.py). Latents and the columns of both matrices have a scale each. What attends to them:
ops/attention_i16.py.
"""

from dataclasses import dataclass

import numpy as np

from quant.gemm.lanes import ADDRESSES, LANES, ROW, clear, pack_lanes
from quant.gemm.lanes_i16 import ROWS as TILE_ROWS
from quant.gemm.lanes_i16 import multiply, pad16
from quant.gemm.rounding_i16 import round_lanes, round_row
from quant.ops.attention import CHUNK
from quant.ops.attention_i16 import LEVEL, ROUNDED, Rounded, keep_rows
from quant.simd.memory import load_f32, load_f32x16, prefetch, store_f32, store_f32x16
from quant.simd.struct import address, array, atomic, boolean, i64, struct
from quant.simd.vectors import expand_f16
from quant.target.jit import inline, kernel
from quant.threads.pool import Pool, worker_bytes
from quant.threads.work_items import work_items

PROJECTION = struct("Projection", weights=address, n_columns=i64, transposed=boolean)
REBUILD = struct(
    "RebuildKeys",
    counter=atomic,
    n_heads=i64,
    n_rows=i64,
    latents=address,  # float16 rows: a latent, then the rotated part of keys
    latent_row=i64,  # bytes
    n_latent=i64,
    n_rope=i64,
    n_nope=i64,  # columns of a head's keys without rotation
    width=i64,
    projections=array(PROJECTION, 2),  # to values, to keys: float32 (n_heads, columns, n_latent), or transposed
    panels=address,  # of 32 columns: pairs, then scales
    panel_bytes=i64,
    rounded=ROUNDED,
    scratch=address,
    scratch_bytes=i64,
)


@inline
def _panels(n_columns):
    return (n_columns + LANES - 1) // LANES


@inline
def _pack_panel(a, projection, head, first, scratch, out):
    """32 columns of a head's projection, `first` and those behind: float32 rows of scratch, then pairs."""
    n_latent, n_columns = a.n_latent, projection.n_columns
    weights = projection.weights + 4 * n_latent * n_columns * head
    rows = scratch + ADDRESSES
    if not projection.transposed:
        pack_lanes(weights, 4 * n_latent, first, n_columns, n_latent, np.float32(1.0), scratch, rows)
    else:
        n = min(LANES, n_columns - first)
        clear(rows, n_latent)
        for c in range(n_latent):
            row = weights + 4 * (n_columns * c + first)
            for i in range(n):
                store_f32(rows + ROW * c + 4 * i, load_f32(row + 4 * i))
    round_lanes(rows, n_latent, out, out + ROW * ((n_latent + 1) // 2))


@kernel("void(int64, int64)", LEVEL)
def _pack_projections(arguments, worker):
    """The first job of rebuild(): a work item is a panel."""
    a = REBUILD(arguments)
    of_values, of_keys = _panels(a.width), _panels(a.n_nope)
    both = of_values + of_keys
    scratch = a.scratch + a.scratch_bytes * worker
    for item in work_items(a.counter, a.n_heads * both):
        head, panel, out = item // both, item % both, a.panels + a.panel_bytes * item
        if panel < of_values:
            _pack_panel(a, a.projections[0], head, LANES * panel, scratch, out)
        else:
            _pack_panel(a, a.projections[1], head, LANES * (panel - of_values), scratch, out)


@inline
def _rebuild_rows(a, head, first, n, scratch):
    """n rows of a head's keys and values, at most TILE_ROWS."""
    n_latent, n_rope, n_nope = a.n_latent, a.n_rope, a.n_nope
    padded, n_pairs, of_values = (n_latent + 15) // 16 * 16, (n_latent + 1) // 2, _panels(a.width)
    both = of_values + _panels(n_nope)
    depth = (n_nope + n_rope + 15) // 16 * 16
    stride = 4 * (LANES * of_values + max(LANES * _panels(n_nope), depth))
    scales, row = scratch, scratch + 4 * 16
    latents, floats = row + 4 * padded, row + 4 * padded + 2 * padded * TILE_ROWS
    for r in range(n):
        ahead = a.latents + a.latent_row * (first + TILE_ROWS + r)
        for at in range(ahead, ahead + 2 * n_latent, 64):
            prefetch(at)
        expand_f16(a.latents + a.latent_row * (first + r), n_latent, padded, row)
        round_row(row, padded, latents + 2 * padded * r, scales + 4 * r)
    for i in range(both):
        panel = a.panels + a.panel_bytes * (both * head + i)
        multiply(n, latents, 2 * padded, scales, panel, n_pairs, floats + ROW * i, stride)
        for half in range(2):
            scale = load_f32x16(panel + ROW * n_pairs + 64 * half)
            for at in range(floats + ROW * i + 64 * half, floats + ROW * i + stride * n, stride):
                store_f32x16(at, load_f32x16(at) * scale)
    keys = floats + ROW * of_values
    for r in range(n):
        rope = keys + stride * r + 4 * n_nope
        expand_f16(a.latents + a.latent_row * (first + r) + 2 * n_latent, n_rope, depth - n_nope, rope)
    if n % 2:  # two rows of values lie together
        clear(floats + stride * n, of_values)
    keep_rows(a.rounded, head, first, n, keys, depth, floats, (a.width + 15) // 16 * 16, stride)


@kernel("void(int64, int64)", LEVEL)
def _rebuild(arguments, worker):
    """The second job of rebuild(): a work item is a chunk of a head's rows."""
    a = REBUILD(arguments)
    chunks = (a.n_rows + CHUNK - 1) // CHUNK
    for item in work_items(a.counter, a.n_heads * chunks):
        head, begin = item // chunks, CHUNK * (item % chunks)
        end = min(begin + CHUNK, a.n_rows)
        for first in range(begin, end, TILE_ROWS):
            _rebuild_rows(a, head, first, min(TILE_ROWS, end - first), a.scratch + a.scratch_bytes * worker)


@dataclass(frozen=True)
class Projection:
    """Float32 weights of some heads at an address, (heads, n_columns, n_latent), or each head's matrix transposed."""

    address: int
    n_columns: int
    transposed: bool = False

    @property
    def struct(self) -> np.ndarray:
        """As jobs see it."""
        return PROJECTION.pack(weights=self.address, n_columns=self.n_columns, transposed=self.transposed)


def rebuild(
    pool: Pool,
    latents: int,
    latent_row: int,
    n_latent: int,
    keys: Projection,
    values: Projection,
    n_heads: int,
    out: Rounded,
) -> None:
    """Round keys and values of latent attention: of each head k_b latent, then what all heads share, and v_b latent.

    Args:
        latents: address of float16 rows, latent_row bytes apart: n_latent values, then those that heads share.
        keys, values: k_b and v_b.
    """
    n_rope = out.depth - keys.n_columns
    of_values, of_keys = (-(-p.n_columns // LANES) for p in (values, keys))
    panel_bytes, n_panels = ROW * (-(-n_latent // 2) + 1), of_values + of_keys
    row_bytes = 4 * (LANES * of_values + max(LANES * of_keys, pad16(out.depth)))
    rows_bytes = 4 * 16 + pad16(n_latent) * (4 + 2 * TILE_ROWS) + TILE_ROWS * row_bytes
    scratch_bytes = worker_bytes(max(rows_bytes, ADDRESSES + ROW * n_latent))
    arguments = REBUILD.pack(
        counter=0, n_heads=n_heads, n_rows=out.n_rows, latents=latents, latent_row=latent_row, n_latent=n_latent,
        n_rope=n_rope, n_nope=keys.n_columns, width=out.width, projections=[values.struct, keys.struct],
        panels=pool.buffer("panels of keys", panel_bytes * n_panels * n_heads), panel_bytes=panel_bytes,
        rounded=out.struct,
        scratch=pool.buffer("attention", scratch_bytes * pool.n_workers), scratch_bytes=scratch_bytes,
    )  # fmt: skip
    pool.run(_pack_projections.address, arguments)
    REBUILD.write(arguments, counter=0)
    pool.run(_rebuild.address, arguments)
