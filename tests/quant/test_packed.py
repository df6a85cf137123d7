"""Panels: repacked blocks against unpack, products of many tokens against float64, at levels that have the tile."""

import kernels
import numpy as np
import pytest
from packed_layout import unpacked

from quant.errors import QuantError
from quant.formats import registry
from quant.gemm import packed
from quant.gemm.microkernel_k_block import BIAS, BIAS_FLOAT, part_bytes
from quant.target import isa
from quant.target.jit import kernel
from quant.threads.pool import Pool, aligned_bytes

pytestmark = pytest.mark.levels

NAMES = [name for name in registry.NAMES if packed.find(registry.get(name))]

if not NAMES:
    pytest.skip("no integer tile at this ISA level: float32 tiles are used", allow_module_level=True)


@pytest.mark.parametrize("name", NAMES)
def test_repacked_blocks_are_the_weights(name):
    format_ = registry.get(name)
    raw = kernels.random_blocks(name, (16, 3 * format_.block), np.random.default_rng(0))
    rows = np.array([row.ctypes.data for row in raw])
    n_k_blocks = 3 * format_.block // packed.K_BLOCK
    n_bytes = part_bytes(packed.find(format_).kind)
    out = aligned_bytes(n_k_blocks * 2 * n_bytes)
    kernels.call(packed.find(format_).repack, rows, 3, out)
    steps = out.reshape(n_k_blocks, 2 * n_bytes)[:, :n_bytes]
    assert np.array_equal(unpacked(steps, packed.find(format_)), format_.unpack(raw))


@pytest.mark.parametrize("n_tokens", [1, 4, 7, 12, 13, 31])
@pytest.mark.parametrize("shape", [(1, 100, 512), (3, 64, 1280), (1, 33, 256), (2, 5, 256)])
@pytest.mark.parametrize("name", NAMES)
def test_multiply(pool, name, shape, n_tokens, monkeypatch):
    monkeypatch.setattr(packed, "tokens_from", lambda *formats: 1)
    rng = np.random.default_rng(n_tokens)
    weight, values = kernels.random_weight(name, shape, rng)
    x = rng.standard_normal((n_tokens, shape[0], shape[2])).astype(np.float32)
    seen = kernels.rounded(x, weight.format).astype(np.float64)
    want = np.einsum("grc,tgc->tgr", values, seen)
    # Float32 rounding of products and sums: a few units of 2^-24 of the sum of the terms' magnitudes.
    magnitude = np.einsum("grc,tgc->tgr", np.abs(values), np.abs(seen))
    assert np.all(np.abs(kernels.multiply(pool, weight, x) - want) <= 2**-21 * magnitude)


@pytest.mark.parametrize("name", NAMES)
def test_integer_part_is_exact(pool, name):
    """Columns of one group and activations of scale 1: a product is one float32 rounding away from the integers'."""
    block = registry.get(name).block
    weight, values = kernels.random_weight(name, (1, 40, block), np.random.default_rng(1))
    x = np.zeros((9, 1, block), np.float32)
    x[:, 0, 32:48] = np.random.default_rng(2).integers(-127, 128, (9, 16)) if block > 32 else 0
    x[:, 0, :16] = np.random.default_rng(2).integers(-127, 128, (9, 16)) if block == 32 else 0
    x[..., 0 if block == 32 else 32] = 127
    want = np.einsum("grc,tgc->tgr", values, x.astype(np.float64))
    magnitude = np.einsum("grc,tgc->tgr", np.abs(values), np.abs(x))
    # The scales' product, the product and the minimum's are each rounded once.
    assert np.all(np.abs(kernels.multiply(pool, weight, x) - want) <= 3 * 2**-24 * magnitude)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_the_largest_sums_are_exact(pool, name, sign):
    """All columns of a group at 127: sums as far from 0 as they get, on both sides of where they start."""
    block = registry.get(name).block
    weight, values = kernels.random_weight(name, (1, 64, block), np.random.default_rng(3))
    x = np.zeros((9, 1, block), np.float32)
    x[..., -32:] = sign * 127
    want = np.einsum("grc,tgc->tgr", values, x.astype(np.float64))
    magnitude = np.einsum("grc,tgc->tgr", np.abs(values), np.abs(x))
    # As above. Of small values behind an offset or a minimum the error is one of the larger numbers they are made of.
    largest = 32 * 127 * np.abs(values).max(-1)
    assert np.all(np.abs(kernels.multiply(pool, weight, x) - want) <= 2**-23 * (magnitude + largest))


def test_where_sums_start_takes_nothing_from_them():
    """A scale is a float16 times a number of up to 7 bits; what it makes of the excess must not be rounded."""
    significands = np.arange(1024, 2048, dtype=np.float32)[:, None]
    scales = significands * np.arange(-128, 128, dtype=np.float32)
    excess = scales * np.float32(BIAS_FLOAT)
    assert np.array_equal(excess.astype(np.float64), scales.astype(np.float64) * BIAS_FLOAT)
    sums = np.arange(-255 * 127 * 32, 255 * 127 * 32, 997, dtype=np.int32)
    assert np.array_equal((BIAS + sums).view(np.float32) - np.float32(BIAS_FLOAT), sums)


def test_one_worker_gives_the_same_bits(pool):
    rng = np.random.default_rng(1)
    weight, _ = kernels.random_weight(NAMES[0], (2, 300, 512), rng)
    x = rng.standard_normal((20, 2, 512)).astype(np.float32)
    single = Pool(1)
    assert np.array_equal(kernels.multiply(pool, weight, x), kernels.multiply(single, weight, x))
    single.close()


def test_nan_reaches_its_row_only(pool):
    weight, _ = kernels.random_weight("Q4_K", (1, 40, 512), np.random.default_rng(4))
    weight.owner[weight.row_bytes * 7 : weight.row_bytes * 7 + 2] = 0xFF  # d
    out = kernels.multiply(pool, weight, np.ones((8, 1, 512), np.float32))
    assert np.array_equal(np.isnan(out[3, 0]), np.arange(40) == 7)


@pytest.mark.parametrize("n_tokens", range(1, 40))
def test_all_token_blocks_but_the_last_are_full(n_tokens):
    blocks = {packed.token_block.py_func(i, n_tokens) for i in range(n_tokens)}
    assert sorted(i for first, size in blocks for i in range(first, first + size)) == list(range(n_tokens))
    assert [size for _, size in sorted(blocks)[:-1]] == [packed.TOKENS] * ((n_tokens - 1) // packed.TOKENS)


def test_float_formats_have_no_panels():
    assert all(packed.find(registry.get(name)) is None for name in ("F32", "F16", "BF16"))


def test_repacking_is_compiled_at_no_level_below_its_own(monkeypatch):
    """LLVM would abort the process."""
    monkeypatch.setattr(isa, "has", lambda level: level == "generic")
    format_ = registry.get(NAMES[0])
    assert packed.find(format_) is None
    repack = format_.panels.repack
    with pytest.raises(QuantError, match="needs avx2"):
        _ = kernel(repack.signature, repack.level)(repack.function).address
