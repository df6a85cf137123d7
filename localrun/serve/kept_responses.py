"""Finished responses by their ids, to be asked for and gone on from; in memory, until there is no room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

MOST_BYTES, MOST = 1 << 26, 4096  # of JSON; responses

Document = dict[str, Any]


@dataclass(frozen=True)
class _Kept:
    """A response, and its conversation: all items from the first on, what it says itself among them; in JSON."""

    document: bytes
    items: bytes

    @property
    def n_bytes(self) -> int:
        return len(self.document) + len(self.items)


class KeptResponses:
    """Those used least recently go where all take more than `most_bytes`, and with the server. Of one thread."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self._most_bytes, self._n_bytes = most_bytes, 0
        self._kept: dict[str, _Kept] = {}  # the one used least recently first

    def add(self, document: Document, given: Sequence[Document]) -> None:
        """Keep a response; given: its conversation before it."""
        items = [*given, *document["output"]]
        kept = _Kept(msgspec.json.encode(document), msgspec.json.encode(items))
        self._kept[document["id"]] = kept
        self._n_bytes += kept.n_bytes
        while self._n_bytes > self._most_bytes or len(self._kept) > MOST:
            self.delete(next(iter(self._kept)))

    def document(self, id: str) -> Document | None:
        """A response, None if there is none of that id."""
        kept = self._used(id)
        return kept and msgspec.json.decode(kept.document)

    def items(self, id: str) -> list[Document] | None:
        """Its conversation, with what it says itself."""
        kept = self._used(id)
        return kept and msgspec.json.decode(kept.items)

    def delete(self, id: str) -> bool:
        """Whether there was one."""
        kept = self._kept.pop(id, None)
        self._n_bytes -= kept.n_bytes if kept else 0
        return kept is not None

    def _used(self, id: str) -> _Kept | None:
        kept = self._kept.pop(id, None)
        if kept:
            self._kept[id] = kept
        return kept
