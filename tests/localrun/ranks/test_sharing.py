"""How experts are cut into shares."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace

import kernels
import numpy as np
import pytest

from localrun.errors import LocalrunError
from localrun.limits import PREFILL_CHUNK
from localrun.placement.sizes import rank_work_bytes
from localrun.placement.slices import by_sizes, by_time
from localrun.ranks import many
from localrun.ranks.owners import assign, divide
from localrun.ranks.sharing import cuts, n_blocks
from quant.decode.messages import TYPES
from quant.errors import QuantError
from quant.formats import registry
from quant.formats.interleave import interleave
from quant.matrix import ExpertMatrices, quant_matrix
from quant.ops import experts
from quant.threads.pool import Pool

HIDDEN, INNER, N_EXPERTS, N_TOKENS, TOP_K = 512, 768, 4, 3, 2


@pytest.mark.parametrize(
    ("n", "unit", "sizes", "expected"),
    [
        (2048, 256, (1, 1), [1024, 1024]),
        (1536, 256, (1, 1, 1, 1), [512, 256, 256, 512]),
        (2048, 256, (3, 1), [1536, 512]),
        (1408, 32, (1, 1, 1), [480, 448, 480]),
        (2048, 256, (100, 1, 1), [1536, 256, 256]),  # no share is empty
        (2048, 256, (1, 1, 100), [256, 256, 1536]),
        (100, 32, (1, 2), [32, 68]),  # what is left over goes to the last
        (768, 256, (5.5,), [768]),
    ],
)
def test_cuts(n: int, unit: int, sizes: tuple[float, ...], expected: list[int]) -> None:
    found = cuts(n, unit, by_sizes(n_blocks(n, unit, len(sizes)), sizes))
    assert [count for _, count in found] == expected
    assert [first for first, _ in found] == [sum(expected[:i]) for i in range(len(sizes))]


def test_too_few_blocks() -> None:
    with pytest.raises(LocalrunError, match=r"experts of 768 inner columns in blocks of 256 .* 4 ranks; at most 3"):
        n_blocks(768, 256, 4)


def matrices(type_: str, rng: np.random.Generator) -> ExpertMatrices:
    """Random experts with biases, rows interleaved where the name says so."""
    plain, shapes = type_.removesuffix("_R16"), [(N_EXPERTS, INNER, HIDDEN)] * 2 + [(N_EXPERTS, HIDDEN, INNER)]
    found = [kernels.random_weight(plain, shape, rng)[0] for shape in shapes]
    if plain != type_:
        format_ = registry.get(type_)
        for i, (matrix, shape) in enumerate(zip(found, shapes, strict=True)):
            rows = matrix.owner.reshape(N_EXPERTS, -1)
            laid = np.empty_like(rows)
            for expert in range(N_EXPERTS):
                interleave(format_, rows[expert], shape[1], matrix.row_bytes, laid[expert])
            found[i] = quant_matrix(laid.reshape(-1), format_, shape)
    biases = tuple(rng.standard_normal((N_EXPERTS, matrix.n_rows)).astype(np.float32) for matrix in found)
    return ExpertMatrices(*found, biases)


def sums(pool: Pool, whole: ExpertMatrices, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    experts.run(pool, whole, x.ctypes.data, ids, weights, out.ctypes.data)
    return out


@pytest.mark.parametrize("type_", ["F32", "Q4_K", "Q4_K_R16", "Q8_0"])
def test_shares_add_up(pool: Pool, type_: str) -> None:
    """Values after the activation are rounded by 32 columns, which are never cut: only the order of sums differs."""
    rng = np.random.default_rng(0)
    whole = matrices(type_, rng)
    x = rng.standard_normal((N_TOKENS, HIDDEN)).astype(np.float32)
    ids = np.stack([rng.permutation(N_EXPERTS)[:TOP_K] for _ in range(N_TOKENS)]).astype(np.int64)
    weights = rng.random((N_TOKENS, TOP_K)).astype(np.float32)
    expected = sums(pool, whole, x, ids, weights)
    unit = whole.inner_unit
    assert unit == (256 if type_.startswith("Q4_K") else 32)
    parts = [whole.inner(first, count) for first, count in cuts(INNER, unit, by_sizes(INNER // unit, (1, 2)))]
    assert [part.gate.n_rows for part in parts] == [256, 512] and parts[0].down.n_cols == 256
    assert parts[1].gate.address == whole.gate.address + 256 * whole.gate.row_bytes  # rows stay where they are
    found = sum(sums(pool, part, x, ids, weights) for part in parts)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert whole.inner(0, INNER) is whole


USED = [1, 9, 5, 0, 7, 3, 2, 8]  # how often each of 8 experts


def ranks_of(owners: np.ndarray) -> list[str]:
    return ["".join(str(rank) for rank in range(8) if bits >> rank & 1) for bits in owners.tolist()]


@pytest.mark.parametrize(
    ("sizes", "copies", "expected"),
    [
        ((1, 1), 0, ["0", "0", "0", "1", "1", "0", "1", "1"]),  # 18 and 17 uses
        ((1, 1), 1, ["0", "01", "0", "1", "1", "0", "1", "01"]),
        ((3, 1), 0, ["1", "0", "0", "0", "0", "0", "0", "1"]),
        ((1, 1, 1), 0, ["0", "0", "1", "2", "1", "2", "0", "2"]),
        ((1, 1, 1), 9, ["012"] * 8),
    ],
)
def test_experts_are_divided_by_use(sizes: tuple[int, ...], copies: int, expected: list[str]) -> None:
    found = divide(USED, sizes, copies)
    assert ranks_of(found) == expected


def test_as_many_experts_as_there_is_room_for() -> None:
    """However rarely some are used."""
    for counts in (np.zeros(256, int), np.arange(256) ** 3):
        owners = divide(counts.tolist(), (1.0, 2.0, 1.0))
        assert [int((owners == 1 << rank).sum()) for rank in range(3)] == [64, 128, 64]


def test_tokens_of_an_expert_go_to_one_rank() -> None:
    """The one with least to do of those that have it; a pair without an expert goes nowhere."""
    rng = np.random.default_rng(0)
    owners = divide(USED, (1, 1, 1), copies=2)
    ids = rng.integers(-1, 8, (200, 4))
    ranks = assign(ids, owners)
    assert np.array_equal(ranks < 0, ids < 0)
    for expert in range(8):
        (rank,) = set(ranks[ids == expert].tolist())
        assert owners[expert] >> rank & 1
    busy = np.bincount(ranks[ranks >= 0])
    alone = np.bincount(assign(ids, divide(USED, (1, 1, 1)))[ids >= 0])
    assert busy.max() <= alone.max()


def test_columns_are_whole_blocks() -> None:
    matrix = kernels.random_weight("Q4_K", (2, 4, 768), np.random.default_rng(0))[0]
    for first, count in ((0, 100), (128, 256), (512, 512), (-256, 256)):
        with pytest.raises(QuantError, match="of 768 in blocks of 256"):
            matrix.columns(first, count)


@pytest.mark.parametrize("seed", range(20))
def test_slices_by_time_end_as_early_as_can_be(seed: int) -> None:
    """Against every way to share 9 blocks among 3 ranks."""
    rng = np.random.default_rng(seed)
    block_s, before_s = rng.uniform(0.5, 2, 3), rng.uniform(0, 4, 3)
    found = by_time(9, block_s.tolist(), before_s.tolist())
    ends = {(a, b, 9 - a - b): 0.0 for a in range(1, 8) for b in range(1, 9 - a)}
    ends = {counts: (before_s + np.array(counts) * block_s).max() for counts in ends}
    assert sum(found) == 9 and ends[tuple(found)] == min(ends.values())


def test_alike_ranks_have_equal_slices() -> None:
    """Though the first has a shared expert of a block more: 5 and 4 take no longer than 4 and 5."""
    assert by_time(8, [1.0, 1.0], [1.0, 0.0]) == [4, 4]


@pytest.mark.parametrize("type_", ["Q4_K", "Q8_0"])
def test_work_memory_of_a_prompt(type_: str) -> None:
    """What is counted is what is taken, but for what comes with each worker."""
    rng, config = (
        np.random.default_rng(0),
        SimpleNamespace(
            hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=N_EXPERTS, num_experts_per_tok=TOP_K
        ),
    )
    slice_ = matrices(type_, rng).inner(0, INNER // 3)
    with closing(Pool(1)) as own:
        for n_tokens in (7, PREFILL_CHUNK):  # less than 4 of an expert are multiplied by rows
            x = rng.standard_normal((n_tokens, HIDDEN)).astype(np.float32)
            ids = np.stack([rng.permutation(N_EXPERTS)[:TOP_K] for _ in range(n_tokens)])
            weights = np.ones((n_tokens, TOP_K), np.float32)
            out = sums(own, slice_, x, ids, weights)
        of_workers = ("sums", "sums table", "scratch", "work", "rounding")
        taken = sum(n_bytes for name, (_, n_bytes, _) in own._buffers.items() if name not in of_workers)
        message, back = many.pack(TYPES["bf16"], x, ids, weights), many.pack_sums(TYPES["bf16"], out)
        taken += sum(array.nbytes for array in (x, ids, weights, out, message, back))
    found = rank_work_bytes(config, 1 / 3, "bf16")
    assert 0.9 * found < taken <= found
