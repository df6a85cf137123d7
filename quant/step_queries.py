"""Phases between a token's projections and its attention: queries turned by position, and the new cache row.

MLA moves queries into latent space with k_b, so that they meet cached latents directly (absorbed attention,
DeepSeek-V2, arXiv 2405.04434, section 2.1.2); GQA only turns queries and keys.
"""

import numpy as np

from quant.activations import record_bytes, write_record
from quant.atomics import call_3
from quant.jit import inline, kernel
from quant.linear import Weight
from quant.rows import ADDRESS, BLOCK, EXPAND, GROUP_BYTES, ROW_BYTES
from quant.simd import bits_to_f32, load_f32, load_i64, store_f32
from quant.simd_pack import store_f16
from quant.step import ARGUMENTS, CACHE, NOTHING, POSITION, STATE, TURNS, Phase, float_bits, padded
from quant.step_rows import gemv
from quant.vectors import rms_norm, scale, scale_add

# Arguments of both kinds, then those of MLA, or of GQA. Widths in values; PROJECTED_WIDTH is one head's.
(
    PROJECTED, PROJECTED_WIDTH, N_HEADS, QUERIES, QUERY_WIDTH, SCALE, N_ROPE, SLOT, ROW_WIDTH,
) = range(ARGUMENTS, ARGUMENTS + 9 * 8, 8)  # fmt: skip
_OWN = ARGUMENTS + 9 * 8
NOPE, LATENT, KV, KV_NORM, EPSILON, K_B_INTEGER, K_B_TRANSPOSED = range(_OWN, _OWN + 7 * 8, 8)
K_B = _OWN + 7 * 8
N_KEY_HEADS, KEYS, VALUES, VALUE_WIDTH = range(_OWN, _OWN + 4 * 8, 8)


@inline
def _rotate(x, phase, out):
    """The first N_ROPE floats of x, each pair turned by the step's position; out may be x."""
    turns = load_i64(load_i64(phase + STATE) + TURNS)
    for i in range(0, load_i64(phase + N_ROPE), 2):
        a, b = load_f32(x + 4 * i), load_f32(x + 4 * i + 4)
        cos, sin = load_f32(turns + 4 * i), load_f32(turns + 4 * i + 4)
        store_f32(out + 4 * i, a * cos - b * sin)
        store_f32(out + 4 * i + 4, a * sin + b * cos)


@inline
def _cache_row(phase, slot):
    """Address of this step's row of f16 in a block of cache rows."""
    state = load_i64(phase + STATE)
    rows = load_i64(load_i64(state + CACHE) + 8 * slot)
    return rows + 2 * load_i64(phase + ROW_WIDTH) * load_i64(state + POSITION)


@inline
def _store_f16(x, n, row):
    """float32 (n,) as f16."""
    for i in range(n):
        store_f16(row + 2 * i, load_f32(x + 4 * i))


@inline
def _into_latent(phase, head, x, work, out):
    """out = k_b[head] x, or k_b[head]^T x where the file keeps it joined with v_b: float32 (LATENT,)."""
    nope, latent = load_i64(phase + NOPE), load_i64(phase + LATENT)
    if load_i64(phase + K_B_TRANSPOSED) == 0:
        write_record(x, 0, nope, nope, load_i64(phase + K_B_INTEGER) != 0, work)
        gemv(phase + K_B, head, 0, latent, nope, work, out)
        return
    matrix = phase + K_B
    for i in range(latent):
        store_f32(out + 4 * i, np.float32(0.0))
    for p in range(nope):
        row = load_i64(matrix + ADDRESS) + load_i64(matrix + GROUP_BYTES) * head + load_i64(matrix + ROW_BYTES) * p
        call_3(load_i64(matrix + EXPAND), row, latent // load_i64(matrix + BLOCK), work)
        scale_add(load_f32(x + 4 * p), work, latent, out)


@kernel("void(int64, int64, int64)")
def _run_latent(phase, unit, work):
    """MLA. Unit h: head h's query in latent space, its rotated part behind. The last unit: the token's cache row."""
    nope, latent, n_rope = load_i64(phase + NOPE), load_i64(phase + LATENT), load_i64(phase + N_ROPE)
    if unit < load_i64(phase + N_HEADS):
        q = load_i64(phase + PROJECTED) + 4 * load_i64(phase + PROJECTED_WIDTH) * unit
        query = load_i64(phase + QUERIES) + 4 * load_i64(phase + QUERY_WIDTH) * unit
        _into_latent(phase, unit, q, work, query)
        _rotate(q + 4 * nope, phase, query + 4 * latent)
        scale(bits_to_f32(load_i64(phase + SCALE)), latent + n_rope, query)
        return
    kv, row = load_i64(phase + KV), _cache_row(phase, load_i64(phase + SLOT))
    rms_norm(kv, load_i64(phase + KV_NORM), bits_to_f32(load_i64(phase + EPSILON)), latent, work)
    _store_f16(work, latent, row)
    _rotate(kv + 4 * latent, phase, work)
    _store_f16(work, n_rope, row + 2 * latent)


@kernel("void(int64, int64, int64)")
def _run_grouped(phase, unit, work):
    """GQA. Unit h: head h's query, rotated. The last unit: the token's keys, rotated, and values, into the cache."""
    width, n_rope = load_i64(phase + PROJECTED_WIDTH), load_i64(phase + N_ROPE)
    if unit < load_i64(phase + N_HEADS):
        q = load_i64(phase + PROJECTED) + 4 * width * unit
        query = load_i64(phase + QUERIES) + 4 * load_i64(phase + QUERY_WIDTH) * unit
        _rotate(q, phase, query)
        for i in range(n_rope, width):
            store_f32(query + 4 * i, load_f32(q + 4 * i))
        scale(bits_to_f32(load_i64(phase + SCALE)), width, query)
        return
    keys, row = load_i64(phase + KEYS), _cache_row(phase, load_i64(phase + SLOT))
    for g in range(load_i64(phase + N_KEY_HEADS)):
        _rotate(keys + 4 * width * g, phase, work)
        _store_f16(work, n_rope, row + 2 * width * g)
        _store_f16(keys + 4 * (width * g + n_rope), width - n_rope, row + 2 * (width * g + n_rope))
    state, n_values = load_i64(phase + STATE), load_i64(phase + VALUE_WIDTH)
    values = load_i64(load_i64(state + CACHE) + 8 * load_i64(phase + SLOT) + 8)
    _store_f16(load_i64(phase + VALUES), n_values, values + 2 * n_values * load_i64(state + POSITION))


def latent_queries_phase(
    projected: int,
    queries: int,
    kv: int,
    kv_norm: int,
    k_b: Weight,
    *,
    transposed: bool,
    n_rope: int,
    query_width: int,
    scale: float,
    epsilon: float,
    slot: int,
) -> Phase:
    """MLA's queries and cache row.

    Args:
        projected: address of float32 (H, P + R), the projected queries.
        queries: address of float32 (H, query_width), where queries in latent space go, times `scale`.
        kv: address of float32 (C + R), the projected latent and rotated key; kv_norm: of the norm's weight (C,).
        k_b: (H, C, P), or with `transposed` (H, P, C).
        slot: which block of cache rows is the layer's.
    """
    nope, latent = (k_b.n_rows, k_b.n_cols) if transposed else (k_b.n_cols, k_b.n_rows)
    words = [
        projected, nope + n_rope, k_b.n_groups, queries, query_width, float_bits(scale), n_rope, slot, latent + n_rope,
        nope, latent, kv, kv_norm, float_bits(epsilon), k_b.format.integer, transposed, *k_b.fields,
    ]  # fmt: skip
    work_bytes = max(record_bytes(nope), padded(4 * max(latent, n_rope)))
    return Phase(NOTHING, _run_latent.address, k_b.n_groups + 1, words, work_bytes)


def grouped_queries_phase(
    projected: int,
    queries: int,
    keys: int,
    values: int,
    *,
    n_heads: int,
    n_key_heads: int,
    head_dim: int,
    value_width: int,
    n_rope: int,
    query_width: int,
    scale: float,
    slot: int,
) -> Phase:
    """GQA's queries and cache rows: keys in block `slot`, values in the next.

    Args:
        projected, keys: addresses of float32 (H, head_dim) and (G, head_dim).
        values: address of float32 (value_width,), all key heads' together.
        queries: address of float32 (H, query_width), where turned queries go, times `scale`.
    """
    words = [
        projected, head_dim, n_heads, queries, query_width, float_bits(scale), n_rope, slot, n_key_heads * head_dim,
        n_key_heads, keys, values, value_width,
    ]  # fmt: skip
    return Phase(NOTHING, _run_grouped.address, n_heads + 1, words, padded(4 * n_rope))
