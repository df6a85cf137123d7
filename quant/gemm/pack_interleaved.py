"""Panels of formats with 16 rows interleaved: their words lie side by side already. The arithmetic is pack_256.py's.

Layouts of the blocks: q4_k_r16.py, q5_k_r16.py, q6_k_r16.py.
"""

from quant.gemm.microkernel_step import HALVES, MINIMUM, STEP_BYTES
from quant.gemm.pack_256 import SCALES, store_fives, store_nibbles, store_scales_and_minima, store_sixes
from quant.gemm.packed import REPACK, PanelFormat
from quant.simd.memory import load_f16x16, load_i8x16_picked, load_i32x16, load_i64, store_f32x16
from quant.target.jit import inline, kernel

_load_i8x16 = load_i8x16_picked(range(16))


@inline
def _scales_and_minima(block, out):
    """d, dmin and the 12 bytes behind them, of Q4_K and Q5_K."""
    d, dmin = load_f16x16(block), load_f16x16(block + 32)
    low, high, mixed = load_i32x16(block + 64), load_i32x16(block + 128), load_i32x16(block + 192)
    store_scales_and_minima(d, dmin, low, high, mixed, out)


@kernel(REPACK)
def _q4_k(rows, n_blocks, out):
    block = load_i64(rows)
    for _ in range(n_blocks):
        _scales_and_minima(block, out + SCALES)
        for c in range(4):
            for g in range(8):
                store_nibbles(load_i32x16(block + 256 + 64 * (8 * c + g)), out + 64 * g)
            out += 2 * STEP_BYTES
        block += 2304


@kernel(REPACK)
def _q5_k(rows, n_blocks, out):
    block = load_i64(rows)
    for _ in range(n_blocks):
        _scales_and_minima(block, out + SCALES)
        for g in range(8):
            fifth = load_i32x16(block + 256 + 64 * g)
            for c in range(4):
                words = load_i32x16(block + 768 + 64 * (8 * c + g))
                store_fives(words, fifth, c, out + 2 * STEP_BYTES * c + 64 * g)
        out += 8 * STEP_BYTES
        block += 2816


@kernel(REPACK)
def _q6_k(rows, n_blocks, out):
    block = load_i64(rows)
    for _ in range(n_blocks):
        d = load_f16x16(block + 3328)
        for i in range(16):
            scale = _load_i8x16(block + 3072 + 16 * i) * d
            store_f32x16(out + SCALES + STEP_BYTES * (i // 2) + 64 * (i % 2), scale)
        for half in range(2):
            for g in range(8):
                bits = load_i32x16(block + 2048 + 64 * (8 * half + g))
                to = out + 4 * STEP_BYTES * half + 64 * g
                store_sixes(load_i32x16(block + 64 * (16 * half + g)), bits, 0, to)
                store_sixes(load_i32x16(block + 64 * (16 * half + 8 + g)), bits, 1, to)
        out += 8 * STEP_BYTES
        block += 3360


Q4_K_R16 = PanelFormat(MINIMUM, 0, _q4_k)
Q5_K_R16 = PanelFormat(MINIMUM, 0, _q5_k)
Q6_K_R16 = PanelFormat(HALVES, 32, _q6_k)
