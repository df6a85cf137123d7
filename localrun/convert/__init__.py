"""Checkpoints and GGUFs to packed GGUFs, in one pass, in bounded memory, resumable.

make_plan decides everything, convert carries it out:

    plan = make_plan(Path("DeepSeek-V3"), Path("v3-q4_k_m.gguf"), Options(mix="Q4_K_M"))
    convert(plan, threads=16)
"""

from localrun.convert.plan import Options, Plan, make_plan
from localrun.convert.run import Progress, convert

__all__ = ["Options", "Plan", "Progress", "convert", "make_plan"]
