"""An engine of each backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from small_engines import MODELS, opened

from localrun.engine import Engine


@pytest.fixture(scope="package", params=MODELS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with opened(request.param) as model:
        yield model


@pytest.fixture
def fresh(engine: Engine) -> Iterator[Engine]:
    """The same model, for a test that closes it."""
    with opened(engine.backend) as model:
        yield model
