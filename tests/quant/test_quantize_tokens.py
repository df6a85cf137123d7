"""Rounding for token panels, against activations.q8_ref."""

import kernels
import numpy as np
import pytest

from quant.gemm import quantize_tokens
from quant.gemm.quantize_tokens import BLOCK_BYTES, BLOCKS_TOGETHER
from quant.gemv import activations
from quant.target.jit import kernel
from quant.threads.pool import aligned_bytes


@kernel("void(int64, int64, int64, int64)")
def _round_row(x, n_cols, out, work):
    quantize_tokens.round_row(x, n_cols, out, work)


def rounded_row(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q int8 (n, 32), d and s float32 (n,), sums int32 (2, n) of the n groups of float32 (K,)."""
    out, work = aligned_bytes(quantize_tokens.row_bytes(x.size)), aligned_bytes(quantize_tokens.WORK_BYTES)
    kernels.call(_round_row, x, x.size, out, work)
    blocks, n = out.reshape(-1, BLOCK_BYTES), x.size // activations.Q8_BLOCK
    q = blocks[:, : quantize_tokens.D].copy().view(np.int8).reshape(-1, activations.Q8_BLOCK)
    d, s = (blocks[:, at : at + 64].copy().view(np.float32).ravel() for at in (quantize_tokens.D, quantize_tokens.S))
    sums = (
        blocks[:, quantize_tokens.SUMS :]
        .copy()
        .view(np.int32)
        .reshape(-1, 2, BLOCKS_TOGETHER)
        .swapaxes(0, 1)
        .reshape(2, -1)
    )
    return q[:n], d[:n], s[:n], sums[:, :n]


@pytest.mark.parametrize("n_cols", [32, 256, 512, 1408, 7168])
def test_groups_are_rounded_as_in_the_reference(n_cols):
    rng = np.random.default_rng(n_cols)
    x = (rng.standard_normal(n_cols) * 2.0 ** rng.integers(-90, 90, n_cols // 32).repeat(32)).astype(np.float32)
    x[:32] = np.arange(-127, 128, 8) / 2  # ties
    q_ref, d_ref = activations.q8_ref(x)
    q, d, s, sums = rounded_row(x)
    assert np.array_equal(q.ravel(), q_ref)
    assert np.array_equal(d, d_ref)
    halves = q.reshape(-1, 2, 16).sum(-1, dtype=np.int32).T
    assert np.array_equal(sums, halves)
    assert np.array_equal(s, d * halves.sum(0).astype(np.float32))


def test_zeros_nan_and_tiny_values():
    x = np.random.default_rng(0).standard_normal(192).astype(np.float32)
    x[:32], x[32:64], x[64:96], x[100] = 0, np.nan, 1e-40, np.nan
    q, d, _, _ = rounded_row(x)
    assert not q[:2].any() and d[0] == 0 and np.isnan(d[1])
    assert np.all(np.abs(q[2] * d[2] - 1e-40) <= 1e-40)  # 127 / 1e-40 is no float32: the scale is not exact
    q_ref, d_ref = activations.q8_ref(np.nan_to_num(x[96:], nan=0.0))
    assert np.array_equal(q[3:].ravel(), q_ref) and np.array_equal(d[3:], d_ref)
