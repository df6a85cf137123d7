"""From logits to the next token: settings and the sampler.

Order and defaults follow llama.cpp (common/common.h @3f545becc): repeat penalty, top-k, top-p, min-p, temperature. The
filters look at probabilities before temperature, as there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from localrun.arguments import number, refuse, whole
from localrun.errors import LocalrunError

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


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 always takes the most likely token.
        top_k: only the k most likely; 0 for all.
        top_p: only the most likely that together reach this probability; 1 for all.
        min_p: only those at least this fraction as likely as the most likely; 0 for all.
        repeat_penalty: weakens tokens seen among the last repeat_last_n; 1 for none.
        repeat_last_n: 0 for none, -1 for all.
        seed: None draws one.

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

    def __post_init__(self):
        for name, is_valid, expected in (
            ("temperature", lambda x: x >= 0, "0 or more"),
            ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("min_p", lambda x: 0 <= x <= 1, "between 0 and 1"),
            ("repeat_penalty", lambda x: x > 0, "above 0"),
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


class Sampler:
    """Draws tokens by one Sampling; remembers the tokens seen, for the penalty."""

    def __init__(self, sampling: Sampling, seen: Sequence[int] = ()):
        self.sampling = sampling
        self._seen = list(seen)
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token's id, from float32 (vocab). Raises LocalrunError if a logit is not a number."""
        if not np.isfinite(logits.max()):
            raise LocalrunError("the model's output is not a finite number: the file's weights are damaged")
        logits = self._penalised(logits.astype(np.float64))
        token = int(logits.argmax()) if self.sampling.temperature == 0 else self._draw(logits)
        self._seen.append(token)
        return token

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        s = self.sampling
        if s.repeat_penalty != 1 and s.repeat_last_n != 0:
            recent = self._seen if s.repeat_last_n < 0 else self._seen[-s.repeat_last_n :]
            ids = np.unique(np.array(recent, np.int64))
            values = logits[ids]
            with np.errstate(over="ignore"):
                penalised = np.where(values > 0, values / s.repeat_penalty, values * s.repeat_penalty)
            logits[ids] = penalised.clip(-_LARGEST, _LARGEST)
        return logits

    def _draw(self, logits: np.ndarray) -> int:
        s = self.sampling
        ids = np.argsort(-logits, kind="stable")[: s.top_k or None]
        probabilities = _softmax(logits[ids])
        if s.top_p < 1:  # the first whose sum reaches top_p is the last that stays
            n_kept = int(np.searchsorted(probabilities.cumsum(), s.top_p)) + 1
            ids, probabilities = ids[:n_kept], probabilities[:n_kept]
        ids = ids[probabilities >= s.min_p * probabilities[0]]
        with np.errstate(over="ignore"):  # next to no temperature: all but the best get -inf
            scaled = (logits[ids] - logits[ids[0]]) / s.temperature
        return int(self._random.choice(ids, p=_softmax(scaled)))


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()
