"""localrun convert: a checkpoint or a GGUF to a packed GGUF."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.checked import checked
from cli.interrupt import raising
from cli.output import end_line, note, print_json, printable, show, show_again, size
from localrun.errors import LocalrunError

if TYPE_CHECKING:
    from localrun.convert import Plan, Progress

_LINE_S = 30.0  # between two lines of progress in a log
_WIDTH = 100  # of a line of progress on a terminal


Source = Annotated[
    Path, typer.Argument(metavar="SRC", help="A Hugging Face checkpoint folder, or a GGUF to pack anew.")
]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="The GGUF file to write.")]
Type = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="TYPE",
        help="F32, F16, BF16, Q8_0, Q4_K_M (the default), Q2_K, IQ2_XXS, MXFP4_MOE, and others of llama.cpp's.",
        show_default=False,
    ),
]
TensorTypes = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        metavar="REGEX=TYPE",
        help="A type for tensors whose name matches; may be repeated, the first match counts.",
        show_default=False,
    ),
]
MixPath = Annotated[
    Path | None,
    typer.Option(
        "--mix",
        metavar="FILE",
        help="Types by a file, a line REGEX TYPE each, the first match counts; `inspect --mix` writes such lines.",
        show_default=False,
    ),
]
NoMtp = Annotated[bool, typer.Option("--no-mtp", help="Leave out layers for multi-token prediction.")]
Drafts = Annotated[
    bool,
    typer.Option("--drafts", help="Write what drafts for a DeepSeek-V4 (prediction layer, DSpark), for `--draft`."),
]
Imatrix = Annotated[
    Path | None,
    typer.Option("--imatrix", metavar="FILE", help="A GGUF importance matrix to pack by.", show_default=False),
]
Pre = Annotated[
    str | None,
    typer.Option("--pre", metavar="NAME", help="llama.cpp's name for how text is split.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished conversion.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that exists; begin anew.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")]
SplitMaxSize = Annotated[
    str | None,
    typer.Option("--split-max-size", metavar="SIZE", help="Write parts of at most 40G, say.", show_default=False),
]
Pack = Annotated[
    bool,
    typer.Option("--pack", help="Interleave rows: faster, for localrun only. Without --type a GGUF keeps its types."),
]
Check = Annotated[bool, typer.Option("--check", help="Compare with transformers, where that is installed.")]
AllowRequantize = Annotated[bool, typer.Option("--allow-requantize", help="Pack anew even what has lost much already.")]


def convert(
    source: Source,
    destination: Destination,
    type_: Type = None,
    tensor_types: TensorTypes = None,
    mix: MixPath = None,
    no_mtp: NoMtp = False,
    drafts: Drafts = False,
    imatrix: Imatrix = None,
    pre: Pre = None,
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
    split_max_size: SplitMaxSize = None,
    allow_requantize: AllowRequantize = False,
    pack: Pack = False,
    check: Check = False,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Convert a checkpoint to a GGUF file, or a GGUF file to another type, in one pass."""
    from cli.model import exit_if_cut
    from localrun.convert import Options, make_plan
    from localrun.convert.mixes import parse_mix, parse_override
    from localrun.convert.run import check_destination
    from localrun.cpu.repack import interleaving_pays
    from localrun.workers import n_workers

    threads = n_workers(threads)
    chosen = Options(
        mix=None if type_ is None else parse_mix(type_),
        overrides=[parse_override(text) for text in tensor_types or []],
        mix_file=mix,
        keep_mtp=not no_mtp,
        drafts=drafts,
        imatrix=imatrix,
        split_max_bytes=_parse_size(split_max_size) if split_max_size else 0,
        allow_requantize=allow_requantize,
        pack=pack,
        interleaving_pays=not pack or interleaving_pays("--pack", note),
        pre=pre,
    )
    exit_if_cut(source)
    plan = make_plan(source, destination, chosen)
    for warning in plan.warnings:
        note(warning)
    if plan.is_unusual and not check:
        note("this checkpoint is unusual; --check compares the result with transformers'")
    if dry_run:
        _show(plan, as_json)
    elif check:
        check_destination(plan, resume=resume, force=force)
        with checked(plan, chosen, threads) as compare:
            last, seconds = _carry_out(plan, threads, resume, force)
            _report(plan, last, seconds, as_json, compare())
    else:
        last, seconds = _carry_out(plan, threads, resume, force)
        _report(plan, last, seconds, as_json, {})


def _carry_out(plan: "Plan", threads: int, resume: bool, force: bool) -> "tuple[Progress, float]":
    """Write the file, with progress on stderr; what was moved, and the seconds it took."""
    from localrun.convert import convert as carry_out

    try:
        with raising(), _Eta() as eta:
            last = carry_out(plan, threads=threads, resume=resume, force=force, progress=eta.show)
    except KeyboardInterrupt:
        note("interrupted; --resume goes on from here")
        raise
    return last, eta.seconds()


def _parse_size(text: str) -> int:
    """ "40G" -> 40_000_000_000, as llama.cpp's tools count. Raises LocalrunError."""
    number, unit = text[:-1], text[-1:].upper()
    if not number.isdigit() or unit not in ("M", "G") or not int(number):
        raise LocalrunError(f"--split-max-size {text!r}; expected a number and M or G, such as 40G")
    return int(number) * {"M": 10**6, "G": 10**9}[unit]


def _facts(plan: "Plan") -> dict[str, Any]:
    unreached = plan.importances.unreached if plan.importances else {}
    return {
        "source": str(plan.source.path),
        "paths": [str(part.path) for part in plan.layout.parts],
        "type": plan.mix,
        "mix_file": str(plan.mix_file) if plan.mix_file else None,
        "architecture": plan.metadata.architecture,
        "tensors": len(plan.targets),
        "parameters": plan.n_weights,
        "file_bytes": plan.layout.size,
        "tensor_bytes": plan.tensor_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 3),
        "without_importance": unreached,
        "matrices_without_importance": plan.importances.missing if plan.importances else [],
        "warnings": plan.warnings,
    }


def _show(plan: "Plan", as_json: bool) -> None:
    """The plan on stdout, a line for each tensor."""
    rows = [
        {
            "name": target.name,
            "shape": list(target.shape),
            "from": target.from_type,
            "to": type_,
            "bytes": place.n_bytes,
        }
        for target, type_, place in zip(plan.targets, plan.types, plan.layout.places, strict=True)
    ]
    if as_json:
        print_json(_facts(plan) | {"plan": rows})
        return
    show(f"{'tensor':<40} {'shape':<20} {'from':<8} {'to':<8} {'size':>12}")
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        show(f"{printable(row['name']):<40} {shape:<20} {row['from']:<8} {row['to']:<8} {size(row['bytes']):>12}")
    show(f"{len(rows)} tensors, {_summary(plan)}")


def _summary(plan: "Plan") -> str:
    parts = f" in {len(plan.layout.parts)} parts" if len(plan.layout.parts) > 1 else ""
    return f"{size(plan.layout.size)}{parts}, {plan.bits_per_weight:.2f} bits per weight"


def _report(plan: "Plan", last: "Progress", seconds: float, as_json: bool, found: dict[str, Any]) -> None:
    if as_json:
        done = found | {"bytes_in": last.bytes_in, "bytes_out": last.bytes_out, "seconds": round(seconds, 3)}
        print_json(_facts(plan) | done)
        return
    _note_without_importance(plan)
    show(f"{printable(str(plan.layout.parts[0].path))}: {_summary(plan)}, {_duration(seconds)}")


def _note_without_importance(plan: "Plan") -> None:
    """Experts are counted once for each of their matrices."""
    if plan.importances and (plan.importances.unreached or plan.importances.missing):
        experts, matrices = sum(map(len, plan.importances.unreached.values())), len(plan.importances.missing)
        note(
            f"{experts} matrices of experts and {matrices} others have no importance in the imatrix and are packed "
            "without; --json lists them"
        )


class _Eta:
    """Progress on stderr: a line that is rewritten on a terminal, else one now and then."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first: tuple[int, float] | None = None  # weights and seconds when the first unit of this run was done
        self._next_line = _LINE_S
        self._terminal = sys.stderr.isatty()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def show(self, progress: "Progress") -> None:
        """Says how far it is; in a log, seldom."""
        if self._first is None:  # neither an earlier run's share nor the compiling of kernels tells of what is left
            self._first = progress.weights, self.seconds()
        if not self._terminal and self.seconds() < self._next_line:
            return
        self._next_line = self.seconds() + _LINE_S
        done, left = progress.weights - self._first[0], progress.total_weights - progress.weights
        eta = f", {_duration((self.seconds() - self._first[1]) / done * left)} left" if done else ""
        percent = 100 * progress.weights / progress.total_weights
        moved = f"{size(progress.bytes_in)} in, {size(progress.bytes_out)} out"
        line = f"{percent:5.1f}% {moved}{eta}, {printable(progress.tensor)}"
        if self._terminal:
            show_again(line, _WIDTH)
        else:
            note(line.strip())

    def __enter__(self) -> "_Eta":
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Clears the line, for what is said next."""
        if self._terminal:
            end_line(_WIDTH)


def _duration(seconds: float) -> str:
    """ "2 h 05 min", "3 min 20 s", "4.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
