"""Markdown to lines for a terminal, and where what has come of a reply can be cut.

By rich, but for four things. Code is neither framed nor wrapped nor padded, so that what is copied is the code. A line
break of the model's is one. Nothing that came is left out: tags of HTML, images, definitions of links. Links are
written out, since a text that leads elsewhere deceives.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from rich.console import Group
from rich.markdown import Heading, Markdown, TableElement
from rich.syntax import Syntax
from rich.text import Text

from cli.output import rendered
from localrun.errors import LocalrunError

NARROWEST = 30  # columns; below that there is no room for lists and tables
_CODE = ("fence", "code_block")
_DIM = "dim"


@cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt().enable(["strikethrough", "table"]).disable(["html_block", "html_inline", "image", "reference"])


def closed_blocks(text: str, width: int) -> tuple[str, str]:
    """What no further text can change, whole blocks, and the rest, with a block at least."""
    if width < NARROWEST:
        return "", text
    end = text.rfind("\n") + 1  # what the last line is shows when it has ended
    starts = [token.map[0] for token in _parser().parse(text[:end]) if token.level == 0 and token.map]
    closed = "".join(line + "\n" for line in text[:end].split("\n")[: starts[-1] if starts else 0])
    return closed, text[len(closed) :]


def markdown_lines(text: str, width: int) -> list[str]:
    """The lines of a text in Markdown, with escape sequences; those of code may be wider than the terminal."""
    if width < NARROWEST:
        return rendered(Text(text.strip("\n")), width)
    lines, block = list[str](), list[Any]()
    for token in _parser().parse(text):
        block.append(_with_breaks(token))
        if token.level == 0 and token.nesting <= 0:  # it ends here
            shown = _code(token) if token.type in _CODE else _Block(block)
            lines += [""] * bool(lines) + _trimmed(rendered(shown, width))
            block = []
    return lines


def dim_lines(text: str, width: int) -> list[str]:
    """Lines of plain text, wrapped, in dim letters."""
    return rendered(Text(text, style=_DIM), width)


def last_code(text: str) -> str:
    """The last block of code at the top of a text. Raises LocalrunError if there is none."""
    blocks = [token.content for token in _parser().parse(text) if token.type in _CODE]
    if not blocks:
        raise LocalrunError("the reply has no block of code")
    return blocks[-1]


class _Table(TableElement):
    """One that wraps words which are longer than their column."""

    def __rich_console__(self, console: Any, options: Any) -> Any:
        for table in super().__rich_console__(console, options):
            for column in table.columns:
                column.overflow = "fold"
            yield table


class _Heading(Heading):
    """One at the left, as the rest."""

    LEVEL_ALIGN: ClassVar[dict[str, Any]] = {}


class _Block(Markdown):
    """A block that is parsed already."""

    elements = Markdown.elements | {"table_open": _Table, "heading_open": _Heading}

    def __init__(self, tokens: list[Any]) -> None:
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.parsed = tokens


def _with_breaks(token: Any) -> Any:
    for child in token.children or []:
        if child.type == "softbreak":
            child.type = "hardbreak"
    return token


def _code(token: Any) -> Group:
    code = token.content.rstrip("\n")
    language = token.info.split()[0] if token.info.strip() else "text"
    text = Syntax(code, language, theme="ansi_dark", background_color="default").highlight(code)
    text.rstrip()
    text.no_wrap, text.overflow = True, "ignore"
    return Group(text)  # of a bare text rich would forget that


def _trimmed(lines: list[str]) -> list[str]:
    """Without empty lines around."""
    while lines and not lines[0].strip():
        lines = lines[1:]
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    return lines
