"""Phases between tokens' projections and their attention: queries turned by position, and the new cache rows.

MLA moves queries into latent space with k_b, so that they meet cached latents directly (absorbed attention,
DeepSeek-V2, arXiv 2405.04434, section 2.1.2); GQA only norms (Qwen3) and turns queries and keys.
"""

import numpy as np

from quant.decode.linear import multiply, set_token, token_tables
from quant.decode.program import (
    ARGUMENTS,
    CACHE,
    MOST_TOKENS,
    N_FREQUENCIES,
    NOTHING,
    POSITION,
    STATE,
    TURNS,
    Phase,
    float_bits,
    padded,
    tokens_of,
)
from quant.gemv.activations import q8_bytes, write_q8
from quant.matrix import ADDRESS, BLOCK, EXPAND, GROUP_BYTES, ROW_BYTES, QuantMatrix, check_single_rows
from quant.simd.memory import bits_to_f32, load_f32, load_i64, store_f16, store_f32
from quant.simd.vectors import rms_norm, scale, scale_add
from quant.target.jit import inline, kernel
from quant.threads.atomics import call_3

# Arguments of both kinds, then those of MLA, or of GQA. Widths in values; PROJECTED_WIDTH is one head's.
(
    PROJECTED, PROJECTED_WIDTH, N_HEADS, QUERIES, QUERY_WIDTH, SCALE, N_ROPE, SLOT, ROW_WIDTH,
) = range(ARGUMENTS, ARGUMENTS + 9 * 8, 8)  # fmt: skip
_OWN = ARGUMENTS + 9 * 8
NOPE, LATENT, KV, KV_NORM, EPSILON, RECORD_BYTES, K_B_INTEGER, K_B_TRANSPOSED = range(_OWN, _OWN + 8 * 8, 8)
K_B = _OWN + 8 * 8
# Addresses of the norms' weights are 0 if there are none. Pair i is turned: STRIDE * i and GAP behind it.
(
    N_KEY_HEADS, KEYS, VALUES, VALUE_WIDTH, Q_NORM, K_NORM, HEAD_EPSILON, STRIDE, GAP,
) = range(_OWN, _OWN + 9 * 8, 8)  # fmt: skip


@inline
def _projected(phase, head, t):
    """Address of a head's projected query, of token t."""
    return load_i64(phase + PROJECTED) + 4 * load_i64(phase + PROJECTED_WIDTH) * (load_i64(phase + N_HEADS) * t + head)


@inline
def _query(phase, head, t):
    """Address of the query that goes to attention."""
    return load_i64(phase + QUERIES) + 4 * load_i64(phase + QUERY_WIDTH) * (load_i64(phase + N_HEADS) * t + head)


@inline
def _rotate(x, phase, t, out, stride, gap):
    """The first N_ROPE floats of x, each pair (stride * i, stride * i + gap) turned by the position of token t.

    Neighbours are stride 2, gap 1; two halves stride 1, gap N_ROPE / 2. out may be x.
    """
    state = load_i64(phase + STATE)
    turns = load_i64(state + TURNS) + 8 * load_i64(state + N_FREQUENCIES) * t
    for i in range(load_i64(phase + N_ROPE) // 2):
        first, second = 4 * stride * i, 4 * (stride * i + gap)
        a, b = load_f32(x + first), load_f32(x + second)
        cos, sin = load_f32(turns + 8 * i), load_f32(turns + 8 * i + 4)
        store_f32(out + first, a * cos - b * sin)
        store_f32(out + second, a * sin + b * cos)


@inline
def _cache_row(phase, slot, width, t):
    """Address of token t's row of f16 in a block of cache rows of this width."""
    state = load_i64(phase + STATE)
    return load_i64(load_i64(state + CACHE) + 8 * slot) + 2 * width * (load_i64(state + POSITION) + t)


@inline
def _store_f16(x, n, row):
    """float32 (n,) as f16."""
    for i in range(n):
        store_f16(row + 2 * i, load_f32(x + 4 * i))


@inline
def _into_latent(phase, head, work):
    """Each token's query = k_b[head] times its projected one, float32 (LATENT,)."""
    nope, n_tokens, tables = load_i64(phase + NOPE), tokens_of(phase), token_tables()
    for t in range(n_tokens):
        record = work + load_i64(phase + RECORD_BYTES) * t
        write_q8(_projected(phase, head, t), 0, nope, nope, load_i64(phase + K_B_INTEGER) != 0, record)
        set_token(tables, t, record, _query(phase, head, t))
    multiply(phase + K_B, head, 0, load_i64(phase + LATENT), nope, tables, n_tokens)


@inline
def _into_latent_transposed(phase, head, work):
    """The same with k_b[head]^T, where the file keeps it joined with v_b."""
    matrix, latent = phase + K_B, load_i64(phase + LATENT)
    for t in range(tokens_of(phase)):
        for i in range(latent):
            store_f32(_query(phase, head, t) + 4 * i, np.float32(0.0))
    for p in range(load_i64(phase + NOPE)):
        row = load_i64(matrix + ADDRESS) + load_i64(matrix + GROUP_BYTES) * head + load_i64(matrix + ROW_BYTES) * p
        call_3(load_i64(matrix + EXPAND), row, latent // load_i64(matrix + BLOCK), work)
        for t in range(tokens_of(phase)):
            scale_add(load_f32(_projected(phase, head, t) + 4 * p), work, latent, _query(phase, head, t))


@inline
def _store_latent(phase, t, work):
    """Token t's cache row: the normed latent, the rotated key behind it."""
    latent, n_rope, width = load_i64(phase + LATENT), load_i64(phase + N_ROPE), load_i64(phase + ROW_WIDTH)
    kv, row = load_i64(phase + KV) + 4 * width * t, _cache_row(phase, load_i64(phase + SLOT), width, t)
    rms_norm(kv, load_i64(phase + KV_NORM), bits_to_f32(load_i64(phase + EPSILON)), latent, work)
    _store_f16(work, latent, row)
    _rotate(kv + 4 * latent, phase, t, work, 2, 1)
    _store_f16(work, n_rope, row + 2 * latent)


@kernel("void(int64, int64, int64)")
def _run_latent(phase, unit, work):
    """MLA. Unit h: head h's queries in latent space, their rotated parts behind. The last unit: the cache rows."""
    nope, latent, n_rope = load_i64(phase + NOPE), load_i64(phase + LATENT), load_i64(phase + N_ROPE)
    if unit == load_i64(phase + N_HEADS):
        for t in range(tokens_of(phase)):
            _store_latent(phase, t, work)
        return
    if load_i64(phase + K_B_TRANSPOSED) != 0:
        _into_latent_transposed(phase, unit, work)
    else:
        _into_latent(phase, unit, work)
    for t in range(tokens_of(phase)):
        query = _query(phase, unit, t)
        _rotate(_projected(phase, unit, t) + 4 * nope, phase, t, query + 4 * latent, 2, 1)
        scale(bits_to_f32(load_i64(phase + SCALE)), latent + n_rope, query)


@inline
def _norm_and_rotate(head, norm, phase, t, out):
    """A head's query or key, normed in place if there is a norm; its first N_ROPE values, rotated, to out."""
    if norm != 0:
        rms_norm(head, norm, bits_to_f32(load_i64(phase + HEAD_EPSILON)), load_i64(phase + PROJECTED_WIDTH), head)
    _rotate(head, phase, t, out, load_i64(phase + STRIDE), load_i64(phase + GAP))


@inline
def _store_keys_and_values(phase, t, work):
    """Token t's cache rows: keys, normed and rotated, and values."""
    slot, row_width, n_values = load_i64(phase + SLOT), load_i64(phase + ROW_WIDTH), load_i64(phase + VALUE_WIDTH)
    width, n_rope = load_i64(phase + PROJECTED_WIDTH), load_i64(phase + N_ROPE)
    keys, row = load_i64(phase + KEYS) + 4 * row_width * t, _cache_row(phase, slot, row_width, t)
    for g in range(load_i64(phase + N_KEY_HEADS)):
        _norm_and_rotate(keys + 4 * width * g, load_i64(phase + K_NORM), phase, t, work)
        _store_f16(work, n_rope, row + 2 * width * g)
        _store_f16(keys + 4 * (width * g + n_rope), width - n_rope, row + 2 * (width * g + n_rope))
    _store_f16(load_i64(phase + VALUES) + 4 * n_values * t, n_values, _cache_row(phase, slot + 1, n_values, t))


@kernel("void(int64, int64, int64)")
def _run_grouped(phase, unit, work):
    """GQA. Unit h: head h's queries, normed and rotated. The last unit: the cache rows."""
    width, n_rope = load_i64(phase + PROJECTED_WIDTH), load_i64(phase + N_ROPE)
    for t in range(tokens_of(phase)):
        if unit == load_i64(phase + N_HEADS):
            _store_keys_and_values(phase, t, work)
        else:
            q, query = _projected(phase, unit, t), _query(phase, unit, t)
            _norm_and_rotate(q, load_i64(phase + Q_NORM), phase, t, query)
            for i in range(n_rope, width):
                store_f32(query + 4 * i, load_f32(q + 4 * i))
            scale(bits_to_f32(load_i64(phase + SCALE)), width, query)


def latent_queries_phase(
    projected: int,
    queries: int,
    kv: int,
    kv_norm: int,
    k_b: QuantMatrix,
    *,
    transposed: bool,
    n_rope: int,
    query_width: int,
    scale: float,
    epsilon: float,
    slot: int,
) -> Phase:
    """MLA's queries and cache rows. T: MOST_TOKENS.

    Args:
        projected: address of float32 (T, H, P + R), the projected queries.
        queries: address of float32 (T, H, query_width), where queries in latent space go, times `scale`.
        kv: address of float32 (T, C + R), the projected latent and rotated key; kv_norm: of the norm's weight (C,).
        k_b: (H, C, P), or with `transposed` (H, P, C).
        slot: which block of cache rows is the layer's.

    Raises:
        QuantError: a transposed k_b with interleaved rows.
    """
    if transposed:
        check_single_rows(k_b)
    nope, latent = (k_b.n_rows, k_b.n_cols) if transposed else (k_b.n_cols, k_b.n_rows)
    words = [
        projected, nope + n_rope, k_b.n_groups, queries, query_width, float_bits(scale), n_rope, slot, latent + n_rope,
        nope, latent, kv, kv_norm, float_bits(epsilon), q8_bytes(nope), k_b.format.integer, transposed, *k_b.fields,
    ]  # fmt: skip
    work_bytes = max(MOST_TOKENS * q8_bytes(nope), padded(4 * max(latent, n_rope)))
    return Phase(NOTHING, _run_latent, k_b.n_groups + 1, words, work_bytes)


def grouped_queries_phase(
    projected: int,
    queries: int,
    keys: int,
    values: int,
    *,
    q_norm: int,
    k_norm: int,
    by_halves: bool,
    epsilon: float,
    n_heads: int,
    n_key_heads: int,
    head_dim: int,
    value_width: int,
    n_rope: int,
    query_width: int,
    scale: float,
    slot: int,
) -> Phase:
    """GQA's queries and cache rows: keys in block `slot`, values in the next. T: MOST_TOKENS.

    Args:
        projected, keys: addresses of float32 (T, H, head_dim) and (T, G, head_dim).
        values: address of float32 (T, value_width), all key heads' together.
        queries: address of float32 (T, H, query_width), where turned queries go, times `scale`.
        q_norm, k_norm: addresses of float32 (head_dim,), the weights of each head's norm; 0 for none.
        by_halves: whether dimension i is turned against i + n_rope / 2, not against its neighbour.
    """
    stride, gap = (1, n_rope // 2) if by_halves else (2, 1)
    words = [
        projected, head_dim, n_heads, queries, query_width, float_bits(scale), n_rope, slot, n_key_heads * head_dim,
        n_key_heads, keys, values, value_width, q_norm, k_norm, float_bits(epsilon), stride, gap,
    ]  # fmt: skip
    return Phase(NOTHING, _run_grouped, n_heads + 1, words, padded(4 * n_rope))
