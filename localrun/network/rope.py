"""Rotary position embedding, with YaRN and linear scaling.

Two values are rotated against each other: neighbours, (x[2i], x[2i+1]), or those of two halves, (x[i], x[i+R/2]).
Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), llama.cpp 3f545becc ggml_rope_yarn and
src/models/deepseek2.cpp, deepseek-ai/DeepSeek-V3 inference/model.py.
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from localrun.models.config import Config
from localrun.models.rope_scaling import yarn_magnitude

if TYPE_CHECKING:
    import torch


def _yarn_ramp(config: Config) -> np.ndarray:
    """Per pair: 0 keeps the trained frequency, 1 divides it by the factor (YaRN, eq. 23)."""
    scaling, dim = config.rope_scaling, config.qk_rope_head_dim

    def pair_with_rotations(n: float) -> float:
        wavelength_length = scaling.original_max_position_embeddings / (n * 2 * math.pi)
        return dim * math.log(wavelength_length) / (2 * math.log(config.rope_theta))

    low, high = pair_with_rotations(scaling.beta_fast), pair_with_rotations(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(0, low), min(dim - 1, high)
    return np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0, 1)


def frequencies(config: Config, factors: np.ndarray | None = None) -> np.ndarray:
    """Radians a position, float64 (qk_rope_head_dim / 2,); `factors` divide them pair by pair (Llama 3)."""
    dim, scaling = config.qk_rope_head_dim, config.rope_scaling
    plain = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if factors is not None:
        plain = plain / factors.astype(np.float64)
    if scaling is None:
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    ramp = _yarn_ramp(config)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def attention_scale(config: Config) -> float:
    """What the scores of one head are multiplied by: 1 / sqrt(d).

    DeepSeek under YaRN: (1 + 0.1 * mscale_all_dim * ln factor)^2 / sqrt(d). Files without mscale_all_dim count as 1, as
    in llama.cpp, which also leaves YaRN's magnitude on the rotated parts then (rotation_magnitude).
    """
    if config.attention != "mla":
        return config.head_dim**-0.5
    scale, scaling = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5, config.rope_scaling
    if scaling is None or scaling.type != "yarn":
        return scale
    mscale = 1.0 if scaling.mscale_all_dim is None else scaling.mscale_all_dim
    return scale * yarn_magnitude(scaling.factor, mscale) ** 2


def rotation_magnitude(config: Config) -> float:
    """The length that rotation gives to a unit vector.

    1 without YaRN, where DeepSeek's file has mscale_all_dim, and with compressed rows, whose YaRN has none.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.type != "yarn" or config.attention == "compressed":
        return 1.0
    if config.attention == "mla" and scaling.mscale_all_dim is not None:
        return 1.0
    return yarn_magnitude(scaling.factor)


def compressed_rope(config: Config) -> "Rope":
    """Of layers with pooled rows, which alone have a scaling."""
    return Rope(replace(config, rope_theta=config.compress_rope_theta))


class Rope:
    """Turns two values at a time by position.

    Attributes:
        frequencies: float64 (R/2,), radians a position.
        magnitude: the length that rotation gives to a unit vector.
    """

    def __init__(self, config: Config, factors: np.ndarray | None = None):
        self.frequencies = frequencies(config, factors)
        self.magnitude = rotation_magnitude(config)
        self._by_halves = config.rope == "halves"
        self._last: tuple[tuple[int, int, int], torch.Tensor] | None = None  # what all layers of a step ask for

    def turns(self, start: int, n_tokens: int, step: int = 1) -> "torch.Tensor":
        """Unit complex numbers (times the magnitude), complex64 (T, 1, R/2), for T positions from start, step apart."""
        import torch

        asked = start, n_tokens, step
        if self._last is None or self._last[0] != asked:
            angles = np.outer(start + step * np.arange(n_tokens), self.frequencies)
            turns = torch.from_numpy((self.magnitude * np.exp(1j * angles)).astype(np.complex64))[:, None]
            self._last = asked, turns
        return self._last[1]

    def rotate(self, x_THR: "torch.Tensor", turns: "torch.Tensor", by_halves: bool | None = None) -> "torch.Tensor":
        """float32 (T, H, R), each token's turned by its position; by_halves, if given, in place of the model's way."""
        import torch

        if not (self._by_halves if by_halves is None else by_halves):
            pairs = x_THR.unflatten(-1, (-1, 2))
            if any(n % 2 for n in (*pairs.stride()[:-1], pairs.storage_offset())):  # what a complex view needs
                pairs = pairs.clone(memory_format=torch.contiguous_format)
            return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2)
        # Complex numbers of two halves would have to be put together and taken apart: two to five times as slow.
        cos, sin = turns.real.contiguous(), turns.imag.contiguous()
        (a, b), turned = x_THR.chunk(2, -1), torch.empty_like(x_THR)
        first, second = turned.chunk(2, -1)
        torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=second).addcmul_(a, sin)
        return turned

    def rotate_last(self, x_THd: "torch.Tensor", turns: "torch.Tensor") -> "torch.Tensor":
        """float32 (T, H, d), the last R values of each head turned."""
        import torch

        rope_dim = 2 * turns.shape[-1]
        return torch.cat([x_THd[..., :-rope_dim], self.rotate(x_THd[..., -rope_dim:], turns)], -1)
