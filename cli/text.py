"""Text that the user hands over: from an option, a file or stdin. Bad UTF-8 is refused, never silently changed."""

import sys
from pathlib import Path

from localrun.errors import LocalrunError


def read_text(file: str) -> str:
    """The content of a file, or of stdin for "-", less one newline at its end (as llama.cpp's -f does).

    Raises LocalrunError if it cannot be read or is not UTF-8.
    """
    name = "stdin" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise LocalrunError(f"{name}: cannot be read: {error.strerror}") from None
    return decode(data, name).removesuffix("\n")


def decode(data: bytes, name: str) -> str:
    """data as text. Raises LocalrunError naming where it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LocalrunError(f"{name}: is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}") from None


def check_text(text: str, name: str) -> str:
    """text, if it is Unicode: an argument that is not UTF-8 comes with lone surrogates. Raises LocalrunError."""
    return decode(text.encode("utf-8", "surrogateescape"), name)
