"""Hyper-connections on the device: what network.hyper.mix_streams does in some hundred of torch's launches, in two.

Letters: T tokens, n streams (a power of two), D hidden_size.
"""

import torch
import triton
import triton.language as tl

from localrun.models.config import Config
from localrun.network.hyper import Return

_COLUMNS = 512  # of streams that a program mixes


@triton.jit
def _doubly_stochastic(mixed, epsilon, N_ITERATIONS: tl.constexpr):
    """Of (n, n), rows and columns normed in turn."""
    m = tl.exp(mixed - tl.max(mixed, 1)[:, None])
    m = m / tl.sum(m, 1)[:, None] + epsilon
    m = m / (tl.sum(m, 0)[None, :] + epsilon)
    for _i in range(N_ITERATIONS - 1):
        m = m / (tl.sum(m, 1)[:, None] + epsilon)
        m = m / (tl.sum(m, 0)[None, :] + epsilon)
    return m


@triton.jit
def mix_kernel(computed, scale, base, streams, out, post, mix, width, epsilon, N: tl.constexpr,
               N_ITERATIONS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Program (token, columns): these of what the sublayer reads; the first one writes what expand_kernel takes, too.

    computed: (T, 2 n + n * n). scale: (3,). post: (T, n). mix: (T, n, n).
    """
    token, stream = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    computed += token * (2 * N + N * N)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    pre = tl.load(computed + stream) * tl.load(scale) + tl.load(base + stream)
    pre = 1 / (1 + tl.exp(-pre)) + epsilon
    at = streams + (token * N + stream)[:, None] * width + column[None, :]
    tile = tl.load(at, mask=(column < width)[None, :], other=0.0)
    tl.store(out + token * width + column, tl.sum(pre[:, None] * tile, 0), mask=column < width)
    if tl.program_id(1) == 0:
        value = tl.load(computed + N + stream) * tl.load(scale + 1) + tl.load(base + N + stream)
        tl.store(post + token * N + stream, 2 / (1 + tl.exp(-value)))
        entry = stream[:, None] * N + stream[None, :]
        mixed = tl.load(computed + 2 * N + entry) * tl.load(scale + 2) + tl.load(base + 2 * N + entry)
        tl.store(mix + token * N * N + entry, _doubly_stochastic(mixed, epsilon, N_ITERATIONS))


@triton.jit
def expand_kernel(y, streams, post, mix, out, width, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (token, columns): these of all streams behind the sublayer."""
    token, stream = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    at = (token * N + stream)[:, None] * width + column[None, :]
    before, new = tl.load(streams + at, mask=inside[None, :], other=0.0), tl.load(y + token * width + column, inside)
    for j in tl.static_range(N):
        part = tl.load(mix + (token * N + stream) * N + j)
        value = tl.load(post + token * N + j) * new + tl.sum(part[:, None] * before, 0)
        tl.store(out + (token * N + j) * width + column, value, mask=inside)


def mix_streams(
    computed_Tm: torch.Tensor, scale: torch.Tensor, base_m: torch.Tensor, streams_TnD: torch.Tensor, config: Config
) -> tuple[torch.Tensor, Return]:
    """As network.hyper.mix_streams."""
    n_tokens, n, width = streams_TnD.shape
    streams_TnD, device = streams_TnD.contiguous(), streams_TnD.device
    out_TD, post_Tn = torch.empty(n_tokens, width, device=device), torch.empty(n_tokens, n, device=device)
    mix_Tnn = torch.empty(n_tokens, n, n, device=device)
    grid = n_tokens, triton.cdiv(width, _COLUMNS)
    mix_kernel[grid](
        computed_Tm.contiguous(), scale, base_m, streams_TnD, out_TD, post_Tn, mix_Tnn, width, config.hc_eps, n,
        config.hc_sinkhorn_iters, _COLUMNS, num_warps=4,
    )  # fmt: skip

    def expand(y_TD: torch.Tensor) -> torch.Tensor:
        expanded_TnD = torch.empty_like(streams_TnD)
        expand_kernel[grid](
            y_TD.contiguous(), streams_TnD, post_Tn, mix_Tnn, expanded_TnD, width, n, _COLUMNS, num_warps=4
        )
        return expanded_TnD

    return out_TD, expand
