"""Write a GGUF of a published shape with random weights in real quantised blocks, for measuring speed.

    python scripts/make_synthetic.py SHAPE OUT.gguf [--mix scripts/mixes/ud-iq2_xxs.mix]

Shapes:
    v2-lite       DeepSeek-V2-Lite: 27 layers, 64 experts of 1408 columns (which fall back to Q5_0 and Q8_0), softmax
    16b-v3-style  about V2-Lite's size with V3's routing (sigmoid, bias, groups); experts of 1536: K-quants throughout
    v3-slice      DeepSeek-V3's full width, but 1 dense and 1 MoE layer and a vocabulary of 4,096
    glm-4.5-air-slice, minimax-m2-slice, hy3-slice, qwen3-30b-a3b-slice, mixtral-8x7b-slice, glm-4.7-flash-slice
                  the published widths, and as many layers as make 6 to 10 GB
    ling-mini-2.0 Ling-mini-2.0 as published: 16 billion weights
    gpt-oss-20b-slice  the same, its full width and 16 of its 24 layers
    16b-v3.2-style
                  about V2-Lite's size with V3.2's layers: indexers, routing; a quarter of its heads
    v3.2-attention, glm-5.2-attention
                  full width, 3 and 6 layers (3 and 3 of 6 with an indexer), 16 experts in one: scripts/bench_sparse.py
    v4-attention  DeepSeek-V4-Flash's full width: 5 layers of ratios 0, 4, 128, 16 experts: scripts/bench_prompt.py
    v4-flash-slice
                  DeepSeek-V4-Flash's full width: 6 layers, 2 of each ratio, the first hashed; 96 of its 256 experts
    16b-v4-style  about V2-Lite's size with V4's layers: 2 without pooled rows, then ratios 4 and 128 in turn
    tiny          4 small layers with V3's routing

Types are those of llama-quantize's Q4_K_M, attn_k_b and attn_v_b included, of gpt-oss and V4 their own MXFP4 experts
and Q8_0, or those of a mix file (scripts/mixes has published ones); blocks of types that nothing packs are random bytes
with fitting scales. Weights are Gaussian, scaled so that activations stay near 1 through all layers. A pool of blocks
is packed once for each type and scale; tensors are random draws from it, so that a file of 10 GB takes a minute or less
and little memory. Bytes depend on nothing but the shape and the types.
The vocabulary is byte-level BPE with made-up words. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, TokenType

from localrun.convert.layout import Layout, make_layout
from localrun.convert.made_up import made_up_blocks
from localrun.convert.metadata import Metadata
from localrun.convert.mixes import (
    TABLE,
    Override,
    choose_types,
    file_type,
    is_table,
    parse_override,
    read_mix_file,
)
from localrun.convert.output import check_space, partial_path
from localrun.convert.plan import QUANTIZATION_VERSION
from localrun.hardware import usable_cores
from localrun.models.config import Config
from localrun.models.names import EMBED_TOKENS
from localrun.plan.known import load_data
from localrun.plan.shapes import from_config
from quant.formats import registry
from quant.threads.pool import Pool

# The converter gives these more bits; llama-quantize does not.
OVERRIDES = (parse_override("attn_k_b=Q5_0"), parse_override("attn_v_b=Q4_K"))
POOL_WEIGHTS = 1 << 21  # a pool is 1-2 MB of blocks: stays in a core's cache while it is drawn from
CHUNK_BYTES = 16 << 20  # written at a time
BOS, EOS, FIRST_WORD = 256, 257, 259


def _published(name: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a model that `localrun plan` knows, with changes and without multi-token prediction."""
    return load_data("models")[name]["config"] | {"num_nextn_predict_layers": 0} | changes


_V3_ROUTER = {
    "architectures": ["DeepseekV3ForCausalLM"], "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
}  # fmt: skip
_FEW_EXPERTS = {"n_routed_experts": 16, "n_group": 1, "topk_group": 1, "vocab_size": 4096}
SHAPES = {
    "v2-lite": _published("deepseek-v2-lite"),
    "16b-v3-style": _published("deepseek-v2-lite", **_V3_ROUTER, intermediate_size=10752, moe_intermediate_size=1536),
    "v3-slice": _published("deepseek-v3", num_hidden_layers=2, first_k_dense_replace=1, vocab_size=4096),
    "glm-4.5-air-slice": _published("glm-4.5-air", num_hidden_layers=6),
    "minimax-m2-slice": _published("minimax-m2", num_hidden_layers=4),
    "hy3-slice": _published("hy3", num_hidden_layers=4),
    "ling-mini-2.0": _published("ling-mini-2.0"),
    "qwen3-30b-a3b-slice": _published("qwen3-30b-a3b", num_hidden_layers=24),
    "mixtral-8x7b-slice": _published("mixtral-8x7b", num_hidden_layers=10),
    "glm-4.7-flash-slice": _published("glm-4.7-flash", num_hidden_layers=24),
    "gpt-oss-20b-slice": load_data("models")["gpt-oss-20b"]["config"] | {"num_hidden_layers": 16},
    "16b-v3.2-style": _published(
        "deepseek-v3.2", hidden_size=2048, intermediate_size=10752, moe_intermediate_size=1536, num_hidden_layers=27,
        first_k_dense_replace=1, num_attention_heads=32, index_n_heads=16, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, vocab_size=102400,
    ),
    "v3.2-attention": _published("deepseek-v3.2", num_hidden_layers=3, first_k_dense_replace=2, **_FEW_EXPERTS),
    "glm-5.2-attention": _published("glm-5.2", num_hidden_layers=6, first_k_dense_replace=5, **_FEW_EXPERTS),
    "v4-attention": _published(
        "deepseek-v4-flash", num_hidden_layers=5, compress_ratios=[0, 4, 128, 4, 128], num_hash_layers=1,
        n_routed_experts=16, vocab_size=4096,
    ),
    "v4-flash-slice": _published(
        "deepseek-v4-flash", num_hidden_layers=6, compress_ratios=[0, 0, 4, 128, 4, 128], num_hash_layers=1,
        n_routed_experts=96, vocab_size=4096,
    ),
    "16b-v4-style": _published(
        "deepseek-v4-flash", num_hidden_layers=27, compress_ratios=[0, 0] + [4, 128] * 12 + [4], hidden_size=2048,
        moe_intermediate_size=1536, n_routed_experts=64, num_attention_heads=16, q_lora_rank=512, o_groups=4,
        o_lora_rank=512, index_n_heads=16, vocab_size=102400,
    ),
    "tiny": _published(
        "deepseek-v3", hidden_size=256, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=4,
        first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, vocab_size=512, n_routed_experts=16, num_experts_per_tok=4, n_group=4,
        topk_group=2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor to be made: shape in NumPy order, standard deviation and mean of its weights.

    n_experts: of a table, whose rows are ids of experts.
    """

    name: str
    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0
    n_experts: int = 0


def _tensor(name: str, shape: tuple[int, ...], c: Config) -> Tensor:
    """Rows that map unit-variance inputs to outputs of standard deviation 1, or to a branch's share of the residual."""
    # Two branches a layer add up to about the embedding's own variance over all layers.
    residual_gain = 1.5 / sqrt(2 * c.num_hidden_layers)
    # silu(gate) * up deviates by about 0.6 for unit gate and up; 1.6 makes up for it.
    down_gain = 1.6 * residual_gain
    if is_table(Tensor(name, shape, 0.0)):
        return Tensor(name, shape, 0.0, n_experts=c.n_routed_experts)
    if name == EMBED_TOKENS:
        return Tensor(name, shape, 1.0)
    if len(shape) == 1 or name.endswith(".bias"):
        return Tensor(name, shape, 0.1, mean=1.0 if name.endswith("norm.weight") else 0.0)
    if ".attn_k_b." in name:  # stored transposed
        return Tensor(name, shape, 1 / sqrt(shape[-2]))
    gain = 1.0
    if ".attn_output." in name or ".attn_output_b." in name:
        gain = residual_gain
    elif ".ffn_down_exps." in name:
        # What the weights of the chosen experts add up to; softmax without normalisation: each about 1/experts.
        sums_to_1 = c.norm_topk_prob or c.scoring_func == "softmax_after_topk"
        share = 1.0 if sums_to_1 else c.num_experts_per_tok / c.n_routed_experts
        gain = down_gain / (share * c.routed_scaling_factor)
    elif ".ffn_down" in name:
        gain = down_gain
    return Tensor(name, shape, gain / sqrt(shape[-1]))


def _add_vocabulary(metadata: Metadata, n_vocab: int) -> None:
    """All bytes, two control tokens, a merge (llama.cpp asks for one) and words that no text contains."""
    letters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # GPT-2's spelling of bytes
    tokens = [chr(byte) for byte in letters] + [chr(0x100 + i) for i in range(256 - len(letters))]
    tokens += ["<bos>", "<eos>", "th"] + [f"\u0120w{index}" for index in range(FIRST_WORD, n_vocab)]
    types = [int(TokenType.NORMAL)] * n_vocab
    types[BOS] = types[EOS] = int(TokenType.CONTROL)
    metadata.string("tokenizer.ggml.model", "gpt2")
    metadata.string("tokenizer.ggml.pre", "deepseek-v3")
    metadata.array("tokenizer.ggml.tokens", GGUFValueType.STRING, tokens)
    metadata.array("tokenizer.ggml.token_type", GGUFValueType.INT32, types)
    metadata.array("tokenizer.ggml.merges", GGUFValueType.STRING, ["t h"])
    metadata.u32("tokenizer.ggml.bos_token_id", BOS)
    metadata.u32("tokenizer.ggml.eos_token_id", EOS)
    metadata.bool("tokenizer.ggml.add_bos_token", True)


def plan(name: str, path: Path, mix_file: Path | None = None) -> tuple[list[Tensor], list[str], Layout]:
    """The tensors of SHAPES[name], their types, and where they lie in the file `path`: the converter's own plan."""
    model = from_config(SHAPES[name], Path(name))
    own = OVERRIDES if model.config.attention == "mla" else ()
    mix, overrides = (model.type, own) if mix_file is None else _written(mix_file)
    metadata, targets = model.conversion.metadata, model.conversion.targets
    metadata.string("general.name", f"synthetic {name}")
    types = choose_types(targets, metadata, mix, overrides)
    metadata.u32("general.quantization_version", QUANTIZATION_VERSION)
    metadata.u32("general.file_type", file_type(mix, targets, types))
    _add_vocabulary(metadata, model.config.vocab_size)
    tensors = [_tensor(target.name, target.shape, model.config) for target in targets]
    return tensors, types, make_layout(path, metadata, targets, types)


def _written(path: Path) -> tuple[str | None, list[Override]]:
    """The base and the lines of a mix file."""
    written = read_mix_file(path)
    return written.base, written.overrides


class Weights:
    """Makes the bytes of tensors."""

    def __init__(self, workers: Pool) -> None:
        self._workers = workers
        self._pools: dict[tuple[str, float], np.ndarray] = {}

    def chunks(self, tensor: Tensor, type_: str) -> Iterator[np.ndarray]:
        """The tensor's bytes, in arrays of at most CHUNK_BYTES."""
        random = np.random.default_rng(zlib.crc32(tensor.name.encode()))
        if type_ == TABLE:
            yield _ids(tensor, random)
            return
        if type_ == "F32":  # norms, biases, routers: small
            yield tensor.mean + tensor.deviation * random.standard_normal(tensor.shape, dtype=np.float32)
            return
        blocks = self._pool(type_, tensor.deviation)
        n_blocks, at_once = prod(tensor.shape) // registry.get(type_).block, CHUNK_BYTES // blocks.shape[1]
        for first in range(0, n_blocks, at_once):
            chosen = random.integers(0, len(blocks), min(at_once, n_blocks - first), dtype=np.int32)
            yield blocks.take(chosen, axis=0)

    def _pool(self, type_: str, deviation: float) -> np.ndarray:
        """Blocks of Gaussian weights, uint8 (POOL_WEIGHTS / block, block_bytes)."""
        if (type_, deviation) not in self._pools:
            n_blocks, seed = POOL_WEIGHTS // registry.get(type_).block, zlib.crc32(type_.encode())
            self._pools[type_, deviation] = made_up_blocks(self._workers, type_, n_blocks, deviation, seed)
        return self._pools[type_, deviation]


def _ids(tensor: Tensor, random: np.random.Generator) -> np.ndarray:
    """int32 (tokens, ids): different experts in each row, anywhere."""
    n_tokens, n_ids = tensor.shape
    spread = np.arange(n_ids) * (tensor.n_experts // n_ids)
    return ((random.integers(tensor.n_experts, size=(n_tokens, 1)) + spread) % tensor.n_experts).astype(np.int32)


def write(name: str, path: Path, mix_file: Path | None = None) -> dict:
    """Write SHAPES[name] to path, by way of a temporary file beside it; what was written."""
    start = time.perf_counter()
    tensors, types, layout = plan(name, path, mix_file)
    check_space(layout, path)
    workers = Pool(usable_cores())
    weights, partial = Weights(workers), partial_path(path)
    try:
        with open(partial, "wb") as file:
            file.write(layout.parts[0].header)
            for tensor, type_, place in zip(tensors, types, layout.places, strict=True):
                file.seek(place.offset)
                for chunk in weights.chunks(tensor, type_):
                    file.write(memoryview(chunk).cast("B"))
            file.truncate(layout.size)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        workers.close()
    bytes_by_type: dict[str, int] = {}
    for type_, place in zip(types, layout.places, strict=True):
        bytes_by_type[type_] = bytes_by_type.get(type_, 0) + place.n_bytes
    return {
        "path": str(path),
        "shape": name,
        "mix": mix_file.name if mix_file else from_config(SHAPES[name], Path(name)).type,
        "parameters": sum(prod(tensor.shape) for tensor in tensors),
        "file_bytes": layout.size,
        "bytes_by_type": bytes_by_type,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Write the file; say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--mix", type=Path, metavar="FILE", help="types, as for `localrun convert --mix`")
    arguments = parser.parse_args()
    print(json.dumps(write(arguments.shape, arguments.out, arguments.mix)))


if __name__ == "__main__":
    main()
