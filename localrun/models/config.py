"""What a model is: its sizes and settings, read from GGUF keys and checked, under Hugging Face's config.json names.

Which variant of an architecture a file holds is decided by the tensors and keys that are present, never by a layer
count or a file name. Keys and their types: llama.cpp 3f545becc, src/llama-model.cpp and conversion/deepseek.py.
"""

import math
from dataclasses import dataclass

from localrun.errors import GGUFError, UnsupportedModelError
from localrun.gguf.file import GGUFFile

KV_BYTES = 2  # the cache holds 16-bit values


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the training length are reached.

    Attributes:
        type: "linear" or "yarn".
        factor: how many times longer.
        original_max_position_embeddings: the training length (yarn).
        mscale_all_dim: YaRN's attention temperature; None where the file does not say.
        beta_fast, beta_slow: rotations over the training length between which yarn blends.
    """

    type: str
    factor: float
    original_max_position_embeddings: int = 0
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Config:
    """Sizes and settings of a model; fields of the other architecture are None or 0."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qk_rope_head_dim: int
    v_head_dim: int
    # grouped-query attention (llama)
    num_key_value_heads: int = 0
    head_dim: int = 0
    # multi-head latent attention (deepseek2)
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    num_nextn_predict_layers: int = 0
    # mixture of experts (deepseek2)
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache that one token takes in all layers."""
        if self.kv_lora_rank:
            width = self.kv_lora_rank + self.qk_rope_head_dim
        else:
            width = self.num_key_value_heads * (self.head_dim + self.v_head_dim)
        return self.num_hidden_layers * width * KV_BYTES


def read_config(file: GGUFFile) -> Config:
    """The configuration of a model that the native backend runs.

    Raises:
        GGUFError: a key is missing, of another type, or contradicts a tensor.
        UnsupportedModelError: another architecture, or a setting that the native backend does not know.
    """
    architecture = file.string("general.architecture")
    readers = {"deepseek2": _read_deepseek2, "llama": _read_llama}
    if architecture not in readers:
        raise UnsupportedModelError(f"{file.path}: architecture '{architecture}' is not native")
    keys = _Keys(file, architecture)
    config = readers[architecture](keys)
    keys.refuse_unread()
    _check(keys, config)
    return config


class _Keys:
    """The keys of one architecture: remembers which were read, so that an unknown one is not silently ignored."""

    # Known, and without effect on the result.
    HARMLESS = frozenset({"vocab_size", "feed_forward_length", "attention.key_length", "attention.value_length"})

    def __init__(self, file: GGUFFile, architecture: str):
        self.file = file
        self.prefix = architecture + "."
        self.read = set(self.HARMLESS)

    def _get(self, getter, name: str, default):
        self.read.add(name)
        return getter(self.prefix + name, *default)

    def u32(self, name: str, *default):
        value = self._get(self.file.u32, name, default)
        if isinstance(value, int) and value == 0 and not default:
            self.fail(name, 0, "a positive number")
        return value

    def f32(self, name: str, *default):
        value = self._get(self.file.f32, name, default)
        if not math.isfinite(value):
            self.fail(name, value, "a finite number")
        return value

    def bool(self, name: str, *default):
        return self._get(self.file.bool, name, default)

    def string(self, name: str, *default):
        return self._get(self.file.string, name, default)

    def has(self, name: str) -> bool:
        self.read.add(name)
        return self.file.has(self.prefix + name)

    def fail(self, name: str, found, expected) -> None:
        raise GGUFError(f"{self.file.path}: key '{self.prefix}{name}' is {found}; expected {expected}")

    def refuse_unread(self) -> None:
        """Raises UnsupportedModelError if the architecture has a key that nothing here understands."""
        for key in self.file.metadata:
            if key.startswith(self.prefix) and key.removeprefix(self.prefix) not in self.read:
                raise UnsupportedModelError(f"{self.file.path}: key '{key}' is not known to the native backend")


def _rows(keys: _Keys, tensor: str) -> int:
    """Rows of a 2-D tensor. Raises GGUFError if it is missing."""
    if tensor not in keys.file.tensors:
        raise GGUFError(f"{keys.file.path}: tensor '{tensor}' not found")
    return keys.file.tensors[tensor].shape[0]


def _common(keys: _Keys) -> dict:
    return {
        "architecture": keys.prefix[:-1],
        "hidden_size": keys.u32("embedding_length"),
        "intermediate_size": keys.u32("feed_forward_length"),
        "num_attention_heads": keys.u32("attention.head_count"),
        "vocab_size": _rows(keys, "token_embd.weight"),
        "max_position_embeddings": keys.u32("context_length"),
        "rms_norm_eps": keys.f32("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.f32("rope.freq_base", 10000.0),
        "rope_scaling": _read_rope_scaling(keys),
    }


def _read_rope_scaling(keys: _Keys) -> RopeScaling | None:
    type_ = keys.string("rope.scaling.type", "linear")  # what llama.cpp takes where the file does not say
    factor = keys.f32("rope.scaling.factor", 1.0)
    original = keys.u32("rope.scaling.original_context_length", 0) or keys.u32("context_length")
    log_multiplier = keys.f32("rope.scaling.yarn_log_multiplier", 0.0)
    betas = keys.f32("rope.scaling.yarn_beta_fast", 32.0), keys.f32("rope.scaling.yarn_beta_slow", 1.0)
    for name in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor"):
        if keys.f32(name, 1.0) != 1.0:
            raise UnsupportedModelError(f"{keys.file.path}: key '{keys.prefix}{name}' other than 1 is not native")
    keys.bool("rope.scaling.finetuned", False)
    if type_ not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"{keys.file.path}: rope scaling '{type_}' is not native")
    if not factor > 0:
        keys.fail("rope.scaling.factor", factor, "a positive number")
    if type_ == "none" or (type_ == "linear" and factor == 1.0):
        return None
    if type_ == "linear":
        return RopeScaling(type_, factor)
    for name, beta in zip(("fast", "slow"), betas, strict=True):
        if not beta > 0:
            keys.fail(f"rope.scaling.yarn_beta_{name}", beta, "a positive number")
    if not keys.f32("rope.freq_base", 10000.0) > 1:
        keys.fail("rope.freq_base", keys.f32("rope.freq_base"), "more than 1 with yarn")
    # The key holds 0.1 * mscale_all_dim, a quirk that llama.cpp keeps for old files' sake.
    return RopeScaling(type_, factor, original, log_multiplier / 0.1 if log_multiplier else None, *betas)


def _read_llama(keys: _Keys) -> Config:
    common = _common(keys)
    heads = common["num_attention_heads"]
    head_dim = keys.u32("attention.key_length", common["hidden_size"] // heads)
    if keys.u32("expert_count", 0):
        raise UnsupportedModelError(f"{keys.file.path}: llama with experts is not native")
    keys.u32("expert_used_count", 0)
    scaling = common["rope_scaling"]
    if scaling is not None and scaling.type == "yarn":
        raise UnsupportedModelError(f"{keys.file.path}: llama with yarn is not native")
    return Config(
        **common,
        num_hidden_layers=keys.u32("block_count"),
        num_key_value_heads=keys.u32("attention.head_count_kv", heads),
        head_dim=head_dim,
        v_head_dim=keys.u32("attention.value_length", head_dim),
        qk_rope_head_dim=keys.u32("rope.dimension_count", head_dim),
    )


_SCORING = {1: "softmax", 2: "sigmoid", 3: "softmax_after_topk"}


def _read_scoring(keys: _Keys) -> str:
    """Files without the key: those with a selection bias mean sigmoid (noaux_tc), the others softmax."""
    gating = keys.u32("expert_gating_func", 0)
    if gating in _SCORING:
        return _SCORING[gating]
    if gating:
        raise UnsupportedModelError(f"{keys.file.path}: expert gating function {gating} is not native")
    return "sigmoid" if any(name.endswith(".exp_probs_b.bias") for name in keys.file.tensors) else "softmax"


def _read_deepseek2(keys: _Keys) -> Config:
    common = _common(keys)
    n_nextn = keys.u32("nextn_predict_layers", 0)
    rope_dim = keys.u32("rope.dimension_count")
    if keys.has("attention.key_length_mla") != keys.has("attention.value_length_mla"):
        keys.fail("attention.value_length_mla", "alone or missing", "both *_mla keys or neither")
    lengths = ("key_length_mla", "value_length_mla")
    if not keys.has("attention.key_length_mla"):  # files of before April 2025 mean the heads' own lengths
        lengths = ("key_length", "value_length")
    key_length, v_head_dim = (keys.u32("attention." + length) for length in lengths)
    if key_length <= rope_dim:
        keys.fail("attention." + lengths[0], key_length, f"more than rope.dimension_count, {rope_dim}")
    keys.u32("leading_dense_block_count", 0)  # told by each layer's tensors
    keys.u32("expert_shared_count", 0)
    keys.u32("attention.head_count_kv", 1)
    q_lora_rank = keys.u32("attention.q_lora_rank", 0)
    has_q_lora = "blk.0.attn_q_a.weight" in keys.file.tensors
    n_group = keys.u32("expert_group_count", 1) or 1
    topk_group = keys.u32("expert_group_used_count", *([] if n_group > 1 else [1]))
    if common["rope_scaling"] is not None and common["rope_scaling"].type == "linear":
        raise UnsupportedModelError(f"{keys.file.path}: deepseek2 with linear rope scaling is not native")
    return Config(
        **common,
        num_hidden_layers=keys.u32("block_count") - n_nextn,
        num_nextn_predict_layers=n_nextn,
        q_lora_rank=(q_lora_rank or _rows(keys, "blk.0.attn_q_a.weight")) if has_q_lora else None,
        kv_lora_rank=keys.u32("attention.kv_lora_rank"),
        qk_nope_head_dim=key_length - rope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=v_head_dim,
        n_routed_experts=keys.u32("expert_count"),
        num_experts_per_tok=keys.u32("expert_used_count"),
        moe_intermediate_size=keys.u32("expert_feed_forward_length"),
        n_group=n_group,
        topk_group=topk_group if n_group > 1 else 1,
        scoring_func=_read_scoring(keys),
        norm_topk_prob=keys.bool("expert_weights_norm", False),
        routed_scaling_factor=keys.f32("expert_weights_scale", 1.0) or 1.0,  # 0 and absent mean no scaling
    )


def _check(keys: _Keys, config: Config) -> None:
    """Relations between keys. Raises GGUFError."""
    c = config
    if c.num_hidden_layers < 1:
        keys.fail("nextn_predict_layers", c.num_nextn_predict_layers, "fewer than block_count")
    if c.num_hidden_layers > len(keys.file.tensors):
        keys.fail("block_count", c.num_hidden_layers, f"layers for the {len(keys.file.tensors)} tensors of the file")
    if c.qk_rope_head_dim % 2 or not c.qk_rope_head_dim:
        keys.fail("rope.dimension_count", c.qk_rope_head_dim, "an even number, 2 or more")
    if not c.rms_norm_eps >= 0:
        keys.fail("attention.layer_norm_rms_epsilon", c.rms_norm_eps, "not negative")
    if not c.rope_theta > 0:
        keys.fail("rope.freq_base", c.rope_theta, "a positive number")
    if keys.file.u32(keys.prefix + "vocab_size", c.vocab_size) != c.vocab_size:
        keys.fail("vocab_size", keys.file.u32(keys.prefix + "vocab_size"), f"{c.vocab_size}, the rows of token_embd")
    if c.num_key_value_heads and c.num_attention_heads % c.num_key_value_heads:
        keys.fail("attention.head_count_kv", c.num_key_value_heads, f"a divisor of {c.num_attention_heads}")
    if c.head_dim and c.qk_rope_head_dim > c.head_dim:
        keys.fail("rope.dimension_count", c.qk_rope_head_dim, f"at most the head's {c.head_dim}")
    if c.n_routed_experts:
        _check_experts(keys, c)


def _check_experts(keys: _Keys, c: Config) -> None:
    if c.num_experts_per_tok > c.n_routed_experts:
        keys.fail("expert_used_count", c.num_experts_per_tok, f"at most expert_count, {c.n_routed_experts}")
    if c.n_routed_experts % c.n_group:
        keys.fail("expert_group_count", c.n_group, f"a divisor of expert_count, {c.n_routed_experts}")
    if c.topk_group > c.n_group:
        keys.fail("expert_group_used_count", c.topk_group, f"at most expert_group_count, {c.n_group}")
    if c.num_experts_per_tok > c.n_routed_experts // c.n_group * c.topk_group:
        keys.fail("expert_used_count", c.num_experts_per_tok, "at most the experts of the groups in use")
