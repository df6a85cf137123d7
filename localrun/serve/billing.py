"""System texts without what changes with every request, or no prompt would begin like the one before."""

from __future__ import annotations

from collections.abc import Iterable

_HEADER = "x-anthropic-billing-header"  # Claude Code's: version, entry point and a checksum of the request, in one line


def without_billing(texts: Iterable[str]) -> list[str]:
    """A system prompt's texts: the line that those at its head begin with is left out, and so are those left empty."""
    kept = list(texts)
    while kept and kept[0].startswith(_HEADER):
        rest = kept.pop(0).partition("\n")[2].lstrip("\n")
        if rest:
            kept.insert(0, rest)
    return kept
