"""Kernels of level neon_dotprod, compiled for ARM on any machine.

python neon_kernels.py FEATURES FOLDER [FORMAT ...] writes FORMAT.FUNCTION.o of each format: gemv, gemv_batch, and where
there are panels repack and tile. It prints {format: {function: assembly}} as JSON. FEATURES: LLVM's names with commas,
such as dotprod,i8mm.
"""

import json
import sys
from pathlib import Path

import llvmlite.binding as llvm

from quant.target import isa

FEATURES = frozenset(["neon", *sys.argv[1].split(",")])
# What quant.target.isa finds on such a CPU. Numba knows nothing of it: no machine code is made by it.
isa.LEVEL, isa.host_features, isa._target_features = isa.NEON, lambda: FEATURES, lambda: FEATURES

from quant.formats import registry  # noqa: E402
from quant.gemm import packed  # noqa: E402
from quant.gemm.microkernel import TILES  # noqa: E402
from quant.target import jit  # noqa: E402
from quant.target.kernel import Kernel  # noqa: E402

TRIPLE = "aarch64-unknown-linux-gnu"


def ir_of(kernel: Kernel) -> tuple[str, str]:
    """LLVM's code of a kernel, optimised, and the name of its C function."""
    compiler = jit._KeptCFunc(kernel, kernel.__name__)
    result = compiler._compiler.compile(compiler._sig.args, compiler._sig.return_type)
    library = result.library
    for other in dict.fromkeys(library._linking_libraries):  # as finalize() does, which would go on to machine code
        library._final_module.link_in(other._get_module_for_linking(), preserve=True)
    library._optimize_final_module()
    return str(library._final_module), result.fndesc.llvm_cfunc_wrapper_name


def module_for_arm(code: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    """The module with another triple and data layout."""
    lines = (line for line in code.splitlines() if not line.startswith(("target triple", "target datalayout")))
    module = llvm.parse_assembly("\n".join(lines))
    module.triple, module.data_layout = TRIPLE, str(machine.target_data)
    return module


def main() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    features = ",".join(f"+{feature}" for feature in sorted(FEATURES))
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(
        cpu="generic", features=features, opt=3, reloc="static", codemodel="small"
    )
    assembly = {}
    for name in sys.argv[3:]:
        format_, texts = registry.get(name), {}
        made = {"gemv": format_.gemv, "gemv_batch": format_.gemv_batch}
        if panels := packed.find(format_):
            made |= {"repack": panels.repack, "tile": TILES[panels.kind]}
        for exported, kernel in made.items():
            code, function = ir_of(kernel)
            module = module_for_arm(code.replace(function, exported), machine)
            module.verify()
            Path(sys.argv[2], f"{name}.{exported}.o").write_bytes(machine.emit_object(module))
            texts[exported] = machine.emit_assembly(module)
        assembly[name] = texts
    print(json.dumps(assembly))


if __name__ == "__main__":
    main()
