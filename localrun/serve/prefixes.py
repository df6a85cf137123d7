"""Finished conversations, kept so that the next prompt that begins like one of them need not be read again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from localrun.engine import Engine
from localrun.generate.session import Session
from localrun.serve.store import LEAST_SHARE, LEAST_TOKENS, Store

_MOST_KEPT = 1024  # conversations: what they take besides their caches is not counted, and each take() looks at all
_MOST_LOST = 256  # tokens of a conversation that a prompt which goes on from it may take the place of


class Prefixes:
    """Sessions by what they hold. Those used least recently go when all take more than `most_bytes`: to the store.

    The engine thread alone uses it.

    Attributes:
        n_bytes: of memory that the sessions' caches take; 0 with llama.cpp, which does not say.

    Args:
        most_bytes: that are kept. Caches of a draft model or of MTP come on top.
        slots: replies that run at once. On a GPU and with llama.cpp a session takes its memory whole, so that there
            are never more sessions than slots.
        store: the folder for what goes; None to forget it.
    """

    def __init__(self, engine: Engine, most_bytes: int, slots: int, store: Store | None = None):
        self._engine, self._most_bytes, self._store = engine, most_bytes, store
        self._is_native, self._slots = engine.config is not None, slots
        self._takes_all = engine.config is None or engine.device != "cpu"
        self._kept: list[Session] = []  # the one used least recently first
        self.n_bytes = 0

    def take(self, ids: Sequence[int], running: Iterable[Session]) -> Session:
        """A session for a prompt, with as much of its beginning as any holds, in memory or in the store.

        A kept one is taken itself, so that nothing is copied, if the prompt goes on from it; also where it goes on from
        most of it and there is no room for both, or no way to copy. Else it stays as it is, and what it shares is
        copied: so a short question with the same system message does not cost a long conversation.
        """
        others = list(running)
        kept = max(reversed(self._kept), key=lambda session: _shared(session, ids), default=None)
        source = max([*self._kept, *others], key=lambda session: _shared(session, ids), default=None)
        if stored := self._stored(ids, _shared(source, ids) if source else 0, others):
            return stored
        if kept and self._may_take(kept, _shared(kept, ids)):
            return self._taken(kept)
        if self._is_full(others):
            return self._taken(kept if kept and _shared(kept, ids) else self._kept[0])
        session = self._engine.session()
        if source and self._is_native and (length := _shared(source, ids)):
            session.copy(source, length)
            if source in self._kept:
                self._kept.append(self._taken(source))
                self._count()
        return session

    def keep(self, session: Session) -> None:
        """A session whose reply is over."""
        session.end_reply()
        self._kept.append(session)
        self._count()
        while self._kept and (self.n_bytes > self._most_bytes or len(self._kept) > _MOST_KEPT):
            self._evict()

    def close(self) -> None:
        """Leave all to the store, for the next start."""
        if self._store:
            self._store.close(self._kept)
        self._kept.clear()
        self._count()

    def _stored(self, ids: Sequence[int], n_shared: int, others: Sequence[Session]) -> Session | None:
        """A session with what the store has, where that is worth reading."""
        entry, n_stored = self._store.longest(ids) if self._store else (None, 0)
        if not entry or n_stored - n_shared < max(LEAST_TOKENS, len(entry.ids) // LEAST_SHARE):
            return None
        if self._is_full(others):
            self._evict()
        session = self._engine.session()
        return session if self._store and self._store.read(entry, session) else None

    def _may_take(self, kept: Session, n_shared: int) -> bool:
        """Whether a prompt that shares so much may go on in this one's place."""
        n_lost = len(kept.ids) - n_shared
        if n_lost <= min(_MOST_LOST, n_shared // 4):
            return True
        copy = self.n_bytes * n_shared // max(1, sum(len(session.ids) for session in self._kept))
        return n_lost <= n_shared and (not self._is_native or self.n_bytes + copy > self._most_bytes)

    def _is_full(self, others: Sequence[Session]) -> bool:
        """Whether a kept session has to go before there can be another one."""
        return self._takes_all and bool(self._kept) and len(self._kept) + len(others) >= self._slots

    def _evict(self) -> None:
        session = self._kept.pop(0)
        self._count()
        if self._store:
            self._store.put(session)

    def _taken(self, session: Session) -> Session:
        self._kept.remove(session)
        self._count()
        return session

    def _count(self) -> None:
        self.n_bytes = sum(session.cache.n_bytes for session in self._kept)


def _shared(session: Session, ids: Sequence[int]) -> int:
    """How many of a prompt's first tokens a session would not read again."""
    return session.cache.kept(session.shared(ids))
