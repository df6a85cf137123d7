"""scripts/vary_config.py: a few telling keys of each class; all of them take minutes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cases import slow_but
from paths import SCRIPTS

from localrun.models.checkpoint_class import NO_EFFECT, ONLY, CheckpointClass, Setting
from localrun.models.registry import CHECKPOINTS

V2, V3, LLAMA, QWEN = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "LlamaForCausalLM", "Qwen3MoeForCausalLM"
NOT_IN_TRANSFORMERS = {"BailingMoeV2ForCausalLM"}
CLASSES = {name: each for name, (_, each) in CHECKPOINTS.items() if name not in NOT_IN_TRANSFORMERS}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    import vary_config

    yield vary_config


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MLA_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
TELLING: dict[str, list[tuple[str, Any, str]]] = {
    V2: [
        ("routed_scaling_factor", "absent", "no effect"), ("q_lora_rank", None, "honoured"),
        ("norm_topk_prob", True, "refused"), ("first_k_dense_replace", 0, "honoured"),
        ("rope_parameters", {"rope_type": "linear", "factor": 4.0}, "refused"), ("num_experts", 4, "honoured"),
    ],
    V3: [
        ("norm_topk_prob", "absent", "no effect"), ("norm_topk_prob", None, "honoured"),
        ("routed_scaling_factor", "absent", "no effect"), ("num_local_experts", 16, "honoured"),
        ("rope_parameters", MLA_YARN | {"attention_factor": 1.2}, "refused"), ("rms_norm_eps", 0.01, "refused"),
        ("rope_parameters", MLA_YARN | {"truncate": False}, "refused"), ("rope_interleave", None, "refused"),
        ("rope_parameters", {k: v for k, v in MLA_YARN.items() if not k.startswith("orig")}, "honoured"),
    ],
    LLAMA: [
        ("num_key_value_heads", "absent", "honoured"), ("rope_theta", 500.0, "honoured"),
        ("rope_parameters", YARN | {"attention_factor": 1.0}, "refused"), ("pretraining_tp", 2, "no effect"),
        ("rope_parameters", YARN | {"beta_fast": 4, "beta_slow": 2}, "refused"), ("mlp_bias", True, "refused"),
        ("partial_rotary_factor", 0.5, "refused"),
    ],
    QWEN: [
        ("num_local_experts", 16, "honoured"), ("head_dim", "absent", "honoured"),
        ("norm_topk_prob", "absent", "refused"), ("rope_parameters", YARN | {"beta_fast": 4}, "honoured"),
        ("rope_parameters", YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "refused"),
    ],
    "Glm4MoeForCausalLM": [
        ("attention_bias", "absent", "honoured"), ("use_qk_norm", "absent", "honoured"),
        ("partial_rotary_factor", 0.5, "no effect"), ("n_shared_experts", 2, "honoured"),
        ("rope_parameters", {"rope_theta": 500.0, "partial_rotary_factor": 0.25}, "honoured"),
        ("rope_parameters", YARN, "honoured"),
    ],
    "Glm4MoeLiteForCausalLM": [
        ("mlp_layer_types", ["sparse"] * 3, "honoured"), ("first_k_dense_replace", 2, "no effect"),
        ("n_group", 2, "honoured"), ("rope_interleave", False, "refused"),
    ],
    "MiniMaxM2ForCausalLM": [
        ("rotary_dim", 8, "honoured"), ("rotary_dim", None, "honoured"), ("partial_rotary_factor", 0.5, "no effect"),
        ("rope_theta", "absent", "no effect"), ("use_qk_norm", False, "refused"), ("sliding_window", 8, "refused"),
    ],
    "HYV3ForCausalLM": [
        ("mlp_layer_types", ["dense", "dense", "sparse"], "honoured"), ("rope_theta", "absent", "no effect"),
        ("mlp_layer_types", ["dense", "sparse", "dense"], "refused"), ("num_shared_experts", 2, "honoured"),
        ("router_scaling_factor", "absent", "no effect"),
    ],
    "MixtralForCausalLM": [
        ("num_local_experts", 4, "honoured"), ("num_experts_per_tok", 1, "honoured"), ("sliding_window", 8, "refused"),
        ("rope_theta", "absent", "no effect"),
    ],
    "Dots1ForCausalLM": [
        ("norm_topk_prob", "absent", "honoured"), ("sliding_window", "absent", "no effect"),
        ("layer_types", ["sliding_attention"] * 3, "refused"), ("n_group", 2, "honoured"),
    ],
    "DeepseekV4ForCausalLM": [
        ("hc_eps", 0.1, "honoured"), ("num_hash_layers", 2, "honoured"), ("swiglu_limit", 3.0, "honoured"),
        ("compress_rope_theta", 500.0, "honoured"), ("norm_topk_prob", False, "refused"), ("hc_mult", 2, "refused"),
        ("sliding_window", 5, "honoured"), ("n_group", 2, "no effect"),
    ],
    "Ernie4_5_MoeForCausalLM": [
        ("moe_layer_start_index", 2, "honoured"), ("moe_layer_end_index", 1, "refused"), ("moe_k", 2, "honoured"),
        ("tie_word_embeddings", "absent", "no effect"), ("moe_num_shared_experts", 0, "honoured"),
        ("use_bias", True, "refused"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(TELLING, ["DeepseekV3ForCausalLM", "LlamaForCausalLM"]))
def test_a_key_is_honoured_refused_or_of_no_effect(name: str, script: ModuleType, tmp_path: Path) -> None:
    """transformers' logits of the same folder are what "honoured" and "no effect" are held against."""
    variations = script.Variations(CLASSES[name], tmp_path)
    found = [(key, value, variations.outcome(key, value).kind) for key, value, _ in TELLING[name]]
    assert found == TELLING[name]


def test_a_key_that_is_not_understood_is_found(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CLASSES[V3].settings, "routed_scaling_factor", Setting("read", 1.0))  # V2's default
    assert script.Variations(CLASSES[V3], tmp_path).outcome("routed_scaling_factor", "absent").kind == "WRONG"


# The class's field -> the key that transformers writes for it.
NAMED_OTHERWISE = {"num_mtp_layers": "num_nextn_predict_layers"}


@pytest.mark.parametrize("checkpoint_class", CLASSES.values(), ids=CLASSES)
def test_every_key_of_the_class_is_in_the_table_with_its_default(checkpoint_class: CheckpointClass) -> None:
    import transformers

    config = getattr(transformers, checkpoint_class.name).config_class
    defaults = {NAMED_OTHERWISE.get(f.name, f.name): f.default for f in dataclasses.fields(config)}
    assert set(defaults) - set(checkpoint_class.settings) == set()
    for key, default in defaults.items():
        setting = checkpoint_class.settings[key]
        if setting.use != NO_EFFECT and key not in ("architectures", "rope_parameters"):
            assert setting.default == default, key
            assert setting.use != ONLY or default in setting.values or key == "norm_topk_prob"
