"""The type of every tensor of a conversion, by a mix and by what the user names, and what is to be said of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence

from gguf import LlamaFileType

from localrun.convert.metadata import Metadata
from localrun.convert.mixes.overrides import Override
from localrun.convert.mixes.rules import (
    MLA,
    Named,
    Rules,
    fits,
    fitting,
    is_table,
    may_be_quantized,
    needs_importances,
)
from localrun.convert.mixes.table import ALIASES, MIXES, PLAIN, TABLE
from localrun.convert.targets import Target
from localrun.errors import LocalrunError
from localrun.gguf import types as tensor_types
from localrun.models.names import READ_BY_ROW
from quant.formats import registry

_MLA_TYPES = (*PLAIN, "Q8_0")


def choose_types(
    targets: list[Target],
    metadata: Metadata,
    mix: str | None,
    overrides: Sequence[Override] = (),
    *,
    has_imatrix: bool = False,
) -> list[str]:
    """The type of each target; types that rows do not fit have become others.

    What mixes never decide about (vectors, norms, routers) stays F32, unless an override matches nothing else.
    Tables of whole numbers are I32.

    Args:
        mix: a key of MIXES, or None where overrides are to say everything.
        has_imatrix: whether importances are there; some rules look at that.

    Raises LocalrunError if an override is of no effect, a vector's type is none of PLAIN, a table is to have a type, or
    without a mix no override matches a matrix.
    """
    rules = Rules(targets, metadata, mix, has_imatrix) if mix else None
    types = []
    for target, override in zip(targets, overrides_of(targets, overrides), strict=True):
        if is_table(target):
            if override is not None:
                raise LocalrunError(f"{override.where}: '{target.name}' is a table of whole numbers and stays {TABLE}")
            types.append(TABLE)
        elif override is None or _is_overruled(target, override):
            types.append(_without_override(target, rules))
        elif len(target.shape) < 2 and override.type not in PLAIN:
            raise LocalrunError(f"{override.where}: '{target.name}' is a vector; expected one of {', '.join(PLAIN)}")
        else:
            types.append(fitting(override.type, target.n_cols))
    return types


def _without_override(target: Target, rules: Rules | None) -> str:
    if rules:
        return rules.type_of(target)
    if may_be_quantized(target):
        raise LocalrunError(f"--mix: no line matches '{target.name}'; add a line, `base Q4_K_M` say, or name a --type")
    return "F32"


def overrides_of(targets: Sequence[Named], overrides: Sequence[Override]) -> list[Override | None]:
    """The override of each target, the first that matches. Raises LocalrunError if one is of no effect."""
    found = first_matches(targets, overrides)
    used = set(map(id, found))
    for each in overrides:
        if id(each) not in used:
            raise LocalrunError(f"{each.where}: matches no tensor (or an earlier one did)")
    return found


def first_matches(targets: Sequence[Named], overrides: Sequence[Override]) -> list[Override | None]:
    """The first override that matches each target; for what is no matrix, the first that matches no matrix either."""
    matrices = [target.name for target in targets if may_be_quantized(target)]
    others = [each for each in overrides if not any(map(each.pattern.search, matrices))]
    found = []
    for target in targets:
        candidates = overrides if may_be_quantized(target) else others
        found.append(next((each for each in candidates if each.pattern.search(target.name)), None))
    return found


def _is_overruled(target: Target, override: Override) -> bool:
    """Whether --tensor-type would make attn_k_b or attn_v_b less than Q8_0."""
    return bool(MLA.search(target.name)) and not override.is_written_down and override.type not in _MLA_TYPES


def notes_on(targets: list[Target], overrides: Sequence[Override]) -> list[str]:
    """What the user should know of overrides that choose_types has taken, one line each."""
    pairs = [(t, each) for t, each in zip(targets, overrides_of(targets, overrides), strict=True) if each]
    notes = list(_notes_on_fallbacks(pairs))
    if any(_is_overruled(*pair) for pair in pairs):
        notes.append("attn_k_b and attn_v_b get at least Q8_0, whatever --tensor-type says")
    low = [each for target, each in pairs if MLA.search(target.name) and each.type not in _MLA_TYPES]
    for each in dict.fromkeys(each for each in low if each.is_written_down):
        notes.append(
            f"{each.where}: attn_k_b and attn_v_b are small and all positions pass through them; Q8_0 is safer"
        )
    return notes


def _notes_on_fallbacks(pairs: Iterable[tuple[Target, Override]]) -> Iterator[str]:
    """A line for each override and width that don't fit."""
    counts: Counter[tuple[str, str, int]] = Counter()
    first: dict[tuple[str, str, int], str] = {}
    for target, each in pairs:
        if not fits(each.type, target.n_cols) and not _is_overruled(target, each):
            key = each.where, each.type, target.n_cols
            counts[key] += 1
            first.setdefault(key, target.name)
    for key, count in counts.items():
        where, type_, n_cols = key
        more = f" and of {count - 1} more" if count > 1 else ""
        instead = fitting(type_, n_cols)
        yield f"{where}: rows of '{first[key]}'{more} are {n_cols} weights, no whole {type_} blocks: {instead} instead"


def check_types_can_be_packed(targets: list[Target], types: list[str]) -> None:
    """Raises LocalrunError if a tensor would have to be packed in a type that nothing here packs."""
    for target, type_ in zip(targets, types, strict=True):
        if type_ != target.from_type and type_ not in registry.QUANTIZABLE:
            known = ", ".join(registry.QUANTIZABLE)
            raise LocalrunError(
                f"'{target.name}' would be {type_}, which cannot be packed here; expected one of {known}"
            )


def check_importances(
    targets: list[Target], types: list[str], mix: str | None, importances: Container[str] | None, where: str
) -> None:
    """Raises LocalrunError if a tensor would be packed without importances in a type that is garbage then.

    Args:
        importances: the names of tensors that have some; None if there is no imatrix.
        where: the imatrix file's name.
    """
    for target, type_ in zip(targets, types, strict=True):
        if type_ == target.from_type or not needs_importances(target.name, type_, mix):
            continue
        if importances is None:
            raise LocalrunError(
                f"'{target.name}' would be {type_}, which needs an importance matrix: --imatrix FILE; "
                "localrun imatrix makes one"
            )
        if target.name not in importances:
            raise LocalrunError(
                f"{where}: has no importances for '{target.name}', which {type_} needs; give it another type by "
                "--tensor-type, or leave out layers for multi-token prediction by --no-mtp"
            )


def file_type(mix: str | None, targets: list[Target], types: list[str]) -> int:
    """general.file_type: the mix's number, or what llama.cpp calls files of the type that most weights have."""
    if mix is None:
        weights: Counter[str] = Counter()
        for target, type_ in zip(targets, types, strict=True):
            weights[type_] += target.n_weights
        ((most, _),) = weights.most_common(1)
        mix = ALIASES.get(most, most)
    return MIXES[mix].number if mix in MIXES else LlamaFileType.GUESSED


def interleave(targets: list[Target], types: list[str]) -> list[str]:
    """The types with those that can be interleaved in their stead, where whole rows are multiplied."""
    return [
        type_
        if READ_BY_ROW.search(target.name) or any(piece.n_rows % tensor_types.ROWS for piece in target.pieces)
        else tensor_types.interleaved(type_, target.shape)
        for target, type_ in zip(targets, types, strict=True)
    ]
