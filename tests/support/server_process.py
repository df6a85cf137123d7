"""`localrun serve` in a process of its own, for measurements."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from paths import ROOT


class ServerProcess:
    """A server on a free port, once it takes connections.

    Attributes:
        lines: what it has said on stderr.
    """

    def __init__(self, model: Path | str, *options: str):
        command = [sys.executable, "-m", "cli.main", "serve", str(model), "--port", "0", *options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        self.lines: list[str] = []
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line.rstrip())
            if found := re.search(r"serving .* at http://([\d.]+):(\d+)", line):
                self.host, self.port = found[1], int(found[2])
                break
        else:
            raise SystemExit(f"the server did not start: {self.lines}")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        self.lines += [line.rstrip() for line in self._process.stderr]

    def post(self, path: str, body: dict[str, Any], timeout: float = 600) -> tuple[int, dict[str, Any]]:
        """The status and the document of an answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def rss_mb(self) -> float:
        """Memory that is resident."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def stop(self, timeout: float = 60) -> int:
        """SIGTERM; the exit status."""
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._reader.join()
        return status
