"""Reads all weights of a GGUF once, and looks for numbers that are none: NaN or infinite values and block scales.

Sizes, offsets and types have been checked by open_gguf. Looked at are the float16 fields of blocks, as in
ggml_validate_row_data of https://github.com/ggml-org/llama.cpp @3f545becc, ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from localrun.gguf import types as tensor_types
from localrun.gguf.file import GGUFFile, Tensor
from quant.block_format import halves
from quant.formats import registry
from quant.formats.interleave import deinterleave

_CHUNK_BLOCKS = 1 << 18  # looked at at a time

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass
class Report:
    """What was found.

    Attributes:
        n_tensors, n_bytes: how much was looked at.
        problems: a line each, naming the tensor and the first weight concerned.
        unchecked: types whose scales are not known here, with how many tensors have them.
    """

    n_tensors: int = 0
    n_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    unchecked: dict[str, int] = field(default_factory=dict)


def verify(file: GGUFFile, progress: Callable[[int, int, str], None] | None = None) -> Report:
    """The report on all tensors; progress(bytes done, bytes in all, tensor) is called before each."""
    report, total = Report(), sum(tensor.n_bytes for tensor in file.tensors.values())
    for tensor in file.tensors.values():
        if progress is not None:
            progress(report.n_bytes, total, tensor.name)
        wrong = _checks(tensor)
        if wrong is None:
            report.unchecked[tensor.type.name] = report.unchecked.get(tensor.type.name, 0) + 1
        else:
            for where in wrong:
                report.problems.append(f"tensor '{tensor.name}' ({tensor.type.name}): {where}")
                break  # the first of a tensor tells enough
        report.n_tensors += 1
        report.n_bytes += tensor.n_bytes
    return report


def _checks(tensor: Tensor) -> Iterator[str] | None:
    """What is wrong with a tensor, piece by piece; None for types that hold no scale that is known here."""
    type_ = tensor_types.plain(tensor.type).name
    if type_ in _FLOATS or type_ == "BF16":
        return _check_floats(tensor, type_)
    if type_ in registry.NAMES:
        return _check_blocks(tensor, type_)
    return None


def _check_floats(tensor: Tensor, type_: str) -> Iterator[str]:
    values = tensor.data.view("<u2" if type_ == "BF16" else _FLOATS[type_])
    for start in range(0, len(values), _CHUNK_BLOCKS):
        chunk = values[start : start + _CHUNK_BLOCKS]
        # BF16 is not finite where all 8 bits of its exponent are set.
        wrong = (chunk & 0x7F80) == 0x7F80 if type_ == "BF16" else ~np.isfinite(chunk)
        if wrong.any():
            yield f"weight {start + int(wrong.argmax())} is not finite"


def _blocks(tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """Some rows at a time: the number of their first block, and uint8 (n, bytes of a block), row after row."""
    n_weights, n_bytes = tensor_types.block_size(tensor.type)
    row = tensor.shape[-1] // n_weights  # blocks
    rows = tensor.data.reshape(-1, row * n_bytes)
    step = max(1, _CHUNK_BLOCKS // row // tensor_types.ROWS) * tensor_types.ROWS
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        if isinstance(tensor.type, tensor_types.InterleavedType):
            chunk = deinterleave(registry.get(tensor.type.name), chunk, len(chunk), row * n_bytes)
        yield start * row, chunk.reshape(-1, n_bytes)


def _check_blocks(tensor: Tensor, type_: str) -> Iterator[str]:
    from quant.formats.iq1 import d_of_m

    n_weights, _ = tensor_types.block_size(tensor.type)
    places = halves(registry.get(type_).layout)
    for start, chunk in _blocks(tensor):
        if type_ == "MXFP4":
            wrong = chunk[:, 0] == 0xFF  # E8M0's NaN
        elif type_ == "IQ1_M":
            wrong = ~np.isfinite(d_of_m(chunk.view(registry.get(type_).layout)[:, 0]))
        else:
            scales = [np.ascontiguousarray(chunk[:, at : at + 2]).view("<f2")[:, 0] for at in places]
            wrong = ~np.logical_and.reduce([np.isfinite(scale) for scale in scales])
        if wrong.any():
            block = start + int(wrong.argmax())
            yield f"the scale of block {block} (weights from {block * n_weights}) is not finite"
