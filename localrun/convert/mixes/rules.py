"""llama.cpp's choice of a type for every tensor, by the name of a mix.

Source: src/llama-quant.cpp of https://github.com/ggml-org/llama.cpp @007dbbf3: tensor_allows_quantization,
tensor_type_fallback, llama_tensor_get_type_impl, tensor_requires_imatrix. Where this departs: the package's docstring.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Protocol

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from localrun.convert.metadata import Metadata
from localrun.convert.mixes.table import MIXES, PLAIN
from localrun.models.names import EMBED_TOKENS, LM_HEAD
from localrun.models.registry import ARCHITECTURES

# What stays F32 whatever its dimensions.
_KEPT = re.compile(
    r"_norm\.weight$|ffn_gate_inp\.weight$|indexer\.([kq]_)?proj\.weight$|hc_\w+\.weight$|_ape\.weight$|(?<!weight)$"
)
_TABLE = re.compile(r"ffn_gate_tid2eid\.weight$")
_BF16 = re.compile(r"_compressor_(kv|gate)\.weight$")  # as in the checkpoint: all later tokens see what they pool
MLA = re.compile(r"attn_[kv]_b\.weight$")  # latent attention's small matrices

# For rows that are no whole blocks.
_FALLBACK = {
    **dict.fromkeys(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"], "IQ4_NL"),
    **dict.fromkeys(["Q2_K", "Q3_K", "TQ1_0", "TQ2_0"], "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}
# Types that are garbage without importances.
_NEED_IMPORTANCES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")

# The parts that have rules of their own, by what their names contain.
_CATEGORIES = {
    "value": r"attn_(v|qkv|kv_b)\.weight",
    "key": r"attn_k\.weight",
    "query": r"attn_q\.weight",
    "output": r"attn_output\.weight",
    "up": r"ffn_up",
    "gate": r"ffn_gate",
    "down": r"ffn_down",
}
_LAYER = re.compile(r"blk\.(\d+)\.")

# Types by mix, where they are not the mix's own.
_ONE_BIT = ("IQ1_S", "IQ1_M")
_TWO_BITS = (*_ONE_BIT, "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_LARGER_TWO_BITS = ("IQ2_S", "IQ2_M")
_HEAD = {"Q8_0": "Q8_0", "MXFP4_MOE": "Q8_0", **dict.fromkeys([*_TWO_BITS, "IQ3_XXS"], "Q5_K")}
_EMBEDDING = {
    **dict.fromkeys([*_ONE_BIT, "IQ2_XXS", "IQ2_XS"], "Q2_K"),
    **dict.fromkeys([*_LARGER_TWO_BITS, "IQ3_XXS"], "IQ3_S"),
    **dict.fromkeys(["TQ1_0", "TQ2_0"], "Q4_K"),
}
_VALUE = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
_SHARED_VALUE = {  # by four heads or more
    **dict.fromkeys(["Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"], "Q4_K"),
    **dict.fromkeys(["IQ4_NL", "IQ4_XS"], "Q5_K"),
}
_QUERY = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}
_OUTPUT = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_XXS": "IQ3_S", "IQ3_M": "Q4_K"}
_OUTPUT_OF_8_EXPERTS = dict.fromkeys(
    ["Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"], "Q5_K"
)
_DOWN = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
_EARLY_DOWN = {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K", "IQ3_M": "Q4_K"}
_EARLY_DOWN_WITHOUT_IMATRIX = {"IQ3_XXS": "Q4_K", "IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}
_EARLY_DOWN_WITH_IMATRIX = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}


class Named(Protocol):
    """A tensor; shape in NumPy order."""

    name: str
    shape: tuple[int, ...]


def fits(type_: str, n_cols: int) -> bool:
    """Whether rows of n_cols are whole blocks."""
    return n_cols % GGML_QUANT_SIZES[GGMLQuantizationType[type_]][0] == 0


def fitting(type_: str, n_cols: int) -> str:
    """The type, or what takes its place where rows of n_cols are no whole blocks."""
    if fits(type_, n_cols):
        return type_
    fallback = _FALLBACK.get(type_, "F16")
    return fallback if fits(fallback, n_cols) else "F16"


def may_be_quantized(target: Named) -> bool:
    """Whether a tensor is a matrix that mixes decide about: no vector, norm or router."""
    n_dims = next((i for i, size in enumerate(target.shape) if size > 1), len(target.shape))  # leading ones don't count
    return len(target.shape) - n_dims >= 2 and not (_KEPT.search(target.name) or is_table(target))


def is_table(target: Named) -> bool:
    """Whether a tensor holds whole numbers, which no type changes."""
    return bool(_TABLE.search(target.name))


def needs_importances(name: str, type_: str, mix: str | None) -> bool:
    """Whether llama.cpp refuses to pack a tensor into a type without importances."""
    if name in (EMBED_TOKENS, LM_HEAD):
        return False
    return type_ in _NEED_IMPORTANCES or (type_ == "Q2_K" and mix == "Q2_K_S")


def needs_imatrix(mix: str) -> bool:
    """Whether a mix, a key of MIXES, has tensors that need importances, whatever the model."""
    return MIXES[mix].type in _NEED_IMPORTANCES or mix in ("Q2_K_S", "IQ3_XS")


def more_bits(index: int, n_layers: int) -> bool:
    """Whether a layer is of the first or the last eighth, or every third between."""
    eighth = n_layers // 8
    return index < eighth or index >= 7 * n_layers // 8 or (index - eighth) % 3 == 2


@cache
def _category(name: str) -> str:
    return next((category for category, pattern in _CATEGORIES.items() if re.search(pattern, name)), "")


def _layer(name: str) -> int:
    """The number of the layer in a tensor's name; -1 where there is none."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _places(targets: Iterable[Named]) -> dict[str, int]:
    """Name -> how many tensors of its category come before it: layer by layer, in the order of names."""
    counts: Counter[str] = Counter()
    places = {}
    for target in sorted(targets, key=lambda target: (_layer(target.name), target.name)):
        if may_be_quantized(target):
            category = _category(target.name)
            places[target.name] = counts[category]
            counts[category] += 1
    return places


def _number(metadata: Metadata, key: str, default: int) -> int:
    """A count of the model, the first layer's where there is one a layer; default where it is something else."""
    value: Any = metadata.get(key, default)
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, int) else default


class Rules:
    """llama.cpp's choices for one model and one mix, a key of MIXES."""

    def __init__(self, targets: list[Any], metadata: Metadata, mix: str, has_imatrix: bool) -> None:
        self._mix, self._default, self._has_imatrix = mix, MIXES[mix].type, has_imatrix
        self._n_layers = _number(metadata, ".block_count", 0)
        self._n_experts = _number(metadata, ".expert_count", 0)
        heads = _number(metadata, ".attention.head_count", 1)
        self._n_shared = heads // max(_number(metadata, ".attention.head_count_kv", heads), 1)
        architecture = ARCHITECTURES.get(metadata.architecture)  # none of blocks that draft
        self._values_need_bits = bool(architecture) and architecture.values_need_bits(self._n_layers, self._n_shared)
        self._tied = all(target.name != LM_HEAD for target in targets)
        self._places = _places(targets)
        self._n_values = sum(_category(name) == "value" for name in self._places)

    def type_of(self, target: Any) -> str:
        """The type of one of the model's targets."""
        if not may_be_quantized(target):
            return "F32"
        if self._default in PLAIN:
            return self._default
        if _BF16.search(target.name):
            return "BF16"
        if MLA.search(target.name):
            return fitting("Q8_0", target.n_cols)
        return fitting(self._wanted(target), target.n_cols)

    def _wanted(self, target: Any) -> str:
        name = target.name
        if name == LM_HEAD or (self._tied and name == EMBED_TOKENS):
            return _HEAD.get(self._mix, "Q6_K") if fits(self._default, target.n_cols) else "Q8_0"
        if self._mix == "MXFP4_MOE":
            return "MXFP4" if len(target.shape) == 3 and target.shape[0] > 1 else "Q8_0"
        if name == EMBED_TOKENS:
            return self._own(_EMBEDDING)
        category = _category(name)
        if self._mix in _TWO_BITS:
            return self._of_two_bits(category, name)
        if category == "value":
            return self._value(self._places[name])
        if category in ("key", "query"):
            return "Q8_0" if category == "key" and self._n_experts == 8 else self._own(_QUERY)
        if category == "output":
            return self._own(_OUTPUT_OF_8_EXPERTS if self._n_experts == 8 else _OUTPUT)
        # In a mixture layers count; otherwise there is one tensor a layer.
        index = _layer(name) if self._n_experts > 1 else self._places[name]
        if category == "down":
            return self._down(index)
        is_middle = self._n_layers // 8 <= index < 7 * self._n_layers // 8
        return "IQ3_XXS" if self._mix == "IQ3_XS" and category in ("up", "gate") and is_middle else self._default

    def _own(self, types: Mapping[str, str]) -> str:
        return types.get(self._mix, self._default)

    def _of_two_bits(self, category: str, name: str) -> str:
        """The rules of mixes with one or two bits a weight."""
        more = "IQ3_S" if self._mix in _LARGER_TWO_BITS else "Q2_K"
        if category == "value":
            return "Q4_K" if self._n_shared >= 4 or self._n_experts >= 4 else more
        if category == "key" and self._n_experts == 8:
            return "Q4_K"
        if category == "down" and self._places[name] < self._n_layers // 8:
            return more
        if category == "output" and self._n_experts == 8:
            return "Q5_K"
        if category == "output" and self._mix in _LARGER_TWO_BITS:
            return more
        return "IQ2_XXS" if category == "output" and self._mix in _ONE_BIT else self._default

    def _value(self, index: int) -> str:
        """The value projection, which has an outsized effect for its size."""
        type_ = self._own(_VALUE)
        if self._n_shared >= 4:
            type_ = _SHARED_VALUE.get(self._mix, type_)
        elif self._mix == "IQ3_XXS" and not self._has_imatrix:
            type_ = "IQ3_S"
        if self._mix in ("Q4_K_M", "Q5_K_M") and more_bits(index, self._n_values):
            type_ = "Q6_K"
        elif index < {"Q3_K_M": 2, "Q4_K_S": 4}.get(self._mix, 0):
            type_ = "Q5_K"
        if self._values_need_bits and type_ in ("Q3_K", "Q4_K"):
            type_ = "Q5_K"
        return "Q8_0" if self._n_experts == 8 else type_

    def _down(self, index: int) -> str:
        type_ = self._own(_DOWN)
        if self._mix == "IQ3_XXS" and not self._has_imatrix:
            type_ = "Q3_K"
        if index < self._n_layers // 8:
            extra = _EARLY_DOWN_WITH_IMATRIX if self._has_imatrix else _EARLY_DOWN_WITHOUT_IMATRIX
            type_ = (_EARLY_DOWN | extra).get(self._mix, type_)
        if self._mix == "Q3_K_M" and index < self._n_layers // 16:
            type_ = "Q5_K"
        if more_bits(index, self._n_layers):
            if self._mix in ("Q4_K_M", "Q5_K_M"):
                type_ = "Q6_K"
            elif self._mix == "IQ3_M" and self._n_experts == 8:
                type_ = "Q4_K"
        return type_
