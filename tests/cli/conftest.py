"""For tests of the command line: an engine that always says the same, and a chat with it."""

from collections.abc import Callable

import pytest
from fake_engine import Engine, feed, install

from cli.main import run

Talk = Callable[..., tuple[list[str], str]]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return install(monkeypatch)


@pytest.fixture
def talk(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """A chat fed with a text and options: the lines of stdout, and all of stderr."""

    def talk(text: str | bytes, *args: str) -> tuple[list[str], str]:
        feed(monkeypatch, text)
        assert run(["chat", *args]) == 0
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return talk
