"""From logits to the next token: settings and the sampler.

Order and defaults follow llama.cpp (common/common.h @3f545becc): bias, penalties, top-k, top-p, min-p, temperature. The
filters look at probabilities before temperature, as there. A constraint takes tokens out before the filters, so that
what is left is drawn as if there were nothing else.

Penalties are llama.cpp's (src/llama-sampler.cpp, llama_sampler_penalties_apply): a logit is divided by repeat_penalty,
or multiplied where it is not positive; then frequency_penalty is taken off for each time that the token was seen, and
presence_penalty once, which is OpenAI's formula. Seen are, as in llama.cpp, the last repeat_last_n tokens of prompt and
reply; OpenAI counts those of the reply alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from localrun.arguments import number, refuse, whole
from localrun.errors import LocalrunError
from localrun.generate.constraint import Constraint, Guide

# The file's recommendations (general.sampling.*) and the settings they stand for.
_RECOMMENDED = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
}
_LARGEST = 1e300  # of a logit after the penalty, so that differences are finite
_LARGEST_BIAS, _LARGEST_PENALTY = 100.0, 2.0  # as the OpenAI API has them
MOST_TOP_LOGPROBS = 20
_LEAST_LOGPROB = -9999.0  # OpenAI's for what is out of the question; JSON has no infinity


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 always takes the most likely token.
        top_k: only the k most likely; 0 for all.
        top_p: only the most likely that together reach this probability; 1 for all.
        min_p: only those at least this fraction as likely as the most likely; 0 for all.
        repeat_penalty: weakens tokens seen among the last repeat_last_n; 1 for none.
        repeat_last_n: 0 for none, -1 for all; for all three penalties.
        seed: None draws one.
        presence_penalty: what a token's logit loses if it was seen, -2 to 2.
        frequency_penalty: what it loses for each time that it was seen, -2 to 2.
        logit_bias: what is added to a token's logit, -100 to 100, by its id.
        constraint: what the reply has to be, a JSON document of a schema say; None for any text.
        top_logprobs: 0 to 20: the log-probabilities of the chosen tokens are kept (Session.reply_logprobs), and those
            of as many of the likeliest; None for none. They are the model's own, before everything above.

    Raises:
        LocalrunError: a value outside its range, or of another type.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = field(default=None)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    constraint: Constraint | None = None
    top_logprobs: int | None = None

    def __post_init__(self):
        for name, is_valid, expected in (
            ("temperature", lambda x: x >= 0, "0 or more"),
            ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("min_p", lambda x: 0 <= x <= 1, "between 0 and 1"),
            ("repeat_penalty", lambda x: x > 0, "above 0"),
            ("presence_penalty", lambda x: abs(x) <= _LARGEST_PENALTY, "-2 to 2"),
            ("frequency_penalty", lambda x: abs(x) <= _LARGEST_PENALTY, "-2 to 2"),
        ):
            value = number(name, getattr(self, name), expected)
            if not is_valid(value):
                refuse(name, value, expected)
            object.__setattr__(self, name, value)
        for name, low, expected in (
            ("top_k", 0, "0 (all) or more"),
            ("repeat_last_n", -1, "-1 (all), 0 (none) or more"),
            ("seed", 0, "0 or more"),
        ):
            if name != "seed" or self.seed is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name), expected, low=low))
        if self.top_logprobs is not None:
            expected = f"0 to {MOST_TOP_LOGPROBS}, or None"
            count = whole("top_logprobs", self.top_logprobs, expected, low=0, high=MOST_TOP_LOGPROBS)
            object.__setattr__(self, "top_logprobs", count)
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            refuse("constraint", self.constraint, "a localrun.Constraint, or None")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @classmethod
    def recommended(cls, metadata: Mapping[str, Any], notice: Callable[[str], None] = lambda _: None) -> "Sampling":
        """The defaults, with what the file recommends in general.sampling.* in their place.

        A recommendation out of its range is left out; `notice` is called with a line on it.
        """
        settings = cls()
        for key, name in _RECOMMENDED.items():
            value = metadata.get(f"general.sampling.{key}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            value = 0 if name == "top_k" and value < 0 else value  # llama.cpp reads -1 as all, too
            try:
                kind = type(getattr(settings, name)) if math.isfinite(value) else float
                settings = replace(settings, **{name: kind(value)})
            except LocalrunError as error:
                notice(f"key 'general.sampling.{key}' is not followed: {error}")
        return settings


def _biases(given: Any) -> dict[int, float]:
    """logit_bias, checked."""
    if not isinstance(given, Mapping):
        refuse("logit_bias", given, "a mapping of token ids to numbers")
    biases = {}
    for token, bias in given.items():
        id = whole("a token of logit_bias", token, "a token id, 0 or more", low=0)
        biases[id] = number(f"logit_bias[{id}]", bias, "-100 to 100")
        if abs(biases[id]) > _LARGEST_BIAS:
            refuse(f"logit_bias[{id}]", bias, "-100 to 100")
    return biases


@dataclass(frozen=True)
class Logprobs:
    """A token with its natural log-probability, and the likeliest ones in its place, likeliest first."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


class Sampler:
    """Draws tokens by one Sampling; remembers the tokens seen, for the penalties.

    Whoever verifies drafts asks it for one token after the other, as plain decoding does: its memory and its guide are
    then where they would be without drafts.

    Args:
        seen: the prompt.
        guide: what keeps the reply to the constraint.

    Attributes:
        logprobs: of the tokens drawn, if they were asked for.
    """

    def __init__(self, sampling: Sampling, seen: Sequence[int] = (), guide: Guide | None = None):
        self.sampling, self.logprobs = sampling, list[Logprobs]()
        self._seen, self._guide = list(seen), guide
        self._random = np.random.default_rng(sampling.seed)

    @property
    def is_complete(self) -> bool:
        """The constraint allows no more text."""
        return self._guide is not None and self._guide.is_complete

    def possible(self, drafts: list[int]) -> list[int]:
        """The first ones of drafts that the constraint allows: the others need no verifying."""
        return drafts if self._guide is None else self._guide.possible(drafts)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token's id, from float32 (vocab).

        Raises LocalrunError if a logit is not a number, or the constraint has become too costly to follow.
        """
        if not np.isfinite(logits.max()):
            raise LocalrunError("the model's output is not a finite number: the file's weights are damaged")
        adjusted = self._adjusted(logits.astype(np.float64))
        if self._guide:
            self._guide.restrict(adjusted)
        token = int(adjusted.argmax()) if self.sampling.temperature == 0 else self._draw(adjusted)
        if self._guide:
            self._guide.accept(token)
        if self.sampling.top_logprobs is not None:
            self.logprobs.append(_logprobs(logits, token, self.sampling.top_logprobs))
        self._seen.append(token)
        return token

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """Bias, then penalties, in place."""
        s = self.sampling
        for token, bias in s.logit_bias.items():
            logits[token] += bias
        if s.repeat_last_n != 0 and (s.repeat_penalty, s.presence_penalty, s.frequency_penalty) != (1, 0, 0):
            recent = self._seen if s.repeat_last_n < 0 else self._seen[-s.repeat_last_n :]
            ids, counts = np.unique(np.array(recent, np.int64), return_counts=True)
            values = logits[ids]
            with np.errstate(over="ignore"):
                values = np.where(values > 0, values / s.repeat_penalty, values * s.repeat_penalty)
            values -= counts * s.frequency_penalty + s.presence_penalty
            logits[ids] = values.clip(-_LARGEST, _LARGEST)
        return logits

    def _draw(self, logits: np.ndarray) -> int:
        s = self.sampling
        ids = _likeliest(logits, s.top_k or len(logits))
        probabilities = _softmax(logits[ids])
        if s.top_p < 1:  # the first whose sum reaches top_p is the last that stays
            n_kept = int(np.searchsorted(probabilities.cumsum(), s.top_p)) + 1
            ids, probabilities = ids[:n_kept], probabilities[:n_kept]
        ids = ids[probabilities >= s.min_p * probabilities[0]]
        with np.errstate(over="ignore"):  # next to no temperature: all but the best get -inf
            scaled = (logits[ids] - logits[ids[0]]) / s.temperature
        return int(self._random.choice(ids, p=_softmax(scaled)))


def _likeliest(logits: np.ndarray, n: int) -> np.ndarray:
    """The ids of the n largest, largest first; of equal ones the lower id."""
    if n >= len(logits):
        return np.argsort(-logits, kind="stable")
    least = np.partition(logits, -n)[-n]  # a sort of all takes ten times as long
    ids = np.flatnonzero(logits >= least)
    return ids[np.argsort(-logits[ids], kind="stable")[:n]]


def _logprobs(logits: np.ndarray, token: int, n_top: int) -> Logprobs:
    values = logits.astype(np.float64)
    values -= values.max()
    values = np.maximum(values - np.log(np.exp(values).sum()), _LEAST_LOGPROB)
    top = _likeliest(values, n_top) if n_top else np.array([], np.int64)
    return Logprobs(token, float(values[token]), list(zip(top.tolist(), values[top].tolist(), strict=True)))


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()
