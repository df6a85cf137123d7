"""Whether llama.cpp can run a file, found out in a process of its own: on some faults it ends the process it runs in.

llama.cpp checks much of a file, but not that its kernels take a tensor's type, nor every number of the keys. A trial
costs a load, most of which the page cache saves the load that follows, and some 0.3 s.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from localrun.errors import LocalrunError
from localrun.gguf.file import GGUFFile

_BASE_S, _BYTES_PER_S = 60, 20_000_000  # how long a trial may take, at a slow disk's speed
_LONGEST = 200  # characters of a reason

_passed: set[tuple] = set()  # identities of files, and how they were loaded: a process need not try them again


def try_out(file: GGUFFile, threads: int, use_extra_bufts: bool) -> None:
    """Raises LocalrunError, naming the file and llama.cpp's reason, if llama.cpp cannot load and evaluate it."""
    key = (*(part.identity for part in file.files), use_extra_bufts)
    if key in _passed:
        return
    request = {
        "path": [str(Path(__file__).parents[2]), *map(os.path.abspath, sys.path)],
        "files": [part.same_path for part in file.files],
        "use_extra_bufts": use_extra_bufts,
        "threads": threads,
    }
    problem = _problem(file, json.dumps(request))
    if problem is not None:
        raise LocalrunError(f"{file.path}: llama.cpp {in_words(file, problem)}")
    _passed.add(key)


def in_words(file: GGUFFile, reason: str) -> str:
    """What llama.cpp says, short, with the names of the file in place of its descriptors; or that it says nothing."""
    for part in file.files:
        reason = reason.replace(part.same_path, str(part.path))
    return reason[:_LONGEST] or "no reason given"


def _problem(file: GGUFFile, request: str) -> str | None:
    """What the child says, or how it ended."""
    limit_s = _BASE_S + file.file_size / _BYTES_PER_S
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("trial_child.py"))],
            input=request,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            pass_fds=[part.descriptor for part in file.files] if os.name == "posix" else [],
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # a debugger's pages would hide the reason
            start_new_session=True,  # Ctrl-C is for the parent to deal with
        )
    except subprocess.TimeoutExpired:
        return f"takes more than {limit_s:.0f} s to load it"
    except OSError as error:
        raise LocalrunError(f"llama.cpp cannot be tried out: {sys.executable}: {error.strerror}") from None
    if done.returncode == 0:
        return json.loads(done.stdout)["problem"]
    return f"cannot run it: {_ending(done.returncode)}{_last_words(done.stderr)}"


def _ending(code: int) -> str:
    """ "it ends with SIGABRT"."""
    if code < 0 and -code in {*signal.Signals}:
        return f"it ends with {signal.Signals(-code).name}"
    return f"it ends with exit code {code}"


def _last_words(log: str) -> str:
    """The last line of stderr, which says why, without the folders of llama.cpp's sources."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f" ({re.sub(r'^[^ ]*/', '', lines[-1])})" if lines else ""
