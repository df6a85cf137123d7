"""A server on a socket of this process, and a browser in which to look at it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from localrun.serve import server


@contextmanager
def running(engine: Any, **settings: Any) -> Iterator[str]:
    """The address of a server around an engine. settings: server.serve's."""
    ready, servers = threading.Event(), []

    class Kept(server._Server):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            servers.append(self)

    usual = {"name": "model", "api_key": None, "slots": 2, "cache_bytes": 1 << 28}
    with pytest.MonkeyPatch.context() as patch, server.listen_on("127.0.0.1", 0) as listener:
        patch.setattr(server, "_Server", Kept)
        patch.setattr(Kept, "capture_signals", nullcontext)
        thread = threading.Thread(
            target=lambda: server.serve(engine, listener, **{**usual, **settings}, ready=ready.set)
        )
        thread.start()
        assert ready.wait(60)
        try:
            yield server.url(listener)
        finally:
            servers[0].should_exit = servers[0].force_exit = True
            thread.join()


@contextmanager
def browser(width: int = 1200, height: int = 800) -> Iterator[Any]:
    """A headless Chromium with a profile of its own. Skips the test where there is none."""
    selenium = pytest.importorskip("selenium.webdriver")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = program
    # Containers' root has no user namespaces, and their /dev/shm is small.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = selenium.Chrome(options, selenium.ChromeService(driver))
    try:
        yield window
    finally:
        window.quit()
