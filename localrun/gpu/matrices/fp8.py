"""Matrices of FP8 E4M3 with a scale for every 128 x 128 weights, as DeepSeek-V3 is published; sums in float32.

Few tokens are multiplied in float32 (gemv.py). Of many, activations are rounded to E4M3 too, with a scale for every
128 columns; products of 128 columns are summed on the tensor cores and added up in float32 outside, since Hopper's
sum fewer bits. Cards before compute capability 8.9 have no FP8 products: there both sides are widened to float16,
exactly.
Source: DeepSeek-V3 (arXiv 2412.19437, section 3.3), deepseek-ai/DeepSeek-V3 @9b4e978 inference/kernel.py.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from localrun.gpu import tiles
from localrun.gpu.e4m3 import pack_e4m3
from localrun.gpu.formats.blocks import e4m3_half
from localrun.gpu.formats.layout import LAYOUTS
from localrun.gpu.matrices import gemm, gemv
from localrun.gpu.matrices.matrix import Matrix

GROUP = 128


@triton.jit
def _multiply(
    w, w_scale, x, x_scale, out, n_tokens, n_rows, n_cols, n_scales,
    NATIVE: tl.constexpr, BT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out[t, r] = W[r] . x[t]. Grid: tiles of tokens, tiles of rows (within a row of scales)."""
    t, row0 = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * R
    row = row0 + tl.arange(0, R)
    at_w = w + tl.minimum(row, n_rows - 1).to(tl.int64)[:, None] * n_cols
    at_x = x + tl.minimum(t, n_tokens - 1).to(tl.int64)[None, :] * n_cols
    at_scale = x_scale + tl.minimum(t, n_tokens - 1) * n_scales
    w_scale += row0 // 128 * n_scales
    total = tl.zeros((R, BT), tl.float32)
    for group in range(0, n_scales):
        column = group * 128 + tl.arange(0, 128)
        here = column < n_cols
        codes_w = tl.load(at_w + column[None, :], mask=here[None, :], other=0)
        codes_x = tl.load(at_x + column[:, None], mask=here[:, None], other=0)
        scale = tl.load(w_scale + group) * tl.load(at_scale + group)
        if NATIVE:
            codes_w, codes_x = codes_w.to(tl.float8e4nv, bitcast=True), codes_x.to(tl.float8e4nv, bitcast=True)
            total += tl.dot(codes_w, codes_x) * scale[None, :]
        else:
            half_w, half_x = e4m3_half(codes_w.to(tl.uint32)), e4m3_half(codes_x.to(tl.uint32))
            total += tl.dot(half_w, half_x) * (scale * 65536.0)[None, :]  # each is 2^-8 of its value
    tl.store(out + t[None, :] * n_rows + row[:, None], total, mask=(row < n_rows)[:, None] & (t < n_tokens)[None, :])


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (T, C) -> E4M3 codes uint8 (T, C), and float32 scales (T, ceil(C / 128)): x = code * scale."""
    n_tokens, n_cols = x.shape
    codes, scale = pack_e4m3(torch.nn.functional.pad(x, (0, -n_cols % GROUP)).view(n_tokens, -1, GROUP))
    return codes.view(n_tokens, -1)[:, :n_cols].contiguous(), scale


def has_fp8_products(device: torch.device) -> bool:
    """Whether the device's tensor cores multiply E4M3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class FP8Linear:
    """y = W x for one matrix (out, in)."""

    def __init__(self, codes: np.ndarray, scales: np.ndarray, device: torch.device):
        """codes: uint8 (out, in); scales: float32 (ceil(out / 128), ceil(in / 128))."""
        data, scale = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (codes, scales))
        self.matrix = Matrix(LAYOUTS["FP8_E4M3"], data, 1, *codes.shape, scale)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, in) -> (T, out)."""
        x = x.to(torch.float32).contiguous()
        if 0 < x.shape[0] <= gemv.MOST_TOKENS:
            return gemv.multiply(self.matrix, x[:, None]).squeeze(1)
        return self._many(x, has_fp8_products(x.device))

    def _many(self, x: torch.Tensor, native: bool) -> torch.Tensor:
        matrix, n_tokens = self.matrix, x.shape[0]
        out = torch.empty(n_tokens, matrix.n_rows, device=x.device)
        if n_tokens == 0:
            return out
        codes, scale = quantise(x)
        tile = tiles.of(x.device).many
        tokens = gemm.tile_tokens(tile, n_tokens)
        _multiply[-(-n_tokens // tokens), -(-matrix.n_rows // tile.rows)](
            matrix.data, matrix.scales, codes, scale, out, n_tokens, matrix.n_rows, matrix.n_cols, scale.shape[1],
            native, tokens, tile.rows, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out
