"""A trained model as a Hugging Face checkpoint: BF16, FP8 as DeepSeek-V3 is published, or float32 as it was trained.

Names and shapes are those of deepseek-ai/DeepSeek-V3: one tensor an expert and projection, the MTP module as the layer
behind the last. Embedding and head, which the module shares, are stored once. In FP8 the linear layers' weights are
E4M3 with weight_scale_inv by 128x128 blocks; embedding, head, routers, norms and eh_proj stay BF16 as there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from miniature.config import Config
from miniature.data import BOS, EOS
from miniature.precision import E4M3_MAX, TILE

_STAY = ("e_score_correction_bias", "_scale_inv")  # in float32
_NOT_FP8 = ("embed_tokens", "lm_head", "mlp.gate.weight", "norm", "eh_proj")
_FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [TILE, TILE],
}


def trained_config(settings: dict[str, Any]) -> Config:
    """The model's sizes from a checkpoint's settings, with the positions that training saw: none beyond was learnt."""
    return replace(Config(**settings["model"]), max_position_embeddings=settings["length"])


def export(
    config: Config,
    state: dict[str, torch.Tensor],
    tokenizer: Path,
    folder: Path,
    fp8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes the checkpoint folder.

    Args:
        state: of miniature.model.Model.
        tokenizer: its tokenizer.json.
        dtype: of all weights that fp8 does not put into E4M3.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _to_fp8(_unstack(state)) if fp8 else _unstack(state)
    tensors = {name: tensor.to(_stored_dtype(name, tensor, dtype)) for name, tensor in tensors}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config_json = checkpoint_config(config, fp8) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    _write_json(folder / "config.json", config_json)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(config))
    _write_json(folder / "generation_config.json", _GENERATION)


def checkpoint_config(config: Config, fp8: bool = False) -> dict[str, object]:
    """What config.json says, in the words of DeepSeek-V3's."""
    if not config.n_routed_experts:
        raise ValueError("the dense model for comparison has blocks of two widths, which config.json cannot say")
    fixed = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "num_key_value_heads": config.num_attention_heads,
        "rope_interleave": True,
        "rope_scaling": None,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "use_cache": True,
    }
    return fixed | config.to_dict() | ({"quantization_config": _FP8_CONFIG} if fp8 else {})


_GENERATION = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.5, "top_p": 0.95}


def _tokenizer_config(config: Config) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }


def _unstack(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Stacked experts as one tensor an expert and projection; everything else as it is."""
    for name, tensor in state.items():
        prefix, _, part = name.rpartition("experts.")
        if part not in ("gate_up_proj", "down_proj"):
            yield name, tensor
            continue
        for index, matrix in enumerate(tensor):
            halves = zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)
            for projection, weight in halves if part == "gate_up_proj" else [(part, matrix)]:
                yield f"{prefix}experts.{index}.{projection}.weight", weight


def _stored_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return tensor.dtype if name.endswith(_STAY) or tensor.dtype == torch.float8_e4m3fn else dtype


def _to_fp8(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        if name.endswith(_STAY) or any(part in name for part in _NOT_FP8):
            yield name, tensor
            continue
        scale_inv = _block_scales(tensor)
        spread = scale_inv.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
        yield name, (tensor / spread[: tensor.shape[0], : tensor.shape[1]]).to(torch.float8_e4m3fn)
        yield f"{name}_scale_inv", scale_inv


def _block_scales(weight: torch.Tensor) -> torch.Tensor:
    """float32 (ceil(O/128), ceil(I/128)): each block's largest magnitude over 448; 1 where that is 0."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % TILE, 0, -rows % TILE))
    scale = padded.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).abs().amax((1, 3)) / E4M3_MAX
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
