"""Which instructions the kernels may use: amx > avx512_vnni > avx2 > generic, or on ARM neon_dotprod > generic.

A level is taken only if LLVM reports all its features for this CPU (it asks CPUID and, through XGETBV, the operating
system) and Numba compiles for a target that has them: a 512-bit intrinsic in a narrower build aborts the process.
amx must be granted by the kernel as well, and a trial product must be right (amx.py); REFUSED says what was not.
LOCALRUN_ISA=<level> forces a lower one, for tests and for telling apart a kernel's fault from the machine's.

LOCALRUN_ISA=amx_emulated runs the kernels of amx with tile instructions spelt out in AVX-512 VNNI code
(gemm/amx_emulated.py): a check of these kernels on a machine without tiles, much slower than avx512_vnni.

Importing this module fixes the level of the process, before the first kernel is compiled.
"""

import os

import llvmlite.binding as llvm
from numba import config

from quant.errors import QuantError
from quant.target import amx

NEON = "neon_dotprod"
FEATURES = {
    "generic": frozenset(),
    "avx2": frozenset({"avx2", "fma", "f16c", "bmi2"}),
    "avx512_vnni": frozenset(
        {"avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"}
    ),
}
FEATURES["amx"] = FEATURES["avx512_vnni"] | {"amx-tile", "amx-int8"}
FEATURES[NEON] = frozenset({"neon", "dotprod"})
LEVELS = tuple(FEATURES)
EMULATED = "amx_emulated"

# The compile target for a level forced below the CPU's own. Name and features are both needed: either alone lets the
# host's features through or implies AVX-512.
_FORCED_TARGETS = {
    "generic": ("generic", ""),
    "avx2": ("haswell", "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2,+ssse3"),
}


def host_features() -> frozenset[str]:
    """LLVM's names of what this CPU has and the operating system has enabled."""
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def _target_features() -> frozenset[str]:
    """What Numba compiles for: the host's features unless NUMBA_CPU_FEATURES says otherwise."""
    if config.CPU_FEATURES is None:
        return host_features()
    return frozenset(f[1:] for f in config.CPU_FEATURES.split(",") if f.startswith("+"))


def _offered() -> list[str]:
    """The levels, lowest first, all of whose features both this CPU and Numba's compile target have."""
    usable = host_features() & _target_features()
    return [level for level in LEVELS if FEATURES[level] <= usable]


def detect() -> str:
    """The highest level that can be used."""
    return _detect()[0]


def _detect() -> tuple[str, str]:
    """The highest level that can be used, and why amx can't although the CPU has it ("" otherwise)."""
    best = _offered()[-1]
    refused = amx.refusal() if best == "amx" else ""
    return ("avx512_vnni", refused) if refused else (best, "")


def _choose() -> tuple[str, str]:
    """The level of this process, and amx's refusal; a forced level narrows Numba's compile target. Raises QuantError.

    Nothing is asked of the kernel for a lower level than amx, nor tried: forcing one avoids tiles altogether.
    """
    offered = _offered()
    wanted = os.environ.get("LOCALRUN_ISA", "").strip().lower()
    if not wanted:
        return _detect()
    if wanted not in (*LEVELS, EMULATED):
        raise QuantError(f"LOCALRUN_ISA={wanted} is no level; choose one of {', '.join(LEVELS)}")
    if ("avx512_vnni" if wanted == EMULATED else wanted) not in offered:
        raise QuantError(f"LOCALRUN_ISA={wanted}, but this CPU offers {offered[-1]} at most")
    if wanted == "amx" and (refused := amx.refusal()):
        raise QuantError(f"LOCALRUN_ISA=amx, but {refused}")
    if wanted != offered[-1] and wanted in _FORCED_TARGETS and "avx2" in host_features():
        config.CPU_NAME, config.CPU_FEATURES = _FORCED_TARGETS[wanted]
    return wanted, ""


LEVEL, REFUSED = _choose()


def has(level: str) -> bool:
    """Whether this process may use the instructions of `level`; emulated ones count."""
    if NEON in (level, LEVEL):
        return level in ("generic", LEVEL)
    return LEVELS.index("amx" if LEVEL == EMULATED else LEVEL) >= LEVELS.index(level)


def target_has(feature: str) -> bool:
    """Whether the compile target has one LLVM feature, such as "f16c"."""
    return feature in _target_features()
