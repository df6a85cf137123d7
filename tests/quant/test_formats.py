"""Every block format: layout and kernels against gguf's dequantize and libggml's dot products."""

import itertools

import ggml
import gguf
import kernels
import numpy as np
import pytest
from kernels import COLS, any_bytes, oracle, same_bits

from quant.errors import QuantError
from quant.formats import registry
from quant.gemv import activations, plain
from quant.simd.ints import CRUMBS_IN_PLACE
from quant.simd.permutes import CAN_PERMUTE

pytestmark = pytest.mark.levels


@pytest.mark.parametrize("name", registry.NAMES)
def test_sizes_are_ggmls(name):
    format_ = registry.get(name)
    assert (format_.block, format_.block_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", (*registry.NAMES, *registry.INTERLEAVED, *registry.WIDENED))
def test_the_registry_says_what_a_format_has(name):
    """So that nobody has to import the formats to ask."""
    format_ = registry.get(name)
    assert format_.name == name
    assert (format_.quantize is not None) == (name in registry.QUANTIZABLE)
    assert (format_.rows > 1) == (format_.expand is None) == (name not in registry.NAMES)
    assert (format_.widen is not None) == (name in registry.WIDENED)


@pytest.mark.parametrize("name", registry.NAMES)
def test_unpack_is_bit_equal_to_gguf(name):
    raw = any_bytes(name, np.random.default_rng(1))
    with np.errstate(all="ignore"):
        assert same_bits(registry.get(name).unpack(raw), oracle(name, raw))


@pytest.mark.parametrize("name", registry.NAMES)
def test_expand_is_bit_equal_to_gguf(name):
    raw = any_bytes(name, np.random.default_rng(2))
    out = np.empty((len(raw), COLS), np.float32)
    format_ = registry.get(name)
    kernels.call(format_.expand, raw, out.size // format_.block, out)
    assert same_bits(out, oracle(name, raw))


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("name", registry.NAMES)
def test_gemv_is_the_product_with_rounded_activations(name, rows):
    rng = np.random.default_rng(3)
    format_ = registry.get(name)
    raw = kernels.random_blocks(name, (rows, COLS), rng)
    x = rng.standard_normal(COLS).astype(np.float32) * 3
    out = np.empty(rows, np.float32)
    kernels.call(format_.gemv, raw, rows, COLS, kernels.record(x, format_), out)
    weights, x = oracle(name, raw).astype(np.float64), kernels.rounded(x, format_).astype(np.float64)
    # The integers are exact; what is left is float32 rounding of a few dozen scaled sums, each below 2^-24 of the
    # magnitudes summed. 8-bit integers in place of the true ones would show as 2^-8.
    assert np.all(np.abs(out - weights @ x) <= 2**-20 * (np.abs(weights) @ np.abs(x)))


@pytest.mark.parametrize("n_tokens", range(1, plain.MAX_BATCH + 1))
@pytest.mark.parametrize("name", registry.NAMES)
def test_gemv_batch_is_the_product_for_each_token(name, n_tokens):
    rng = np.random.default_rng(n_tokens)
    format_ = registry.get(name)
    raw = kernels.random_blocks(name, (5, COLS), rng)
    x = rng.standard_normal((n_tokens, COLS)).astype(np.float32) * 3
    out = np.full((n_tokens, 8), np.nan, np.float32)
    records = [kernels.record(row, format_) for row in x]
    addresses, outs = (np.array([a.ctypes.data for a in arrays], np.int64) for arrays in (records, out))
    kernels.call(format_.gemv_batch, raw, 5, COLS, addresses, outs, 8, n_tokens)
    weights, x = oracle(name, raw).astype(np.float64), kernels.rounded(x, format_).astype(np.float64)
    assert np.all(np.abs(out[:, 2:7] - x @ weights.T) <= 2**-20 * (np.abs(x) @ np.abs(weights.T)))  # as above
    assert np.isnan(out[:, [0, 1, 7]]).all()


@pytest.mark.parametrize("name", registry.NAMES)
def test_gemv_batch_gives_each_token_gemvs_bits(name):
    """A token's result does not depend on which others it is computed with."""
    format_, rng = registry.get(name), np.random.default_rng(11)
    lengths = {1: [1, 17, 33, 48, 100], 32: [32, 96, 256, 576, 1408], 64: [64, 320], 128: [128, 640], 256: [256, 512]}
    for n_cols in [*lengths[format_.block], COLS]:
        raw = np.ascontiguousarray(kernels.random_blocks(name, (5, n_cols), rng))
        x = rng.standard_normal((plain.MAX_BATCH, n_cols)).astype(np.float32) * 3
        records, single = [kernels.record(row, format_) for row in x], np.empty((plain.MAX_BATCH, 5), np.float32)
        for record, out in zip(records, single, strict=True):
            kernels.call(format_.gemv, raw, 5, n_cols, record, out)
        for n_tokens in range(1, plain.MAX_BATCH + 1):
            few = np.empty((n_tokens, 5), np.float32)
            addresses, outs = (np.array([a.ctypes.data for a in arrays], np.int64) for arrays in (records, few))
            kernels.call(format_.gemv_batch, raw, 5, n_cols, addresses, outs, 0, n_tokens)
            assert np.array_equal(few, single[:n_tokens])


@pytest.mark.parametrize("n_blocks", [1, 3, 8, 18, 44])
@pytest.mark.parametrize("name", [name for name in registry.NAMES if 1 < registry.get(name).block < 256])
def test_rows_that_end_in_single_blocks(name, n_blocks):
    rng = np.random.default_rng(n_blocks)
    format_ = registry.get(name)
    n_cols = n_blocks * format_.block
    raw = kernels.random_blocks(name, (3, n_cols), rng)
    x = rng.standard_normal(n_cols).astype(np.float32)
    single, few = np.empty(3, np.float32), np.empty((2, 3), np.float32)
    record = kernels.record(x, format_)
    kernels.call(format_.gemv, raw, 3, n_cols, record, single)
    records, outs = np.array([record.ctypes.data] * 2), few.ctypes.data + np.arange(2) * 12
    kernels.call(format_.gemv_batch, raw, 3, n_cols, records, outs, 0, 2)
    weights, x = oracle(name, raw).astype(np.float64), kernels.rounded(x, format_).astype(np.float64)
    for out in (single, *few):
        assert np.all(np.abs(out - weights @ x) <= 2**-20 * (np.abs(weights) @ np.abs(x)))  # as above


@pytest.mark.parametrize("name", [name for name in registry.NAMES if registry.get(name).integer])
def test_products_are_exact_at_the_extremes_of_the_integers(name):
    """All bits of the quants set or clear against activations of one sign: no 16-bit sum may saturate."""
    format_ = registry.get(name)
    for fill, sign in itertools.product((0, 255), (-1, 1)):
        raw = kernels.random_blocks(name, (2, COLS), np.random.default_rng(0))
        blocks = raw.reshape(-1, format_.block_bytes)
        scales = blocks.copy()
        blocks[:] = fill
        for at in kernels.scales_of(format_):
            blocks[:, at] = scales[:, at]
        x = np.full(COLS, sign * 3, np.float32)
        out = np.empty(2, np.float32)
        kernels.call(format_.gemv, raw, 2, COLS, kernels.record(x, format_), out)
        weights, x = oracle(name, raw).astype(np.float64), kernels.rounded(x, format_).astype(np.float64)
        assert np.all(np.abs(out - weights @ x) <= 2**-20 * (np.abs(weights) @ np.abs(x)))  # as above


@pytest.mark.parametrize("name", [name for name in registry.NAMES if registry.get(name).integer])
def test_gemv_is_as_close_to_the_truth_as_libggmls_dot(name):
    rng = np.random.default_rng(4)
    format_ = registry.get(name)
    raw = kernels.random_blocks(name, (64, COLS), rng)
    x = rng.standard_normal(COLS).astype(np.float32) * np.exp(rng.standard_normal(COLS)).astype(np.float32)
    out = np.empty(len(raw), np.float32)
    kernels.call(format_.gemv, raw, len(raw), COLS, kernels.record(x, format_), out)
    exact = oracle(name, raw).astype(np.float64) @ x
    kind = gguf.GGMLQuantizationType[name]
    quantized = ggml.quantize_activations(x, ggml.activation_type(kind))
    theirs = np.array([ggml.vec_dot(kind, row, quantized, COLS) for row in raw])
    ours_rms, theirs_rms = (np.sqrt(np.mean((values - exact) ** 2)) for values in (out, theirs))
    assert ours_rms <= 1.1 * theirs_rms  # same number of bits, a scale at least as fine; 64 samples scatter by a few %


def test_float_rows_of_any_length():
    rng = np.random.default_rng(5)
    for name in ("F32", "F16", "BF16"):
        format_ = registry.get(name)
        for n_cols in (1, 2, 3, 15, 16, 17, 31, 33, 100, 200):
            raw = np.ascontiguousarray(kernels.random_blocks(name, (3, n_cols), rng))
            x = rng.standard_normal(n_cols).astype(np.float32)
            out = np.empty(3, np.float32)
            record = kernels.record(x, format_)
            kernels.call(format_.gemv, raw, 3, n_cols, record, out)
            want = oracle(name, raw).reshape(3, n_cols).astype(np.float64) @ x
            np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)  # float32 sums of up to 100 terms near 1


def test_half_scales_convert_exactly():
    """All 65,536 bit patterns of a 16-bit float through the F16 kernel."""
    bits = np.arange(65536, dtype=np.uint16)
    out = np.empty(bits.size, np.float32)
    kernels.call(registry.get("F16").expand, bits, bits.size, out)
    assert same_bits(out, bits.view(np.float16).astype(np.float32))


def check_packed_fields(step, q, d):
    """A k-block from the eighths on."""
    eights, sums = q.reshape(8, 4, 8), q.reshape(8, 2, 16).sum(2, dtype=np.int32)
    assert np.array_equal(step[activations.EIGHTHS :][:256].view(np.int8), eights.swapaxes(0, 1).ravel())
    factors = 4.0 ** (np.arange(8) % 4) if CRUMBS_IN_PLACE else np.ones(8)
    crumb_scales, starts = (step[at:][:64].reshape(8, 8) for at in (activations.CRUMB_SCALES, activations.CRUMB_STARTS))
    assert np.array_equal(crumb_scales.view(np.float32), np.repeat(d / factors, 2).astype(np.float32).reshape(8, 2))
    assert np.array_equal(starts.view(np.int32), np.stack([-sums.sum(1) * factors, 0 * factors], 1))
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    assert np.array_equal(step[activations.PACKED_SCALES :][:32].view(np.float32), d[order])
    assert np.array_equal(step[activations.PACKED_SUMS :][:32].view(np.int16), sums[order].ravel())
    assert np.array_equal(step[activations.SPLIT :][:256].view(np.int8), q.reshape(4, 4, 2, 8).swapaxes(1, 2).ravel())
    order = [*order, *(8 + i for i in order)]
    assert np.array_equal(step[activations.SPLIT_SCALES :][:64].view(np.float32), np.repeat(d, 2)[order])
    assert np.array_equal(step[activations.SPLIT_SUMS :][:64].view(np.float32), sums.ravel()[order])


def test_activation_record():
    rng = np.random.default_rng(6)
    x = rng.standard_normal(256).astype(np.float32)
    x[32:64] = 0
    x[64:96] = 1e-30
    x[100] = 1e6
    record = kernels.record(x, registry.get("Q4_0"))
    q, d = activations.q8_ref(x)
    assert np.array_equal(record[1024:1280].view(np.int8), q)
    assert np.array_equal(record[1280:1312].view(np.float32), d)
    np.testing.assert_array_equal(record[1312:1344].view(np.float32), d * q.reshape(8, 32).sum(1, dtype=np.float32))
    step = record[activations.k_blocks_at.py_func(256) :][: activations.K_BLOCK_BYTES]
    groups, floats = q.reshape(8, 32), step[activations.SCALES : activations.IN_ORDER].view(np.float32).reshape(4, 16)
    assert np.array_equal(step[activations.NIBBLES :][:256].view(np.int8), groups[[0, 2, 1, 3, 4, 6, 5, 7]].ravel())
    halves = groups.reshape(8, 2, 16)
    quarters = [halves[parity::2, half] for parity in range(2) for half in range(2)]
    assert np.array_equal(step[activations.QUARTERS :][:256].view(np.int8), np.ravel(quarters))
    assert np.array_equal(step[activations.IN_ORDER :][:256].view(np.int8), q)
    sums = groups.sum(1, dtype=np.float32)
    assert np.array_equal(floats[0], np.stack([d, d * sums], -1).ravel())
    assert np.array_equal(floats[1], np.stack([sums, 0 * sums], -1).ravel())
    assert np.array_equal(floats[2], np.repeat(d, 2).reshape(4, 4).T.ravel())
    assert np.array_equal(floats[3], halves.sum(2, dtype=np.float32).reshape(4, 4).T.ravel())
    check_packed_fields(step, q, d)
    if CAN_PERMUTE:
        assert np.array_equal(step[activations.EVERY_FOURTH :][:256].view(np.int8), q.reshape(64, 4).T.ravel())
        starts = step[activations.STARTS :][:64].view(np.int32)
        assert np.array_equal(starts, -128 * q.reshape(16, 16).sum(1, dtype=np.int32))
        assert np.array_equal(step[activations.SCALES_OF_16 :][:64].view(np.float32), np.repeat(d, 2))
        eighths = np.repeat(q.reshape(32, 8).T, 2, axis=0)
        assert np.array_equal(step[activations.EVERY_EIGHTH :][:512].view(np.int8), eighths.ravel())
        starts = step[activations.STARTS_32 :][:64].view(np.int32)
        assert np.array_equal(starts, np.tile(-128 * groups.sum(1, dtype=np.int32), 2))
        assert np.array_equal(step[activations.SCALES_OF_32 :][:64].view(np.float32), np.tile(d, 2))
    np.testing.assert_array_equal(record[:1024].view(np.float32), kernels.rounded(x, registry.get("Q4_0")))
    assert np.array_equal(kernels.record(x, registry.get("F32"))[:1024].view(np.float32), x)


def test_rows_are_whole_blocks():
    with pytest.raises(QuantError, match="Q4_K rows are multiples of 256 weights; found 300"):
        registry.get("Q4_K").row_bytes(300)


def test_unknown_type():
    with pytest.raises(QuantError, match="no kernels for type Q8_K"):
        registry.get("Q8_K")
