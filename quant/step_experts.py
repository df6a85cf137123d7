"""Phases of the mixture of experts: the router's choice, gate and up of the chosen experts, down with the weighted sum.

The router's logits come from a rows phase; every worker makes the choice for itself. Source: as localrun/moe.py, whose
choose_experts is the reference.
"""

import math
from dataclasses import dataclass

import numpy as np

from quant.activations import record_bytes, write_record
from quant.experts import Experts
from quant.jit import inline, kernel
from quant.linear import Weight
from quant.rows import MATRIX_BYTES
from quant.simd import bits_to_f32, load_f32, load_i64, store_f32, store_i64
from quant.step import ARGUMENTS, Phase, float_bits, padded
from quant.step_rows import Input, gemv, unit_rows
from quant.vectors import rms_norm, scale_add, swiglu

SOFTMAX, SIGMOID, SOFTMAX_AFTER_TOPK = range(3)
SMALLEST_SUM = 6.103515625e-5  # float16's smallest normal number, as in llama.cpp
_DOWN_BYTES = 1 << 19  # of one expert's rows that a worker takes at a time
_NEVER = float("-inf")

# Arguments of both phases: the router's, then their own; at the end the matrices.
(
    LOGITS, BIAS, N_EXPERTS, TOP_K, N_GROUP, TOPK_GROUP, SCORING, NORMALISE, FACTOR, CHOICE,
    X, NORM, EPSILON, HIDDEN, INNER, ROUNDED, RECORD, GATED, UPPED, ROWS, OUT, RECORDS_BYTES,
    SHARED_GATED, SHARED_UPPED, SHARED_INNER, SHARED_ROUNDED, TEMPORARY,
) = range(ARGUMENTS, ARGUMENTS + 27 * 8, 8)  # fmt: skip
FIRST, SECOND = ARGUMENTS + 27 * 8, ARGUMENTS + 27 * 8 + MATRIX_BYTES
# A worker's choice, at the phase's CHOICE: ids i64[K], weights f32[K] behind them, then scores f32[E] to choose by.


@inline
def _affinities(phase, scores):
    """What the router's logits say of each expert, float32 (E,)."""
    logits, n_experts, scoring = load_i64(phase + LOGITS), load_i64(phase + N_EXPERTS), load_i64(phase + SCORING)
    largest = load_f32(logits)
    for e in range(1, n_experts):
        largest = max(largest, load_f32(logits + 4 * e))
    total = np.float32(0.0)
    for e in range(n_experts):
        logit = load_f32(logits + 4 * e)
        if scoring == SIGMOID:
            logit = np.float32(1.0) / (np.float32(1.0) + math.exp(-logit))
        elif scoring == SOFTMAX:
            logit = math.exp(logit - largest)
            total += logit
        store_f32(scores + 4 * e, logit)
    if scoring == SOFTMAX:
        for e in range(n_experts):
            store_f32(scores + 4 * e, load_f32(scores + 4 * e) / total)


@inline
def _take_best(scores, n):
    """The index of the largest of n scores, the first of equals, which is then taken out; NaN counts as smallest."""
    best, index = np.float32(_NEVER), 0
    for i in range(n):
        if load_f32(scores + 4 * i) > best:
            best, index = load_f32(scores + 4 * i), i
    store_f32(scores + 4 * index, np.float32(_NEVER))
    return index


@inline
def _group_score(phase, members, n):
    """How good a group of n experts is: its best (V2), or the sum of its two best (V3)."""
    first, second = np.float32(_NEVER), np.float32(_NEVER)
    for i in range(n):
        score = load_f32(members + 4 * i)
        if score > first:
            first, second = score, first
        elif score > second:
            second = score
    return first if load_i64(phase + SCORING) == SOFTMAX or n == 1 else first + second


@inline
def _keep_best_groups(phase, scores, group_scores):
    """Scores outside the best groups become -inf."""
    n_group = load_i64(phase + N_GROUP)
    size = load_i64(phase + N_EXPERTS) // n_group
    for g in range(n_group):
        store_f32(group_scores + 4 * g, _group_score(phase, scores + 4 * size * g, size))
    kept = group_scores + 4 * n_group
    for g in range(n_group):
        store_f32(kept + 4 * g, np.float32(0.0))
    for _ in range(load_i64(phase + TOPK_GROUP)):
        store_f32(kept + 4 * _take_best(group_scores, n_group), np.float32(1.0))
    for g in range(n_group):
        if load_f32(kept + 4 * g) == 0:
            for i in range(size * g, size * (g + 1)):
                store_f32(scores + 4 * i, np.float32(_NEVER))


@inline
def _choose(phase, ids):
    """The chosen experts' ids and weights, at a worker's own memory."""
    n_experts, top_k, bias = load_i64(phase + N_EXPERTS), load_i64(phase + TOP_K), load_i64(phase + BIAS)
    weights = ids + 8 * top_k
    affinities = weights + 4 * top_k
    scores = affinities + 4 * n_experts
    _affinities(phase, affinities)
    for e in range(n_experts):
        biased = load_f32(affinities + 4 * e)
        if bias != 0:
            biased += load_f32(bias + 4 * e)
        store_f32(scores + 4 * e, biased)
    if load_i64(phase + N_GROUP) > 1:
        _keep_best_groups(phase, scores, scores + 4 * n_experts)
    total = np.float32(0.0)
    for k in range(top_k):
        chosen = _take_best(scores, n_experts)
        weight = load_f32(affinities + 4 * chosen)
        store_i64(ids + 8 * k, chosen)
        store_f32(weights + 4 * k, weight)
        total += weight
    _normalise(phase, weights, total)


@inline
def _normalise(phase, weights, total):
    """The chosen experts' weights, made to sum up as the model wants."""
    top_k, divisor = load_i64(phase + TOP_K), np.float32(1.0)
    if load_i64(phase + SCORING) == SOFTMAX_AFTER_TOPK:
        largest, total = load_f32(weights), np.float32(0.0)  # the first chosen has the largest logit, but for a bias
        for k in range(1, top_k):
            largest = max(largest, load_f32(weights + 4 * k))
        for k in range(top_k):
            weight = np.float32(math.exp(load_f32(weights + 4 * k) - largest))
            store_f32(weights + 4 * k, weight)
            total += weight
        for k in range(top_k):
            store_f32(weights + 4 * k, load_f32(weights + 4 * k) / total)
        total = np.float32(1.0)
    if load_i64(phase + NORMALISE) != 0:
        divisor = max(total, np.float32(SMALLEST_SUM))
    factor = bits_to_f32(load_i64(phase + FACTOR))
    for k in range(top_k):
        store_f32(weights + 4 * k, load_f32(weights + 4 * k) / divisor * factor)


@kernel("void(int64, int64)")
def _prepare_up(phase, work):
    """The normed vector, its record, and the choice."""
    n_cols = load_i64(phase + HIDDEN)
    rms_norm(load_i64(phase + X), load_i64(phase + NORM), bits_to_f32(load_i64(phase + EPSILON)), n_cols, work)
    if load_i64(phase + ROUNDED) != 0:
        write_record(work, 0, n_cols, n_cols, True, work + load_i64(phase + RECORD))
    _choose(phase, work + load_i64(phase + CHOICE))


@kernel("void(int64, int64, int64)")
def _run_up(phase, unit, work):
    """Rows of gate or up of one chosen expert: units go expert by expert, gate before up, as they lie in memory."""
    hidden, inner, rows = load_i64(phase + HIDDEN), load_i64(phase + INNER), load_i64(phase + ROWS)
    per_matrix = (inner + rows - 1) // rows
    slot, rest = unit // (2 * per_matrix), unit % (2 * per_matrix)
    first = rest % per_matrix * rows
    expert = load_i64(work + load_i64(phase + CHOICE) + 8 * slot)
    matrix = phase + FIRST if rest < per_matrix else phase + SECOND
    out = load_i64(phase + GATED) if rest < per_matrix else load_i64(phase + UPPED)
    record = work + load_i64(phase + RECORD) if load_i64(phase + ROUNDED) != 0 else work
    gemv(matrix, expert, first, min(rows, inner - first), hidden, record, out + 4 * (inner * slot + first))


@kernel("void(int64, int64)")
def _prepare_down(phase, work):
    """silu(gate) * up of the chosen experts and the shared one as records, and the choice again for its weights."""
    inner, size, shared = load_i64(phase + INNER), load_i64(phase + RECORDS_BYTES), load_i64(phase + SHARED_INNER)
    temporary = work + load_i64(phase + TEMPORARY)
    for slot in range(load_i64(phase + TOP_K)):
        at = 4 * inner * slot
        swiglu(load_i64(phase + GATED) + at, load_i64(phase + UPPED) + at, inner, temporary)
        write_record(temporary, 0, inner, inner, load_i64(phase + ROUNDED) != 0, work + size * slot)
    if shared > 0:
        swiglu(load_i64(phase + SHARED_GATED), load_i64(phase + SHARED_UPPED), shared, temporary)
        record = work + size * load_i64(phase + TOP_K)
        write_record(temporary, 0, shared, shared, load_i64(phase + SHARED_ROUNDED) != 0, record)
    _choose(phase, work + load_i64(phase + CHOICE))


@kernel("void(int64, int64, int64)")
def _run_down(phase, unit, work):
    """Output rows: the residual plus the weighted sum of the chosen experts' down rows and the shared one's."""
    hidden, rows, top_k = load_i64(phase + HIDDEN), load_i64(phase + ROWS), load_i64(phase + TOP_K)
    first, size, inner = rows * unit, load_i64(phase + RECORDS_BYTES), load_i64(phase + INNER)
    n_rows = min(rows, hidden - first)
    out, temporary = load_i64(phase + OUT) + 4 * first, work + load_i64(phase + TEMPORARY)
    ids = work + load_i64(phase + CHOICE)
    for slot in range(top_k):
        gemv(phase + FIRST, load_i64(ids + 8 * slot), first, n_rows, inner, work + size * slot, temporary)
        scale_add(load_f32(ids + 8 * top_k + 4 * slot), temporary, n_rows, out)
    if load_i64(phase + SHARED_INNER) > 0:
        gemv(phase + SECOND, 0, first, n_rows, load_i64(phase + SHARED_INNER), work + size * top_k, temporary)
        scale_add(1.0, temporary, n_rows, out)


@dataclass(frozen=True)
class Router:
    """How the experts are chosen; fields as in Hugging Face's config.json.

    Attributes:
        logits: address of float32 (E,).
        bias: address of float32 (E,), or 0.
        scoring: SOFTMAX, SIGMOID or SOFTMAX_AFTER_TOPK.
    """

    logits: int
    bias: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    scoring: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @property
    def words(self) -> list[int]:
        """The first arguments of both phases."""
        return [
            self.logits, self.bias, self.n_routed_experts, self.num_experts_per_tok, self.n_group, self.topk_group,
            self.scoring, self.norm_topk_prob, float_bits(self.routed_scaling_factor),
        ]  # fmt: skip

    @property
    def choice_bytes(self) -> int:
        """Work memory of one choice."""
        return padded(12 * self.num_experts_per_tok + 8 * self.n_routed_experts + 8 * self.n_group)


def expert_phases(
    input_: Input,
    router: Router,
    experts: Experts,
    gated: int,
    upped: int,
    shared: tuple[int, int, Weight] | None,
    out: int,
    n_workers: int,
) -> tuple[Phase, Phase]:
    """The two phases of a layer's experts, from the normed input to the sum added to `out`.

    Args:
        gated, upped: addresses of float32 (K, inner) between the phases.
        shared: addresses of the shared expert's gate and up outputs, computed before, and its down matrix.
        out: address of float32 (hidden,), where the experts' sum is added.
    """
    gate, up, down = experts.gate, experts.up, experts.down
    hidden, inner, top_k = gate.n_cols, gate.n_rows, router.num_experts_per_tok
    rows = unit_rows(gate, 2 * top_k * inner * gate.row_bytes, n_workers)
    record, choice = padded(4 * hidden), padded(4 * hidden) + record_bytes(hidden)
    rounded = gate.format.integer or up.format.integer
    up_words = [
        *router.words, choice, input_.x, input_.norm, float_bits(input_.epsilon), hidden, inner, rounded, record,
        gated, upped, rows, 0, 0, 0, 0, 0, 0, 0, *gate.fields, *up.fields,
    ]  # fmt: skip
    n_units = 2 * top_k * -(-inner // rows)
    up_phase = Phase(_prepare_up.address, _run_up.address, n_units, up_words, choice + router.choice_bytes)

    shared_gated, shared_upped, shared_down = shared or (0, 0, None)
    shared_inner = shared_down.n_cols if shared_down else 0
    # Whole vectors: scale_add rounds once in them and twice behind, and where units end must not change results.
    rows = max(16, min(_DOWN_BYTES // down.row_bytes, hidden // (8 * n_workers)) // 16 * 16)
    size = record_bytes(max(inner, shared_inner))
    temporary = size * (top_k + 1)
    choice = temporary + padded(4 * max(rows, inner, shared_inner))
    down_words = [
        *router.words, choice, 0, 0, 0, hidden, inner, down.format.integer, 0, gated, upped, rows, out, size,
        shared_gated, shared_upped, shared_inner, bool(shared_down and shared_down.format.integer), temporary,
        *down.fields, *(shared_down.fields if shared_down else []),
    ]  # fmt: skip
    work_bytes = choice + router.choice_bytes
    return up_phase, Phase(_prepare_down.address, _run_down.address, -(-hidden // rows), down_words, work_bytes)
