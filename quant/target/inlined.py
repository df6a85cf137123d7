"""How functions that exist only inside kernels are compiled: to LLVM's code, without machine code of their own.

Numba would make a function that Python can call of each, with wrappers and machine code, and would optimise it, all
that it calls included: more than half the time it takes to compile a kernel. Nothing calls them: LLVM inlines them into
the kernel, which is then optimised as a whole.
"""

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import LoweringPass, register_pass
from numba.core.typed_passes import NativeLowering


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


@register_pass(mutates_CFG=False, analysis_only=False)
class _IntoLinkedLibrary(LoweringPass):
    _name = "into_linked_library"

    def __init__(self) -> None:
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        state.library = _LinkedLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        return True


class InlinedCompiler(CompilerBase):
    """Numba's pipeline, but for what comes out."""

    def define_pipelines(self) -> list[Any]:
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes = [kind for kind, _ in pipeline.passes]
        pipeline.passes.insert(passes.index(NativeLowering), (_IntoLinkedLibrary, "into a linked library"))
        pipeline.finalize()
        return [pipeline]
