"""Odd saved sessions, by seed and number: the tokens and the cache that a chat's /save leaves, in both backends' forms.

The sound ones that they are made of are written by prepare(), in a process that may load models.
"""

from __future__ import annotations

import functools
import json
import random
import struct
from pathlib import Path
from typing import Any

import fuzz_json
import tiny_models

import localrun

BACKENDS = {"native": "v3", "llama.cpp": "llama"}  # backend: the model whose sessions are saved
CTX = 64
_ODD = (0, 1, 2, 3, 7, 8, 63, 64, 255, 1 << 16, 1 << 20, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 40, (1 << 64) - 1)


def model(backend: str) -> Any:
    """The engine that a session is loaded into."""
    path = tiny_models.shared(BACKENDS[backend])
    return localrun.load(path, backend=backend, threads=1, ctx=CTX, speculative="off")


def prepare(folder: Path) -> None:
    """A sound session of each backend."""
    for backend in BACKENDS:
        with model(backend) as engine:
            session = engine.session()
            list(session.tokens(tiny_models.prompt("v3")[:12], localrun.Sampling(temperature=0), max_tokens=4))
            session.save(folder / f"{backend}.session")


@functools.cache
def _sound(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def session_case(folder: Path, backend: str, seed: int, number: int) -> tuple[str, bytes]:
    """A saved session with another header, other ids, or another state."""
    rng = random.Random(f"{backend} session {seed} {number}")
    header, data = _sound(folder / f"{backend}.session")
    changes = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        way = rng.randrange(4)
        if way == 0:
            header, told = fuzz_json.change(rng, header)
        elif way == 1:
            header, told = _other_ids(rng, header)
        else:
            data, told = _other_data(rng, data)
        changes.append(told)
    text = fuzz_json.write(rng, header) if rng.random() < 0.3 else json.dumps(header).encode()
    length = len(text) if rng.random() < 0.97 else rng.choice(_ODD)
    return f"{number}: {'; '.join(changes)}", struct.pack("<Q", length) + text + data


def _other_ids(rng: random.Random, header: Any) -> tuple[Any, str]:
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        return header, "as it was"
    ids, told = fuzz_json.change(rng, [3, 17, 200, 5, 9, 80, 41])
    text = fuzz_json.write(rng, ids).decode("latin-1")
    return header | {"__metadata__": metadata | {"localrun.ids": text}}, f"other ids: {told}"


def _other_data(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Numbers near the start are counts, to llama.cpp; what follows them are keys and values."""
    if not data:
        return rng.randbytes(16), "some data"
    raw, at = bytearray(data), rng.randrange(min(len(data), rng.choice((64, 256, len(data)))))
    how = rng.randrange(5)
    if how == 0:
        raw[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        raw[at : at + 4] = struct.pack("<I", rng.choice(_ODD) & 0xFFFFFFFF)
    elif how == 2:
        raw[at : at + 8] = struct.pack("<Q", rng.choice(_ODD))
    elif how == 3:
        del raw[at:]
    else:
        del raw[at : at + rng.randrange(1, 64)]
    return bytes(raw), f"data changed at {at}, way {how}"
