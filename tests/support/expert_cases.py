"""Random tokens and choices for the fused expert job, and the job itself, from NumPy arrays."""

import numpy as np

from quant.matrix import ExpertMatrices
from quant.ops import experts

N_EXPERTS, PER_TOKEN = 8, 3


def run(pool, matrices, x, ids, weights) -> np.ndarray:
    out = np.full(x.shape, np.nan, np.float32)
    experts.run(pool, ExpertMatrices(*matrices), x.ctypes.data, ids, weights, out.ctypes.data)
    return out


def random_case(n_tokens, hidden, rng):
    x = rng.standard_normal((n_tokens, hidden)).astype(np.float32)
    ids = np.stack([rng.permutation(N_EXPERTS)[:PER_TOKEN] for _ in range(n_tokens)]).astype(np.int64)
    return x, ids, rng.random((n_tokens, PER_TOKEN)).astype(np.float32)
