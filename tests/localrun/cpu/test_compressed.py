"""DeepSeek-V4's decode step over whole models: against the network in torch, and together against alone.

Tolerances on logits are fractions of their range.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tiny_deepseek4 as tiny
from closeness import QUANTIZED_TOLERANCE, error

import localrun
from localrun.engine import Engine
from localrun.network.cache import Cache

N_TOKENS = 220  # windows of 128 end, and more pooled rows than are chosen
IDS = tiny.token_ids(N_TOKENS)
# Where a row's value lies in the middle of two 16-bit ones the two ways may round it apart, by 2^-11 of it.
TOLERANCE = 1e-4
# Of one token's both ways; windows begin and end around these.
POSITIONS = [0, 1, 3, 4, 7, 8, 15, 16, 17, 34, 35, 36, 63, 126, 127, 128, 131, 132, 199, 215]


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["F32", "published"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Of all kinds of layers, in F32 and in llama.cpp's types."""
    path = tiny.shared(as_published=request.param)
    with localrun.load(path, device="cpu", threads=2, ctx=N_TOKENS + 8, speculative="off") as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine: Engine) -> np.ndarray:
    """float32 (N_TOKENS, vocab): each token in a step of its own."""
    cache = engine.new_cache()
    return np.concatenate([engine.model.forward([token], cache) for token in IDS])


def steps(engine: Engine, cache: Cache, n_tokens: int) -> None:
    """The first n_tokens, eight a step."""
    for first in range(0, n_tokens, 8):
        engine.model.forward(IDS[first : min(first + 8, n_tokens)], cache)


def test_the_step_is_the_network(engine: Engine, alone: np.ndarray) -> None:
    """Over the rows that steps have left, in float32 as steps."""
    cache, other = engine.new_cache(), engine.new_cache()
    is_rounded = engine.model._tensors.matrix("blk.0.attn_q_a.weight").format.integer
    for position in POSITIONS:
        while cache.length < position:
            engine.model.forward([IDS[cache.length]], cache)
        other.copy(cache, position)
        other.is_exact = True
        _, logits = engine.model.network.forward([IDS[position]], other)
        other.is_exact = False
        assert error(alone[position : position + 1], logits) < (QUANTIZED_TOLERANCE if is_rounded else TOLERANCE)


def test_tokens_together_are_tokens_alone(engine: Engine, alone: np.ndarray) -> None:
    """To the bit, with drafts that are taken back between."""
    cache, found, sizes = engine.new_cache(), [], [8, 1, 5, 3, 2, 7]
    while cache.length < N_TOKENS:
        some = IDS[cache.length : cache.length + sizes[len(found) % 6]]
        found.append(engine.model.forward(some, cache, all_logits=True))
        length = cache.length
        if length + 7 < N_TOKENS:
            engine.model.forward([7] * (length % 7 + 1), cache)
            cache.truncate(length)
            assert cache.length == length
    assert np.array_equal(np.concatenate(found), alone)


def test_contexts_together_are_contexts_alone(engine: Engine, alone: np.ndarray) -> None:
    lengths = [0, 3, 126, 190]
    caches = [engine.new_cache() for _ in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        steps(engine, cache, length)
    for i in range(6):
        found = engine.model.forward_each([IDS[length + i] for length in lengths], caches)
        assert np.array_equal(found, alone[[length + i for length in lengths]])
