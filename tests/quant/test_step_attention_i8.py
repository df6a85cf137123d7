"""The step's attention over a cache of 8 bits against a softmax in float64 of the rows that it holds."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace

import kernels
import numpy as np
import pytest
from kernels import floats

from quant.decode.attention import Heads, attend_phase
from quant.decode.attention_i8 import byte_attend_phase, fits
from quant.decode.program import FEW_UP_TO, Program
from quant.decode.values import project_values_phase
from quant.gemv.rows_i8 import expand_rows, pack_rows, row_bytes
from quant.target import isa
from quant.threads.pool import Pool, aligned_bytes

pytestmark = pytest.mark.levels

TOLERANCE = 1e-5  # as test_step_attention.py's: nothing is rounded but rows, and these before
# Queries of 8 bits move scores, whose deviation is 1 here, by about 0.01, and weights by as much; peaks of 4 by 0.04.
BYTE_TOLERANCE = 0.03
GUARD = 7  # rows behind the cache and floats behind the output, which nobody may use


@dataclass(frozen=True)
class Case:
    """Heads and their random queries and rows. latent: values are the first part of keys, which behind keep 16 bits."""

    latent: bool
    n_groups: int
    per_group: int
    key_width: int
    value_width: int

    @property
    def groups(self) -> tuple[int, int]:
        """Values of keys and of values that share a scale."""
        return (self.value_width, self.value_width) if self.latent else (self.key_width, self.value_width)

    @property
    def widths(self) -> tuple[int, int]:
        n = 1 if self.latent else self.n_groups
        return n * self.key_width, n * self.value_width

    @property
    def heads(self) -> Heads:
        (key_codes, value_codes), (key, value) = self.groups, self.widths
        key_row = row_bytes(key, key_codes)
        value_row = key_row if self.latent else row_bytes(value, value_codes)
        return Heads(
            n_groups=self.n_groups, per_group=self.per_group, key_width=self.key_width, value_width=self.value_width,
            key_slot=1, value_slot=1 if self.latent else 2, key_row=key_row, value_row=value_row,
            key_group=0 if self.latent else key_row // self.n_groups,
            value_group=0 if self.latent else value_row // self.n_groups, key_codes=key_codes, value_codes=value_codes,
        )  # fmt: skip

    def random(self, n_cached: int, n_tokens: int = 1, peak: float = 1.0) -> tuple[np.ndarray, list[np.ndarray]]:
        """queries float32 (T, H, key_width), and packed rows of keys and of values. peak: deviation of scores."""
        rng = np.random.default_rng([n_cached, n_tokens])
        queries = rng.standard_normal((n_tokens, self.heads.n_heads, self.key_width)) * peak / np.sqrt(self.key_width)
        packed = []
        for width, group in zip(self.widths, self.groups, strict=True):
            x = rng.standard_normal((n_cached, width)).astype(np.float32)
            rows = np.zeros((n_cached, row_bytes(width, group)), np.uint8)
            pack_rows.ctypes(x.ctypes.data, n_cached, width, group, rows.ctypes.data)
            packed.append(rows)
        return queries.astype(np.float32), packed[: 1 if self.latent else 2]


def attend(pool: Pool, case: Case, queries: np.ndarray, rows: list[np.ndarray], in_bytes: bool = False) -> np.ndarray:
    """float32 (T, H, V): of the last T cached tokens. What they must not read is NaN."""
    heads, n_cached, n_tokens = case.heads, len(rows[0]), len(queries)
    embedding, _ = kernels.random_weight("F32", (1, 1, 16), np.random.default_rng(0))
    program = Program(pool, embedding, np.ones(1), 1.0, 3)
    query_address = program.vector(heads.n_heads * heads.query_width)
    floats(query_address, n_tokens, heads.n_heads, heads.query_width)[..., : case.key_width] = queries
    out_address = program.vector(heads.n_heads * case.value_width + GUARD)
    out = floats(out_address, n_tokens * heads.n_heads * case.value_width + GUARD)
    out[:] = np.nan
    partials = aligned_bytes(n_tokens * heads.partials_bytes + 64 * GUARD)
    partials.view(np.float32)[:] = np.nan
    make = byte_attend_phase if in_bytes else attend_phase
    program.add(make(heads, query_address, program.keep(partials)))
    program.add(project_values_phase(heads, partials.ctypes.data, None, out_address))
    program.finish()
    blocks = [np.concatenate([part, np.full((GUARD, part.shape[1]), 0xFF, np.uint8)]) for part in rows]
    cache = np.array([0, *(block.ctypes.data for block in (blocks[0], blocks[-1]))], np.int64)
    program.run([0] * n_tokens, range(n_cached - n_tokens, n_cached), cache)
    assert np.all(np.isnan(out[-GUARD:])) and np.all(np.isnan(partials.view(np.float32)[-16 * GUARD :]))
    return out[:-GUARD].reshape(n_tokens, heads.n_heads, case.value_width).copy()


def expected(case: Case, queries: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """float64 (H, V) of one token."""
    parts = []
    for packed, width, group in zip(rows, case.widths, case.groups, strict=False):
        x = np.empty((len(packed), width), np.float16)
        expand_rows.ctypes(packed.ctypes.data, len(packed), width, group, x.ctypes.data)
        parts.append(x.astype(np.float64).reshape(len(packed), 1 if case.latent else case.n_groups, -1))
    heads = [0 if case.latent else head // case.per_group for head in range(case.heads.n_heads)]
    keys, values = parts[0][:, heads], parts[-1][:, heads, : case.value_width]
    scores = np.einsum("hd,shd->hs", queries.astype(np.float64), keys)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return np.einsum("hs,shv->hv", weights / weights.sum(1, keepdims=True), values)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The root mean square of the difference, of what is wanted."""
    assert found.shape == wanted.shape and np.all(np.isfinite(found))
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


MLA, GQA = Case(True, 1, 8, 80, 64), Case(False, 2, 3, 32, 48)
BYTES = {
    "8 heads": MLA,
    "V2-Lite's widths": Case(True, 1, 16, 576, 512),
    "2 groups": Case(True, 2, 16, 96, 64),
    "10 heads": Case(True, 2, 10, 208, 192),
    "an odd rest": Case(True, 1, 9, 71, 64),
}
needs_products = pytest.mark.skipif(not isa.has("avx512_vnni"), reason="no products of bytes at this level")


@pytest.mark.parametrize("n_cached", [1, 3, 64, 65, 200, FEW_UP_TO, FEW_UP_TO + 1, 5000])
@pytest.mark.parametrize("case", [MLA, GQA, BYTES["an odd rest"]], ids=["MLA", "GQA", "odd"])
def test_in_float32(pool: Pool, case: Case, n_cached: int) -> None:
    queries, rows = case.random(n_cached)
    assert error(attend(pool, case, queries, rows)[0], expected(case, queries[0], rows)) < TOLERANCE


@needs_products
@pytest.mark.parametrize("n_cached", [1, 2, 5, 63, 64, 65, 130, 200, FEW_UP_TO, FEW_UP_TO + 1, 5000])
@pytest.mark.parametrize("case", BYTES.values(), ids=BYTES)
def test_in_bytes(pool: Pool, case: Case, n_cached: int) -> None:
    queries, rows = case.random(n_cached)
    assert fits(case.heads)
    assert error(attend(pool, case, queries, rows, True)[0], expected(case, queries[0], rows)) < BYTE_TOLERANCE


@needs_products
@pytest.mark.parametrize("n_cached", [5, 200, 5000])
def test_peaks_in_bytes(pool: Pool, n_cached: int) -> None:
    """Scores that deviate by 4: weights far from their mean have two bytes."""
    case = BYTES["V2-Lite's widths"]
    queries, rows = case.random(n_cached, peak=4.0)
    assert error(attend(pool, case, queries, rows, True)[0], expected(case, queries[0], rows)) < 4 * BYTE_TOLERANCE


@needs_products
def test_a_sink_does_not_swallow_what_is_small(pool: Pool) -> None:
    """One row with half of the weight, 99 with the rest: a 99th of the largest each, 2.6 of a byte's 255.

    In one byte without a second they would be 3, which moves the result by a hundredth.
    """
    case = Case(True, 1, 16, 96, 64)
    queries, rows = np.zeros((1, 16, 96), np.float32), case.random(100)[1]
    queries[0, :, 64] = np.log(99)  # a column of 16 bits
    halves = rows[0][:, 68:].view(np.float16)
    halves[:] = 0
    halves[0, 0] = 1.0
    found, wanted = attend(pool, case, queries, rows, True)[0], expected(case, queries[0], rows)
    assert error(found, wanted) < 2e-3  # of weights' 16 bits, and rotated keys'


@needs_products
def test_flat_weights_have_one_byte(pool: Pool) -> None:
    """The same with equal weights, as where none is a peak: one byte, and no error to speak of."""
    case = Case(True, 1, 16, 96, 64)
    queries, rows = np.zeros((1, 16, 96), np.float32), case.random(500)[1]
    # Weights times rows' scales, which differ by 4 bits: rounded to a 255th of the largest.
    assert error(attend(pool, case, queries, rows, True)[0], expected(case, queries[0], rows)) < 0.01


@needs_products
@pytest.mark.parametrize("n_cached", [5, 66, FEW_UP_TO + 2, 4099])  # some tokens have fewer pieces
def test_tokens_together_are_tokens_alone(pool: Pool, n_cached: int) -> None:
    for case, in_bytes in ((MLA, True), (BYTES["10 heads"], True), (MLA, False), (GQA, False)):
        queries, rows = case.random(n_cached, 5)
        together = attend(pool, case, queries, rows, in_bytes)
        for t in range(5):
            seen = [np.ascontiguousarray(part[: n_cached - 4 + t]) for part in rows]
            assert np.array_equal(together[t], attend(pool, case, queries[t : t + 1], seen, in_bytes)[0])


@needs_products
def test_workers_do_not_change_the_result() -> None:
    queries, rows = MLA.random(1000)
    answers = []
    for n_workers in (1, 2, 3, 7):
        with closing(Pool(n_workers)) as pool:
            answers += [attend(pool, MLA, queries, rows, True) for _ in range(3)]
    assert all(np.array_equal(answers[0], answer) for answer in answers[1:])


@needs_products
def test_heads_do_not_change_each_other(pool: Pool) -> None:
    """A head with a peak among flat ones: a tile then has two bytes for all, and the same results."""
    case = BYTES["8 heads"]
    queries, rows = case.random(200)
    plain = attend(pool, case, queries, rows, True)[0]
    queries[0, 2] *= 8
    assert np.array_equal(np.delete(attend(pool, case, queries, rows, True)[0], 2, 0), np.delete(plain, 2, 0))


def test_where_bytes_do_not_fit() -> None:
    assert not fits(GQA.heads)
    for changes in ({"key_codes": 0}, {"per_group": 4}, {"per_group": 32}, {"key_codes": 48, "value_width": 48}):
        assert not fits(replace(MLA.heads, **changes))
