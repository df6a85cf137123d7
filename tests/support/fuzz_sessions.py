"""Broken and odd files that a user keeps beside models: conversations and their caches, journals of conversions,
descriptions of machines, price lists, importance matrices.

Every case follows from its kind, the seed and its number alone, so that one can be had again: case(kind, seed, number).
attempt(kind, path) has the file read as its command does; it raises LocalrunError for what is refused, nothing else.
"""

from __future__ import annotations

import atexit
import copy
import functools
import itertools
import json
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
from conversions import EXPERTS, write_imatrix
from fuzz_checkpoint import ODD, change_json, spelled
from safetensors.numpy import save

import localrun
from cli.terminal.conversation import read_saved
from localrun.convert.imatrix import Importances
from localrun.convert.journal import Journal
from localrun.convert.targets import Target
from localrun.engine import Engine
from localrun.plan.known import load_data
from localrun.plan.machine import load_machine
from localrun.plan.report import make_report
from localrun.plan.shapes import ModelShape, load_model
from localrun.plan.topology import as_rows, compare, load_prices

N_UNITS = 100  # of the journals' conversion
_DENSE = "blk.0.ffn_up.weight"
_TARGETS = [Target(EXPERTS, (8, 64, 96), "F32", ()), Target(_DENSE, (160, 96), "F32", ())]


@functools.cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="localrun-fuzz-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def engine(backend: str) -> Engine:
    """A small model whose sessions are saved; it stays open."""
    model = localrun.load(tiny_models.shared("llama"), threads=1, ctx=32, backend=backend, speculative="off")
    atexit.register(model.close)
    return model


@functools.cache
def _saved(backend: str) -> bytes:
    session = engine(backend).session()
    list(session.tokens([1, 2, 3], localrun.Sampling(temperature=0), max_tokens=4))
    session.save(_folder() / "session")
    return (_folder() / "session").read_bytes()


def _conversation(rng: random.Random) -> Any:
    turns = rng.choice((0, 1, 3))
    messages = [{"role": role, "content": "text"} for _ in range(turns) for role in ("user", "assistant")]
    return {"format": "localrun conversation 1", "system": rng.choice((None, "Be brief.")), "messages": messages}


def _machine(rng: random.Random) -> Any:
    data = load_data("machines")
    machine = copy.deepcopy(data["machines"][rng.choice(sorted(data["machines"]))])
    if rng.random() < 0.3:
        machine["cpu"]["kernels"] = copy.deepcopy(data["kernels"][sorted(data["kernels"])[0]]["rates"])
    return machine


def _prices(_rng: random.Random) -> Any:
    return dict(load_data("prices"))


def _json_case(base: Callable[[random.Random], Any]) -> Callable[[random.Random], tuple[str, bytes]]:
    """A document with values changed, or its bytes."""

    def case(rng: random.Random) -> tuple[str, bytes]:
        value = base(rng)
        if rng.random() < 0.2:
            return _changed_bytes(rng, spelled(value))
        changes = [change_json(rng, value) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        return "; ".join(changes), spelled(value if rng.random() < 0.98 else rng.choice(ODD))

    return case


def _journal(rng: random.Random) -> tuple[str, bytes]:
    """Lines of a run, some of them not what a run writes."""
    lines: list[Any] = [{"fingerprint": "f"}, *({"done": done} for done in sorted(rng.sample(range(N_UNITS), 4)))]
    lines += [{"done": N_UNITS, "complete": True}] * rng.randrange(2)
    if rng.random() < 0.3:
        return _changed_bytes(rng, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    place = rng.randrange(len(lines))
    odd = copy.deepcopy(rng.choice(ODD))
    lines[place] = rng.choice((odd, {"done": odd}, {"done": 7, "complete": odd}, {"fingerprint": odd}, {}))
    return f"line {place} = {str(lines[place])[:60]}", b"".join(spelled(line) + b"\n" for line in lines)


@functools.cache
def _imatrices() -> tuple[bytes, bytes]:
    """In both formats."""
    sums, counts = (
        {EXPERTS: np.ones((8, 96)), _DENSE: np.ones((1, 96))},
        {EXPERTS: np.ones((8, 1)), _DENSE: np.ones((1, 1))},
    )
    new = write_imatrix(_folder() / "i.gguf", sums, counts).read_bytes()
    old = struct.pack("<i", len(sums))
    for name, values in sums.items():
        old += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 5, values.size)
        old += values.astype("<f4").tobytes()
    return new, old + struct.pack("<ii", 7, 5) + b"a.txt"


def _imatrix(rng: random.Random) -> tuple[str, bytes]:
    data = rng.choice(_imatrices())
    return _changed_bytes(rng, data, rng.choice((64, 300, len(data))))


def _session_case(backend: str) -> Callable[[random.Random], tuple[str, bytes]]:
    """A saved session with its header changed, or its bytes; llama.cpp's state is one tensor of bytes."""

    def case(rng: random.Random) -> tuple[str, bytes]:
        data = _saved(backend)
        end = 8 + struct.unpack_from("<Q", data)[0]
        if rng.random() < 0.5:
            return _changed_bytes(rng, data, rng.choice((end, len(data))))
        header = json.loads(data[8:end])
        if rng.random() < 0.3:
            ids = rng.choice((*ODD, [0] * 7, [1, 2, 3, 4, 5, 6], [2**70] * 7, [-1] * 7))
            header["__metadata__"]["localrun.ids"] = spelled(ids).decode("utf-8", "replace")
            what = f"ids = {str(ids)[:60]}"
        elif rng.random() < 0.2:
            model = header["__metadata__"]["localrun.model"]
            tensors = {"state": np.frombuffer(rng.randbytes(rng.choice((0, 1, 64, 5000))), np.uint8)}
            return "another state", save(tensors, {"localrun.ids": "[1, 2]", "localrun.model": model})
        else:
            what = change_json(rng, header)
        text = spelled(header)
        return what, struct.pack("<Q", len(text)) + text + data[end:]

    return case


def _changed_bytes(rng: random.Random, data: bytes, within: int | None = None) -> tuple[str, bytes]:
    """Some bytes are others, are gone, are there twice; of the first `within`."""
    raw, changes = bytearray(data), []
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(min(within or len(raw), len(raw)) or 1)
        how = rng.choice(("flip", "set", "number", "cut", "drop", "repeat", "insert"))
        changes.append(f"{how} at {at}")
        if how == "flip" and raw:
            raw[at] ^= 1 << rng.randrange(8)
        elif how == "set" and raw:
            raw[at] = rng.choice((0, 1, 32, 127, 128, 255))
        elif how == "number":
            size = rng.choice((4, 8))
            number = rng.choice((0, 1, -1, 2**31 - 1, -(2**31), rng.randrange(2**16)))
            raw[at : at + size] = number.to_bytes(size, "little", signed=True)
        elif how == "cut":
            del raw[at:]
        elif how == "drop":
            del raw[at : at + rng.choice((1, 4, 100))]
        elif how == "repeat":
            raw[at:at] = raw[at : at + rng.choice((1, 4, 100))]
        else:
            raw[at:at] = rng.randbytes(rng.choice((1, 4, 8, 300)))
    return "; ".join(changes), bytes(raw)


_CASES: dict[str, Callable[[random.Random], tuple[str, bytes]]] = {
    "conversation": _json_case(_conversation),
    "session": _session_case("native"),
    "llama.cpp's state": _session_case("llama.cpp"),
    "journal": _journal,
    "machine": _json_case(_machine),
    "prices": _json_case(_prices),
    "imatrix": _imatrix,
}
KINDS = tuple(_CASES)


def case(kind: str, seed: int, number: int) -> tuple[str, bytes]:
    """Case `number` of cases(kind, seed)."""
    what, content = _CASES[kind](random.Random(f"{kind} {seed} {number}"))
    return f"{kind} {number}: {what}", content


def cases(kind: str, seed: int) -> Iterator[tuple[str, bytes]]:
    """What was done, and the file, without end; the same for the same seed."""
    for number in itertools.count():
        yield case(kind, seed, number)


def attempt(kind: str, path: Path) -> None:
    """Has the file read. Raises LocalrunError if it is refused."""
    if kind == "conversation":
        read_saved(path)
    elif kind == "session" or kind == "llama.cpp's state":
        _load_session(engine("native" if kind == "session" else "llama.cpp"), path)
    elif kind == "journal":
        journal = Journal(path, "f")
        journal.close()
        assert type(journal.done) is int and journal.done >= 0 and type(journal.complete) is bool
    elif kind == "machine":
        report = make_report(_shape(), load_machine(str(path)), 4096)
        json.dumps(report, allow_nan=False)
    elif kind == "prices":
        json.dumps(as_rows(compare(), load_prices(path)), allow_nan=False)
    else:
        importances = Importances(path, _TARGETS)
        for name in importances:
            assert not np.isinf(importances[name]).any()


@functools.cache
def _shape() -> ModelShape:
    return load_model("qwen3-30b-a3b")


@functools.cache
def _planned() -> Any:
    return load_model("deepseek-v2-lite")


def _load_session(model: Engine, path: Path) -> None:
    """What is taken over can be gone on with; what is refused leaves a session that works."""
    session = model.session()
    try:
        session.load(path)
    finally:
        next(session.tokens([*session.ids[:10], 5], max_tokens=1))
