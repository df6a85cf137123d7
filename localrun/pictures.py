"""Pictures of figures, with matplotlib where it is installed (localrun[plot])."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError
from localrun.files import check_place, replacing

_SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Raises LocalrunError if there is no matplotlib, or no picture can have that name or lie there."""
    if path.suffix.lower() not in _SUFFIXES:
        raise LocalrunError(f"{path}: a picture's name ends in {', '.join(_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise LocalrunError("--plot needs matplotlib: pip install 'localrun[plot]'") from None
    check_place(path)


def new_figure() -> tuple[Any, Any]:
    """A figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.subplots()


def save_figure(figure: Any, axes: Any, path: Path) -> None:
    """With a grid and a legend, in the place of what is there. Raises LocalrunError."""
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())
