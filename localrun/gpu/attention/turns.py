"""Rotations of queries and keys by their positions, which kernels look up in device memory."""

import numpy as np
import torch
import triton
import triton.language as tl

from localrun.network.rope import Rope

_FINE = tl.constexpr(1024)  # positions of the fine table; the coarse one has every 1024th
_COARSE = 4096  # 4 million positions: more than any model is made for


class Turns:
    """Rotations of all positions, from two tables: turn(1024 a + b) = coarse[a] * fine[b].

    A table of all positions would take 42 MB for 163840 of them, this one 1.3 MB (R = 64). Angles are computed in
    float64; the float32 product of two entries is within 2^-22 of the exact turn.

    Attributes:
        fine, coarse: float32 (_FINE or _COARSE, R/2, 2), cosine and sine; the magnitude is in coarse.
    """

    def __init__(self, rope: Rope, device: torch.device):
        self.rope = rope
        self.fine = self._table(np.arange(_FINE.value), 1.0).to(device)
        self.coarse = self._table(_FINE.value * np.arange(_COARSE), rope.magnitude).to(device)

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """As Rope.turns, complex64 (T, 1, R/2), of positions int64 (T,) on the device. Nothing waits for the host."""
        coarse, fine = self.coarse[positions // _FINE.value], self.fine[positions % _FINE.value]
        return (torch.view_as_complex(coarse) * torch.view_as_complex(fine))[:, None]

    def _table(self, positions: np.ndarray, magnitude: float) -> torch.Tensor:
        angles = np.outer(positions, self.rope.frequencies)
        turns = magnitude * np.stack([np.cos(angles), np.sin(angles)], -1)
        return torch.from_numpy(turns.astype(np.float32))


@triton.jit
def turn_of(fine, coarse, position, pair, inside, HALF: tl.constexpr):
    """Cosines and sines of one position's pairs."""
    near = fine + (position % _FINE) * 2 * HALF + 2 * pair
    far = coarse + (position // _FINE) * 2 * HALF + 2 * pair
    cos_near, sin_near = tl.load(near, mask=inside, other=0.0), tl.load(near + 1, mask=inside, other=0.0)
    cos_far, sin_far = tl.load(far, mask=inside, other=0.0), tl.load(far + 1, mask=inside, other=0.0)
    return cos_near * cos_far - sin_near * sin_far, cos_near * sin_far + sin_near * cos_far
