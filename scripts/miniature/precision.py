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


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """float32 values of at most 448: the nearest E4M3 values, ties to even; as torch.float8_e4m3fn, but vectorised.

    Three bits of mantissa remain of 23; below 2**-6 values are multiples of 2**-9, which adding and taking away 1.5
    times 2**(23 - 9) leaves.
    """
    bits = x.view(torch.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).view(torch.float32)
    subnormal = (x + 1.5 * 2.0**14) - 1.5 * 2.0**14
    return torch.where(x.abs() < 2.0**-6, subnormal, normal)


def _through_e4m3(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Rounded as E4M3 under the scale that takes `largest` to 448; an all-zero tile stays zero."""
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    return to_e4m3(x / scale) * scale


@torch.compile(dynamic=True)
def _tiles(x: torch.Tensor) -> torch.Tensor:
    """(tiles, 128), each row under its scale."""
    return _through_e4m3(x, x.abs().amax(-1, keepdim=True))


@torch.compile(dynamic=True)
def _blocks(w: torch.Tensor) -> torch.Tensor:
    """(blocks down, 128, blocks across, 128), each block under its scale."""
    return _through_e4m3(w, w.abs().amax(-1, keepdim=True).amax(1, keepdim=True))


def to_fp8_tiles(x: torch.Tensor) -> torch.Tensor:
    """float32, shape of x (..., C): through E4M3 in tiles of 1x128 along the last dimension."""
    n_cols = x.shape[-1]
    padded = F.pad(x, (0, -n_cols % TILE)) if n_cols % TILE else x
    return _tiles(padded.reshape(-1, TILE)).view(padded.shape)[..., :n_cols]


def to_fp8_blocks(w: torch.Tensor) -> torch.Tensor:
    """float32, shape of w (..., O, I): through E4M3 in blocks of 128x128."""
    n_rows, n_cols = w.shape[-2:]
    padded = F.pad(w, (0, -n_cols % TILE, 0, -n_rows % TILE)) if n_rows % TILE or n_cols % TILE else w
    blocks = padded.reshape(-1, TILE, padded.shape[-1] // TILE, TILE)
    return _blocks(blocks).view(padded.shape)[..., :n_rows, :n_cols]


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
