"""GGUF tensor names against Hugging Face module names, and which tensors with which shapes a model must have.

Source: llama.cpp 3f545becc, gguf-py/gguf/tensor_mapping.py and conversion/deepseek.py.
Letters: D hidden_size, H heads, C kv_lora_rank, R qk_rope_head_dim, E experts.
"""

import re
from collections.abc import Callable

from localrun.errors import GGUFError, UnsupportedModelError
from localrun.gguf.file import GGUFFile
from localrun.models.config import Config
from quant.formats import registry

EMBED_TOKENS = "token_embd.weight"
NORM = "output_norm.weight"
LM_HEAD = "output.weight"
ROPE_FREQS = "rope_freqs.weight"

# Tensors of which single rows or columns are read.
READ_BY_ROW = re.compile(r"embd|embed_tokens|attn_(kv|k|v)_b\.")

LAYER = {
    "input_layernorm": "attn_norm.weight",
    "self_attn.q_proj": "attn_q.weight",
    "self_attn.k_proj": "attn_k.weight",
    "self_attn.v_proj": "attn_v.weight",
    "self_attn.o_proj": "attn_output.weight",
    "self_attn.q_a_proj": "attn_q_a.weight",
    "self_attn.q_a_layernorm": "attn_q_a_norm.weight",
    "self_attn.q_b_proj": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj": "attn_kv_b.weight",
    "self_attn.k_b_proj": "attn_k_b.weight",
    "self_attn.v_b_proj": "attn_v_b.weight",
    "post_attention_layernorm": "ffn_norm.weight",
    "mlp.gate_proj": "ffn_gate.weight",
    "mlp.up_proj": "ffn_up.weight",
    "mlp.down_proj": "ffn_down.weight",
    "mlp.gate": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.gate_proj": "ffn_gate_exps.weight",
    "mlp.experts.up_proj": "ffn_up_exps.weight",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj": "ffn_down_shexp.weight",
    # of layers for multi-token prediction
    "eh_proj": "nextn.eh_proj.weight",
    "enorm": "nextn.enorm.weight",
    "hnorm": "nextn.hnorm.weight",
    "embed_tokens": "nextn.embed_tokens.weight",
    "shared_head.head": "nextn.shared_head_head.weight",
    "shared_head.norm": "nextn.shared_head_norm.weight",
}


def layer(index: int, module: str) -> str:
    """The GGUF name of a module of a layer: (3, "self_attn.o_proj") -> "blk.3.attn_output.weight"."""
    return f"blk.{index}.{LAYER[module]}"


def check_tensors(file: GGUFFile, config: Config) -> None:
    """Every tensor that the model needs is there in its shape, and none that would go unused.

    Raises:
        GGUFError: a tensor is missing or has another shape.
        UnsupportedModelError: a tensor has no place in the native network.
    """
    expected = expected_shapes(file, config)
    for name, shape in expected.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            raise GGUFError(f"{file.path}: tensor '{name}' not found; expected shape {shape}")
        if tensor.shape != shape:
            raise GGUFError(f"{file.path}: tensor '{name}' has shape {tensor.shape}; expected {shape}")
    for name in file.tensors:
        if name not in expected and not is_nextn(name, config):
            raise UnsupportedModelError(f"{file.path}: tensor '{name}' has no place in the native network")


def check_types(file: GGUFFile) -> None:
    """Every tensor has a type that there are kernels for. Raises UnsupportedModelError."""
    for tensor in file.tensors.values():
        known = registry.NAMES if READ_BY_ROW.search(tensor.name) else (*registry.NAMES, *registry.INTERLEAVED)
        if tensor.type.name not in known:
            raise UnsupportedModelError(f"{file.path}: tensor '{tensor.name}' has type {tensor.type.name}, not native")


def expected_shapes(file: GGUFFile, config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape (NumPy order) of all tensors that the model reads, given which optional ones the file has."""
    c = config
    shapes = {EMBED_TOKENS: (c.vocab_size, c.hidden_size), NORM: (c.hidden_size,)}
    if LM_HEAD in file.tensors:
        shapes[LM_HEAD] = (c.vocab_size, c.hidden_size)
    if ROPE_FREQS in file.tensors and c.architecture == "llama":
        shapes[ROPE_FREQS] = (c.qk_rope_head_dim // 2,)
    for index in range(c.num_hidden_layers):
        shapes |= _layer_shapes(file, c, index)
    return shapes


def _layer_shapes(file: GGUFFile, c: Config, index: int) -> dict[str, tuple[int, ...]]:
    attention = _mla(file, c, index) if c.kv_lora_rank else _gqa(c)
    modules = {"input_layernorm": (c.hidden_size,), "post_attention_layernorm": (c.hidden_size,)}
    return {layer(index, module): shape for module, shape in (modules | attention | _mlp(file, c, index)).items()}


def has_mtp(file: GGUFFile, config: Config) -> bool:
    """Whether all of the first layer for multi-token prediction is there, in its shapes."""
    if config.num_nextn_predict_layers == 0:
        return False
    shapes, index = _layer_shapes(file, config, config.num_hidden_layers), config.num_hidden_layers
    shapes[layer(index, "eh_proj")] = (config.hidden_size, 2 * config.hidden_size)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        shapes[layer(index, norm)] = (config.hidden_size,)
    for name in mtp_shared(file.tensors.__contains__, index):
        shapes[name] = (config.vocab_size, config.hidden_size)
    return all(name in file.tensors and file.tensors[name].shape == shape for name, shape in shapes.items())


def mtp_shared(has: Callable[[str], bool], index: int) -> tuple[str, str]:
    """Names of the embedding and the head of layer `index`, for multi-token prediction: its own, or the model's."""
    embedding, head = layer(index, "embed_tokens"), layer(index, "shared_head.head")
    model_head = LM_HEAD if has(LM_HEAD) else EMBED_TOKENS
    return embedding if has(embedding) else EMBED_TOKENS, head if has(head) else model_head


def is_nextn(name: str, config: Config) -> bool:
    """Whether a tensor belongs to a multi-token-prediction layer, behind the last ordinary one."""
    match = re.match(r"blk\.([0-9]+)\.", name)
    return match is not None and 0 <= int(match[1]) - config.num_hidden_layers < config.num_nextn_predict_layers


def _gqa(c: Config) -> dict[str, tuple[int, ...]]:
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    return {
        "self_attn.q_proj": (heads * c.head_dim, c.hidden_size),
        "self_attn.k_proj": (kv_heads * c.head_dim, c.hidden_size),
        "self_attn.v_proj": (kv_heads * c.v_head_dim, c.hidden_size),
        "self_attn.o_proj": (c.hidden_size, heads * c.v_head_dim),
    }


def _mla(file: GGUFFile, c: Config, index: int) -> dict[str, tuple[int, ...]]:
    heads, latent, nope = c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim
    query_rows = heads * (nope + c.qk_rope_head_dim)
    shapes = {
        "self_attn.kv_a_proj_with_mqa": (latent + c.qk_rope_head_dim, c.hidden_size),
        "self_attn.kv_a_layernorm": (latent,),
        "self_attn.o_proj": (c.hidden_size, heads * c.v_head_dim),
    }
    if c.q_lora_rank is None:
        shapes["self_attn.q_proj"] = (query_rows, c.hidden_size)
    else:
        shapes["self_attn.q_a_proj"] = (c.q_lora_rank, c.hidden_size)
        shapes["self_attn.q_a_layernorm"] = (c.q_lora_rank,)
        shapes["self_attn.q_b_proj"] = (query_rows, c.q_lora_rank)
    if layer(index, "self_attn.kv_b_proj") in file.tensors:
        shapes["self_attn.kv_b_proj"] = (heads * (nope + c.v_head_dim), latent)
    else:
        shapes["self_attn.k_b_proj"] = (heads, latent, nope)
        shapes["self_attn.v_b_proj"] = (heads, c.v_head_dim, latent)
    return shapes


def _mlp(file: GGUFFile, c: Config, index: int) -> dict[str, tuple[int, ...]]:
    def dense(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.gate_proj": (inner, c.hidden_size),
            f"{prefix}.up_proj": (inner, c.hidden_size),
            f"{prefix}.down_proj": (c.hidden_size, inner),
        }

    if layer(index, "mlp.gate") not in file.tensors:
        return dense("mlp", c.intermediate_size)
    n_experts, inner = c.n_routed_experts, c.moe_intermediate_size
    shapes = {
        "mlp.gate": (n_experts, c.hidden_size),
        "mlp.experts.down_proj": (n_experts, c.hidden_size, inner),
    }
    if layer(index, "mlp.experts.gate_up_proj") in file.tensors:
        shapes["mlp.experts.gate_up_proj"] = (n_experts, 2 * inner, c.hidden_size)
    else:
        shapes["mlp.experts.gate_proj"] = (n_experts, inner, c.hidden_size)
        shapes["mlp.experts.up_proj"] = (n_experts, inner, c.hidden_size)
    if layer(index, "mlp.gate.e_score_correction_bias") in file.tensors:
        shapes["mlp.gate.e_score_correction_bias"] = (n_experts,)
    shared = file.tensors.get(layer(index, "mlp.shared_experts.gate_proj"))
    if shared is not None:
        shapes |= dense("mlp.shared_experts", shared.shape[0])
    return shapes
