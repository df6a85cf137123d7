"""Numba's compiler with the passes that kernels need, before LLVM's, which are all there.

Left out are those for closures, `with` blocks, array expressions, literals and automatic parallelism, and the counting
of references: kernels have addresses alone. What a call of an operator or an intrinsic gives for arguments of some
types is remembered from one function to the next.
"""

from typing import Any

from numba.core import typed_passes, types, untyped_passes
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, PassManager
from numba.core.compiler_machinery import LoweringPass, register_pass

_UNTYPED = (
    untyped_passes.TranslateByteCode,
    untyped_passes.FixupArgs,
    untyped_passes.IRProcessing,
    untyped_passes.RewriteSemanticConstants,
    untyped_passes.DeadBranchPrune,
    untyped_passes.GenericRewrites,  # constant indices of tuples
    untyped_passes.ReconstructSSA,
)
_TYPED = (
    typed_passes.NopythonTypeInference,
    typed_passes.PreLowerStripPhis,
    typed_passes.IRLegalization,
)
_INTO_LLVM = (typed_passes.NativeLowering, typed_passes.NoPythonBackend)


class _RememberingContext:
    """Numba's typing context, which looks a call's signature up once."""

    def __init__(self, context: Any):
        self._context = context
        self._found: dict[tuple[Any, ...], Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def resolve_function_type(self, function: Any, arguments: Any, keywords: Any) -> Any:
        if keywords or isinstance(function, types.Dispatcher):
            return self._context.resolve_function_type(function, arguments, keywords)
        call = function, tuple(arguments)
        if call not in self._found:
            self._found[call] = self._context.resolve_function_type(function, arguments, keywords)
        return self._found[call]


_remembering: dict[int, _RememberingContext] = {}  # by the context's id; Numba has one of a target


@register_pass(mutates_CFG=False, analysis_only=False)
class _IntoLibrary(LoweringPass):
    _name = "into_library"

    def __init__(self) -> None:
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        state.library = state.new_library(state.targetctx.codegen(), state.func_id.func_qualname)
        return True


class KernelCompiler(CompilerBase):
    """Compiles kernels."""

    @staticmethod
    def new_library(codegen: Any, name: str) -> JITCodeLibrary:
        """An empty one, whose object code can be kept."""
        library = codegen.create_library(name)
        library.enable_object_caching()  # to be kept
        return library

    def define_pipelines(self) -> list[Any]:
        """Numba's passes that kernels need, in their order."""
        context = self.state.typingctx
        self.state.typingctx = _remembering.setdefault(id(context), _RememberingContext(context))
        self.state.new_library = self.new_library
        pipeline = PassManager("kernel")
        for kind in (*_UNTYPED, *_TYPED, _IntoLibrary, *_INTO_LLVM):
            pipeline.add_pass(kind, kind.name())
        pipeline.finalize()
        return [pipeline]
