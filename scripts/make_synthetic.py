"""Write a GGUF of a DeepSeek shape with random weights in real quantised blocks, for measuring speed.

    python scripts/make_synthetic.py SHAPE OUT.gguf

Shapes:
    v2-lite       DeepSeek-V2-Lite: 27 layers, 64 experts of 1408 columns (which fall back to Q5_0 and Q8_0), softmax
    16b-v3-style  about V2-Lite's size with V3's routing (sigmoid, bias, groups); experts of 1536: K-quants throughout
    v3-slice      DeepSeek-V3's full width, but 1 dense and 1 MoE layer and a vocabulary of 4,096
    tiny          4 small layers with V3's routing

Types are those of llama-quantize's Q4_K_M, attn_k_b and attn_v_b included. Weights are Gaussian, scaled so that
activations stay near 1 through all layers. A pool of blocks is packed once for each type and scale; tensors are random
draws from it, so that a file of 10 GB takes a minute or less and little memory. Bytes depend on nothing but the shape.
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

import numpy as np
from gguf import GGUFValueType, TokenType

from localrun.convert.layout import Layout, make_layout
from localrun.convert.metadata import Metadata
from localrun.convert.mixes import MIXES, choose_types, parse_override
from localrun.convert.output import check_space, partial_path
from localrun.convert.targets import Target
from localrun.hardware import usable_cores
from localrun.models.names import EMBED_TOKENS, LM_HEAD, NORM, layer
from quant.formats import registry
from quant.quantize.tensor import pack
from quant.threads.pool import Pool

MIX = "Q4_K_M"
# The converter gives these more bits; llama-quantize does not.
OVERRIDES = (parse_override("attn_k_b=Q5_0"), parse_override("attn_v_b=Q4_K"))
POOL_WEIGHTS = 1 << 21  # a pool is 1-2 MB of blocks: stays in a core's cache while it is drawn from
CHUNK_BYTES = 16 << 20  # written at a time
BOS, EOS, FIRST_WORD = 256, 257, 259


@dataclass(frozen=True)
class Shape:
    """Sizes and settings, named as in config.json."""

    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    vocab_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    mscale_all_dim: float = 1.0
    first_k_dense_replace: int = 1
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128


# V2-Lite and V3: config.json of deepseek-ai/DeepSeek-V2-Lite and deepseek-ai/DeepSeek-V3.
SHAPES = {
    "v2-lite": Shape(
        hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, q_lora_rank=None, vocab_size=102400, n_routed_experts=64, num_experts_per_tok=6,
        n_shared_experts=2, n_group=1, topk_group=1, scoring_func="softmax", norm_topk_prob=False,
        routed_scaling_factor=1.0, mscale_all_dim=0.707,
    ),
    "16b-v3-style": Shape(
        hidden_size=2048, intermediate_size=10752, moe_intermediate_size=1536, num_hidden_layers=27,
        num_attention_heads=16, q_lora_rank=None, vocab_size=102400, n_routed_experts=64, num_experts_per_tok=6,
        n_shared_experts=2, n_group=8, topk_group=4,
    ),
    "v3-slice": Shape(
        hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=2,
        num_attention_heads=128, q_lora_rank=1536, vocab_size=4096, n_routed_experts=256, num_experts_per_tok=8,
        n_shared_experts=1, n_group=8, topk_group=4,
    ),
    "tiny": Shape(
        hidden_size=256, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, q_lora_rank=256, vocab_size=512, n_routed_experts=16, num_experts_per_tok=4,
        n_shared_experts=1, n_group=4, topk_group=2, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor to be made: shape in NumPy order, standard deviation and mean of its weights."""

    name: str
    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0


def tensors_of(s: Shape) -> Iterator[Tensor]:
    """All tensors of a model, in the order of the file."""
    yield Tensor(EMBED_TOKENS, (s.vocab_size, s.hidden_size), 1.0)
    yield _matrix(LM_HEAD, s.vocab_size, s.hidden_size)
    yield _norm(NORM, s.hidden_size)
    # Two branches a layer add up to about the embedding's own variance over all layers.
    residual_gain = 1.5 / sqrt(2 * s.num_hidden_layers)
    for index in range(s.num_hidden_layers):
        yield _norm(layer(index, "input_layernorm"), s.hidden_size)
        yield from _attention(s, index, residual_gain)
        yield _norm(layer(index, "post_attention_layernorm"), s.hidden_size)
        if index < s.first_k_dense_replace:
            yield from _mlp(s, index, "mlp", s.intermediate_size, residual_gain)
        else:
            yield from _moe(s, index, residual_gain)


def _matrix(name: str, *shape: int, gain: float = 1.0) -> Tensor:
    """Rows that map unit-variance inputs to outputs of standard deviation `gain`."""
    return Tensor(name, shape, gain / sqrt(shape[-1]))


def _norm(name: str, n: int) -> Tensor:
    return Tensor(name, (n,), 0.1, mean=1.0)


def _attention(s: Shape, index: int, residual_gain: float) -> Iterator[Tensor]:
    def name(module: str) -> str:
        return layer(index, f"self_attn.{module}")

    heads, rank, hidden = s.num_attention_heads, s.kv_lora_rank, s.hidden_size
    query_rows = heads * (s.qk_nope_head_dim + s.qk_rope_head_dim)
    if s.q_lora_rank is None:
        yield _matrix(name("q_proj"), query_rows, hidden)
    else:
        yield _matrix(name("q_a_proj"), s.q_lora_rank, hidden)
        yield _norm(name("q_a_layernorm"), s.q_lora_rank)
        yield _matrix(name("q_b_proj"), query_rows, s.q_lora_rank)
    yield _matrix(name("kv_a_proj_with_mqa"), rank + s.qk_rope_head_dim, hidden)
    yield _norm(name("kv_a_layernorm"), rank)
    yield Tensor(name("k_b_proj"), (heads, rank, s.qk_nope_head_dim), 1 / sqrt(rank))  # stored transposed
    yield _matrix(name("v_b_proj"), heads, s.v_head_dim, rank)
    yield _matrix(name("o_proj"), hidden, heads * s.v_head_dim, gain=residual_gain)


def _mlp(s: Shape, index: int, module: str, inner: int, down_gain: float, *stack: int) -> Iterator[Tensor]:
    """down_gain: of unit outputs. silu(gate) * up deviates by about 0.6 for unit gate and up; 1.6 makes up for it."""
    for part in ("gate_proj", "up_proj"):
        yield _matrix(layer(index, f"{module}.{part}"), *stack, inner, s.hidden_size)
    yield _matrix(layer(index, f"{module}.down_proj"), *stack, s.hidden_size, inner, gain=1.6 * down_gain)


def _moe(s: Shape, index: int, residual_gain: float) -> Iterator[Tensor]:
    yield _matrix(layer(index, "mlp.gate"), s.n_routed_experts, s.hidden_size)
    if s.scoring_func == "sigmoid":
        yield Tensor(layer(index, "mlp.gate.e_score_correction_bias"), (s.n_routed_experts,), 0.1)
    # What the weights of the chosen experts add up to; softmax without normalisation: each about 1/experts.
    share = 1.0 if s.norm_topk_prob else s.num_experts_per_tok / s.n_routed_experts
    gain = residual_gain / (share * s.routed_scaling_factor)
    yield from _mlp(s, index, "mlp.experts", s.moe_intermediate_size, gain, s.n_routed_experts)
    yield from _mlp(s, index, "mlp.shared_experts", s.moe_intermediate_size * s.n_shared_experts, residual_gain)


def metadata_of(name: str, s: Shape) -> Metadata:
    """All keys. Sources: llama.cpp's src/llama-model.cpp and conversion/deepseek.py @3f545becc."""
    metadata = Metadata("deepseek2")
    metadata.string("general.type", "model")
    metadata.string("general.name", f"synthetic {name}")
    metadata.u32("general.quantization_version", 2)
    metadata.u32("general.file_type", MIXES[MIX][0])
    counts = {
        "vocab_size": s.vocab_size,
        "context_length": 163840,
        "embedding_length": s.hidden_size,
        "feed_forward_length": s.intermediate_size,
        "block_count": s.num_hidden_layers,
        "attention.head_count": s.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": s.kv_lora_rank + s.qk_rope_head_dim,
        "attention.value_length": s.kv_lora_rank,
        "attention.key_length_mla": s.qk_nope_head_dim + s.qk_rope_head_dim,
        "attention.value_length_mla": s.v_head_dim,
        "attention.kv_lora_rank": s.kv_lora_rank,
        "rope.dimension_count": s.qk_rope_head_dim,
        "leading_dense_block_count": s.first_k_dense_replace,
        "expert_feed_forward_length": s.moe_intermediate_size,
        "expert_count": s.n_routed_experts,
        "expert_used_count": s.num_experts_per_tok,
        "expert_shared_count": s.n_shared_experts,
        "expert_group_count": s.n_group,
        "expert_group_used_count": s.topk_group,
        "expert_gating_func": {"softmax": 1, "sigmoid": 2}[s.scoring_func],
        "rope.scaling.original_context_length": 4096,
    }
    if s.q_lora_rank is not None:
        counts["attention.q_lora_rank"] = s.q_lora_rank
    for key, count in counts.items():
        metadata.u32("." + key, count)
    metadata.bool(".expert_weights_norm", s.norm_topk_prob)
    metadata.f32(".expert_weights_scale", s.routed_scaling_factor)
    metadata.f32(".attention.layer_norm_rms_epsilon", 1e-6)
    metadata.f32(".rope.freq_base", 10000.0)
    metadata.string(".rope.scaling.type", "yarn")
    metadata.f32(".rope.scaling.factor", 40.0)
    metadata.f32(".rope.scaling.yarn_log_multiplier", 0.1 * s.mscale_all_dim)
    _add_vocabulary(metadata, s.vocab_size)
    return metadata


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


def plan(name: str, path: Path) -> tuple[list[Tensor], list[str], Layout]:
    """The tensors of SHAPES[name], their types, and where they lie in the file `path`."""
    tensors = list(tensors_of(SHAPES[name]))
    targets = [Target(tensor.name, tensor.shape, "random") for tensor in tensors]
    metadata = metadata_of(name, SHAPES[name])
    types = choose_types(targets, metadata, MIX, OVERRIDES)
    return tensors, types, make_layout(path, metadata, targets, types)


class Weights:
    """Makes the bytes of tensors."""

    def __init__(self, workers: Pool) -> None:
        self._workers = workers
        self._pools: dict[tuple[str, float], np.ndarray] = {}

    def chunks(self, tensor: Tensor, type_: str) -> Iterator[np.ndarray]:
        """The tensor's bytes, in arrays of at most CHUNK_BYTES."""
        random = np.random.default_rng(zlib.crc32(tensor.name.encode()))
        if type_ == "F32":  # norms, biases, routers: small
            yield tensor.mean + tensor.deviation * random.standard_normal(tensor.shape, dtype=np.float32)
            return
        blocks = self._pool(type_, tensor.deviation)
        n_blocks, at_once = prod(tensor.shape) // registry.get(type_).block, CHUNK_BYTES // blocks.shape[1]
        for first in range(0, n_blocks, at_once):
            chosen = random.integers(0, len(blocks), min(at_once, n_blocks - first), dtype=np.int32)
            yield blocks.take(chosen, axis=0)

    def _pool(self, type_: str, deviation: float) -> np.ndarray:
        """Packed blocks of Gaussian weights, uint8 (POOL_WEIGHTS / block, block_bytes)."""
        if (type_, deviation) not in self._pools:
            format_ = registry.get(type_)
            random = np.random.default_rng(zlib.crc32(type_.encode()))
            x = random.standard_normal((POOL_WEIGHTS // 4096, 4096), dtype=np.float32) * np.float32(deviation)
            out = np.empty((POOL_WEIGHTS // format_.block, format_.block_bytes), np.uint8)
            assert pack(self._workers, format_, x.ctypes.data, *x.shape, out.ctypes.data) == -1
            self._pools[type_, deviation] = out
        return self._pools[type_, deviation]


def write(name: str, path: Path) -> dict:
    """Write SHAPES[name] to path, by way of a temporary file beside it; what was written."""
    start = time.perf_counter()
    tensors, types, layout = plan(name, path)
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
        "mix": MIX,
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
    arguments = parser.parse_args()
    print(json.dumps(write(arguments.shape, arguments.out)))


if __name__ == "__main__":
    main()
