"""An engine that says what it is told to, and a client of a server around it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import Engine
from serving import REPLY, serving
from starlette.testclient import TestClient


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(REPLY) as fake:
        yield fake


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    with serving(engine) as (client, _):
        yield client
