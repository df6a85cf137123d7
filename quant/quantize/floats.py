"""Packing F32, F16 and BF16: a copy, or rounding to nearest, ties to even, as ggml rounds."""

from quant.block_format import PACK
from quant.simd.memory import (
    load_f32,
    load_f32x16,
    store_bf16,
    store_bf16x16,
    store_f16,
    store_f16x16,
    store_f32,
    store_f32x16,
)
from quant.target.jit import kernel


@kernel(PACK)
def _f32_pack(x, importance, n_blocks, out, scratch):
    for i in range(0, n_blocks - 15, 16):
        store_f32x16(out + 4 * i, load_f32x16(x + 4 * i))
    for i in range(n_blocks // 16 * 16, n_blocks):
        store_f32(out + 4 * i, load_f32(x + 4 * i))


@kernel(PACK)
def _f16_pack(x, importance, n_blocks, out, scratch):
    for i in range(0, n_blocks - 15, 16):
        store_f16x16(out + 2 * i, load_f32x16(x + 4 * i))
    for i in range(n_blocks // 16 * 16, n_blocks):
        store_f16(out + 2 * i, load_f32(x + 4 * i))


@kernel(PACK)
def _bf16_pack(x, importance, n_blocks, out, scratch):
    for i in range(0, n_blocks - 15, 16):
        store_bf16x16(out + 2 * i, load_f32x16(x + 4 * i))
    for i in range(n_blocks // 16 * 16, n_blocks):
        store_bf16(out + 2 * i, load_f32(x + 4 * i))


F32, F16, BF16 = _f32_pack, _f16_pack, _bf16_pack
