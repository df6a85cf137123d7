"""Workers on NUMA nodes, made up where this machine has one: whose items are whose, and that nothing else changes."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from contextlib import closing

import kernels
import numpy as np
import pytest
from programs import small_program

from quant.decode.experts import expert_phases
from quant.decode.linear import Input, rows_phase
from quant.decode.parts import GroupPart, Part
from quant.decode.program import HEADER, NOTHING, PHASE, STEP, Phase, Program
from quant.decode.program import _begin as begin
from quant.decode.router import Choice
from quant.matrix import ExpertMatrices, QuantMatrix
from quant.ops.experts import run as run_experts
from quant.simd.struct import atomic, pointer, struct
from quant.simd.struct import i64 as word
from quant.target.jit import kernel
from quant.threads.atomics import atomic_add
from quant.threads.numa import ITEMS, Items, Spread, take
from quant.threads.pool import Pool
from quant.threads.work_items import busiest, rows_of_item

HERE = sorted(os.sched_getaffinity(0))
NODES = (HERE, HERE, HERE)  # three nodes by name: memory is the same from each
TAKEN = struct("TakenItems", items=ITEMS, n=word, out=pointer(word))
LOG = struct("ItemsLog", phase=PHASE, n=atomic, items=pointer(word))


@kernel("void(int64, int64, int64)")
def _log(phase, item, work):
    log = LOG(phase)
    log.items[atomic_add(log.n, 1)] = item


def items_in_order(n_workers: int, cores: Sequence[Sequence[int]], worker: int, n_items: int, period: int) -> list[int]:
    """What a worker takes that is alone."""
    with closing(Pool(n_workers, cores)) as pool:
        program = small_program(pool)
        items = np.full(n_items, -1, np.int64)
        log = LOG.pack(phase=HEADER, n=0, items=items.ctypes.data)
        program.add(Phase(NOTHING, _log, n_items, log, 0, period=period))
        program.finish()
        begin.ctypes(program.address)
        STEP.ctypes(program.address, worker)
        return items.tolist()


def test_workers_are_spread_by_cores() -> None:
    spread = Spread(64, (range(48), range(48, 64)))
    assert spread.before.tolist() == [0, 48, 64] and np.bincount(spread.node_of).tolist() == [48, 16]
    assert spread.own(100, 0) == (0, 75) and spread.own(100, 1) == (75, 25)
    assert Spread(3).n_nodes == 1 and Spread(3).own(7, 0) == (0, 7) and Spread(3).node_of.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("n_workers", "period"), [(1, 5), (2, 1), (5, 16), (64, 7), (128, 1000)])
def test_every_item_is_one_nodes(n_workers: int, period: int) -> None:
    spread = Spread(n_workers, NODES)
    owned = [first + i for node in range(3) for first, count in [spread.own(period, node)] for i in range(count)]
    assert owned == list(range(period))


def test_a_worker_takes_its_own_nodes_items_first() -> None:
    """Node 1 of two has items 2 and 3 of each row of four; it then helps the other."""
    assert items_in_order(2, NODES[:2], 1, 8, 4) == [2, 3, 6, 7, 0, 1, 4, 5]
    assert items_in_order(2, NODES[:2], 0, 8, 4) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert items_in_order(2, (), 1, 8, 4) == list(range(8))


def step_results(pool: Pool, weights: list[QuantMatrix], experts: ExpertMatrices, x: np.ndarray) -> np.ndarray:
    """Rows of two matrices, then experts with a sum, of three tokens."""
    program, hidden = small_program(pool, x), x.shape[1]
    ids, gates = np.array([[0, 2], [3, 1], [2, 3]]), np.array([[0.3, 0.7]] * 3, np.float32)
    rows = [program.vector(weight.n_rows) for weight in weights]
    out, gate_out, up_out = (program.vector(2 * max(hidden, experts.gate.n_rows)) for _ in range(3))
    full_ids, full_gates = np.full((8, 2), -1), np.zeros((8, 2), np.float32)
    full_ids[:3], full_gates[:3] = ids, gates
    choice = Choice(program.keep(full_ids), program.keep(full_gates), 4, 2)
    program.add(rows_phase(Input(program.x), list(zip(weights, rows, strict=True)), pool.n_workers))
    for phase in expert_phases(Input(program.x), choice, experts, gate_out, up_out, None, out, pool.n_workers, True):
        program.add(phase)
    program.finish()
    results = []
    for _ in range(3):
        program.run([0, 1, 2], [0, 1, 2], np.zeros(1, np.int64))
        parts = [kernels.floats(at, 3 * weight.n_rows) for at, weight in zip(rows, weights, strict=True)]
        results.append(np.concatenate([*parts, kernels.floats(out, 3 * hidden)]).copy())
    assert all(kernels.same_bits(result, results[0]) for result in results)
    check_spans(program, [*weights, experts.gate, experts.up, experts.down])
    return results[0]


def check_spans(program: Program, matrices: list[QuantMatrix]) -> None:
    """Together the nodes have every byte of every matrix once."""
    spans = sorted(span for node in range(program.pool.spread.n_nodes) for span in program.spans(node))
    assert all(start + size <= other for (start, size), (other, _) in itertools.pairwise(spans))
    expected = sum(matrix.n_groups * matrix.n_rows * matrix.row_bytes for matrix in matrices)
    assert sum(size for _, size in spans) == expected


@pytest.mark.parametrize("n_workers", [2, 5, 64])
def test_steps_are_the_same_on_any_nodes(n_workers: int) -> None:
    """64 workers on few cores: late ones find nothing left, and phases end all the same."""
    random = np.random.default_rng(3)
    rows = {"Q4_K": 304, "Q8_0": 64, "Q2_K": 301, "IQ2_XS": 203}
    weights = [kernels.random_weight(type_, (n, 512), random)[0] for type_, n in rows.items()]
    shapes = ("Q4_K", (4, 256, 512)), ("Q4_K", (4, 256, 512)), ("Q6_K", (4, 512, 256))
    experts = ExpertMatrices(*(kernels.random_weight(type_, shape, random)[0] for type_, shape in shapes))
    x = random.standard_normal((3, 512), np.float32)
    with closing(Pool(1)) as pool:
        expected = step_results(pool, weights, experts, x)
    assert np.isfinite(expected).all() and np.any(expected)
    for cores in ((), NODES[:2], NODES):
        with closing(Pool(n_workers, cores)) as pool:
            assert kernels.same_bits(step_results(pool, weights, experts, x), expected)


@kernel("void(int64, int64)")
def _take_all(arguments, worker):
    a = TAKEN(arguments)
    item = take(a.items, worker)
    while item >= 0:
        a.out[a.n] = item
        a.n = a.n + 1
        item = take(a.items, worker)


@pytest.mark.parametrize(
    ("worker", "cores", "expected"),
    [(0, NODES[:2], [0, 1, 4, 5, 2, 3, 6, 7]), (1, NODES[:2], [2, 3, 6, 7, 0, 1, 4, 5]), (1, (), list(range(8)))],
)
def test_a_prompts_items_are_its_nodes_first(worker: int, cores: Sequence[Sequence[int]], expected: list[int]) -> None:
    items, out = Items(Spread(2, cores), 8, 4), np.full(9, -1, np.int64)
    kernels.call(_take_all, TAKEN.pack(items=items.struct, n=0, out=out.ctypes.data), worker)
    assert out.tolist() == [*expected, -1]


@pytest.mark.parametrize("n_tokens", [2, 40])
@pytest.mark.parametrize("n_workers", [3, 64])
def test_prompts_are_the_same_on_any_nodes(n_workers: int, n_tokens: int) -> None:
    random = np.random.default_rng(4)
    weight = kernels.random_weight("Q4_K", (2, 301, 512), random)[0]
    shapes = ("Q4_K", (4, 160, 512)), ("Q4_K", (4, 160, 512)), ("Q8_0", (4, 512, 160))
    matrices = [kernels.random_weight(type_, shape, random)[0] for type_, shape in shapes]
    x = random.standard_normal((n_tokens, 2, 512), np.float32)
    ids, gates = random.integers(0, 4, (n_tokens, 2)), random.random((n_tokens, 2), np.float32)
    found = []
    for n, cores in [(1, ()), (n_workers, ()), (n_workers, NODES[:2]), (n_workers, NODES)]:
        with closing(Pool(n, cores)) as pool:
            out = np.full((n_tokens, 512), np.nan, np.float32)
            inputs = np.ascontiguousarray(x[:, 0])
            run_experts(pool, ExpertMatrices(*matrices), inputs.ctypes.data, ids, gates, out.ctypes.data)
            found.append(np.concatenate([kernels.multiply(pool, weight, x).ravel(), out.ravel()]))
    assert np.isfinite(found[0]).all() and all(kernels.same_bits(each, found[0]) for each in found)


@pytest.mark.parametrize("n_nodes", [1, 2, 3])
def test_each_node_has_rows_of_small_experts(n_nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though an item might have more rows than an expert."""
    periods, random = [], np.random.default_rng(5)

    def items(spread: Spread, n_items: int, period: int) -> Items:
        periods.append(period)
        return Items(spread, n_items, period)

    monkeypatch.setattr("quant.ops.experts.Items", items)
    shapes = (24, 96, 512), (24, 96, 512), (24, 512, 96)
    matrices = [kernels.random_weight("Q8_0", shape, random)[0] for shape in shapes]
    x, out = random.standard_normal((12, 512), np.float32), np.zeros((12, 512), np.float32)
    ids, gates = np.arange(24).reshape(12, 2), np.ones((12, 2), np.float32)
    with closing(Pool(3, NODES[:n_nodes])) as pool:
        run_experts(pool, ExpertMatrices(*matrices), x.ctypes.data, ids, gates, out.ctypes.data)
    assert periods[0] >= n_nodes


def test_spans_are_the_rows_of_the_items() -> None:
    weight, _ = kernels.random_weight("Q8_0", (40, 64), np.random.default_rng(0))
    part, row = Part(weight, 16, first_item=2), weight.row_bytes  # items 2, 3 and 4
    assert list(part.spans(0, 2)) == [] == list(part.spans(5, 3))
    assert list(part.spans(0, 3)) == [(weight.address, 16 * row)]
    assert list(part.spans(3, 9)) == [(weight.address + 16 * row, 24 * row)]


def test_an_item_may_read_a_group() -> None:
    weight, _ = kernels.random_weight("Q8_0", (3, 40, 64), np.random.default_rng(0))
    part, size = GroupPart(weight), 40 * weight.row_bytes
    assert list(part.spans(1, 9)) == [(weight.address + size, size), (weight.address + 2 * size, size)]
    assert list(part.spans(3, 1)) == []  # an item of something else


def test_an_item_of_a_rows_phase_reads_one_matrix() -> None:
    random = np.random.default_rng(0)
    weights = [kernels.random_weight("Q8_0", (rows, 64), random)[0] for rows in (40, 8, 100)]
    phase = rows_phase(Input(0), [(weight, 0) for weight in weights], 2)
    found = [[(part.matrix, span) for part in phase.weights for span in part.spans(i, 1)] for i in range(phase.n_items)]
    assert [len(each) for each in found] == [1] * phase.n_items
    assert [sum(each[0][0] is weight for each in found) > 0 for weight in weights] == [True] * 3
    assert sum(each[0][1][1] for each in found) == sum(weight.n_rows * weight.row_bytes for weight in weights)


@pytest.mark.skipif(len(HERE) < 2, reason="needs two cores to tell where a thread may run")
def test_workers_stay_on_their_nodes_cores() -> None:
    before, until = os.sched_getaffinity(0), time.monotonic() + 10
    with closing(Pool(2, (HERE[:1], HERE[1:]))) as pool:
        (thread,) = pool._threads
        while os.sched_getaffinity(thread.native_id) == before and time.monotonic() < until:
            time.sleep(0.001)  # its first act, which nobody waits for
        assert os.sched_getaffinity(thread.native_id) == set(HERE[1:])
    assert os.sched_getaffinity(0) == before  # the caller's is its own


@pytest.mark.parametrize("n_workers", [1, 3, 16])
def test_the_busiest_worker(n_workers: int) -> None:
    """As if each item were given to who is free first."""
    runs = [(5, 7), (1, 30), (40, 2), (9, 9)]
    loads = [0] * n_workers
    for count, cost in runs:
        for _ in range(count):
            loads[loads.index(min(loads))] += cost
    assert busiest(runs, n_workers) == max(loads)


def test_items_of_nothing() -> None:
    """Experts that nobody chose."""
    assert rows_of_item(100, 0, 4, 8) == 8
