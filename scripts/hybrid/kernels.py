"""Times of the GPU kernels: GEMV against the card's own copies, GEMM in operations a second.

Needs torch, triton and numba only. Blocks are random bytes: no kernel's time depends on what they mean.
"""

import statistics
from collections.abc import Callable

import torch

from localrun.gpu.experts.in_vram import Experts
from localrun.gpu.formats.layout import LAYOUTS
from localrun.gpu.matrices import gemm, gemv
from localrun.gpu.matrices.matrix import PADDING, Matrix

GEMV_FORMATS = tuple(name for name in LAYOUTS if name != "FP8_E4M3")
_FLUSH_BYTES = 256 << 20  # written between runs: more than any card's cache holds


def seconds(call: Callable[[], object], device: torch.device, runs: int = 20) -> tuple[float, float]:
    """Best and median time of a call on the device, its data not in the cache; launches are not part of it."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    call()
    times = []
    for _ in range(runs):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / 1e3)
    return min(times), statistics.median(times)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph: what the host takes to launch it is not measured."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def random_matrix(name: str, n_groups: int, n_rows: int, n_cols: int, device: torch.device) -> Matrix:
    """Blocks of random bytes; of plain numbers, zeros."""
    layout = LAYOUTS[name]
    n_bytes = n_groups * n_rows * (n_cols // layout.block) * layout.block_bytes + PADDING
    if layout.block == 1:
        data = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    else:
        data = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, device=device)
    return Matrix(layout, data, n_groups, n_rows, n_cols)


def copy_gb_per_s(device: torch.device, n_bytes: int = 1 << 30) -> float:
    """A copy within the device's memory: bytes read and written a second, best of 20."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / seconds(captured(lambda: target.copy_(source)), device)[0] / 1e9


def gemv_figures(
    device: torch.device, shape: tuple[int, int] = (18432, 7168), tokens: tuple[int, ...] = (1, 2, 4, 8)
) -> list[dict]:
    """Weights read a second by format and number of tokens, and what part that is of copy_gb_per_s()."""
    copy = copy_gb_per_s(device)
    figures = []
    for name in GEMV_FORMATS:
        matrix = random_matrix(name, 1, *shape, device)
        for n_tokens in tokens:
            x = torch.randn(n_tokens, 1, shape[1], device=device)
            best, median = seconds(captured(lambda m=matrix, x=x: gemv.multiply(m, x)), device)
            rates = [matrix.group_bytes / time / 1e9 for time in (best, median)]
            figures.append(
                {"format": name, "shape": shape, "tokens": n_tokens, "best_gb_per_s": rates[0],
                 "median_gb_per_s": rates[1], "of_copy": rates[0] / copy}
            )  # fmt: skip
    return figures


def gemm_figures(
    device: torch.device, shape: tuple[int, int] = (18432, 7168), tokens: tuple[int, ...] = (16, 64, 512, 4096)
) -> list[dict]:
    """Operations a second by format and number of tokens, and those of torch's float16 product of the same shape."""
    figures = []
    dense = torch.randn(*shape, device=device, dtype=torch.float16)
    for n_tokens in tokens:
        x = torch.randn(n_tokens, 1, shape[1], device=device)
        operations = 2 * n_tokens * shape[0] * shape[1]
        half = x[:, 0].half()
        dense_best = seconds(captured(lambda half=half: half @ dense.T), device)[0]
        for name in ("Q4_K", "Q8_0", "Q6_K", "F16"):
            matrix = random_matrix(name, 1, *shape, device)
            best, median = seconds(captured(lambda m=matrix, x=x: gemm.multiply(m, x)), device)
            figures.append(
                {"format": name, "shape": shape, "tokens": n_tokens, "best_tflops": operations / best / 1e12,
                 "median_tflops": operations / median / 1e12, "torch_f16_tflops": operations / dense_best / 1e12}
            )  # fmt: skip
    return figures


def expert_figures(
    device: torch.device,
    name: str = "Q4_K",
    n_experts: int = 32,
    n_choices: int = 8,
    hidden: int = 7168,
    inner: int = 2048,
) -> list[dict]:  # fmt: skip
    """Time of a layer of experts in VRAM, and the weights that few tokens read a second (a pair reads its own)."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    gate, up, down = (random_matrix(name, n_experts, *shape, device) for shape in shapes)
    experts = Experts.of(gate, up, down, torch.arange(n_experts, dtype=torch.int32, device=device))
    figures = []
    for n_tokens in (1, 2, 4, 64, 512):
        x = torch.randn(n_tokens, hidden, device=device)
        ids = torch.rand(n_tokens, n_experts, device=device).topk(n_choices).indices
        weights = torch.rand(n_tokens, n_choices, device=device)
        best, median = seconds(captured(lambda x=x, ids=ids, weights=weights: experts(x, ids, weights)), device)
        figure = {"format": name, "tokens": n_tokens, "best_s": best, "median_s": median}
        if n_tokens <= gemv.MOST_TOKENS:
            n_bytes = ids.unique().numel() * sum(matrix.group_bytes for matrix in (gate, up, down))
            figure["best_gb_per_s"] = n_bytes / best / 1e9
        figures.append(figure)
    return figures


def figures(device: torch.device) -> dict:
    """All of the above as one JSON object."""
    return {
        "copy_gb_per_s": copy_gb_per_s(device),
        "gemv": gemv_figures(device),
        "gemm": gemm_figures(device),
        "experts": expert_figures(device),
    }
