"""The codebooks against gguf's dequantize, by blocks that name each entry."""

import gguf
import numpy as np
import pytest

from quant.formats import codebooks

QS = {"IQ1_S": 2, "IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 2, "IQ3_XXS": 2, "IQ3_S": 2}  # where a block's indices begin


def first_groups(name: str) -> np.ndarray:
    """gguf's first group of blocks whose first byte of qs is 0..255; everything else is 0 but for d = 1."""
    kind = gguf.GGMLQuantizationType[name]
    blocks = np.zeros((256, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    blocks[:, :2] = np.float16([1]).view(np.uint8)
    blocks[:, QS[name]] = np.arange(256)
    return gguf.quants.dequantize(blocks, kind)[:, : codebooks.SHAPES[name][1]]


@pytest.mark.parametrize("name", codebooks.SHAPES)
def test_grids_have_their_shape_and_are_kept(name):
    grid = codebooks.grid(name)
    assert (grid.shape, grid.dtype) == (codebooks.SHAPES[name], np.int8)
    assert not grid.flags.writeable
    assert grid is codebooks.grid(name)
    assert len(np.unique(grid, axis=0)) == len(grid)


@pytest.mark.parametrize("name", QS)
def test_grids_are_ggufs(name):
    grid, found = codebooks.grid(name)[:256].astype(np.float32), first_groups(name)
    offset, unit = (0.125, 1.0) if name == "IQ1_S" else (0.0, found[0, 0] / grid[0, 0])
    assert np.array_equal(found, (grid + np.float32(offset)) * np.float32(unit))


def test_both_of_iq1_share_a_grid():
    assert np.array_equal(codebooks.grid("IQ1_M"), codebooks.grid("IQ1_S"))


def test_ksigns_keep_the_7_bits_and_make_them_even():
    bits = np.unpackbits(codebooks.ksigns()[:, None], axis=1, bitorder="little")
    assert np.array_equal(codebooks.ksigns() & 127, np.arange(128))
    assert not (bits.sum(1) % 2).any()
