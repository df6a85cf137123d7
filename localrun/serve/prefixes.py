"""Finished conversations, kept so that the next prompt that begins like one of them need not be read again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

from localrun.engine import Engine
from localrun.generate.session import Session


class Prefixes:
    """Sessions by what they hold. Those used least recently go when all take more than `most_bytes`.

    The engine thread alone uses it.

    Attributes:
        n_bytes: of keys and values that are kept; 0 with llama.cpp, which does not say.

    Args:
        most_bytes: of keys and values that are kept. Those of a draft model or of MTP come on top.
        slots: replies that run at once. On a GPU and with llama.cpp a session takes its memory whole, so that there
            are never more sessions than slots.
    """

    def __init__(self, engine: Engine, most_bytes: int, slots: int):
        self._engine, self._most_bytes = engine, most_bytes
        self._is_native, self._slots = engine.config is not None, slots
        self._bytes_per_token = engine.config.kv_bytes_per_token if engine.config else 0
        self._takes_all = engine.config is None or engine.device != "cpu"
        self._kept: list[Session] = []  # the one used least recently first
        self._touched: WeakKeyDictionary[Session, int] = WeakKeyDictionary()  # tokens whose memory was written to
        self.n_bytes = 0

    def take(self, ids: Sequence[int], running: Iterable[Session]) -> Session:
        """A session for a prompt, with as much of its beginning as any holds.

        A kept one is taken itself if that is most of what it holds, for it then goes on. Else it stays as it is, and
        what it shares is copied: so a short question with the same system message does not cost a long conversation.
        """
        kept = max(reversed(self._kept), key=lambda session: session.shared(ids), default=None)
        if kept and 2 * kept.shared(ids) >= len(kept.ids):
            return self._taken(kept)
        others = list(running)
        if self._takes_all and self._kept and len(self._kept) + len(others) >= self._slots:
            return self._taken(kept if kept and kept.shared(ids) else self._kept[0])
        session = self._engine.session()
        source = max([*self._kept, *others], key=lambda session: session.shared(ids), default=None)
        if source and self._is_native and (length := source.shared(ids)):
            session.copy(source, length)
        return session

    def keep(self, session: Session) -> None:
        """A session whose reply is over."""
        self._touched[session] = max(self._touched.get(session, 0), len(session.ids))
        self._kept.append(session)
        self._count()
        while self._kept and self.n_bytes > self._most_bytes:
            self._kept.pop(0)
            self._count()

    def _taken(self, session: Session) -> Session:
        self._kept.remove(session)
        self._count()
        return session

    def _count(self) -> None:
        self.n_bytes = self._bytes_per_token * sum(self._touched[session] for session in self._kept)
