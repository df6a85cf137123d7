"""Caches of 8 bits on the CPU: rows in and out, rings, sessions, and the step against the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_deepseek4
import tiny_models
from cases import slow_but
from closeness import QUANTIZED_TOLERANCE, error

import localrun
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.generate.sampling import Sampling
from localrun.models.rows import Rows
from localrun.network.cache import Cache

GREEDY = Sampling(temperature=0.0)
# Rows of 8 bits that differ by a step now and then, where float32 sums differ by 1e-7: one of 127 steps of one value.
ROUNDING_TOLERANCE = 2e-3
# Queries of 8 bits in a step: 1% of a score's deviation, some of it in the logits.
BYTE_TOLERANCE = 0.05
VARIANTS = ["v3", "llama", "wide", "gpt-oss", "deepseek32", "glm4moe", "v3-legacy-kv-b", "qwen3moe"]


def load(variant: str, bits: int = 8, **options: object) -> Engine:
    path = tiny_models.shared(variant, type=tiny_models.Q4_K_M) if variant == "wide" else tiny_models.shared(variant)
    return localrun.load(path, threads=2, ctx=96, device="cpu", cache_bits=bits, **options)


def raw(cache: Cache) -> list[np.ndarray]:
    """The memory of all rows in use."""
    return [block.rows[: min(len(block.rows), cache.length)].copy() for block in cache._blocks]


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 8])
def test_a_saved_cache_is_the_same_bytes(window: int) -> None:
    """Of a ring as well, after it has gone round; and what is not of 8 bits is as it was."""
    import torch

    kinds = [[Rows(48, group=32, window=window, spare=4), Rows(16, window=window, spare=4)]] * 2
    cache, other = (Cache(kinds, 40, np.float16, 8) for _ in range(2))
    random, seen = torch.Generator().manual_seed(0), []
    for count in (5, 1, 9, 3, 1, 1):
        for layer in range(2):
            seen.append(cache.append(layer, *(torch.randn(count, width, generator=random) for width in (48, 16))))
        cache.advance(count)
    assert {rows.dtype for each in seen for rows in each} == {torch.float16}
    other.load(cache.save(), cache.length)
    assert cache._blocks[0].rows.shape[1] == 32 + 4 + 2 * 16 and cache._blocks[1].rows.dtype == np.float16
    saved = cache.save()
    assert all(np.array_equal(rows, other.save()[name]) for name, rows in saved.items())
    if not window:
        assert all(np.array_equal(a, b) for a, b in zip(raw(cache), raw(other), strict=True))
        assert np.array_equal(seen[-1][0].numpy(), saved["1.0"])
        cache.truncate(7)
        assert np.array_equal(cache.save()["0.0"], saved["0.0"][:7])
    copy = Cache(kinds, 40, np.float16, 8)
    copy.copy(other, other.length)
    assert all(np.array_equal(rows, copy.save()[name]) for name, rows in saved.items())


def test_a_cache_takes_half_of_the_memory() -> None:
    for variant in ("v3", "llama"):
        with load(variant) as model:
            c = model.config
            latent, heads = c.kv_lora_rank + 4 + 2 * c.qk_rope_head_dim, c.num_key_value_heads
            expected = latent if c.attention == "mla" else heads * (c.head_dim + c.v_head_dim + 8)
            assert model.describe()["kv_bytes_per_token"] == c.num_hidden_layers * expected == c.kv_token_bytes(8)
            cache = model.new_cache()
            assert sum(block.rows.nbytes for block in cache._blocks) == 96 * c.kv_token_bytes(8)


# ---- the step and the network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", slow_but(VARIANTS, {"v3", "llama", "wide", "gpt-oss"}))
def test_the_step_is_the_network_over_the_same_rows(variant: str) -> None:
    """Each token by the step, then by torch over the rows that it left."""
    with load(variant) as model:
        ids, cache, pairs = tiny_models.prompt(variant)[:40], model.new_cache(), []
        for token in ids:
            by_step = model.model.forward([token], cache)[0]
            left = {name: rows.copy() for name, rows in cache.save().items()}
            cache.truncate(cache.length - 1)
            by_torch = model.model._by_network([token], cache, False)[0]
            for name, rows in cache.save().items():  # a row of torch's own: a step off at most, of 113 or more
                assert np.abs(rows.astype(np.float32) - left[name]).max() <= np.abs(left[name][-1]).max() / 50
            pairs.append((by_step, by_torch))
    tolerance = BYTE_TOLERANCE if variant == "wide" else ROUNDING_TOLERANCE
    steps, networks = map(np.stack, zip(*pairs, strict=True))
    assert np.median([error(*pair) for pair in pairs]) < tolerance
    assert error(steps, networks) < max(tolerance, QUANTIZED_TOLERANCE)  # a choice of experts may tip


@pytest.mark.parametrize("variant", ["v3", "llama"])
def test_eight_bits_move_logits_a_little(variant: str) -> None:
    """More than sixteen do, and less than rows that are lost."""
    errors = []
    for bits in (16, 8):
        with load(variant, bits) as model:
            ids = tiny_models.prompt(variant)[:40]
            exact = model.logits(ids)
            cache = model.new_cache()
            rows = [model.model.forward([token], cache)[0] for token in ids]
            errors.append(np.median([error(*pair) for pair in zip(rows, exact, strict=True)]))
    assert 5 * errors[0] < errors[1] < 0.05


@pytest.mark.parametrize("variant", slow_but(VARIANTS, {"llama", "wide", "gpt-oss"}))
def test_tokens_together_are_tokens_alone(variant: str) -> None:
    """Drafts of one context and tokens of several: logits and rows to the bit."""
    with load(variant) as model:
        ids = tiny_models.token_ids(variant, 30)
        alone, together = model.new_cache(), model.new_cache()
        expected = [model.model.forward([token], alone)[0] for token in ids]
        rows = model.model.forward(ids[:5], together, all_logits=True)
        rows = np.concatenate([rows, model.model.forward(ids[5:13], together, all_logits=True)])
        assert np.array_equal(rows, np.stack(expected[:13]))
        short = model.new_cache()
        model.model.forward(ids[:3], short)
        both = model.model.forward_each([ids[13], ids[3]], [together, short])
        assert np.array_equal(both[0], expected[13]) and np.array_equal(both[1], expected[3])
        together.truncate(9)
        assert np.array_equal(model.model.forward([ids[9]], together)[0], expected[9])


# ---- sessions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["v3-nextn", "llama", "wide"])
def test_sessions(variant: str, tmp_path: Path) -> None:
    """Drafts change no reply; a saved session goes on as it would have; one of 16 bits can be gone on from."""
    ids = tiny_models.token_ids(variant, 20)
    with load(variant) as model:
        session = model.session("off")
        reply = list(session.tokens(ids, GREEDY, max_tokens=12))
        assert list(model.session(3).tokens(ids, GREEDY, max_tokens=12)) == reply
        session.save(tmp_path / "saved")
        more = [*ids, *reply, 3, 1]
        expected = list(session.tokens(more, GREEDY, max_tokens=6))
        loaded = model.session("off")
        loaded.load(tmp_path / "saved")
        assert list(loaded.tokens(more, GREEDY, max_tokens=6)) == expected and loaded.stats.reused_tokens == 31
    with load(variant, 16) as other:
        session = other.session("off")
        list(session.tokens(ids, GREEDY, max_tokens=4))
        saved, length = session.cache.save(), session.cache.length
    with load(variant) as model:
        cache = model.new_cache()
        cache.load(saved, length)
        for name, rows in cache.save().items():
            assert np.abs(rows.astype(np.float32) - saved[name]).max() <= np.abs(saved[name]).max() / 100


def test_pooled_rows_keep_sixteen() -> None:
    with pytest.raises(LocalrunError, match="--cache-bits 8: pooled rows and windows of DeepSeek-V4 keep 16; leave it"):
        localrun.load(tiny_deepseek4.shared(), ctx=64, device="cpu", cache_bits=8)


def test_heads_of_odd_widths_keep_sixteen() -> None:
    with pytest.raises(LocalrunError, match="--cache-bits 8: its heads' values are no multiple of 16; leave it out"):
        load("minimax-m2")
