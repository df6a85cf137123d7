"""A few tokens in one call: programs of phases, and rows of matrices. Whole models: test_decode.py."""

from __future__ import annotations

from contextlib import closing

import kernels
import naive
import numpy as np
import pytest
from kernels import floats
from programs import LATE, add_late, pieces, rows_by_step, small_program

from quant.decode.linear import MOST_MATRICES, Input, normed, rows_phase
from quant.decode.program import (
    FEW_SPLITS,
    FEW_UP_TO,
    HEADER,
    MAX_SPLITS,
    MIN_SPLIT,
    MOST_TOKENS,
    NOTHING,
    PHASE,
    Phase,
    Program,
    chunk_length,
    most_splits,
)
from quant.errors import QuantError
from quant.simd.memory import store_i64
from quant.simd.struct import i64, pointer, struct
from quant.target.jit import kernel
from quant.threads.pool import Pool


def run(program: Program, position: int = 0, n_tokens: int = 1) -> None:
    program.run([0] * n_tokens, range(position, position + n_tokens), np.zeros(1, np.int64))


# ---- phases ----------------------------------------------------------------------------------------------------------


SUM_BEFORE = struct("SumBefore", phase=PHASE, inputs=pointer(i64), n_inputs=i64, outputs=pointer(i64))


@kernel("void(int64, int64, int64)")
def _sum_before(phase, item, work):
    """outputs[item] += 1 + item + the sum of all inputs."""
    a = SUM_BEFORE(phase)
    total = 1 + item
    for i in range(a.n_inputs):
        total += a.inputs[i]
    a.outputs[item] += total


def arguments_of(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    return SUM_BEFORE.pack(phase=HEADER, inputs=inputs.ctypes.data, n_inputs=len(inputs), outputs=outputs.ctypes.data)


NONE = np.zeros(0, np.int64)


def chain(pool: Pool, counts: list[int], add=Program.add) -> tuple[Program, list[np.ndarray]]:
    """Phases of `counts` units, each of which reads all that the phase before wrote; and where they write."""
    program, outs = small_program(pool), [np.zeros(0, np.int64)]
    for n_units in counts:
        outs.append(np.zeros(n_units, np.int64))
        add(program, Phase(NOTHING, _sum_before, n_units, arguments_of(outs[-2], outs[-1]), 64))
    program.finish()
    return program, outs[1:]


def sums(counts: list[int]) -> list[list[int]]:
    """What the phases of chain() write."""
    outs: list[list[int]] = [[]]
    for n_units in counts:
        outs.append([1 + unit + sum(outs[-1]) for unit in range(n_units)])
    return outs[1:]


@pytest.mark.parametrize("n_workers", [1, 2, 3, 8])
def test_a_phase_sees_all_of_the_one_before(n_workers: int) -> None:
    counts = [1, 2, 1, 3, 1, 7, 1, 1, 40, 1, 0, 2, 1, 5]  # a phase without work is passed through
    with closing(Pool(n_workers)) as pool:
        program, outs = chain(pool, counts)
        for _ in range(500):
            for out in outs:
                out[:] = 0
            run(program)
            assert [out.tolist() for out in outs] == sums(counts)


@pytest.mark.levels
@pytest.mark.parametrize("n_tokens", range(1, MOST_TOKENS + 1))
@pytest.mark.parametrize("n_cached", [5, 63, 64, 65, FEW_UP_TO, FEW_UP_TO + 3, 10**5])
def test_units_of_every_piece_and_token_run_once(pool: Pool, n_cached: int, n_tokens: int) -> None:
    """n_cached: what the last token sees. The longest of the contexts says how many pieces."""
    program, out = small_program(pool), np.zeros(3 * MAX_SPLITS * MOST_TOKENS + 1, np.int64)
    program.add(Phase(NOTHING, _sum_before, 3, arguments_of(NONE, out), 64, per_token=True, per_split=True))
    program.finish()
    run(program, n_cached - n_tokens, n_tokens)
    n_units = 3 * n_tokens * max(most_splits(n_cached - t) for t in range(n_tokens))
    assert out.tolist() == [*range(1, n_units + 1), *[0] * (len(out) - n_units)]


@pytest.mark.levels
@pytest.mark.parametrize("unit", [1, 4, MIN_SPLIT])
def test_pieces_cover_the_context(unit: int) -> None:
    """They are whole units, none longer by more than one, and no more than there is memory for."""
    edges = [n + i for n in (FEW_SPLITS * MIN_SPLIT, FEW_UP_TO, MAX_SPLITS * MIN_SPLIT) for i in (0, 1)]
    for n_cached in [*range(1, 200), *range(1, 6000, 61), *edges, 10**5, 10**6]:
        begins = pieces(n_cached, unit)
        assert begins[0] == 0 and begins[-1] == n_cached
        assert len(begins) - 1 == most_splits(n_cached) <= MAX_SPLITS
        assert all(begin % unit == 0 for begin in begins[:-1])
        lengths = np.diff(-(-np.array(begins) // unit))
        assert lengths.max() - lengths.min() <= 1 and lengths.min() >= (unit < MIN_SPLIT)


def test_how_many_pieces() -> None:
    """By hand; and never fewer of more tokens: whoever hands them out by the longest of contexts counts on that."""
    by_hand = {1: 1, 64: 1, 65: 2, 960: 15, 961: 16, 1024: 16, 1025: 16, 1536: 16, 1537: 32, 10**6: 32}
    assert {n: most_splits(n) for n in by_hand} == by_hand
    counts = [len(pieces(n)) for n in range(1, 2500)]
    assert counts == sorted(counts)


@kernel("void(int64, int64, int64)")
def _chunk_length(n, most, out):
    store_i64(out, chunk_length(n, most))


def test_chunks_are_few_and_whole_tiles() -> None:
    """The first length that makes as few of them as the longest one."""
    out = np.zeros(1, np.int64)
    for n in [*range(1, 300), 1000, 4097]:
        for most in (64, 96, 128):
            kernels.call(_chunk_length, n, most, out)
            assert out[0] == next(length for length in range(16, most + 1, 16) if -(-n // length) == -(-n // most))


def test_a_step_can_end_with_a_phase(pool: Pool) -> None:
    """Those behind it are left out, this time only."""
    program, outs = small_program(pool), [np.zeros(2, np.int64) for _ in range(3)]
    for name, out in zip(("first", "second", "third"), outs, strict=True):
        program.add(Phase(NOTHING, _sum_before, 2, arguments_of(NONE, out), 64), name)
    program.finish()
    assert program.names == ["first", "second", "third"]
    program.run([0], [0], np.zeros(1, np.int64), until="second")
    assert [out.tolist() for out in outs] == [[1, 2], [1, 2], [0, 0]]
    run(program)
    assert [out.tolist() for out in outs] == [[2, 4], [2, 4], [1, 2]]
    with pytest.raises(QuantError, match="no phase is called 'fourth'"):
        program.run([0], [0], np.zeros(1, np.int64), until="fourth")


@pytest.mark.parametrize("n_tokens", [0, MOST_TOKENS + 1])
def test_steps_of_too_many_tokens_are_refused(pool: Pool, n_tokens: int) -> None:
    program = small_program(pool)
    program.add(Phase(NOTHING, _sum_before, 0, arguments_of(NONE, NONE), 64))
    program.finish()
    with pytest.raises(QuantError, match=f"{n_tokens} tokens in a step; it takes 1 to {MOST_TOKENS}"):
        run(program, 0, n_tokens)


# ---- rows of matrices ------------------------------------------------------------------------------------------------

ROWS = {
    "one float matrix": [("F32", 7)],
    "float and integer together": [("F32", 9), ("Q8_0", 33), ("F16", 1)],
    "most": [("F32", 8)] * MOST_MATRICES,
    "many rows": [("Q4_0", 1003), ("BF16", 517)],
}


@pytest.mark.levels
@pytest.mark.parametrize("residual", [False, True], ids=["instead", "added"])
@pytest.mark.parametrize("kind", ["plain", "norm", "gated"])
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, kind: str, residual: bool) -> None:
    rng, n_cols = np.random.default_rng(0), 96 if len(ROWS[name]) > 1 else 83
    x, second = rng.standard_normal((2, n_cols)).astype(np.float32)
    silu = x / (1 + np.exp(-x.astype(np.float64))) * second
    seen = {"plain": x, "norm": naive.rms_norm(x.astype(np.float64), second, 0.01), "gated": silu}[kind]
    weights, values = zip(*(kernels.random_weight(type_, (1, n, n_cols), rng) for type_, n in ROWS[name]), strict=True)
    for weight, matrix, found in zip(weights, values, rows_by_step(weights, kind, x, second, residual, 2), strict=True):
        rounded = kernels.rounded(seen.astype(np.float32), weight.format).astype(np.float64)
        # Float32 rounding of sums; where it tips an 8-bit rounding of the input, one step of 1/127 in one of 96 terms.
        bound = 2e-3 if weight.format.integer and kind != "plain" else 2**-20
        magnitude = np.abs(matrix[0]) @ np.abs(rounded) + 0.25
        assert np.all(np.abs(found - (matrix[0] @ rounded + 0.25 * residual)) <= bound * magnitude)


@pytest.mark.levels
@pytest.mark.parametrize("residual", [False, True], ids=["instead", "added"])
@pytest.mark.parametrize("name", ROWS)
def test_workers_do_not_change_rows(name: str, residual: bool) -> None:
    rng = np.random.default_rng(1)
    weights = [kernels.random_weight(type_, (1, n_rows, 96), rng)[0] for type_, n_rows in ROWS[name]]
    x, second = rng.standard_normal((2, 96)).astype(np.float32)
    answers = [rows_by_step(weights, "norm", x, second, residual, n) for n in (1, 2, 3, 7)]
    assert all(np.array_equal(a, b) for other in answers[1:] for a, b in zip(answers[0], other, strict=True))


@pytest.mark.levels
@pytest.mark.parametrize("residual", [False, True], ids=["instead", "added"])
@pytest.mark.parametrize("kind", ["plain", "norm", "gated"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_tokens_together_are_those_of_tokens_alone(pool: Pool, name: str, kind: str, residual: bool) -> None:
    """Each matrix's outputs of all tokens lie together; those of tokens that are not there stay."""
    rng, n_cols = np.random.default_rng(2), 96 if len(ROWS[name]) > 1 else 83
    weights = [kernels.random_weight(type_, (1, n_rows, n_cols), rng)[0] for type_, n_rows in ROWS[name]]
    x_TD, second_TD = rng.standard_normal((2, MOST_TOKENS, n_cols)).astype(np.float32)
    alone = [
        rows_by_step(weights, kind, x, second_TD[0 if kind == "norm" else t], residual, 2) for t, x in enumerate(x_TD)
    ]
    program = small_program(pool, x_TD)
    address = program.vector(n_cols)
    floats(address, MOST_TOKENS, n_cols)[:] = second_TD
    plain = Input(program.x)
    input_ = {"plain": plain, "norm": Input(program.x, address, 0.01), "gated": Input(program.x, up=address)}[kind]
    outs = [program.vector(weight.n_rows) for weight in weights]
    program.add(rows_phase(input_, list(zip(weights, outs, strict=True)), 2, residual))
    program.finish()
    for n_tokens in range(2, MOST_TOKENS + 1):
        found = [floats(out, MOST_TOKENS, weight.n_rows) for out, weight in zip(outs, weights, strict=True)]
        for vectors in found:
            vectors[:] = 0.25
        program.run(range(n_tokens), range(n_tokens), np.zeros(1, np.int64))
        for m, vectors in enumerate(found):
            assert np.array_equal(vectors[:n_tokens], np.stack([rows[m] for rows in alone[:n_tokens]]))
            assert np.all(vectors[n_tokens:] == 0.25)


@pytest.mark.parametrize("head_from", range(4))
def test_a_head_leaves_out_the_first_tokens(pool: Pool, head_from: int) -> None:
    rng = np.random.default_rng(3)
    weight, values = kernels.random_weight("F32", (1, 50, 48), rng)
    x_TD = rng.standard_normal((3, 48)).astype(np.float32)
    program = small_program(pool, x_TD)
    out = program.vector(50)
    norm = np.ones(48, np.float32)
    input_ = Input(program.x, program.keep(norm), 1e-6)
    program.add(rows_phase(input_, [(weight, out)], 2, is_head=True))
    program.finish()
    program.run(range(3), range(3), np.zeros(1, np.int64), head_from)
    expected = naive.rms_norm(x_TD.astype(np.float64), norm, 1e-6)
    found = floats(out, MOST_TOKENS, 50)
    assert np.all(found[[*range(head_from), 3, 4]] == 0)
    # Float32 rounding of sums of 48 terms near 1.
    np.testing.assert_allclose(found[head_from:3], (expected @ values[0].T)[head_from:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(normed(input_, 1, 3, 48), expected[1:], rtol=1e-6)


@pytest.mark.levels
@pytest.mark.parametrize("type_", ["F32", "Q8_0"])
def test_two_normed_vectors_side_by_side(pool: Pool, type_: str) -> None:
    """Each with a weight and a length of its own; as the same columns, taken as they are."""
    rng = np.random.default_rng(4)
    weight, _ = kernels.random_weight(type_, (1, 70, 192), rng)
    x_TD, beside_TD = (rng.standard_normal((2, 3, 96)) * [[[1.0]], [[7.0]]]).astype(np.float32)
    norms = [(1 + 0.1 * rng.standard_normal(96)).astype(np.float32) for _ in range(2)]
    program = small_program(pool, x_TD)
    x_norm, beside_norm = (program.keep(norm) for norm in norms)
    beside, both, found, expected = program.vector(96), program.vector(192), program.vector(70), program.vector(70)
    floats(beside, 3, 96)[:] = beside_TD
    columns = floats(both, 3, 192)
    program.add(
        rows_phase(Input(program.x, x_norm, 0.01, beside=beside, beside_norm=beside_norm), [(weight, found)], 2)
    )
    program.add(rows_phase(Input(both), [(weight, expected)], 2))
    program.finish()
    for _ in range(2):  # normed() needs the vectors that a step leaves
        program.run(range(3), range(3), np.zeros(1, np.int64))
        columns[:, :96] = normed(Input(program.x, x_norm, 0.01), 0, 3, 96)
        columns[:, 96:] = normed(Input(beside, beside_norm, 0.01), 0, 3, 96)
    reference = [
        naive.rms_norm(part.astype(np.float64), norm, 0.01) for part, norm in zip((x_TD, beside_TD), norms, strict=True)
    ]
    np.testing.assert_allclose(columns, np.concatenate(reference, 1), rtol=1e-6)
    assert np.array_equal(floats(found, 3, 70), floats(expected, 3, 70))


def test_matrices_that_do_not_share_an_input_are_refused() -> None:
    rng = np.random.default_rng(0)
    narrow, wide = (kernels.random_weight("F32", (1, 4, n), rng)[0] for n in (16, 32))
    with pytest.raises(QuantError, match="2 matrices do not share a phase"):
        rows_phase(Input(0), [(narrow, 0), (wide, 0)], 1)
    with pytest.raises(QuantError, match=f"{MOST_MATRICES + 1} matrices"):
        rows_phase(Input(0), [(narrow, 0)] * (MOST_MATRICES + 1), 1)


# ---- workers that come late ------------------------------------------------------------------------------------------


@pytest.mark.levels
@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
def test_late_workers_in_a_chain(late: int) -> None:
    counts, missed = [1, 3, 1, 2, 8, 1, 2, 1], np.zeros(1, np.int64)
    with closing(Pool(4)) as pool:
        program, outs = chain(pool, counts, add_late(late, missed))
        for _ in range(30):
            for out in outs:
                out[:] = 0
            run(program)
            assert [out.tolist() for out in outs] == sums(counts)
    assert missed[0] > 0
