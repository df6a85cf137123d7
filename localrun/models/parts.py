"""What declarations share: keys of all models and of grouped-query attention, and the tensors that layers are made of.

Source: llama.cpp 3f545becc, gguf-py/gguf/tensor_mapping.py and conversion/base.py.
Letters: D hidden_size, H heads, G key-value heads, d head_dim, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from localrun.models.architecture import MOE, ROUTER, Key, Pairs, Plain, Shape, Stacked, Tensor
from localrun.models.config import Config

COMMON_KEYS = (
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", "f32", setting_default=1e-6),
    Key("vocab_size", "vocab_size", default=None),  # the embedding's rows count
)


def _fair_share(fields: dict[str, Any]) -> int:
    """A head's part of the hidden vector."""
    return fields["hidden_size"] // max(fields["num_attention_heads"], 1)


def _head_dim(fields: dict[str, Any]) -> int:
    return fields["head_dim"]


def _heads(fields: dict[str, Any]) -> int:
    return fields["num_attention_heads"]


GQA_KEYS = (
    Key("attention.head_count_kv", "num_key_value_heads", default=_heads, setting_default=_heads),
    Key("attention.key_length", "head_dim", default=_fair_share, setting_default=_fair_share),
    Key("attention.value_length", "v_head_dim", default=_head_dim, setting=None, setting_default=_head_dim),
    Key("rope.dimension_count", "qk_rope_head_dim", default=_head_dim, setting=None, setting_default=_head_dim),
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
EXPERTS = (
    Tensor("mlp.experts.gate_proj", "ffn_gate_exps.weight", _inner,
           Stacked("mlp.experts.{expert}.gate_proj.weight"), MOE, without_module=_JOINED),
    Tensor("mlp.experts.up_proj", "ffn_up_exps.weight", _inner,
           Stacked("mlp.experts.{expert}.up_proj.weight"), MOE, without_module=_JOINED),
    Tensor(_JOINED, "ffn_gate_up_exps.weight",
           lambda c: (c.n_routed_experts, 2 * c.moe_intermediate_size, c.hidden_size), None, MOE, with_module=_JOINED),
    Tensor("mlp.experts.down_proj", "ffn_down_exps.weight", _outer,
           Stacked("mlp.experts.{expert}.down_proj.weight"), MOE),
)  # fmt: skip
