"""A quantised matrix in a device's memory: the file's blocks, uploaded as they are."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from localrun.gpu.formats.layout import LAYOUTS, Layout, grid
from quant.errors import QuantError
from quant.formats import codebooks
from quant.matrix import QuantMatrix

PADDING = 16  # bytes behind the last block, so that no kernel's words end past the allocation


@dataclass(frozen=True)
class Matrix:
    """n_groups matrices of (n_rows, n_cols) in one format, one after the other.

    Attributes:
        data: uint8, their blocks in order.
        scales: float32 (n_groups, ceil(n_rows / 128), ceil(n_cols / 128)) of FP8; None of other formats.
    """

    layout: Layout
    data: torch.Tensor
    n_groups: int
    n_rows: int
    n_cols: int
    scales: torch.Tensor | None = None

    @cached_property
    def stride(self) -> int:
        """Blocks in a row."""
        return self.n_cols // self.layout.block

    @cached_property
    def group_bytes(self) -> int:
        """From one group to the next."""
        return self.n_rows * self.stride * self.layout.block_bytes

    @cached_property
    def n_units(self) -> int:
        """Units of 32 columns in a row (formats/blocks.py); of plain numbers the last may be cut."""
        return -(-self.n_cols // 32)

    @cached_property
    def scale_stride(self) -> int:
        """Scales in a row of them, 0 without."""
        return 0 if self.scales is None else self.scales.shape[-1]

    @cached_property
    def done(self) -> torch.Tensor:
        """Counters for programs that share rows (gemv.py), zeros: of one stream's launches, one after the other."""
        return torch.zeros(self.n_groups * self.n_rows, dtype=torch.int32, device=self.data.device)

    @cached_property
    def scale_pointer(self) -> torch.Tensor:
        """What kernels take for scales, or for the format's grid."""
        if self.layout.name in codebooks.SHAPES:
            return _grid(self.layout.name, self.data.device)
        return self.data if self.scales is None else self.scales


@cache
def _grid(name: str, device: torch.device) -> torch.Tensor:
    """A format's grid on a device, one for all its matrices."""
    return torch.from_numpy(grid(name)).to(device)


def _host_bytes(weight: QuantMatrix, group: int, n_groups: int) -> torch.Tensor:
    """uint8: the blocks of some consecutive groups, in the file's map."""
    n_bytes = weight.group_bytes * (n_groups - 1) + weight.n_rows * weight.row_bytes
    address = weight.address + group * weight.group_bytes
    return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address)))


def upload(weight: QuantMatrix, device: torch.device, groups: Sequence[int] | None = None) -> Matrix:
    """The weight's groups, or some of them, on the device; every byte is copied once.

    Raises:
        QuantError: no kernel reads the weight's format.
    """
    if weight.format.name not in LAYOUTS:
        raise QuantError(f"no GPU kernels for type {weight.format.name}; there are some for {', '.join(LAYOUTS)}")
    groups = range(weight.n_groups) if groups is None else groups
    n_bytes = weight.n_rows * weight.row_bytes
    data = torch.empty(len(groups) * n_bytes + PADDING, dtype=torch.uint8, device=device)
    if n_bytes == weight.group_bytes and groups == range(weight.n_groups):
        data[:-PADDING].copy_(_host_bytes(weight, 0, weight.n_groups))
    else:
        for i, group in enumerate(groups):
            data[i * n_bytes : (i + 1) * n_bytes].copy_(_host_bytes(weight, group, 1))
    data[-PADDING:].zero_()
    return Matrix(LAYOUTS[weight.format.name], data, len(groups), weight.n_rows, weight.n_cols)


def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; a few where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
