"""What gate and up of an expert become before down: SwiGLU, plain or with bounds on both (gpt-oss, DeepSeek-V4).

Source: gpt-oss model card (arXiv 2508.10925), section 2.2; transformers 5.24, models/gpt_oss and deepseek_v4.
"""

import math
from dataclasses import dataclass

import numpy as np

from quant.simd.floats import exp, maximum, splat_f32x16
from quant.simd.memory import load_f32, load_f32x16, store_f32, store_f32x16
from quant.simd.struct import f32, struct
from quant.simd.vectors import swiglu
from quant.target.jit import inline

ACTIVATION = struct("Activation", alpha=f32, limit=f32, offset=f32)


@dataclass(frozen=True)
class Activation:
    """(clip(up, -limit, limit) + offset) * g * sigmoid(alpha * g), g = min(gate, limit); silu(gate) * up if limit is 0.

    gpt-oss has offset 1; DeepSeek-V4 0, and alpha 1.
    """

    alpha: float = 0.0
    limit: float = 0.0
    offset: float = 1.0

    @property
    def struct(self) -> np.ndarray:
        """As kernels see it."""
        return ACTIVATION.pack(alpha=self.alpha, limit=self.limit, offset=self.offset)


SWIGLU = Activation()


@inline
def _minimum(v, limit):
    return -maximum(-v, -limit)


@inline
def _bounded_swiglu(a, gate, up, n, out):
    whole, alpha, limit, offset = n // 16 * 16, a.alpha, a.limit, a.offset
    most = splat_f32x16(limit)
    for i in range(0, whole, 16):
        g = _minimum(load_f32x16(gate + 4 * i), most)
        u = maximum(_minimum(load_f32x16(up + 4 * i), most), -most)
        store_f32x16(out + 4 * i, (u + offset) * (g / (exp(g * -alpha) + 1)))
    for i in range(whole, n):
        g = min(load_f32(gate + 4 * i), limit)
        u = max(min(load_f32(up + 4 * i), limit), -limit)
        store_f32(out + 4 * i, (u + offset) * (g / (np.float32(1.0) + math.exp(-alpha * g))))


@inline
def gated(a, gate, up, n, out):
    """out = what an ACTIVATION makes of gate and up, all float32 (n,); out may be either."""
    if a.limit == 0:
        swiglu(gate, up, n, out)
    else:
        _bounded_swiglu(a, gate, up, n, out)
