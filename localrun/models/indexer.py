"""The indexer of DeepSeek-V3.2's sparse attention: its keys, its tensors, and which layers have one.

Every layer with an indexer keeps a key more of each token, by which a query chooses the index_topk tokens that it
attends to. Layers without one ("shared") attend to the choice of the last layer that has one ("full").
Source: llama.cpp 0c1e57098, src/models/deepseek32.cpp and glm-dsa.cpp; transformers 5.24, models/deepseek_v32 and
glm_moe_dsa.
"""

from __future__ import annotations

import re

from localrun.models.architecture import INDEXED, MTP, UNINDEXED, Fields, Key, Plain, Shape, Tensor
from localrun.models.checkpoint_class import read
from localrun.models.config import Config
from localrun.models.keys import Keys

KEY_EPS = 1e-6  # of the keys' layer norm, whatever rms_norm_eps says
FULL, SHARED = "full", "shared"
INDEXER = "self_attn.indexer"
KEYS = (
    Key("attention.indexer.head_count", "index_n_heads"),
    Key("attention.indexer.key_length", "index_head_dim"),
    Key("attention.indexer.top_k", "index_topk"),
)
SETTINGS = {"index_head_dim": read(128), "index_topk": read(2048)}


def _normed(c: Config) -> Shape:
    return (c.index_head_dim,)


_PLACES = (
    ("wq_b", "attn_q_b.weight", lambda c: (c.index_n_heads * c.index_head_dim, c.q_lora_rank), Plain()),
    ("wk", "attn_k.weight", lambda c: (c.index_head_dim, c.hidden_size), Plain()),
    ("k_norm", "k_norm.weight", _normed, Plain()),
    ("k_norm.bias", "k_norm.bias", _normed, Plain(f"{INDEXER}.k_norm.bias")),
    ("weights_proj", "proj.weight", lambda c: (c.index_n_heads, c.hidden_size), Plain()),
)
_OF_LAYERS = tuple(
    Tensor(f"{INDEXER}.{module}", f"indexer.{name}", shape, source, INDEXED, when=lambda c: not c.lacks_indexer)
    for module, name, shape, source in _PLACES
)
# What is never used: the layer for multi-token prediction attends to all tokens, but checkpoints have an indexer for
# it; some converters write one for shared layers.
UNUSED = tuple(
    Tensor(f"{INDEXER}.{module}", f"indexer.{name}", shape, source if layers == MTP else None, layers,
           with_module=f"{INDEXER}.wq_b", may_lack=True)
    for layers in (MTP, UNINDEXED)
    for module, name, shape, source in _PLACES
)  # fmt: skip
TENSORS = _OF_LAYERS + UNUSED


def read_indexer(keys: Keys, fields: Fields, types: tuple[str, ...]) -> Fields:
    """What a GGUF says of its indexers; without any of their tensors its model attends to all tokens."""
    rope_dim, head_dim = fields["qk_rope_head_dim"], fields["index_head_dim"]
    if head_dim < rope_dim:
        keys.fail("attention.indexer.key_length", head_dim, f"rope.dimension_count, {rope_dim}, or more")
    of_layers = re.compile(r"blk\.(\d+)\.indexer\.")
    found = (match for match in map(of_layers.match, keys.file.tensors) if match)
    if any(int(match[1]) < len(types) for match in found):
        return {"indexer_types": types}
    return {"indexer_types": types, "index_topk": 0, "lacks_indexer": True}


def needs_q_lora(keys: Keys, fields: Fields) -> None:
    """Raises GGUFError if queries have no latent: the indexer reads it as well."""
    if fields["q_lora_rank"] is None:
        keys.fail("attention.q_lora_rank", "missing", "the width of the latent that the indexer reads")
