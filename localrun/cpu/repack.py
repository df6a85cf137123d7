"""Routed experts with 16 rows side by side (gguf/types.py), made at load: --repack. The file stays as it is.

IQ1's blocks are widened, too: that pays on every CPU, interleaving alone only on some.

The copies are in RAM of their own; the pages of the map that they were made from are let go.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np

from localrun import hardware
from localrun.gguf import types as tensor_types
from localrun.gguf.file import GGUFFile, Tensor
from localrun.gguf.residency import let_go, own_memory
from localrun.models import names
from localrun.models.config import Config
from quant.formats import registry
from quant.formats.interleave import interleave
from quant.target import tuning

_PARTS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
_SPARE = 1 << 29  # bytes left for all that comes later


def no_gain() -> str:
    """Why interleaving is of no use on this CPU; "" where it is."""
    if tuning.current().interleaving_pays:
        return ""
    return f"on this CPU ({tuning.cpu()}) replies are no faster with interleaved rows"


def interleaving_pays(option: str, notice: Callable[[str], None]) -> bool:
    """Whether interleaving is of use on this CPU; if not, notice is told that the option has no effect."""
    why_not = no_gain()
    if why_not:
        notice(f"{option} has no effect: {why_not}")
    return not why_not


def repacking_pays(file: GGUFFile, notice: Callable[[str], None]) -> bool:
    """Whether --repack is of use for this file on this CPU; if not, notice is told so."""
    experts = (tensor for tensor in file.tensors.values() if len(tensor.shape) == 3)
    widens = any(tensor_types.laid_out(t.type.name, t.shape, False) != t.type.name for t in experts)
    return widens or interleaving_pays("--repack", notice)


def repack_experts(
    file: GGUFFile,
    config: Config,
    threads: int,
    needed: int,
    progress: Callable[[int, int, str], None] | None,
    notice: Callable[[str], None],
) -> None:
    """Lay out the experts of as many layers as there is free RAM for.

    Args:
        needed: bytes of RAM that the model, as its file has it, and its cache take.
        notice: told of layers that stay as they are.
    """
    layers = [tensors for index in range(config.num_hidden_layers) if (tensors := _plain_experts(file, config, index))]
    if not layers:
        notice("--repack has no effect: no routed experts of a type that can be interleaved")
        return
    sizes = np.cumsum([sum(map(_bytes_laid_out, tensors)) for tensors in layers])
    plain = sum(tensor.n_bytes for tensors in layers for tensor in tensors)
    room = hardware.free_ram() - (needed - plain) - _SPARE
    count = int(np.searchsorted(sizes, room, side="right"))
    with ThreadPoolExecutor(threads) as workers:
        for done, tensors in enumerate(layers[:count]):
            if progress is not None:
                progress(done, count, "Interleaving experts")
            for tensor in tensors:
                _repack(file, tensor, workers)
    if progress is not None:
        progress(count, count, "Interleaving experts")
    if count < len(layers):
        gib = sizes[-1] / 2**30, max(0, room) / 2**30
        notice(
            f"--repack: experts of {count} of {len(layers)} layers; all take {gib[0]:.1f} GiB, {gib[1]:.1f} are free"
        )


def _plain_experts(file: GGUFFile, config: Config, index: int) -> list[Tensor]:
    """The expert tensors of a layer that are to be laid out anew."""
    tensors = (names.layer(config.architecture, index, f"mlp.experts.{part}") for part in _PARTS)
    found = [file.tensors.get(name) for name in tensors]
    return [t for t in found if t and _laid_out(t) != t.type.name]


def _laid_out(tensor: Tensor) -> str:
    """The type that it is to get."""
    return tensor_types.laid_out(tensor.type.name, tensor.shape, tuning.current().interleaving_pays)


def _bytes_laid_out(tensor: Tensor) -> int:
    n_experts, n_rows, n_cols = tensor.shape
    return n_experts * n_rows * registry.get(_laid_out(tensor)).row_bytes(n_cols)


def _repack(file: GGUFFile, tensor: Tensor, workers: Executor) -> None:
    type_ = tensor_types.from_name(_laid_out(tensor))
    format_ = registry.get(type_.name)
    n_experts, n_rows, _ = tensor.shape
    plain = tensor.data.reshape(n_experts, -1)
    out = own_memory(_bytes_laid_out(tensor)).reshape(n_experts, -1)

    def one(expert: int) -> None:
        interleave(format_, plain[expert], n_rows, plain.shape[1] // n_rows, out[expert])

    for _ in workers.map(one, range(n_experts)):
        pass
    let_go([(tensor.data.ctypes.data, tensor.n_bytes)])
    file.replace(tensor.name, type_, out.reshape(-1))
