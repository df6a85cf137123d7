"""Random tokens and choices for the fused expert job, and the job itself, from NumPy arrays."""

import numpy as np

from quant.matrix import ExpertMatrices
from quant.ops import experts
from quant.simd.gated import SWIGLU, Activation

N_EXPERTS, PER_TOKEN = 8, 3


def run(pool, matrices, x, ids, weights, biases=None, activation=SWIGLU) -> np.ndarray:
    out = np.full(x.shape, np.nan, np.float32)
    matrices = ExpertMatrices(*matrices, biases, activation)
    experts.run(pool, matrices, x.ctypes.data, ids, weights, out.ctypes.data)
    return out


def gated(activation: Activation, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """What an activation makes of gate and up."""
    if not activation.limit:
        return gate / (1 + np.exp(-gate)) * up
    gate, up = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit)
    return (up + activation.offset) * gate / (1 + np.exp(-activation.alpha * gate))


def random_biases(n_experts: int, inner: int, hidden: int, rng) -> tuple[np.ndarray, ...]:
    """Of gate, up and down."""
    return tuple(rng.standard_normal((n_experts, width)).astype(np.float32) for width in (inner, inner, hidden))


def random_case(n_tokens, hidden, rng):
    x = rng.standard_normal((n_tokens, hidden)).astype(np.float32)
    ids = np.stack([rng.permutation(N_EXPERTS)[:PER_TOKEN] for _ in range(n_tokens)]).astype(np.int64)
    return x, ids, rng.random((n_tokens, PER_TOKEN)).astype(np.float32)
