"""The block formats by ggml's names, each in a module that is imported when first used.

A module has Formats by their names. What is asked without one, such as which types there are, is here.
"""

from importlib import import_module
from typing import NamedTuple

from quant.block_format import ROWS, Format
from quant.errors import QuantError


class Entry(NamedTuple):
    """Where a format is, and what it has."""

    module: str
    interleaved: str = ""  # the module of the same format with 16 rows interleaved
    widened: str = ""  # the module of a wider one with 16 rows interleaved
    quantizes: bool = True  # whether there is a kernel that makes blocks from float32


_ENTRIES = {
    "F32": Entry("floats"),
    "F16": Entry("floats"),
    "BF16": Entry("floats"),
    "Q8_0": Entry("q8_0"),
    "Q4_0": Entry("q4_0_q5_0"),
    "Q4_1": Entry("q4_1_q5_1"),
    "Q5_0": Entry("q4_0_q5_0"),
    "Q5_1": Entry("q4_1_q5_1"),
    "Q2_K": Entry("q2_k_q3_k"),
    "Q3_K": Entry("q2_k_q3_k"),
    "Q4_K": Entry("q4_k_q5_k", interleaved="q4_k_q5_k_r16"),
    "Q5_K": Entry("q4_k_q5_k", interleaved="q4_k_q5_k_r16"),
    "Q6_K": Entry("q6_k", interleaved="q6_k_r16"),
    "IQ4_NL": Entry("iq4_nl"),
    "IQ4_XS": Entry("iq4_xs"),
    "MXFP4": Entry("mxfp4"),
    "NVFP4": Entry("nvfp4", quantizes=False),
    "TQ1_0": Entry("tq1_0_tq2_0"),
    "TQ2_0": Entry("tq1_0_tq2_0"),
    "Q1_0": Entry("q1_0", quantizes=False),
    "IQ1_S": Entry("iq1", widened="iq1_r16"),
    "IQ1_M": Entry("iq1", widened="iq1_r16"),
    "IQ2_XXS": Entry("iq2"),
    "IQ2_XS": Entry("iq2"),
    "IQ2_S": Entry("iq2"),
    "IQ3_XXS": Entry("iq3"),
    "IQ3_S": Entry("iq3"),
}
_INTERLEAVED = {f"{name}_R{ROWS}": entry.interleaved for name, entry in _ENTRIES.items() if entry.interleaved}
_WIDENED = {f"{name}_R{ROWS}": entry.widened for name, entry in _ENTRIES.items() if entry.widened}
_MODULES = {name: entry.module for name, entry in _ENTRIES.items()} | _INTERLEAVED | _WIDENED

NAMES = tuple(_ENTRIES)
INTERLEAVED = tuple(_INTERLEAVED)  # names of our own: 16 rows of the format before _R16
WIDENED = tuple(_WIDENED)  # the same, but made in RAM alone: a block takes more bytes than in a file
QUANTIZABLE = tuple(name for name, entry in _ENTRIES.items() if entry.quantizes)


def get(name: str) -> Format:
    """The format called `name`. Raises QuantError."""
    if name not in _MODULES:
        raise QuantError(f"no kernels for type {name}; there are some for {', '.join(_MODULES)}")
    return getattr(import_module(f"quant.formats.{_MODULES[name]}"), name)
