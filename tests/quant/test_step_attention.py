"""The step's attention phases over a 16-bit cache against a softmax in float64.

Letters: H heads, G groups of heads that share keys, S tokens in the cache, V values of a head.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import closing
from dataclasses import dataclass, replace

import kernels
import numpy as np
import pytest
from kernels import floats

from quant.decode.attention import Heads, attend_phase
from quant.decode.attention_i16 import fits, integer_attend_phase
from quant.decode.program import FEW_SPLITS, FEW_UP_TO, MIN_SPLIT, Program
from quant.decode.values import project_values_phase
from quant.gemv.rows_i16 import expand_scaled_rows, pack_scaled_rows, row_bytes
from quant.matrix import QuantMatrix
from quant.target import isa
from quant.threads.pool import Pool, aligned_bytes

pytestmark = pytest.mark.levels

# Scores are sums of up to 300 float32 products, values of up to 5000 weighted ones: some sqrt(5000) roundings of 2^-24.
TOLERANCE = 1e-5
GUARD = 7  # rows behind the cache and floats behind the output, which nobody may use


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention; latent: values are the first part of keys, as in MLA, and all groups share them."""

    latent: bool
    n_groups: int
    per_group: int
    key_width: int
    value_width: int

    @property
    def heads(self) -> Heads:
        groups = 1 if self.latent else self.n_groups
        key_row, value_row = 2 * groups * self.key_width, 2 * groups * self.value_width
        return Heads(
            n_groups=self.n_groups, per_group=self.per_group, key_width=self.key_width, value_width=self.value_width,
            key_slot=1, value_slot=1 if self.latent else 2,
            key_row=key_row, value_row=key_row if self.latent else value_row,
            key_group=0 if self.latent else 2 * self.key_width, value_group=0 if self.latent else 2 * self.value_width,
        )  # fmt: skip

    @property
    def scaled(self) -> Heads:
        """Over rows of integers with a scale."""
        n_bytes = row_bytes(self.key_width)
        return replace(self.heads, is_scaled=True, key_row=n_bytes, value_row=n_bytes)

    def random(self, n_cached: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """queries float32 (H, key_width), keys float16 (S, groups, key_width), values float16 (S, groups, V)."""
        rng, groups = np.random.default_rng([n_cached, seed]), 1 if self.latent else self.n_groups
        queries = rng.standard_normal((self.heads.n_heads, self.key_width)) * 2 / np.sqrt(self.key_width)
        keys = rng.standard_normal((n_cached, groups, self.key_width)).astype(np.float16)
        values = rng.standard_normal((n_cached, groups, self.value_width)).astype(np.float16)
        return queries.astype(np.float32), keys, keys[..., : self.value_width] if self.latent else values


def pack(rows: np.ndarray) -> np.ndarray:
    """(S, 1, width) as integers with scales, float16 (S, bytes / 2) by their bytes, of which NaN is NaN's scale."""
    rows = np.ascontiguousarray(rows.reshape(len(rows), -1), np.float32)
    packed = np.zeros((len(rows), row_bytes(rows.shape[1])), np.uint8)
    pack_scaled_rows.ctypes(rows.ctypes.data, len(rows), rows.shape[1], packed.ctypes.data)
    return packed.view(np.float16)


def unpack(rows: np.ndarray) -> np.ndarray:
    """What pack() keeps of rows (S, 1, width), float16."""
    packed, found = pack(rows), np.empty(rows.shape, np.float16)
    expand_scaled_rows.ctypes(packed.ctypes.data, len(rows), rows.shape[-1], found.ctypes.data)
    return found


def before_the_edge(rows: np.ndarray) -> np.ndarray:
    """A copy behind which is a page that can't be read."""
    size = -(-rows.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    page = np.frombuffer(memory, np.uint8).ctypes.data + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = np.frombuffer(memory, rows.dtype, rows.size, size - rows.nbytes).reshape(rows.shape)
    copy[:] = rows
    return copy


def attend(
    pool: Pool, shape: Shape, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, v_b: QuantMatrix | None = None
) -> np.ndarray:
    """float32 (H, V): the two phases for the last of the cached tokens. What they must not read is NaN."""
    return attend_few(pool, shape, queries[None], keys, values, v_b)[0]


def attend_few(
    pool: Pool,
    shape: Shape,
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    v_b: QuantMatrix | None = None,
    *,
    window: int = 0,
    ring: int = 0,
    sinks: np.ndarray | None = None,
    is_scaled: bool = False,
    in_integers: bool = False,
    chosen: np.ndarray | None = None,
    at_edge: bool = False,
) -> np.ndarray:
    """float32 (T, H, V): the same for the last T tokens, whose queries are (T, H, key_width).

    ring: rows of the cache's blocks, if they are fewer than there are tokens. is_scaled: rows are integers with a
    scale. chosen: int32 (T, window), rows that are seen. at_edge: behind the last row no memory can be read.
    """
    make_phase = integer_attend_phase if in_integers else attend_phase
    heads, n_cached, n_tokens = shape.scaled if is_scaled else shape.heads, len(keys), len(queries)
    heads = replace(heads, window=window, sinks=0 if sinks is None else sinks.ctypes.data)
    if chosen is not None:
        heads = replace(heads, chosen=chosen.ctypes.data, chosen_bytes=chosen.strides[0])
    embedding, _ = kernels.random_weight("F32", (1, 1, 16), np.random.default_rng(0))
    program = Program(pool, embedding, np.ones(1), 1.0, 3)
    query_address = program.vector(heads.n_heads * heads.query_width)
    floats(query_address, n_tokens, heads.n_heads, heads.query_width)[..., : shape.key_width] = queries
    width = v_b.n_rows if v_b else shape.value_width
    out_address = program.vector(heads.n_heads * width + GUARD)
    out = floats(out_address, n_tokens * heads.n_heads * width + GUARD)
    out[:] = np.nan
    partials = aligned_bytes(n_tokens * heads.partials_bytes + 64 * GUARD)
    partials.view(np.float32)[:] = np.nan
    program.add(make_phase(heads, query_address, program.keep(partials)))
    program.add(project_values_phase(heads, partials.ctypes.data, v_b, out_address))
    program.finish()
    n_rows = n_cached if at_edge else ring or n_cached + 1
    parts = [pack(rows) if is_scaled else rows.reshape(n_cached, -1) for rows in (keys, values)]
    blocks = [np.full((n_rows + GUARD, part.shape[1]), np.nan, np.float16) for part in parts]
    is_last = window and chosen is None
    kept = np.arange(max(0, n_cached - (window + n_tokens - 1)) if is_last else 0, n_cached)
    for block, part in zip(blocks, parts, strict=True):
        block[kept % n_rows] = part[kept]
    if at_edge:
        blocks = [before_the_edge(block[:n_rows]) for block in blocks]
    cache = np.array([0, *(block.ctypes.data for block in blocks)], np.int64)
    program.run([0] * n_tokens, range(n_cached - n_tokens, n_cached), cache, cache_rows=np.array([1, n_rows, n_rows]))
    assert np.all(np.isnan(out[-GUARD:]))
    assert np.all(np.isnan(partials.view(np.float32)[-16 * GUARD :]))
    return out[:-GUARD].reshape(n_tokens, heads.n_heads, width).copy()


def expected(
    shape: Shape, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, sinks: np.ndarray | None = None
) -> np.ndarray:
    """float64 (H, V)."""
    groups = [0 if shape.latent else head // shape.per_group for head in range(shape.heads.n_heads)]
    keys_SHd, values_SHV = (part[:, groups].astype(np.float64) for part in (keys, values))
    scores_HS = np.einsum("hd,shd->hs", queries.astype(np.float64), keys_SHd)
    extra_H1 = np.full((len(scores_HS), 1), -np.inf) if sinks is None else sinks[:, None].astype(np.float64)
    largest_H1 = np.maximum(scores_HS.max(1, keepdims=True), extra_H1)
    weights_HS = np.exp(scores_HS - largest_H1)
    total_H1 = weights_HS.sum(1, keepdims=True) + np.exp(extra_H1 - largest_H1)
    return np.einsum("hs,shv->hv", weights_HS / total_H1, values_SHV)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, of the largest value."""
    assert found.shape == wanted.shape and np.all(np.isfinite(found))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


MLA, GQA = Shape(True, 1, 8, 80, 64), Shape(False, 2, 3, 32, 32)
LONGER = FEW_SPLITS * MIN_SPLIT  # from here on pieces get longer, until there are more behind FEW_UP_TO
LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, *(n + i for n in (LONGER, FEW_UP_TO) for i in (-1, 0, 1)), 4096, 4097, 5000]
SHAPES = {
    "1 head": Shape(True, 1, 1, 48, 32),
    "3 heads": Shape(True, 1, 3, 48, 32),
    "16 heads": Shape(True, 1, 16, 48, 32),
    "20 heads": Shape(True, 1, 20, 48, 32),
    "2 groups of 10": Shape(True, 2, 10, 48, 32),
    "odd widths": Shape(True, 2, 8, 53, 37),
    "narrower than a vector": Shape(True, 1, 9, 7, 5),
    "V3's widths": Shape(True, 2, 16, 576, 512),
    "GQA, a group a head": Shape(False, 6, 1, 32, 32),
    "GQA, 8 heads a group": Shape(False, 2, 8, 64, 64),
    "GQA, 20 heads a group": Shape(False, 1, 20, 32, 32),
    "GQA, odd widths": Shape(False, 3, 3, 29, 43),
    "GQA, values shorter": Shape(False, 2, 4, 40, 24),
    "GQA, values longer": Shape(False, 2, 11, 24, 72),
}


@pytest.mark.parametrize("n_cached", LENGTHS)
@pytest.mark.parametrize("shape", [MLA, GQA], ids=["MLA", "GQA"])
def test_lengths(pool: Pool, shape: Shape, n_cached: int) -> None:
    case = shape.random(n_cached)
    assert error(attend(pool, shape, *case), expected(shape, *case)) < TOLERANCE


@pytest.mark.parametrize("n_cached", [1, 65, 200])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(pool: Pool, shape: Shape, n_cached: int) -> None:
    case = shape.random(n_cached)
    assert error(attend(pool, shape, *case), expected(shape, *case)) < TOLERANCE


@pytest.mark.parametrize("shape", [MLA, GQA, SHAPES["odd widths"]], ids=["MLA", "GQA", "odd widths"])
def test_workers_do_not_change_the_result(shape: Shape) -> None:
    case, answers = shape.random(1000), []
    for n_workers in (1, 2, 3, 7):
        with closing(Pool(n_workers)) as pool:
            answers += [attend(pool, shape, *case) for _ in range(3)]
    assert all(np.array_equal(answers[0], answer) for answer in answers[1:])


@pytest.mark.parametrize("type_", [None, "F16", "Q8_0"])
@pytest.mark.parametrize("n_cached", [5, 66, LONGER + 2, FEW_UP_TO + 2, 4099])  # pieces differ by token
@pytest.mark.parametrize("shape", [MLA, GQA, SHAPES["GQA, odd widths"]], ids=["MLA", "GQA", "GQA, odd widths"])
def test_tokens_together_are_tokens_alone(pool: Pool, shape: Shape, n_cached: int, type_: str | None) -> None:
    rng, v_b = np.random.default_rng(6), None
    if type_ and shape.latent:
        v_b, _ = kernels.random_weight(type_, (8, 24, shape.value_width), rng)
    _, keys, values = shape.random(n_cached)
    queries = rng.standard_normal((5, shape.heads.n_heads, shape.key_width)).astype(np.float32)
    together = attend_few(pool, shape, queries, keys, values, v_b)
    for t in range(5):
        seen = n_cached - 4 + t
        assert np.array_equal(together[t], attend(pool, shape, queries[t], keys[:seen], values[:seen], v_b))


@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(
    ("n_cached", "window", "ring"),
    [
        (9, 0, 0),
        (9, 16, 0),
        (16, 16, 0),
        (17, 16, 0),
        (100, 1, 5),
        (300, 128, 150),
        (300, 128, 132),
        (4100, 2500, 3000),
    ],
)
@pytest.mark.parametrize("shape", [MLA, GQA], ids=["MLA", "GQA"])
def test_windows_and_sinks(pool: Pool, shape: Shape, n_cached: int, window: int, ring: int, has_sinks: bool) -> None:
    """Of five tokens, each with its own window, over rows that go round in their blocks; NaN is what nobody may see."""
    rng = np.random.default_rng(7)
    _, keys, values = shape.random(n_cached)
    queries = rng.standard_normal((5, shape.heads.n_heads, shape.key_width)).astype(np.float32)
    queries *= 2 / np.sqrt(shape.key_width)
    sinks = (2 * rng.standard_normal(shape.heads.n_heads)).astype(np.float32) if has_sinks else None
    together = attend_few(pool, shape, queries, keys, values, window=window, ring=ring, sinks=sinks)
    for t in range(5):
        last = n_cached - 4 + t
        seen = slice(max(0, last - window) if window else 0, last)
        wanted = expected(shape, queries[t], keys[seen], values[seen], sinks)
        assert error(together[t], wanted) < TOLERANCE
        alone = [queries[t : t + 1], keys[:last], values[:last]]
        assert np.array_equal(together[t], attend_few(pool, shape, *alone, window=window, ring=ring, sinks=sinks)[0])


@pytest.mark.parametrize(("type_", "tolerance"), [("F32", TOLERANCE), ("F16", TOLERANCE), ("Q8_0", 1e-2)])
@pytest.mark.parametrize("n_cached", [1, 300])
def test_values_are_lifted_out_of_latent_space(pool: Pool, type_: str, tolerance: float, n_cached: int) -> None:
    """v_b (H, 24, V). For integer types the mix is rounded to 8 bits, half a step of 1/127 of the largest of 32."""
    weight, matrices = kernels.random_weight(type_, (8, 24, MLA.value_width), np.random.default_rng(5))
    case = MLA.random(n_cached)
    wanted = np.einsum("hvc,hc->hv", matrices, expected(MLA, *case))
    assert error(attend(pool, MLA, *case, weight), wanted) < tolerance


# ---- over rows of integers -------------------------------------------------------------------------------------------

# Queries of 576 columns keep some 11 bits of what is typical of them: scores of size 2 and logarithms of weights are
# off by up to 2e-3, of many rows at once by less.
INTEGER_TOLERANCE = 2e-3
LANES = {
    "16 heads": SHAPES["16 heads"],
    "V3's widths": SHAPES["V3's widths"],
    "2 groups of 10": SHAPES["2 groups of 10"],
    "9 heads": Shape(True, 1, 9, 112, 96),
}
IN_INTEGERS = [
    ("16 heads", 1, 0, 0), ("16 heads", 4097, 0, 0), ("V3's widths", 200, 0, 0), ("V3's widths", 160, 0, 0),
    ("2 groups of 10", 65, 0, 0), ("9 heads", 129, 0, 0), ("16 heads", 4100, 2500, 3000), ("9 heads", 300, 128, 132),
    ("16 heads", LONGER + 1, 0, 0), ("16 heads", FEW_UP_TO + 1, 0, 0), ("2 groups of 10", FEW_UP_TO + 1, 0, 0),
]  # fmt: skip


def few(shape: Shape, n_cached: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries of up to three tokens (T, H, key_width), keys and values as a cache of integers has them."""
    queries, keys, _ = shape.random(n_cached)
    keys = unpack(keys)
    return np.stack([queries, -queries, np.zeros_like(queries)][-n_cached:]), keys, keys[..., : shape.value_width]


@pytest.mark.parametrize(("name", "n_cached", "window", "ring"), IN_INTEGERS)
@pytest.mark.parametrize("in_integers", [False, True], ids=["in float32", "in integers"])
def test_rows_of_integers(pool: Pool, name: str, n_cached: int, window: int, ring: int, in_integers: bool) -> None:
    """Against float64 over what the rows hold; and tokens together are tokens alone, to the bit."""
    shape = LANES[name]
    if in_integers and not fits(shape.scaled):
        pytest.skip("the CPU has no products of 16-bit integers")
    queries, keys, values = few(shape, n_cached)
    options = {"window": window, "ring": ring, "in_integers": in_integers, "is_scaled": True}
    together = attend_few(pool, shape, queries, keys, values, **options)
    for t, found in enumerate(together):
        last = n_cached - len(queries) + 1 + t
        seen = slice(max(0, last - window) if window else 0, last)
        wanted = expected(shape, queries[t], keys[seen], values[seen])
        assert error(found, wanted) < (INTEGER_TOLERANCE if in_integers else TOLERANCE)
        alone = attend_few(pool, shape, queries[t : t + 1], keys[:last], values[:last], **options)
        assert np.array_equal(found, alone[0])


@pytest.mark.parametrize("n_cached", [1, 2, 14, 15, 16, 17, 18, 50, 62, 63, 64, 65, 100, 128])
def test_nothing_is_read_behind_the_last_row(pool: Pool, n_cached: int) -> None:
    """Tiles of 16 rows, and sums of two, are of copies or lie in place: what lies behind would end this process."""
    shape = LANES["9 heads"]
    if not fits(shape.scaled):
        pytest.skip("the CPU has no products of 16-bit integers")
    queries, keys, values = few(shape, n_cached)
    found = attend_few(pool, shape, queries[-1:], keys, values, is_scaled=True, in_integers=True, at_edge=True)
    assert error(found[0], expected(shape, queries[-1], keys, values)) < INTEGER_TOLERANCE


@pytest.mark.parametrize("window", [64, 200])
def test_chosen_rows_of_integers(pool: Pool, window: int) -> None:
    """Rows that lie anywhere, for each of three tokens others; some of them follow each other."""
    shape = LANES["2 groups of 10"]
    if not fits(shape.scaled):
        pytest.skip("the CPU has no products of 16-bit integers")
    queries, keys, values = few(shape, 1000)
    random = np.random.default_rng(8)
    chosen = np.stack([np.sort(random.choice(990, window, replace=False)) for _ in queries]).astype(np.int32)
    chosen[1, 60:] = np.arange(700, 700 + window - 60)
    options = {"window": window, "is_scaled": True, "in_integers": True, "chosen": chosen}
    for t, found in enumerate(attend_few(pool, shape, queries, keys, values, **options)):
        assert error(found, expected(shape, queries[t], keys[chosen[t]], values[chosen[t]])) < INTEGER_TOLERANCE


def test_integers_let_nan_and_large_numbers_through(pool: Pool) -> None:
    shape, options = LANES["16 heads"], {"is_scaled": True, "in_integers": True}
    if not fits(shape.scaled):
        pytest.skip("the CPU has no products of 16-bit integers")
    queries, keys, _ = shape.random(100)
    keys[7], keys[9], queries = 6e4, 0, queries * np.float32(1e30)
    keys = unpack(keys)
    values = keys[..., : shape.value_width]
    found = attend_few(pool, shape, queries[None], keys, values, **options)[0]
    assert error(found, expected(shape, queries, keys, values)) < INTEGER_TOLERANCE
    keys[70, 0, 40] = np.nan  # of the key alone
    assert np.isnan(attend_few(pool, shape, queries[None], keys, values, **options)).all()


def test_workers_do_not_change_sums_of_integers() -> None:
    shape, answers = LANES["16 heads"], []
    if not fits(shape.scaled):
        pytest.skip("the CPU has no products of 16-bit integers")
    case = few(shape, 1000)
    for n_workers in (1, 2, 3, 7):
        with closing(Pool(n_workers)) as pool:
            answers += [attend_few(pool, shape, *case, is_scaled=True, in_integers=True) for _ in range(3)]
    assert all(np.array_equal(answers[0], answer) for answer in answers[1:])


def test_where_integers_do_not_fit() -> None:
    heads = LANES["16 heads"].scaled
    assert fits(heads) == isa.has("avx512_vnni")
    for changes in ({"is_scaled": False}, {"per_group": 4}, {"per_group": 32}, {"value_width": 48}):
        assert not fits(replace(heads, **changes))


# ---- scores of any size ----------------------------------------------------------------------------------------------


def whole_numbers(shape: Shape, n_cached: int, order: int, offset: int, factor: float):
    """Scores exact in float32: factor * (whole numbers + offset); order 1: rising, -1: falling, 0: any."""
    rng, groups = np.random.default_rng(n_cached), 1 if shape.latent else shape.n_groups
    keys = rng.integers(-2, 3, (n_cached, groups, shape.key_width)).astype(np.float16)
    values = rng.standard_normal((n_cached, groups, shape.value_width)).astype(np.float16)
    keys[..., 0] = rng.integers(-40, 40, (n_cached, groups)) if order == 0 else order * np.arange(n_cached)[:, None]
    keys[..., 1] = 1
    queries = np.zeros((shape.heads.n_heads, shape.key_width), np.float32)
    queries[:, :3] = [1, offset, 2]
    queries[1::2, 2] = -1
    return queries * np.float32(factor), keys, keys[..., : shape.value_width] if shape.latent else values


@pytest.mark.parametrize("factor", [1.0, 2.0**10, 2.0**40, 2.0**108], ids=["1", "2^10", "2^40", "2^108"])
@pytest.mark.parametrize("order", [-1, 0, 1], ids=["falling", "any order", "rising"])
@pytest.mark.parametrize("offset", [-2000, 0, 2000])
@pytest.mark.parametrize("shape", [MLA, GQA], ids=["MLA", "GQA"])
def test_huge_scores(pool: Pool, shape: Shape, offset: int, order: int, factor: float) -> None:
    """Up to 1e36 of either sign: softmax takes the largest, ties in equal parts, and nothing overflows.

    Rising scores make every piece larger than what was summed before it, falling ones smaller.
    """
    case = whole_numbers(shape, 500, order, offset, factor)
    # The largest value is up to 500 here where keys are values; its weight has the exponential's rounding.
    assert error(attend(pool, shape, *case), expected(shape, *case)) < TOLERANCE


def test_equal_scores_take_the_mean(pool: Pool) -> None:
    queries, keys, values = GQA.random(777)
    found = attend(pool, GQA, np.zeros_like(queries), keys, values)
    mean = values.astype(np.float64).mean(0)
    # The mean of 777 values of size 1 is some 0.04: rounding is of the values' size.
    assert np.abs(found - mean[[0, 0, 0, 1, 1, 1]]).max() < TOLERANCE


def test_one_token_is_its_value(pool: Pool) -> None:
    queries, keys, values = GQA.random(1)
    assert np.array_equal(attend(pool, GQA, queries, keys, values), values[0, [0, 0, 0, 1, 1, 1]].astype(np.float32))


def test_nan_in_the_cache_reaches_the_heads_that_read_it(pool: Pool) -> None:
    queries, keys, values = GQA.random(100)
    keys[70, 1, 3] = np.nan
    with pytest.raises(AssertionError):
        error(attend(pool, GQA, queries, keys, values), expected(GQA, queries, keys, values))
    found = attend(pool, GQA, queries, keys, values)
    assert np.isnan(found[3:]).all() and np.isfinite(found[:3]).all()
