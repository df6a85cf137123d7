"""Renders one chat template in a process of its own; run as a script by chat_template.py, never imported.

A template is a program from an untrusted file. The sandbox keeps it from Python's internals; the limits of the
operating system, set before the template is even parsed, keep it from taking memory, CPU time or disk space.
Reads {"path", "limits", "source", "variables", "conversations"} as JSON from stdin, each conversation its own variables
(messages, tools). Writes a list to stdout with a
{"text"} or an {"error"} for each conversation, or one {"error"} for all. Whatever ends it otherwise leaves it empty.

The environment is the one Hugging Face templates are written for: transformers, utils/chat_template_utils.py @v5.0.0,
_compile_jinja_template.
"""

import json
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any


def limit(memory_bytes: int, output_bytes: int, cpu_s: int) -> None:
    """Sets the hard limits this process cannot lift again, as far as the system has them."""
    try:
        import resource
    except ImportError:  # Windows; the parent's time limit is left
        return
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: output_bytes,  # stdout is a file
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        with suppress(ValueError, OSError):  # lower already, or not to be had on this system
            resource.setrlimit(kind, (value, value))


def environment() -> Any:
    """A sandboxed jinja2 environment with what chat templates expect of transformers'."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks the assistant's text for training: renders as what it holds."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes HTML characters, which a prompt must hold as they are.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return env


def render(template: Any, variables: dict[str, Any], max_chars: int) -> dict[str, str]:
    """The answer: {"text": what the template writes}, or {"error": why there is none}."""
    pieces, size = [], 0
    try:
        for piece in template.generate(**variables):
            pieces.append(piece)
            size += len(piece)
            if size > max_chars:
                return {"error": f"it writes more than {max_chars} characters"}
    except Exception as error:  # a template can raise anything, and its message is the answer
        return {"error": reason(error)}
    return {"text": "".join(pieces)}


def reason(error: BaseException) -> str:
    """One short line."""
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return " ".join(f"{error}".split())[:200] or type(error).__name__


def describe(_kind: type[BaseException], error: BaseException, _trace: Any) -> None:
    """The excepthook: what is wrong before anything is rendered."""
    sys.stdout.write(json.dumps({"error": reason(error)}))
    sys.stdout.flush()


def main() -> None:
    """Read a request from stdin, answer it on stdout."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    sys.excepthook = describe
    limits = request["limits"]
    limit(limits["memory_bytes"], limits["output_bytes"], limits["cpu_s"])
    template = environment().from_string(request["source"])
    answers = [
        render(template, request["variables"] | conversation, limits["chars"])
        for conversation in request["conversations"]
    ]
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    main()
