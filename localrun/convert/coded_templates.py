"""Chat templates of models whose makers publish a program in place of one: written here, from what the program does.

DeepSeek-V4's is encoding/encoding_dsv4.py of its repositories. Of July 2026 on, and only there, effort "high" has words
of its own, and "max" others than before. Where that program and llama.cpp's template differ (tools without a system
message, results without tools, results in another order than their calls), the program counts.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

_EFFORTS = "{'max': absolute}"
_LATER_EFFORTS = "{'high': absolute, 'max': beyond}"
_LATER = "Beyond maximum"  # what the later program says
_LATER_NAME = "0731"
_LONGEST = 1 << 20  # characters of such a program that are looked at; published ones have 30,000


def coded_template(architecture: str, folder: Path, read: list[Path]) -> str | None:
    """The template for a checkpoint of such an architecture; None for others. Adds what was read to `read`."""
    if architecture != "deepseek4":
        return None
    efforts = _LATER_EFFORTS if _is_later(folder, read) else _EFFORTS
    source = files("localrun.convert").joinpath("data", f"{architecture}.jinja").read_text(encoding="utf-8")
    return source.replace("EFFORTS", efforts)


def _is_later(folder: Path, read: list[Path]) -> bool:
    programs = sorted((folder / "encoding").glob("encoding*.py"))
    for path in programs:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                text = file.read(_LONGEST)
        except OSError:
            continue  # the folder's name tells as well
        read.append(path)
        if _LATER in text:
            return True
    return not programs and _LATER_NAME in folder.resolve().name
