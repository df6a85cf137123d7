"""The router's choice of experts: from its logits, or taken over from where it was made before.

Every worker makes the choice for itself, in memory of its own: a CHOICE and what it points to. A pair is a token and
one of its experts, number K * token + slot; there are up to P = MOST_TOKENS * K. Experts that several tokens chose are
read once, so pairs are put into groups: a group is one expert with the tokens that chose it.
Source: as localrun/network/moe.py, whose choose_experts is the reference.
"""

import math
from dataclasses import dataclass

import numpy as np

from quant.decode.program import MOST_TOKENS, PROGRAM, padded
from quant.simd.memory import load_i32, load_i64, stack, store_i64
from quant.simd.struct import address, address_of, boolean, f32, i64, pointer, struct
from quant.target.jit import inline, kernel
from quant.threads.atomics import call_3

SOFTMAX, SIGMOID, SOFTMAX_AFTER_TOPK, SQRT_SOFTPLUS, PRECOMPUTED = range(5)
MOST_RANKS = 62  # as bits of a word
SMALLEST_SUM = 6.103515625e-5  # float16's smallest normal number, as in llama.cpp
ADDED_SUM = 1e-20  # DeepSeek-V4 adds this to the sum instead
_NEVER = float("-inf")
_loads = stack(8 * MOST_RANKS)

ROUTER = struct(
    "Router",
    logits=pointer(f32),  # (MOST_TOKENS, n_experts)
    has_bias=boolean,
    bias=pointer(f32),  # (n_experts,)
    table=address,  # int32 (vocab, top_k), by token id, where that chooses; or 0
    ids=pointer(i64),  # of a PRECOMPUTED choice: by pair
    weights=pointer(f32),
    n_experts=i64,
    top_k=i64,
    n_group=i64,
    topk_group=i64,
    scoring=i64,
    normalise=boolean,
    factor=f32,
    owners=pointer(i64),  # (n_experts,): bits of the ranks that have each; 0 where all experts are here
    choose=address,  # the kernel
)

CHOICE = struct(
    "Choice",
    ids=pointer(i64),  # (P,); of experts that another rank is to compute what elsewhere() says
    members=pointer(i64),  # (P,): pairs, group by group
    starts=pointer(i64),  # (P + 1,): of groups among members; those that are not there start where the last one ends
    weights=pointer(f32),  # (P,)
    affinities=pointer(f32),  # (n_experts,): of the token whose experts are chosen; that choice's scores behind them
)


def _choice_bytes(n_experts: int, top_k: int, n_group: int) -> int:
    """Memory of a CHOICE and what it points to: 3 int64 and a float32 a pair, two scores an expert and a group."""
    return padded(CHOICE.size + (3 * 8 + 4) * MOST_TOKENS * top_k + 8 + 2 * 4 * (n_experts + n_group))


_SIZE = CHOICE.size


@inline
def new_choice(r, memory):
    """A CHOICE at an address, its parts behind it."""
    c, n_pairs, at = CHOICE(memory), MOST_TOKENS * r.top_k, memory + _SIZE
    c.ids = at
    c.members = at + 8 * n_pairs
    c.starts = at + 8 * 2 * n_pairs
    c.weights = at + 8 * (3 * n_pairs + 1)
    c.affinities = at + 8 * (3 * n_pairs + 1) + 4 * n_pairs
    return c


@inline
def _set_affinities(r, t, affinities):
    """What the router's logits of token t say of each expert, float32 (E,)."""
    n_experts, scoring = r.n_experts, r.scoring
    logits = r.logits + n_experts * t
    largest = logits[0]
    for e in range(1, n_experts):
        largest = max(largest, logits[e])
    total = np.float32(0.0)
    for e in range(n_experts):
        logit = logits[e]
        if scoring == SIGMOID:
            logit = np.float32(1.0) / (np.float32(1.0) + math.exp(-logit))
        elif scoring == SQRT_SOFTPLUS:
            logit = np.float32(math.sqrt(max(np.float64(logit), 0.0) + math.log1p(math.exp(-abs(np.float64(logit))))))
        elif scoring == SOFTMAX:
            logit = math.exp(logit - largest)
            total += logit
        affinities[e] = logit
    if scoring == SOFTMAX:
        for e in range(n_experts):
            affinities[e] = affinities[e] / total


@inline
def _take_best(scores, n):
    """The index of the largest of n scores, the first of equals, which is then taken out; NaN counts as smallest."""
    best, index = np.float32(_NEVER), 0
    for i in range(n):
        if scores[i] > best:
            best, index = scores[i], i
    scores[index] = np.float32(_NEVER)
    return index


@inline
def _group_score(r, scores, n):
    """How good an expert group of n is: its best (V2), or the sum of its two best (V3)."""
    first, second = np.float32(_NEVER), np.float32(_NEVER)
    for i in range(n):
        score = scores[i]
        if score > first:
            first, second = score, first
        elif score > second:
            second = score
    return first if r.scoring == SOFTMAX or n == 1 else first + second


@inline
def _keep_best_groups(r, scores, group_scores):
    """Scores outside the best expert groups become -inf."""
    n_group = r.n_group
    size, kept = r.n_experts // n_group, group_scores + n_group
    for g in range(n_group):
        group_scores[g] = _group_score(r, scores + size * g, size)
        kept[g] = np.float32(0.0)
    for _ in range(r.topk_group):
        kept[_take_best(group_scores, n_group)] = np.float32(1.0)
    for g in range(n_group):
        if kept[g] == 0:
            for i in range(size * g, size * (g + 1)):
                scores[i] = np.float32(_NEVER)


@inline
def _choose_by_table(r, t, token_id, c):
    """Token t's experts, which its id says, and their weights."""
    top_k, total = r.top_k, np.float32(0.0)
    ids, weights = c.ids + top_k * t, c.weights + top_k * t
    _set_affinities(r, t, c.affinities)
    for k in range(top_k):
        ids[k] = load_i32(r.table + 4 * (top_k * token_id + k))
        weights[k] = c.affinities[ids[k]]
        total += weights[k]
    _normalise(r, weights, total)


@inline
def choose_for(r, t, c):
    """Token t's experts and their weights."""
    n_experts, top_k = r.n_experts, r.top_k
    ids, weights = c.ids + top_k * t, c.weights + top_k * t
    affinities, scores = c.affinities, c.affinities + n_experts
    _set_affinities(r, t, affinities)
    for e in range(n_experts):
        scores[e] = affinities[e] + r.bias[e] if r.has_bias else affinities[e]
    if r.n_group > 1:
        _keep_best_groups(r, scores, scores + n_experts)
    total = np.float32(0.0)
    for k in range(top_k):
        chosen = _take_best(scores, n_experts)
        weight = affinities[chosen]
        ids[k] = chosen
        weights[k] = weight
        total += weight
    _normalise(r, weights, total)


@inline
def _normalise(r, weights, total):
    """The chosen experts' weights, made to sum up as the model wants."""
    top_k, divisor = r.top_k, np.float32(1.0)
    if r.scoring == SOFTMAX_AFTER_TOPK:
        largest, total = weights[0], np.float32(0.0)  # the first chosen has the largest logit, but for a bias
        for k in range(1, top_k):
            largest = max(largest, weights[k])
        for k in range(top_k):
            weight = np.float32(math.exp(weights[k] - largest))
            weights[k] = weight
            total += weight
        for k in range(top_k):
            weights[k] = weights[k] / total
        total = np.float32(1.0)
    if r.normalise:
        divisor = max(total, np.float32(SMALLEST_SUM))
        if r.scoring == SQRT_SOFTPLUS:
            divisor = total + np.float32(ADDED_SUM)
    for k in range(top_k):
        weights[k] = weights[k] / divisor * r.factor


@inline
def _take_over(r, t, c):
    """Token t's experts and their weights, as they were chosen before."""
    for pair in range(r.top_k * t, r.top_k * (t + 1)):
        c.ids[pair] = r.ids[pair]
        c.weights[pair] = r.weights[pair]


@inline
def is_here(r, c, pair):
    """Whether a pair's expert is one of these: a choice made before may name others, by ids outside of them."""
    return c.ids[pair] >= 0 and c.ids[pair] < r.n_experts


@inline
def elsewhere(r, expert, rank):
    """What stands for an expert that another rank computes, rank from 1 on: below 0."""
    return -1 - (expert + r.n_experts * (rank - 1))


@inline
def expert_at(r, chosen, rank):
    """The expert of a pair if this rank is to compute it, else -1."""
    found, value = -1, -1 - chosen
    if chosen < 0 and value // r.n_experts == rank - 1:
        found = value % r.n_experts
    return found


@inline
def _rank_of(r, c, pair, loads):
    """Which rank computes a pair: the one that has the expert's other pairs; else of those that have the expert, the
    one with the fewest so far, and of these the first."""
    expert = c.ids[pair]
    for other in range(pair):
        before = c.ids[other]
        if before == expert:
            return 0
        if before < 0 and (-1 - before) % r.n_experts == expert:
            return 1 + (-1 - before) // r.n_experts
    best, owners = -1, r.owners[expert]
    for rank in range(MOST_RANKS):
        if owners >> rank & 1 and (best < 0 or load_i64(loads + 8 * rank) < load_i64(loads + 8 * best)):
            best = rank
    store_i64(loads + 8 * best, load_i64(loads + 8 * best) + 1)
    return best


@inline
def _assign(r, c, n_tokens):
    """Pairs that other ranks compute are marked as theirs."""
    loads = _loads()
    for rank in range(MOST_RANKS):
        store_i64(loads + 8 * rank, 0)
    for pair in range(r.top_k * n_tokens):
        if not is_here(r, c, pair):  # of a choice made before; below 0 it would be another rank's
            c.ids[pair] = r.n_experts
            continue
        rank = _rank_of(r, c, pair, loads)
        if rank > 0:
            c.ids[pair] = elsewhere(r, c.ids[pair], rank)


@inline
def _is_member(pair, members, n_members):
    """Whether a pair is among the members so far."""
    found = False
    for i in range(n_members):
        found = found or members[i] == pair
    return found


@inline
def set_groups(r, c, n_tokens):
    """Members and starts: each group has at most one pair of a token, even where NaN made it choose an expert twice."""
    top_k, members = r.top_k, c.members
    n_groups, n_members = 0, 0
    for pair in range(top_k * n_tokens):
        if is_here(r, c, pair) and not _is_member(pair, members, n_members):
            c.starts[n_groups] = n_members
            members[n_members] = pair
            n_groups += 1
            n_members += 1
            for t in range(pair // top_k + 1, n_tokens):
                for other in range(top_k * t, top_k * (t + 1)):
                    if c.ids[other] == c.ids[pair] and not _is_member(other, members, n_members):
                        members[n_members] = other
                        n_members += 1
                        break
    for group in range(n_groups, top_k * n_tokens + 1):
        c.starts[group] = n_members


@kernel("void(int64, int64, int64)")
def _choose(router, program, memory):
    """All tokens' experts, at an address in a worker's own memory."""
    r, step = ROUTER(router), PROGRAM(program)
    c = new_choice(r, memory)
    for t in range(step.n_tokens):
        if r.scoring == PRECOMPUTED:
            _take_over(r, t, c)
        elif r.table != 0:
            _choose_by_table(r, t, step.ids[t], c)
        else:
            choose_for(r, t, c)
    if address_of(r.owners) != 0:
        _assign(r, c, step.n_tokens)
    set_groups(r, c, step.n_tokens)


@inline
def choose(a, memory):
    """All tokens' experts, at an address in a worker's own memory; a: arguments of a phase with a ROUTER.

    A kernel of its own: several phases need it, and it is large.
    """
    call_3(a.router.choose, address_of(a.router), a.phase.program, memory)
    return CHOICE(memory)


@dataclass(frozen=True)
class Router:
    """How the experts are chosen; fields as in Hugging Face's config.json.

    Attributes:
        logits: address of float32 (E,).
        bias: address of float32 (E,), or 0.
        scoring: SOFTMAX, SIGMOID, SOFTMAX_AFTER_TOPK or SQRT_SOFTPLUS.
        table: address of int32 (vocab, K), the experts of each token id, all of them below E; 0 where scores choose.
        owners: address of int64 (E,), bits of the ranks that have each expert; 0 where all experts are here.
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
    table: int = 0
    owners: int = 0

    @property
    def struct(self) -> np.ndarray:
        """As phases see it."""
        return ROUTER.pack(
            logits=self.logits, has_bias=self.bias != 0, bias=self.bias, table=self.table, ids=0, weights=0,
            n_experts=self.n_routed_experts, top_k=self.num_experts_per_tok,
            n_group=self.n_group, topk_group=self.topk_group,
            scoring=self.scoring, normalise=self.norm_topk_prob, factor=self.routed_scaling_factor,
            owners=self.owners, choose=_choose.address,
        )  # fmt: skip

    @property
    def choice_bytes(self) -> int:
        """Work memory of one choice."""
        return _choice_bytes(self.n_routed_experts, self.num_experts_per_tok, self.n_group)


@dataclass(frozen=True)
class Choice:
    """Experts that something else chooses, instead of a Router.

    Attributes:
        ids: address of int64 (T, K); a pair whose id is no expert's, as -1, counts as not chosen.
        weights: address of float32 (T, K).
        owners: as Router has them.
    """

    ids: int
    weights: int
    n_routed_experts: int
    num_experts_per_tok: int
    owners: int = 0

    @property
    def struct(self) -> np.ndarray:
        """As phases see it."""
        return ROUTER.pack(
            logits=0, has_bias=False, bias=0, table=0, ids=self.ids, weights=self.weights,
            n_experts=self.n_routed_experts, top_k=self.num_experts_per_tok, n_group=1, topk_group=1,
            scoring=PRECOMPUTED, normalise=False, factor=1.0, owners=self.owners,
            choose=_choose.address,
        )  # fmt: skip

    @property
    def choice_bytes(self) -> int:
        """Work memory of it."""
        return _choice_bytes(0, self.num_experts_per_tok, 0)
