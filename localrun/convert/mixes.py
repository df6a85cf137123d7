"""Which type each tensor gets: llama.cpp's rules for its file types, and where this converter departs from them.

Source: src/llama-quant.cpp of https://github.com/ggml-org/llama.cpp @007dbbf3, tensor_allows_quantization and
llama_tensor_get_type. Departures: attn_k_b and attn_v_b get at least Q8_0 (they are small, and all positions pass
through them), whatever an override says, and in MXFP4_MOE, where llama.cpp takes them for experts; rows that are no
whole blocks of a type without a fallback get F16 instead of an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from localrun.convert.metadata import Metadata
from localrun.convert.targets import Target
from localrun.errors import LocalrunError
from localrun.gguf import types as tensor_types
from localrun.models.names import EMBED_TOKENS, LM_HEAD, READ_BY_ROW
from localrun.models.registry import ARCHITECTURES
from quant.formats import registry


class Mix(NamedTuple):
    """A mix of types for the tensors of a file.

    Attributes:
        number: general.file_type (llama.h, enum llama_ftype).
        type: what most tensors get.
        fallback: for rows that are no whole blocks of that type.
        compared: whether `localrun plan` weighs it up against its neighbours in size.
    """

    number: int
    type: str
    fallback: str = "F16"
    compared: bool = False


MIXES = {
    "F32": Mix(0, "F32"),
    "F16": Mix(1, "F16"),
    "BF16": Mix(32, "BF16"),
    "Q8_0": Mix(7, "Q8_0", compared=True),
    "Q4_0": Mix(2, "Q4_0", compared=True),
    "Q4_1": Mix(3, "Q4_1"),
    "Q5_0": Mix(8, "Q5_0"),
    "Q5_1": Mix(9, "Q5_1"),
    "Q4_K_S": Mix(14, "Q4_K", "Q5_0", compared=True),
    "Q4_K_M": Mix(15, "Q4_K", "Q5_0", compared=True),
    "Q5_K_S": Mix(16, "Q5_K", "Q5_1", compared=True),
    "Q5_K_M": Mix(17, "Q5_K", "Q5_1", compared=True),
    "Q6_K": Mix(18, "Q6_K", "Q8_0", compared=True),
    "IQ4_NL": Mix(25, "IQ4_NL"),
    "MXFP4_MOE": Mix(38, "MXFP4"),
}
ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}  # the first two as in llama-quantize
TYPES = registry.QUANTIZABLE
PLAIN = ("F32", "F16", "BF16")

_FALLBACK = {mix.type: mix.fallback for mix in MIXES.values()}
_KEPT = re.compile(r"_norm\.weight$|ffn_gate_inp\.weight$|(?<!weight)$")  # stays F32 whatever its dimensions
_MLA = re.compile(r"attn_[kv]_b\.weight$")
_MLA_TYPES = (*PLAIN, "Q8_0")


@dataclass(frozen=True)
class Override:
    """A type for the tensors whose name has a match of pattern; the first override that matches counts."""

    pattern: re.Pattern[str]
    type: str


def parse_mix(name: str) -> str:
    """A key of MIXES, in any case, aliases resolved. Raises LocalrunError."""
    mix = ALIASES.get(name.upper(), name.upper())
    if mix not in MIXES:
        raise LocalrunError(f"unknown type {name!r}; expected one of {', '.join([*MIXES, *ALIASES])}")
    return mix


def parse_override(text: str) -> Override:
    """REGEX=TYPE. Raises LocalrunError."""
    pattern, equals, type_ = text.rpartition("=")
    if not equals or not pattern or type_.upper() not in TYPES:
        raise LocalrunError(f"--tensor-type {text!r}: expected REGEX=TYPE, TYPE one of {', '.join(TYPES)}")
    try:
        return Override(re.compile(pattern), type_.upper())
    except re.error as error:
        raise LocalrunError(f"--tensor-type {text!r}: no regular expression: {error}") from None


def choose_types(
    targets: list[Target],
    metadata: Metadata,
    mix: str,
    overrides: Sequence[Override] = (),
    *,
    has_imatrix: bool = False,
) -> list[str]:
    """The type of each target.

    Args:
        mix: a key of MIXES.
        has_imatrix: whether importances are there; some rules look at that.

    Raises LocalrunError if an override matches no tensor, or names a type that its rows do not fit.
    """
    rules = _Rules(targets, metadata, mix, has_imatrix)
    unused = list(overrides)
    types = []
    for target in targets:
        override = next((each for each in overrides if each.pattern.search(target.name)), None)
        if override is None or not _may_be_quantized(target) or is_overruled(target, override):
            types.append(rules.type_of(target))
        else:
            types.append(_checked(target, override.type))
        unused = [each for each in unused if each is not override]
    for each in unused:
        raise LocalrunError(
            f"--tensor-type {each.pattern.pattern}={each.type}: matches no tensor (or an earlier one did)"
        )
    return types


def interleave(targets: list[Target], types: list[str]) -> list[str]:
    """The types with those that can be interleaved in their stead, where whole rows are multiplied."""
    return [
        type_
        if READ_BY_ROW.search(target.name) or any(piece.n_rows % tensor_types.ROWS for piece in target.pieces)
        else tensor_types.interleaved(type_, target.shape)
        for target, type_ in zip(targets, types, strict=True)
    ]


def is_overruled(target: Target, override: Override) -> bool:
    """Whether an override would have made attn_k_b or attn_v_b less than Q8_0."""
    return bool(_MLA.search(target.name) and override.pattern.search(target.name)) and override.type not in _MLA_TYPES


def fits(type_: str, n_cols: int) -> bool:
    """Whether rows of n_cols are whole blocks."""
    return n_cols % GGML_QUANT_SIZES[GGMLQuantizationType[type_]][0] == 0


def _checked(target: Target, type_: str) -> str:
    if not fits(type_, target.n_cols):
        raise LocalrunError(
            f"--tensor-type: rows of '{target.name}' are {target.n_cols} weights, no whole {type_} blocks"
        )
    return type_


def _may_be_quantized(target: Target) -> bool:
    n_dims = next((i for i, size in enumerate(target.shape) if size > 1), len(target.shape))  # leading ones don't count
    return len(target.shape) - n_dims >= 2 and not _KEPT.search(target.name)


def _count(metadata: Metadata, key: str, default: int) -> int:
    """A count of the model; default where a file has one a layer, or something else."""
    value = metadata.get(key, default)
    return value if isinstance(value, int) else default


class _Rules:
    """llama.cpp's choices for one model."""

    def __init__(self, targets: list[Target], metadata: Metadata, mix: str, has_imatrix: bool) -> None:
        self._mix, self._default, self._has_imatrix = mix, MIXES[mix].type, has_imatrix
        self._n_layers = _count(metadata, ".block_count", 0)
        self._n_experts = _count(metadata, ".expert_count", 0)
        heads, kv_heads = (_count(metadata, f".attention.{name}", 1) for name in ("head_count", "head_count_kv"))
        self._n_gqa = heads // max(kv_heads, 1)
        architecture = ARCHITECTURES[metadata.architecture]
        self._values_need_bits = architecture.values_need_bits(self._n_layers, self._n_gqa)
        self._tied = all(target.name != LM_HEAD for target in targets)

    def type_of(self, target: Target) -> str:
        if not _may_be_quantized(target):
            return "F32"
        if self._default in PLAIN:
            return self._default
        if _MLA.search(target.name):
            return "Q8_0" if fits("Q8_0", target.n_cols) else "F16"
        wanted = self._wanted(target)
        if fits(wanted, target.n_cols):
            return wanted
        fallback = _FALLBACK.get(wanted, "F16")
        return fallback if fits(fallback, target.n_cols) else "F16"

    def _wanted(self, target: Target) -> str:
        name = target.name
        if name == LM_HEAD or (self._tied and name == EMBED_TOKENS):
            return "Q8_0" if self._mix in ("Q8_0", "MXFP4_MOE") or not fits(self._default, target.n_cols) else "Q6_K"
        if self._mix == "MXFP4_MOE":
            return "MXFP4" if len(target.shape) == 3 and target.shape[0] > 1 else "Q8_0"
        if re.search(r"attn_(v|qkv|kv_b)\.weight$", name):
            return self._value(_layer(name))
        if name.endswith("attn_k.weight") and self._n_experts == 8:
            return "Q8_0"
        if "ffn_down" in name:
            return self._down(_layer(name))
        if name.endswith("attn_output.weight") and self._n_experts == 8 and self._mix in ("Q4_K_S", "Q4_K_M", "IQ4_NL"):
            return "Q5_K"
        return self._default

    def _value(self, index: int) -> str:
        """The value projection, which has an outsized effect for its size."""
        type_ = self._default
        if self._mix in ("Q4_K_M", "Q5_K_M") and self._more_bits(index):
            type_ = "Q6_K"
        elif (self._mix == "Q4_K_S" and index < 4) or (self._mix == "IQ4_NL" and self._n_gqa >= 4):
            type_ = "Q5_K"
        if self._values_need_bits and type_ == "Q4_K":
            type_ = "Q5_K"
        return "Q8_0" if self._n_experts == 8 else type_

    def _down(self, index: int) -> str:
        early = index < self._n_layers // 8
        if self._mix in ("Q4_K_M", "Q5_K_M") and self._more_bits(index):
            return "Q6_K"
        if early and (self._mix == "Q4_K_S" or (self._mix == "IQ4_NL" and not self._has_imatrix)):
            return "Q5_K"
        if early and self._has_imatrix and self._mix in ("Q4_0", "Q5_0"):
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[self._mix]
        return self._default

    def _more_bits(self, index: int) -> bool:
        """The first and the last eighth of the layers, and every third between."""
        eighth = self._n_layers // 8
        return index < eighth or index >= 7 * self._n_layers // 8 or (index - eighth) % 3 == 2


def _layer(name: str) -> int:
    """The number of the layer in a tensor's name; 0 where there is none."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else 0
