"""Loads a model into llama.cpp and evaluates some tokens, in a process of its own; run as a script by trial.py.

Reads {"path", "files", "use_extra_bufts", "threads"} as JSON from stdin, writes {"problem": text or null} to stdout.
A failed assertion, a signal or the want of memory ends this process, and nothing else.
"""

import json
import sys
from contextlib import suppress
from typing import Any

_CTX, _PROMPT = 256, 4  # tokens


def problem_of(request: dict[str, Any]) -> str | None:
    """What llama.cpp says against the model; None if it loads and evaluates a prompt and a token."""
    from localrun.backends import binding, llama_log

    model = binding.load_model(request["files"], use_extra_bufts=request["use_extra_bufts"])
    if not model:
        return f"cannot load it: {llama_log.last_error()}"
    context = binding.new_context(model, _CTX, request["threads"])
    if not context:
        return f"cannot make a context: {llama_log.last_error()}"
    for start, ids in ((0, [0] * _PROMPT), (_PROMPT, [0])):
        if status := binding.evaluate(context, ids, start, 1):
            return f"failed to evaluate {len(ids)} tokens ({status}): {llama_log.last_error()}"
    return None


def main() -> None:
    """Read a request from stdin, answer it on stdout."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    with suppress(ImportError, ValueError, OSError):  # Windows; or lower already
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # of a crash that is reported a file is of no use
    sys.stdout.write(json.dumps({"problem": problem_of(request)}))


if __name__ == "__main__":
    main()
