"""Attention of many tokens against torch, float64. Letters: T tokens, S in the cache, H heads, G of keys and values."""

from __future__ import annotations

import pytest
import torch

from localrun.cpu import bridge
from localrun.cpu.bridge import Attend, AttendRebuilt
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


@pytest.mark.parametrize("type_", [torch.float32, torch.float16])
def test_the_number_of_workers_changes_nothing_with_a_window(pool: Pool, type_: torch.dtype) -> None:
    """More workers take fewer tokens at a time, whose window begins elsewhere."""
    parts, v_SGV = inputs(600, 900, 1, 1, (16,), 16)
    parts, v_SGV = [(q, k.to(type_)) for q, k in parts], v_SGV.to(type_)
    single = Pool(1)
    one = attended(single, parts, v_SGV, 0.2, window=300)
    single.close()
    assert torch.equal(one, attended(pool, parts, v_SGV, 0.2, window=300))


# ---- over a 16-bit cache, in 16-bit integers where the CPU has their products ----------------------------------------

# Keys, queries and weights keep 12 bits or more of what is typical of a row. With the 8 of bfloat16 errors are ten
# times as large.
ROUNDED_TOLERANCE = 5e-4
SHAPES_16 = {
    "one token": (1, 1, 2, 2, (16,), 16, 0),
    "blocks that are not full": (77, 77, 3, 3, (40,), 20, 0),
    "columns in odd numbers, an odd window": (40, 45, 2, 1, (7,), 5, 21),
    "before the prompt, several chunks": (150, 701, 4, 2, (48,), 32, 0),
    "a window over several chunks": (150, 700, 2, 2, (16,), 16, 300),
}


def in_16_bits(shape: tuple) -> tuple[list, torch.Tensor, torch.Tensor | None]:
    """Parts, values, and sinks where there is a window."""
    *sizes, window = shape
    parts, v_SGV = inputs(*sizes)
    return [(q, k.half()) for q, k in parts], v_SGV.half(), 2 * random(shape[2], seed=3) if window else None


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, of the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("shape", SHAPES_16.values(), ids=SHAPES_16)
def test_16_bits(pool: Pool, shape: tuple) -> None:
    parts, v_SGV, sinks_H = in_16_bits(shape)
    found = attended(pool, parts, v_SGV, 0.2, shape[-1], sinks_H)
    wide = [(q, k.float()) for q, k in parts]
    assert error(found, expected(wide, v_SGV.float(), 0.2, shape[-1], sinks_H)) < ROUNDED_TOLERANCE


@pytest.mark.parametrize("heads_at_a_time", [1, 4])
@pytest.mark.parametrize(("is_split", "sizes"), [(True, (64, 24, 16, 20)), (False, (46, 32, 8, 33))])
def test_rebuilt(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, is_split: bool, sizes: tuple, heads_at_a_time: int
) -> None:
    """Keys and values from latents, by matrices of either order, against products in float64."""
    n_latent, n_nope, n_rope, width = sizes
    rows_SW = random(301, n_latent + n_rope, seed=1).half()
    k_b, v_b = (random(4, n, n_latent, seed=n) / n_latent**0.5 for n in (n_nope, width))
    queries = [random(70, 4, n, seed=5 + n) for n in (n_nope, n_rope)]
    latents, rope = rows_SW.double().split([n_latent, n_rope], -1)
    keys, values = (torch.einsum("sc,hnc->shn", latents, matrix.double()) for matrix in (k_b, v_b))
    wanted = expected([(queries[0], keys), (queries[1], rope[:, None])], values, 0.2)
    stored = k_b.mT.contiguous() if is_split else k_b
    of_a_head = bridge._rounded_bytes(301, n_nope + n_rope, width)
    monkeypatch.setattr(bridge, "ATTENTION_WORK_BYTES", heads_at_a_time * of_a_head)
    out = torch.full((70, 4, width), torch.nan)
    if not bridge.IN_INTEGERS:
        pytest.skip("the CPU has no products of 16-bit integers")
    AttendRebuilt(pool)(queries, rows_SW, Matrices(stored), Matrices(v_b), is_split, 0.2, out)
    assert error(out, wanted) < ROUNDED_TOLERANCE


class Matrices:
    """A HeadLinear that can only be expanded."""

    def __init__(self, matrices: torch.Tensor):
        self.matrices = matrices

    def dense(self, first: int, count: int) -> torch.Tensor:
        return self.matrices[first : first + count].contiguous()


def test_16_bits_do_not_depend_on_workers_or_other_tokens(pool: Pool) -> None:
    parts, v_SGV, _ = in_16_bits(SHAPES_16["before the prompt, several chunks"])
    single = Pool(1)
    together = attended(single, parts, v_SGV, 0.2)
    single.close()
    assert torch.equal(together, attended(pool, parts, v_SGV, 0.2))
    for first, last in ((109, 110), (33, 150)):
        rows = slice(0, 551 + last)
        some = [(q[first:last], k[rows]) for q, k in parts]
        assert torch.equal(together[first:last], attended(pool, some, v_SGV[rows], 0.2))


def test_16_bits_of_any_size(pool: Pool) -> None:
    """Rows of zeros and of the largest halves, queries of any size; NaN reaches those that read it, and only them."""
    parts, v_SGV, _ = in_16_bits(SHAPES_16["blocks that are not full"])
    (q, k), factors = parts[0], torch.tensor([0.0, 1e-30, 1e-4])[:, None]
    k[3], v_SGV[5], k[20], v_SGV[30] = 0, 0, 6e4 * k[20].sign(), 6e4
    found = attended(pool, [(q * factors, k)], v_SGV, 0.2)
    assert error(found, expected([(q * factors, k.float())], v_SGV.float(), 0.2)) < ROUNDED_TOLERANCE
    k[40, 1, 3], v_SGV[50, 2, 0] = torch.nan, torch.nan
    found = attended(pool, [(q, k)], v_SGV, 0.2)
    assert found[:, 0].isfinite().all() and found[40:, 1].isnan().all() and found[50:, 2, 0].isnan().all()
