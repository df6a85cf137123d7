"""The types of a file's tensors as the lines of a mix file: few, readable, and exact.

Tensors of one kind, such as blk.3.ffn_up.weight and blk.4.ffn_up.weight, become one line where they have one type;
where some layers have another, those are named before. Kinds whose lines differ in nothing else share one, and what has
the type of most kinds is left to a last line that matches everything.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from localrun.convert.mixes.choose import first_matches
from localrun.convert.mixes.overrides import Override
from localrun.convert.mixes.rules import Named, is_table, may_be_quantized

_IN_LAYER = re.compile(r"blk\.(0|[1-9][0-9]*)\.(.+)", re.ASCII | re.DOTALL)
_ALL_LAYERS = r"\d+"
_EVERYTHING = "."


@dataclass(frozen=True)
class Line:
    """A line of a mix file, and of how many tensors it decides."""

    pattern: str
    type: str
    n_tensors: int


class _Rule(NamedTuple):
    """Some tensors of a kind: of layers by number, of all ("\\d+"), or of none ("")."""

    is_matrix: bool
    layers: str
    kind: str
    type: str


def mix_lines(tensors: Sequence[Named], types: Sequence[str]) -> list[Line]:
    """Lines that give each tensor its type, but for tables. types: names of plain types, as long as tensors."""
    pairs = [(tensor, type_) for tensor, type_ in zip(tensors, types, strict=True) if not is_table(tensor)]
    tensors, types = [tensor for tensor, _ in pairs], [type_ for _, type_ in pairs]
    lines = _joined(_rules(tensors, types))
    wrong = [
        (f"^{_literal(tensor.name)}$", type_)  # its name is like another's
        for tensor, type_, found in zip(tensors, types, _found(lines, tensors), strict=True)
        if type_ != (found.type if found else "F32")
    ]
    counts = Counter(each.where for each in _found([*wrong, *lines], tensors) if each)
    numbered = enumerate([*wrong, *lines])
    return [Line(*line, counts[str(number)]) for number, line in numbered if counts[str(number)]]


def _found(lines: list[tuple[str, str]], tensors: Sequence[Named]) -> list[Override | None]:
    """The line that decides each tensor, as an override whose `where` is the line's number."""
    overrides = [
        Override(re.compile(pattern, re.ASCII), type_, str(number)) for number, (pattern, type_) in enumerate(lines)
    ]
    return first_matches(tensors, overrides)


def _rules(tensors: Sequence[Named], types: Sequence[str]) -> list[_Rule]:
    """What holds of all tensors, kind by kind; rules for some layers come before those for all the others."""
    kinds: dict[str, dict[tuple[bool, str], list[int]]] = defaultdict(lambda: defaultdict(list))
    alone = []
    for tensor, type_ in zip(tensors, types, strict=True):
        is_matrix, match = may_be_quantized(tensor), _IN_LAYER.fullmatch(tensor.name)
        if not is_matrix and type_ == "F32":
            continue  # as it is without a line
        if match:
            kinds[match[2]][is_matrix, type_].append(int(match[1]))
        else:
            alone.append(_Rule(is_matrix, "", tensor.name, type_))
    some, all_ = [], []
    for kind, layers_of in kinds.items():
        most = max(layers_of, key=lambda key: len(layers_of[key]))
        for (is_matrix, type_), layers in layers_of.items():
            is_rest = (is_matrix, type_) == most and (is_matrix or len(layers_of) == 1)
            numbers = _ALL_LAYERS if is_rest else numbers_pattern(layers)
            (all_ if is_rest else some).append(_Rule(is_matrix, numbers, kind, type_))
    return [*alone, *some, *all_]


def _joined(rules: Iterable[_Rule]) -> list[tuple[str, str]]:
    """Patterns and types, those of several kinds joined; a type that many kinds have comes last, without any."""
    groups: dict[tuple[bool, str, str], list[str]] = defaultdict(list)
    for is_matrix, layers, kind, type_ in rules:
        groups[is_matrix, layers, type_].append(kind)
    rest = [key for key in groups if key[0] and key[1] in ("", _ALL_LAYERS)]
    n_kinds: Counter[str] = Counter()
    for key in rest:
        n_kinds[key[2]] += len(groups[key])
    last = max(n_kinds, key=lambda type_: n_kinds[type_], default=None)
    lines = []
    for key, kinds in groups.items():
        _, layers, type_ = key
        if key not in rest or type_ != last:
            prefix = rf"blk\.{_in_brackets(layers)}\." if layers else ""
            lines.append((f"^{prefix}{_alternatives(kinds)}$", type_))
    return lines if last is None else [*lines, (_EVERYTHING, last)]


def numbers_pattern(numbers: Iterable[int]) -> str:
    """A regular expression of just these numbers: [3-9]|1[0-9]|20 for 3 to 20."""
    last_digits: dict[str, set[int]] = defaultdict(set)
    for number in numbers:
        last_digits[str(number)[:-1]].add(number % 10)
    before: dict[str, list[str]] = defaultdict(list)  # by the last digits that numbers share
    for prefix, digits in sorted(last_digits.items(), key=lambda item: int(item[0] or 0)):
        before[_class(sorted(digits))].append(prefix)
    parts = []
    for digits, prefixes in before.items():
        if "" in prefixes:
            parts.append(digits)
        if tens := [int(prefix) for prefix in prefixes if prefix]:
            parts.append(_in_brackets(numbers_pattern(tens)) + digits)
    return "|".join(parts)


def _class(digits: list[int]) -> str:
    """One of some digits: "7", "[3-58]"."""
    if len(digits) == 1:
        return str(digits[0])
    runs: list[list[int]] = []
    for digit in digits:
        if runs and runs[-1][-1] == digit - 1:
            runs[-1].append(digit)
        else:
            runs.append([digit])
    parts = (f"{run[0]}-{run[-1]}" if len(run) > 2 else "".join(map(str, run)) for run in runs)
    return f"[{''.join(parts)}]"


def _in_brackets(pattern: str) -> str:
    return f"({pattern})" if "|" in pattern else pattern


def _alternatives(names: list[str]) -> str:
    """One of some names; the words that all begin or end with stand once."""
    if len(names) == 1:
        return _literal(names[0])
    words = [re.split(r"([._])", name) for name in names]
    n_first = _n_shared(words)
    rests = [each[n_first:] for each in words]
    n_last = _n_shared([rest[::-1] for rest in rests])
    middles = ["".join(rest[: len(rest) - n_last]) for rest in rests]
    start, end = "".join(words[0][:n_first]), "".join(rests[0][len(rests[0]) - n_last :])
    return f"{_literal(start)}({'|'.join(map(_literal, middles))}){_literal(end)}"


def _n_shared(sequences: list[list[str]]) -> int:
    """How many items all begin with."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({each[i] for each in sequences}) > 1), shortest)


def _literal(name: str) -> str:
    """A regular expression of the name alone, in printable ASCII without blanks."""
    return "".join(re.escape(char) if "!" <= char <= "~" else _code(char) for char in name)


def _code(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else f"\\U{ord(char):08x}"
