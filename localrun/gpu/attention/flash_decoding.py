"""Flash-decoding over a cache: a kernel attends over pieces of the context, a second one sums the pieces.

A program takes some heads of one token and one piece, so every cache row is read once for all of them, and the next
programs find it in the L2 cache. Pieces are of equal length, by the token's own position: its result does not depend on
what other tokens are in the call. Nothing waits for the host.

Letters: T new tokens, H heads, C kv_lora_rank, R qk_rope_head_dim.
Source: Flash-Decoding (https://pytorch.org/blog/flash-decoding/).
"""

import torch
import triton
import triton.language as tl

from localrun.gpu import tiles
from localrun.gpu.caches.context import row_constants
from localrun.gpu.caches.places import HasPlaces, Places, block_of, n_rows_of
from localrun.gpu.tiles import Attention
from localrun.models.config import Config

FEW_TOKENS = 8  # tokens with all pieces each; more share them
LOG2_E = 1.4426950408889634
MIN_PIECE = 128  # cached tokens: shorter pieces would cost more to sum than they gain
TO_BASE_2 = tl.constexpr(LOG2_E)
PEAK = tl.constexpr(12.0)  # float16 weights of the softmax are up to 2^12: small ones keep their bits down to 2^-26


@triton.jit
def piece_length(n_seen, n_pieces, MIN_PIECE: tl.constexpr, BLOCK_S: tl.constexpr):
    """Cached tokens of each piece but the last, whole blocks."""
    return tl.maximum(MIN_PIECE, tl.cdiv(tl.cdiv(n_seen, n_pieces), BLOCK_S) * BLOCK_S)


@triton.jit
def _n_seen(positions, token, TOP_K: tl.constexpr):
    """Rows that a token attends to, or of a window those up to its own."""
    n_seen = tl.load(positions + token).to(tl.int32) + 1
    return tl.minimum(n_seen, TOP_K) if TOP_K > 0 else n_seen


@triton.jit
def _first_seen(n_seen, WINDOW: tl.constexpr):
    """Of a token that is the last of n_seen."""
    return tl.maximum(n_seen - WINDOW, 0) if WINDOW > 0 else 0


@triton.jit
def _load_rows(rows, row, stride, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK_S, BLOCK) of a cache part, 0 outside."""
    column = tl.arange(0, BLOCK)
    at = rows + row.to(tl.int64)[:, None] * stride + column[None, :]
    if WIDTH == BLOCK:
        return tl.load(at, mask=inside[:, None], other=0)
    return tl.load(at, mask=inside[:, None] & (column < WIDTH)[None, :], other=0)


@triton.jit
def _latents(
    latents,
    scales,
    row,
    stride,
    inside,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(BLOCK_S, BLOCK_C) in DTYPE. An E4M3 code shifted by 7 is the bits of a float16 2^8 times smaller, exactly."""
    tile = _load_rows(latents, row, stride, inside, C, BLOCK_C)
    if BITS == 8:
        scale = 256.0 * tl.load(scales + row, mask=inside, other=0.0)
        code = tile.to(tl.int16)
        half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        return (half.to(tl.float16, bitcast=True).to(tl.float32) * scale[:, None]).to(DTYPE)
    return tile.to(DTYPE)


@triton.jit
def attend_kernel(q_latent, q_rope, positions, table, entry_stride, token_stride, chosen, partials, log_sums,
                  score_scale, n_pieces, N_HEADS: tl.constexpr, PER_GROUP: tl.constexpr, C: tl.constexpr,
                  R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
                  BLOCK_S: tl.constexpr, MIN_PIECE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
                  IS_LATENT: tl.constexpr, VALUE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
                  VALUE_ALIGNED: tl.constexpr, KEY: tl.constexpr, KEY_STRIDE: tl.constexpr,
                  KEY_ALIGNED: tl.constexpr, WINDOW: tl.constexpr, TOP_K: tl.constexpr):  # fmt: skip
    """Program (block of heads, piece, token): softmax(q k^T) v over the piece, and the logarithm (base 2) of its sum.

    IS_LATENT: a key is a latent, which is also the value, and a rotated part; all heads share them. Else PER_GROUP
    heads share keys, which lie where the rotated parts do, and values, where the latents do; q_latent is not read.
    WINDOW: tokens that are seen, of rows that go round; 0 for all. TOP_K: rows that are `chosen`, (T, TOP_K); 0 where
    all are. VALUE, KEY: types in the cache; STRIDE: of rows;
    ALIGNED: bytes that divide blocks' addresses.
    Products of DTYPE, sums and softmax float32. Queries are divided by each head's largest value: float16 holds them.
    """
    piece, token = tl.program_id(1), tl.program_id(2)
    n_seen = _n_seen(positions, token, TOP_K)
    first = _first_seen(n_seen, WINDOW)
    length = piece_length(n_seen - first, n_pieces, MIN_PIECE, BLOCK_S)
    first += piece * length
    if first >= n_seen:
        return
    last = tl.minimum(first + length, n_seen)
    blocks = (PER_GROUP + BLOCK_H - 1) // BLOCK_H
    group = tl.program_id(0) // blocks
    member = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = member < PER_GROUP
    query = token.to(tl.int64) * N_HEADS + group * PER_GROUP + member
    latents = block_of(table, 0, token, entry_stride, token_stride, VALUE, VALUE_ALIGNED) + group * C
    rope_keys = block_of(table, 1, token, entry_stride, token_stride, KEY, KEY_ALIGNED) + group * R
    scales = block_of(table, 2, token, entry_stride, token_stride, tl.float32, 4)
    n_rows = n_rows_of(table, token, entry_stride, token_stride).to(tl.int32)
    q_r = _load_rows(q_rope, query, R, is_head, R, BLOCK_R)
    largest = tl.max(tl.abs(q_r), 1)
    if IS_LATENT:
        q_c = _load_rows(q_latent, query, C, is_head, C, BLOCK_C)
        largest = tl.maximum(tl.max(tl.abs(q_c), 1), largest)
    largest = tl.where(largest > 0, largest, 1.0)
    q_r = (q_r / largest[:, None]).to(DTYPE)
    if IS_LATENT:
        q_c = (q_c / largest[:, None]).to(DTYPE)
    factor = largest * score_scale
    peak = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    mixed = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    for block in range(first, last, BLOCK_S):
        row = block + tl.arange(0, BLOCK_S)
        is_row = row < last
        if WINDOW > 0:
            row %= n_rows
        if TOP_K > 0:
            row = tl.load(chosen + token * TOP_K + row, mask=is_row, other=0)
        values = _latents(latents, scales, row, VALUE_STRIDE, is_row, C, BLOCK_C, BITS, DTYPE)
        turned = _load_rows(rope_keys, row, KEY_STRIDE, is_row, R, BLOCK_R).to(DTYPE)
        if BLOCK_H == 1:
            score = tl.sum(q_r.to(tl.float32) * turned.to(tl.float32), 1)[None, :]
            if IS_LATENT:
                score += tl.sum(q_c.to(tl.float32) * values.to(tl.float32), 1)[None, :]
        elif IS_LATENT:
            score = tl.dot(q_c, tl.trans(values), input_precision="ieee")
            score = tl.dot(q_r, tl.trans(turned), score, input_precision="ieee")
        else:
            score = tl.dot(q_r, tl.trans(turned), input_precision="ieee")
        score *= factor[:, None]
        score = tl.where(is_row[None, :], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - new_peak[:, None] + PEAK)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weight, 1)
        mixed *= shrink[:, None]
        if BLOCK_H == 1:
            mixed += tl.sum(tl.trans(weight) * values.to(tl.float32), 0)[None, :]
        else:
            mixed = tl.dot(weight.to(DTYPE), values, mixed, input_precision="ieee")
        peak = new_peak
    column = tl.arange(0, BLOCK_C)
    place = query * n_pieces + piece
    inside = is_head[:, None] & (column < C)[None, :]
    tl.store(partials + place[:, None] * C + column[None, :], mixed / total[:, None], mask=inside)
    tl.store(log_sums + place, peak + tl.log2(total) - PEAK, mask=is_head)


@triton.jit
def combine_kernel(partials, log_sums, positions, sinks, out, n_pieces, N_HEADS: tl.constexpr, C: tl.constexpr,
                   MIN_PIECE: tl.constexpr, BLOCK_S: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
                   WINDOW: tl.constexpr, TOP_K: tl.constexpr, HAS_SINKS: tl.constexpr):  # fmt: skip
    """Program (head, columns, token): the pieces' results, weighted by their sums; PIECES of them at a time.

    A sink is a logit more of a head's softmax, without a value.
    """
    head, token = tl.program_id(0), tl.program_id(2)
    n_seen = _n_seen(positions, token, TOP_K)
    n_seen -= _first_seen(n_seen, WINDOW)
    count = tl.cdiv(n_seen, piece_length(n_seen, n_pieces, MIN_PIECE, BLOCK_S))
    query = token.to(tl.int64) * N_HEADS + head
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if HAS_SINKS:
        peak = tl.zeros([1], tl.float32) + tl.load(sinks + head) * TO_BASE_2
        total += 1.0
    mixed = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, count, PIECES):
        piece = first + tl.arange(0, PIECES)
        place = query * n_pieces + piece
        log_sum = tl.load(log_sums + place, mask=piece < count, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(log_sum, 0))
        weight, shrink = tl.exp2(log_sum - new_peak), tl.exp2(peak - new_peak)
        inside = (piece < count)[:, None] & (column < C)[None, :]
        part = tl.load(partials + place[:, None] * C + column[None, :], mask=inside, other=0.0)
        mixed = mixed * shrink + tl.sum(weight[:, None] * part, 0)
        total = total * shrink + tl.sum(weight, 0)
        peak = new_peak
    tl.store(out + query * C + column, mixed / total, mask=column < C)


def head_block(n_heads: int, dtype: torch.dtype = torch.float16, most: int = 32) -> int:
    """Heads a program of attend_kernel takes: tensor cores want 16; sums of 32 fill half of 8 warps' registers."""
    return min(most, 16 if n_heads <= 16 or dtype == torch.float32 else 32)


def attend_constants(config: Config, bits: int, dtype: torch.dtype, tile: Attention) -> dict[str, object]:
    """What attend_kernel is compiled for; dtype: float16, or float32 for exact products."""
    c = config
    value_width, key_width = _widths(c)
    return {
        "N_HEADS": c.num_attention_heads, "PER_GROUP": heads_together(c), "C": value_width, "R": key_width,
        "BLOCK_C": max(16, triton.next_power_of_2(value_width)), "BLOCK_R": max(16, triton.next_power_of_2(key_width)),
        "BLOCK_H": head_block(heads_together(c), dtype, tile.heads),
        "BLOCK_S": 32 if _is_copied(bits, dtype) and tile.heads > 1 else 16,
        "MIN_PIECE": MIN_PIECE, "BITS": bits, "DTYPE": tl.float16 if dtype == torch.float16 else tl.float32,
        "IS_LATENT": c.attention == "mla", **row_constants(c, bits),
    }  # fmt: skip


def _widths(config: Config) -> tuple[int, int]:
    """C and R of attend_kernel: of values, and of keys or their rotated parts."""
    c = config
    return (c.kv_lora_rank, c.qk_rope_head_dim) if c.attention == "mla" else (c.v_head_dim, c.head_dim)


def heads_together(config: Config) -> int:
    """Heads that share keys and values."""
    c = config
    return c.num_attention_heads if c.attention == "mla" else c.num_attention_heads // c.num_key_value_heads


def _head_blocks(config: Config, tile: Attention, dtype: torch.dtype = torch.float16) -> int:
    """Programs of attend_kernel a token and piece."""
    together = heads_together(config)
    return config.num_attention_heads // together * triton.cdiv(together, head_block(together, dtype, tile.heads))


def attend_options(config: Config, bits: int, dtype: torch.dtype, tile: Attention) -> dict[str, int]:
    """How attend_kernel is launched: without spills, and in the 99 KiB of shared memory of a consumer card's processor.

    Rows that go to the tensor cores as they are arrive while the ones before are multiplied; others take registers.
    """
    is_copied = _is_copied(bits, dtype) and tile.heads > 1
    n_warps = 4 if head_block(heads_together(config), dtype, tile.heads) == 16 and bits != 8 else 8
    return {"num_warps": n_warps, "num_stages": 2 if is_copied else 1}


def _is_copied(bits: int, dtype: torch.dtype) -> bool:
    return bits == 16 and dtype == torch.float16


def combine_constants(config: Config, bits: int, dtype: torch.dtype, tile: Attention) -> dict[str, int]:
    """What combine_kernel is compiled for."""
    shared = attend_constants(config, bits, dtype, tile)
    columns = min(128, triton.next_power_of_2(_widths(config)[0]))
    return {name: shared[name] for name in ("N_HEADS", "C", "MIN_PIECE", "BLOCK_S")} | {
        "COLUMNS": columns,
        "PIECES": 16,
    }


def pieces_for(config: Config, device: torch.device) -> int:
    """Pieces of the context that keep all of the device busy with one token."""
    if device.type == "cpu":
        return 4
    n_processors, tile = torch.cuda.get_device_properties(device).multi_processor_count, tiles.of(device).attention
    return min(128, triton.cdiv(tile.programs * n_processors, _head_blocks(config, tile)))


def dtype_of_products(device: torch.device) -> torch.dtype:
    """Of attention's products on a device."""
    # The stand-in for a device is compared with the CPU's network, which multiplies in 32 bits.
    return torch.float32 if device.type == "cpu" else torch.float16


def attend(
    q_latent_THC: torch.Tensor,
    q_rope_THR: torch.Tensor,
    cache: HasPlaces,
    layer: int,
    config: Config,
    scale: float,
    n_pieces: int,
    dtype: torch.dtype,
    chosen_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 (T, H, C): the latents that each head and token attends to, mixed; the tokens' own rows are in the cache.

    Nothing waits for the host, and shapes depend on T alone. dtype of products: float16 or float32. chosen_TK: as
    attend_over has it.
    """
    queries = q_latent_THC.contiguous(), q_rope_THR.contiguous()
    places = cache.places(len(q_rope_THR))
    return attend_over(queries, places, layer, config, scale, n_pieces, dtype, chosen_TK=chosen_TK)


def attend_over(
    queries: tuple[torch.Tensor, torch.Tensor],
    places: Places,
    layer: int,
    config: Config,
    scale: float,
    n_pieces: int,
    dtype: torch.dtype,
    window: int = 0,
    sinks_H: torch.Tensor | None = None,
    chosen_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Both kernels.

    queries: q_latent and q_rope of attend_kernel. window, sinks_H: as network.weight_source.Attend. chosen_TK: int32,
    the rows that each token attends to, those that it sees first.
    """
    n_tokens, n_heads, _ = queries[1].shape
    width, device, bits = _widths(config)[0], queries[1].device, places.bits
    n_pieces = max(1, min(n_pieces, n_pieces * FEW_TOKENS // n_tokens))
    top_k = 0 if chosen_TK is None else chosen_TK.shape[1]
    if most := window or top_k:
        n_pieces = min(n_pieces, triton.cdiv(most, MIN_PIECE))
    partials = torch.empty(n_tokens, n_heads, n_pieces, width, device=device)
    log_sums = torch.empty(n_tokens, n_heads, n_pieces, device=device)
    out_THC = torch.empty(n_tokens, n_heads, width, device=device)
    tile = tiles.of(device).attention
    constants, sums = attend_constants(config, bits, dtype, tile), combine_constants(config, bits, dtype, tile)
    attend_kernel[_head_blocks(config, tile, dtype), n_pieces, n_tokens](
        *queries, *places.of_layer(layer), places.positions if chosen_TK is None else chosen_TK, partials, log_sums,
        scale * LOG2_E, n_pieces, **constants, WINDOW=window, TOP_K=top_k, **attend_options(config, bits, dtype, tile),
    )  # fmt: skip
    combine_kernel[n_heads, triton.cdiv(width, sums["COLUMNS"]), n_tokens](
        partials, log_sums, places.positions, log_sums if sinks_H is None else sinks_H, out_THC, n_pieces, **sums,
        WINDOW=window, TOP_K=top_k, HAS_SINKS=sinks_H is not None, num_warps=4,
    )  # fmt: skip
    return out_THC
