"""Helpers of the kernels that quantise blocks of 32 weights: averages of a row, and the levels of a scale."""

import numpy as np

from quant.quantize.search import mean, sum_squares
from quant.simd.exact import clamp_levels, truncate_to_i8
from quant.target.jit import inline


@inline
def inverse_of(d):
    """1 / d; 0 for 0."""
    return np.float32(1.0) / d if d != 0 else np.float32(0.0)


@inline
def levels_towards_zero(values, inverse, offset, n_levels):
    """values * inverse + offset, towards zero, in 0..n_levels-1: i8x32."""
    return clamp_levels(truncate_to_i8(values * inverse + np.float32(offset)), n_levels - 1)


@inline
def averages(x, importance, n):
    """The mean square of a row and its importances' mean; without importances both 0."""
    if importance == 0:
        return np.float32(0.0), np.float32(0.0)
    return sum_squares(x, n) / np.float32(n), mean(importance, n)


def midpoints(values: np.ndarray) -> np.ndarray:
    """Where the nearest of rising values changes."""
    return (values[:-1].astype(np.float64) + values[1:]) / 2
