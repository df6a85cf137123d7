"""How functions that exist only inside kernels are compiled: to LLVM's code, without machine code of their own.

Numba would make a function that Python can call of each, with wrappers and machine code, and would optimise it, all
that it calls included: more than half the time it takes to compile a kernel. Nothing calls them: LLVM inlines them into
the kernel, which is then optimised as a whole.
"""

from typing import Any

from numba.core.codegen import JITCodeLibrary

from quant.target.pipeline import KernelCompiler


class _NoEnvironment:
    """Stands for the code generator where a function's environment is set: one that is not run has none."""

    def set_env(self, name: str, environment: Any) -> None:
        pass


class _LinkedLibrary(JITCodeLibrary):
    """LLVM's code for kernels to link."""

    @property
    def codegen(self) -> _NoEnvironment:
        return _NoEnvironment()

    def get_pointer_to_function(self, name: str) -> int:
        """None: there is no machine code."""
        return 0

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


class InlinedCompiler(KernelCompiler):
    """Compiles functions for kernels to link."""

    new_library = _LinkedLibrary
