"""A layer's routed experts uploaded for one use: with many tokens a fast bus and a GPU may beat the CPU (prefill.py).

Weights go from the file's map through page-locked memory, a piece at a time, while the device copies the piece before:
pageable memory is copied by the driver in the same two steps, one after the other.

Letters: T tokens, D hidden_size, K experts per token.
"""

import ctypes
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.experts.in_vram import Between
from localrun.gpu.formats.layout import LAYOUTS
from localrun.gpu.matrices.matrix import Matrix
from localrun.network.weight_source import Finish
from quant.matrix import ExpertMatrices, QuantMatrix

_PIECE_BYTES = 32 << 20  # long beside a copy's start, short beside a layer
_ALIGNMENT = 256  # of matrices in the work buffer, and bytes behind the last: kernels' words may end past a block

# gate, up, down, what stands around them, x (T, D), ids (T, K), weights (T, K) -> weighted sum (T, D)
Fill = Callable[[torch.Tensor, torch.Tensor], object]  # destination, source: uint8 (n,) of the host
Compute = Callable[[Matrix, Matrix, Matrix, Between, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Uploader:
    """Copies to a device's memory through two pieces of page-locked memory in turn."""

    def __init__(self, device: Cuda | StandIn, piece_bytes: int = _PIECE_BYTES, fill: Fill = torch.Tensor.copy_):
        """fill: how a part of the host's memory gets into a piece."""
        self._device, self._fill = device, fill
        self._pieces = [device.pinned((piece_bytes,), torch.uint8) for _ in range(2)]
        self._copied: list[Callable[[], None]] = [lambda: None] * 2
        self._turn = 0

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Queue copies of uint8 (n,) of the host to the device, on the current stream; the source is read at once."""
        n_bytes = self._pieces[0].shape[0]
        for first in range(0, source.shape[0], n_bytes):
            part = source[first : first + n_bytes]
            self._copied[self._turn]()
            piece = self._pieces[self._turn][: part.shape[0]]
            self._fill(piece, part)
            destination[first : first + part.shape[0]].copy_(piece, non_blocking=True)
            self._copied[self._turn] = self._device.mark()
            self._turn = 1 - self._turn

    def measure(self, source: torch.Tensor, destination: torch.Tensor) -> float:
        """GB/s (1e9 bytes) of such a copy."""
        self._device.synchronize()
        before = time.perf_counter()
        self.copy(source, destination)
        self._device.synchronize()
        return source.shape[0] / (time.perf_counter() - before) / 1e9


class StreamedExperts:
    """Layers' experts through one work buffer, which holds the layer that was used last."""

    def __init__(self, device: Cuda | StandIn, uploader: Uploader, layers: list[ExpertMatrices], compute: Compute):
        """layers: all there will be; their tensors must stay mapped, and their formats have GPU kernels."""
        self._device, self._uploader, self._compute = device.torch, uploader, compute
        n_bytes = max(work_bytes(experts) for experts in layers)
        self._buffer = torch.zeros(n_bytes, dtype=torch.uint8, device=device.torch)
        self._held: tuple[ExpertMatrices | None, tuple[Matrix, Matrix, Matrix, Between] | None] = None, None

    def layer(self, experts: ExpertMatrices) -> "_StreamedLayer":
        """The experts of one of the layers."""
        return _StreamedLayer(partial(self._begin, experts))

    def _begin(self, experts: ExpertMatrices, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Finish:
        held, matrices = self._held
        if held is not experts:
            self._held = None, None  # should the upload fail
            matrices = self._upload(experts)
            self._held = experts, matrices
        out = self._compute(*matrices, x, ids, weights)
        return lambda: out

    def _upload(self, experts: ExpertMatrices) -> tuple[Matrix, Matrix, Matrix, Between]:
        """On the stream of all else: after what still reads the buffer."""
        matrices, first = [], 0
        for weight in (experts.gate, experts.up, experts.down):
            data = self._buffer[first : first + _matrix_bytes(weight)]
            for group in range(weight.n_groups):
                n_bytes = weight.n_rows * weight.row_bytes
                self._uploader.copy(host_bytes(weight, group), data[group * n_bytes : (group + 1) * n_bytes])
            layout = LAYOUTS[weight.format.name]
            matrices.append(Matrix(layout, data, weight.n_groups, weight.n_rows, weight.n_cols))
            first += data.shape[0]
        return *matrices, Between(experts, self._device)


class _StreamedLayer:
    """One layer of them, RoutedExperts."""

    def __init__(self, begin: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Finish]):
        self.begin = begin


def _matrix_bytes(weight: QuantMatrix) -> int:
    """In the work buffer."""
    return (weight.n_groups * weight.n_rows * weight.row_bytes // _ALIGNMENT + 2) * _ALIGNMENT


def work_bytes(experts: ExpertMatrices) -> int:
    """Device memory for a layer's experts."""
    return sum(_matrix_bytes(weight) for weight in (experts.gate, experts.up, experts.down))


def host_bytes(weight: QuantMatrix, group: int) -> torch.Tensor:
    """uint8: one group's blocks, in the file's map."""
    n_bytes = weight.n_rows * weight.row_bytes
    address = weight.address + group * weight.group_bytes
    return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address)))
