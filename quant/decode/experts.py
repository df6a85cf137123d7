"""Phases of the mixture of experts: the router's choice, gate and up of the chosen experts, down with the weighted sum.

The router's logits come from a rows phase; every worker makes the choice for itself, or takes over one that was made
elsewhere. ExpertMatrices that several tokens chose are read once: a group is one expert with the tokens that chose it.
Source: as localrun/moe.py, whose choose_experts is the reference.
"""

import math
from dataclasses import dataclass

import numpy as np

from quant.decode.linear import Input, multiply, set_token, token_tables, unit_rows
from quant.decode.program import ARGUMENTS, MOST_TOKENS, Phase, float_bits, padded, tokens_of
from quant.gemv.activations import q8_bytes, write_q8
from quant.matrix import MATRIX_BYTES, ExpertMatrices, QuantMatrix
from quant.simd.memory import bits_to_f32, load_f32, load_i64, store_f32, store_i64
from quant.simd.vectors import copy, rms_norm, scale_add, swiglu
from quant.target.jit import inline, kernel

SOFTMAX, SIGMOID, SOFTMAX_AFTER_TOPK, GIVEN = range(4)
SMALLEST_SUM = 6.103515625e-5  # float16's smallest normal number, as in llama.cpp
_DOWN_BYTES = 1 << 19  # of one expert's rows that a worker takes at a time
_NEVER = float("-inf")

# Arguments of both phases: the router's (of a GIVEN choice, ids and weights as LOGITS and BIAS), then their own; at the
# end the matrices.
(
    LOGITS, BIAS, N_EXPERTS, TOP_K, N_GROUP, TOPK_GROUP, SCORING, NORMALISE, FACTOR, CHOICE,
    X, NORM, EPSILON, HIDDEN, INNER, ROUNDED, RECORD, GATED, UPPED, ROWS, OUT, RECORD_BYTES,
    SHARED_GATED, SHARED_UPPED, SHARED_INNER, SHARED_ROUNDED, TEMPORARY, INSTEAD,
) = range(ARGUMENTS, ARGUMENTS + 28 * 8, 8)  # fmt: skip
FIRST, SECOND = ARGUMENTS + 28 * 8, ARGUMENTS + 28 * 8 + MATRIX_BYTES

# A worker's choice, at the phase's CHOICE. A pair is a token and one of its experts, number K * token + slot; there are
# up to P = MOST_TOKENS * K: ids i64[P] | members i64[P], the pairs group by group | starts i64[P + 1] of groups among
# members; those of groups that are not there are where the last one ends | weights f32[P] | scores f32[] to choose by.


@inline
def _members(phase):
    """Where a choice keeps its members."""
    return 8 * MOST_TOKENS * load_i64(phase + TOP_K)


@inline
def _starts(phase):
    """Where it keeps its groups' starts."""
    return 16 * MOST_TOKENS * load_i64(phase + TOP_K)


@inline
def _weights(phase):
    """Where it keeps the weights."""
    return 24 * MOST_TOKENS * load_i64(phase + TOP_K) + 8


@inline
def _scores(phase):
    """Where it keeps scores."""
    return _weights(phase) + 4 * MOST_TOKENS * load_i64(phase + TOP_K)


@inline
def _affinities(phase, t, scores):
    """What the router's logits of token t say of each expert, float32 (E,)."""
    n_experts, scoring = load_i64(phase + N_EXPERTS), load_i64(phase + SCORING)
    logits = load_i64(phase + LOGITS) + 4 * n_experts * t
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
def _choose_for(phase, t, choice):
    """Token t's experts and their weights."""
    n_experts, top_k, bias = load_i64(phase + N_EXPERTS), load_i64(phase + TOP_K), load_i64(phase + BIAS)
    ids, weights = choice + 8 * top_k * t, choice + _weights(phase) + 4 * top_k * t
    affinities = choice + _scores(phase)
    scores = affinities + 4 * n_experts
    _affinities(phase, t, affinities)
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
def _take_over(phase, t, choice):
    """Token t's experts and their weights, as given."""
    top_k = load_i64(phase + TOP_K)
    ids, weights = load_i64(phase + LOGITS), load_i64(phase + BIAS)
    for pair in range(top_k * t, top_k * (t + 1)):
        store_i64(choice + 8 * pair, load_i64(ids + 8 * pair))
        store_f32(choice + _weights(phase) + 4 * pair, load_f32(weights + 4 * pair))


@inline
def _is_here(phase, choice, pair):
    """Whether a pair's expert is one of these: a given choice may name others, by ids outside of them."""
    expert = load_i64(choice + 8 * pair)
    return expert >= 0 and expert < load_i64(phase + N_EXPERTS)


@inline
def _is_member(pair, members, n_members):
    """Whether a pair is among the members so far."""
    found = False
    for i in range(n_members):
        found = found or load_i64(members + 8 * i) == pair
    return found


@inline
def _group(phase, choice, n_tokens):
    """Members and starts: each group has at most one pair of a token, even where NaN made it choose an expert twice."""
    top_k, members, starts = load_i64(phase + TOP_K), choice + _members(phase), choice + _starts(phase)
    n_groups, n_members = 0, 0
    for pair in range(top_k * n_tokens):
        if _is_here(phase, choice, pair) and not _is_member(pair, members, n_members):
            store_i64(starts + 8 * n_groups, n_members)
            store_i64(members + 8 * n_members, pair)
            n_groups += 1
            n_members += 1
            for t in range(pair // top_k + 1, n_tokens):
                for other in range(top_k * t, top_k * (t + 1)):
                    same = load_i64(choice + 8 * other) == load_i64(choice + 8 * pair)
                    if same and not _is_member(other, members, n_members):
                        store_i64(members + 8 * n_members, other)
                        n_members += 1
                        break
    for group in range(n_groups, top_k * n_tokens + 1):
        store_i64(starts + 8 * group, n_members)


@inline
def _choose(phase, choice):
    """All tokens' experts, in a worker's own memory."""
    for t in range(tokens_of(phase)):
        if load_i64(phase + SCORING) == GIVEN:
            _take_over(phase, t, choice)
        else:
            _choose_for(phase, t, choice)
    _group(phase, choice, tokens_of(phase))


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
    """The vectors, normed if there is a norm, and the choice. RECORD_BYTES a token: its vector, then its record."""
    n_cols, epsilon = load_i64(phase + HIDDEN), bits_to_f32(load_i64(phase + EPSILON))
    for t in range(tokens_of(phase)):
        own = work + load_i64(phase + RECORD_BYTES) * t
        x = load_i64(phase + X) + 4 * n_cols * t
        if load_i64(phase + NORM) != 0:
            rms_norm(x, load_i64(phase + NORM), epsilon, n_cols, own)
        else:
            copy(x, n_cols, own)
        if load_i64(phase + ROUNDED) != 0:
            write_q8(own, 0, n_cols, n_cols, True, own + load_i64(phase + RECORD))
    _choose(phase, work + load_i64(phase + CHOICE))


@kernel("void(int64, int64, int64)")
def _run_up(phase, unit, work):
    """Rows of gate or up of one group: units go group by group, gate before up, as they lie in memory."""
    hidden, inner, rows = load_i64(phase + HIDDEN), load_i64(phase + INNER), load_i64(phase + ROWS)
    per_matrix = (inner + rows - 1) // rows
    group, rest = unit // (2 * per_matrix), unit % (2 * per_matrix)
    first = rest % per_matrix * rows
    choice = work + load_i64(phase + CHOICE)
    members, starts = choice + _members(phase), choice + _starts(phase) + 8 * group
    begin, end = load_i64(starts), load_i64(starts + 8)
    if begin == end:
        return
    matrix = phase + FIRST if rest < per_matrix else phase + SECOND
    out = load_i64(phase + GATED) if rest < per_matrix else load_i64(phase + UPPED)
    record = load_i64(phase + RECORD) if load_i64(phase + ROUNDED) != 0 else 0
    tables = token_tables()
    for i in range(begin, end):
        pair = load_i64(members + 8 * i)
        own = work + load_i64(phase + RECORD_BYTES) * (pair // load_i64(phase + TOP_K))
        set_token(tables, i - begin, own + record, out + 4 * (inner * pair + first))
    expert = load_i64(choice + 8 * load_i64(members + 8 * begin))
    multiply(matrix, expert, first, min(rows, inner - first), hidden, tables, end - begin)


@kernel("void(int64, int64)")
def _prepare_down(phase, work):
    """silu(gate) * up of all pairs and of the shared expert behind them as records, and the choice again."""
    inner, size, shared = load_i64(phase + INNER), load_i64(phase + RECORD_BYTES), load_i64(phase + SHARED_INNER)
    temporary, n_tokens, top_k = work + load_i64(phase + TEMPORARY), tokens_of(phase), load_i64(phase + TOP_K)
    choice = work + load_i64(phase + CHOICE)
    _choose(phase, choice)
    for pair in range(top_k * n_tokens):
        if _is_here(phase, choice, pair):
            at = 4 * inner * pair
            swiglu(load_i64(phase + GATED) + at, load_i64(phase + UPPED) + at, inner, temporary)
            write_q8(temporary, 0, inner, inner, load_i64(phase + ROUNDED) != 0, work + size * pair)
    if shared > 0:
        for t in range(n_tokens):
            at = 4 * shared * t
            swiglu(load_i64(phase + SHARED_GATED) + at, load_i64(phase + SHARED_UPPED) + at, shared, temporary)
            record = work + size * (top_k * n_tokens + t)
            write_q8(temporary, 0, shared, shared, load_i64(phase + SHARED_ROUNDED) != 0, record)


@inline
def _down_rows(phase, choice, first, n_rows, work):
    """Rows of down of all groups, float32 (n_rows,) a pair, ROWS apart, at TEMPORARY."""
    inner, size, tables = load_i64(phase + INNER), load_i64(phase + RECORD_BYTES), token_tables()
    members, starts = choice + _members(phase), choice + _starts(phase)
    for group in range(load_i64(phase + TOP_K) * tokens_of(phase)):
        begin, end = load_i64(starts + 8 * group), load_i64(starts + 8 * group + 8)
        if begin == end:
            break
        for i in range(begin, end):
            pair = load_i64(members + 8 * i)
            out = work + load_i64(phase + TEMPORARY) + 4 * load_i64(phase + ROWS) * pair
            set_token(tables, i - begin, work + size * pair, out)
        expert = load_i64(choice + 8 * load_i64(members + 8 * begin))
        multiply(phase + FIRST, expert, first, n_rows, inner, tables, end - begin)


@kernel("void(int64, int64, int64)")
def _run_down(phase, unit, work):
    """Output rows: what is there, or 0 with INSTEAD, plus the weighted sum of the chosen experts' down rows and the
    shared one's.
    """
    hidden, rows, top_k = load_i64(phase + HIDDEN), load_i64(phase + ROWS), load_i64(phase + TOP_K)
    first, n_tokens = rows * unit, tokens_of(phase)
    n_rows = min(rows, hidden - first)
    out, temporary = load_i64(phase + OUT) + 4 * first, work + load_i64(phase + TEMPORARY)
    choice = work + load_i64(phase + CHOICE)
    _down_rows(phase, choice, first, n_rows, work)
    if load_i64(phase + INSTEAD) != 0:
        for t in range(n_tokens):
            for r in range(n_rows):
                store_f32(out + 4 * (hidden * t + r), np.float32(0.0))
    for pair in range(top_k * n_tokens):
        if _is_here(phase, choice, pair):
            weight = load_f32(choice + _weights(phase) + 4 * pair)
            scale_add(weight, temporary + 4 * rows * pair, n_rows, out + 4 * hidden * (pair // top_k))
    if load_i64(phase + SHARED_INNER) > 0:
        tables = token_tables()
        for t in range(n_tokens):
            record = work + load_i64(phase + RECORD_BYTES) * (top_k * n_tokens + t)
            set_token(tables, t, record, temporary + 4 * rows * t)
        multiply(phase + SECOND, 0, first, n_rows, load_i64(phase + SHARED_INNER), tables, n_tokens)
        for t in range(n_tokens):
            scale_add(1.0, temporary + 4 * rows * t, n_rows, out + 4 * hidden * t)


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
        pairs = MOST_TOKENS * self.num_experts_per_tok
        return padded(28 * pairs + 8 + 8 * self.n_routed_experts + 8 * self.n_group)


@dataclass(frozen=True)
class Choice:
    """ExpertMatrices that something else chooses, instead of a Router.

    Attributes:
        ids: address of int64 (T, K); a pair whose id is no expert's, as -1, counts as not chosen.
        weights: address of float32 (T, K).
    """

    ids: int
    weights: int
    n_routed_experts: int
    num_experts_per_tok: int

    @property
    def words(self) -> list[int]:
        """As Router.words."""
        return [self.ids, self.weights, self.n_routed_experts, self.num_experts_per_tok, 0, 0, GIVEN, 0, 0]

    @property
    def choice_bytes(self) -> int:
        """Work memory of it."""
        return padded(28 * MOST_TOKENS * self.num_experts_per_tok + 8)


def expert_phases(
    input_: Input,
    router: Router | Choice,
    experts: ExpertMatrices,
    gated: int,
    upped: int,
    shared: tuple[int, int, QuantMatrix] | None,
    out: int,
    n_workers: int,
    instead: bool = False,
) -> tuple[Phase, Phase]:
    """The two phases of a layer's experts, from their input to the sum added to `out`. T: MOST_TOKENS.

    Args:
        input_: normed, or as it is.
        gated, upped: addresses of float32 (T, K, inner) between the phases.
        shared: addresses of the shared expert's gate and up outputs (T, shared inner), computed before, and its down.
        out: address of float32 (T, hidden), where the experts' sum is added.
        instead: replace what is there by the sum.
    """
    gate, up, down = experts.gate, experts.up, experts.down
    hidden, inner, top_k = gate.n_cols, gate.n_rows, router.num_experts_per_tok
    interleaved = max(gate, up, key=lambda matrix: matrix.format.rows)
    rows = unit_rows(interleaved, 2 * top_k * inner * gate.row_bytes, n_workers)
    record, size = padded(4 * hidden), padded(4 * hidden) + q8_bytes(hidden)
    choice = MOST_TOKENS * size
    rounded = gate.format.integer or up.format.integer
    up_words = [
        *router.words, choice, input_.x, input_.norm, float_bits(input_.epsilon), hidden, inner, rounded, record,
        gated, upped, rows, 0, size, 0, 0, 0, 0, 0, 0, *gate.fields, *up.fields,
    ]  # fmt: skip
    n_units, work_bytes = 2 * top_k * -(-inner // rows), choice + router.choice_bytes
    up_phase = Phase(_prepare_up, _run_up, n_units, up_words, work_bytes, per_token=True)

    shared_gated, shared_upped, shared_down = shared or (0, 0, None)
    shared_inner = shared_down.n_cols if shared_down else 0
    # Whole vectors: scale_add rounds once in them and twice behind, and where units end must not change results.
    rows = max(16, min(_DOWN_BYTES // down.row_bytes, hidden // (8 * n_workers)) // 16 * 16)
    size = q8_bytes(max(inner, shared_inner))
    temporary = size * MOST_TOKENS * (top_k + 1)
    choice = temporary + padded(4 * max(rows * MOST_TOKENS * top_k, inner, shared_inner))
    down_words = [
        *router.words, choice, 0, 0, 0, hidden, inner, down.format.integer, 0, gated, upped, rows, out, size,
        shared_gated, shared_upped, shared_inner, bool(shared_down and shared_down.format.integer), temporary, instead,
        *down.fields, *(shared_down.fields if shared_down else []),
    ]  # fmt: skip
    work_bytes = choice + router.choice_bytes
    return up_phase, Phase(_prepare_down, _run_down, -(-hidden // rows), down_words, work_bytes)
