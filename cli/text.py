"""Text that the user hands over: from an option, a file or stdin. Bad UTF-8 is refused, never silently changed."""

import codecs
import sys

from localrun.errors import LocalrunError
from localrun.files import read_bytes, read_stream, user_path

MOST_BYTES = 1 << 28  # of a text: some 60 million tokens, and little enough to hold
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(file: str) -> str:
    """The content of a file, or of stdin for "-", less one newline at its end (as llama.cpp's -f does).

    A byte-order mark is no part of it, and Windows' ends of lines are ends of lines.

    Raises LocalrunError if it cannot be read, is too large, or is not UTF-8.
    """
    if file == "-":
        data, name = _read_stdin(), "stdin"
    else:
        data, name = read_bytes(user_path(file), file, MOST_BYTES), file
    return decode(data.removeprefix(codecs.BOM_UTF8), name).replace("\r\n", "\n").removesuffix("\n")


def _read_stdin() -> bytes:
    try:
        return read_stream(sys.stdin.buffer, "stdin", MOST_BYTES)
    except OSError as error:
        raise LocalrunError(f"stdin: cannot be read: {error.strerror}") from None


def decode(data: bytes, name: str) -> str:
    """data as text. Raises LocalrunError naming where it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        advice = "; save it as UTF-8, not UTF-16" if data.startswith(_UTF_16) else ""
        found = f"byte {data[error.start]:#04x} at {error.start}"
        raise LocalrunError(f"{name}: is not UTF-8 text: {found}{advice}") from None


def check_text(text: str, name: str) -> str:
    """text, if it is Unicode: an argument that is not UTF-8 comes with lone surrogates. Raises LocalrunError."""
    return decode(text.encode("utf-8", "surrogateescape"), name)
