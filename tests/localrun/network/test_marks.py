"""Caches that cannot go back to every length, and what they keep to go back nevertheless."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from localrun.errors import LocalrunError
from localrun.models.rows import Rows
from localrun.network import cache as cache_module
from localrun.network.cache import Cache

# A window of 4, pooled rows of 4 tokens, and the tokens of the window before and of the open one.
KINDS = (Rows(2, window=4, spare=3), Rows(2, ratio=4), Rows(3, window=8, spare=3, pools=4, is_exact=True))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MARK_EVERY", 20)
    monkeypatch.setattr(cache_module, "MARK_SPARE", 2)


def new() -> Cache:
    return Cache([KINDS, KINDS[:1]], 200, np.float16)


def numbered(first: int, count: int, width: int, salt: int) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].repeat(1, width) + salt


def append(cache: Cache, count: int, salt: int = 0) -> list[list[float]]:
    """`count` tokens more; what each kind of row of the first layer then shows them."""
    first, last = cache.length, cache.length + count
    cache.check_room(count)
    seen = [
        cache.extend(0, 0, numbered(first, count, 2, salt)),
        cache.extend(0, 1, numbered(first // 4, last // 4 - first // 4, 2, salt)),
        cache.extend(0, 2, numbered(first, count, 3, salt)),
    ]
    cache.extend(1, 0, numbered(first, count, 2, salt))
    cache.advance(count)
    return [rows[:, 0].tolist() for rows in seen]


@pytest.mark.parametrize(
    ("length", "kept"),
    # Marks at 14, 28, 49 and 63, since chunks are of 7 tokens, and at 35, which leads 2 tokens further back.
    [(70, 70), (66, 66), (65, 63), (63, 63), (62, 49), (48, 35), (34, 34), (33, 33), (32, 28), (13, 0), (0, 0)],
)
@pytest.mark.parametrize("way", ["truncate", "copy", "load"])
def test_going_back(length: int, kept: int, way: str) -> None:
    """Everything is then as if the text had ended there."""
    cache, plain = new(), new()
    for index in range(10):
        append(cache, 7)
        if index == 4:
            cache.mark()
    assert cache.kept(length) == kept
    if way == "truncate":
        cache.truncate(length)
    elif way == "copy":
        source, cache = cache, new()
        cache.copy(source, length)
        assert source.kept(length) == kept and source.length == 70
    else:
        saved = {name: np.array(rows) for name, rows in cache.save().items()}
        cache = new()
        cache.load(saved, 70)
        cache.truncate(length)
    assert cache.length == kept
    if kept:
        append(plain, kept)
    for count in (1, 2, 1, 4, 30, 1):
        assert append(cache, count, 100) == append(plain, count, 100)


def test_marks_of_another_text_are_cut() -> None:
    """After a change at 33 the mark at 35 leads back to 33, not to what has been there."""
    cache = new()
    append(cache, 35)
    cache.mark()
    append(cache, 30)
    cache.truncate(33)
    append(cache, 30, 100)
    assert (cache.kept(40), cache.kept(34), cache.kept(33), cache.kept(32)) == (33, 33, 33, 0)
    cache.truncate(40)
    assert append(cache, 1, 100)[0] == [30, 31, 32, 133]


def test_marks_keep_to_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those closest to each other go; the last one stays."""
    monkeypatch.setattr(cache_module, "MARK_BYTES", 800)
    cache = new()
    for _ in range(20):
        append(cache, 10)
        cache.mark()
    marks = [mark.length for mark in cache._marks]
    assert marks[-1] == 200 and sum(mark.n_bytes for mark in cache._marks) <= 800
    assert len(marks) >= 3 and max(np.diff([0, *marks])) <= 80
    assert cache.n_bytes >= sum(mark.n_bytes for mark in cache._marks)


@pytest.mark.parametrize("change", ["fewer", "beyond", "one ring", "type"])
def test_damaged_marks_are_refused(change: str) -> None:
    cache, other = new(), new()
    append(cache, 30)
    cache.mark()
    saved = dict(cache.save())
    rows = saved.pop("0.0@30")
    if change == "fewer":
        saved["0.0@30"] = rows[-2:]
    elif change == "beyond":
        saved = {name.replace("@30", "@31"): rows for name, rows in saved.items()} | {"0.0@31": rows}
    elif change == "type":
        saved["0.0@30"] = rows.astype(np.float32)
    with pytest.raises(LocalrunError, match="does not hold 30 tokens"):
        other.load(saved, 30)
    assert other.length == 0


def test_caches_without_rings_go_back_anywhere() -> None:
    cache = Cache([(Rows(2), Rows(2, ratio=4))], 50, np.float16)
    cache.check_room(40)
    cache.extend(0, 0, numbered(0, 40, 2, 0))
    cache.advance(40)
    cache.mark()
    assert [cache.kept(length) for length in (40, 17, 0, 90)] == [40, 17, 0, 40] and not cache._marks
