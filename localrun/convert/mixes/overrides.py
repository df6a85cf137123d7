"""Types that the user names: --tensor-type, and mixes written down in a file.

A mix file has a line for each rule, a regular expression and a type, parted by blanks or by an equals sign:

    # experts small, the rest as in Q4_K_M
    base Q4_K_M
    blk\\.[0-3]\\.ffn_down_exps  Q3_K
    ffn_(gate|up|down)_exps    Q2_K

A tensor gets the type of the first line whose expression is found in its name, as with llama.cpp's --tensor-type-file,
whose files are read as well. What no line matches is left to the mix that the line `base` names, or --type; where there
is neither, a line has to match. # begins a comment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from localrun.convert.mixes.table import TYPES, parse_mix
from localrun.errors import LocalrunError
from localrun.files import read_bytes

_LARGEST = 1 << 18  # bytes of a mix file: a line for every tensor of the largest models takes a quarter
_COMMENT = re.compile(r"(^|\s)#.*")
_BASE = "base"


@dataclass(frozen=True)
class Override:
    """A type for the tensors whose name has a match of pattern; the first override that matches counts.

    Attributes:
        where: how to name it in a message.
        is_written_down: whether it is from a mix file, which means all that it says.
    """

    pattern: re.Pattern[str]
    type: str
    where: str
    is_written_down: bool = False


@dataclass(frozen=True)
class MixFile:
    """What a mix file says. base: a key of MIXES, for what no line matches; None if the file names none."""

    path: Path
    base: str | None = None
    overrides: list[Override] = field(default_factory=list)


def parse_override(text: str) -> Override:
    """REGEX=TYPE. Raises LocalrunError."""
    pattern, equals, type_ = text.rpartition("=")
    where = f"--tensor-type {text!r}"
    if not equals or not pattern or type_.upper() not in TYPES:
        raise LocalrunError(f"{where}: expected REGEX=TYPE, TYPE one of {', '.join(TYPES)}")
    return Override(_compiled(pattern, where), type_.upper(), where)


def read_mix_file(path: Path) -> MixFile:
    """The mix in a file. Raises LocalrunError naming the file and the line."""
    try:
        text = read_bytes(path, str(path), _LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LocalrunError(f"{path}: is not UTF-8 text") from None
    base, overrides = None, []
    for number, line in enumerate(text.splitlines(), 1):
        line, where = _COMMENT.sub("", line).strip(), f"{path}: line {number}"
        if not line:
            continue
        pattern, type_ = _parted(line)
        if pattern == _BASE:
            if base is not None:
                raise LocalrunError(f"{where}: names another base; expected one")
            base = _parse_base(type_, where)
            continue
        if not pattern or type_.upper() not in TYPES:
            raise LocalrunError(f"{where}: is {line!r}; expected REGEX TYPE, TYPE one of {', '.join(TYPES)}")
        overrides.append(Override(_compiled(pattern, where), type_.upper(), where, is_written_down=True))
    if not overrides:
        raise LocalrunError(f"{path}: names no types; expected lines of a regular expression and a type")
    return MixFile(path, base, overrides)


def _parted(line: str) -> tuple[str, str]:
    """A line's expression and its type."""
    *before, last = line.rsplit(None, 1)
    if before:
        return before[0], last
    pattern, _, type_ = line.rpartition("=")
    return pattern, type_


def _parse_base(name: str, where: str) -> str:
    try:
        return parse_mix(name)
    except LocalrunError as error:
        raise LocalrunError(f"{where}: {error}") from None


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.ASCII)  # \d as in C++
    except (re.error, RecursionError, OverflowError) as error:
        raise LocalrunError(f"{where}: no regular expression: {error}") from None
