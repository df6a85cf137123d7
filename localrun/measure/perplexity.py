"""Perplexity of a text, by llama.cpp's procedure, so that the numbers can be compared.

The text's tokens, with the special ones the vocabulary adds, are cut into chunks of n_ctx; what is left over is not
used. Each chunk is read from an empty cache, its first token replaced by BOS if the vocabulary adds one. Predictions
count from position n_ctx // 2 on, so that each has at least that much context: n_ctx - n_ctx // 2 - 1 a chunk.

Source: tools/perplexity/perplexity.cpp of https://github.com/ggml-org/llama.cpp @3f545becc, perplexity().
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localrun.errors import LocalrunError

if TYPE_CHECKING:
    from localrun.engine import Engine

DEFAULT_CHUNK = 512  # tokens; llama-perplexity's
MIN_CHUNK = 4  # the least with a prediction in each half
_MAX_LOSS = 700.0  # nats; a loss beyond it is a fault, and its exp is more than a float64 holds
_ROWS = 32  # positions turned to float64 at a time: 33 MB of a 129,280-word vocabulary

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Perplexity:
    """ppl: exp of the mean negative log-probability; error: its standard error; running: ppl after each chunk."""

    ppl: float
    error: float
    running: list[float]
    n_ctx: int
    n_tokens: int
    n_counted: int


def perplexity(
    engine: Engine, ids: Sequence[int], n_ctx: int, n_chunks: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """The perplexity of ids, encoded with add_special, in chunks of n_ctx tokens, the first n_chunks of them or all.

    Args:
        progress: called as progress(done, total, ppl) after each chunk.

    Raises LocalrunError if there are fewer than 2 * n_ctx ids (llama.cpp's rule), or the logits make no sense.
    """
    chunks = text_chunks(engine, ids, n_ctx, n_chunks)
    first = n_ctx // 2
    losses = np.empty((len(chunks), n_ctx - first - 1))
    running: list[float] = []
    for index, chunk in enumerate(chunks):
        with np.errstate(invalid="ignore"):  # of infinite logits; reported below
            losses[index] = negative_log_probabilities(engine.logits(chunk)[first:-1], chunk[first + 1 :])
        if not (losses[index] < _MAX_LOSS).all():  # nor NaN
            raise LocalrunError(f"chunk {index + 1} of {len(chunks)}: the model gives logits that make no sense")
        running.append(math.exp(losses[: index + 1].mean()))
        if progress is not None:
            progress(index + 1, len(chunks), running[-1])
    ppl, n_counted = running[-1], losses.size
    error = math.sqrt(losses.var() / (n_counted - 1)) * ppl if n_counted > 1 else 0.0
    return Perplexity(ppl, error, running, n_ctx, len(chunks) * n_ctx, n_counted)


def text_chunks(engine: Engine, ids: Sequence[int], n_ctx: int, n_chunks: int | None) -> list[list[int]]:
    """The ids in chunks of n_ctx, each to be read from an empty cache. Raises LocalrunError, as perplexity does."""
    if n_ctx < MIN_CHUNK:
        raise LocalrunError(f"chunks of {n_ctx} tokens; expected {MIN_CHUNK} or more")
    if n_chunks is not None and n_chunks < 1:
        raise LocalrunError(f"{n_chunks} chunks; expected 1 or more")
    if len(ids) < 2 * n_ctx:
        raise LocalrunError(
            f"the text has {len(ids)} tokens; chunks of {n_ctx} need at least {2 * n_ctx}: -c sets them"
        )
    count = min(len(ids) // n_ctx, n_chunks or len(ids))
    chunks = [list(ids[index * n_ctx : (index + 1) * n_ctx]) for index in range(count)]
    if engine.tokenizer.add_bos:
        for chunk in chunks:
            chunk[0] = engine.tokenizer.bos_id
    return chunks


def negative_log_probabilities(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """float64 (T): -log softmax(logits)[target] of each row of logits (T, vocab) with its target."""
    losses = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        chosen = rows[np.arange(len(rows)), targets[start : start + _ROWS]]
        losses[start : start + _ROWS] = np.log(np.exp(rows).sum(axis=1)) - chosen
    return losses
