"""A server that speaks as much of Hugging Face's hub as pull needs, and breaks on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


@dataclass
class Hub:
    """Repositories, their files, and what goes wrong.

    Attributes:
        files: repository -> path -> content.
        cuts: after how many bytes each of the next answers of a file ends, and the connection with it.
        ignores_ranges: answers with whole files.
        statuses: repository -> status and the hub's own word for it, in place of any answer.
        spoilt: path -> content that is sent instead of what is listed.
        asked: start and stop of each piece that was asked for.
    """

    files: dict[str, dict[str, bytes]]
    cuts: list[int] = field(default_factory=list)
    ignores_ranges: bool = False
    statuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    spoilt: dict[str, bytes] = field(default_factory=dict)
    is_plain: bool = False
    asked: list[tuple[int, int]] = field(default_factory=list)
    endpoint: str = ""


@contextmanager
def serving(files: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    hub = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/?]+)(?:/resolve/(\w+)/([^?]+))?(?:\?.*)?", self.path)
            repo = match[1] if match else ""
            if repo in hub.statuses:
                status, word = hub.statuses[repo]
                self._answer(status, b"<html>no</html>", {"X-Error-Code": word} if word else {})
            elif repo not in hub.files:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif match[3] is None:
                self._answer(200, json.dumps(_info(hub, repo)).encode())
            else:
                self._send_file(hub.spoilt.get(match[3], hub.files[repo][match[3]]))

        def _send_file(self, content: bytes) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(content))
            hub.asked.append((start, stop))
            if hub.ignores_ranges:
                self._answer(200, content)
                return
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            self._answer(206, content[start:stop], headers, hub.cuts.pop(0) if hub.cuts else None)

        def _answer(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:cut])
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _info(hub: Hub, repo: str) -> dict[str, object]:
    siblings = []
    for path, content in hub.files[repo].items():
        entry: dict[str, object] = {"rfilename": path, "size": len(content)}
        entry["blobId"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        if not hub.is_plain:
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        siblings.append(entry)
    return {
        "id": repo,
        "modelId": repo,
        "sha": COMMIT,
        "siblings": siblings,
        "tags": [],
        "downloads": 0,
        "private": False,
    }
