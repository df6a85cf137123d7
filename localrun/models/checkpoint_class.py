"""What each key of a config.json means to the class of transformers that it names: one table a class.

A key is read; or must have one of some values, since others have no place in a GGUF or in the network; or changes no
number. A file that lacks a key means the class's own default. scripts/vary_config.py holds the tables against the
classes: it varies every key and compares logits.

Source: the configuration classes of transformers 5.24, configuration_utils.py and modeling_rope_utils.py there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

READ, ONLY, NO_EFFECT = "read", "only", "no effect"


@dataclass(frozen=True)
class Setting:
    """A key of config.json.

    Attributes:
        use: READ, ONLY or NO_EFFECT.
        default: what a file means that lacks the key; None, like null, means what `null` says.
        null: what null means, given the fields of Config that are known; None if it means nothing.
        values: what an ONLY must be.
        why: why it must.
    """

    use: str
    default: Any = None
    null: Callable[[dict[str, Any]], Any] | None = None
    values: tuple[Any, ...] = ()
    why: str = ""


def read(default: Any, null: Callable[[dict[str, Any]], Any] | None = None) -> Setting:
    """A key that is read."""
    return Setting(READ, default, null)


def only(*values: Any, why: str, default: Any = ..., null: Callable[[dict[str, Any]], Any] | None = None) -> Setting:
    """A key that must have one of some values; the first is the default, if no other is given."""
    return Setting(ONLY, values[0] if default is ... else default, null, values, why)


def no_effect(*names: str) -> dict[str, Setting]:
    """Keys that change no number."""
    return dict.fromkeys(names, Setting(NO_EFFECT))


@dataclass(frozen=True)
class CheckpointClass:
    """A class of transformers whose checkpoints can be converted.

    Attributes:
        name: as `architectures` has it.
        settings: by key; those of all classes are added.
        spelled: the names of a key that has several; of those that a file has, the first counts.
        flat: a file's settings with those that stand nested where other classes have them.
    """

    name: str
    settings: Mapping[str, Setting]
    spelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    flat: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda values: values)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", _COMMON | dict(self.settings))

    def names(self, key: str) -> tuple[str, ...]:
        """A key's names in config.json."""
        return self.spelled.get(key, (key,))

    def knows(self, name: str) -> bool:
        """Whether anything is known of a key of a config.json."""
        return name in self.settings or any(name in names for names in self.spelled.values())


SILU = only("silu", "swish", why="only silu has a place in the model")
NO_BIAS = only(False, why="biases have no place in the model")

_COMMON = {
    # The rotary settings are read together: convert.settings.
    "rope_parameters": read(None),
    "rope_scaling": read(None),
    "rope_theta": read(10000.0),  # a default that holds for the rope settings as well
    "original_max_position_embeddings": read(None),
    "partial_rotary_factor": only(None, 1.0, why="a head that is rotated in part has no place in the model"),
    "quantization_config": read(None),  # of the sources
    "transformers_weights": read(None),
    "architectures": read(None),
    "tie_word_embeddings": read(False),
    "per_layer_config": only(None, {}, why="layers that differ have no place in the model"),
    **no_effect(
        # what a training or a run in transformers asks for
        "attention_dropout", "initializer_range", "use_cache", "output_router_logits", "router_aux_loss_coef",
        "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder",
        "tie_last_hidden_states", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
        "experts_implementation", "dtype", "torch_dtype",
        # ids, names, labels
        "bos_token_id", "eos_token_id", "pad_token_id", "model_type", "transformers_version", "auto_map",
        "name_or_path", "_name_or_path", "_commit_hash", "tokenizer_class", "id2label", "label2id", "num_labels",
        "problem_type", "unsloth_version", "unsloth_fixed",
        # of generation, in old files
        "temperature", "top_k", "top_p", "do_sample", "max_length", "repetition_penalty",
    ),
}  # fmt: skip
