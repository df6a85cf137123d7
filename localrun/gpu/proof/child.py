"""A part of the proof in a process of its own: what hangs, crashes or loses the card ends there. No torch.

The child gets its task as JSON on stdin and says in lines of JSON on stdout what it is at, and at the end what it
found. Silence for longer than the part's limit is a hang. The child is a session of its own, so that Ctrl-C is this
process's to deal with: it ends the child, and so does its own end, however it comes (part_child.py).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from localrun.gpu.proof.task import Task

_ROOT = str(Path(__file__).resolve().parents[3])
_TAIL = 4096  # bytes of stderr
_LONGEST = 300  # characters of a reason
_START_S = 90.0  # to import torch from a slow disk
_END_S = 10.0  # for a killed process to go; one that waits for a dead card's driver may never do

Message = dict[str, Any]


def run(
    name: str,
    task: Task,
    silence_s: float,
    doing: Callable[[str], None],
    environment: dict[str, str] | None = None,
    start_s: float = _START_S,
) -> Message:
    """Have the part `name` done, and give what it has found: "faults", "figures" and "choices".

    Args:
        silence_s: how long it may take from one thing to the next.
        doing: told what it is at.
        environment: besides this process's.
        start_s: how long until it says its first word.
    """
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "localrun.gpu.proof.part_child", name, str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True,
            env=os.environ | {"PYTHONPATH": _path()} | (environment or {}),
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            return _follow(process, task, start_s, silence_s, doing) or {"faults": [_how_it_ended(process, stderr)]}
        finally:
            _end(process)


def _path() -> str:
    return os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))


def _follow(
    process: subprocess.Popen, task: Task, limit_s: float, silence_s: float, doing: Callable[[str], None]
) -> Message | None:
    """What it found; a fault if it hangs; None if it ended without a word."""
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    try:
        process.stdin.write(json.dumps(task.document()).encode())
        process.stdin.close()
    except BrokenPipeError:
        return None
    at, last = "it starts", time.monotonic()
    while True:
        try:
            line = lines.get(timeout=max(0.0, last + limit_s - time.monotonic()))
        except queue.Empty:
            return {"faults": [f"hangs: no answer for {limit_s:g} s ({at})"]}
        if not line:
            return None
        message, last, limit_s = json.loads(line), time.monotonic(), silence_s
        if "faults" in message:
            return message
        at = message["doing"]
        doing(at)
        process.at = at  # type: ignore[attr-defined]


def _read(stdout: IO[bytes], lines: queue.Queue[bytes]) -> None:
    """Put lines into the queue, and an empty one at the end."""
    for line in iter(stdout.readline, b""):
        lines.put(line)
    lines.put(b"")


def _how_it_ended(process: subprocess.Popen, stderr: IO[bytes]) -> str:
    """In one line: the signal or exit code, what it was at, and the last line that it wrote."""
    try:
        code = process.wait(_END_S)
    except subprocess.TimeoutExpired:
        return "closed its output and does not end"
    at = getattr(process, "at", "it starts")
    if code == -signal.SIGKILL:
        how = "was killed, as by a system without memory"
    elif code < 0:
        how = f"crashed with {signal.Signals(-code).name}"
    else:
        how = f"ended with exit code {code}"
    stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _TAIL))
    said = stderr.read().decode(errors="replace").strip().splitlines()
    return f"{how} ({at})" + (f": {said[-1][:_LONGEST]}" if said else "")


def _end(process: subprocess.Popen) -> None:
    """Kill it, and let go of it even if that has no effect."""
    process.kill()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        return
    finally:
        process.stdout.close()
