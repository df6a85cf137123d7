"""Checkpoint folders of tiny random models, made and evaluated by transformers: the oracle for the converter.

Weights are scaled so that activations stay near 1 and attention, router and experts all matter to the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

DEEPSEEK = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 64,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 1024,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 256,
}
V3 = DEEPSEEK | {"n_group": 4, "topk_group": 2, "rope_parameters": YARN}
GLM4_MOE_LITE = DEEPSEEK | {"v_head_dim": 48}
# 16 tokens see more than they choose; llama.cpp turns an indexer's head by blocks of 64.
SPARSE = DEEPSEEK | {"index_topk": 6, "index_n_heads": 12, "index_head_dim": 64}
DEEPSEEK32 = SPARSE | {"n_group": 4, "topk_group": 2, "rope_parameters": YARN}
GLM_DSA = SPARSE | {"rms_norm_eps": 1e-6, "indexer_types": ["full", "shared", "full"]}
# llama.cpp tells models without q_lora_rank by their 27 layers, hence so deep and narrow.
LITE = DEEPSEEK | {"num_hidden_layers": 27, "q_lora_rank": None, "hidden_size": 64, "n_shared_experts": 2}
LLAMA = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
QWEN3_MOE = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
}
_GROUPED = {name: value for name, value in QWEN3_MOE.items() if name not in ("num_experts", "norm_topk_prob")}
GLM4_MOE = _GROUPED | {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "attention_bias": True,
    "use_qk_norm": True,
}
MINIMAX_M2 = {name: value for name, value in _GROUPED.items() if name != "moe_intermediate_size"} | {
    "intermediate_size": 64,  # of experts
    "num_local_experts": 8,
    "rotary_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTRAL = LLAMA | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
DOTS1 = _GROUPED | {
    "num_key_value_heads": 6,  # llama.cpp knows no other
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
}
ERNIE4_5_MOE = {name: value for name, value in _GROUPED.items() if name != "num_experts_per_tok"} | {
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}
# BailingMoeV2's arithmetic is Glm4Moe's; its class is not in transformers. llama.cpp wants 96 as the heads' width.
BAILINGMOE2 = GLM4_MOE | {"attention_bias": False, "num_attention_heads": 3, "num_key_value_heads": 1}
BAILINGMOE2 |= {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "rms_norm_eps": 1e-6}
_BAILING_NAMES = {
    "model.embed_tokens": "model.word_embeddings", "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm", "self_attn.k_norm": "attention.key_layernorm",
    "gate.e_score_correction_bias": "gate.expert_bias",
}  # fmt: skip
HY_V3 = _GROUPED | {"num_experts": 8, "num_shared_experts": 1}
DEEPSEEK4 = {
    "vocab_size": 320,
    "hidden_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 64,
    "partial_rotary_factor": 0.25,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "compressed_sparse_attention"],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "index_n_heads": 12,
    "index_head_dim": 64,
    "index_topk": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "swiglu_limit": 2.0,
    "max_position_embeddings": 1024,
    "num_nextn_predict_layers": 0,
}
GPT_OSS = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 8,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
}
TRAINED_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NULL: Any = object()  # for edit_config
PROMPT = [3, 17, 200, 5, 9, 80, 41, 7, 7, 250, 11, 13, 319, 0, 64, 128]


def make(kind: str, config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """A model of transformers' class (DeepseekV3, Llama and so on), random weights in float32."""
    import transformers

    settings = getattr(transformers, f"{kind}Config")(**config, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int, matrices: bool = True) -> None:
    """Random norms and biases for the choice of experts, away from where training starts, and matrices."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.copy_(1 + 0.1 * values)
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(0.1 * values)
            elif name.endswith("tid2eid"):  # of each token others than before, none twice
                first = torch.randint(1 << 20, (len(tensor), 1), generator=generator)
                tensor.copy_((first + torch.arange(tensor.shape[1])) % model.config.n_routed_experts)
            elif matrices:
                tensor.copy_(values * (1.0 if "embed" in name else 1.2 / tensor.shape[-1] ** 0.5))


def save(model: torch.nn.Module, folder: Path, **options: Any) -> Path:
    """The folder, as save_pretrained writes it."""
    model.save_pretrained(folder, **options)
    return folder


def logits(model: torch.nn.Module, ids: list[int] = PROMPT) -> np.ndarray:
    """float32 (T, vocab)."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one, NULL sets it to null."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None or key not in changes}
    path.write_text(json.dumps({key: None if value is NULL else value for key, value in config.items()}))


def edit_tensors(folder: Path, change: Any, file: str = "model.safetensors") -> None:
    """Let change() edit the dict of a shard's tensors in place."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)


def as_bailingmoe2(folder: Path) -> Path:
    """The folder, a Glm4Moe's checkpoint under BailingMoeV2's names: of tensors and of config.json's keys."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("self_attn.q_proj.weight")]:
            parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            tensors[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
        for name in list(tensors):
            for theirs, own in _BAILING_NAMES.items():
                if theirs in name:
                    tensors[name.replace(theirs, own)] = tensors.pop(name)

    edit_tensors(folder, change)
    config = json.loads((folder / "config.json").read_text())
    names = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
    own = {new: config[old] for old, new in names.items()} | dict.fromkeys(names)
    own |= {"partial_rotary_factor": 0.5, "rope_theta": 1e6, "rope_parameters": None, "attention_bias": None}
    edit_config(folder, architectures=["BailingMoeV2ForCausalLM"], num_nextn_predict_layers=0, **own)
    return folder


def to_fp8(
    weight: torch.Tensor, block: tuple[int, int], powers: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(FP8 weight, scale_inv a block, what they stand for), blocks at the edges trimmed; scales may be powers of 2."""
    rows, cols = weight.shape
    scale = torch.empty(-(-rows // block[0]), -(-cols // block[1]))
    quantized, meant = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scale[i, j] = weight[place].abs().max() / 448
            scale[i, j] = scale[i, j].log2().ceil().exp2() if powers else scale[i, j]
            quantized[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
            meant[place] = quantized[place].float() * scale[i, j]
    return quantized, scale, meant


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(blocks, scales, what they stand for) of (..., rows, cols): 32 neighbours share a power of 2."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    parts = weight.unflatten(-1, (-1, 32))
    exponent = (parts.abs().amax(-1).clamp_min(1e-30).log2().floor() - 2).clamp(-127, 127)
    scaled = parts / exponent.exp2()[..., None]
    codes = (scaled[..., None] - values).abs().argmin(-1)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    meant = (values[codes] * exponent.exp2()[..., None]).flatten(-2)
    return blocks.to(torch.uint8), (exponent + 127).to(torch.uint8), meant
