"""The one error of this package."""


class QuantError(Exception):
    """A format, shape or setting that the kernels cannot compute with; the message says what was found and expected."""
