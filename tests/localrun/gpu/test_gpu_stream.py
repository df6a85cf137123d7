"""A layer's experts uploaded for one use: what arrives, when it is uploaded, and what reads it."""

from __future__ import annotations

from collections.abc import Callable

import kernels
import numpy as np
import pytest
import torch
from gpu_device import HAS_GPU

from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.experts.stream import StreamedExperts, Uploader, host_bytes, work_bytes
from localrun.gpu.matrices.matrix import Matrix
from quant.matrix import ExpertMatrices

HIDDEN, N_EXPERTS = 64, 4
DEVICE = Cuda() if HAS_GPU else StandIn()


def random_experts(type_: str, inner: int) -> ExpertMatrices:
    rng = np.random.default_rng(inner)
    shapes = (N_EXPERTS, inner, HIDDEN), (N_EXPERTS, inner, HIDDEN), (N_EXPERTS, HIDDEN, inner)
    return ExpertMatrices(*(kernels.random_weight(type_, shape, rng)[0] for shape in shapes))


@pytest.mark.parametrize("n_bytes", [1, 99, 100, 101, 200, 201, 1234])
def test_pieces_arrive_whole(n_bytes: int) -> None:
    source = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8)
    destination = torch.zeros(n_bytes + 7, dtype=torch.uint8, device=DEVICE.torch)
    uploader = Uploader(DEVICE, piece_bytes=100)
    for _ in range(2):
        uploader.copy(source, destination[:n_bytes])
    DEVICE.synchronize()
    assert torch.equal(destination[:n_bytes].cpu(), source)
    assert destination[n_bytes:].count_nonzero() == 0
    assert uploader.measure(source, destination[:n_bytes]) > 0


class Queue(StandIn):
    """A device that does what its marks are waited for, and notes it."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.n_marks = 0

    def mark(self) -> Callable[[], None]:
        self.n_marks += 1
        name = f"wait {self.n_marks}"
        self.log.append(f"mark {self.n_marks}")
        return lambda: self.log.append(name)


def test_a_piece_is_written_again_only_when_it_has_been_copied() -> None:
    device = Queue()
    Uploader(device, piece_bytes=10).copy(torch.zeros(40, dtype=torch.uint8), torch.zeros(40, dtype=torch.uint8))
    assert device.log == ["mark 1", "mark 2", "wait 1", "mark 3", "wait 2", "mark 4"]


def test_a_layer_is_uploaded_once_for_all_batches_that_follow_each_other() -> None:
    layers, seen, uploads = [random_experts("Q8_0", 96), random_experts("F16", 32)], [], []

    class Counted(Uploader):
        def copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
            uploads.append(source.shape[0])
            super().copy(source, destination)

    def compute(gate: Matrix, up: Matrix, down: Matrix, _: object, x: torch.Tensor, *choice: object) -> torch.Tensor:
        seen.append([(m.layout, m.n_groups, m.n_rows, m.n_cols, m.data.cpu().clone()) for m in (gate, up, down)])
        return x + 1

    streamed = StreamedExperts(DEVICE, Counted(DEVICE, 1000), layers, compute)
    x, ids = torch.zeros(5, HIDDEN, device=DEVICE.torch), torch.zeros(5, 2, dtype=torch.int64)
    order = [0, 0, 1, 1, 0]
    for index in order:
        out = streamed.layer(layers[index]).begin(x, ids, torch.zeros(5, 2))()
        assert torch.equal(out, x + 1)
    assert len(uploads) == 3 * 3 * N_EXPERTS
    for index, matrices in zip(order, seen, strict=True):
        experts = layers[index]
        for weight, (layout, *shape, data) in zip((experts.gate, experts.up, experts.down), matrices, strict=True):
            blocks = torch.cat([host_bytes(weight, group) for group in range(N_EXPERTS)])
            assert shape == [weight.n_groups, weight.n_rows, weight.n_cols]
            assert layout.block_bytes == weight.format.block_bytes
            assert torch.equal(data[: blocks.shape[0]], blocks) and data.shape[0] >= blocks.shape[0] + 16


def test_a_failed_upload_leaves_no_layer_behind() -> None:
    """It has overwritten some of the one before."""
    layers = [random_experts("F16", 32), random_experts("F16", 96)]

    class Failing(Uploader):
        fails = False

        def copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
            destination.zero_()
            if self.fails:
                raise MemoryError
            super().copy(source, destination)

    uploader = Failing(DEVICE, 1000)
    streamed = StreamedExperts(DEVICE, uploader, layers, lambda gate, *_: gate.data.clone())
    arguments = torch.zeros(1, HIDDEN), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
    streamed.layer(layers[0]).begin(*arguments)
    uploader.fails = True
    with pytest.raises(MemoryError):
        streamed.layer(layers[1]).begin(*arguments)
    uploader.fails = False
    found, first = streamed.layer(layers[0]).begin(*arguments)(), host_bytes(layers[0].gate, 0)
    assert torch.equal(found[: first.shape[0]].cpu(), first)


def test_the_work_buffer_holds_the_largest_layer() -> None:
    small, large = random_experts("Q8_0", 32), random_experts("Q8_0", 96)
    assert work_bytes(small) < work_bytes(large)
    blocks = sum(w.n_groups * w.group_bytes for w in (large.gate, large.up, large.down))
    assert blocks < work_bytes(large) < blocks + 3 * 600
