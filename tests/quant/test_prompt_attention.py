"""Attention of many tokens against torch, float64. Letters: T tokens, S in the cache, H heads, G of keys and values."""

from __future__ import annotations

import pytest
import torch

from localrun.cpu.bridge import Attend
from quant.threads.pool import Pool


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(t: int, s: int, h: int, g: int, depths: tuple[int, ...], width: int) -> tuple[list, torch.Tensor]:
    """Parts of queries and keys, those of the second part shared by all heads, and values."""
    groups = [g] + [1] * (len(depths) - 1)
    parts = [
        (random(t, h, d, seed=i), random(s, n, d, seed=9 + i))
        for i, (d, n) in enumerate(zip(depths, groups, strict=True))
    ]
    return parts, random(s, g, width, seed=20)


def attended(
    pool: Pool, parts: list, v_SGV: torch.Tensor, scale: float, window: int = 0, sinks_H: torch.Tensor | None = None
) -> torch.Tensor:
    out_THV = torch.full((*parts[0][0].shape[:2], v_SGV.shape[-1]), torch.nan)
    Attend(pool)(parts, v_SGV, scale, out_THV, window, sinks_H)
    return out_THV


def expected(
    parts: list, v_SGV: torch.Tensor, scale: float, window: int = 0, sinks_H: torch.Tensor | None = None
) -> torch.Tensor:
    """float64 (T, H, V)."""
    (n_tokens, n_heads, _), n_cached = parts[0][0].shape, v_SGV.shape[0]
    q = torch.cat([q for q, _ in parts], -1).double().transpose(0, 1)
    keys = [k.repeat_interleave(n_heads // k.shape[1], 1) for _, k in parts]
    k = torch.cat(keys, -1).double().transpose(0, 1)
    v = v_SGV.repeat_interleave(n_heads // v_SGV.shape[1], 1).double().transpose(0, 1)
    everything = torch.ones(n_tokens, n_cached, dtype=torch.bool)
    hidden = everything.triu(1 + n_cached - n_tokens)
    if window:
        hidden |= everything.tril(n_cached - n_tokens - window)
    scores = (scale * (q @ k.mT)).masked_fill(hidden, float("-inf"))
    if sinks_H is not None:  # a column more, whose weight is dropped
        column = sinks_H.double()[:, None, None].expand(-1, n_tokens, 1)
        return (torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v).transpose(0, 1)
    return (scores.softmax(-1) @ v).transpose(0, 1)


# Scores of up to 5 with a relative error of some 1e-6, so weights too; values are near 1.
TOLERANCE = 1e-5
SHAPES = {
    "one token": (1, 1, 2, 2, (16,), 16),
    "one block, heads that share": (32, 32, 6, 2, (16,), 16),
    "blocks that are not full": (77, 77, 3, 3, (24, 8), 20),
    "columns in odd numbers": (40, 45, 2, 1, (7, 5), 13),
    "before the prompt, several chunks": (150, 700, 4, 4, (32, 16), 32),
    "all heads share": (64, 300, 5, 1, (48, 16), 48),
    "a chunk's end between two blocks": (96, 288, 2, 2, (16, 4), 12),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention(pool: Pool, shape: tuple) -> None:
    parts, v_SGV = inputs(*shape)
    found = attended(pool, parts, v_SGV, 0.2)
    assert float((found - expected(parts, v_SGV, 0.2)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ("one token", 0), ("one token", 1), ("blocks that are not full", 1), ("blocks that are not full", 40),
        ("before the prompt, several chunks", 16), ("before the prompt, several chunks", 300),
        ("before the prompt, several chunks", 900), ("all heads share", 33), ("a chunk's end between two blocks", 31),
    ],
)  # fmt: skip
def test_windows_and_sinks(pool: Pool, shape: str, window: int, has_sinks: bool) -> None:
    parts, v_SGV = inputs(*SHAPES[shape])
    sinks_H = 2 * random(SHAPES[shape][2], seed=3) if has_sinks else None
    found = attended(pool, parts, v_SGV, 0.2, window, sinks_H)
    assert float((found - expected(parts, v_SGV, 0.2, window, sinks_H)).abs().max()) < TOLERANCE


def test_strided_tensors(pool: Pool) -> None:
    """Parts of wider rows, heads in another order than tokens, an output among others."""
    (q, k), *_ = inputs(50, 90, 4, 4, (16,), 16)[0]
    wide, v_GSV = random(50, 4, 40, seed=1), random(4, 90, 16, seed=2)
    wide[..., 8:24] = q
    out = torch.zeros(50, 9, 16)
    Attend(pool)([(wide[..., 8:24], k)], v_GSV.transpose(0, 1), 0.3, out[:, 2:6])
    want = expected([(q, k)], v_GSV.transpose(0, 1), 0.3)
    assert float((out[:, 2:6] - want).abs().max()) < TOLERANCE
    assert not out[:, :2].any() and not out[:, 6:].any()


def test_large_scores_do_not_overflow(pool: Pool) -> None:
    parts, v_SGV = inputs(64, 400, 2, 2, (16,), 16)
    found = attended(pool, parts, v_SGV, 300.0)
    # Scores of some 3,000 are rounded to 2^-13 and more, after sums of products that were rounded as well.
    assert float((found - expected(parts, v_SGV, 300.0)).abs().max()) < 1e-2


def test_the_number_of_workers_changes_nothing(pool: Pool) -> None:
    parts, v_SGV = inputs(200, 500, 3, 3, (16, 8), 16)
    single = Pool(1)
    one = attended(single, parts, v_SGV, 0.2)
    single.close()
    assert torch.equal(one, attended(pool, parts, v_SGV, 0.2))
