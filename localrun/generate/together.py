"""Steps that several sessions share: each weight is read once for a token of each of them.

A session's logits are, to the bit, those that it would have alone: nobody's reply depends on who else is served. Shared
steps carry no drafts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import numpy as np

from localrun.generate.session import Session
from localrun.runtime import SharingModel


def evaluate_each(sessions: Sequence[Session], ids: Sequence[int]) -> np.ndarray:
    """float32 (T, vocab): the logits after one token of each of T sessions, which then hold it too.

    The sessions are of one engine, and differ. As few steps as the model can; turns where its contexts share none.
    Raises ContextFullError if one of a step's has no room; sessions of steps before that hold their tokens already.
    """
    engine, rows = sessions[0].engine, []
    with engine.turn:
        n_steps = -(-len(sessions) // engine.model.most_together)
        for group in range(n_steps):
            step = slice(group * len(sessions) // n_steps, (group + 1) * len(sessions) // n_steps)
            rows.append(_evaluate_step(sessions[step], ids[step]))
    return np.concatenate(rows)


def _evaluate_step(sessions: Sequence[Session], ids: Sequence[int]) -> np.ndarray:
    engine = sessions[0].engine
    for session in sessions:
        session.forget(len(session.ids))
    if len(sessions) == 1:
        return sessions[0].advance(ids)[None]
    engine.file.check_unchanged()
    rows = cast(SharingModel, engine.model).forward_each(ids, [session.cache for session in sessions])
    for i, (session, token) in enumerate(zip(sessions, ids, strict=True)):
        session.ids.append(token)
        if session.speculation:
            session.speculation.draft.evaluated(len(session.ids) - 1, 1, slice(i, i + 1))
    return rows


def step_together(sessions: Sequence[Session]) -> None:
    """The next step of replies that have a next_id; their iterators go on from there."""
    started = time.perf_counter()
    rows = evaluate_each(sessions, [cast(int, session.next_id) for session in sessions])
    seconds = time.perf_counter() - started
    for session, row in zip(sessions, rows, strict=True):
        session.take_step(row, seconds)
