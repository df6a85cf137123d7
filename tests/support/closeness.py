"""How far logits may be apart, as a fraction of their range (largest minus smallest), and how far they are."""

import numpy as np

# A session's 16-bit keys and values cost up to 4e-4 of the range on these prompts (16-bit rounding put into naive.py).
SESSION_TOLERANCE = 1e-3
# Quantized weights meet activations rounded to 8 bits: one that lands on the other side of a half grows through the
# layers until the difference is that of two independent roundings, 1e-2 at worst here. Lost rows cost over 0.1.
QUANTIZED_TOLERANCE = 0.03


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a fraction of the range of `expected`."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.ptp(expected))


def rms_error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.sqrt(np.mean(np.square(found - expected, dtype=np.float64))))
