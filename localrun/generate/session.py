"""A conversation's state: the tokens in the cache, and replies that reuse what they share with the next prompt."""

import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from localrun.arguments import function, path_text, refuse, shown, texts, token_ids, whole
from localrun.errors import ContextFullError, LocalrunError
from localrun.generate import saved
from localrun.generate.constraint import Guide
from localrun.generate.reply_text import ReplyText
from localrun.generate.sampling import Logprobs, Sampler, Sampling
from localrun.generate.speculative import Speculation
from localrun.runtime import KVCache, Runner


@dataclass
class Stats:
    """What the last reply took.

    Attributes:
        steps: how often the model was run to generate; each gives a token, and one more for every accepted draft.
        drafted_tokens, accepted_tokens: drafts that were verified, and that came true.
        speed_up: how much faster the tokens came than plain steps would have brought them; None if that is not known.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_s: float = 0.0
    generated_tokens: int = 0
    decode_s: float = 0.0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    speed_up: float | None = None

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a step gave; 0 if there was none."""
        return (self.steps + self.accepted_tokens) / self.steps if self.steps else 0.0


@dataclass
class _Reply:
    """A reply on its way: what was asked for, and what has come of it."""

    prompt: list[int]
    sampler: Sampler
    limit: float  # tokens
    progress: Callable[[int, int], None] | None
    cached: list[int] = field(default_factory=list)  # the session's ids
    ids: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    finish_reason: str | None = None
    awaits_step: bool = False  # all that its last step gave is out
    taken: "_Step | None" = None  # the next step, if take_step() was told of it


class Session:
    """One cache and the tokens in it.

    A new reply ends the one before: that one's iterator, if it is used again, raises a LocalrunError. Threads that use
    sessions of one engine take turns, a step or a chunk of a prompt each.

    Attributes:
        ids: the tokens whose keys and values are cached. The cache may hold more behind them, which do not count.
        speculation: what drafts tokens to be verified together; None for one token a step.
    """

    def __init__(self, engine: Runner, speculation: Speculation | None = None):
        self.engine, self.speculation = engine, speculation
        self.ids: list[int] = []
        self._reply = _no_reply()
        self._cache = engine.new_cache()

    @property
    def reply_ids(self) -> list[int]:
        """What the last reply generated."""
        return self._reply.ids

    @property
    def reply_logprobs(self) -> list[Logprobs]:
        """Of these tokens, if Sampling.top_logprobs asked for them."""
        return self._reply.sampler.logprobs[: len(self._reply.ids)]

    @property
    def stats(self) -> Stats:
        """What the last reply took."""
        return self._reply.stats

    @property
    def finish_reason(self) -> str | None:
        """Why it ended: "stop" (end token or stop string), "length", "context"; None if it was closed."""
        return self._reply.finish_reason

    @property
    def cache(self) -> KVCache:
        """What holds the tokens' keys and values; for localrun.generate.together."""
        return self._cache

    @property
    def next_id(self) -> int | None:
        """The token that the reply's next step begins with; None where no step comes next."""
        reply = self._reply
        if not reply.awaits_step or reply.taken or len(reply.ids) >= reply.limit or len(self.ids) >= self.engine.ctx:
            return None
        return None if reply.sampler.is_complete else reply.ids[-1]

    def take_step(self, logits: np.ndarray, seconds: float) -> None:
        """next_id was evaluated, with those of other sessions: float32 (vocab). The reply goes on from there."""
        reply = self._reply
        reply.taken = _Step(logits[None], [], is_shared=True)
        reply.stats.decode_s += seconds
        reply.stats.steps += 1

    def reply(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        spelled: Mapping[int, str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[str]:
        """The text that follows the prompt `ids`, in pieces of whole characters; stop strings are not part of it.

        A stop string may spell control tokens, which are no part of the text either, but for those in `spelled`, which
        says how they are written. Closing the iterator early keeps what was evaluated. progress(done, total) counts
        prompt tokens.

        Raises:
            ContextFullError: the prompt does not fit.
            LocalrunError: no prompt, an id that the vocabulary lacks, or an argument that is none.
        """
        return self._texts(self._new_reply(ids, sampling, max_tokens, progress), texts("stop", stop), spelled)

    def tokens(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[int]:
        """Like reply, in token ids; an end token ends it and is not yielded."""
        return self._tokens(self._new_reply(ids, sampling, max_tokens, progress))

    def _new_reply(self, ids: Any, sampling: Any, max_tokens: Any, progress: Any) -> _Reply:
        """The arguments of reply(), checked."""
        ids = token_ids(ids)
        self.engine.check_ids(ids)
        if len(ids) > self.engine.ctx:
            raise ContextFullError(
                f"the prompt has {len(ids)} tokens; the context holds {self.engine.ctx}: shorten it, or raise -c/--ctx"
            )
        if sampling is not None and not isinstance(sampling, Sampling):
            refuse("sampling", sampling, "a localrun.Sampling, or None")
        limit = math.inf if max_tokens is None else whole("max_tokens", max_tokens, "0 or more, or None", low=0)
        reply = _Reply(ids, self._sampler(sampling or Sampling(), ids), limit, function("progress", progress))
        reply.stats.prompt_tokens = len(ids)
        return reply

    def _sampler(self, sampling: Sampling, ids: list[int]) -> Sampler:
        if sampling.logit_bias and (token := max(sampling.logit_bias)) > (most := self.engine.model.vocab_size - 1):
            raise LocalrunError(f"logit_bias has the token id {shown(token)}; this model has ids 0 to {most}")
        constraint = sampling.constraint
        return Sampler(sampling, ids, Guide(constraint, self.engine.tokenizer, ids) if constraint else None)

    def _texts(self, reply: _Reply, stop: list[str], spelled: Mapping[int, str] | None) -> Iterator[str]:
        text = ReplyText(self.engine.tokenizer, stop, spelled)
        with closing(self._tokens(reply)) as tokens:
            for token in tokens:
                if piece := text.push(token):
                    yield piece
                if text.found:
                    reply.finish_reason = "stop"
                    return
        if rest := text.flush():
            yield rest

    def _tokens(self, reply: _Reply) -> Generator[int, None, None]:
        with self.engine.turn:
            self.ids = reply.cached = list(self.ids)  # the reply before keeps the old list, and may still cut it
            self._reply = reply
        step = _Step(self._prefill(reply)[None], [])
        while len(reply.ids) < reply.limit:
            if reply.ids:
                with self._turn(reply):
                    next_step = self._next_step(reply)
                if next_step is None:
                    reply.finish_reason = "context"
                    return
                step = next_step
            if (yield from self._accept(reply, step)):
                reply.finish_reason = "stop"
                return
            if self.speculation and reply.stats.steps and not step.is_shared:
                with self._turn(reply):
                    self.speculation.record(len(step.drafts), step.n_accepted, step.propose_s, step.verify_s)
                    reply.stats.speed_up = self.speculation.speed_up
        reply.finish_reason = "length"

    @contextmanager
    def _turn(self, reply: _Reply | None) -> Iterator[None]:
        """The turn of a reply, if it is this session's still; or of none."""
        with self.engine.turn:
            if reply is not None and reply is not self._reply:
                raise LocalrunError("this reply has ended: another one of its session has begun")
            yield

    def _next_step(self, reply: _Reply) -> "_Step | None":
        """What comes of the reply's last token; None if there is no room for it."""
        if reply.taken:
            step, reply.taken = reply.taken, None
            return step
        self.forget(len(self.ids))
        room = self.engine.ctx - len(self.ids)
        return self._step(reply, int(min(reply.limit - len(reply.ids), room)) - 1) if room > 0 else None

    def _step(self, reply: _Reply, most_drafts: int) -> "_Step":
        """Evaluate the reply's last token and drafts behind it."""
        started, last, drafts = time.perf_counter(), reply.ids[-1], []
        if self.speculation:
            drafts = reply.sampler.possible(self.speculation.propose(self.ids, last, most_drafts))
        proposed = time.perf_counter()
        rows = self._evaluate([last, *drafts], all_logits=bool(drafts))
        verified = time.perf_counter()
        reply.stats.decode_s += verified - started
        reply.stats.steps += 1
        reply.stats.drafted_tokens += len(drafts)
        return _Step(rows, drafts, proposed - started, verified - proposed)

    def _accept(self, reply: _Reply, step: "_Step") -> Generator[int, None, bool]:
        """Yield a token for each row as long as the drafts come true; whether the reply is at its end.

        The ids that count afterwards are those of plain decoding, wherever this stops. It takes no turn to say so: a
        dropped iterator may be ended by the garbage collector, at any moment of any thread.
        """
        cached = len(reply.cached) - len(step.drafts)
        try:
            for row, draft in zip(step.rows, [*step.drafts, None], strict=True):
                started = time.perf_counter()
                token = reply.sampler(row)
                reply.stats.decode_s += time.perf_counter() - started
                if token in self.engine.tokenizer.eog_ids:
                    return True
                reply.ids.append(token)
                reply.stats.generated_tokens += 1
                if token != draft:
                    del reply.cached[cached + step.n_accepted :]
                    reply.awaits_step = True
                yield token
                if reply.sampler.is_complete:
                    return True
                if token != draft:
                    return False
                step.n_accepted += 1
        finally:
            reply.stats.accepted_tokens += step.n_accepted
            if not reply.awaits_step:  # else they are cut already, and what take_step() was told of may follow
                del reply.cached[cached + step.n_accepted :]
            reply.awaits_step = False
        return False

    def _prefill(self, reply: _Reply) -> np.ndarray:
        """Evaluate what the cache lacks of the prompt; the logits after the last, float32 (vocab)."""
        started, ids = time.perf_counter(), reply.prompt
        with self._turn(reply):
            self.forget(self.shared(ids))
            reply.stats.reused_tokens = len(self.ids)
        logits = self.advance(ids[reply.stats.reused_tokens :], reply.progress, reply)
        with self._turn(reply):
            self._cache.mark()  # where another reply, or the next turn without this one's reasoning, goes on from
            if self.speculation:
                self.speculation.start_reply(ids)
        reply.stats.prefill_s = time.perf_counter() - started
        return logits

    def advance(
        self,
        ids: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
        reply: _Reply | None = None,
    ) -> np.ndarray:
        """Evaluate at least one token after those that are cached; the logits after the last, float32 (vocab).

        Args:
            reply: whose prompt they are; an error ends this if another one has begun.
        """
        total = len(self.ids) + len(ids)
        for n_tokens in self.engine.model.chunks(len(ids)):
            with self._turn(reply):
                logits = self._evaluate(ids[:n_tokens])[-1]
            ids = ids[n_tokens:]
            if progress is not None:
                progress(total - len(ids), total)
        return logits

    def shared(self, ids: Sequence[int]) -> int:
        """How many of a prompt's first tokens a reply to it would not evaluate again: all but the last at most."""
        return min(n_common(self.ids, ids), len(ids) - 1)

    def copy(self, other: "Session", length: int) -> None:
        """Hold the first `length` tokens of another session of this engine, or none where forget() would keep none."""
        with self.engine.turn:
            self.forget(0)
            self._cache.copy(other._cache, length)
            self.ids = other.ids[: self._cache.length]

    def end_reply(self) -> None:
        """The last reply is over, and what it took besides the cache is let go: its prompt, logits, a constraint."""
        with self.engine.turn:
            self._reply = _no_reply()

    def forget(self, length: int) -> None:
        """Keep the first `length` tokens, or none where the model can't forget a part."""
        with self.engine.turn:
            self._cache.truncate(length)
            del self.ids[self._cache.length :]
            if self.speculation:
                self.speculation.draft.forget(len(self.ids))

    def _evaluate(self, ids: Sequence[int], all_logits: bool = False) -> np.ndarray:
        """Logits after each of ids, or after the last: float32 (T, vocab) or (1, vocab). The caller has the turn."""
        self.engine.file.check_unchanged()
        rows = self.engine.model.forward(list(ids), self._cache, all_logits=all_logits)
        self.ids += ids
        if self.speculation:
            self.speculation.draft.evaluated(len(self.ids) - len(ids), len(ids))
        return rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokens and cache to `path`, whole or not at all, for the user alone.

        Raises LocalrunError if it can't be written.
        """
        with self.engine.turn:
            self.forget(len(self.ids))
            saved.write(Path(path_text("path", path)), self.engine, self.ids, self._cache.save())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace this session by a saved one. Raises LocalrunError if it is no session of this model."""
        with self.engine.turn:
            place = Path(path_text("path", path))
            ids, tensors = saved.read(place, self.engine)
            try:
                self.restore(ids, tensors)
            except LocalrunError as error:
                raise type(error)(f"{place}: {error}") from None

    def restore(self, ids: list[int], tensors: dict[str, np.ndarray]) -> None:
        """Hold what another session of this model held: its ids, and what its cache's save() gave.

        Raises LocalrunError if they are something else, or too long; nothing is held then.
        """
        with self.engine.turn:
            self._reply, self.ids = replace(self._reply), []  # a reply that is at work has ended
            self.forget(0)
            try:
                if ids:
                    self.engine.check_ids(ids)
                self._cache.load(tensors, len(ids))
            except LocalrunError:
                self._cache.truncate(0)
                raise
            self.ids = ids


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _no_reply() -> _Reply:
    return _Reply([], Sampler(Sampling()), 0, None)


@dataclass
class _Step:
    """Logits, float32 (1 + drafts, vocab), the drafts that they judge, how many came true, and whose step it was."""

    rows: np.ndarray
    drafts: list[int]
    propose_s: float = 0.0
    verify_s: float = 0.0
    n_accepted: int = 0
    is_shared: bool = False
