"""A conversation's state: the tokens in the cache, and replies that reuse what they share with the next prompt."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localrun.errors import ContextFullError, LocalrunError
from localrun.generate.sampling import Sampler, Sampling
from localrun.generate.speculative import Speculation
from localrun.runtime import Runner


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


class Session:
    """One cache and the tokens in it.

    Attributes:
        ids: the tokens whose keys and values are cached.
        reply_ids: what the last reply generated.
        stats: what it took.
        finish_reason: why it ended: "stop" (end token or stop string), "length", "context"; None if it was closed.
        speculation: what drafts tokens to be verified together; None for one token a step.
    """

    def __init__(self, engine: Runner, speculation: Speculation | None = None):
        self.engine, self.speculation = engine, speculation
        self.ids: list[int] = []
        self.reply_ids: list[int] = []
        self.stats = Stats()
        self.finish_reason: str | None = None
        self._cache = engine.new_cache()

    def reply(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[str]:
        """The text that follows the prompt `ids`, in pieces of whole characters; stop strings are not part of it.

        A stop string may spell control tokens, which are no part of the text either. Closing the iterator early keeps
        what was evaluated. progress(done, total) counts prompt tokens.

        Raises:
            ContextFullError: the prompt does not fit.
            LocalrunError: no prompt, or an id that the vocabulary lacks.
        """
        decoder = self.engine.tokenizer.stream_decoder()
        stops, marks = _with_marks(stop, self.engine.tokenizer.controls if stop else {})
        text, hidden = StopStrings(stops), dict.fromkeys(map(ord, marks.values()))
        for token in self.tokens(ids, sampling, max_tokens=max_tokens, progress=progress):
            if piece := text.push(decoder.push(token) + marks.get(token, "")).translate(hidden):
                yield piece
            if text.found:
                self.finish_reason = "stop"
                return
        if rest := (text.push(decoder.flush()) + text.flush()).translate(hidden):
            yield rest

    def tokens(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[int]:
        """Like reply, in token ids; an end token ends it and is not yielded."""
        ids = [int(token) for token in ids]
        self.stats, self.finish_reason, self.reply_ids = Stats(prompt_tokens=len(ids)), None, []
        sample = Sampler(sampling or Sampling(), ids)
        step = _Step(self._prefill(ids, progress)[None], [])
        limit = float("inf") if max_tokens is None else max_tokens
        while len(self.reply_ids) < limit:
            if self.reply_ids:
                room = self.engine.ctx - self._cache.length
                if room <= 0:
                    self.finish_reason = "context"
                    return
                step = self._step(int(min(limit - len(self.reply_ids), room)) - 1)
            if (yield from self._accept(step, sample)):
                self.finish_reason = "stop"
                return
            if self.speculation and self.stats.steps:
                self.speculation.record(len(step.drafts), step.n_accepted, step.propose_s, step.verify_s)
                self.stats.speed_up = self.speculation.speed_up
        self.finish_reason = "length"

    def _step(self, most_drafts: int) -> "_Step":
        """Evaluate the reply's last token and drafts behind it."""
        started, last, drafts = time.perf_counter(), self.reply_ids[-1], []
        if self.speculation:
            drafts = self.speculation.propose(self.ids, last, most_drafts)
        proposed = time.perf_counter()
        rows = self._evaluate([last, *drafts], all_logits=bool(drafts))
        verified = time.perf_counter()
        self.stats.decode_s += verified - started
        self.stats.steps += 1
        self.stats.drafted_tokens += len(drafts)
        return _Step(rows, drafts, proposed - started, verified - proposed)

    def _accept(self, step: "_Step", sample: Sampler) -> Generator[int, None, bool]:
        """Yield a token for each row as long as the drafts come true; whether the reply is at its end.

        What is cached afterwards is what plain decoding would have cached, wherever this stops.
        """
        cached = len(self.ids) - len(step.drafts)
        try:
            for row, draft in zip(step.rows, [*step.drafts, None], strict=True):
                started = time.perf_counter()
                token = sample(row)
                self.stats.decode_s += time.perf_counter() - started
                if token in self.engine.tokenizer.eog_ids:
                    return True
                self.reply_ids.append(token)
                self.stats.generated_tokens += 1
                yield token
                if token != draft:
                    return False
                step.n_accepted += 1
        finally:
            self.stats.accepted_tokens += step.n_accepted
            self.forget(cached + step.n_accepted)
        return False

    def _prefill(self, ids: list[int], progress: Callable[[int, int], None] | None) -> np.ndarray:
        """Evaluate what the cache lacks of ids; the logits after the last, float32 (vocab)."""
        self.engine.check_ids(ids)
        if len(ids) > self.engine.ctx:
            raise ContextFullError(
                f"the prompt has {len(ids)} tokens; the context holds {self.engine.ctx}: shorten it, or raise -c/--ctx"
            )
        started = time.perf_counter()
        self.forget(min(_common_prefix(self.ids, ids), len(ids) - 1))
        self.stats.reused_tokens = len(self.ids)
        logits = self.advance(ids[len(self.ids) :], progress)
        if self.speculation:
            self.speculation.start_reply(ids)
        self.stats.prefill_s = time.perf_counter() - started
        return logits

    def advance(self, ids: Sequence[int], progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Evaluate at least one token after those that are cached; the logits after the last, float32 (vocab)."""
        total = len(self.ids) + len(ids)
        for n_tokens in self.engine.model.chunks(len(ids)):
            logits = self._evaluate(ids[:n_tokens])[-1]
            ids = ids[n_tokens:]
            if progress is not None:
                progress(len(self.ids), total)
        return logits

    def forget(self, length: int) -> None:
        """Keep the first `length` tokens, or none where the model can't forget a part."""
        self._cache.truncate(length)
        del self.ids[self._cache.length :]
        if self.speculation:
            self.speculation.draft.forget(len(self.ids))

    def _evaluate(self, ids: Sequence[int], all_logits: bool = False) -> np.ndarray:
        """Logits after each of ids, or after the last: float32 (T, vocab) or (1, vocab)."""
        rows = self.engine.model.forward(list(ids), self._cache, all_logits=all_logits)
        self.ids += ids
        if self.speculation:
            self.speculation.draft.evaluated(len(self.ids) - len(ids), len(ids))
        return rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokens and cache to `path`, whole or not at all. Raises LocalrunError if it can't be written."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        metadata = {"localrun.ids": json.dumps(self.ids), "localrun.model": fingerprint(self.engine)}
        try:
            save_file(self._cache.save(), temporary, metadata)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:  # a full disk, a missing folder
            temporary.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or error  # the system's words alone: its line names the temporary
            raise LocalrunError(f"{path}: cannot save the session: {reason}") from None

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace this session by a saved one. Raises LocalrunError if it is no session of this model."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), "np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except FileNotFoundError:
            raise LocalrunError(f"{path}: no such file") from None
        except (OSError, SafetensorError) as error:
            raise LocalrunError(f"{path}: not a saved session: {error}") from None
        if metadata.get("localrun.model") != fingerprint(self.engine):
            raise LocalrunError(f"{path}: the session belongs to another model")
        ids = _read_ids(metadata.get("localrun.ids", ""))
        if ids is None:
            raise LocalrunError(f"{path}: not a saved session: its token ids are damaged")
        self.forget(0)
        try:
            if ids:
                self.engine.check_ids(ids)
            self._cache.load(tensors, len(ids))
        except LocalrunError as error:
            self._cache.truncate(0)
            raise type(error)(f"{path}: {error}") from None
        self.ids = ids


@dataclass
class _Step:
    """Logits, float32 (1 + drafts, vocab), the drafts that they judge, and how many came true."""

    rows: np.ndarray
    drafts: list[int]
    propose_s: float = 0.0
    verify_s: float = 0.0
    n_accepted: int = 0


def _read_ids(text: str) -> list[int] | None:
    """The list of whole numbers that `text` holds in JSON; None if it holds anything else."""
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return ids if isinstance(ids, list) and all(type(token) is int for token in ids) else None


def fingerprint(engine: Runner) -> str:
    """A name for the model and backend that a saved cache is good for: a hash over all tensors' first bytes."""
    digest = hashlib.sha256(engine.backend.encode())
    for tensor in engine.file.mapped.values():
        digest.update(f"{tensor.name} {tensor.shape} {tensor.type.name}".encode())
        digest.update(tensor.data[:64].tobytes())
    return digest.hexdigest()


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _with_marks(stops: Sequence[str], controls: dict[str, int]) -> tuple[list[str], dict[int, str]]:
    """The stop strings, also with a mark in place of each control token that they spell; and the marks by token id.

    A mark is half of a character, which decoded text never holds.
    """
    marked, marks = list(stops), {}
    for text in sorted(controls, key=len, reverse=True):
        if any(text in stop for stop in marked):
            mark = marks[controls[text]] = chr(0xD800 + len(marks))
            marked = [stop.replace(text, mark) for stop in marked]
    return [*stops, *marked], marks


class StopStrings:
    """Passes text on until one of the stop strings comes, holding back what could be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        self._held += text
        # The one that ends first wins, so that it does not matter in what pieces the text comes.
        found = [
            (self._held.find(stop) + len(stop), self._held.find(stop)) for stop in self._stops if stop in self._held
        ]
        if found:
            self.found = True
            return self._held[: min(found)[1]]
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        passed = self._held[: len(self._held) - keep]
        self._held = self._held[len(passed) :]
        return passed

    def flush(self) -> str:
        """What is held back: no stop string came of it."""
        held, self._held = self._held, ""
        return "" if self.found else held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
