"""The tensors that a Hugging Face checkpoint of a given config.json holds: names and shapes, without the checkpoint.

Source: modeling_deepseek.py of deepseek-ai/DeepSeek-V3, and transformers' modeling_llama.py and modeling_qwen2.py. What
is listed here is checked by the converter, which wants every tensor in its shape and none besides.
"""

from collections.abc import Iterator

from localrun.convert.builder import Settings
from localrun.errors import LocalrunError

Shapes = Iterator[tuple[str, tuple[int, ...]]]

MAX_LAYERS, MAX_EXPERTS = 512, 1024  # llama.cpp's limits, llama.h @3f545becc; no published model is near them


def checkpoint_shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Name -> shape. Raises CheckpointError on what is missing or no number, LocalrunError on absurd sizes."""
    _refuse_absurd(settings)
    shapes = dict(_model(settings))
    for name, shape in shapes.items():
        if 0 in shape:
            raise LocalrunError(f"{settings.where}: its sizes give '{name}' the shape {list(shape)}")
    return shapes


def _refuse_absurd(settings: Settings) -> None:
    for key, most in (("num_hidden_layers", MAX_LAYERS), ("n_routed_experts", MAX_EXPERTS)):
        found = settings.get(key, int, 0)
        if found > most:
            raise LocalrunError(f"{settings.where}: {key} is {found}; expected at most {most}")
    n_nextn = settings.get("num_nextn_predict_layers", int, 0)
    if n_nextn > MAX_LAYERS:
        raise LocalrunError(f"{settings.where}: num_nextn_predict_layers is {n_nextn}; expected at most {MAX_LAYERS}")


def _model(settings: Settings) -> Shapes:
    vocab, hidden = settings.get("vocab_size", int), settings.get("hidden_size", int)
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    if not settings.get("tie_word_embeddings", bool, False):
        yield "lm_head.weight", (vocab, hidden)
    n_layers, n_nextn = settings.get("num_hidden_layers", int), settings.get("num_nextn_predict_layers", int, 0)
    is_latent = settings.get("kv_lora_rank", int, 0) > 0
    for index in range(n_layers + (n_nextn if is_latent else 0)):
        prefix = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", (hidden,)
        yield from _latent_attention(settings, prefix) if is_latent else _attention(settings, prefix)
        is_moe = is_latent and index >= settings.get("first_k_dense_replace", int, 0)
        yield from (
            _experts(settings, prefix)
            if is_moe
            else _mlp(prefix + "mlp", hidden, settings.get("intermediate_size", int))
        )
        if index >= n_layers:
            yield from _nextn(prefix, hidden, vocab)


def _attention(settings: Settings, prefix: str) -> Shapes:
    hidden, heads = settings.get("hidden_size", int), settings.get("num_attention_heads", int)
    head_dim = settings.get("head_dim", int, hidden // max(heads, 1))
    kv_rows = settings.get("num_key_value_heads", int, heads) * head_dim
    yield f"{prefix}self_attn.q_proj.weight", (heads * head_dim, hidden)
    yield f"{prefix}self_attn.k_proj.weight", (kv_rows, hidden)
    yield f"{prefix}self_attn.v_proj.weight", (kv_rows, hidden)
    yield f"{prefix}self_attn.o_proj.weight", (hidden, heads * head_dim)


def _latent_attention(settings: Settings, prefix: str) -> Shapes:
    def size(key: str) -> int:
        return settings.get(key, int)

    hidden, heads, latent = size("hidden_size"), size("num_attention_heads"), size("kv_lora_rank")
    query_rows = heads * (size("qk_nope_head_dim") + size("qk_rope_head_dim"))
    q_lora_rank = settings.get("q_lora_rank", int, None)
    prefix += "self_attn."
    if q_lora_rank is None:
        yield prefix + "q_proj.weight", (query_rows, hidden)
    else:
        yield prefix + "q_a_proj.weight", (q_lora_rank, hidden)
        yield prefix + "q_a_layernorm.weight", (q_lora_rank,)
        yield prefix + "q_b_proj.weight", (query_rows, q_lora_rank)
    yield prefix + "kv_a_proj_with_mqa.weight", (latent + size("qk_rope_head_dim"), hidden)
    yield prefix + "kv_a_layernorm.weight", (latent,)
    yield prefix + "kv_b_proj.weight", (heads * (size("qk_nope_head_dim") + size("v_head_dim")), latent)
    yield prefix + "o_proj.weight", (hidden, heads * size("v_head_dim"))


def _mlp(prefix: str, hidden: int, inner: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def _experts(settings: Settings, prefix: str) -> Shapes:
    hidden, n_experts = settings.get("hidden_size", int), settings.get("n_routed_experts", int)
    inner, n_shared = settings.get("moe_intermediate_size", int), settings.get("n_shared_experts", int, 0)
    yield prefix + "mlp.gate.weight", (n_experts, hidden)
    has_bias = settings.values["architectures"] == ["DeepseekV3ForCausalLM"]
    if settings.get("topk_method", str, "noaux_tc" if has_bias else "greedy") == "noaux_tc":
        yield prefix + "mlp.gate.e_score_correction_bias", (n_experts,)
    for expert in range(n_experts):
        yield from _mlp(f"{prefix}mlp.experts.{expert}", hidden, inner)
    if n_shared:
        yield from _mlp(prefix + "mlp.shared_experts", hidden, n_shared * inner)


def _nextn(prefix: str, hidden: int, vocab: int) -> Shapes:
    """What a layer for multi-token prediction has besides; the published checkpoints repeat embedding and head."""
    yield prefix + "eh_proj.weight", (hidden, 2 * hidden)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{prefix}{norm}.weight", (hidden,)
    for matrix in ("embed_tokens", "shared_head.head"):
        yield f"{prefix}{matrix}.weight", (vocab, hidden)
