"""Decides all about a conversion before a weight is read: keys, tensors, types, files, units of work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf.utility import size_label

import localrun
from localrun.convert import architecture, gguf_source, vocabulary
from localrun.convert.errors import CheckpointError
from localrun.convert.gguf_source import GGUFSource
from localrun.convert.imatrix import Importances
from localrun.convert.layout import Layout, make_layout
from localrun.convert.metadata import Metadata
from localrun.convert.mixes import (
    Override,
    check_importances,
    check_types_can_be_packed,
    choose_types,
    file_type,
    interleave,
    notes_on,
    read_mix_file,
)
from localrun.convert.read_back import read_back_vocabulary
from localrun.convert.sources.checkpoint import MXFP4, Checkpoint
from localrun.convert.targets import Target, Unit, units
from localrun.errors import LocalrunError

UNIT_BYTES = 64 << 20  # as float32; some of these are in memory at a time
DEFAULT_MIX = "Q4_K_M"
MXFP4_MIX = "MXFP4_MOE"  # in place of it where the checkpoint's experts are MXFP4: keeps their bits
QUANTIZATION_VERSION = 2  # ggml.h, GGML_QNT_VERSION


@dataclass(frozen=True)
class Options:
    """What the user may choose.

    Attributes:
        mix: a key of mixes.MIXES; None for DEFAULT_MIX or MXFP4_MIX, or where rows of a GGUF are to be interleaved, or
            put in order again, for the types that it has.
        overrides: types by name; the first that matches counts.
        mix_file: more of them, after those, and perhaps a mix for what none matches.
        keep_mtp: whether layers for multi-token prediction go in.
        drafts: whether those alone are wanted, of a model that keeps them in a file of their own.
        imatrix: a file with importances.
        split_max_bytes: the most a part's tensors may take; 0 for one file.
        allow_requantize: pack anew what has been packed before.
        pack: interleave rows (tensor_types.py), for this runner only.
        interleaving_pays: whether that makes replies faster here; else a pack leaves rows, and a GGUF's types, as they
            are.
        pre: the pre-tokenizer's name, where it is not recognised.
        unit_bytes: float32 bytes that are read, packed and written at once.
    """

    mix: str | None = None
    overrides: Sequence[Override] = ()
    mix_file: Path | None = None
    keep_mtp: bool = True
    drafts: bool = False
    imatrix: Path | None = None
    split_max_bytes: int = 0
    allow_requantize: bool = False
    pack: bool = False
    interleaving_pays: bool = True
    pre: str | None = None
    unit_bytes: int = UNIT_BYTES


FileState = tuple[int, int]  # bytes, and when it was last written to


@dataclass(frozen=True)
class Plan:
    """A conversion that can be carried out. types and layout.places go with targets; mix is None if types are kept, or
    a mix file says them all.

    is_unusual: whether something in the checkpoint is not as in most, so that what it means may be in doubt.
    """

    source: Checkpoint | GGUFSource
    destination: Path
    metadata: Metadata
    mix: str | None
    targets: list[Target]
    types: list[str]
    layout: Layout
    units: list[Unit]
    importances: Importances | None
    warnings: list[str]
    is_unusual: bool
    fingerprint: str
    states: dict[Path, FileState]  # of all files that are read
    mix_file: Path | None = None

    def check_sources(self) -> None:
        """Raises CheckpointError if a file that was read has changed since the plan was made."""
        for path, state in self.states.items():
            if path.exists() and _state(path) != state:
                raise CheckpointError(f"{path}: was written to while it was being converted; convert it anew")

    @property
    def n_weights(self) -> int:
        """Of all tensors."""
        return sum(target.n_weights for target in self.targets)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, as they will be written."""
        return sum(place.n_bytes for place in self.layout.places)

    @property
    def bits_per_weight(self) -> float:
        """The mean over all tensors."""
        return 8 * self.tensor_bytes / self.n_weights


def make_plan(source_path: Path, destination: Path, options: Options) -> Plan:
    """The plan for a checkpoint folder or a GGUF. Raises LocalrunError on anything that would go wrong later."""
    source: Checkpoint | GGUFSource
    if source_path.is_dir():
        source = Checkpoint(source_path)
        model = architecture.read_model(source, keep_mtp=options.keep_mtp, drafts=options.drafts)
        is_unusual = bool(model.warnings)
        model.warnings.extend(vocabulary.add_vocabulary(model.metadata, source, options.pre))
        model.metadata.string("general.size_label", _size_label(model.targets))
    else:
        if options.drafts:
            raise LocalrunError(f"{source_path}: --drafts needs a checkpoint folder, not a GGUF")
        source = GGUFSource(source_path)
        model, is_unusual = gguf_source.read_model(source, keep_mtp=options.keep_mtp), False
    if not model.targets:
        raise LocalrunError(f"{source_path}: holds no tensors to convert")
    importances = Importances(options.imatrix, model.targets) if options.imatrix else None
    mix, types = _choose(source, model, importances, options)
    if options.pack and options.interleaving_pays:
        types = interleave(model.targets, types)
    model.warnings.extend(read_back_vocabulary(model.metadata, source_path))
    layout = make_layout(destination, model.metadata, model.targets, types, options.split_max_bytes)
    work = list(units(model.targets, options.unit_bytes))
    states = {path: _state(path) for path in [*source.files, *([options.imatrix] if options.imatrix else [])]}
    return Plan(
        source,
        destination,
        model.metadata,
        mix,
        model.targets,
        types,
        layout,
        work,
        importances,
        model.warnings,
        is_unusual,
        _fingerprint(states, layout, options),
        states,
        options.mix_file,
    )


def _choose(
    source: Checkpoint | GGUFSource, model: architecture.Model, importances: Importances | None, options: Options
) -> tuple[str | None, list[str]]:
    """The mix and each target's type, of which the model's metadata and warnings are to tell. Raises LocalrunError."""
    targets, metadata = model.targets, model.metadata
    mix, overrides = _wanted(source, options)
    if mix is None and not overrides:
        return None, [target.from_type for target in targets]
    types = choose_types(targets, metadata, mix, overrides, has_imatrix=importances is not None)
    check_types_can_be_packed(targets, types)
    check_importances(targets, types, mix, importances, str(options.imatrix))
    if isinstance(source, GGUFSource):
        gguf_source.check_requantize(source, targets, types, options.allow_requantize)
    model.warnings.extend(notes_on(targets, overrides))
    metadata.u32("general.quantization_version", QUANTIZATION_VERSION)
    metadata.u32("general.file_type", file_type(mix, targets, types))
    return mix, types


def _wanted(source: Checkpoint | GGUFSource, options: Options) -> tuple[str | None, list[Override]]:
    """The mix and what overrides it; neither if types are kept. Raises LocalrunError on options that do not agree."""
    if options.mix_file is None:
        return options.mix or _default_mix(source, options), list(options.overrides)
    written = read_mix_file(options.mix_file)
    if options.mix and written.base:
        raise LocalrunError(f"{written.path}: says base {written.base}; leave out --type {options.mix}")
    return options.mix or written.base, [*options.overrides, *written.overrides]


def _default_mix(source: Checkpoint | GGUFSource, options: Options) -> str | None:
    """What no mix means for a source; None if its types are kept. Raises LocalrunError on options that need one."""
    if isinstance(source, Checkpoint):
        return MXFP4_MIX if any(tensor.dtype == MXFP4 for tensor in source.tensors.values()) else DEFAULT_MIX
    if not (options.pack or source.is_interleaved):
        return DEFAULT_MIX
    if options.overrides or options.imatrix:
        raise LocalrunError(f"{source.path}: keeps its types without --type; --tensor-type and --imatrix need it")
    return None


def _size_label(targets: list[Target]) -> str:
    """ "8x7B" or "1.2B", as llama.cpp's converter labels models."""
    stacked = [target for target in targets if "_exps." in target.name]
    experts = sum(target.n_weights // target.shape[0] for target in stacked)
    total = sum(target.n_weights for target in targets)
    shared = total - sum(target.n_weights for target in stacked)
    return size_label(total, shared, experts, stacked[0].shape[0] if stacked else 0)


def _state(path: Path) -> FileState:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _fingerprint(states: dict[Path, FileState], layout: Layout, options: Options) -> str:
    """Changes with anything that the bytes of the result depend on."""
    files = [(path.name, *state) for path, state in states.items()]
    headers = [hashlib.sha256(part.header).hexdigest() for part in layout.parts]
    document = [localrun.__version__, files, headers, options.unit_bytes]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()
