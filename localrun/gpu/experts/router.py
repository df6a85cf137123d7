"""The router's choice of a few tokens' experts: one small kernel in place of a dozen of torch's launches.

Letters: T tokens, E experts, K experts per token, g expert groups, M experts of a group.
"""

import torch
import triton
import triton.language as tl

from localrun.cpu.decode import SCORING
from localrun.models.config import Config
from quant.decode.router import SMALLEST_SUM


@triton.jit
def _softplus(x):
    """log(1 + e^x): of small e^x that is e^x, of which 1 + e^x has few bits left."""
    exponential = tl.exp(-tl.abs(x))
    rounded = 1 + exponential
    known = tl.where(rounded == 1, 1.0, rounded - 1)  # of e^x, beside 1
    return tl.maximum(x, 0.0) + tl.where(rounded == 1, exponential, tl.log(rounded) * (exponential / known))


@triton.jit
def _first_best(score, is_open, index, N: tl.constexpr):
    """The lowest index with the best score among the open ones; scores are not NaN, some are open."""
    best = tl.max(tl.where(is_open, score, float("-inf")), 0)
    return tl.min(tl.where(is_open & (score == best), index, N), 0)


@triton.jit
def _kept_groups(choice, expert, group, inside, N_GROUPS: tl.constexpr, MEMBERS: tl.constexpr, KEPT: tl.constexpr,
                 BY_BEST: tl.constexpr, BLOCK_G: tl.constexpr):  # fmt: skip
    """Which experts (BLOCK_E,) are in the best groups: by their best expert, or by the sum of their two best."""
    groups = tl.arange(0, BLOCK_G)
    mine = (group[None, :] == groups[:, None]) & inside[None, :]
    score = tl.max(tl.where(mine, choice[None, :], float("-inf")), 1)
    if not BY_BEST and MEMBERS > 1:
        is_best = mine & (choice[None, :] == score[:, None])
        best = tl.min(tl.where(is_best, expert[None, :], N_GROUPS * MEMBERS), 1)
        others = mine & (expert[None, :] != best[:, None])
        score += tl.max(tl.where(others, choice[None, :], float("-inf")), 1)
    is_open = groups < N_GROUPS
    kept = group < 0
    for _n_kept in tl.static_range(KEPT):
        chosen = _first_best(score, is_open, groups, N_GROUPS)
        is_open &= groups != chosen
        kept |= group == chosen
    return kept


@triton.jit
def router_kernel(logits, bias, given, ids, weights, scaling, smallest_sum, N_EXPERTS: tl.constexpr, K: tl.constexpr,
                  N_GROUPS: tl.constexpr, KEPT: tl.constexpr, SCORING: tl.constexpr, HAS_BIAS: tl.constexpr,
                  NORMALISE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
                  BLOCK_K: tl.constexpr, IS_GIVEN: tl.constexpr):  # fmt: skip
    """Program (token): its experts, best first, or those that are given.

    SCORING: 0 softmax, 1 sigmoid, 2 softmax of the chosen, 3 root of softplus.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    inside = expert < N_EXPERTS
    logit = tl.load(logits + token * N_EXPERTS + expert, mask=inside, other=float("-inf"))
    if SCORING == 0:
        exponential = tl.exp(logit - tl.max(logit, 0))
        affinity = exponential / tl.sum(exponential, 0)
    elif SCORING == 1:
        affinity = 1 / (1 + tl.exp(-logit))
    elif SCORING == 3:
        affinity = tl.sqrt(_softplus(logit))
    else:
        affinity = logit
    choice = affinity
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=inside, other=0.0)
    choice = tl.where(choice == choice, choice, float("-inf"))  # NaN: ids stay within the table, weights are NaN
    is_open = inside
    if N_GROUPS > 1:
        members: tl.constexpr = N_EXPERTS // N_GROUPS
        is_open &= _kept_groups(
            choice, expert, expert // members, inside, N_GROUPS, members, KEPT, SCORING == 0, BLOCK_G
        )
    rank = tl.arange(0, BLOCK_K)
    chosen_ids = tl.zeros([BLOCK_K], tl.int32)
    chosen = tl.full([BLOCK_K], float("-inf") if SCORING == 2 else 0.0, tl.float32)
    for k in tl.static_range(K):
        if IS_GIVEN:
            best = tl.load(given + token * K + k).to(tl.int32)
        else:
            best = _first_best(choice, is_open, expert, N_EXPERTS)
            is_open &= expert != best
        chosen_ids = tl.where(rank == k, best, chosen_ids)
        chosen = tl.where(rank == k, tl.sum(tl.where(expert == best, affinity, 0.0), 0), chosen)
    if SCORING == 2:
        chosen = tl.exp(chosen - tl.max(chosen, 0))
        chosen = chosen / tl.sum(chosen, 0)
    if NORMALISE:
        total = tl.sum(chosen, 0)
        chosen = chosen / tl.where(total < smallest_sum, smallest_sum, total)
    tl.store(ids + token * K + rank, chosen_ids.to(tl.int64), mask=rank < K)
    tl.store(weights + token * K + rank, chosen * scaling, mask=rank < K)


def choose_experts(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, config: Config, ids_TK: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As network.moe.choose_experts, in one launch; of equal scores the lower id (torch.topk promises no order)."""
    logits_TE = logits_TE.contiguous()
    n_tokens, given_TK = logits_TE.shape[0], ids_TK
    ids_TK = torch.empty(n_tokens, config.num_experts_per_tok, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(ids_TK.shape, device=logits_TE.device)
    router_kernel[(n_tokens,)](
        logits_TE, logits_TE if bias_E is None else bias_E, ids_TK if given_TK is None else given_TK.contiguous(),
        ids_TK, weights_TK, config.routed_scaling_factor, SMALLEST_SUM, **router_constants(config, bias_E is not None),
        IS_GIVEN=given_TK is not None, num_warps=4,
    )  # fmt: skip
    return ids_TK, weights_TK


def router_constants(config: Config, has_bias: bool) -> dict[str, int | bool]:
    """What router_kernel is compiled for."""
    c = config
    return {
        "N_EXPERTS": c.n_routed_experts, "K": c.num_experts_per_tok, "N_GROUPS": c.n_group, "KEPT": c.topk_group,
        "SCORING": SCORING[c.scoring_func], "HAS_BIAS": has_bias, "NORMALISE": c.norm_topk_prob,
        "BLOCK_E": triton.next_power_of_2(c.n_routed_experts), "BLOCK_G": triton.next_power_of_2(c.n_group),
        "BLOCK_K": triton.next_power_of_2(c.num_experts_per_tok),
    }  # fmt: skip
