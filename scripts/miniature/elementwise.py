"""What lies between the matrix products, fused by torch.compile: memory traffic, not arithmetic, is its cost on a CPU.

torch.compiler.set_stance("force_eager") runs the same functions uncompiled, for shapes that change from call to call.

B batch, T tokens, N = B*T, H heads, R qk_rope_head_dim.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


@torch.compile(dynamic=False)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., D) over its root mean square, times weight (D,)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@torch.compile(dynamic=False)
def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, (N, I) from (N, 2I)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@torch.compile(dynamic=False)
def queries_keys_values(
    q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, v_head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of one width, (B, T, H, nope + R): rotated, the rotary key given to all heads, values padded.

    Args:
        q: (B, T, H, nope + R).
        kv: (B, T, H, nope + v_head_dim).
        k_rope: (B, T, 1, R).
        cos: (T, 1, R/2), sin alike.
    """
    n_rope = k_rope.shape[-1]
    n_nope = q.shape[-1] - n_rope
    shared = _rotate(k_rope, cos, sin).expand(-1, -1, q.shape[2], -1)
    queries = torch.cat((q[..., :n_nope], _rotate(q[..., n_nope:], cos, sin)), -1)
    keys = torch.cat((kv[..., :n_nope], shared), -1)
    return queries, keys, F.pad(kv[..., n_nope:], (0, n_nope + n_rope - v_head_dim))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Consecutive pairs turned by their angle. Queries and keys are permuted alike, which their products do not see."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)
