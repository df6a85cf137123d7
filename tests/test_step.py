"""One token in one call: programs of phases, rows of matrices, and whole models against the network in torch.

Tolerances on logits are fractions of their range.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import kernels
import llama_cpp_oracle
import naive
import numpy as np
import pytest
import test_isa
import tiny_models
import torch
from numba import types
from test_engine import QUANTIZED_TOLERANCE, SESSION_TOLERANCE
from test_logits import MIXES, error, rms_error
from test_step_attention import floats

import localrun
from localrun.cache import Cache
from localrun.engine import Engine
from localrun.errors import ContextFullError
from quant import formats, linear
from quant.atomics import atomic_add, atomic_load, call_2, call_3
from quant.errors import QuantError
from quant.jit import kernel
from quant.pool import Pool
from quant.simd import load_i64, store_i64
from quant.step import (
    ARGUMENTS,
    CHUNK,
    LEAST_CHUNK,
    MOST_CHUNKS,
    N_CHUNKS,
    N_UNITS,
    NEXT,
    NOTHING,
    PHASE_BYTES,
    STATE,
    WORK,
    WORK_BYTES,
    Phase,
    Program,
)
from quant.step_rows import MOST_MATRICES, Input, rows_phase

# Between the step and torch on the same cache rows only the order of float32 sums differs: up to 8e-7 here.
ROUNDING_TOLERANCE = 3e-6
# Where it tips the rounding of an activation to 8 bits, cache rows differ by QUANTIZED_TOLERANCE of their range of 6.
ROW_TOLERANCE = 0.2


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with closing(Pool(2)) as two_workers:
        yield two_workers


def small_program(pool: Pool, x: np.ndarray | None = None, n_frequencies: int = 1) -> Program:
    """A program whose token 0 is the vector x, without phases."""
    x = np.zeros(16, np.float32) if x is None else x
    weight = linear.weight(x.view(np.uint8), formats.get("F32"), (1, x.size))
    return Program(pool, weight, np.linspace(0.1, 1, n_frequencies), 1.0, 1)


def run(program: Program, position: int = 0) -> None:
    program.run(0, position, np.zeros(1, np.int64))


# ---- phases ----------------------------------------------------------------------------------------------------------


@kernel("void(int64, int64, int64)")
def _sum_before(phase, unit, work):
    """Arguments: inputs, how many, outputs. outputs[unit] += 1 + unit + the sum of all inputs."""
    total = 1 + unit
    for i in range(load_i64(phase + ARGUMENTS + 8)):
        total += load_i64(load_i64(phase + ARGUMENTS) + 8 * i)
    out = load_i64(phase + ARGUMENTS + 16) + 8 * unit
    store_i64(out, load_i64(out) + total)


def chain(pool: Pool, counts: list[int], add=Program.add) -> tuple[Program, list[np.ndarray]]:
    """Phases of `counts` units, each of which reads all that the phase before wrote; and where they write."""
    program, outs = small_program(pool), [np.zeros(0, np.int64)]
    for n_units in counts:
        outs.append(np.zeros(n_units, np.int64))
        words = [outs[-2].ctypes.data, len(outs[-2]), outs[-1].ctypes.data]
        add(program, Phase(NOTHING, _sum_before.address, n_units, words, 64))
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


@pytest.mark.parametrize("n_cached", [1, 63, 64, 65, 4096, 10**5])
def test_units_of_every_piece_run_once(pool: Pool, n_cached: int) -> None:
    program, out = small_program(pool), np.zeros(3 * MOST_CHUNKS + 1, np.int64)
    words = [0, 0, out.ctypes.data]
    program.add(Phase(NOTHING, _sum_before.address, 3, words, 64, per_chunk=True))
    program.finish()
    run(program, n_cached - 1)
    n_units = 3 * int(program._program[N_CHUNKS // 8])
    assert out.tolist() == [*range(1, n_units + 1), *[0] * (len(out) - n_units)]


def test_pieces_cover_the_context(pool: Pool) -> None:
    """They are whole tiles, and no more than there is memory for."""
    program = small_program(pool)
    program.add(Phase(NOTHING, _sum_before.address, 0, [0, 0, 0], 64))
    program.finish()
    full = MOST_CHUNKS * LEAST_CHUNK
    for n_cached in [*range(1, 200), *range(full - 3, full + 4), *range(full, 6 * full, 61), 10**5, 10**6]:
        run(program, n_cached - 1)
        chunk, n_chunks = int(program._program[CHUNK // 8]), int(program._program[N_CHUNKS // 8])
        assert chunk >= LEAST_CHUNK and chunk % LEAST_CHUNK == 0
        assert n_chunks <= MOST_CHUNKS
        assert chunk * (n_chunks - 1) < n_cached <= chunk * n_chunks


# ---- rows of matrices ------------------------------------------------------------------------------------------------

ROWS = {
    "one float matrix": [("F32", 7)],
    "float and integer together": [("F32", 9), ("Q8_0", 33), ("F16", 1)],
    "most": [("F32", 8)] * MOST_MATRICES,
    "many rows": [("Q4_0", 1003), ("BF16", 517)],
}


def rows_by_step(
    weights: list[linear.Weight], kind: str, x: np.ndarray, second: np.ndarray, residual: bool, n_workers: int
) -> list[np.ndarray]:
    """Each matrix times the input of this kind, float32; with `residual` added to vectors of 0.25."""
    with closing(Pool(n_workers)) as pool:
        program = small_program(pool, x)
        address = program.keep(second)
        plain = Input(program.x)
        input_ = {"plain": plain, "norm": Input(program.x, address, 0.01), "gated": Input(program.x, up=address)}[kind]
        outs = [program.vector(weight.n_rows + 16) for weight in weights]
        found = [floats(out, weight.n_rows + 16) for weight, out in zip(weights, outs, strict=True)]
        for vector in found:
            vector[:] = 0.25
        program.add(rows_phase(input_, list(zip(weights, outs, strict=True)), n_workers, residual))
        program.finish()
        run(program)
        assert all(np.all(vector[-16:] == 0.25) for vector in found)
        return [vector[:-16].copy() for vector in found]


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


@pytest.mark.parametrize("residual", [False, True], ids=["instead", "added"])
@pytest.mark.parametrize("name", ROWS)
def test_workers_do_not_change_rows(name: str, residual: bool) -> None:
    rng = np.random.default_rng(1)
    weights = [kernels.random_weight(type_, (1, n_rows, 96), rng)[0] for type_, n_rows in ROWS[name]]
    x, second = rng.standard_normal((2, 96)).astype(np.float32)
    answers = [rows_by_step(weights, "norm", x, second, residual, n) for n in (1, 2, 3, 7)]
    assert all(np.array_equal(a, b) for other in answers[1:] for a, b in zip(answers[0], other, strict=True))


def test_matrices_that_do_not_share_an_input_are_refused() -> None:
    rng = np.random.default_rng(0)
    narrow, wide = (kernels.random_weight("F32", (1, 4, n), rng)[0] for n in (16, 32))
    with pytest.raises(QuantError, match="2 matrices do not share a phase"):
        rows_phase(Input(0), [(narrow, 0), (wide, 0)], 1)
    with pytest.raises(QuantError, match=f"{MOST_MATRICES + 1} matrices"):
        rows_phase(Input(0), [(narrow, 0)] * (MOST_MATRICES + 1), 1)


# ---- workers that come late ------------------------------------------------------------------------------------------

_sleep = types.ExternalFunction("usleep", types.int32(types.uint32))
_LATE_WORKERS, _N_MISSED, _PREPARE, _RUN = range(PHASE_BYTES - 32, PHASE_BYTES, 8)  # at the end of a phase's record


@kernel("void(int64, int64)")
def _late_prepare(phase, work):
    """Workers of a set sleep before they prepare; counts those whose phase has then gone by without them."""
    state = load_i64(phase + STATE)
    worker = (work - load_i64(state + WORK)) // load_i64(state + WORK_BYTES)
    if (load_i64(phase + _LATE_WORKERS) >> worker) & 1:
        _sleep(types.uint32(200))
        if atomic_load(phase + NEXT) >= load_i64(phase + N_UNITS):
            atomic_add(load_i64(phase + _N_MISSED), 1)
    call_2(load_i64(phase + _PREPARE), phase, work)


@kernel("void(int64, int64, int64)")
def _late_run(phase, unit, work):
    """Some units take long."""
    if (unit + phase // PHASE_BYTES) % 5 == 0:
        _sleep(types.uint32(100))
    call_3(load_i64(phase + _RUN), phase, unit, work)


def add_late(late_workers: int, missed: np.ndarray):
    """Program.add for phases to which the workers in the set of bits `late_workers` come late."""
    add = Program.add

    def add_one(program: Program, phase: Phase) -> None:
        padding = [0] * ((_LATE_WORKERS - ARGUMENTS) // 8 - len(phase.arguments))
        words = [*phase.arguments, *padding, late_workers, missed.ctypes.data, phase.prepare, phase.run]
        late = dataclasses.replace(phase, prepare=_late_prepare.address, run=_late_run.address, arguments=words)
        add(program, late)

    return add_one


LATE = {"the caller": 0b1, "the second": 0b10, "all but the caller": 0b1110, "all": 0b1111}


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


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
@pytest.mark.parametrize("variant", ["v3", "llama", "wide"])
def test_late_workers_do_not_change_the_logits(variant: str, late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ids = quantised("wide", "Q4_K_M") if variant == "wide" else tiny_models.shared(variant), range(8)
    with localrun.load(path, threads=1, ctx=16) as model:
        expected = one_by_one(model, ids)
    missed = np.zeros(1, np.int64)
    monkeypatch.setattr(Program, "add", add_late(late, missed))
    with localrun.load(path, threads=4, ctx=16) as model:
        assert np.array_equal(one_by_one(model, ids), expected)
    assert missed[0] > 0


# ---- whole models ----------------------------------------------------------------------------------------------------

VARIANTS = list(tiny_models.VARIANTS)
QUANTISED = [
    ("wide", "Q4_K_M"), ("wide", "Q8_0"), ("wide", "MXFP4_MOE"), ("wide", "F16"), ("wide-odd", "Q4_K_M"),
    ("wide-odd", "IQ4_XS"), ("llama-wide", "Q4_K_M"), ("llama-wide", "Q4_1"), ("llama-wide", "Q5_0"),
    ("llama-wide", "IQ4_NL"), ("llama-wide", "BF16"),
]  # fmt: skip


def quantised(variant: str, mix: str) -> Path:
    return tiny_models.shared(variant, type=MIXES[mix])


def one_by_one(model: Engine, ids: list[int] | range, cache: Cache | None = None) -> np.ndarray:
    """float32 (T, vocab): the step's logits."""
    cache = cache or model.new_cache()
    assert not cache.is_exact
    return np.concatenate([model.model.forward([token], cache) for token in ids])


def torch_on_the_same_rows(model: Engine, token: int, cache: Cache, atol: float) -> np.ndarray:
    """float32 (vocab,): torch's logits of the cache's last token, over the rows that the step has left.

    Its own rows of that token are compared instead of written: rounding to 16 bits is 2^-11 of the value, and a sum
    near zero differs by what its terms had (`atol`; rows have a standard deviation of 1).
    """

    def compare(layer: int, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept = tuple(torch.from_numpy(np.asarray(part)[: cache.length + 1]) for part in cache._layers[layer])
        for part, new in zip(kept, rows, strict=True):
            torch.testing.assert_close(part[-1:].float(), new, rtol=2**-11 + 1e-5, atol=atol)
        return kept

    cache.truncate(cache.length - 1)
    cache.append, cache.is_exact = compare, True
    logits = model.model.forward([token], cache)[0]
    cache.is_exact = False
    del cache.append
    return logits


def both_ways(
    model: Engine, ids: list[int], cache: Cache | None = None, atol: float = 2e-5
) -> tuple[np.ndarray, np.ndarray]:
    """float32 (T, vocab) twice: the step's logits, and torch's on the same cache."""
    cache = cache or model.new_cache()
    step, by_torch = [], []
    for token in ids:
        step.append(one_by_one(model, [token], cache)[0])
        by_torch.append(torch_on_the_same_rows(model, token, cache, atol))
    return np.stack(step), np.stack(by_torch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_is_the_network(variant: str) -> None:
    with localrun.load(tiny_models.shared(variant), threads=2, ctx=64) as model:
        assert error(*both_ways(model, tiny_models.prompt(variant))) < ROUNDING_TOLERANCE


@pytest.mark.parametrize(("variant", "mix"), QUANTISED, ids=lambda value: value)
def test_the_step_is_the_network_quantised(variant: str, mix: str) -> None:
    path = quantised(variant, mix)
    with localrun.load(path, threads=2, ctx=64) as model:
        ids = naive.steady_prompt(path, 40)
        if mix in ("F16", "BF16"):
            assert error(*both_ways(model, ids)) < ROUNDING_TOLERANCE
        else:
            assert error(*both_ways(model, ids, atol=ROW_TOLERANCE)) < QUANTIZED_TOLERANCE


def test_the_step_is_the_network_with_a_quantised_joint_kv_b() -> None:
    """Its k_b is multiplied from the other side, in float32."""
    path = tiny_models.shared("v3-legacy-kv-b", type={"attn_kv_b": "Q8_0"})
    ids, reference = tiny_models.token_ids("v3-legacy-kv-b", 64), naive.Naive(path)
    reference.logits(ids)
    sure = reference.margins > 0.003  # where rounding the mix to 8 bits does not choose other experts
    assert sure.sum() >= 20
    with localrun.load(path, threads=2, ctx=64) as model:
        step, by_torch = both_ways(model, ids, atol=ROW_TOLERANCE)
    assert error(step[sure], by_torch[sure]) < QUANTIZED_TOLERANCE


@pytest.mark.parametrize(
    "variant",
    [
        "v2", "v2-no-groups", "v3-all-moe", "v3-fused-gate-up", "v3-tied", "kimi-k2", "yarn-no-log-multiplier",
        "llama-mha", "llama-rope-freqs", "llama-linear-rope",
    ],
)  # fmt: skip
def test_logits_equal_the_float64_reference(variant: str) -> None:
    path, ids = tiny_models.shared(variant), tiny_models.prompt(variant)
    with localrun.load(path, threads=2, ctx=64) as model:
        assert error(one_by_one(model, ids), naive.Naive(path).logits(ids)) < SESSION_TOLERANCE


@pytest.mark.parametrize("variant", ["v3-odd", "v3-no-bias", "llama-tied"])
def test_logits_equal_llama_cpps(variant: str) -> None:
    path, ids = tiny_models.shared(variant), tiny_models.prompt(variant)
    with localrun.load(path, threads=2, ctx=64) as model:
        assert error(one_by_one(model, ids), llama_cpp_oracle.logits(path, ids)) < SESSION_TOLERANCE


@pytest.mark.parametrize(("variant", "mix"), [("wide", "Q4_K_M"), ("llama-wide", "Q4_1")])
def test_quantised_logits_are_as_exact_as_llama_cpps(variant: str, mix: str) -> None:
    """As in test_logits.py; the 16-bit cache costs a hundredth of what rounding activations does."""
    path = quantised(variant, mix)
    twin = tiny_models.shared_twin(path)
    ids = naive.steady_prompt(twin, 96)
    truth = llama_cpp_oracle.logits(twin, ids)
    theirs = rms_error(llama_cpp_oracle.logits(path, ids), truth)
    with localrun.load(path, threads=2, ctx=128) as model:
        assert rms_error(one_by_one(model, ids), truth) <= 1.2 * theirs


@pytest.mark.parametrize("mix", ["F32", "quantised"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_workers_do_not_change_the_logits(variant: str, mix: str) -> None:
    """Nor does doing it again."""
    path = tiny_models.shared(variant, type=tiny_models.Q4_K_M if mix == "quantised" else "F32")
    ids, answers = tiny_models.token_ids(variant, 6), []
    for threads in (1, 2, 3):
        with localrun.load(path, threads=threads, ctx=16) as model:
            answers += [one_by_one(model, ids) for _ in range(2)]
    assert all(np.array_equal(answers[0], answer) for answer in answers[1:])


@pytest.mark.parametrize("variant", ["wide", "llama", "llama-mha"])
def test_far_into_the_context(variant: str) -> None:
    """4200 tokens by prefill, then steps: pieces of the context are longer than a tile."""
    path, n_before = tiny_models.shared(variant), 4200
    assert n_before > MOST_CHUNKS * LEAST_CHUNK
    with localrun.load(path, threads=2, ctx=64) as model:
        cache, ids = model.model.new_cache(n_before + 8), tiny_models.token_ids(variant, n_before)
        for first in range(0, n_before, 600):
            model.model.forward(ids[first : first + 600], cache)
        step, by_torch = both_ways(model, [1, 2, 3, 4, 5, 6, 7, 8], cache)
        assert cache.length == n_before + 8
    assert error(step, by_torch) < ROUNDING_TOLERANCE


# ---- what a step leaves behind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["v3", "llama"])
def test_a_full_context_is_left_as_it_is(variant: str) -> None:
    with localrun.load(tiny_models.shared(variant), threads=2, ctx=8) as model:
        cache = model.new_cache()
        expected = one_by_one(model, range(8), cache)
        before = {name: np.array(rows) for name, rows in cache.save().items()}
        with pytest.raises(ContextFullError, match="the context is full: 9 tokens, room for 8"):
            model.model.forward([3], cache)
        assert cache.length == 8
        assert all(np.array_equal(rows, before[name]) for name, rows in cache.save().items())
        cache.truncate(7)
        assert np.array_equal(one_by_one(model, [7], cache)[0], expected[7])


def test_a_step_writes_one_row_of_each_block() -> None:
    with localrun.load(tiny_models.shared("llama"), threads=2, ctx=8) as model:
        cache = model.new_cache()
        blocks = [np.asarray(part) for parts in cache._layers for part in parts]
        for block in blocks:
            block[:] = 0.5
        one_by_one(model, [1], cache)
        one_by_one(model, [2], cache)
        assert all((block[:2] != 0.5).any(1).all() and (block[2:] == 0.5).all() for block in blocks)


def test_logits_stay_after_the_next_step() -> None:
    with localrun.load(tiny_models.shared("llama"), threads=1, ctx=8) as model:
        cache = model.new_cache()
        first = model.model.forward([1], cache)
        kept = first.copy()
        model.model.forward([2], cache)
        assert np.array_equal(first, kept)


def test_two_caches_in_turn() -> None:
    prompts = ([1, 2, 3, 4], [5, 6, 7, 8])
    with localrun.load(tiny_models.shared("v3"), threads=2, ctx=8) as model:
        alone = [one_by_one(model, ids) for ids in prompts]
        caches = [model.new_cache() for _ in prompts]
        for i in range(4):
            for ids, cache, expected in zip(prompts, caches, alone, strict=True):
                assert np.array_equal(one_by_one(model, [ids[i]], cache)[0], expected[i])


def test_workers_sleep_after_a_reply_and_end_with_close() -> None:
    def workers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("localrun-")]

    before = workers()
    model = localrun.load(tiny_models.shared("v3"), threads=3, ctx=16)
    assert len(list(model.generate([1, 2, 3], localrun.Sampling(temperature=0.0), max_tokens=8))) == 8
    assert len(workers()) == len(before) + 2
    time.sleep(0.1)
    used = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - used < 0.1  # a spinning worker would use all of the 0.3 s
    model.close()
    assert workers() == before


# ---- other machines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", test_isa.LOWER)
def test_the_step_at_a_lower_level(level: str) -> None:
    """All of the parts; of whole models some."""
    parts = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("vectors", "step_attention", "step_experts")]
    some = "test_the_step_is_the_network and (v3-odd or legacy or llama-mha or wide-Q4_K_M or llama-wide-Q4_1)"
    wholes = [__file__, "-k", f"({some}) or rows or late or pieces"]
    for tests in (parts, wholes):
        done = test_isa.run(level, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)
        assert done.returncode == 0, done.stdout[-3000:]
