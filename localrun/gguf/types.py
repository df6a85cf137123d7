"""The types of tensors in a GGUF: ggml's, and interleaved ones under numbers of this project's own.

An interleaved type holds a ggml type's blocks with 16 rows side by side (quant/formats/interleave.py). llama.cpp
and the gguf package refuse a file with a number they don't know; the number of the plain type would have them
misread it. Widened types are made in RAM alone: their blocks take more bytes than the file's, for less to do.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quant.formats.registry import INTERLEAVED, WIDENED

ROWS = 16  # that lie side by side
_SUFFIX = f"_R{ROWS}"
_OWN = 0x4C520000  # "LR" in front of the number of ggml's type

InterleavedType = IntEnum(  # Q4_K_R16 and so on, which only this project reads
    "InterleavedType",
    {name: _OWN + GGMLQuantizationType[name.removesuffix(_SUFFIX)] for name in (*INTERLEAVED, *WIDENED)},
)
TensorType: TypeAlias = GGMLQuantizationType | InterleavedType


def from_number(number: int) -> TensorType:
    """The type with this number in a file. Raises ValueError."""
    type_ = InterleavedType(number) if number >= _OWN else GGMLQuantizationType(number)
    if type_.name in WIDENED:
        raise ValueError(f"{type_.name} is no type of files")
    return type_


def from_name(name: str) -> TensorType:
    """The type called `name`, "Q4_K" or "Q4_K_R16". Raises KeyError."""
    return InterleavedType[name] if name in InterleavedType.__members__ else GGMLQuantizationType[name]


def plain(type_: TensorType) -> GGMLQuantizationType:
    """The ggml type that a type is made of, itself if it is one."""
    return GGMLQuantizationType(type_ - _OWN) if isinstance(type_, InterleavedType) else type_


def _in_sixteens(shape: tuple[int, ...]) -> bool:
    """Whether the rows of a tensor of this shape can lie 16 by 16."""
    return len(shape) > 1 and shape[-2] % ROWS == 0


def interleaved(name: str, shape: tuple[int, ...]) -> str:
    """What a tensor of the plain type `name` may become: the name of the interleaved one, or the same again."""
    return name + _SUFFIX if _in_sixteens(shape) and name + _SUFFIX in INTERLEAVED else name


def laid_out(name: str, shape: tuple[int, ...], interleaving_pays: bool) -> str:
    """What --repack makes of a tensor of the plain type `name`: the name of a widened type, which always pays, that of
    an interleaved one if that does, or the same again."""
    if _in_sixteens(shape) and name + _SUFFIX in WIDENED:
        return name + _SUFFIX
    return interleaved(name, shape) if interleaving_pays else name


def block_size(type_: TensorType) -> tuple[int, int]:
    """Weights and bytes of a block of one row in a file."""
    return GGML_QUANT_SIZES[plain(type_)]
