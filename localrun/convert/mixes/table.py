"""The mixes by name, and the types that tensors may have."""

from __future__ import annotations

from typing import NamedTuple

from gguf import GGMLQuantizationType

from localrun.errors import LocalrunError


class Mix(NamedTuple):
    """A mix of types for the tensors of a file.

    Attributes:
        number: general.file_type (llama.h, enum llama_ftype).
        type: what most tensors get.
        compared: whether `localrun plan` proposes it; those that it does not are worse than another of their size, or
            have more bits than a checkpoint.
    """

    number: int
    type: str
    compared: bool = False


MIXES = {
    "F32": Mix(0, "F32"),
    "F16": Mix(1, "F16"),
    "BF16": Mix(32, "BF16", compared=True),
    "Q8_0": Mix(7, "Q8_0", compared=True),
    "Q4_0": Mix(2, "Q4_0", compared=True),
    "Q4_1": Mix(3, "Q4_1"),
    "Q5_0": Mix(8, "Q5_0"),
    "Q5_1": Mix(9, "Q5_1"),
    "Q2_K_S": Mix(21, "Q2_K", compared=True),
    "Q2_K": Mix(10, "Q2_K", compared=True),
    "Q3_K_S": Mix(11, "Q3_K", compared=True),
    "Q3_K_M": Mix(12, "Q3_K", compared=True),
    "Q3_K_L": Mix(13, "Q3_K", compared=True),
    "Q4_K_S": Mix(14, "Q4_K", compared=True),
    "Q4_K_M": Mix(15, "Q4_K", compared=True),
    "Q5_K_S": Mix(16, "Q5_K", compared=True),
    "Q5_K_M": Mix(17, "Q5_K", compared=True),
    "Q6_K": Mix(18, "Q6_K", compared=True),
    "IQ1_S": Mix(24, "IQ1_S", compared=True),
    "IQ1_M": Mix(31, "IQ1_M", compared=True),
    "IQ2_XXS": Mix(19, "IQ2_XXS", compared=True),
    "IQ2_XS": Mix(20, "IQ2_XS", compared=True),
    "IQ2_S": Mix(28, "IQ2_XS", compared=True),
    "IQ2_M": Mix(29, "IQ2_S", compared=True),
    "IQ3_XXS": Mix(23, "IQ3_XXS", compared=True),
    "IQ3_XS": Mix(22, "IQ3_S", compared=True),
    "IQ3_S": Mix(26, "IQ3_S", compared=True),
    "IQ3_M": Mix(27, "IQ3_S", compared=True),
    "IQ4_XS": Mix(30, "IQ4_XS", compared=True),
    "IQ4_NL": Mix(25, "IQ4_NL"),
    "TQ1_0": Mix(36, "TQ1_0"),
    "TQ2_0": Mix(37, "TQ2_0"),
    "MXFP4_MOE": Mix(38, "MXFP4"),
}
# The first three as in llama-quantize.
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
PLAIN = ("F32", "F16", "BF16")
TABLE = "I32"  # of tables of whole numbers
# Whole numbers, and what only activations are packed in.
_NO_WEIGHTS = ("F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K")
TYPES = tuple(type_.name for type_ in GGMLQuantizationType if type_.name not in _NO_WEIGHTS)


def parse_mix(name: str) -> str:
    """A key of MIXES, in any case, aliases resolved. Raises LocalrunError."""
    mix = ALIASES.get(name.upper(), name.upper())
    if mix not in MIXES:
        raise LocalrunError(f"unknown type {name!r}; expected one of {', '.join([*MIXES, *ALIASES])}")
    return mix
