"""Which type each tensor gets: llama.cpp's rules for its file types, single types by name, or a mix written down.

Departures from llama.cpp: attn_k_b and attn_v_b get at least Q8_0 (they are small, and all positions pass through
them), whatever --tensor-type says, and in MXFP4_MOE, where llama.cpp takes them for experts; an indexer's weights_proj
stays F32, as in transformers; of DeepSeek-V4, hyper-connections stay F32 and compressors BF16, as llama.cpp's converter
writes them; rows that are no whole blocks of a type without a fallback get F16 instead of an error.
"""

from localrun.convert.mixes.choose import (
    check_importances,
    check_types_can_be_packed,
    choose_types,
    file_type,
    interleave,
    notes_on,
)
from localrun.convert.mixes.overrides import MixFile, Override, parse_override, read_mix_file
from localrun.convert.mixes.rules import fits, is_table, needs_imatrix
from localrun.convert.mixes.table import ALIASES, MIXES, PLAIN, TABLE, TYPES, Mix, parse_mix
from localrun.convert.mixes.written import Line, mix_lines

__all__ = [
    "ALIASES",
    "MIXES",
    "PLAIN",
    "TABLE",
    "TYPES",
    "Line",
    "Mix",
    "MixFile",
    "Override",
    "check_importances",
    "check_types_can_be_packed",
    "choose_types",
    "file_type",
    "fits",
    "interleave",
    "is_table",
    "mix_lines",
    "needs_imatrix",
    "notes_on",
    "parse_mix",
    "parse_override",
    "read_mix_file",
]
