"""Hyper-connections on the device: what network.hyper.mix_streams does in some hundred of torch's launches, in two.

Letters: T tokens, n streams (a power of two), D hidden_size.
"""

import torch
import triton
import triton.language as tl

from localrun.models.config import Config
from localrun.network.hyper import Return

_COLUMNS = 512  # of streams that a program expands; one that mixes goes over twice as many at a time


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
def _streams_at(streams, token, column, width, N: tl.constexpr):
    """Columns of all of a token's, (n, columns), 0 beside them."""
    at = streams + (token * N + tl.arange(0, N))[:, None] * width + column[None, :]
    return tl.load(at, mask=(column < width)[None, :], other=0.0)


@triton.jit
def mix_kernel(computed, scale, base, streams, norm, out, post, mix, width, epsilon, norm_epsilon, N: tl.constexpr,
               N_ITERATIONS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Program (token): what the sublayer reads, normed, and what expand_kernel takes.

    All columns are one program's, which goes over them twice, and over what it has mixed: a launch for each of the two
    norms would take longer. computed: (T, 2 n + n * n). scale: (3,). norm: (D,). post: (T, n). mix: (T, n, n).
    """
    token, stream = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    computed, out = computed + token * (2 * N + N * N), out + token * width
    squares = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        tile = _streams_at(streams, token, first + tl.arange(0, COLUMNS), width, N)
        squares += tl.sum(tile * tile, 0)
    factor = 1 / tl.sqrt(tl.sum(squares, 0) / (N * width) + norm_epsilon)
    pre = factor * tl.load(computed + stream) * tl.load(scale) + tl.load(base + stream)
    pre = 1 / (1 + tl.exp(-pre)) + epsilon
    squares = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        read = tl.sum(pre[:, None] * _streams_at(streams, token, column, width, N), 0)
        squares += read * read
        tl.store(out + column, read, mask=column < width)
    norm_factor = 1 / tl.sqrt(tl.sum(squares, 0) / width + norm_epsilon)
    tl.debug_barrier()  # a thread may read what another one has written
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        weight = tl.load(norm + column, mask=column < width, other=0.0)
        tl.store(out + column, tl.load(out + column, mask=column < width) * norm_factor * weight, mask=column < width)
    value = factor * tl.load(computed + N + stream) * tl.load(scale + 1) + tl.load(base + N + stream)
    tl.store(post + token * N + stream, 2 / (1 + tl.exp(-value)))
    entry = stream[:, None] * N + stream[None, :]
    mixed = factor * tl.load(computed + 2 * N + entry) * tl.load(scale + 2) + tl.load(base + 2 * N + entry)
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
    computed_Tm: torch.Tensor,
    scale: torch.Tensor,
    base_m: torch.Tensor,
    streams_TnD: torch.Tensor,
    norm_D: torch.Tensor,
    config: Config,
) -> tuple[torch.Tensor, Return]:
    """As network.hyper.mix_streams."""
    n_tokens, n, width = streams_TnD.shape
    streams_TnD, device = streams_TnD.contiguous(), streams_TnD.device
    out_TD, post_Tn = torch.empty(n_tokens, width, device=device), torch.empty(n_tokens, n, device=device)
    mix_Tnn = torch.empty(n_tokens, n, n, device=device)
    mix_kernel[(n_tokens,)](
        computed_Tm.contiguous(), scale, base_m, streams_TnD, norm_D, out_TD, post_Tn, mix_Tnn, width, config.hc_eps,
        config.rms_norm_eps, n, config.hc_sinkhorn_iters, 2 * _COLUMNS, num_warps=8,
    )  # fmt: skip

    def expand(y_TD: torch.Tensor) -> torch.Tensor:
        expanded_TnD = torch.empty_like(streams_TnD)
        expand_kernel[n_tokens, triton.cdiv(width, _COLUMNS)](
            y_TD.contiguous(), streams_TnD, post_Tn, mix_Tnn, expanded_TnD, width, n, _COLUMNS, num_warps=4
        )
        return expanded_TnD

    return out_TD, expand
