"""Several contexts that share a device's steps: each gets what it gets alone."""

from __future__ import annotations

import numpy as np
import pytest
from cases import slow_but
from gpu_models import (
    MODELS,
    ids_of,
    opened,
)

from localrun.errors import ContextFullError
from localrun.gpu.hybrid import HybridModel

LENGTHS = [3, 9, 0, 17]


def check_together(model: HybridModel, name: str, n_contexts: int, n_steps: int) -> None:
    """Bits of logits, hidden states and rows, whoever the neighbours are and how long; one after the other ends."""
    lengths, model.keep_hidden = LENGTHS[:n_contexts], True
    texts = [ids_of(40, name)[i:][: n + n_steps] for i, n in enumerate(lengths)]
    alone, caches = [], []
    for n, text in zip(lengths, texts, strict=True):
        for found in (alone, caches):
            cache = model.new_cache(n + n_steps + len(caches))  # of other sizes, too
            if n:
                model.forward(text[:n], cache)
            found.append(cache)
    rows = [[(model.forward([token], cache), model.hidden) for token in text[n:]]
            for n, text, cache in zip(lengths, texts, alone, strict=True)]  # fmt: skip
    for step in [0, *range(n_steps)]:  # one is taken back
        here = [i for i in range(n_contexts) if i + step < n_contexts + n_steps - 2]
        for i in here:
            caches[i].truncate(lengths[i] + step)
        found = model.forward_each([texts[i][lengths[i] + step] for i in here], [caches[i] for i in here])
        for i, logits, hidden in zip(here, found, model.hidden, strict=True):
            assert np.array_equal(logits, rows[i][step][0][0]) and np.array_equal(hidden, rows[i][step][1][0])
            assert caches[i].length == lengths[i] + step + 1
    assert all(np.array_equal(a, b) for a, b in zip(*(c.save().values() for c in (caches[0], alone[0])), strict=True))


@pytest.mark.slow
def test_contexts_together_are_contexts_alone_by_every_kernel() -> None:
    with opened(in_vram={1: (2, 5)}) as (model, _):
        check_together(model, "V3", 2, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("dense")
def test_contexts_together_are_contexts_alone_by_grouped_attention() -> None:
    with opened(MODELS["GLM-4.5"]) as (model, _):
        check_together(model, "GLM-4.5", 2, 2)


@pytest.mark.parametrize(
    "name",
    slow_but(["V3", "V2-Lite", "GLM-4.5", "MiniMax-M2", "gpt-oss", "V3.2", "GLM-5.2"], {"V3"}),
)
def test_contexts_together_are_contexts_alone(name: str, in_torch: None, narrow: None) -> None:
    with opened(MODELS[name]) as (model, _):
        check_together(model, name, 4, 4)


@pytest.mark.usefixtures("in_torch")
def test_a_full_neighbour_leaves_all_as_they_are() -> None:
    ids = ids_of(4)
    with opened() as (model, _):
        caches = [model.new_cache(4), model.new_cache(3)]
        for cache in caches:
            model.forward(ids[:3], cache)
        with pytest.raises(ContextFullError, match="4 tokens, room for 3"):
            model.forward_each([4, 4], caches)
        assert [cache.length for cache in caches] == [3, 3]
        assert np.array_equal(model.forward([4], caches[0]), model.forward([*ids[:3], 4], model.new_cache(4)))
