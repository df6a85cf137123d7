"""Every key of config.json, for each class that can be converted: varied, converted, held against transformers.

    python scripts/vary_config.py [CLASS ...] [--key KEY ...]

A tiny random checkpoint is made for each value of a key, of the configuration that transformers reads out of that
config.json. Keys are those of the class in transformers, and those of our table (localrun/models). What can happen:
    honoured    the value moves transformers' logits, and ours are the same
    no effect   it moves nothing, and ours are the same
    refused     convert says so, naming the key
    told        logits differ, and a warning of convert names the key
    unrunnable  transformers itself cannot run it
    WRONG       logits differ, and nobody said so
Logits are the same within TOLERANCE of their range. A markdown table goes to stdout, a line a key, the worst first.
Exit 1 if something is WRONG.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

import hf_checkpoints as hf
import numpy as np
import torch
import transformers

import localrun
from localrun.convert import Options, convert, make_plan
from localrun.models.checkpoint_class import CheckpointClass
from localrun.models.registry import CHECKPOINTS

TOLERANCE = 1e-4  # float32 sums in another order give 1e-6; llama.cpp, which runs llama's yarn, keeps 16-bit keys: 4e-4
LLAMA_CPP_TOLERANCE = 1e-3
ABSENT = "absent"
WORST_FIRST = ["WRONG", "told", "refused", "honoured", "no effect", "unrunnable"]
PROMPT = (hf.PROMPT * 3)[:40]
BASES = {
    "DeepseekV2ForCausalLM": hf.DEEPSEEK,
    "DeepseekV3ForCausalLM": hf.V3,
    "DeepseekV32ForCausalLM": hf.DEEPSEEK32,
    "GlmMoeDsaForCausalLM": hf.GLM_DSA,
    "DeepseekV4ForCausalLM": hf.DEEPSEEK4,
    "LlamaForCausalLM": hf.LLAMA,
    "Glm4MoeLiteForCausalLM": hf.GLM4_MOE_LITE,
    "Qwen3MoeForCausalLM": hf.QWEN3_MOE,
    "GptOssForCausalLM": hf.GPT_OSS,
    "Glm4MoeForCausalLM": hf.GLM4_MOE,
    "MiniMaxM2ForCausalLM": hf.MINIMAX_M2,
    "HYV3ForCausalLM": hf.HY_V3,
    "MixtralForCausalLM": hf.MIXTRAL,
    "Dots1ForCausalLM": hf.DOTS1,
    "Ernie4_5_MoeForCausalLM": hf.ERNIE4_5_MOE,
}
THETA = {"rope_theta": 10000.0}
LINEAR = THETA | {"rope_type": "linear", "factor": 4.0}
PLAIN_YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MSCALES = {"mscale": 1.0, "mscale_all_dim": 1.0}
VALUES: dict[str, list[Any]] = {
    "vocab_size": [352], "hidden_size": [192], "intermediate_size": [96], "moe_intermediate_size": [32],
    "num_hidden_layers": [2], "num_attention_heads": [2, 8], "num_key_value_heads": [1, None], "head_dim": [16, None],
    "kv_lora_rank": [48], "q_lora_rank": [32, None], "qk_rope_head_dim": [32], "qk_nope_head_dim": [16],
    "v_head_dim": [16], "first_k_dense_replace": [0, 2, 7, None], "n_routed_experts": [4, 16],
    "num_experts": [4, 16], "num_local_experts": [4, 16], "n_shared_experts": [1, 2, 3],
    "num_experts_per_tok": [1, 2, None],
    "n_group": [1, 2, None], "topk_group": [1, 4, None], "routed_scaling_factor": [0.5, 4.0, 16],
    "rms_norm_eps": [1e-5, 1e-2], "max_position_embeddings": [64, 4096], "hidden_act": ["gelu", "swish", "relu", None],
    "topk_method": ["greedy", "group_limited_greedy", "noaux_tc"], "scoring_func": ["softmax", "sigmoid"],
    "norm_topk_prob": [True, False, None], "tie_word_embeddings": [True], "rope_theta": [500.0, 1e6],
    "original_max_position_embeddings": [32], "partial_rotary_factor": [0.5, 1.0], "moe_layer_freq": [2],
    "decoder_sparse_step": [2], "mlp_only_layers": [[0], None], "sliding_window": [8, 5], "max_window_layers": [0],
    "swiglu_alpha": [1.0], "swiglu_limit": [3.0],
    "num_nextn_predict_layers": [0, 2], "num_mtp_layers": [0, 2], "rope_interleave": [False, None],
    "num_shared_experts": [2, 3], "router_scaling_factor": [0.5, 4.0], "rotary_dim": [8, 32, None],
    "mlp_layer_types": [["sparse"] * 3, ["dense", "dense", "sparse"], ["dense", "sparse", "dense"], None,
                        ["moe"] * 3, ["moe", "hash_moe", "moe"]],
    "attn_type_list": [[0, 0, 0]], "moe_num_experts": [4, 16], "moe_k": [1, 2], "moe_num_shared_experts": [0, 1, 3],
    "moe_layer_start_index": [0, 2], "moe_layer_end_index": [1, 2],
    "layer_types": [["full_attention"] * 3, ["sliding_attention"] * 3, ["heavily_compressed_attention"] * 3, None],
    "moe_norm_min": [1e-3],
    "per_layer_config": [{"0": {"num_key_value_heads": 1}}], "quantization_config": [{"quant_method": "gptq"}],
    "index_topk": [3, 64], "index_n_heads": [16], "index_head_dim": [128], "index_topk_freq": [2, 0],
    "index_skip_topk_offset": [0, 1], "index_topk_pattern": ["FSS", "FFF", "SFF", ["full", "full", "shared"]],
    "indexer_types": [["full"] * 3, ["full", "shared", "shared"], ["full"], None], "indexer_rope_interleave": [False],
    "o_groups": [1, 4], "o_lora_rank": [16], "hc_mult": [2], "hc_sinkhorn_iters": [1, 3], "hc_eps": [0.1],
    "compress_rope_theta": [500.0], "num_hash_layers": [0, 2], "compress_ratios": [[0, 0, 4], [0, 4]],
    "compress_rates": [{"compressed_sparse_attention": 4}, {"compressed_sparse_attention": 8}],
    "initializer_range": [0.5], "attention_dropout": [0.5], "pretraining_tp": [2], "torch_dtype": ["bfloat16"],
    "dtype": ["bfloat16"], "id2label": [{"0": "a", "1": "b", "2": "c"}], "label2id": [{"a": 0}], "qk_head_dim": [99],
    "problem_type": ["regression"], "architectures": [["GPT2LMHeadModel"]], "model_type": ["gpt2"],
    "transformers_weights": ["other.safetensors"], "aux_loss_alpha": [0.5], "tokenizer_class": ["T5Tokenizer"],
    "rope_scaling": [
        {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}, {"type": "default", "factor": 3.0},
        {"rope_type": "linear"}, {"rope_type": "proportional", "factor": 2.0},
    ],
    "rope_parameters": [
        LINEAR, LINEAR | MSCALES, {"rope_type": "linear", "factor": 0.5}, hf.LLAMA3_ROPE, hf.YARN, PLAIN_YARN,
        hf.YARN | {"attention_factor": 1.0}, hf.YARN | {"attention_factor": 1.2}, hf.YARN | {"truncate": False},
        hf.YARN | {"truncate": None}, hf.YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        hf.YARN | {"mscale": 0.5}, hf.YARN | {"mscale_all_dim": 0.0}, hf.YARN | {"beta_fast": 4, "beta_slow": 2},
        hf.YARN | {"beta_fast": 0, "beta_slow": None}, hf.YARN | {"beta_fast": 1, "beta_slow": 1},
        hf.YARN | {"beta_fast": 1, "beta_slow": 32}, hf.YARN | {"factor": 1.0}, hf.YARN | {"factor": 0.5},
        {key: value for key, value in hf.YARN.items() if key != "original_max_position_embeddings"},
        hf.YARN | {"rope_theta": 500.0}, hf.YARN | {"factor": None},
        PLAIN_YARN | {"attention_factor": 1.0}, PLAIN_YARN | {"attention_factor": 1.1386294361119891},
        PLAIN_YARN | MSCALES, PLAIN_YARN | {"mscale": 0.5, "mscale_all_dim": 1.0}, PLAIN_YARN | {"truncate": False},
        PLAIN_YARN | {"beta_fast": 4, "beta_slow": 2}, PLAIN_YARN | {"factor": 0.5},
        {key: value for key, value in PLAIN_YARN.items() if key != "original_max_position_embeddings"},
        hf.LLAMA3_ROPE | {"low_freq_factor": 2.0}, hf.LLAMA3_ROPE | {"factor": 0.5},
        {key: value for key, value in hf.LLAMA3_ROPE.items() if key != "original_max_position_embeddings"},
        THETA | {"rope_type": "default", "factor": 4.0, "mscale_all_dim": 1.0}, {"rope_theta": 500.0},
        THETA | {"rope_type": "default", "partial_rotary_factor": 0.5}, THETA | {"rope_type": None},
        THETA | {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    ],
}  # fmt: skip
_GROUPS = {"topk_method": "group_limited_greedy"}
# What stands beside a key that means something only together with others, by class; "" is all.
BESIDE: dict[str, dict[str, dict[str, Any]]] = {
    "": {
        "rope_theta": {"rope_parameters": ABSENT},
        "rope_scaling": {"rope_parameters": ABSENT},
        "original_max_position_embeddings": {"rope_parameters": PLAIN_YARN},
    },
    "DeepseekV2ForCausalLM": {
        "n_group": _GROUPS | {"topk_group": 1},
        "topk_group": _GROUPS | {"n_group": 4},
        "topk_method": {"n_group": 4, "topk_group": 2},
        "num_attention_heads": {"num_key_value_heads": ABSENT},
        "original_max_position_embeddings": {"rope_parameters": hf.YARN},
    },
    "DeepseekV32ForCausalLM": {
        "original_max_position_embeddings": {"rope_parameters": hf.YARN},
        "num_attention_heads": {"num_key_value_heads": ABSENT},
        "n_group": {"topk_group": 1},
        "first_k_dense_replace": {"mlp_layer_types": ABSENT},
        "num_hidden_layers": {"mlp_layer_types": ABSENT, "layer_types": ABSENT},
        "num_local_experts": {"num_experts": ABSENT},
    },
    "GlmMoeDsaForCausalLM": {
        "num_attention_heads": {"num_key_value_heads": ABSENT},
        "first_k_dense_replace": {"mlp_layer_types": ABSENT},
        "num_hidden_layers": {"mlp_layer_types": ABSENT, "layer_types": ABSENT, "indexer_types": ABSENT},
        "index_topk_freq": {"indexer_types": ABSENT},
        "index_skip_topk_offset": {"indexer_types": ABSENT, "index_topk_freq": 2},
        "index_topk_pattern": {"indexer_types": ABSENT},
        "num_local_experts": {"num_experts": ABSENT},
    },
    "DeepseekV4ForCausalLM": {
        "num_hidden_layers": {"layer_types": ABSENT, "mlp_layer_types": ABSENT},
        "num_hash_layers": {"mlp_layer_types": ABSENT},
        "compress_ratios": {"layer_types": ABSENT},
        "qk_rope_head_dim": {"partial_rotary_factor": ABSENT, "rope_parameters": ABSENT},
        "partial_rotary_factor": {"rope_parameters": ABSENT},
        "num_local_experts": {"n_routed_experts": ABSENT},
        "compress_rope_theta": {"rope_parameters": ABSENT},
    },
    "Qwen3MoeForCausalLM": {"num_experts": {"num_local_experts": ABSENT}},
    "MiniMaxM2ForCausalLM": {
        "num_experts": {"num_local_experts": ABSENT},
        "num_local_experts": {"num_experts": ABSENT},
        "rotary_dim": {"rope_parameters": ABSENT},
        "partial_rotary_factor": {"rope_parameters": ABSENT},
    },
    "HYV3ForCausalLM": {
        "num_experts": {"num_local_experts": ABSENT},
        "num_local_experts": {"num_experts": ABSENT},
        "num_hidden_layers": {"mlp_layer_types": None},
    },
    "MixtralForCausalLM": {
        "num_experts": {"num_local_experts": ABSENT},
        "num_local_experts": {"num_experts": ABSENT},
    },
    "DeepseekV3ForCausalLM": {
        "original_max_position_embeddings": {"rope_parameters": hf.YARN},
        "num_attention_heads": {"num_key_value_heads": None},
        "qk_rope_head_dim": {"head_dim": ABSENT},
        "n_group": {"topk_group": 1},
    },
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one value of a key; moved and differ are fractions of the logits' range."""

    key: str
    value: Any
    kind: str
    moved: float = float("nan")
    differ: float = float("nan")
    said: str = ""


def keys_of(checkpoint_class: CheckpointClass) -> list[str]:
    """All keys of a class: those of transformers' configuration, of our table, and other spellings."""
    config = getattr(transformers, checkpoint_class.name).config_class
    theirs = [field.name for field in dataclasses.fields(config)]
    spelled = [name for names in checkpoint_class.spelled.values() for name in names]
    return sorted({*theirs, *checkpoint_class.settings, *spelled})


def values_of(key: str, default: Any) -> list[Any]:
    """What a key is set to in turn: it is left out, and something else than the default."""
    if key in VALUES:
        return [ABSENT, *VALUES[key]]
    if isinstance(default, bool):
        return [ABSENT, not default]
    if isinstance(default, int | float):
        return [ABSENT, default + 1]
    return [ABSENT, True, 3, "odd"]


class Variations:
    """The checkpoints of one class."""

    def __init__(self, checkpoint_class: CheckpointClass, folder: Path) -> None:
        self.checkpoint_class, self.folder = checkpoint_class, folder
        self.model_class = getattr(transformers, checkpoint_class.name)
        settings = self.model_class.config_class(**BASES[checkpoint_class.name])
        self.base = settings.to_dict() | {"architectures": [checkpoint_class.name]}
        self.base = {key: value for key, value in self.base.items() if not isinstance(value, torch.dtype)}
        self.base_logits = self.reference(self.base)

    def outcomes(self, keys: list[str] | None = None) -> Iterator[Outcome]:
        """Of all values of all keys, or of some keys."""
        for key in keys_of(self.checkpoint_class):
            if keys is None or key in keys:
                for value in values_of(key, self.base.get(key)):
                    yield self.outcome(key, value)

    def outcome(self, key: str, value: Any) -> Outcome:
        """Of one value of a key; ABSENT leaves it out."""
        beside = (BESIDE[""] | BESIDE.get(self.checkpoint_class.name, {})).get(key, {})
        values = self.base | beside | {key: value}
        values = {name: each for name, each in values.items() if each is not ABSENT}
        try:
            expected = self.reference(values)
        except Exception as error:  # whatever transformers ends in
            expected, said = None, f"{type(error).__name__}: {error}".splitlines()[0]
        try:
            found, warnings, tolerance = self.ours()
        except localrun.LocalrunError as error:
            return Outcome(key, value, "refused", said=str(error).split(": ", 1)[-1])
        if expected is None:
            return Outcome(key, value, "unrunnable", said=said)
        same_shape = expected.shape == self.base_logits.shape
        moved = _distance(expected, self.base_logits) if same_shape else float("nan")
        differ = _distance(found, expected) if found.shape == expected.shape else float("inf")
        said = next((line.split(": ", 1)[-1] for line in warnings if key in line), "")
        if differ > tolerance:
            return Outcome(key, value, "told" if said else "WRONG", moved, differ, said)
        return Outcome(key, value, "no effect" if moved < 1e-9 else "honoured", moved, differ, said)

    def reference(self, values: dict[str, Any]) -> np.ndarray:
        """transformers' logits, float32 (T, vocab), of the checkpoint of a config.json, which is left in the folder."""
        for path in self.folder.iterdir():
            path.unlink()
        (self.folder / "config.json").write_text(json.dumps(values))
        try:
            settings = self.model_class.config_class.from_pretrained(self.folder)
            model = self.model_class._from_config(settings, attn_implementation="eager", dtype=torch.float32).eval()
        except Exception:
            self._save(self.model_class.config_class(**BASES[self.checkpoint_class.name]))
            raise
        hf.randomise(model, 0)
        self._save_weights(model)
        model = self.model_class.from_pretrained(self.folder, attn_implementation="eager", dtype=torch.float32).eval()
        with torch.no_grad():
            ids = torch.tensor([PROMPT]) % model.config.vocab_size
            return model(ids, return_dict=True).logits[0].numpy()

    def _save(self, settings: Any) -> None:
        model = self.model_class(settings).eval()
        hf.randomise(model, 0)
        self._save_weights(model)

    def _save_weights(self, model: torch.nn.Module) -> None:
        config = (self.folder / "config.json").read_text()
        model.save_pretrained(self.folder)
        (self.folder / "generation_config.json").unlink(missing_ok=True)
        (self.folder / "config.json").write_text(config)

    def ours(self) -> tuple[np.ndarray, list[str], float]:
        """Our logits of the same folder, what convert warned of, and how near they must be."""
        path = self.folder / "x.gguf"
        plan = make_plan(self.folder, path, Options(mix="F32"))
        convert(plan)
        with localrun.load(path, device="cpu", threads=1, ctx=64, notice=lambda _: None) as engine:
            tolerance = TOLERANCE if engine.describe()["backend"] == "native" else LLAMA_CPP_TOLERANCE
            return engine.logits([id % plan.metadata.get(".vocab_size") for id in PROMPT]), plan.warnings, tolerance


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.ptp(expected))


def table(checkpoint_class: CheckpointClass, outcomes: list[Outcome]) -> list[str]:
    """Markdown: a line a key, with what became of each of its values."""
    by_key: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_key.setdefault(outcome.key, []).append(outcome)
    lines = [f"### {checkpoint_class.name}", "", "| key | our table | outcome of each value | worst difference |"]
    lines.append("|---|---|---|---|")
    for key, found in sorted(by_key.items(), key=lambda each: min(WORST_FIRST.index(o.kind) for o in each[1])):
        use = checkpoint_class.settings[key].use if key in checkpoint_class.settings else "read, another spelling"
        kinds: dict[str, list[str]] = {}
        for outcome in found:
            kinds.setdefault(outcome.kind, []).append(_spelled(outcome))
        text = "; ".join(f"**{kind}**: {', '.join(values)}" for kind, values in kinds.items())
        differences = [o.differ for o in found if o.kind in ("honoured", "no effect", "told", "WRONG")]
        lines.append(
            f"| {key} | {use} | {text} | {max(differences):.0e} |" if differences else f"| {key} | {use} | {text} | |"
        )
    return lines


def _spelled(outcome: Outcome) -> str:
    value = outcome.value
    if isinstance(value, dict) and "rope_type" in value:
        shown = {k: v for k, v in value.items() if k not in ("rope_theta",)}
        return json.dumps(shown).replace('"', "")
    return value if value == ABSENT else json.dumps(value).replace('"', "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("classes", nargs="*", default=list(BASES), metavar="CLASS")
    parser.add_argument("--key", action="append", metavar="KEY")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    wrong = []
    for name in arguments.classes:
        _, checkpoint_class = CHECKPOINTS[name]
        with tempfile.TemporaryDirectory() as folder:
            outcomes = list(Variations(checkpoint_class, Path(folder)).outcomes(arguments.key))
        print("\n".join(table(checkpoint_class, outcomes)), end="\n\n", flush=True)
        wrong += [(name, outcome) for outcome in outcomes if outcome.kind == "WRONG"]
    for name, outcome in wrong:
        print(f"WRONG: {name} {outcome.key} = {outcome.value}: logits differ by {outcome.differ:.1e}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
