"""Phases between tokens' projections and their attention: rotated queries, and the new cache rows.

MLA moves queries into latent space with k_b, so that they meet cached latents directly (absorbed attention,
DeepSeek-V2, arXiv 2405.04434, section 2.1.2); GQA only norms (Qwen3) and rotates queries and keys.
"""

import numpy as np

from quant.decode.linear import multiply, set_token, token_tables
from quant.decode.parts import GroupPart
from quant.decode.program import HEADER, MOST_TOKENS, NOTHING, PHASE, Phase, cache_block, padded, program_of, tokens_of
from quant.gemv.activations import q8_bytes, write_q8
from quant.gemv.rows_i8 import SCALE_BYTES, pack_group
from quant.gemv.rows_i16 import pack_row
from quant.matrix import MATRIX, QuantMatrix, check_single_rows, row_address
from quant.simd.memory import load_f32, store_f16, store_f32
from quant.simd.struct import address, address_of, boolean, f32, i64, struct
from quant.simd.vectors import copy, rms_factor, rms_norm, scale, scale_add, weighted
from quant.target.jit import inline, kernel
from quant.threads.atomics import call_3

# Widths are in values.
_BOTH = {
    "phase": PHASE,
    "projected": address,  # float32 (MOST_TOKENS, n_heads, head_width)
    "head_width": i64,
    "n_heads": i64,
    "queries": address,  # float32 (MOST_TOKENS, n_heads, query_width)
    "query_width": i64,
    "scale": f32,
    "n_rope": i64,
    "slot": i64,  # which block of cache rows
    "row_width": i64,
    "row_bytes": i64,
    "in_bytes": boolean,  # whether groups of a row's values are (gemv/rows_i8.py)
    "epsilon": f32,  # of norms
}
LATENT = struct(
    "LatentQueries",
    **_BOTH,
    is_scaled=boolean,  # whether a row's values are integers with a scale (gemv/rows_i16.py)
    nope=i64,
    latent=i64,
    kv=address,  # float32 (MOST_TOKENS, latent + n_rope)
    kv_norm=address,
    q8_bytes=i64,
    k_b=MATRIX,
    k_b_integer=boolean,
    k_b_transposed=boolean,
)
GROUPED = struct(
    "GroupedQueries",
    **_BOTH,
    n_key_heads=i64,
    keys=address,  # float32 (MOST_TOKENS, n_key_heads, head_width)
    values=address,
    value_width=i64,  # of all key heads together
    value_bytes=i64,  # of a row of them
    q_norm=address,  # 0 for none
    k_norm=address,
    norms_rows=boolean,  # all heads of a token as one vector, not each by itself
    stride=i64,  # pair i that is rotated: stride * i, and gap behind it
    gap=i64,
)


@inline
def _projected(a, head, t):
    """Address of a head's projected query, of token t."""
    return a.projected + 4 * a.head_width * (a.n_heads * t + head)


@inline
def _query(a, head, t):
    """Address of the query that goes to attention."""
    return a.queries + 4 * a.query_width * (a.n_heads * t + head)


@inline
def rotate(x, a, t, out, stride, gap):
    """The first n_rope floats of x, each pair (stride * i, stride * i + gap) rotated by the position of token t.

    Neighbours are stride 2, gap 1; two halves stride 1, gap n_rope / 2. out may be x.
    """
    turn(x, rotations_of(a, t), a.n_rope, np.float32(1.0), out, stride, gap)


@inline
def rotations_of(a, t, first_frequency=0):
    """Address of cosines and sines of token t's position, in turn, from that frequency on."""
    program = program_of(a)
    return address_of(program.rotations + 2 * (program.n_frequencies * t + first_frequency))


@inline
def turn(x, rotations, n_rope, direction, out, stride, gap):
    """The first n_rope floats of x, each pair rotated, by 1 forwards or by -1 back. out may be x."""
    for i in range(n_rope // 2):
        first, second = 4 * stride * i, 4 * (stride * i + gap)
        u, v = load_f32(x + first), load_f32(x + second)
        cos, sin = load_f32(rotations + 8 * i), load_f32(rotations + 8 * i + 4) * direction
        store_f32(out + first, u * cos - v * sin)
        store_f32(out + second, u * sin + v * cos)


@inline
def cache_row_of(a, slot, row_bytes, t):
    """Address of token t's row in a block of cache rows of so many bytes."""
    block, n_rows = cache_block(a, slot, t)
    return block + row_bytes * (program_of(a).positions[t] % n_rows)


@inline
def store_row_f16(x, n, row):
    """float32 (n,) as f16."""
    for i in range(n):
        store_f16(row + 2 * i, load_f32(x + 4 * i))


@inline
def _store_group(a, x, n, row):
    """The same, or a group of bytes; returns the address behind it."""
    if a.in_bytes:
        pack_group(x, n, row)
        return row + n + SCALE_BYTES
    store_row_f16(x, n, row)
    return row + 2 * n


@inline
def _into_latent(a, head, work):
    """Each token's query = k_b[head] times its projected one, float32 (latent,)."""
    nope, n_tokens, tables = a.nope, tokens_of(a), token_tables()
    for t in range(n_tokens):
        q8 = work + a.q8_bytes * t
        write_q8(_projected(a, head, t), 0, nope, nope, a.k_b_integer, q8)
        set_token(tables, t, q8, _query(a, head, t))
    multiply(a.k_b, head, 0, a.latent, nope, tables, n_tokens)


@inline
def _into_latent_transposed(a, head, work):
    """The same with k_b[head]^T, where the file keeps it joined with v_b."""
    latent, n_tokens = a.latent, tokens_of(a)
    for t in range(n_tokens):
        for i in range(latent):
            store_f32(_query(a, head, t) + 4 * i, np.float32(0.0))
    for p in range(a.nope):
        call_3(a.k_b.expand, row_address(a.k_b, head, p), latent // a.k_b.block, work)
        for t in range(n_tokens):
            scale_add(load_f32(_projected(a, head, t) + 4 * p), work, latent, _query(a, head, t))


@inline
def _store_latent(a, t, work):
    """Token t's cache row: the normed latent, the rotated key behind it."""
    latent, width = a.latent, a.row_width
    kv, row, key = a.kv + 4 * width * t, cache_row_of(a, a.slot, a.row_bytes, t), work + 4 * latent
    rms_norm(kv, a.kv_norm, a.epsilon, latent, work)
    rotate(kv + 4 * latent, a, t, key, 2, 1)
    if a.is_scaled:
        pack_row(work, width, row)
    else:
        store_row_f16(key, a.n_rope, _store_group(a, work, latent, row))


@kernel("void(int64, int64, int64)")
def _run_latent(phase, item, work):
    """MLA. Item h: head h's queries in latent space, their rotated parts behind. The last item: the cache rows."""
    a = LATENT(phase)
    nope, latent = a.nope, a.latent
    if item == a.n_heads:
        for t in range(tokens_of(a)):
            _store_latent(a, t, work)
        return
    if a.k_b_transposed:
        _into_latent_transposed(a, item, work)
    else:
        _into_latent(a, item, work)
    for t in range(tokens_of(a)):
        query = _query(a, item, t)
        rotate(_projected(a, item, t) + 4 * nope, a, t, query + 4 * latent, 2, 1)
        scale(a.scale, latent + a.n_rope, query)


@inline
def _norm_and_rotate(a, row, n_heads, head, norm, t, out):
    """One head's query or key of a row of all heads', normed if there is a norm, its first n_rope values rotated."""
    width = a.head_width
    x = row + 4 * width * head
    if norm == 0:
        copy(x, width, out)
    elif a.norms_rows:
        weighted(x, rms_factor(row, a.epsilon, n_heads * width), norm + 4 * width * head, width, out)
    else:
        rms_norm(x, norm, a.epsilon, width, out)
    rotate(out, a, t, out, a.stride, a.gap)


@inline
def _store_keys_and_values(a, t, work):
    """Token t's cache rows: keys, normed and rotated, and values."""
    width, n_key_heads, n_values = a.head_width, a.n_key_heads, a.value_width // a.n_key_heads
    row, values = cache_row_of(a, a.slot, a.row_bytes, t), cache_row_of(a, a.slot + 1, a.value_bytes, t)
    for g in range(n_key_heads):
        _norm_and_rotate(a, a.keys + 4 * a.row_width * t, n_key_heads, g, a.k_norm, t, work)
        row = _store_group(a, work, width, row)
        values = _store_group(a, a.values + 4 * (a.value_width * t + n_values * g), n_values, values)


@kernel("void(int64, int64, int64)")
def _run_grouped(phase, item, work):
    """GQA. Item h: head h's queries, normed and rotated. The last item: the cache rows."""
    a = GROUPED(phase)
    for t in range(tokens_of(a)):
        if item == a.n_heads:
            _store_keys_and_values(a, t, work)
        else:
            query = _query(a, item, t)
            _norm_and_rotate(a, _projected(a, 0, t), a.n_heads, item, a.q_norm, t, query)
            scale(a.scale, a.head_width, query)


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
    row_bytes: int,
    in_bytes: bool,
    is_scaled: bool,
) -> Phase:
    """MLA's queries and cache rows. T: MOST_TOKENS.

    Args:
        projected: address of float32 (T, H, P + R), the projected queries.
        queries: address of float32 (T, H, query_width), where queries in latent space go, times `scale`.
        kv: address of float32 (T, C + R), the projected latent and rotated key; kv_norm: of the norm's weight (C,).
        k_b: (H, C, P), or with `transposed` (H, P, C).
        slot: which block of cache rows is the layer's; row_bytes: of a row.
        in_bytes: whether latents are, a group a row, rather than of 16 bits.
        is_scaled: whether rows are integers with a scale (gemv/rows_i16.py).

    Raises:
        QuantError: a transposed k_b with interleaved rows.
    """
    if transposed:
        check_single_rows(k_b)
    nope, latent = (k_b.n_rows, k_b.n_cols) if transposed else (k_b.n_cols, k_b.n_rows)
    arguments = LATENT.pack(
        phase=HEADER, projected=projected, head_width=nope + n_rope, n_heads=k_b.n_groups,
        queries=queries, query_width=query_width, scale=scale, n_rope=n_rope, slot=slot, row_width=latent + n_rope,
        row_bytes=row_bytes, in_bytes=in_bytes, is_scaled=is_scaled,
        epsilon=epsilon, nope=nope, latent=latent, kv=kv, kv_norm=kv_norm, q8_bytes=q8_bytes(nope),
        k_b=k_b.struct, k_b_integer=k_b.format.integer, k_b_transposed=transposed,
    )  # fmt: skip
    work_bytes = max(MOST_TOKENS * q8_bytes(nope), padded(4 * (latent + n_rope)))
    return Phase(NOTHING, _run_latent, k_b.n_groups + 1, arguments, work_bytes, weights=[GroupPart(k_b)])


def grouped_queries_phase(
    projected: int,
    queries: int,
    keys: int,
    values: int,
    *,
    q_norm: int,
    k_norm: int,
    norms_rows: bool,
    epsilon: float,
    by_halves: bool,
    n_heads: int,
    n_key_heads: int,
    head_dim: int,
    value_width: int,
    n_rope: int,
    query_width: int,
    scale: float,
    slot: int,
    row_bytes: int,
    value_bytes: int,
    in_bytes: bool,
) -> Phase:
    """GQA's queries and cache rows: keys in block `slot`, values in the next. T: MOST_TOKENS.

    Args:
        projected, keys: addresses of float32 (T, H, head_dim) and (T, G, head_dim).
        values: address of float32 (T, value_width), all key heads' together.
        queries: address of float32 (T, H, query_width), where rotated queries go, times `scale`.
        q_norm, k_norm: addresses of float32 (head_dim,), the weights of each head's norm; 0 for none.
        norms_rows: whether all heads of a token are normed as one vector: q_norm is (H * head_dim,) then, k_norm
            (G * head_dim,).
        row_bytes, value_bytes: of a row of keys, of values.
        in_bytes: whether both are, a group a head, rather than of 16 bits.
        by_halves: whether dimension i is rotated against i + n_rope / 2, not against its neighbour.
    """
    stride, gap = (1, n_rope // 2) if by_halves else (2, 1)
    arguments = GROUPED.pack(
        phase=HEADER, projected=projected, head_width=head_dim, n_heads=n_heads,
        queries=queries, query_width=query_width, scale=scale, n_rope=n_rope, slot=slot,
        row_width=n_key_heads * head_dim, row_bytes=row_bytes, in_bytes=in_bytes, epsilon=epsilon,
        n_key_heads=n_key_heads, keys=keys, values=values, value_width=value_width, value_bytes=value_bytes,
        q_norm=q_norm, k_norm=k_norm, norms_rows=norms_rows, stride=stride, gap=gap,
    )  # fmt: skip
    return Phase(NOTHING, _run_grouped, n_heads + 1, arguments, padded(4 * head_dim))
