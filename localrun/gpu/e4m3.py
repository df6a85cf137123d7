"""8-bit floats of four bits of exponent and three of mantissa (E4M3), with a scale a row.

Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433).
"""

import torch
import triton
import triton.language as tl

E4M3_MAX = 448.0


def pack_e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, uint8 (..., C), and scales, float32 (...), each row's largest magnitude / 448 (1 for a row of zeros)."""
    x = x.float()
    largest = x.abs().amax(-1)
    scales = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    codes = (x / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scales


@triton.jit
def e4m3_code(x):
    """The code, uint8, of float32 x, |x| <= 448, rounded to nearest even: integer arithmetic, as sm_80 has no E4M3."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 steps are 2^-9, those of float32 next to 2^14.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (sign | tl.where(magnitude < 0x3C800000, small, normal)).to(tl.uint8)
