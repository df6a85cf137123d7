"""The cache: rows in, rows out, what does not fit, and what it takes a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny_models
import torch
from caches import kinds

import localrun
from localrun.errors import ContextFullError, LocalrunError
from localrun.models.rows import Rows
from localrun.network.cache import Cache


def rows(first: int, count: int, width: int) -> torch.Tensor:
    """Row i holds first + i everywhere: exact in 16 bits up to 2048."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].repeat(1, width)


@pytest.fixture
def cache() -> Cache:
    return Cache([kinds(3, 5)] * 2, capacity=8, dtype=np.float16)


def fill(cache: Cache, first: int, count: int) -> None:
    for layer in range(2):
        cache.append(layer, rows(first, count, 3), 100 + rows(first, count, 5))
    cache.advance(count)


def test_rows_accumulate_in_order(cache: Cache) -> None:
    fill(cache, 0, 2)
    fill(cache, 2, 1)
    assert cache.length == 3
    keys, values = cache.append(1, rows(3, 4, 3), 100 + rows(3, 4, 5))
    assert (keys.shape, values.shape, keys.dtype) == ((7, 3), (7, 5), torch.float16)
    assert keys.tolist() == rows(0, 7, 3).tolist()
    assert values.tolist() == (100 + rows(0, 7, 5)).tolist()
    assert cache.length == 3  # until all layers have theirs


def test_an_append_without_advance_is_written_over(cache: Cache) -> None:
    fill(cache, 0, 2)
    cache.append(0, rows(50, 3, 3), rows(50, 3, 5))
    keys, _ = cache.append(0, rows(7, 1, 3), rows(7, 1, 5))
    assert keys[:, 0].tolist() == [0, 1, 7]


def test_full(cache: Cache) -> None:
    fill(cache, 0, 8)
    with pytest.raises(ContextFullError, match="the context is full: 9 tokens, room for 8; see -c/--ctx"):
        cache.append(0, rows(8, 1, 3), rows(8, 1, 5))
    assert cache.length == 8
    assert cache.save()["1.1"][:, 0].tolist() == list(range(100, 108))


def test_too_many_at_once_write_nothing(cache: Cache) -> None:
    fill(cache, 0, 6)
    with pytest.raises(ContextFullError):
        cache.append(0, rows(6, 3, 3), rows(6, 3, 5))
    fill(cache, 6, 2)
    assert cache.save()["0.0"][:, 0].tolist() == list(range(8))


@pytest.mark.parametrize(("length", "left"), [(3, 3), (0, 0), (-1, 0), (5, 5), (99, 5)])
def test_truncate(cache: Cache, length: int, left: int) -> None:
    fill(cache, 0, 5)
    cache.truncate(length)
    assert cache.length == left
    fill(cache, 200, 1)
    assert cache.save()["1.0"][:, 0].tolist() == [*range(left), 200]


def test_save_and_load(cache: Cache) -> None:
    fill(cache, 0, 5)
    saved = cache.save()
    assert {name: tuple(t.shape) for name, t in saved.items()} == {
        "0.0": (5, 3), "0.1": (5, 5), "1.0": (5, 3), "1.1": (5, 5)
    }  # fmt: skip
    saved = {name: tensor.copy() for name, tensor in saved.items()}
    other = Cache([kinds(3, 5)] * 2, capacity=6, dtype=np.float16)
    fill(other, 300, 6)
    other.load(saved, 5)
    fill(other, 5, 1)
    assert other.length == 6
    assert other.save()["1.1"][:, 4].tolist() == list(range(100, 106))


def test_an_empty_cache_saves_and_loads(cache: Cache) -> None:
    saved = Cache([kinds(3, 5)] * 2, 4, np.float16).save()
    fill(cache, 0, 5)
    cache.load(saved, 0)
    assert cache.length == 0


@pytest.mark.parametrize(
    ("layers", "widths"), [(1, (3, 5)), (3, (3, 5)), (2, (3, 4)), (2, (5, 3)), (2, (3,)), (2, (3, 5, 5)), (0, (3, 5))]
)
def test_another_models_rows_are_refused(cache: Cache, layers: int, widths: tuple[int, ...]) -> None:
    other = Cache([kinds(*widths)] * layers, capacity=8, dtype=np.float16)
    fill(cache, 0, 2)
    with pytest.raises(LocalrunError, match="the saved session does not hold 0 tokens of this model"):
        cache.load(other.save(), 0)
    assert cache.length == 2


@pytest.mark.parametrize(
    ("change", "length"),
    [
        (lambda rows: rows[:4], 5),
        (lambda rows: rows[:, :1], 5),
        (lambda rows: rows.astype(np.float32), 5),
        (lambda rows: np.asarray(rows.sum()), 5),
        (lambda rows: rows, 4),
        (lambda rows: rows, 6),
    ],
    ids=["a row too few", "narrower", "32 bits", "no rows", "fewer tokens", "more tokens"],
)
def test_rows_that_do_not_fit_together_are_refused(cache: Cache, change: Callable, length: int) -> None:
    fill(cache, 0, 5)
    saved = cache.save()
    saved["1.1"] = change(saved["1.1"])
    other = Cache([kinds(3, 5)] * 2, capacity=8, dtype=np.float16)
    with pytest.raises(LocalrunError, match=f"the saved session does not hold {length} tokens of this model"):
        other.load(saved, length)
    assert other.length == 0


def test_more_than_fits_is_refused(cache: Cache) -> None:
    fill(cache, 0, 5)
    small = Cache([kinds(3, 5)] * 2, capacity=4, dtype=np.float16)
    fill(small, 40, 1)
    with pytest.raises(ContextFullError, match="the saved session has 5 tokens; the context holds 4"):
        small.load(cache.save(), 5)
    assert small.length == 1 and small.save()["0.0"][0, 0] == 40


@pytest.mark.parametrize("window", [0, 8])
def test_rows_of_integers_come_back_as_they_were(window: int) -> None:
    """Saved, copied, and sent to another process's cache as float16, also those of a ring that has gone round."""
    kind = [[Rows(48, is_scaled=True, window=window, spare=4), Rows(16, window=window, spare=4)]] * 2
    cache, loaded, copy, sent = (Cache(kind, 40, np.float16) for _ in range(4))
    random = torch.Generator().manual_seed(0)
    for count in (5, 1, 9, 3, 1, 1):
        new = [[torch.randn(count, width, generator=random) for width in (48, 16)] for _ in range(2)]
        seen = [cache.append(layer, *parts) for layer, parts in enumerate(new)]
        cache.advance(count)
    assert {each.dtype for parts in seen for each in parts} == {torch.float16}
    # Half a step of less than 2 / 65472 of a row's length, which is 7 or so; float16 before it, of up to 4.
    torch.testing.assert_close(seen[1][0][-1:].float(), new[1][0], rtol=2**-11, atol=2e-4)
    assert cache._blocks[0].rows.shape[1] == 48 * 2 + 4 and cache._blocks[1].rows.dtype == np.float16
    loaded.load(cache.save(), cache.length)
    copy.copy(cache, cache.length)
    sent.check_room(cache.length)
    for block, end, part in cache.since(0):
        sent.write(block, end, np.frombuffer(part.tobytes(), np.uint8))
    first = cache.length - window + 1 if window else 0  # that the next token needs
    places = np.arange(first, cache.length) % len(cache._blocks[0].rows)
    for other in (loaded, copy, sent):
        blocks = zip(cache._blocks, other._blocks, strict=True)
        assert all(np.array_equal(ours.rows[places], theirs.rows[places]) for ours, theirs in blocks)


def test_exact_rows_are_no_integers() -> None:
    kind = [[Rows(48, is_scaled=True)]]
    assert Cache(kind, 4, np.float32)._blocks[0].rows.dtype == np.float32


@pytest.mark.parametrize("variant", ["v3", "v2-lite", "v3-legacy-kv-b", "v3-nextn", "llama", "llama-mha"])
def test_bytes_a_token_are_what_the_configuration_says(variant: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with localrun.load(tiny_models.shared(variant), threads=1, ctx=16) as model:
        session = model.session()
        list(session.tokens([1, 2, 3, 4, 5], localrun.Sampling(temperature=0.0), max_tokens=1))
        session.save(tmp_path / "session")
        tensors = load_file(tmp_path / "session").values()
        assert all(tensor.dtype == torch.float16 for tensor in tensors)
        assert sum(tensor.nbytes for tensor in tensors) == 5 * model.config.kv_bytes_per_token


def test_memory_is_touched_as_tokens_come() -> None:
    """Of 2 GiB only what tokens fill is used."""
    used = psutil.Process().memory_info().rss
    cache = Cache([kinds(1 << 17)] * 2, capacity=4096, dtype=np.float16)
    cache.append(1, torch.ones(8, 1 << 17))
    assert psutil.Process().memory_info().rss - used < 64 << 20  # the rows take 2 MiB, their source 4


def test_memory_goes_back_to_the_system() -> None:
    """Caches after full ones have no more memory than their tokens fill, however small the blocks are."""

    def cache_of(n_tokens: int) -> Cache:
        new = Cache([kinds(64)] * 8, 4096, np.float16)
        for layer in range(8):
            new.append(layer, torch.ones(n_tokens, 64))
        new.advance(n_tokens)
        return new

    cache_of(4096)  # from the first block freed on, malloc would take such blocks from its heap
    used = psutil.Process().memory_info().rss
    full = [cache_of(4096) for _ in range(16)]  # 64 MiB
    caches = [full.pop(), *(cache_of(8) for _ in range(16))]  # the last one would keep the heap from shrinking
    full.clear()
    caches += [cache_of(8) for _ in range(16)]
    grown = psutil.Process().memory_info().rss - used
    assert grown < sum(cache.n_bytes for cache in caches) + (8 << 20)  # 5 MiB, and 8 for all else
