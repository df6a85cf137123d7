"""The errors a user can cause and mend. cli/main.py prints each as one line and exits with 1."""


class LocalrunError(Exception):
    """Something the user can fix; the message names what was found, what was expected, and where."""


class GGUFError(LocalrunError):
    """A GGUF file that breaks the format; the message names file, key or tensor, found and expected."""


class UnsupportedModelError(LocalrunError):
    """A sound file holding a model that the native backend does not run; llama.cpp may."""


class ContextFullError(LocalrunError):
    """The prompt or the reply needs more tokens than the context holds."""


class ClosedError(LocalrunError):
    """A model that was closed, or loaded before this process was forked, can't be used any more."""
