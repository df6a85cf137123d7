"""What caches and work memory take in bytes, on a card and in RAM. Pure: no torch, no files, no devices."""

from math import ceil

from localrun.limits import (
    ATTENTION_WORK_BYTES,
    GPU_ATTENTION_WORK_BYTES,
    MARK_BYTES,
    MARK_EVERY,
    MARK_SPARE,
    PREFILL_CHUNK,
    prefill_chunk,
)
from localrun.models.config import Config
from localrun.models.rows import KV_BYTES
from quant.decode.message_sizes import PAIR_BYTES, back_bytes, message_bytes

# What comes with a CUDA process besides tensors: kernels, graphs, the allocator's rounding. Assumed.
RESERVE_BYTES = 1 << 28
_SCALE_BYTES = 4  # of each row of 8-bit values
# Of a value: in a panel of tokens, rounded for that, in a row of quantised activations (quant.gemm, quant.gemv); tokens
# of an expert below which its rows are multiplied one by one (a test holds all of these against quant).
_PANEL_BYTES, _ROUNDED_BYTES, _Q8_BYTES, _MOST_FEW = 44 / 32, 1.5, 17.5, 8


def gpu_cache_bytes(config: Config, bits: int, n_tokens: int, layers: range | None = None) -> int:
    """Bytes of a cache for so many tokens, of all layers or some.

    Of 8 bits are latents, which have a scale, while rotated keys keep 16.
    """
    c, layers = config, range(config.num_hidden_layers) if layers is None else layers
    if bits == 16:
        return sum(rows.row_bytes() * rows.count(n_tokens) for index in layers for rows in c.rows(index))
    keys = sum(KV_BYTES * c.index_head_dim for index in layers if c.chooses_rows(index))
    return n_tokens * (len(layers) * (c.kv_lora_rank + 2 * c.qk_rope_head_dim + _SCALE_BYTES) + keys)


def mark_bytes(config: Config, ctx: int) -> int:
    """Bytes of a cache's marks (network.cache) for so many tokens; 0 where it can go back without."""
    rings = [rows for index in range(config.num_hidden_layers) for rows in config.rows(index) if rows.window]
    mark = sum(rows.row_bytes() * (rows.window + MARK_SPARE) for rows in rings)
    return min(MARK_BYTES, mark * (1 + ctx // MARK_EVERY))


def work_bytes(config: Config, on_gpu: bool, ctx: int) -> int:
    """Of the CPU: activations of one chunk of a context, logits of a token, attention.

    on_gpu: whether all but experts is there.
    """
    chunk = prefill_chunk(ctx, config.rebuilds_keys and not on_gpu)
    return activation_bytes(config, chunk) + 4 * config.vocab_size + ATTENTION_WORK_BYTES


def rank_work_bytes(config: Config, part: float, message: str) -> int:
    """Of a rank that has a part of all experts' columns: a prompt's message and sums, and what its products work on.

    message: how vectors travel.
    A worker takes up to 0.2 MB besides. Work memory is kept: rows of few tokens and panels of many are there at once.
    """
    c, n_tokens = config, PREFILL_CHUNK
    inner, n_pairs = part * c.moe_intermediate_size, n_tokens * c.num_experts_per_tok
    n_few = min(n_pairs, _MOST_FEW * c.n_routed_experts)
    travelling = message_bytes(message, c.hidden_size, c.num_experts_per_tok, n_tokens)
    travelling += back_bytes(message, c.hidden_size, n_tokens)
    unpacked = n_tokens * (2 * 4 * c.hidden_size + PAIR_BYTES * c.num_experts_per_tok)  # float32 there and back
    panels = _PANEL_BYTES * n_pairs * (c.hidden_size + inner) + _ROUNDED_BYTES * n_tokens * c.hidden_size
    rows = n_few * (_Q8_BYTES + 2 * 4) * inner + _Q8_BYTES * c.hidden_size * n_few / c.num_experts_per_tok
    return ceil(travelling + unpacked + panels + rows)


def gpu_work_bytes(config: Config, has_head: bool = True) -> int:
    """Of a card: activations of one chunk, logits of all its tokens where the head is, attention."""
    logits = 4 * PREFILL_CHUNK * config.vocab_size if has_head else 0
    return activation_bytes(config) + logits + GPU_ATTENTION_WORK_BYTES


def activation_bytes(config: Config, n_tokens: int = PREFILL_CHUNK) -> int:
    """Of so many tokens at a time, in float32: the widest layer's inputs and outputs, queries."""
    c = config
    heads = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim + c.head_dim)
    inner = max(c.intermediate_size, c.num_experts_per_tok * c.moe_intermediate_size)
    return 4 * n_tokens * (4 * c.hidden_size * max(1, c.hc_mult) + heads + 3 * inner)


def staging_bytes(config: Config) -> int:
    """Page-locked RAM: a chunk's hidden vectors and the experts' sums, float32, its choices (int64) and weights."""
    return PREFILL_CHUNK * (2 * 4 * config.hidden_size + (8 + 4) * config.num_experts_per_tok)
