"""A server around an engine, in this process: what tests ask, and a client that hangs up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.testclient import TestClient

from localrun.serve.app import application
from localrun.serve.scheduler import Scheduler
from localrun.serve.service import Service

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
REPLY = "Aye, all is well."
CALL = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHTFUL_CALL = f"<think>\nHm.\n</think>\n\n{CALL}"


@contextmanager
def serving(
    engine: Any,
    *,
    slots: int = 2,
    cache_bytes: int = 1 << 30,
    most_waiting: int = 8,
    api_key: str | None = None,
    variables: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[tuple[TestClient, Scheduler]]:
    """A client of a server, and its scheduler. Exceptions of the server's are the test's.

    variables: of the template. settings: of the application.
    """
    scheduler = Scheduler(engine, slots, cache_bytes, most_waiting)
    try:
        with TestClient(application(Service(engine, scheduler, "model", variables), api_key, **settings)) as client:
            yield client, scheduler
    finally:
        scheduler.close()


def events(text: str) -> list[Any]:
    """The documents of a stream, and "[DONE]"; comments are left out."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def ask(client: TestClient, path: str = CHAT, **body: Any) -> Any:
    """The answer to a chat or a completion, greedy unless the body says otherwise."""
    base = {"messages": HELLO} if path == CHAT else {"prompt": "<|im_start|>assistant\n"}
    return client.post(path, json={**base, "temperature": 0, **body})


async def hang_up(app: Starlette, path: str, body: dict[str, Any] | None, after: asyncio.Event) -> list[dict[str, Any]]:
    """What the server sends to a client that closes the connection when `after` is set; body: None for half of one."""
    sent: list[dict[str, Any]] = []
    data = b"{" if body is None else json.dumps(body).encode()
    messages = [{"type": "http.request", "body": data, "more_body": body is None}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await after.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST"},
        **{"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http"},
        **{"headers": [(b"content-type", b"application/json")], "client": ("test", 1), "server": ("test", 80)},
    }
    await app(scope, receive, send)
    return sent
