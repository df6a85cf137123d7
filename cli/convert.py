"""localrun convert: a checkpoint or a GGUF to a packed GGUF."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import note, print_json, printable, size
from localrun.errors import LocalrunError

if TYPE_CHECKING:
    from localrun.convert import Plan, Progress

_LINE_S = 30.0  # between two lines of progress in a log


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A Hugging Face checkpoint folder, or a GGUF to pack anew.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The GGUF file to write.")],
    type_: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="F32, F16, BF16, Q8_0, Q4_K_M, MXFP4_MOE, and others.")
    ] = "Q4_K_M",
    tensor_types: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="REGEX=TYPE",
            help="A type for tensors whose name matches; may be repeated, the first match counts.",
            show_default=False,
        ),
    ] = None,
    no_mtp: Annotated[bool, typer.Option("--no-mtp", help="Leave out layers for multi-token prediction.")] = False,
    imatrix: Annotated[
        Path | None,
        typer.Option("--imatrix", metavar="FILE", help="A GGUF importance matrix to pack by.", show_default=False),
    ] = None,
    pre: Annotated[
        str | None,
        typer.Option("--pre", metavar="NAME", help="llama.cpp's name for how text is split.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished conversion.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists; begin anew.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    split_max_size: Annotated[
        str | None,
        typer.Option("--split-max-size", metavar="SIZE", help="Write parts of at most 40G, say.", show_default=False),
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Pack anew even what has lost much already.")
    ] = False,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Convert a checkpoint to a GGUF file, or a GGUF file to another type, in one pass."""
    from localrun.convert import Options, make_plan
    from localrun.convert import convert as carry_out
    from localrun.convert.mixes import parse_mix, parse_override
    from localrun.hardware import usable_cores

    if threads is not None and threads < 1:
        raise LocalrunError(f"-t {threads}; expected 1 or more")
    mix = parse_mix(type_)
    chosen = Options(
        mix=mix,
        overrides=[parse_override(text) for text in tensor_types or []],
        keep_mtp=not no_mtp,
        imatrix=imatrix,
        split_max_bytes=_parse_size(split_max_size) if split_max_size else 0,
        allow_requantize=allow_requantize,
        pre=pre,
    )
    plan = make_plan(source, destination, chosen)
    for warning in plan.warnings:
        note(warning)
    if dry_run:
        _show(plan, mix, as_json)
        return
    eta = _Eta()
    try:
        last = carry_out(plan, threads=threads or usable_cores(), resume=resume, force=force, progress=eta.show)
    except KeyboardInterrupt:
        note("interrupted; --resume goes on from here")
        raise
    eta.end()
    _report(plan, mix, last, eta.seconds(), as_json)


def _parse_size(text: str) -> int:
    """ "40G" -> 40_000_000_000, as llama.cpp's tools count. Raises LocalrunError."""
    number, unit = text[:-1], text[-1:].upper()
    if not number.isdigit() or unit not in ("M", "G") or not int(number):
        raise LocalrunError(f"--split-max-size {text!r}; expected a number and M or G, such as 40G")
    return int(number) * {"M": 10**6, "G": 10**9}[unit]


def _facts(plan: "Plan", mix: str) -> dict[str, Any]:
    unreached = plan.importances.unreached if plan.importances else {}
    return {
        "source": str(plan.source.path),
        "paths": [str(part.path) for part in plan.layout.parts],
        "type": mix,
        "architecture": plan.metadata.architecture,
        "tensors": len(plan.targets),
        "parameters": plan.n_weights,
        "file_bytes": plan.layout.size,
        "tensor_bytes": plan.tensor_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 3),
        "without_importance": unreached,
        "warnings": plan.warnings,
    }


def _show(plan: "Plan", mix: str, as_json: bool) -> None:
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
        print_json(_facts(plan, mix) | {"plan": rows})
        return
    print(f"{'tensor':<40} {'shape':<20} {'from':<8} {'to':<8} {'size':>12}")
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        print(f"{row['name']:<40} {shape:<20} {row['from']:<8} {row['to']:<8} {size(row['bytes']):>12}")
    print(f"{len(rows)} tensors, {_summary(plan)}")


def _summary(plan: "Plan") -> str:
    parts = f" in {len(plan.layout.parts)} parts" if len(plan.layout.parts) > 1 else ""
    return f"{size(plan.layout.size)}{parts}, {plan.bits_per_weight:.2f} bits per weight"


def _report(plan: "Plan", mix: str, last: "Progress", seconds: float, as_json: bool) -> None:
    if as_json:
        done = {"bytes_in": last.bytes_in, "bytes_out": last.bytes_out, "seconds": round(seconds, 3)}
        print_json(_facts(plan, mix) | done)
        return
    if plan.importances and plan.importances.unreached:
        count = sum(map(len, plan.importances.unreached.values()))
        note(f"{count} experts have no importance in the imatrix and were packed without; --json lists them")
    print(f"{printable(str(plan.layout.parts[0].path))}: {_summary(plan)}, {_duration(seconds)}")


class _Eta:
    """Progress on stderr: a line that is rewritten on a terminal, else one now and then."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first_weights: int | None = None
        self._next_line = _LINE_S
        self._terminal = sys.stderr.isatty()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def show(self, progress: "Progress") -> None:
        if self._first_weights is None:  # an earlier run's share has taken this one no time
            self._first_weights = progress.weights
        if not self._terminal and self.seconds() < self._next_line:
            return
        self._next_line = self.seconds() + _LINE_S
        done, left = progress.weights - self._first_weights, progress.total_weights - progress.weights
        eta = f", {_duration(self.seconds() / done * left)} left" if done else ""
        percent = 100 * progress.weights / progress.total_weights
        moved = f"{size(progress.bytes_in)} in, {size(progress.bytes_out)} out"
        line = f"{percent:5.1f}% {moved}{eta}, {printable(progress.tensor)}"
        if self._terminal:
            print(f"\r{line:<100.100}", end="", file=sys.stderr, flush=True)
        else:
            note(line.strip())

    def end(self) -> None:
        if self._terminal:
            print(f"\r{'':<100}\r", end="", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """ "2 h 05 min", "3 min 20 s", "4.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
