"""How far a kernel may be from what is right, in float64: what trials of kernels share.

Letters: T tokens, S cached tokens, H heads.
"""

from __future__ import annotations

import torch

from localrun.gpu.attention.flash_decoding import dtype_of_products
from localrun.gpu.proof.subject import Subject
from localrun.gpu.proof.task import Findings

HALF, SINGLE = 2.0**-11, 2.0**-24  # what rounding to float16 and to float32 changes of a value, at most


def few_bound(n_cols: int) -> float:
    """Of S, of a product of few tokens."""
    return (n_cols / 64 + 32) * SINGLE


def many_bound(n_cols: int) -> float:
    """Of S, of a product of many tokens."""
    return 2 * HALF + n_cols / 8 * 2 * SINGLE


def worst(found: torch.Tensor, right: torch.Tensor, bound: torch.Tensor) -> float:
    """The largest error as a part of its bound; NaN if anything is."""
    return float(((found.cpu().double() - right).abs() / bound.clamp_min(1e-300)).max())


def compare(findings: Findings, what: str, found: torch.Tensor, right: torch.Tensor, bound: torch.Tensor) -> None:
    """Entry by entry."""
    error = worst(found, right, bound)
    if error <= 1:
        findings.bounded(what, error, 1.0)
        return
    off = (found.cpu().double() - right).abs()
    at = int((off / bound.clamp_min(1e-300)).nan_to_num(nan=torch.inf).argmax())
    findings.bounded(what, float(off.flatten()[at]), float(bound.expand_as(off).flatten()[at]))


def finite(findings: Findings, what: str, found: torch.Tensor) -> None:
    """Of all that came out, not of the sample alone."""
    if not bool(found.isfinite().all()):
        findings.fault(f"{what}: {int((~found.isfinite()).sum())} of {found.numel()} results are no numbers")


def half_on(subject: Subject) -> torch.dtype:
    """Of attention's products."""
    return dtype_of_products(subject.device.torch)


def softmax(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int = 0,
    sinks_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the last T of S tokens, float64 (T, H, V), and how far a kernel may be off.

    q: (T, H, d). keys, values: (S, H, d). A sink is a logit more, without a value.
    """
    n_tokens, n_cached = q.shape[0], keys.shape[0]
    q = q.double()
    scores = scale * torch.einsum("thd,shd->ths", q, keys)
    sizes = scale * torch.einsum("thd,shd->ths", q.abs(), keys.abs())
    ages = torch.arange(n_cached - n_tokens, n_cached)[:, None] - torch.arange(n_cached)[None]
    hidden = (ages < 0) | (ages >= (window or n_cached))
    scores, sizes = scores.masked_fill(hidden[:, None], -torch.inf), sizes.masked_fill(hidden[:, None], 0.0)
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H.double()[None, :, None].expand(n_tokens, -1, 1)], -1)
    weights = scores.softmax(-1)[..., :n_cached]
    off = (HALF + q.shape[-1] * SINGLE) * sizes.amax(-1, keepdim=True)
    size = torch.einsum("ths,shv->thv", weights, values.abs())
    return torch.einsum("ths,shv->thv", weights, values), ((2 * off).expm1() + 2 * HALF + n_cached * SINGLE) * size
