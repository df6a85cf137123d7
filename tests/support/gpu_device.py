"""Where the tests of Triton kernels run: on the GPU, or without one on the CPU through Triton's interpreter.

Import this before triton: whether kernels are compiled or interpreted is decided when they are defined.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from localrun.gpu import tiles

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


class _Kept:
    """What Triton's interpreter restores after a kernel: nothing, since no kernel is compiled in these processes."""

    def restore(self) -> None:
        pass


def _quicken() -> None:
    """Of what interpreting takes, two thirds are for nothing.

    Triton puts its language in place anew at every call in a kernel. And it computes where integers overflow, but looks
    at that in debugging only.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch, kept, modules = interpreter._patch_lang, _Kept(), set()

    def patch_once(function: Callable) -> _Kept:
        if id(function.__globals__) not in modules:
            modules.add(id(function.__globals__))
            patch(function)
        return kept

    interpreter._patch_lang = patch_once


if not HAS_GPU and find_spec("triton"):
    _quicken()

gpu = pytest.mark.skipif(not HAS_GPU, reason="torch sees no CUDA device")


@contextmanager
def cut(kind: str, name: str) -> Iterator[None]:
    """Within, kernels use these tiles."""
    where = torch.empty(0, device=DEVICE).device  # a card's with its number
    tiles.use(where, tiles.named({kind: name}))
    try:
        yield
    finally:
        tiles.use(where, tiles.Tiles())


def others(kind: str) -> list[str]:
    """Names of all tiles but the usual ones."""
    usual = tiles.CANDIDATES[kind][tiles.USUAL]
    return [name for name, tile in tiles.CANDIDATES[kind].items() if tile != usual]


def compiled_environment() -> dict[str, str]:
    """The environment of a process that shall compile kernels, not interpret them."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
