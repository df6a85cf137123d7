"""Whoever stands behind a Protocol has all of it, by the same names: nothing else checks that."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Generic, Protocol

import pytest

from localrun import runtime
from localrun.backends.llama_cpp import LlamaCppCache, LlamaCppModel
from localrun.cpu import bridge
from localrun.cpu.model import NativeModel
from localrun.cpu.mtp import MTP
from localrun.cpu.weights import LayerWeights
from localrun.engine import Engine
from localrun.gpu.caches.latent import LatentCache
from localrun.gpu.experts import in_vram, routed
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.matrices import linear
from localrun.gpu.weights import DeviceWeights
from localrun.network import weight_source
from localrun.network.cache import Cache

BEHIND = {
    runtime.Model: (NativeModel, HybridModel, LlamaCppModel),
    runtime.MTPModel: (NativeModel, HybridModel),
    runtime.MTPHead: (MTP,),
    runtime.KVCache: (Cache, LatentCache, LlamaCppCache),
    runtime.Runner: (Engine,),
    weight_source.WeightSource: (LayerWeights, DeviceWeights),
    weight_source.HeadLinear: (bridge.HeadLinear, linear.HeadLinear),
    weight_source.RoutedExperts: (bridge.Experts, bridge.SharedExperts, in_vram.Experts, routed._Layer),
    weight_source.Attend: (bridge.Attend,),
    weight_source.AttendRebuilt: (bridge.AttendRebuilt,),
}
# A device's attention has its own, and models with indexers are not run there.
WITHOUT = {(DeviceWeights, name) for name in ("attend", "attend_rebuilt", "attend_chosen", "choose_rows")}
PAIRS = [(protocol, kind) for protocol, kinds in BEHIND.items() for kind in kinds]


def members(protocol: type) -> set[str]:
    classes = [each for each in protocol.__mro__ if each not in (Protocol, Generic, object)]
    names = {name for each in classes for name in [*vars(each), *vars(each).get("__annotations__", {})]}
    return {name for name in names if not name.startswith("_") or name == "__call__"}


def is_attribute(kind: type, name: str) -> bool:
    """Whether the class has it, or a method sets it."""
    sources = "".join(inspect.getsource(each) for each in kind.__mro__ if each is not object)
    return hasattr(kind, name) or f"self.{name}" in sources


def parameters(function: Callable) -> list[inspect.Parameter]:
    return [each for each in inspect.signature(function).parameters.values() if each.name != "self"]


@pytest.mark.parametrize(("protocol", "kind"), PAIRS, ids=[f"{p.__name__}-{k.__module__}" for p, k in PAIRS])
def test_has_all_of_it(protocol: type, kind: type) -> None:
    for name in members(protocol):
        asked = getattr(protocol, name, None)
        if (kind, name) in WITHOUT:
            assert not is_attribute(kind, name)
        elif not inspect.isfunction(asked):
            assert is_attribute(kind, name), name
        else:
            wanted, found = parameters(asked), parameters(getattr(kind, name))
            assert [each.name for each in found[: len(wanted)]] == [each.name for each in wanted], name
            must_be_given = {each.name for each in found if each.default is each.empty}
            assert must_be_given <= {each.name for each in wanted if each.default is each.empty}, name
