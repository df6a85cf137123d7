"""What a step queues for each layer, in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

if TYPE_CHECKING:
    from localrun.gpu.hybrid import HybridModel

# Copies are the handover's (handover_s); an allocation or a view is no launch.
_NONE = ("copy_", "empty", "new_empty")


class _Operations(TorchDispatchMode):
    """Counts torch's operations, those that a norm consists of on the CPU as one."""

    def __init__(self, found: Counter[str]):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if not func.is_view and not name.startswith(_NONE):
            self._found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What is launched within."""
    from triton.runtime import interpreter  # behind gpu_device, which settles whether there is one

    found: Counter[str] = Counter()
    run = interpreter.GridExecutor.__call__

    def counting(executor, *arguments, **options):
        found[executor.fn.__name__] += 1
        with _disable_current_modes():
            return run(executor, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", counting)
        with _Operations(found):
            yield found


def of_layers(model: HybridModel, monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Of each layer of a step of one token."""
    cache, each = model.new_cache(60), []
    model.forward([1], cache)  # what is made once

    def watched(begin: Callable) -> Callable:
        def begun(*arguments):
            before = found.copy()
            finish = begin(*arguments)

            def finished() -> torch.Tensor:
                result = finish()
                each.append(found - before)
                return result

            return finished

        return begun

    for layer in model.network.layers:
        layer.begin = watched(layer.begin)
    with counted(monkeypatch) as found:
        model.forward([2], cache)
    return each
