"""Weights of many kinds, quantised: `quantized.py TYPE ...` prints a digest, to compare with other ISA levels'."""

import functools
import hashlib
import sys
from collections.abc import Iterable

import numpy as np

from quant.formats import registry
from quant.quantize import tensor
from quant.threads.pool import Pool

COLS = 768  # three blocks of 256, a multiple of 32 and of no larger power of two than 256
KINDS = ("gaussian", "heavy-tailed", "all-equal", "all-zero", "one outlier")


@functools.cache
def pool(n_workers: int = 2) -> Pool:
    return Pool(n_workers)


def weights(kind: str, shape: tuple[int, int], seed: int = 1) -> np.ndarray:
    """float32 of `shape`, about as large as a model's."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 0.02
    if kind == "heavy-tailed":
        x = rng.standard_t(3, shape) * 0.02
    elif kind == "all-equal":
        x[:] = x[:, :1]
    elif kind == "all-zero":
        x[:] = 0
    elif kind == "one outlier":
        x[np.arange(len(x)), rng.integers(0, shape[1], len(x))] = 3
    return x.astype(np.float32)


def packed(name: str, x: np.ndarray, importance: np.ndarray | None = None, n_workers: int = 2) -> np.ndarray:
    """uint8 (rows, row bytes) of float32 (rows, cols)."""
    format_ = registry.get(name)
    out = np.full((len(x), format_.row_bytes(x.shape[1])), 0xAA, np.uint8)
    address = 0 if importance is None else importance.ctypes.data
    assert tensor.pack(pool(n_workers), format_, x.ctypes.data, *x.shape, out.ctypes.data, address) == -1
    return out


def importances(seed: int = 4) -> np.ndarray:
    """float32 (COLS,): log-normal, as mean squares of activations are."""
    return np.exp(1.5 * np.random.default_rng(seed).standard_normal(COLS)).astype(np.float32)


def digest(names: Iterable[str]) -> str:
    """Of these formats' blocks of every kind of weights, with and without importances."""
    blocks = hashlib.sha256()
    for name in names:
        for kind in KINDS:
            x = weights(kind, (20, COLS))
            blocks.update(packed(name, x))
            blocks.update(packed(name, x, importances()))
    return blocks.hexdigest()


if __name__ == "__main__":
    print(digest(sys.argv[1:]))
