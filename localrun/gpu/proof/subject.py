"""The model that is proven: its first layers, up to the first ones with experts, on the device and on the CPU.

These have every kind of layer, matrix and kernel that the model has, and are read from the disk in seconds. Letters: T
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any

import numpy as np
import torch

from localrun.cpu.model import NativeModel
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.gguf.residency import Resident
from localrun.gpu.caches.cache import AnyCache
from localrun.gpu.caches.compressed import CompressedCache
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.proof.task import Task
from localrun.gpu.ways import HOST_NODES
from localrun.models import names
from localrun.models.config import Config
from localrun.models.reader import read_config
from localrun.models.tensors import GGUFTensors
from localrun.network.cache import Cache as HostCache
from localrun.network.moe import MoE
from localrun.placement.memory_table import VRAM
from localrun.placement.placement import Placement, Request, lay_out

Choices = list[tuple[torch.Tensor, torch.Tensor]]  # ids and weights (T, K), layer by layer


class FirstLayers(GGUFFile):
    """An open file as if the model ended after some layers."""

    def __init__(self, file: GGUFFile, n_layers: int):
        """The file must stay open; this one is not to be closed."""
        self.__dict__.update(file.__dict__)
        self.tensors = {name: tensor for name, tensor in file.tensors.items() if _layer_of(name) < n_layers}

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Address and size of each tensor."""
        return [(tensor.data.ctypes.data, tensor.n_bytes) for tensor in self.tensors.values()]


def _layer_of(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return -1 if match is None else int(match[1])


def _cut(config: Config, n_layers: int) -> Config:
    return replace(
        config,
        num_hidden_layers=n_layers,
        num_nextn_predict_layers=0,
        layer_types=config.layer_types[:n_layers],
        indexer_types=config.indexer_types[:n_layers],
        compress_ratios=config.compress_ratios[:n_layers],
    )


def _with_all_kinds(config: Config) -> int:
    """Layers up to the first one of each ratio of pooled rows, and of those whose experts no table names."""
    firsts = {ratio: index for index, ratio in reversed(list(enumerate(config.compress_ratios)))}
    return 1 + max([-1, *firsts.values(), *([config.num_hash_layers] if firsts else [])])


class Subject:
    """What a part works with. A context manager.

    Attributes:
        whole, config: of the model, and of its first layers.
        file: of these.
        before: layers before the last of these, which has experts.
        devices, device: what is proven, and the first or only one of it.
    """

    def __init__(self, task: Task):
        self.task, self.effort = task, task.effort
        self.devices: list[Any] = []
        self._stack = ExitStack()

    def __enter__(self) -> Subject:
        with ExitStack() as stack:
            opened = stack.enter_context(open_gguf(self.task.model))
            self.whole, self.whole_file = read_config(opened), opened
            has_experts = partial(names.layer, self.whole.architecture)
            layers = range(self.whole.num_hidden_layers)
            self.moe = [i for i in layers if has_experts(i, "mlp.gate") in opened.tensors]
            n_layers = min(max(2, self.moe[0] + 1, _with_all_kinds(self.whole)), len(layers))
            self.before = n_layers - 1
            self.config, self.file = _cut(self.whole, n_layers), FirstLayers(opened, n_layers)
            each = self.task.choices.get("cards", [self.task.choices] * len(self.task.cards))
            for card, choices in zip(self.task.cards, each, strict=True):
                device = make_device(self.task.make_device, card)
                device.use(choices.get("handover", HOST_NODES))
                device.cut(choices.get("tiles", {}))
                self.devices.append(device)
            self.device = self.devices[0]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def moe_layers(self) -> list[int]:
        """Those of the first layers that have experts."""
        return [i for i in self.moe if i <= self.before]

    def has_sinks(self, index: int) -> bool:
        """Whether a layer's attention has them."""
        return names.layer(self.whole.architecture, index, "self_attn.sinks") in self.file.tensors

    @property
    def integer(self) -> bool:
        """Whether the CPU rounds activations to 8 bits."""
        from quant.formats import registry

        types = {tensor.type.name for tensor in self.file.tensors.values()} - {"I32"}  # of tables
        return any(registry.get(name).integer for name in types)

    @property
    def slots(self) -> int:
        """Of each layer, of the cache of experts that is tried: a few, as far as VRAM has room for any."""
        base, tensors = self.placement(), GGUFTensors(self.file)
        layers = (tensors.expert_matrices(index) for index in self.moe_layers)
        n_bytes = sum(w.n_rows * w.row_bytes for layer in layers for w in (layer.gate, layer.up, layer.down))
        room = (base.available[VRAM] - base.needed[VRAM]) // n_bytes
        return max(0, min(self.effort.slots, self.config.n_routed_experts - 1, room))

    def placement(self, whole: bool = False, slots: int = 0) -> Placement:
        """Of the first layers, or of the whole model, on the devices: experts in RAM, some of which VRAM may cache."""
        free, task = [device.free_bytes() for device in self.devices], self.task
        file, config = (self.whole_file, self.whole) if whole else (self.file, self.config)
        vram = [each if task.vram is None else min(each, task.vram) for each in free]
        return lay_out(
            Request(
                tuple(file.tensors.values()), config, task.ctx, 1 << 50, vram[0], free[0], tuple(vram[1:]), task.cards,
                gpu_experts=slots, expert_cache=slots > 0, cache_bits=task.cache_bits,
            )
        )  # fmt: skip

    @contextmanager
    def hybrid(self, whole: bool = False, slots: int = 0, workers: int | None = None) -> Iterator[HybridModel]:
        """The model on the devices, its experts in RAM; as placement() has it. workers: as HybridModel."""
        file, config = (self.whole_file, self.whole) if whole else (self.file, self.config)
        placement = self.placement(whole, slots)
        with closing(HybridModel(config, file, workers or self.task.threads, placement, self.devices)) as model:
            yield model

    @contextmanager
    def native(self, n_layers: int | None = None, whole: bool = False) -> Iterator[NativeModel]:
        """The model on the CPU."""
        if whole:
            config, file = self.whole, self.whole_file
        else:
            n_layers = n_layers or self.config.num_hidden_layers
            config, file = _cut(self.config, n_layers), FirstLayers(self.file, n_layers)
        with closing(NativeModel(config, file, self.task.threads)) as model:
            yield model

    def bring_in(self) -> None:
        """Wait until the first layers are in memory, or never will be."""
        with closing(Resident(self.file)) as resident:
            resident.wait()

    def ids(self, n_tokens: int, seed: int = 0) -> list[int]:
        """Random token ids."""
        return np.random.default_rng(seed).integers(0, self.whole.vocab_size, n_tokens).tolist()

    def vectors(self, n_tokens: int, width: int, seed: int = 0) -> torch.Tensor:
        """Float32 (T, width) of a unit normal, on the host."""
        return torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(seed))


def make_device(name: str, card: int) -> Any:
    """What "module:function" makes of a card's number."""
    module, _, function = name.partition(":")
    make: Callable[[int], Any] = getattr(import_module(module), function)
    return make(card)


def fill(cache: AnyCache | HostCache, n_tokens: int) -> None:
    """Have an empty cache hold so many tokens of zeros, in memory that has been written to."""
    cache.check_room(n_tokens)
    cache.advance(n_tokens)
    if isinstance(cache, CompressedCache):
        for block in chain.from_iterable(cache.blocks):
            block.rows.zero_()
        return
    if isinstance(cache, HostCache):
        for rows in cache.save().values():  # views, but of rings
            rows[...] = 0
        return
    for layer in cache.blocks:
        layer.values.zero_(), layer.keys.zero_()
        if layer.scales is not None:
            layer.scales.fill_(1.0)
        if layer.indexer_keys is not None:
            layer.indexer_keys.zero_()


@contextmanager
def noted_choices(network: Any) -> Iterator[dict[int, Choices]]:
    """Within, the experts that the network's routers choose are noted, on the host, by layer."""
    found: dict[int, Choices] = {}
    with _routers(network) as mlps:
        for index, mlp in mlps.items():
            mlp.choose_experts = partial(_note, mlp.choose_experts, found.setdefault(index, []))
        yield found


@contextmanager
def given_choices(network: Any, choices: Mapping[int, Choices]) -> Iterator[None]:
    """Within, its routers choose what was noted, in the same order."""
    with _routers(network) as mlps:
        for index, mlp in mlps.items():
            given = iter(choices[index])
            mlp.choose_experts = lambda *_, given=given: next(given)
        yield


def _note(choose: Any, found: Choices, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids, weights = choose(*arguments)
    found.append((ids.cpu(), weights.cpu()))
    return ids, weights


@contextmanager
def _routers(network: Any) -> Iterator[dict[int, MoE]]:
    """The layers with experts; their routers are what they were afterwards."""
    mlps = {index: layer.mlp for index, layer in enumerate(network.layers) if isinstance(layer.mlp, MoE)}
    before = {index: mlp.choose_experts for index, mlp in mlps.items()}
    try:
        yield mlps
    finally:
        for index, mlp in mlps.items():
            mlp.choose_experts = before[index]
