"""How long a layer's attention over the latent cache takes while decoding: bench_hybrid.py's part for it.

What is timed: the two kernels of localrun.gpu.attention.flash_decoding.attend, captured for many layers in one CUDA
graph, so neither launches nor a warm L2 cache count. Needs torch, Triton, Numba and a GPU.
"""

from collections.abc import Sequence

import torch

from hybrid.kernels import captured, seconds
from localrun.gpu.attention.flash_decoding import attend, pieces_for
from localrun.gpu.caches.cache import new_cache
from localrun.gpu.caches.latent import LatentCache, row_bytes
from localrun.models.config import Config

CONTEXTS = (1024, 8192, 32768, 131072)
_LAYERS = 61
_CACHE_BYTES = 3 << 30  # more than any L2 cache; layers are left out where they would take more
_HEADS = {"V3": 128, "V2-Lite": 16}


def config(model: str) -> Config:
    """Latent attention's sizes of "V3" or "V2-Lite"."""
    return Config(
        architecture="deepseek2", attention="mla", rope="pairs",
        hidden_size=7168, intermediate_size=1, num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS[model], vocab_size=1, max_position_embeddings=163840, rms_norm_eps=1e-6,
        rope_theta=1e4, rope_scaling=None, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512, qk_nope_head_dim=128,
    )  # fmt: skip


def time_decode(
    model: str = "V3", contexts: Sequence[int] = CONTEXTS, bits: int = 16, n_tokens: int = 1
) -> list[dict[str, float]]:
    """Of each context: seconds a layer, the bytes of its cache, and how many of them are read a second.

    Contexts that the GPU's free memory has no room for are left out.
    """
    device = torch.device("cuda")
    found = []
    for context in contexts:
        layer_bytes = context * row_bytes(config(model), bits)
        room = min(_CACHE_BYTES, torch.cuda.mem_get_info(device)[0] // 2)
        if n_layers := min(_LAYERS, room // layer_bytes):
            found.append(_one_context(config(model), context, bits, n_tokens, n_layers))
    return found


def _one_context(config: Config, context: int, bits: int, n_tokens: int, n_layers: int) -> dict[str, float]:
    device = torch.device("cuda")
    cache = new_cache(config, context, device, bits, n_layers)
    _fill(cache)
    cache.advance(context - n_tokens)
    heads = n_tokens, config.num_attention_heads
    q_latent = torch.randn(*heads, config.kv_lora_rank, device=device)
    q_rope = torch.randn(*heads, config.qk_rope_head_dim, device=device)
    n_pieces = pieces_for(config, device)

    def layers() -> None:
        for layer in range(n_layers):
            attend(q_latent, q_rope, cache, layer, config, 0.04, n_pieces, torch.float16)

    best, median = (time / n_layers for time in seconds(captured(layers), device))
    layer_bytes = context * row_bytes(config, bits)
    return {
        "context": context, "bits": bits, "tokens": n_tokens, "layers": n_layers, "best_s_a_layer": best,
        "median_s_a_layer": median, "cache_gb_a_layer": layer_bytes / 1e9, "best_gb_per_s": layer_bytes / best / 1e9,
    }  # fmt: skip


def _fill(cache: LatentCache) -> None:
    """Rows of a unit normal, as a norm leaves them; in 8 bits, random codes without NaN."""
    if cache.scales is None:
        cache.latents.normal_()
    else:
        cache.latents.random_(0, 0x7F)
        cache.scales.fill_(0.01)
    cache.rope_keys.normal_()
