"""What is best on one CPU and not on another: from a table of families that were measured, or from `localrun tune`.

A kernel's results are the same to the bit whatever is chosen. packed_from says which of two kernels multiplies so many
tokens, and the two round differently.

Prefetch distances are compiled into kernels, so the kernel cache's folder is named after them too. How the entries of
the table were found: docs/lab-notes.md. What moves nothing on any CPU at hand (rows of a work item, columns of a
panel) is no choice.
"""

import functools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from quant.batch import PACKED_FROM, PACKED_FROM_INTERLEAVED
from quant.target import isa
from quant.target.cache_base import cache_base

_FARTHEST, _MOST_TOKENS = 1 << 16, 64


@dataclass(frozen=True)
class Tuning:
    """Choices for one CPU.

    Attributes:
        near_one: bytes between the weights in use and those on their way to L1, in products of one token.
        near_few: of a few tokens.
        near_interleaved: of one or a few, where rows are interleaved.
        packed_from: tokens of a matrix from which on repacking its rows pays.
        packed_from_interleaved: the same where rows are interleaved: a pass of a few tokens is cheaper there.
        interleaving_pays: whether replies are faster with interleaved rows.
    """

    near_one: int = 3456
    near_few: int = 3456
    near_interleaved: int = 3456
    packed_from: int = PACKED_FROM
    packed_from_interleaved: int = PACKED_FROM_INTERLEAVED
    interleaving_pays: bool = True

    @property
    def compiled_in(self) -> tuple[int, ...]:
        """What is part of kernels."""
        return self.near_one, self.near_few, self.near_interleaved


# By LLVM's name of the CPU and the level. Emerald Rapids is what the defaults were found on.
_TABLE = {
    ("emeraldrapids", "avx512_vnni"): Tuning(),
    ("sapphirerapids", "avx512_vnni"): Tuning(),
    ("znver5", "avx512_vnni"): Tuning(
        near_one=8192, near_interleaved=8192, packed_from=5, packed_from_interleaved=5, interleaving_pays=False
    ),
}


@dataclass(frozen=True)
class Found:
    """A tuning, and where it comes from: "tuned" here, "table", or "default" where nothing is known of this CPU."""

    tuning: Tuning
    source: str


def cpu() -> str:
    """The CPU's family as LLVM names it, and the level: "znver5-avx512_vnni"."""
    return f"{llvm.get_host_cpu_name()}-{isa.LEVEL}"


def kept_path() -> Path | None:
    """Where `localrun tune` keeps what it found for this CPU and level; None without a home folder."""
    base = cache_base()
    return base and base / "tuning" / f"{cpu()}.json"


def read(document: Any) -> Tuning:
    """A Tuning from JSON. Raises ValueError."""
    names = [field.name for field in fields(Tuning)]
    if not isinstance(document, dict) or sorted(document) != sorted(names):
        raise ValueError(f"expected {', '.join(names)}")
    for name, value in document.items():
        most = _FARTHEST if name.startswith("near") else _MOST_TOKENS
        is_flag = name == "interleaving_pays"
        if type(value) is not (bool if is_flag else int) or not (is_flag or 1 <= value <= most):
            raise ValueError(f"{name} is {value!r}")
    return Tuning(**document)


def as_json(tuning: Tuning) -> dict[str, Any]:
    """What read() reads."""
    return asdict(tuning)


@functools.cache
def _of_this_cpu() -> Found:
    path = kept_path()
    if path is not None:
        try:
            return Found(read(json.loads(path.read_text(encoding="utf-8"))["tuning"]), "tuned")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logging.getLogger(__name__).warning("%s is not used (%s); run localrun tune again", path, error)
    known = _TABLE.get((llvm.get_host_cpu_name(), isa.LEVEL))
    return Found(known or Tuning(), "table" if known else "default")


_instead: list[Tuning] = []


def found() -> Found:
    """What this process uses."""
    return _of_this_cpu()


def current() -> Tuning:
    """The tuning of this process."""
    return _instead[-1] if _instead else _of_this_cpu().tuning


@contextmanager
def using(tuning: Tuning) -> Iterator[None]:
    """Within, another one counts, but for what is compiled in: for measuring and for tests."""
    _instead.append(tuning)
    try:
        yield
    finally:
        _instead.pop()
