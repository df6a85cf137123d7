"""Small models on a device (without a GPU its stand-in) and on the CPU, and how far their logits may be apart.

Tolerances are fractions of the range of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import tiny_models
from gpu_device import HAS_GPU
from tiny_models import SMALLEST as V3
from tiny_models import Deepseek2

import localrun
from localrun.cpu.model import NativeModel
from localrun.generate.sampling import Sampling
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.experts.routed import Mode
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.prefill import LayerTimes, Seconds
from localrun.models.config import Config
from localrun.models.reader import read_config
from localrun.placement.available import Gpu
from localrun.placement.placement import Placement, Request, lay_out

# Matrices of a few tokens are exact products of float32; the cache's rows are rounded to 16 bits, 2^-11 of a value, on
# the device only. On a GPU attention's products have 16 bits, too. Found: 4e-4.
STEP_TOLERANCE = 2e-3
# Those of many tokens have float16 operands: 2^-12 of each weight and activation, through all layers. Found: 1.2e-3.
MANY_TOLERANCE = 5e-3
# Both sides multiply in float32; what differs is the order of sums.
EXACT_TOLERANCE = 1e-5
# The CPU rounds activations to 8 bits for quantised matrices, the device does not: up to 2^-8 of each, through all
# layers (test_engine.py: 1e-2 for two different roundings).
QUANTISED_TOLERANCE = 0.03
CTX = 48
CARD = Gpu("Acme 5000", (8, 9), 24 << 30, 20 << 30, "570.86", "12.8")
MODELS = {
    "V3": V3,
    "V3 with a joint kv_b and fused gate and up": replace(V3, split_kv_b=False, fused_gate_up=True),
    "V3 without YaRN, groups and bias, head tied": replace(
        V3, yarn_factor=None, n_group=None, topk_group=None, e_score_correction_bias=False, norm_topk_prob=False,
        routed_scaling_factor=None, tie_word_embeddings=True,
    ),
    "V2": replace(
        V3, scoring_func="softmax", e_score_correction_bias=False, norm_topk_prob=False, mscale_all_dim=0.707,
        n_shared_experts=2, routed_scaling_factor=4.0,
    ),
    "V2-Lite": replace(
        V3, scoring_func="softmax", e_score_correction_bias=False, norm_topk_prob=False, q_lora_rank=None,
        n_shared_experts=2, routed_scaling_factor=1.0, n_group=1, topk_group=1, num_hidden_layers=3,
    ),
    "all layers with experts": replace(V3, first_k_dense_replace=0),
    "with a layer for multi-token prediction": replace(V3, num_nextn_predict_layers=1),
}  # fmt: skip
_GROUPED = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "qk_rope_head_dim": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS |= {
    "GLM-4.5": tiny_models.glm4moe(**_GROUPED),
    "Ling": tiny_models.bailingmoe2(**_GROUPED | {"num_attention_heads": 4}),
    "MiniMax-M2": tiny_models.minimax_m2(**_GROUPED | {"intermediate_size": 32}),
    "Mixtral": tiny_models.mixtral(**_GROUPED | {"intermediate_size": 32, "qk_rope_head_dim": 16}),
    # With a window in its first layer, sinks, biases, and bounds in its experts.
    "gpt-oss": tiny_models.gpt_oss(**_GROUPED | {"intermediate_size": 32, "qk_rope_head_dim": 16, "sliding_window": 5}),
}
_INDEXER = {"index_n_heads": 5, "index_head_dim": 16, "index_topk": 8}
MODELS |= {
    "V3.2": tiny_models.sparse(**_INDEXER),
    "GLM-5.2": tiny_models.sparse(
        **_INDEXER,
        architecture="glm-dsa",
        num_hidden_layers=4,
        indexer_types="FSFS",
        yarn_factor=None,
        rms_norm_eps=1e-5,
    ),
}
MTP = MODELS["with a layer for multi-token prediction"]
# Found by search: with router logits off by 1e-2 of their size, all tokens choose the same experts.
_SEEDS = {"V2-Lite": 2, "all layers with experts": 5}


def ids_of(n_tokens: int, name: str = "V3") -> list[int]:
    seed = _SEEDS.get(name, 1)
    return np.random.default_rng(seed).integers(0, V3.vocab_size, n_tokens).tolist()


def new_device() -> Cuda | StandIn:
    return Cuda() if HAS_GPU else StandIn()


def placed(file: GGUFFile, config: Config, gpu_experts: int = 0, drafts: bool = False) -> Placement:
    """On a card with room for everything."""
    tensors, much = tuple(file.tensors.values()), 1 << 40
    return lay_out(Request(tensors, config, CTX, much, much, much, gpu_experts=gpu_experts, mtp=drafts))


@contextmanager
def opened(
    shape: Deepseek2 = V3,
    type_: str = "F32",
    gpu_experts: int = 0,
    device: Cuda | StandIn | None = None,
    in_vram: dict[int, tuple[int, ...]] | None = None,
) -> Iterator[tuple[HybridModel, NativeModel]]:
    """The same model both ways; in_vram: layer -> experts, where not as many of each layer."""
    with open_gguf(tiny_models.shared(shape, type=type_)) as file:
        config = read_config(file)
        placement = placed(file, config, gpu_experts)
        if in_vram is not None:
            placement = replace(placement, experts=in_vram)
        with (
            closing(HybridModel(config, file, 2, placement, device or new_device())) as model,
            closing(NativeModel(config, file, 2)) as native,
        ):
            yield model, native


def exact_logits(native: NativeModel, ids: list[int]) -> np.ndarray:
    return native.forward(ids, native.new_cache(len(ids), exact=True), all_logits=True)


def two_batches(model: HybridModel) -> None:
    """As if it had been measured that two are faster, however few tokens."""
    model.tuning.use(LayerTimes(Seconds(0.0, 1.0), Seconds(0.0, 1.0), Seconds(0.0, 0.0), float("inf")))
    assert model.tuning.choose(2) == (Mode.PREFILL, 2)


def stream(model: HybridModel) -> None:
    """As if it had been measured that uploading experts is faster."""
    model.routed.allow_streaming()
    model.tuning.use(LayerTimes(Seconds(0.0, 1.0), Seconds(0.0, 9.0), Seconds(0.0, 0.0), 0.0))
    assert model.tuning.choose(2) == (Mode.STREAM, 1)


class Recording(Cuda if HAS_GPU else StandIn):
    """Counts what is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.n_recorded = 0

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self.n_recorded += 1
        return super().capture(step)


def cpus_logits(native: NativeModel, ids: list[int]) -> np.ndarray:
    """Over keys of 16 bits, as the device's: others might choose other rows."""
    return native.forward(ids, native.new_cache(len(ids)), all_logits=True)


def load(shape: Deepseek2 = V3, device: str = "cuda", **options: object) -> localrun.Engine:
    if device == "cuda":
        options = {"gpu_experts": 0, "unproven": True} | options
    return localrun.load(tiny_models.shared(shape), device=device, ctx=CTX, threads=2, **options)


GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)
