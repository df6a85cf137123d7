"""That host and device memory are kept apart: the model on a device whose tensors hold nothing (torch's "meta" device).

There, as on a GPU, an operation on tensors of both sides raises, and so does asking for a value or a shape that depends
on one. The stand-in, which is the CPU, would not notice. Kernels are left out: nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gpu_device
import pytest
import tiny_deepseek4
import tiny_dspark
import tiny_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from localrun.gguf.file import open_gguf
from localrun.gpu.device import StandIn
from localrun.gpu.experts import on_host
from localrun.gpu.experts.routed import Mode
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.matrices import gemm
from localrun.models.reader import read_config
from localrun.placement.placement import Request, lay_out

pytestmark = pytest.mark.skipif(gpu_device.HAS_GPU, reason="there is a device whose tensors hold something")

CTX = 300
COPIES = {"copy_.default", "_to_copy.default", "to.dtype_layout", "to.device"}


class Apart(StandIn):
    """A device apart; notes where its host memory is."""

    def __init__(self) -> None:
        self.torch = torch.device("meta")
        self.locked: set[int] = set()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = super().pinned(shape, dtype)
        self.locked.add(memory.untyped_storage().data_ptr())
        return memory

    def call(self, function: int, argument: int) -> None:
        """Host nodes would compute from what no copy has brought."""


class Crossings(TorchDispatchMode):
    """Notes what goes from one side to the other, and makes up what would arrive on the host.

    Attributes:
        seen: an operation's name, and the address of the host's memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        on_host = [each for each in tensors if each.device.type == "cpu"]
        to = str(kwargs.get("device", ""))
        if len(on_host) not in (0, len(tensors)):
            self.seen.append((function.__name__, on_host[0].untyped_storage().data_ptr()))
            if function is torch.ops.aten.copy_.default and args[0].device.type == "cpu":
                return args[0]
        elif tensors and to and to != str(tensors[0].device):
            self.seen.append((function.__name__, 0))
            if to == "cpu":
                return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        return function(*args, **kwargs)


def launch(*arguments: Any, **options: Any) -> None:
    """A kernel reads and writes memory of its own device."""
    assert len({each.device for each in arguments if isinstance(each, torch.Tensor)}) == 1


@contextmanager
def opened(
    variant: str,
    gpu_experts: int,
    monkeypatch: pytest.MonkeyPatch,
    bits: int = 16,
    expert_cache: bool = False,
    devices: Sequence[StandIn] = (),
) -> Iterator[HybridModel]:
    monkeypatch.setattr(type(gemm._multiply), "__getitem__", lambda kernel, grid: launch)
    card = SimpleNamespace(multi_processor_count=100, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    path = tiny_deepseek4.shared() if variant in ("deepseek4", "dspark") else tiny_models.shared(variant)
    monkeypatch.setattr(on_host.PrefillExperts, "_compute", lambda *args: lambda sums: None)
    with open_gguf(path) as file:
        config, much = read_config(file), 1 << 40
        tensors = tuple(file.tensors.values())
        request = Request(tensors, config, CTX, much, much, much, gpu_experts=gpu_experts, cache_bits=bits)
        devices = devices or [Apart()]
        more = {"more_vram": (much,) * (len(devices) - 1), "cards": tuple(range(len(devices)))}
        placement = lay_out(replace(request, expert_cache=expert_cache, **more))
        with closing(HybridModel(config, file, 1, placement, devices)) as model:
            if variant == "dspark":  # as blocks that read these layers have it
                model.network.watched, model.keep_hidden = tiny_dspark.TARGET, True
                model.step = model._new_step()
            yield model


@pytest.mark.parametrize(
    ("variant", "gpu_experts", "expert_cache"),
    [
        *[("v3", 0, False), ("v3", 3, False), ("v3", 3, True), ("v2-lite", 8, False), ("v3-legacy-kv-b", 16, False)],
        *(
            pytest.param(variant, 3, False, marks=pytest.mark.slow)
            for variant in ("gpt-oss", "deepseek32", "deepseek4", "dspark")
        ),
    ],
)
def test_a_step_copies_to_and_from_page_locked_memory_alone(
    variant: str, gpu_experts: int, expert_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of no other memory a copy may be captured, and nothing else may wait for the host. A cache adds its counts."""
    with opened(variant, gpu_experts, monkeypatch, 16, expert_cache) as model, torch.inference_mode():
        for n_tokens in (1, 5):
            with Crossings() as crossings:
                model.step.queue(n_tokens, 16, model.step.most(CTX - 1))
            n_layers, n_watched = len(model.routed.in_ram), len(model.network.watched)
            n_copies = 1 + 4 * n_layers + n_watched + 2 + expert_cache
            assert [name for name, _ in crossings.seen] == ["copy_.default"] * n_copies
            assert {address for _, address in crossings.seen} <= model.device.locked


@pytest.mark.parametrize(
    ("gpu_experts", "bits", "expert_cache"), [(0, 16, False), (3, 8, False), (3, 16, True), (16, 16, False)]
)
def test_prompts_mix_no_sides(gpu_experts: int, bits: int, expert_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens absorbed, many decompressed, exact or not, measured, streamed: all the ways there are."""
    with opened("v3", gpu_experts, monkeypatch, bits, expert_cache) as model, Crossings() as crossings:
        for exact in (False, True):
            cache = model.new_cache(CTX, exact=exact)
            for n_tokens in (9, 40, 130):
                assert model.forward(list(range(n_tokens)), cache, all_logits=True).shape == (n_tokens, 320)
            cache.truncate(7)
            saved = cache.save()
            assert all(array.shape[0] == 7 for array in saved.values())
            cache.load(saved, 7)
        assert (model.tuning.times is None) == (gpu_experts == 16)
        if gpu_experts == 0 or expert_cache:
            model.routed.allow_streaming()
            monkeypatch.setattr(model.tuning, "choose", lambda n_tokens: (Mode.STREAM, 1))
            model.forward(list(range(130)), model.new_cache(CTX))
        assert {name for name, _ in crossings.seen} <= COPIES


@pytest.mark.parametrize(
    "variant",
    [
        "v3",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt-oss", "glm-dsa-shared", "deepseek4", "dspark")),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_cards_do_not_mix(variant: str, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, one has its tensors on the host: what is of both raises."""
    devices = [Apart(), Apart()]
    devices[first].torch = torch.device("cpu")
    with opened(variant, 0, monkeypatch, devices=devices) as model, torch.inference_mode():
        assert len(model.parts) == 2 and all(part.layers for part in model.parts)
        caches = [model.new_cache(CTX, exact) for exact in (False, True)]
        with Crossings() as crossings:
            for cache in caches:
                for n_tokens in (40, 9):
                    model.forward(list(range(n_tokens)), cache, all_logits=True)
                cache.load(cache.save(), cache.length)
            assert {name for name, _ in crossings.seen} <= COPIES
        with Crossings() as crossings:
            model.step(list(range(3)), caches[0])
            assert {name for name, _ in crossings.seen} == {"copy_.default"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gpt-oss", "glm-dsa-shared", "deepseek4", "dspark"])
def test_windows_and_indexers_mix_no_sides(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(variant, 3, monkeypatch) as model, Crossings() as crossings:
        cache = model.new_cache(CTX)
        for n_tokens in (9, 130):
            found = model.forward(list(range(n_tokens)), cache, all_logits=True)
            assert found.shape == (n_tokens, model.vocab_size)
            if variant == "dspark":
                assert model.hidden.shape == (n_tokens, 3 * model.config.hidden_size)
            cache.mark()
        cache.load(cache.save(), cache.length)
        assert {name for name, _ in crossings.seen} <= COPIES


def test_both_sides_in_one_operation_raise_as_on_a_gpu() -> None:
    on_device = torch.zeros(1, device="meta")
    with pytest.raises(RuntimeError):
        on_device + torch.ones(1)
    with pytest.raises(RuntimeError):
        on_device.item()
