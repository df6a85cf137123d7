"""What declarations share: keys of all models and of grouped-query attention, and the tensors that layers are made of.

Source: llama.cpp 3f545becc, gguf-py/gguf/tensor_mapping.py, conversion/base.py and conversion/deepseek.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from localrun.models.architecture import (
    MOE,
    MTP,
    ROUTER,
    HeadRows,
    Key,
    Pairs,
    Plain,
    Settings,
    Shape,
    Stacked,
    Tensor,
    never,
)
from localrun.models.config import Config
from localrun.models.keys import Keys

COMMON_KEYS = (
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("feed_forward_length", "intermediate_size", by_layer=True),
    Key("attention.head_count", "num_attention_heads", by_layer=True),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", "f32"),
    Key("vocab_size", "vocab_size", default=None),  # the embedding's rows count
)


# Of models with layers for multi-token prediction, which a GGUF counts as well.
BLOCK_COUNT = Key("block_count", "num_hidden_layers", value=lambda c: c.num_hidden_layers + c.num_nextn_predict_layers)
NEXTN = Key("nextn_predict_layers", "num_nextn_predict_layers", default=0, omit=0)


def count_layers(keys: Keys, fields: dict[str, Any]) -> int:
    """num_hidden_layers by BLOCK_COUNT and NEXTN."""
    return keys.u32("block_count") - fields["num_nextn_predict_layers"]


def fair_share(fields: dict[str, Any]) -> int:
    """A head's part of the hidden vector."""
    return fields["hidden_size"] // max(fields["num_attention_heads"], 1)


def _head_dim(fields: dict[str, Any]) -> int:
    return fields["head_dim"]


def heads(fields: dict[str, Any]) -> int:
    """As many as queries have."""
    return fields["num_attention_heads"]


GQA_KEYS = (
    Key("attention.head_count_kv", "num_key_value_heads", default=heads, by_layer=True),
    Key("attention.key_length", "head_dim", default=fair_share),
    Key("attention.value_length", "v_head_dim", default=_head_dim, setting=None),
    Key("rope.dimension_count", "qk_rope_head_dim", default=_head_dim, setting=None),
)


def _vocabulary(c: Config) -> Shape:
    return c.vocab_size, c.hidden_size


def _hidden(c: Config) -> Shape:
    return (c.hidden_size,)


EMBED_TOKENS = Tensor("embed_tokens", "token_embd.weight", _vocabulary, Plain("model.embed_tokens.weight"))
LM_HEAD = Tensor(
    "lm_head", "output.weight", _vocabulary, Plain("lm_head.weight"),
    when=lambda c: not c.tie_word_embeddings, with_module="lm_head",
)  # fmt: skip
NORM = Tensor("norm", "output_norm.weight", _hidden, Plain("model.norm.weight"))
ROPE_FREQS = "rope_freqs.weight"

INPUT_NORM = Tensor("input_layernorm", "attn_norm.weight", _hidden)
POST_ATTENTION_NORM = Tensor("post_attention_layernorm", "ffn_norm.weight", _hidden)


def gqa(queries_and_keys: Plain | Pairs) -> tuple[Tensor, ...]:
    """The projections of grouped-query attention; how queries and keys come from a checkpoint depends on the rope."""
    return (
        Tensor("self_attn.q_proj", "attn_q.weight",
               lambda c: (c.num_attention_heads * c.head_dim, c.hidden_size), queries_and_keys),
        Tensor("self_attn.k_proj", "attn_k.weight",
               lambda c: (c.num_key_value_heads * c.head_dim, c.hidden_size), queries_and_keys),
        Tensor("self_attn.v_proj", "attn_v.weight", lambda c: (c.num_key_value_heads * c.v_head_dim, c.hidden_size)),
        Tensor("self_attn.o_proj", "attn_output.weight",
               lambda c: (c.hidden_size, c.num_attention_heads * c.v_head_dim)),
    )  # fmt: skip


QKV = "self_attn.qkv_proj"  # queries, keys and values one behind another


def joined_gqa(source: Plain) -> tuple[Tensor, ...]:
    """The same where queries, keys and values come of one matrix; the network asks for its parts (joined_rows)."""
    *parts, o_proj = gqa(Plain())
    return (
        Tensor(QKV, "attn_qkv.weight", lambda c: (sum(part.shape(c)[0] for part in parts), c.hidden_size), source),
        o_proj,
    )


def joined_rows(c: Config) -> dict[str, tuple[int, int]]:
    """First row and number of rows of queries, keys and values in QKV, by their names in a layer of a GGUF."""
    rows, first = {}, 0
    for part in gqa(Plain())[:3]:
        n_rows, _ = part.shape(c)
        rows[part.name] = first, n_rows
        first += n_rows
    return rows


def biases() -> tuple[Tensor, ...]:
    """Of queries, keys and values."""
    return tuple(
        Tensor(f"self_attn.{part}_proj.bias", f"attn_{part}.bias", rows, Plain(f"self_attn.{part}_proj.bias"),
               when=lambda c: c.attention_bias)
        for part, rows in (("q", _query_row), ("k", _key_row), ("v", lambda c: (c.num_key_value_heads * c.v_head_dim,)))
    )  # fmt: skip


def has_biases(keys: Keys) -> bool:
    """Whether a file has biases()."""
    return "blk.0.attn_q.bias" in keys.file.tensors


def norms(whole: bool = False) -> tuple[Tensor, ...]:
    """Of each head's queries and keys, or of all heads' as one vector."""
    widths = (_query_row, _key_row) if whole else (_head, _head)
    return tuple(
        Tensor(f"self_attn.{part}_norm", f"attn_{part}_norm.weight", width, when=lambda c: c.qk_norm)
        for part, width in zip("qk", widths, strict=True)
    )


def has_norms(keys: Keys) -> bool:
    """Whether a file has norms()."""
    return "blk.0.attn_q_norm.weight" in keys.file.tensors


def rotated(settings: Settings, fields: dict[str, Any]) -> int:
    """How many of a head's dimensions a checkpoint rotates."""
    part = settings.rope.partial_rotary_factor
    return fields["head_dim"] if part is None else int(fields["head_dim"] * part)


def layer_types(n_dense: int, n_layers: int) -> list[str]:
    """config.json's mlp_layer_types."""
    return ["dense"] * n_dense + ["sparse"] * (n_layers - n_dense)


def count_dense(settings: Settings, n_layers: int) -> int:
    """Leading layers without experts by mlp_layer_types; one, if config.json has none."""
    types = settings.get("mlp_layer_types", list) or layer_types(min(1, n_layers), n_layers)
    n_dense = types.index("sparse") if "sparse" in types else n_layers
    if types != layer_types(n_dense, n_layers):
        settings.fail(f"mlp_layer_types names other layers than {n_layers}, 'dense' ones and then 'sparse' ones")
    return n_dense


def _head(c: Config) -> Shape:
    return (c.head_dim,)


def _query_row(c: Config) -> Shape:
    return (c.num_attention_heads * c.head_dim,)


def _key_row(c: Config) -> Shape:
    return (c.num_key_value_heads * c.head_dim,)


def _query_rows(c: Config) -> int:
    return c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)


def _kv_b(c: Config) -> Shape:
    return c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank


def has_q_lora(c: Config) -> bool:
    """Whether queries come of a latent of their own."""
    return c.q_lora_rank is not None


JOINT_KV_B = "attn_kv_b.weight"
_KV_B = "self_attn.kv_b_proj"  # k_b and v_b together, in the checkpoint and in files of before April 2025
_KEYS_OF = HeadRows(_KV_B + ".weight", lambda c: (0, c.qk_nope_head_dim), _kv_b, transposed=True)
_VALUES_OF = HeadRows(_KV_B + ".weight", lambda c: (c.qk_nope_head_dim, c.qk_nope_head_dim + c.v_head_dim), _kv_b)
MLA = (
    Tensor("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa.weight",
           lambda c: (c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size)),
    Tensor("self_attn.kv_a_layernorm", "attn_kv_a_norm.weight", lambda c: (c.kv_lora_rank,)),
    Tensor("self_attn.o_proj", "attn_output.weight", lambda c: (c.hidden_size, c.num_attention_heads * c.v_head_dim)),
    Tensor("self_attn.q_proj", "attn_q.weight", lambda c: (_query_rows(c), c.hidden_size),
           when=lambda c: c.q_lora_rank is None),
    Tensor("self_attn.q_a_proj", "attn_q_a.weight", lambda c: (c.q_lora_rank, c.hidden_size), when=has_q_lora),
    Tensor("self_attn.q_a_layernorm", "attn_q_a_norm.weight", lambda c: (c.q_lora_rank,), when=has_q_lora),
    Tensor("self_attn.q_b_proj", "attn_q_b.weight", lambda c: (_query_rows(c), c.q_lora_rank), when=has_q_lora),
    Tensor("self_attn.k_b_proj", "attn_k_b.weight",
           lambda c: (c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim), _KEYS_OF, without_module=_KV_B),
    Tensor("self_attn.v_b_proj", "attn_v_b.weight",
           lambda c: (c.num_attention_heads, c.v_head_dim, c.kv_lora_rank), _VALUES_OF, without_module=_KV_B),
    Tensor(_KV_B, JOINT_KV_B, _kv_b, None, when=never, with_module=_KV_B),
)  # fmt: skip


def mlp(module: str, suffix: str, inner: Callable[[Config], int], **options: Any) -> tuple[Tensor, ...]:
    """gate, up and down of a feed-forward layer; options: Tensor's."""
    return (
        Tensor(f"{module}.gate_proj", f"ffn_gate{suffix}.weight", lambda c: (inner(c), c.hidden_size), **options),
        Tensor(f"{module}.up_proj", f"ffn_up{suffix}.weight", lambda c: (inner(c), c.hidden_size), **options),
        Tensor(f"{module}.down_proj", f"ffn_down{suffix}.weight", lambda c: (c.hidden_size, inner(c)), **options),
    )


# The router, logits of all E experts.
GATE = Tensor(ROUTER, "ffn_gate_inp.weight", lambda c: (c.n_routed_experts, c.hidden_size), layers=MOE)


def _inner(c: Config) -> Shape:
    return c.n_routed_experts, c.moe_intermediate_size, c.hidden_size


def _outer(c: Config) -> Shape:
    return c.n_routed_experts, c.hidden_size, c.moe_intermediate_size


_JOINED = "mlp.experts.gate_up_proj"  # gate rows first; some converters write it, ours does not
DOWN_EXPERTS = Tensor(
    "mlp.experts.down_proj", "ffn_down_exps.weight", _outer, Stacked("mlp.experts.{expert}.down_proj.weight"), MOE
)
EXPERTS = (
    Tensor("mlp.experts.gate_proj", "ffn_gate_exps.weight", _inner,
           Stacked("mlp.experts.{expert}.gate_proj.weight"), MOE, without_module=_JOINED),
    Tensor("mlp.experts.up_proj", "ffn_up_exps.weight", _inner,
           Stacked("mlp.experts.{expert}.up_proj.weight"), MOE, without_module=_JOINED),
    Tensor(_JOINED, "ffn_gate_up_exps.weight",
           lambda c: (c.n_routed_experts, 2 * c.moe_intermediate_size, c.hidden_size), None, MOE, with_module=_JOINED),
    DOWN_EXPERTS,
)  # fmt: skip


def renamed(tensors: tuple[Tensor, ...], names: Mapping[str, str]) -> tuple[Tensor, ...]:
    """The same with other names in a checkpoint, by module."""
    return tuple(
        replace(t, source=replace(t.source, name=names[t.module])) if t.module in names else t for t in tensors
    )


MIXTRAL_NAMES = {
    "mlp.gate": "block_sparse_moe.gate.weight",
    "mlp.gate.e_score_correction_bias": "block_sparse_moe.e_score_correction_bias",  # MiniMax's
    "mlp.experts.gate_proj": "block_sparse_moe.experts.{expert}.w1.weight",
    "mlp.experts.down_proj": "block_sparse_moe.experts.{expert}.w2.weight",
    "mlp.experts.up_proj": "block_sparse_moe.experts.{expert}.w3.weight",
}

_BIAS, _SHARED = "mlp.gate.e_score_correction_bias", "mlp.shared_experts"
SELECTION_BIAS = Tensor(
    _BIAS, "exp_probs_b.bias", lambda c: (c.n_routed_experts,), Plain(_BIAS), MOE,
    when=lambda c: c.has_selection_bias, with_module=_BIAS, may_lack=True,
)  # fmt: skip
SHARED_EXPERTS = mlp(
    _SHARED, "_shexp", lambda c: c.shared_intermediate_size, layers=MOE,
    when=lambda c: c.n_shared_experts > 0, with_module=_SHARED + ".gate_proj",
)  # fmt: skip


def _nextn(module: str, name: str, shape: Any, **options: Any) -> Tensor:
    return Tensor(module, f"nextn.{name}.weight", shape, layers=MTP, **options)


MTP_TENSORS = (  # the published checkpoints repeat the embedding and the head
    _nextn("eh_proj", "eh_proj", lambda c: (c.hidden_size, 2 * c.hidden_size)),
    _nextn("enorm", "enorm", lambda c: (c.hidden_size,)),
    _nextn("hnorm", "hnorm", lambda c: (c.hidden_size,)),
    _nextn("embed_tokens", "embed_tokens", EMBED_TOKENS.shape, with_module="embed_tokens", may_lack=True),
    _nextn("shared_head.head", "shared_head_head", LM_HEAD.shape, with_module="shared_head.head", may_lack=True),
    _nextn("shared_head.norm", "shared_head_norm", NORM.shape, may_lack=True),
)
