"""A GGUF's keys to a Config, by the declaration of its architecture, and checked."""

from functools import partial
from typing import Any

from localrun.errors import GGUFError, UnsupportedModelError
from localrun.gguf.file import GGUFFile
from localrun.models.architecture import REQUIRED, Key
from localrun.models.config import Config
from localrun.models.keys import Keys
from localrun.models.parts import EMBED_TOKENS, LM_HEAD
from localrun.models.registry import ARCHITECTURES
from localrun.models.rope_scaling import read_scaling

_LONGEST_NAME = 64  # characters; llama.cpp's are a third as long
_DRAFTS = "dflash"  # an architecture of what drafts for a model: models/dspark.py
IMATRIX = "imatrix"  # general.type of an importance matrix


def read_config(file: GGUFFile) -> Config:
    """The configuration of a model that the native backend runs.

    Raises:
        GGUFError: a key is missing, of another type, or contradicts a tensor; or the file only drafts for a model.
        UnsupportedModelError: another architecture, or a setting that the native backend does not know.
    """
    name = architecture_of(file)
    if name == _DRAFTS:
        raise GGUFError(f"{file.path}: '{name}' is no model but drafts for one; --draft takes those for a DeepSeek-V4")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(f"{file.path}: architecture '{name}' is not native")
    architecture, keys = ARCHITECTURES[name], Keys(file, name)
    fields: dict[str, Any] = {"rope_scaling": read_scaling(keys, architecture.yarn_truncates)}
    for key in architecture.keys:
        value = _read(keys, key, fields)
        if key.field and key.value is None:
            fields[key.field] = value
    rows = keys.rows(EMBED_TOKENS.name)
    if fields["vocab_size"] not in (None, rows):
        keys.fail("vocab_size", fields["vocab_size"], f"{rows}, the rows of token_embd")
    fields |= {"vocab_size": rows, "tie_word_embeddings": LM_HEAD.name not in file.tensors}
    fields |= architecture.read(keys, fields)
    config = Config(architecture=name, **architecture.constants, **fields)
    keys.refuse_unread()
    _check(keys, config)
    return config


def is_imatrix(file: GGUFFile) -> bool:
    """Whether a file holds importances and no model."""
    kind = file.metadata.get("general.type")
    return isinstance(kind, str) and kind == IMATRIX  # an array would be compared item by item


def architecture_of(file: GGUFFile) -> str:
    """The name of a model's architecture. Raises GGUFError if it has none, as an importance matrix."""
    if is_imatrix(file):
        raise GGUFError(f"{file.path}: is an importance matrix, expected a model")
    name = file.string("general.architecture")
    if len(name) > _LONGEST_NAME or not name.isprintable():
        found = f"key 'general.architecture' is {name[:_LONGEST_NAME]!r}"
        raise GGUFError(f"{file.path}: {found}, expected the name of an architecture")
    return name


def context_length(file: GGUFFile) -> int | None:
    """Tokens that a model of whatever architecture was made for; None if the file does not say."""
    length = file.metadata.get(f"{architecture_of(file)}.context_length")
    return length if type(length) is int and length > 0 else None


def _read(keys: Keys, key: Key, fields: dict[str, Any]) -> Any:
    """The key's value, or what its absence means. A key that is only written must have its type."""
    getter = partial(keys.u32, by_layer=True) if key.by_layer else getattr(keys, key.type)
    if key.value is not None:
        return getter(key.name, None)
    if key.default is REQUIRED:
        return getter(key.name)
    return getter(key.name, key.default(fields) if callable(key.default) else key.default)


def _check(keys: Keys, config: Config) -> None:
    """Relations between keys. Raises GGUFError."""
    c = config
    if c.num_hidden_layers < 1:
        keys.fail("nextn_predict_layers", c.num_nextn_predict_layers, "fewer than block_count")
    if c.num_hidden_layers > max(len(keys.file.tensors), len(c.compress_ratios)):
        keys.fail("block_count", c.num_hidden_layers, f"layers for the {len(keys.file.tensors)} tensors of the file")
    if c.qk_rope_head_dim % 2 or not c.qk_rope_head_dim:
        keys.fail("rope.dimension_count", c.qk_rope_head_dim, "an even number, 2 or more")
    if not c.rms_norm_eps >= 0:
        keys.fail("attention.layer_norm_rms_epsilon", c.rms_norm_eps, "not negative")
    if not c.rope_theta > 0:
        keys.fail("rope.freq_base", c.rope_theta, "a positive number")
    if c.num_key_value_heads and c.num_attention_heads % c.num_key_value_heads:
        keys.fail("attention.head_count_kv", c.num_key_value_heads, f"a divisor of {c.num_attention_heads}")
    if c.head_dim and c.qk_rope_head_dim > c.head_dim:
        keys.fail("rope.dimension_count", c.qk_rope_head_dim, f"at most the head's {c.head_dim}")
    if c.n_routed_experts:
        _check_experts(keys, c)


def _check_experts(keys: Keys, c: Config) -> None:
    if c.num_experts_per_tok > c.n_routed_experts:
        keys.fail("expert_used_count", c.num_experts_per_tok, f"at most expert_count, {c.n_routed_experts}")
    if c.n_routed_experts % c.n_group:
        keys.fail("expert_group_count", c.n_group, f"a divisor of expert_count, {c.n_routed_experts}")
    if c.topk_group > c.n_group:
        keys.fail("expert_group_used_count", c.topk_group, f"at most expert_group_count, {c.n_group}")
    if c.num_experts_per_tok > c.n_routed_experts // c.n_group * c.topk_group:
        keys.fail("expert_used_count", c.num_experts_per_tok, "at most the experts of the groups in use")
