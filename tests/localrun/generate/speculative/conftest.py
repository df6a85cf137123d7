"""A small model of each kind of attention, and another of its vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny_models
from speculating import CTX

import localrun
from localrun.engine import Engine


@pytest.fixture(scope="package", params=["v3", "llama"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with localrun.load(tiny_models.shared(request.param), threads=1, ctx=CTX) as model:
        yield model


@pytest.fixture(scope="package")
def other(engine: Engine) -> Iterator[Engine]:
    """A model of the same vocabulary with other weights: as a draft, wrong more often than right."""
    variant = "v3" if engine.config.kv_lora_rank else "llama"
    with localrun.load(tiny_models.shared(variant, seed=1), threads=1, ctx=CTX) as model:
        yield model
