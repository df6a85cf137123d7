"""Formats with 16 rows interleaved: layout against gguf's values, products against float64 and the plain formats'."""

from __future__ import annotations

from contextlib import closing

import gguf
import kernels
import numpy as np
import pytest
from expert_cases import random_case, run
from kernels import COLS, any_bytes, oracle, same_bits
from packed_layout import unpacked
from programs import rows_by_step
from step_layers import SMALL, Layer

from localrun.gguf import types as tensor_types
from quant.decode.program import MOST_TOKENS, Program
from quant.decode.queries import latent_queries_phase
from quant.errors import QuantError
from quant.formats import interleave, registry
from quant.gemm import packed
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES
from quant.gemv import plain as gemv
from quant.matrix import QuantMatrix, quant_matrix
from quant.ops import linear
from quant.threads.pool import Pool, aligned_bytes

pytestmark = pytest.mark.levels

NAMES = registry.INTERLEAVED
WITH_WIDENED = (*NAMES, *registry.WIDENED)


def plain(name: str) -> str:
    return name.removesuffix("_R16")


def interleaved(name: str, raw: np.ndarray) -> np.ndarray:
    return interleave.interleave(registry.get(name), np.ascontiguousarray(raw), *raw.shape)


def both_weights(
    name: str, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[QuantMatrix, QuantMatrix, np.ndarray]:
    """The same matrix plain and interleaved, and its values, float64."""
    weight, values = kernels.random_weight(plain(name), shape, rng)
    data = interleaved(name, weight.owner.reshape(-1, weight.row_bytes))
    return weight, quant_matrix(data.reshape(-1), registry.get(name), shape), values


# ---- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_types(name: str) -> None:
    """Sizes are the plain format's; the name is none of ggml's."""
    format_, kind = registry.get(name), gguf.GGMLQuantizationType[plain(name)]
    assert (format_.name, format_.rows, format_.block, format_.block_bytes) == (name, 16, *gguf.GGML_QUANT_SIZES[kind])
    assert not set(NAMES) & set(registry.NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_words_lie_side_by_side(name: str) -> None:
    """The layout of files: where some bytes of each field go, by the sizes that ggml documents."""
    fields = {  # of a plain block: first byte, bytes of a word, words
        "Q4_K_R16": [(0, 2, 1), (2, 2, 1), (4, 4, 3), (16, 4, 32)],
        "Q5_K_R16": [(0, 2, 1), (2, 2, 1), (4, 4, 3), (16, 4, 8), (48, 4, 32)],
        "Q6_K_R16": [(0, 4, 32), (128, 4, 16), (192, 1, 16), (208, 2, 1)],
    }[name]
    rows, size = 48, registry.get(name).block_bytes
    raw = np.random.default_rng(0).integers(0, 256, (rows, 5 * size), dtype=np.uint8)
    out = interleaved(name, raw).reshape(-1)
    for row, block in ((0, 0), (15, 4), (16, 1), (47, 3)):
        for first, word_bytes, n_words in fields:
            for word in {0, n_words // 2, n_words - 1}:
                at = row // 16 * 16 * 5 * size + 16 * size * block + 16 * first + word_bytes * (16 * word + row % 16)
                source = size * block + first + word_bytes * word
                assert np.array_equal(out[at : at + word_bytes], raw[row, source : source + word_bytes])


@pytest.mark.parametrize("name", WITH_WIDENED)
def test_unpack_is_bit_equal_to_gguf(name: str) -> None:
    raw = any_bytes(plain(name), np.random.default_rng(1))[:48]
    with np.errstate(all="ignore"):
        assert same_bits(registry.get(name).unpack(interleaved(name, raw)), oracle(plain(name), raw))
        several = np.stack([interleaved(name, raw), interleaved(name, raw[::-1])])
        assert same_bits(registry.get(name).unpack(several)[1], oracle(plain(name), raw[::-1]))


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_put_back(name: str) -> None:
    """Neither way depends on which rows are done together."""
    raw = any_bytes(plain(name), np.random.default_rng(2))[:48]
    data = interleaved(name, raw)
    assert not np.array_equal(data, raw)
    assert np.array_equal(interleave.deinterleave(registry.get(name), data, *raw.shape), raw)
    assert np.array_equal(interleaved(name, raw[16:32]), data[16:32])
    assert np.array_equal(interleave.deinterleave(registry.get(name), data[16:32], 16, raw.shape[1]), raw[16:32])
    assert interleaved(name, raw[:0]).shape == (0, raw.shape[1])


@pytest.mark.parametrize("name", registry.WIDENED)
def test_widened_rows_are_not_put_back(name: str) -> None:
    """Files hold none: what else is refused says so."""
    format_, row = registry.get(name), registry.get(plain(name)).block_bytes
    assert interleaved(name, np.zeros((16, row), np.uint8)).shape == (16, format_.block_bytes)
    with pytest.raises(QuantError, match=f"{name}: rows are not put back"):
        interleave.deinterleave(format_, np.zeros((16, format_.block_bytes), np.uint8), 16, format_.block_bytes)
    with pytest.raises(QuantError, match=f"{name}: 16 rows of {row + 1} contiguous bytes do not fit"):
        interleave.interleave(format_, np.zeros((16, row + 1), np.uint8), 16, row + 1)
    with pytest.raises(ValueError, match="is no type of files"):
        tensor_types.from_number(tensor_types.from_name(name))


def test_sizes_that_do_not_fit_are_refused() -> None:
    data = np.zeros((32, 288), np.uint8)
    with pytest.raises(QuantError, match="Q4_K_R16: 24 rows of 288 bytes are no multiples of 16 and 144"):
        interleave.interleave(registry.get("Q4_K_R16"), data[:24], 24, 288)
    with pytest.raises(QuantError, match="Q6_K_R16: 32 rows of 288 bytes are no multiples of 16 and 210"):
        interleave.interleave(registry.get("Q6_K_R16"), data, 32, 288)
    for wrong in (data[:16], data.view(np.int8), data[:, ::-1]):
        with pytest.raises(QuantError, match="Q4_K_R16: 32 rows of 288 contiguous bytes expected"):
            interleave.deinterleave(registry.get("Q4_K_R16"), wrong, 32, 288)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [16, 48])
@pytest.mark.parametrize("n_cols", [256, COLS])
@pytest.mark.parametrize("name", WITH_WIDENED)
def test_products_of_each_token(name: str, n_cols: int, rows: int) -> None:
    """Of one token by gemv, of 1 to 5 by gemv_batch: near the true ones, the same bits, and nothing beside them."""
    rng, format_ = np.random.default_rng(rows), registry.get(name)
    raw = kernels.random_blocks(plain(name), (rows, n_cols), rng)
    data = interleaved(name, raw)
    x = rng.standard_normal((gemv.MAX_BATCH, n_cols)).astype(np.float32) * 3
    records, single = [kernels.record(row, format_) for row in x], np.empty((len(x), rows), np.float32)
    for record, out in zip(records, single, strict=True):
        kernels.call(format_.gemv, data, rows, n_cols, record, out)
    weights, seen = oracle(plain(name), raw).astype(np.float64), kernels.rounded(x, format_).astype(np.float64)
    # The integers are exact; float32 rounding of a few dozen scaled sums, each below 2^-24 of the magnitudes summed.
    assert np.all(np.abs(single - seen @ weights.T) <= 2**-20 * (np.abs(seen) @ np.abs(weights.T)))
    for n_tokens in range(1, gemv.MAX_BATCH + 1):
        few = np.full((n_tokens, rows + 3), np.nan, np.float32)
        addresses, outs = (np.array([a.ctypes.data for a in arrays], np.int64) for arrays in (records, few))
        kernels.call(format_.gemv_batch, data, rows, n_cols, addresses, outs, 8, n_tokens)
        assert np.array_equal(few[:, 2:-1], single[:n_tokens])
        assert np.isnan(few[:, [0, 1, -1]]).all()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("fill", [0, 255])
@pytest.mark.parametrize("name", WITH_WIDENED)
def test_products_are_exact_at_the_extremes_of_the_integers(name: str, fill: int, sign: int) -> None:
    """All bits of the quants set or clear against activations of one sign: no 16-bit sum may saturate."""
    format_, rng = registry.get(name), np.random.default_rng(0)
    raw, of_file = kernels.random_blocks(plain(name), (16, COLS), rng), registry.get(plain(name))
    blocks, scales = raw.reshape(-1, of_file.block_bytes), raw.reshape(-1, of_file.block_bytes).copy()
    blocks[:] = fill
    for at in kernels.scales_of(of_file):
        blocks[:, at] = scales[:, at]
    x, out = np.full(COLS, sign * 3, np.float32), np.empty(16, np.float32)
    kernels.call(format_.gemv, interleaved(name, raw), 16, COLS, kernels.record(x, format_), out)
    weights, seen = oracle(plain(name), raw).astype(np.float64), kernels.rounded(x, format_).astype(np.float64)
    assert np.all(np.abs(out - weights @ seen) <= 2**-20 * (np.abs(weights) @ np.abs(seen)))  # as above


@pytest.mark.parametrize("name", WITH_WIDENED)
def test_nan_reaches_its_row_only(name: str) -> None:
    format_, of_file, rng = registry.get(name), registry.get(plain(name)), np.random.default_rng(0)
    raw = kernels.random_blocks(plain(name), (32, COLS), rng)
    raw[21].reshape(-1, of_file.block_bytes)[1, kernels.scales_of(of_file)[0]] = 0xFF  # of IQ1_M all, which d is in
    out = np.empty(32, np.float32)
    record = kernels.record(np.ones(COLS, np.float32), format_)
    kernels.call(format_.gemv, interleaved(name, raw), 32, COLS, record, out)
    assert np.array_equal(np.isnan(out), np.arange(32) == 21)


@pytest.mark.skipif(packed.find(registry.get("Q4_K")) is None, reason="no integer tile at this ISA level")
@pytest.mark.parametrize("name", WITH_WIDENED)
def test_repacked_blocks_are_the_weights(name: str) -> None:
    raw, format_ = (
        kernels.random_blocks(plain(name), (16, 768), np.random.default_rng(0)),
        packed.find(registry.get(name)),
    )
    data, out = interleaved(name, raw), aligned_bytes(24 * K_BLOCK_BYTES)
    kernels.call(format_.repack, np.full(16, data.ctypes.data), 3, out)
    assert np.array_equal(
        unpacked(out.reshape(24, K_BLOCK_BYTES)[:, : K_BLOCK_BYTES // 2], format_), oracle(plain(name), raw)
    )


# ---- jobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("shape", [(1, 16, 256), (3, 48, 1280), (1, 400, 512)])
@pytest.mark.parametrize("panels", [True, False], ids=["panels", "no panels"])
@pytest.mark.parametrize("name", WITH_WIDENED)
def test_multiply(
    pool: Pool, name: str, panels: bool, shape: tuple[int, ...], n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "tokens_from", lambda *formats: 1 if panels else 100)
    rng = np.random.default_rng(n_tokens)
    _, weight, values = both_weights(name, shape, rng)
    x = rng.standard_normal((n_tokens, shape[0], shape[2])).astype(np.float32)
    seen = kernels.rounded(x, weight.format).astype(np.float64)
    found, want = kernels.multiply(pool, weight, x), np.einsum("grc,tgc->tgr", values, seen)
    magnitude = np.einsum("grc,tgc->tgr", np.abs(values), np.abs(seen))
    assert np.all(np.abs(found - want) <= 2**-20 * magnitude)  # as above
    with closing(Pool(1)) as single:
        assert np.array_equal(kernels.multiply(single, weight, x), found)


@pytest.mark.parametrize("n_tokens", [1, 2, 4, 40])
@pytest.mark.parametrize("types", [("Q4_K", "Q4_K", "Q6_K"), ("Q5_K", "Q4_K", "Q5_K")])
@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1,), (2,)], ids=["all", "gate", "up", "down"])
def test_experts(pool: Pool, which: tuple[int, ...], types: tuple[str, ...], n_tokens: int) -> None:
    """As the plain experts, with all matrices interleaved or one of them."""
    rng, hidden, inner = np.random.default_rng(n_tokens), 256, 512
    shapes = (8, inner, hidden), (8, inner, hidden), (8, hidden, inner)
    pairs = [both_weights(f"{type_}_R16", shape, rng)[:2] for type_, shape in zip(types, shapes, strict=True)]
    x, ids, weights = random_case(n_tokens, hidden, rng)
    x /= np.sqrt(hidden)
    want = run(pool, [plain_ for plain_, _ in pairs], x, ids, weights)
    mixed = [pair[i in which] for i, pair in enumerate(pairs)]
    # A float32 rounding of what is inside may tip an 8-bit rounding of it: one step of 1/127 in one of 512 terms.
    assert np.abs(run(pool, mixed, x, ids, weights) - want).max() <= 2e-3 * np.abs(want).max()


def test_an_expert_of_many_tokens_among_others(pool: Pool) -> None:
    """On average too few for panels: the many go in passes over rows, 16 at a time at least."""
    rng, hidden, inner = np.random.default_rng(0), 768, 256
    shapes = (40, inner, hidden), (40, inner, hidden), (40, hidden, inner)
    pairs = [both_weights("Q4_K_R16", shape, rng)[:2] for shape in shapes]
    ids = np.stack([np.arange(1, 41, 1)[:37] % 40, *np.tile([0] + [-1] * 36, (24, 1))]).astype(np.int64)
    x = rng.standard_normal((len(ids), hidden)).astype(np.float32) / 28
    weights = np.ones(ids.shape, np.float32)
    want, found = (run(pool, [pair[i] for pair in pairs], x, ids, weights) for i in range(2))
    assert np.abs(found - want).max() <= 2e-3 * np.abs(want).max()  # as above


@pytest.mark.parametrize("residual", [False, True], ids=["instead", "added"])
@pytest.mark.parametrize("name", WITH_WIDENED)
def test_rows_of_a_step(name: str, residual: bool) -> None:
    """Beside a plain matrix, by any number of workers."""
    rng = np.random.default_rng(0)
    sizes = 1008, 48
    weights = [both_weights(name, (1, n_rows, 256), rng) for n_rows in sizes]
    x, second = rng.standard_normal((2, 256)).astype(np.float32)
    seen = kernels.rounded(x, registry.get(name)).astype(np.float64)
    answers = [
        rows_by_step([weights[0][1], weights[1][0], weights[1][1]], "plain", x, second, residual, n) for n in (1, 2, 7)
    ]
    for values, found in zip((weights[0][2], weights[1][2], weights[1][2]), answers[0], strict=True):
        magnitude = np.abs(values[0]) @ np.abs(seen) + 0.25
        assert np.all(np.abs(found - (values[0] @ seen + 0.25 * residual)) <= 2**-20 * magnitude)  # as above
    assert all(np.array_equal(a, b) for other in answers[1:] for a, b in zip(answers[0], other, strict=True))


@pytest.fixture(scope="module", params=[("gate", "up", "down", "shared down"), ("up",)], ids=["all", "up"])
def layer(request: pytest.FixtureRequest) -> Layer:
    """Experts of which some matrices are interleaved; `values` are still theirs."""
    found = Layer(("Q4_K", "Q4_K", "Q6_K", "Q4_K"), 512, 256, 256, SMALL)
    for part in request.param:
        weight = found.weights[part]
        name = f"{weight.format.name}_R16"
        data = interleaved(name, weight.owner.reshape(-1, weight.row_bytes)).reshape(-1)
        found.weights[part] = quant_matrix(data, registry.get(name), (weight.n_groups, weight.n_rows, weight.n_cols))
    return found


def test_experts_of_a_step(pool: Pool, layer: Layer) -> None:
    expected = layer.expected()
    assert np.abs(layer.run(pool) - expected).max() <= 2e-3 * np.abs(expected).max()  # as above


def test_a_steps_tokens_together_are_tokens_alone(pool: Pool, layer: Layer) -> None:
    alone = layer.run(pool)
    assert all(np.array_equal(layer.run(pool, together), alone) for together in range(2, MOST_TOKENS + 1))


def test_workers_do_not_change_a_steps_experts(layer: Layer) -> None:
    answers = []
    for n_workers in (1, 2, 5):
        with closing(Pool(n_workers)) as workers:
            answers.append(layer.run(workers))
    assert all(np.array_equal(answers[0], answer) for answer in answers[1:])


# ---- what cannot be done ---------------------------------------------------------------------------------------------


def test_rows_stay_together() -> None:
    _, weight, _ = both_weights("Q4_K_R16", (1, 48, 256), np.random.default_rng(0))
    assert weight.rows(16, 32).address == weight.address + 16 * 144
    for start, count in ((8, 16), (16, 8)):
        with pytest.raises(QuantError, match=f"Q4_K_R16 takes multiples of 16 rows; found {start} and {count}"):
            weight.rows(start, count)
    with pytest.raises(QuantError, match="Q4_K_R16 takes multiples of 16 rows; found 24"):
        quant_matrix(weight.owner[: 24 * 144], weight.format, (1, 24, 256))


def test_single_rows_cannot_be_read(pool: Pool) -> None:
    _, weight, _ = both_weights("Q4_K_R16", (1, 16, 256), np.random.default_rng(0))
    x, out = np.zeros(256, np.float32), np.zeros(256, np.float32)
    with pytest.raises(QuantError, match="Q4_K_R16: rows that are interleaved cannot be read one by one"):
        linear.multiply_transposed(pool, weight, x.ctypes.data, 1, out.ctypes.data)
    with pytest.raises(QuantError, match="Q4_K_R16: rows that are interleaved cannot be read one by one"):
        linear.expand_rows(pool, weight, np.zeros(1, np.int64), out.ctypes.data)
    with pytest.raises(QuantError, match="Q4_K_R16: rows that are interleaved cannot be read one by one"):
        Program(pool, weight, np.ones(1), 1.0, 1)
    with pytest.raises(QuantError, match="Q4_K_R16: rows that are interleaved cannot be read one by one"):
        latent_queries_phase(
            0, 0, 0, 0, weight, transposed=True, n_rope=64, query_width=320, scale=1.0, epsilon=1e-6, slot=0,
            row_bytes=640, in_bytes=False, is_scaled=False,
        )  # fmt: skip
