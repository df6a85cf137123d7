"""llama.cpp's log, kept off the user's terminal; its last error is what our own messages quote.

llama.cpp writes to stderr unless a callback is set (llama.h, llama_log_set). The callback is process-wide and must
outlive every call into the library, so it lives in this module and nowhere else. Level 5 continues the line before it.
"""

import re
from functools import cache
from typing import Any

from localrun.errors import LocalrunError

_ERROR, _CONTINUED = 4, 5  # ggml.h, enum ggml_log_level
_MAX_ERRORS = 50  # of one load; the last lines are the ones that say why

_errors: list[str] = []
_level = 0


def silence() -> None:
    """Readies llama.cpp for use: its backends are registered and nothing it logs reaches the terminal. Idempotent."""
    _install()


def clear() -> None:
    """Forgets the errors so far, so that last_error() speaks of the next call only."""
    _errors.clear()


def last_error() -> str:
    """The last error line llama.cpp logged since clear(); empty if there was none.

    llama.cpp logs the cause first and then, twice, "failed to load model": the cause is the line wanted,
    without the names of functions and stages before it.
    """
    lines = [line.strip() for line in "".join(_errors).splitlines() if line.strip()]
    causes = [line for line in lines if "failed to load model" not in line]
    return re.sub(r"^(\w+: |error loading model( vocabulary)?: )+", "", (causes or lines or [""])[-1])


def _record(level: int, text: bytes, _user_data: Any) -> None:
    global _level
    _level = _level if level == _CONTINUED else level
    if _level == _ERROR:
        _errors.append(text.decode("utf-8", "replace"))
        del _errors[:-_MAX_ERRORS]


@cache  # holds the ctypes callback: collected, it would crash the next log line
def _install() -> Any:
    try:
        import llama_cpp
    except (OSError, RuntimeError, ImportError) as error:  # RuntimeError: what the package makes of an OSError
        advice = "pip install --force-reinstall llama-cpp-python"
        raise LocalrunError(f"llama.cpp, which reads vocabularies, cannot be loaded: {error}; {advice}") from None

    callback = llama_cpp.llama_log_callback(_record)
    llama_cpp.llama_log_set(callback, None)
    llama_cpp.llama_backend_init()
    return callback
