"""Products of many tokens at this process's ISA level, to compare with other levels'.

    python panel_results.py OUT FORMAT ...

The formats are some that have panels.
"""

import itertools
import sys

import kernels
import numpy as np

from quant.gemm import packed
from quant.matrix import ExpertMatrices
from quant.ops import experts
from quant.threads.pool import Pool

N_EXPERTS = 5
# Matrices by format, with rows that fill no panel and columns that take two panels or a piece of one; tokens.
SHAPES = [((1, 45, 512), range(1, 41)), ((2, 7, 768), (5, 13, 29)), ((1, 64, 256), (12, 24, 25))]
# Gate, up, down: scales by 32 and by 16, with minima and without, so that each product needs other shapes of tiles.
EXPERTS = [("Q4_K", "Q6_K", "Q8_0"), ("Q6_K", "Q4_0", "Q5_K"), ("IQ4_XS", "IQ4_XS", "Q6_K")]


def products(pool: Pool, names: list[str]) -> dict[str, np.ndarray]:
    """linear.multiply for formats that have panels."""
    found = {}
    for name in names:
        for shape, counts in SHAPES:
            rng = np.random.default_rng(shape[1])
            weight, _ = kernels.random_weight(name, shape, rng)
            for n_tokens in counts:
                x = rng.standard_normal((n_tokens, shape[0], shape[2])).astype(np.float32)
                found[f"{name} {shape} {n_tokens}"] = kernels.multiply(pool, weight, x)
    return found


def experts_of_a_layer(pool: Pool, types: list[tuple[str, str, str]]) -> dict[str, np.ndarray]:
    """experts.run with tokens spread unevenly, some pairs left out."""
    found, hidden, inner = {}, 512, 256
    for names, n_tokens in itertools.product(types, (9, 33, 70)):
        rng = np.random.default_rng(n_tokens)
        shapes = (N_EXPERTS, inner, hidden), (N_EXPERTS, inner, hidden), (N_EXPERTS, hidden, inner)
        matrices = [kernels.random_weight(name, shape, rng)[0] for name, shape in zip(names, shapes, strict=True)]
        x = rng.standard_normal((n_tokens, hidden)).astype(np.float32)
        ids = np.minimum(rng.integers(-1, 2 * N_EXPERTS, (n_tokens, 2)), N_EXPERTS - 1)
        weights, out = rng.random((n_tokens, 2)).astype(np.float32), np.full(x.shape, np.nan, np.float32)
        experts.run(pool, ExpertMatrices(*matrices), x.ctypes.data, ids, weights, out.ctypes.data)
        found[f"{names} {n_tokens}"] = out
    return found


if __name__ == "__main__":
    packed.tokens_from = lambda *formats: 1
    pool, chosen = Pool(2), sys.argv[2:]
    experts_ = [types for types in EXPERTS if set(types) <= set(chosen)]
    np.savez(sys.argv[1], **products(pool, chosen), **experts_of_a_layer(pool, experts_))
    pool.close()
