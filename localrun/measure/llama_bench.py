"""Another build of llama.cpp, or a fork of it, by its llama-bench: a program that the user has.

Each test is a process of its own, which loads the file (from the page cache), warms up and measures once; what it says
it took counts, not the process. Options and JSON: tools/llama-bench of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from localrun.errors import LocalrunError
from localrun.files import user_path
from localrun.gguf.file import GGUFFile

_LONGEST = 200  # characters of a reason
_RESULT = re.compile(r'\{[^{}]*"samples_ns"[^{}]*\}')  # ik_llama.cpp's writes lines of other kinds between


class LlamaBench:
    """A bench.TimedEngine of tokens that the program makes up itself.

    Attributes:
        description: how it runs, for the reader of its figures.
    """

    def __init__(self, command: str, file: GGUFFile, threads: int):
        """command: the program's path, and options for it. Raises LocalrunError if there is no such program."""
        try:
            program, *options = shlex.split(command)
        except ValueError:  # no path, or a quote that is not closed
            raise LocalrunError(f"--against {command}: expected the path of a llama-bench, and its options") from None
        path = user_path(program)
        if not path.is_file():
            raise LocalrunError(f"{program}: no such file; --against NAME:PATH takes the path of a llama-bench")
        if file.is_interleaved:
            raise LocalrunError(f"{file.path}: has interleaved rows, which llama.cpp can't read; give the plain file")
        self._command = [str(path.absolute()), "-m", str(file.path), "-t", str(threads), "-r", "1", "-o", "json"]
        self._command += options
        self._depth = 0
        self.description: dict[str, Any] = {"program": str(path), "options": shlex.join(options), "threads": threads}

    def hold(self, ids: Sequence[int]) -> None:
        """Have each test begin with a context of so many tokens."""
        self._depth = len(ids)

    def prompt(self, ids: Sequence[int]) -> float:
        """Seconds of a prompt."""
        return self._run(len(ids), 0)

    def generate(self, ids: Sequence[int]) -> list[float]:
        """Seconds of so many tokens, one by one, in one number."""
        return [self._run(0, len(ids))]

    def _run(self, n_prompt: int, n_generate: int) -> float:
        depth = ["-d", str(self._depth)] if self._depth else []  # older ones do not know it
        command = [*self._command, "-p", str(n_prompt), "-n", str(n_generate), *depth]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise LocalrunError(f"{command[0]}: cannot be run: {error.strerror}") from None
        try:
            return sum(json.loads(_RESULT.findall(done.stdout)[0])["samples_ns"]) / 1e9
        except (ValueError, LookupError, TypeError):
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1][:_LONGEST]
            raise LocalrunError(f"{command[0]}: ended with {done.returncode} and no result; it said: {said}") from None
