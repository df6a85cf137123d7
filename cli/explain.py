"""An error to the line that tells the user of it."""

from localrun.errors import LocalrunError
from quant.errors import QuantError

EXPECTED = (LocalrunError, QuantError, OSError, ImportError, MemoryError)  # of users, files, systems, installations


def explain(error: BaseException) -> str:
    """What is wrong and with what, for an error of EXPECTED; of another, that it is this program's fault."""
    if isinstance(error, LocalrunError | QuantError):
        return str(error)
    if isinstance(error, MemoryError):
        return "not enough memory: end other programs, or ask for less (-c, -t)"
    if isinstance(error, ImportError):
        return f"{error.name or 'a module'} cannot be loaded: {error}; install localrun anew"
    if isinstance(error, OSError) and error.strerror is None:  # of a library: there is only a text
        return f"a library cannot be loaded: {error}; install its package anew"
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}: {error.strerror}"
    return f"internal error, please report it: {type(error).__name__}: {error}"
