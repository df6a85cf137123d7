"""A decode step's attention over a window and pooled rows (DeepSeek-V4), from projections to the grouped output.

Against formulas in float64, whose rows are rounded to 16 bits as the cache's are. Letters: T tokens, H heads, G groups
of heads, W width of a row, S rows.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace

import kernels
import numpy as np
import pytest
from kernels import floats

from quant.decode.attention import Heads, attend_phase
from quant.decode.compressor import Compressor, shared_key_queries_phase
from quant.decode.indexer import STATE_BYTES, Indexer, Room, choice_phases, indexer_keys_phase
from quant.decode.program import MOST_TOKENS, Program
from quant.decode.stream_rows import groups_phase
from quant.decode.values import GroupedOutput, project_values_phase
from quant.gemv.activations import q8_bytes
from quant.threads.pool import Pool, aligned_bytes

pytestmark = pytest.mark.levels

H, W, G, ROWS, N_ROPE, EPSILON = 4, 64, 2, 24, 16, 1e-6
INDEX_HEADS, INDEX_WIDTH, TOP_K = 5, 32, 6
# Sums of some hundred float32 products; a row's value near the middle of two 16-bit ones goes either way, 2^-11 of it.
# For Q8_0 the mix is rounded to 8 bits: half a step of 1/127 of the largest of 32.
TOLERANCE, QUANTISED_TOLERANCE = 1e-4, 1e-2
N_SLOTS = 6  # own rows, pooled rows, open window, the indexer's two


@dataclass(frozen=True)
class Case:
    """ratio: tokens of a window, 0 for none; windows overlap, and rows are chosen, where `indexed`."""

    ratio: int
    indexed: bool
    window: int
    n_tokens: int
    type: str = "F32"  # of the output's first matrix

    @property
    def parts(self) -> dict[str, int]:
        """Widths of what is projected of each token."""
        sizes = {"projected": H * W, "kv": W}
        m = 2 if self.indexed else 1
        if self.ratio:
            sizes |= {"vectors": m * W, "gates": m * W}
        if self.indexed:
            sizes |= {"index vectors": m * INDEX_WIDTH, "index gates": m * INDEX_WIDTH}
            sizes |= {"index queries": INDEX_HEADS * INDEX_WIDTH, "index weights": INDEX_HEADS}
        return sizes


class Random:
    """Projections of all tokens, float32 (T, n) each, and weights."""

    def __init__(self, case: Case, seed: int):
        rng = np.random.default_rng(seed)
        self.parts = {n: rng.standard_normal((case.n_tokens, w)).astype(np.float32) for n, w in case.parts.items()}
        rng = np.random.default_rng(1)
        m = 2 if case.indexed else 1
        self.kv_norm, self.norm = (1 + 0.2 * rng.standard_normal((2, W))).astype(np.float32)
        self.index_norm = (1 + 0.2 * rng.standard_normal(INDEX_WIDTH)).astype(np.float32)
        self.bias = rng.standard_normal((max(1, case.ratio), m * W)).astype(np.float32)
        self.index_bias = rng.standard_normal((max(1, case.ratio), m * INDEX_WIDTH)).astype(np.float32)
        self.sinks = rng.standard_normal(H).astype(np.float32)
        self.frequencies = np.concatenate([np.full(N_ROPE // 2, np.nan), 0.5 ** np.arange(N_ROPE // 2)])
        self.o_a, self.o_a_values = kernels.random_weight(case.type, (G, ROWS, H * W // G), rng)


# ---- the reference ---------------------------------------------------------------------------------------------------


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON)


def rotated(x: np.ndarray, position: int, frequencies: np.ndarray, direction: int = 1) -> np.ndarray:
    """The last N_ROPE of (..., W), neighbours together."""
    turns = np.exp(1j * direction * position * frequencies[N_ROPE // 2 :])
    last = (x[..., -N_ROPE::2] + 1j * x[..., -N_ROPE + 1 :: 2]) * turns
    return np.concatenate([x[..., :-N_ROPE], np.stack([last.real, last.imag], -1).reshape(*x.shape[:-1], -1)], -1)


def halved(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float64)


def pooled(case: Case, vectors, gates, bias, norm, width: int, frequencies) -> np.ndarray:
    """(T // ratio, width): rows of all windows that end."""
    gates, rows = gates.astype(float) + np.resize(bias, (len(gates), bias.shape[1])), []
    for first in range(0, len(gates) - case.ratio + 1, case.ratio):
        own = slice(first, first + case.ratio)
        a, g = vectors[own, -width:].astype(float), gates[own, -width:]
        if case.indexed and first:
            before = slice(first - case.ratio, first)
            a, g = (np.concatenate([x[before, :width], y]) for x, y in ((vectors, a), (gates, g)))
        weights = np.exp(g - g.max(0))
        row = rms((weights * a).sum(0) / weights.sum(0)) * norm
        rows.append(halved(rotated(row, first, frequencies)))
    return np.array(rows).reshape(-1, width)


def expected(case: Case, r: Random) -> np.ndarray:
    """float64 (T, G, ROWS)."""
    p, f = r.parts, r.frequencies
    own = np.stack([halved(rotated(rms(kv.astype(float)) * r.kv_norm, t, f)) for t, kv in enumerate(p["kv"])])
    rows = pooled(case, p["vectors"], p["gates"], r.bias, r.norm, W, f) if case.ratio else np.empty((0, W))
    if case.indexed:
        keys = pooled(case, p["index vectors"], p["index gates"], r.index_bias, r.index_norm, INDEX_WIDTH, f)
    out = np.empty((case.n_tokens, G, ROWS))
    for t in range(case.n_tokens):
        n_seen = (t + 1) // case.ratio if case.ratio else 0
        chosen = np.arange(n_seen)
        if case.indexed and n_seen > TOP_K:
            queries = rotated(p["index queries"][t].astype(float).reshape(INDEX_HEADS, INDEX_WIDTH), t, f)
            scores = p["index weights"][t] @ np.maximum(queries @ keys[:n_seen].T, 0)
            chosen = np.argsort(-scores, kind="stable")[:TOP_K]
        seen = np.concatenate([rows[chosen], own[max(0, t + 1 - case.window) : t + 1]])
        queries = rotated(rms(p["projected"][t].astype(float).reshape(H, W)), t, f)
        weights = np.exp(np.concatenate([queries @ seen.T / np.sqrt(W), r.sinks[:, None]], 1))
        mixed = rotated((weights / weights.sum(1, keepdims=True))[:, :-1] @ seen, t, f, -1)
        out[t] = np.einsum("grc,gc->gr", r.o_a_values, mixed.reshape(G, -1))
    return out


# ---- the phases ------------------------------------------------------------------------------------------------------


class Step:
    """A layer's phases, and contexts that they run over."""

    def __init__(self, case: Case, weights: Random, n_workers: int, n_contexts: int = 1):
        self.case, self.pool = case, Pool(n_workers)
        embedding, _ = kernels.random_weight("F32", (1, 1, 16), np.random.default_rng(0))
        program = Program(self.pool, embedding, weights.frequencies, 1.0, N_SLOTS)
        self.vectors = {name: (program.vector(n), n) for name, n in case.parts.items()}
        at = {name: address for name, (address, _) in self.vectors.items()}
        compressor = index_compressor = indexer = None
        heads = Heads(
            n_groups=2, per_group=H // 2, key_width=W, value_width=W, key_slot=1, value_slot=1, key_row=2 * W,
            value_row=2 * W, key_group=0, value_group=0, window=case.window, sinks=program.keep(weights.sinks),
        )  # fmt: skip
        if case.ratio:
            compressor = Compressor(
                case.ratio, W, case.indexed, at["vectors"], at["gates"], program.keep(weights.bias),
                program.keep(weights.norm), 2, 3,
            )  # fmt: skip
            heads = replace(heads, ratio=case.ratio, pooled_slot=3)
        if case.indexed:
            index_compressor = Compressor(
                case.ratio, INDEX_WIDTH, True, at["index vectors"], at["index gates"], program.keep(weights.index_bias),
                program.keep(weights.index_norm), 4, 5,
            )  # fmt: skip
            self.room, sizes = Room(), Indexer(INDEX_HEADS, INDEX_WIDTH, TOP_K, case.ratio, 5)
            self.room.make(case.n_tokens)
            indexer = replace(
                sizes, queries=at["index queries"], weights=at["index weights"], room=self.room.address,
                packed=program.vector(sizes.packed_bytes // 4), chosen=program.vector(sizes.chosen_bytes // 4),
                packed_weights=program.vector(sizes.weight_bytes // 4),
                in_bytes=program.vector(sizes.query_bytes // 4), states=program.vector(STATE_BYTES // 4),
            )  # fmt: skip
            heads = replace(heads, most_pooled=TOP_K, chosen=indexer.chosen, chosen_bytes=indexer.chosen_bytes)
        queries, values = program.vector(H * W), program.vector(H * W)
        program.add(
            shared_key_queries_phase(
                at["projected"], queries, at["kv"], program.keep(weights.kv_norm), n_heads=H, width=W, n_rope=N_ROPE,
                first_frequency=N_ROPE // 2, scale=W**-0.5, epsilon=EPSILON, slot=1, compressor=compressor,
                index_compressor=index_compressor, indexer=indexer,
            )
        )  # fmt: skip
        for phase in choice_phases(indexer).values() if indexer else ():
            program.add(phase)
        partials = program.keep(aligned_bytes(MOST_TOKENS * heads.partials_bytes))
        q8 = program.keep(aligned_bytes(MOST_TOKENS * G * q8_bytes(weights.o_a.n_cols)))
        program.add(attend_phase(heads, queries, partials))
        output = GroupedOutput(N_ROPE, N_ROPE // 2, weights.o_a, q8)
        program.add(project_values_phase(heads, partials, None, values, output))
        out = program.vector(G * ROWS)
        program.add(groups_phase(weights.o_a, q8, out, n_workers))
        program.finish()
        self.program, self.out = program, floats(out, MOST_TOKENS, G, ROWS)
        self.blocks = [self._blocks() for _ in range(n_contexts)]

    def _blocks(self) -> list[np.ndarray]:
        """A context's blocks of cache rows, NaN; own rows and open windows have room for a step's tokens more."""
        c, m, n_open = self.case, 2 if self.case.indexed else 1, 2 * self.case.ratio + MOST_TOKENS
        shapes = [
            ((1, 1), np.float16), ((c.window + MOST_TOKENS, W), np.float16), ((n_open, 2 * m * W), np.float32),
            ((c.n_tokens, W), np.float16), ((n_open, 2 * m * INDEX_WIDTH), np.float32),
            ((c.n_tokens, INDEX_WIDTH), np.float16),
        ]  # fmt: skip
        return [np.full(shape, np.nan, dtype) for shape, dtype in shapes]

    def run(self, tokens: list[tuple[int, int]], sources: list[Random]) -> np.ndarray:
        """float32 (T, G, ROWS) of tokens, each (context, position)."""
        for i, (context, position) in enumerate(tokens):
            for name, (address, n) in self.vectors.items():
                floats(address, MOST_TOKENS, n)[i] = sources[context].parts[name][position]
        cache = np.array([[block.ctypes.data for block in self.blocks[context]] for context, _ in tokens])
        n_rows = np.array([[len(block) for block in self.blocks[context]] for context, _ in tokens])
        self.program.run([0] * len(tokens), [position for _, position in tokens], cache, cache_rows=n_rows)
        return self.out[: len(tokens)].copy()


CASES = {
    "a window alone": Case(0, False, 16, 40),
    "windows of 8": Case(8, False, 16, 60, "Q8_0"),
    "windows of 128": Case(128, False, 16, 270),
    "windows of 4, chosen": Case(4, True, 16, 60),
    "a long window": Case(4, True, 150, 180),
    "more rows than tokens": Case(8, False, 150, 180),  # so that a step has more pieces than items
}


def by_steps(case: Case, source: Random, sizes: list[int], n_workers: int = 2) -> np.ndarray:
    """float32 (T, G, ROWS), in steps of these sizes in turn."""
    step, rows, first = Step(case, source, n_workers), [], 0
    with closing(step.pool):
        while first < case.n_tokens:
            last = min(first + sizes[len(rows) % len(sizes)], case.n_tokens)
            rows.append(step.run([(0, p) for p in range(first, last)], [source]))
            first = last
    return np.concatenate(rows)


@pytest.mark.parametrize("name", CASES)
def test_against_formulas(name: str) -> None:
    case, source = CASES[name], Random(CASES[name], 0)
    found, wanted = by_steps(case, source, [1]), expected(case, source)
    tolerance = TOLERANCE if case.type == "F32" else QUANTISED_TOLERANCE
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
    assert np.array_equal(by_steps(case, source, [8, 1, 5, 3], 3), found)


def test_contexts_together_are_contexts_alone() -> None:
    """Three of different lengths, a token each and more of one of them."""
    case = CASES["windows of 4, chosen"]
    sources = [Random(case, seed) for seed in range(3)]
    alone = [by_steps(case, source, [1]) for source in sources]
    step, lengths = Step(case, sources[0], 2, 3), [0, 13, 30]
    with closing(step.pool):
        for context, length in enumerate(lengths):
            for position in range(length):
                step.run([(context, position)], sources)
        for _ in range(9):
            tokens = [(context, length) for context, length in enumerate(lengths)]
            tokens += [(2, lengths[2] + i) for i in (1, 2)]
            for row, (context, position) in zip(step.run(tokens, sources), tokens, strict=True):
                assert np.array_equal(row, alone[context][position])
            lengths = [lengths[0] + 1, lengths[1] + 1, lengths[2] + 3]


@pytest.mark.parametrize("n_tokens", [8195, 5000, 2500])
def test_every_split_of_pooled_rows_is_ranked(n_tokens: int) -> None:
    """As many as tokens have splits, 32 for 2,048 rows, or fewer: 16 for 1,250, 10 for 625."""
    random, n_rows, heads, width = np.random.default_rng(3), n_tokens // 4, 12, 32
    keys = random.standard_normal((3000, width)).astype(np.float16)
    keys[n_rows - 60 :] *= 2  # those to choose are among the last; what lies behind is not seen
    queries, weights = random.standard_normal((heads, width), np.float32), random.standard_normal(heads, np.float32)
    embedding, _ = kernels.random_weight("F32", (1, 1, 16), random)
    with closing(Pool(2)) as pool:
        program, room, sizes = Program(pool, embedding, np.ones(1), 1.0, 1), Room(), Indexer(heads, width, TOP_K, 4, 0)
        room.make(len(keys))
        memory = {
            "queries": heads * width, "weights": heads, "packed": sizes.packed_bytes // 4, "states": STATE_BYTES // 4,
            "packed_weights": sizes.weight_bytes // 4, "in_bytes": sizes.query_bytes // 4,
            "chosen": sizes.chosen_bytes // 4,
        }  # fmt: skip
        places = {name: program.vector(n) for name, n in memory.items()}
        indexer = replace(sizes, room=room.address, **places)
        norm = [program.keep(np.ones(width, np.float32)) for _ in range(2)]
        program.add(indexer_keys_phase(indexer, program.vector(width), *norm, 1e-6, 0, False))
        for phase in choice_phases(indexer).values():
            program.add(phase)
        program.finish()
        floats(places["queries"], heads, width)[:] = queries
        floats(places["weights"], heads)[:] = weights
        program.run([0], [n_tokens - 1], np.array([keys.ctypes.data]), cache_rows=np.array([len(keys)]))
        chosen = floats(places["chosen"], TOP_K).view(np.int32).tolist()
    scores = weights @ np.maximum(queries.astype(float) @ keys[:n_rows].astype(float).T, 0)
    assert sorted(chosen) == sorted(np.argsort(-scores)[:TOP_K].tolist())
