"""Latent attention (MLA) on the device: the module, flash-decoding over the latent cache, and prefill through torch.

A few tokens: absorbed. k_b moves queries into latent space, a kernel attends over pieces of the context, a second one
sums the pieces, v_b moves the results out. A program takes some heads of one token and one piece, so every cache row is
read once for all of them, and the next programs find it in the L2 cache. Pieces are of equal length, by the token's own
position: its result does not depend on what other tokens are in the call. Nothing waits for the host.

Many tokens: decompressed. Keys and values of some heads and CONTEXT tokens are rebuilt at a time and go through
torch's fused attention, which keeps no scores: first the new tokens among themselves, causal, then chunks of the
earlier context, summed by their log-sum-exp. Work memory does not grow with the context.

Letters: T new tokens, S cached tokens, H heads, N heads handled at a time, D hidden_size, C kv_lora_rank,
R qk_rope_head_dim, P qk_nope_head_dim, V v_head_dim, d the width of keys and values in torch's kernels.
Sources: DeepSeek-V2 (arXiv 2405.04434); FlashAttention-2 (arXiv 2307.08691); Flash-Decoding
(https://pytorch.org/blog/flash-decoding/).
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from localrun.gpu import tiles
from localrun.gpu.cache import DeviceCache, row_constants
from localrun.gpu.indexer import choose
from localrun.gpu.places import HasPlaces, Places, block_of, n_rows_of
from localrun.gpu.routing import Turns, turn_and_append
from localrun.gpu.tiles import Attention
from localrun.limits import GPU_ATTENTION_WORK_BYTES
from localrun.models.config import Config
from localrun.network import attention
from localrun.network.weight_source import WeightSource

FEW_TOKENS = 8  # tokens with all pieces each; more share them
_FLASH = (8, 0)  # compute capability that torch's flash attention needs
LOG2_E = 1.4426950408889634
MIN_PIECE = 128  # cached tokens: shorter pieces would cost more to sum than they gain
CONTEXT = 4096  # cached tokens decompressed at a time
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


class LatentAttention(attention.LatentAttention):
    """MLA on the device, over its cache; everything else of the interface is that of the CPU's."""

    def __init__(self, config: Config, weights: WeightSource, index: int, turns: Turns):
        """weights: modules over device tensors; turns: one for all layers."""
        super().__init__(config, weights, index, turns.rope)
        self.turns = turns
        device = turns.fine.device
        self.n_pieces = pieces_for(config, device)
        # The stand-in for a device is compared with the CPU's network, which multiplies in 32 bits.
        self.dtype = torch.float32 if device.type == "cpu" else torch.float16

    def __call__(self, x_TD: torch.Tensor, cache: DeviceCache | Places) -> torch.Tensor:
        """float32 (T, D) of the tokens after the cache's, or at places -> (T, D); writes their rows.

        There must be room (check_room). Places are for few tokens.
        """
        c, n_tokens = self.config, x_TD.shape[0]
        queries_of, kv_TW = self._queries_of(x_TD), self.kv_a_proj_with_mqa(x_TD)
        q_TQ = self.q_proj(queries_of) if c.q_lora_rank is None else self.q_b_proj(queries_of)
        places = cache.places(n_tokens, x_TD.device)
        q_nope_THP, q_rope_THR = turn_and_append(
            q_TQ, kv_TW, self.kv_a_layernorm, self.turns, places, self.cache_layer, c
        )
        dtype = torch.float32 if cache.is_exact else self.dtype
        if self.indexer is not None:
            self.choice.rows_TK = choose(self.indexer, x_TD, queries_of, places, self.cache_layer, self.turns, dtype)
        if self.choice.rows_TK is not None or self._absorbing_is_cheaper(n_tokens):
            out_THV = self._few(q_nope_THP, q_rope_THR, places, dtype)
        else:
            out_THV = self._many(torch.cat([q_nope_THP, q_rope_THR], -1).transpose(0, 1).to(dtype), cache)
        return self.o_proj(out_THV.flatten(1))

    def _few(
        self, q_nope_THP: torch.Tensor, q_rope_THR: torch.Tensor, places: Places, dtype: torch.dtype
    ) -> torch.Tensor:
        """(T, H, V) by attending in latent space, as many tokens at a time as there is room for."""
        c, chosen_TK, outs = self.config, self.choice.rows_TK, []
        bytes_per_token = 3 * 4 * c.num_attention_heads * c.kv_lora_rank  # queries, sums, results
        for first, count in attention.in_groups(len(q_rope_THR), bytes_per_token, GPU_ATTENTION_WORK_BYTES):
            some, here = slice(first, first + count), places.part(first, first + count)
            q_nope, q_rope = q_nope_THP[some], q_rope_THR[some]
            q_latent_THC = self.k_b_proj(q_nope) if self.is_split else self.k_b_proj.transposed(q_nope)
            chosen = None if chosen_TK is None else chosen_TK[some]
            mixed_THC = attend(
                q_latent_THC, q_rope, here, self.cache_layer, c, self.scale, self.n_pieces, dtype, chosen
            )
            outs.append(self.v_b_proj(mixed_THC))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _many(self, q_HTd: torch.Tensor, cache: DeviceCache) -> torch.Tensor:
        """(T, H, V) by rebuilding keys and values; q_HTd's dtype is that of all products."""
        c, n_tokens = self.config, q_HTd.shape[1]
        width = -(-max(q_HTd.shape[-1], c.v_head_dim) // 8) * 8  # torch's kernels: one for both, a multiple of 8
        out_THV = torch.empty(n_tokens, c.num_attention_heads, c.v_head_dim, device=q_HTd.device)
        # A token's keys, values and the product that is copied into them; an output of the new tokens and its sum.
        bytes_per_head = q_HTd.element_size() * 3 * width * max(n_tokens, CONTEXT) + 3 * 4 * width * n_tokens
        for first, count in attention.in_groups(c.num_attention_heads, bytes_per_head, GPU_ATTENTION_WORK_BYTES):
            q_NTd = pad(q_HTd[first : first + count], (0, width - q_HTd.shape[-1]))
            matrices = tuple(b.dense(first, count).to(q_HTd.dtype) for b in (self.k_b_proj, self.v_b_proj))
            rebuilt = functools.partial(self._rebuilt, q_NTd, matrices, cache)
            out_NTV = attend_by_pieces(q_NTd, rebuilt, cache.length, self.scale)[..., : c.v_head_dim]
            out_THV[:, first : first + count] = out_NTV.transpose(0, 1)
        return out_THV

    def _rebuilt(
        self,
        q_NTd: torch.Tensor,
        matrices: tuple[torch.Tensor, torch.Tensor],
        cache: DeviceCache,
        first: int,
        last: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (N, last - first, d) of cached tokens, zeros behind their own widths."""
        c, (k_b, v_b) = self.config, matrices
        latent_SC, k_rope_SR = cache.rows(self.cache_layer, first, last, q_NTd.dtype)
        k_NSd = q_NTd.new_zeros(q_NTd.shape[0], last - first, q_NTd.shape[-1])
        v_NSd = torch.zeros_like(k_NSd)
        k_NSd[..., : c.qk_nope_head_dim] = latent_SC @ (k_b if self.is_split else k_b.mT)
        k_NSd[..., c.qk_nope_head_dim :][..., : c.qk_rope_head_dim] = k_rope_SR
        v_NSd[..., : c.v_head_dim] = latent_SC @ v_b.mT
        return k_NSd, v_NSd


def attend_by_pieces(
    q_NTd: torch.Tensor,
    rows: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
    start: int,
    scale: float,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 (N, T, d) of tokens from `start` on; rows(first, last) gives keys and values (N, last - first, d)."""
    out, log_sum = _fused_attention(q_NTd, *rows(start, start + q_NTd.shape[1]), True, scale)
    for first in range(0, start, CONTEXT):
        earlier, earlier_log_sum = _fused_attention(q_NTd, *rows(first, min(first + CONTEXT, start)), False, scale)
        both = torch.logaddexp(log_sum, earlier_log_sum)
        out = out * (log_sum - both).exp()[..., None] + earlier * (earlier_log_sum - both).exp()[..., None]
        log_sum = both
    return out if sinks_N is None else out * (log_sum - sinks_N[:, None]).sigmoid()[..., None]


def _fused_attention(
    q_NTd: torch.Tensor, k_NSd: torch.Tensor, v_NSd: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (N, T, d) and the natural logarithms (N, T) of the softmax's sums.

    The operators that scaled_dot_product_attention dispatches to: itself, it keeps the sums back. is_causal: T = S.
    """
    q, k, v = q_NTd[None], k_NSd[None], v_NSd[None]
    aten, n_tokens = torch.ops.aten, q_NTd.shape[1]
    if q.device.type == "cpu":
        out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    elif q.dtype == torch.float32 or torch.cuda.get_device_capability(q.device) < _FLASH:
        out, log_sum = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)[
            :2
        ]
    else:
        out, log_sum = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[:2]
    return out[0].float(), log_sum[0, :, :n_tokens].float()
