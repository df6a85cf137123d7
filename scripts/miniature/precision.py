"""Linear layers whose operands are rounded as BF16 or FP8 hardware would have them; products accumulate in float32.

FP8 is DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3): E4M3 throughout, activations and output gradients scaled by
tiles of 1x128, weights by blocks of 128x128, each scale its tile's largest magnitude over 448, found online. All three
products of a layer (forward, gradient of the input, gradient of the weight) take rounded operands; the weights that the
optimiser moves stay float32. One difference: V3 rounds activations and gradients again in tiles of 128x1 for the weight
gradient, because its tensor cores want scales along the contraction; here the tiles of 1x128 serve for it, too.

N rows (tokens), I input features, O output features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

E4M3_MAX = 448.0
TILE = 128


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    """float32: the nearest BF16 values."""
    return x.bfloat16().float()


def _through_e4m3(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Rounded as E4M3 under the scale that takes `largest` to 448; an all-zero tile stays zero."""
    scale = largest / E4M3_MAX
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def to_fp8_tiles(x: torch.Tensor) -> torch.Tensor:
    """float32, shape of x (..., C): through E4M3 in tiles of 1x128 along the last dimension."""
    n_cols = x.shape[-1]
    padded = F.pad(x, (0, -n_cols % TILE)).unflatten(-1, (-1, TILE))
    rounded = _through_e4m3(padded, padded.abs().amax(-1, keepdim=True))
    return rounded.flatten(-2)[..., :n_cols]


def to_fp8_blocks(w: torch.Tensor) -> torch.Tensor:
    """float32, shape of w (..., O, I): through E4M3 in blocks of 128x128."""
    n_rows, n_cols = w.shape[-2:]
    padded = F.pad(w, (0, -n_cols % TILE, 0, -n_rows % TILE))
    blocks = padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))
    rounded = _through_e4m3(blocks, blocks.abs().amax((-3, -1), keepdim=True))
    return rounded.flatten(-4, -3).flatten(-2, -1)[..., :n_rows, :n_cols]


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True)
class Precision:
    """How the three kinds of operands are rounded."""

    activation: Callable[[torch.Tensor], torch.Tensor]
    weight: Callable[[torch.Tensor], torch.Tensor]
    gradient: Callable[[torch.Tensor], torch.Tensor]


PRECISIONS = {
    "f32": Precision(_exact, _exact, _exact),
    "bf16": Precision(to_bf16, to_bf16, to_bf16),
    "fp8": Precision(to_fp8_tiles, to_fp8_blocks, to_fp8_tiles),
}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, precision: Precision) -> torch.Tensor:
        x, weight = precision.activation(x), precision.weight(weight)
        ctx.save_for_backward(x, weight)
        ctx.precision = precision
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = ctx.precision.gradient(grad)
        return grad @ weight, grad.t() @ x, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, n_rows: list[int], precision: Precision
    ) -> torch.Tensor:
        x, weight = precision.activation(x), precision.weight(weight)
        ctx.save_for_backward(x, weight)
        ctx.n_rows, ctx.precision = n_rows, precision
        out = x.new_empty(len(x), weight.shape[1])
        for part, rows, w in zip(out.split(n_rows), x.split(n_rows), weight, strict=True):
            torch.mm(rows, w.t(), out=part)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        x, weight = ctx.saved_tensors
        grad = ctx.precision.gradient(grad)
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        parts = (tensor.split(ctx.n_rows) for tensor in (grad, x, grad_x))
        for (g, rows, g_x), w, g_w in zip(zip(*parts, strict=True), weight, grad_weight, strict=True):
            torch.mm(g, w, out=g_x)
            torch.mm(g.t(), rows, out=g_w)
        return grad_x, grad_weight, None, None


def linear(x: torch.Tensor, weight: torch.Tensor, precision: Precision) -> torch.Tensor:
    """float32 (N, O): x (N, I) times weight (O, I), forward and backward with rounded operands."""
    return _Linear.apply(x, weight, precision)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, n_rows: list[int], precision: Precision) -> torch.Tensor:
    """float32 (N, O): the first n_rows[0] rows of x (N, I) times weight[0], the next n_rows[1] times weight[1], ...

    Args:
        weight: (E, O, I).
        n_rows: E counts that add to N.
    """
    return _GroupedLinear.apply(x, weight, n_rows, precision)
