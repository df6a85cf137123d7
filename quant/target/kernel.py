"""A kernel before it is compiled: what it computes, by which signature, and from which ISA level on.

Knows nothing of Numba: jit.py gives it the compiler. So what only names kernels, such as the registry of formats,
imports neither.
"""

from collections.abc import Callable
from functools import cached_property


class Kernel:
    """A C function that is called by its address, compiled (or loaded from the cache) when that is first asked for.

    Attributes:
        level: the lowest level of isa.py whose instructions it has. Below it, to compile would abort the process.
    """

    def __init__(self, function: Callable, signature: str, level: str, compile_: Callable):
        self.function, self.signature, self.level, self._compile = function, signature, level, compile_
        self.__name__ = function.__name__

    @cached_property
    def compiled(self):
        """Numba's compiled function. Raises QuantError below the kernel's level."""
        return self._compile(self)

    @property
    def address(self) -> int:
        """Of the machine code, which is compiled or loaded now if it has not been."""
        return self.compiled.address

    @property
    def ctypes(self):
        """The function as ctypes calls it."""
        return self.compiled.ctypes
