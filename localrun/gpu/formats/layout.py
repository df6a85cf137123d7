"""What kernels must know of each GGUF format: its blocks' sizes and words, and the grids beside them."""

from dataclasses import dataclass

import numpy as np

from quant.formats import codebooks


@dataclass(frozen=True)
class Layout:
    """How kernels read a format.

    Attributes:
        name: ggml's, or FP8_E4M3 (one byte a weight, and a float32 scale for every 128 x 128).
        block: weights in a block.
        block_bytes: bytes of a block.
        word: bytes of a word, and planes of a half.
    """

    name: str
    block: int
    block_bytes: int
    word: int

    @property
    def n_words(self) -> int:
        """Words that hold the codes of a half (or of both)."""
        return 16 // self.word


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("F32", 1, 4, 1),
        Layout("F16", 1, 2, 1),
        Layout("BF16", 1, 2, 1),
        Layout("FP8_E4M3", 1, 1, 1),
        Layout("Q4_0", 32, 18, 2),
        Layout("Q4_1", 32, 20, 4),
        Layout("Q5_0", 32, 22, 2),
        Layout("Q5_1", 32, 24, 4),
        Layout("Q8_0", 32, 34, 2),
        Layout("Q2_K", 256, 84, 4),
        Layout("Q3_K", 256, 110, 2),
        Layout("Q4_K", 256, 144, 4),
        Layout("Q5_K", 256, 176, 4),
        Layout("Q6_K", 256, 210, 2),
        Layout("IQ4_NL", 32, 18, 2),
        Layout("IQ4_XS", 256, 136, 4),
        Layout("MXFP4", 32, 17, 1),
        Layout("NVFP4", 64, 36, 4),
        Layout("TQ1_0", 256, 54, 1),
        Layout("TQ2_0", 256, 66, 2),
        Layout("Q1_0", 128, 18, 2),
        Layout("IQ1_S", 256, 50, 4),
        Layout("IQ1_M", 256, 56, 4),
        Layout("IQ2_XXS", 256, 66, 4),
        Layout("IQ2_XS", 256, 74, 4),
        Layout("IQ2_S", 256, 82, 4),
        Layout("IQ3_XXS", 256, 98, 4),
        Layout("IQ3_S", 256, 110, 4),
    )
}


def grid(name: str) -> np.ndarray | None:
    """What kernels read beside the blocks of a format of grid entries: int32 (entries * 2 or 1), 4 bytes each; or None.

    Magnitudes; of IQ1 the weights eight times, plus 1, plus 128.
    """
    if name not in codebooks.SHAPES:
        return None
    entries = codebooks.grid(name)
    entries = 8 * entries.astype(np.int16) + 129 if name in ("IQ1_S", "IQ1_M") else entries
    return entries.astype(np.uint8).view(np.int32).reshape(-1)
