"""The codebooks of the formats IQ1 to IQ3, and the signs that 7 bits stand for: as the gguf package publishes them.

A group of 8 (IQ1, IQ2) or 4 (IQ3) weights is an entry of its format's grid. The tables are llama.cpp's (ggml-common.h:
iq1s_grid, iq2xxs_grid, iq3s_grid and so on, ksigns_iq2xs); gguf.quants has them, packed, as attributes of its classes.
gguf is imported when a table is first asked for.
"""

from functools import cache

import numpy as np

# Entries and weights of an entry. IQ1_M shares IQ1_S's grid.
SHAPES = {
    "IQ1_S": (2048, 8),
    "IQ1_M": (2048, 8),
    "IQ2_XXS": (256, 8),
    "IQ2_XS": (512, 8),
    "IQ2_S": (1024, 8),
    "IQ3_XXS": (256, 4),
    "IQ3_S": (512, 4),
}


@cache
def grid(name: str) -> np.ndarray:
    """The grid of the format `name`: int8 (entries, weights of an entry) as in SHAPES, C order, read-only.

    Magnitudes in IQ2 (8, 25, 43) and IQ3 (up to 62, up to 15), whose signs are elsewhere; -1, 0, 1 in IQ1.
    """
    from gguf import quants

    format_ = getattr(quants, name)
    format_.init_grid()
    values = np.ascontiguousarray(format_.grid.reshape(SHAPES[name]).astype(np.int8))
    values.flags.writeable = False
    return values


@cache
def ksigns() -> np.ndarray:
    """uint8 (128,), read-only: the signs of 8 weights by the 7 bits of a file, bit i set where weight i is negative.

    The eighth bit makes the number of negative weights even.
    """
    from gguf import quants

    return np.frombuffer(quants.IQ2_XXS.ksigns, np.uint8)
