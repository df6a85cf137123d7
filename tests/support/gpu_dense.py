"""Dense matrices in place of quantised ones on the device: torch multiplies them, faster than Triton's interpreter.

As there, a token of a few has the bits that it has alone: each is multiplied by itself.
"""

from collections.abc import Callable
from contextlib import closing

import pytest
import torch

from localrun.cpu import bridge
from localrun.gpu import weights
from localrun.gpu.attention import compressed, latent
from localrun.gpu.matrices.gemv import MOST_TOKENS
from localrun.network import moe
from quant.matrix import QuantMatrix
from quant.threads.pool import Pool


def _each(multiply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Of (T, ...): a few tokens one by one."""
    return torch.cat([multiply(token) for token in x.split(1)]) if 1 < len(x) <= MOST_TOKENS else multiply(x)


class DenseHeads:
    """As gpu.matrices.linear.HeadLinear."""

    def __init__(self, weight: QuantMatrix, device: torch.device):
        with closing(Pool(1)) as pool:
            self._w_Goi = bridge.HeadLinear(pool, weight).dense(0, weight.n_groups).to(device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _each(lambda x: torch.einsum("tgi,goi->tgo", x, self._w_Goi), x)

    def transposed(self, x: torch.Tensor) -> torch.Tensor:
        return _each(lambda x: torch.einsum("tgo,goi->tgi", x, self._w_Goi), x)

    def dense(self, first: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._w_Goi[first : first + count].to(dtype)


class DenseLinear(DenseHeads):
    """As gpu.matrices.linear.Linear."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _each(lambda x: x @ self._w_Goi[0].T, x)


class DenseJoined:
    """As gpu.linear.Joined."""

    def __init__(self, linears: list[DenseLinear]):
        self._linears = linears

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [linear(x) for linear in self._linears]


class DenseEmbedding(DenseHeads):
    """As gpu.matrices.linear.Embedding."""

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self._w_Goi[0][ids]


def use_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models on a device that are loaded from now on have these, and their attention takes the context in one piece."""
    monkeypatch.setattr(latent, "pieces_for", lambda config, device: 1)
    monkeypatch.setattr(weights.DeviceWeights, "gated", staticmethod(moe.gated))
    monkeypatch.setattr(compressed, "Joined", DenseJoined)
    for name, instead in {"Linear": DenseLinear, "HeadLinear": DenseHeads, "Embedding": DenseEmbedding}.items():
        monkeypatch.setattr(weights, name, instead)
