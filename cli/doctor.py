"""localrun doctor: what this machine has, what it measures, and what to do where something is amiss."""

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.output import print_json, printable, show
from localrun.errors import LocalrunError
from localrun.files import user_path

_WIDTH = 14


def doctor(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH",
            help="A model file, or a folder of them, whose disk to measure; the bundled model's if not given.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Look at this machine: processor, memory, GPU, disk. Takes some seconds."""
    from localrun.measure.doctor import examine

    findings = examine(_path(path))
    if as_json:
        fields = ("status", "text", "advice", "data")
        print_json({each.name: {name: getattr(each, name) for name in fields} for each in findings})
        return
    for each in findings:
        show(f"{each.status:<8} {each.name:<{_WIDTH}} {printable(each.text)}")
        if each.advice:
            show(f"{'':<8} {'':<{_WIDTH}} -> {printable(each.advice)}")


def _path(path: str | None) -> Path | None:
    """What was given, else where the bundled model is, if it is installed. Raises LocalrunError if it is not there."""
    from localrun.bundled import model_path

    if path is not None:
        if not (found := user_path(path)).exists():
            raise LocalrunError(f"{path}: no such file or folder")
        return found
    try:
        return model_path(None)
    except LocalrunError:
        return None
