"""Odd machine descriptions and importance matrices, by seed and number."""

from __future__ import annotations

import functools
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzz_gguf as gguf
import fuzz_json
import gguf_builder as b
import tiny_models

from localrun.convert.gguf_source import GGUFSource, read_model
from localrun.plan.known import load_data


def machine_case(seed: int, number: int) -> tuple[str, bytes]:
    """A description of a machine as a JSON file, changed in up to four places."""
    rng = random.Random(f"machine {seed} {number}")
    name, document = rng.choice(sorted(load_data("machines")["machines"].items()))
    changes = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        document, told = fuzz_json.change(rng, document)
        changes.append(told)
    return f"{number}: {name}: {'; '.join(changes)}", fuzz_json.write(rng, document)


@functools.cache
def imatrix_model() -> Path:
    """The model that importance matrices are for."""
    return tiny_models.shared(tiny_models.SMALLEST)


@functools.cache
def targets() -> list[Any]:
    """Its matrices, as a conversion knows them."""
    return read_model(GGUFSource(imatrix_model())).targets


@functools.cache
def _sums() -> list[tuple[str, int, int]]:
    """Name, slices and columns of what an importance matrix of the model holds."""
    matrices = [target for target in targets() if len(target.shape) > 1 and target.name.startswith("blk.")]
    return [(target.name, target.n_rows // target.shape[-2], target.n_cols) for target in matrices]


def imatrix_case(seed: int, number: int) -> tuple[str, bytes]:
    """An importance matrix in either of llama.cpp's formats, changed as a structure or as bytes."""
    rng = random.Random(f"imatrix {seed} {number}")
    if rng.random() < 0.3:
        return f"{number}: older format", _legacy(rng)
    model = _gguf()
    changes = [rng.choice(gguf.STRUCTURE)(rng, model) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    if model.tensors and rng.random() < 0.3:
        tensor = rng.choice(model.tensors)
        tensor.data = _floats(rng, len(tensor.data) // 4)
        changes.append(f"{tensor.name!r} of odd numbers")
    try:
        content = model.build()
    except struct.error:
        content = _gguf().build()
    if rng.random() < 0.2:
        content, told = gguf.change_bytes(rng, content, len(content))
        changes.append(told)
    return f"{number}: {'; '.join(changes)}", content


def _gguf() -> gguf.Model:
    keys = [
        gguf.Key(b"general.type", b.STRING, b"imatrix"),
        gguf.Key(b"imatrix.datasets", b.ARRAY, [b"text"], b.STRING),
        gguf.Key(b"imatrix.chunk_count", b.U32, 2),
        gguf.Key(b"imatrix.chunk_size", b.U32, 512),
    ]
    tensors = []
    for name, slices, columns in _sums():
        ones = struct.pack("<f", 1.0)
        tensors.append(gguf.Record(f"{name}.in_sum2".encode(), [columns, slices], 0, ones * (slices * columns)))
        tensors.append(gguf.Record(f"{name}.counts".encode(), [1, slices], 0, ones * slices))
    return gguf.Model([replace(key) for key in keys], tensors)


def _floats(rng: random.Random, count: int) -> bytes:
    odd = (0.0, -0.0, -1.0, 1e-45, 1e30, 3e38, float("inf"), float("nan"), 1.0, 2.0**53, 2.0**54)
    return struct.pack(f"<{count}f", *rng.choices(odd, k=count))


def _legacy(rng: random.Random) -> bytes:
    """int32 entries; for each int32 length, name, int32 calls, int32 values, float32 values."""
    entries = []
    for name, slices, columns in _sums():
        values = _floats(rng, slices * columns) if rng.random() < 0.1 else struct.pack("<f", 1.0) * slices * columns
        entries.append(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 5, slices * columns) + values)
    count = rng.choice((len(entries), len(entries), len(entries), 0, -1, 2**31 - 1, len(entries) + 1))
    content = struct.pack("<i", count) + b"".join(entries)
    changed = rng.choice((0, 1, 1, 2))
    for _ in range(changed):
        content, _told = gguf.change_bytes(rng, content, len(content) or 1)
    return content
