"""Attention on the device: its kernels beside float64, the module beside the CPU's.

Letters: T new tokens, S cached ones, H heads, C kv_lora_rank, R qk_rope_head_dim, D hidden_size.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny_models
import torch
from cases import slow_but
from gpu_device import DEVICE, cut

from localrun.cpu.weights import LayerWeights
from localrun.gguf.file import open_gguf
from localrun.models import config as models
from localrun.models.config import Config
from localrun.models.reader import read_config
from localrun.network import attention as cpu
from localrun.network.cache import Cache
from localrun.network.rope import Rope
from quant.threads.pool import Pool

pytest.importorskip("triton", reason="localrun.gpu needs Triton")

from localrun.gpu.attention import fused, grouped, latent
from localrun.gpu.attention.flash_decoding import attend
from localrun.gpu.attention.latent import LatentAttention
from localrun.gpu.attention.turns import Turns
from localrun.gpu.caches.cache import new_cache
from localrun.gpu.caches.latent import LatentCache
from localrun.gpu.caches.places import Places

CONFIG = Config(
    architecture="deepseek2", attention="mla", rope="pairs",
    hidden_size=8, intermediate_size=1, num_hidden_layers=2, num_attention_heads=3,
    vocab_size=1, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, qk_rope_head_dim=6,
    v_head_dim=4, kv_lora_rank=20, qk_nope_head_dim=5,
)  # fmt: skip
SCALE = 0.3
# float32 sums of some 10 blocks of 16 to 128 products: a few roundings of 2^-24.
EXACT = 1e-5
# float16 queries and weights: 2^-11 each of scores up to 6 and of results, less where many average out.
HALF = 4e-3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def filled(config: Config, length: int, bits: int, capacity: int | None = None) -> LatentCache:
    """Random rows in layer 1, NaN in all that no token has written."""
    cache = new_cache(config, capacity or length, DEVICE, bits)
    rows = random(length, config.kv_lora_rank + config.qk_rope_head_dim, seed=4)
    dtype = np.float32 if bits == 32 else np.float16
    tensor = rows.cpu().numpy().astype(dtype)
    cache.load({"0.0": np.full_like(tensor, np.nan), "1.0": tensor}, length)
    nan = 0x7F if bits == 8 else float("nan")
    cache.latents[:, length:], cache.rope_keys[:, length:] = nan, float("nan")
    if cache.scales is not None:
        cache.scales[:, length:] = float("nan")
    return cache


def places_of(caches: list[LatentCache], bits: int) -> Places:
    """A token of each."""
    positions = torch.tensor([cache.length for cache in caches], device=DEVICE)
    table = torch.from_numpy(np.stack([cache.addresses for cache in caches], 1)).to(DEVICE)
    return Places(positions, table, bits, 1 + int(positions.max()))


def reference(q_THW: torch.Tensor, rows_SW: torch.Tensor, n_latent: int, scale: float = SCALE) -> torch.Tensor:
    """float64 (T, H, C): each token sees itself, the last of S - T + t + 1 rows."""
    q_THW, rows_SW = q_THW.double(), rows_SW.double()
    n_before = len(rows_SW) - len(q_THW)
    outs = []
    for t, q_HW in enumerate(q_THW):
        seen_SW = rows_SW[: n_before + t + 1]
        outs.append(torch.softmax(scale * q_HW @ seen_SW.T, -1) @ seen_SW[:, :n_latent])
    return torch.stack(outs)


def attended(
    cache: LatentCache, config: Config, n_tokens: int, n_pieces: int, dtype: torch.dtype, sharp: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels give for the last n_tokens of a full cache, and the reference over the same rows."""
    length = cache.length
    q_latent = sharp * random(n_tokens, config.num_attention_heads, config.kv_lora_rank, seed=5)
    q_rope = sharp * random(n_tokens, config.num_attention_heads, config.qk_rope_head_dim, seed=6)
    rows_SW = torch.cat(cache.rows(1, 0, length, torch.float32), -1)
    want = reference(torch.cat([q_latent, q_rope], -1), rows_SW, config.kv_lora_rank)
    cache.truncate(length - n_tokens)  # as in a step: rows are written, the length is not yet advanced
    found = attend(q_latent, q_rope, cache, 1, config, SCALE, n_pieces, dtype)
    cache.length = length
    return found, want


def assert_close(found: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert found.dtype == torch.float32 and found.shape == want.shape
    assert float((found.double() - want.to(found.device)).abs().max() / want.abs().max()) < tolerance


SHAPES = {
    "odd": {},
    "one head": {"num_attention_heads": 1},
    "powers of two": {"num_attention_heads": 16, "kv_lora_rank": 32, "qk_rope_head_dim": 16},
    "two blocks of heads": {"num_attention_heads": 35},
    "wide": {"kv_lora_rank": 192, "qk_rope_head_dim": 32, "num_attention_heads": 8},
}


@pytest.mark.parametrize(
    ("shape", "bits", "dtype"),
    [(shape, 16, torch.float16) for shape in SHAPES]
    + [("odd", 16, torch.float32), ("odd", 32, torch.float32), ("wide", 8, torch.float16), ("odd", 8, torch.float32)],
)
def test_shapes_and_forms(shape: str, bits: int, dtype: torch.dtype) -> None:
    config = dataclasses.replace(CONFIG, **SHAPES[shape])
    cache = filled(config, 139, bits, 160)
    assert_close(*attended(cache, config, 2, 4, dtype), EXACT if dtype == torch.float32 else HALF)


@pytest.mark.parametrize(
    ("length", "n_tokens", "n_pieces"),
    [
        (1, 1, 4),  # itself alone
        (5, 5, 4),  # all new
        (16, 1, 1),
        (17, 5, 1),  # tokens on both sides of a block's edge
        (128, 1, 4),  # a whole piece
        (129, 2, 4),  # the second token is the first of the next piece
        (130, 5, 4),
        (256, 1, 2),
        (515, 3, 4),  # pieces longer than the shortest
        (140, 11, 9),  # more tokens than have all pieces
    ],
)
def test_edges_of_blocks_and_pieces(length: int, n_tokens: int, n_pieces: int) -> None:
    cache = filled(CONFIG, length, 32, length + 3)
    assert_close(*attended(cache, CONFIG, n_tokens, n_pieces, torch.float32), EXACT)


def test_a_token_s_result_does_not_depend_on_the_others() -> None:
    """To the bit: what is verified with drafts must be what would have come without."""
    length, n_tokens = 132, 5
    cache = filled(CONFIG, length, 16)
    q_latent, q_rope = random(n_tokens, 3, 20, seed=5), random(n_tokens, 3, 6, seed=6)
    cache.truncate(length - n_tokens)
    together = attend(q_latent, q_rope, cache, 1, CONFIG, SCALE, 4, torch.float16)
    for t in range(n_tokens):
        alone = attend(q_latent[t : t + 1], q_rope[t : t + 1], cache, 1, CONFIG, SCALE, 4, torch.float16)
        assert torch.equal(alone[0], together[t])
        cache.advance(1)


def test_chosen_rows() -> None:
    """Of a token that sees all of its choice, and one that sees less: what is behind does not count."""
    cache, top_k = filled(CONFIG, 150, 32), 140
    chosen = torch.full((2, top_k), 10**6, dtype=torch.int32)
    chosen[0], chosen[1, :140] = torch.arange(8, 148), torch.arange(149)[torch.arange(149) % 17 != 3][:140]
    q_latent, q_rope = random(2, 3, 20, seed=5), random(2, 3, 6, seed=6)
    rows_SW = torch.cat(cache.rows(1, 0, 150, torch.float32), -1)
    q_THW = torch.cat([q_latent, q_rope], -1)
    want = torch.cat([reference(q_THW[t : t + 1], rows_SW[chosen[t].long()], 20) for t in range(2)])
    cache.truncate(147)
    found = attend(q_latent, q_rope, cache, 1, CONFIG, SCALE, 4, torch.float32, chosen.to(DEVICE))
    assert_close(found, want, EXACT)
    cache.truncate(3)  # of 4 and 5 rows
    want = torch.cat([reference(q_THW[t : t + 1], rows_SW[chosen[t, : 4 + t].long()], 20) for t in range(2)])
    found = attend(q_latent, q_rope, cache, 1, CONFIG, SCALE, 4, torch.float32, chosen.to(DEVICE))
    assert_close(found, want, EXACT)


@pytest.mark.parametrize("bits", [16, pytest.param(8, marks=pytest.mark.slow)])
def test_tokens_of_several_caches(bits: int) -> None:
    """Each has the bits that it has alone: of caches of other lengths, with room for others."""
    caches = [filled(CONFIG, length, bits, capacity) for length, capacity in ((132, 140), (1, 5), (17, 17))]
    q_latent, q_rope = random(3, 3, 20, seed=5), random(3, 3, 6, seed=6)
    alone = []
    for t, cache in enumerate(caches):
        cache.truncate(cache.length - 1)
        alone.append(attend(q_latent[t : t + 1], q_rope[t : t + 1], cache, 1, CONFIG, SCALE, 4, torch.float16)[0])
    together = attend(q_latent, q_rope, places_of(caches, bits), 1, CONFIG, SCALE, 4, torch.float16)
    assert torch.equal(together, torch.stack(alone)) and not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    ("sharp", "dtype", "tolerance"),
    [
        (0.0, torch.float16, HALF),
        (30.0, torch.float32, 1e-3),  # scores of some 100, rounded by 2^-24 of it a few times, move weights by 1e-4
        (1e6, torch.float16, None),  # beyond float16's largest number; rounding alone decides which row is best
    ],
)
def test_flat_and_sharp(sharp: float, dtype: torch.dtype, tolerance: float | None) -> None:
    found, want = attended(filled(CONFIG, 150, 16), CONFIG, 2, 4, dtype, sharp)
    assert found.isfinite().all()
    if tolerance is not None:
        assert_close(found, want, tolerance)


def test_many_small_weights_count() -> None:
    """One row with a score of 0, the others with -14: each 8e-7 of it, less than float16's smallest normal number."""
    config = dataclasses.replace(CONFIG, num_attention_heads=1)
    cache = new_cache(config, 2048, DEVICE)
    cache.latents.zero_(), cache.rope_keys.zero_()
    cache.latents[1, 1:, 0], cache.latents[1, 1:, 1] = -14.0, 1000.0
    cache.length = 2047
    q_latent = torch.zeros(1, 1, 20, device=DEVICE)
    q_latent[..., 0] = 1.0
    found = attend(q_latent, torch.zeros(1, 1, 6, device=DEVICE), cache, 1, config, 1.0, 1, torch.float16)
    weight = float(np.exp(-14.0))
    # 2^12 times e^-14 has 11 bits in float16, but for the last few: 2^-9 of it.
    assert found[0, 0, 1].item() == pytest.approx(1000 * 2047 * weight / (1 + 2047 * weight), rel=2**-9)


@pytest.mark.parametrize(("c", "error"), [(512, 0.02)])
def test_the_8_bit_cache_rounds_and_nothing_else(c: int, error: float) -> None:
    """Beside the 16-bit cache of the same rows.

    E4M3 rounds each latent by up to 2^-4 of it, 0.026 of it root mean square. A score is a sum of C + R products of
    which C have errors that are independent: its error is 0.026 * |q| |k| * scale / sqrt(C), here 0.026 * 0.3 * 22 =
    0.17 at scores of 7, and weights change by as much, in both directions; the mixed latents' own errors average out.
    """
    config = dataclasses.replace(CONFIG, kv_lora_rank=c)
    scale, found = 1 / 16, {}
    q_latent, q_rope = random(1, 3, c, seed=5), random(1, 3, 6, seed=6)
    for bits in (16, 8):
        cache = filled(config, 200, bits)
        cache.truncate(199)
        found[bits] = attend(q_latent, q_rope, cache, 1, config, scale, 4, torch.float32)
    difference = (found[8] - found[16]).norm() / found[16].norm()
    assert error / 4 < difference < 3 * error


# --------------------------------------------------------------------------------------------------------- the module


class OnDevice:
    """The CPU's modules under their names, with tensors moved to the device and back."""

    def __init__(self, weights: LayerWeights):
        self.weights = weights

    def __getattr__(self, name: str):
        def get(*args):
            found = getattr(self.weights, name)(*args)
            if isinstance(found, torch.Tensor):
                return found.to(DEVICE)
            return tuple(map(_Moved, found)) if isinstance(found, tuple) else found if name == "has" else _Moved(found)

        return get if name != "has" else self.weights.has


class _Moved:
    def __init__(self, module: object):
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x.cpu()).to(DEVICE)

    def transposed(self, x: torch.Tensor) -> torch.Tensor:
        return self.module.transposed(x.cpu()).to(DEVICE)

    def dense(self, first: int, count: int) -> torch.Tensor:
        return self.module.dense(first, count).to(DEVICE)


def modules(pool: Pool, variant: str) -> tuple[LatentAttention, cpu.LatentAttention]:
    file = open_gguf(tiny_models.shared(variant))
    config = read_config(file)
    weights, rope = LayerWeights(file, pool), Rope(config)
    return (
        LatentAttention(config, OnDevice(weights), 0, Turns(rope, DEVICE)),
        cpu.LatentAttention(config, weights, 0, rope),
    )


def by_chunks(module, x_TD: torch.Tensor, chunks: list[int], cache: Cache | LatentCache) -> torch.Tensor:
    outs = []
    for chunk in x_TD.split(chunks):
        outs.append(module(chunk, cache).cpu())
        cache.advance(len(chunk))
    return torch.cat(outs)


N_TOKENS = 15
CASES = [("v3", chunks) for chunks in ([15], [11, 4], [1, 2, 12])]
CASES += [(variant, [8, 7]) for variant in ("v2-lite", "v3-odd", "v3-legacy-kv-b", "yarn-no-log-multiplier")]


@pytest.mark.parametrize("absorbing", [True, False], ids=["absorbed", "decompressed"])
@pytest.mark.parametrize(
    ("variant", "chunks"), slow_but(CASES, [("v3", [1, 2, 12]), ("v2-lite", [8, 7]), ("v3-legacy-kv-b", [8, 7])])
)
def test_module(pool: Pool, variant: str, chunks: list[int], absorbing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompressed: the earlier context 4 tokens at a time, some heads at a time."""
    device, host = modules(pool, variant)
    c = device.config
    monkeypatch.setattr(device, "_absorbing_is_cheaper", lambda n_tokens: absorbing)
    monkeypatch.setattr(fused, "CONTEXT", 4)
    monkeypatch.setattr(latent, "GPU_ATTENTION_WORK_BYTES", 100_000)
    x_TD = random(N_TOKENS, c.hidden_size).cpu()
    host_cache = Cache([c.rows(0)], N_TOKENS, np.float32)
    device_cache = new_cache(c, N_TOKENS, DEVICE, bits=32, n_layers=1)
    found = by_chunks(device, x_TD.to(DEVICE), chunks, device_cache)
    # Both are float32 in other orders: sums of up to 288 products, three deep.
    assert_close(found, by_chunks(host, x_TD, chunks, host_cache), EXACT)
    rows = torch.from_numpy(device_cache.save()["0.0"])
    assert_close(rows, torch.from_numpy(host_cache.save()["0.0"]), EXACT)


GROUPED_CASES = [("glm4moe", 0, [11, 4]), ("minimax-m2", 0, [8, 7]), ("mixtral", 0, [15])]
GROUPED_CASES += [("gpt-oss", 1, [11, 4]), ("gpt-oss", 0, [15]), ("gpt-oss", 0, [1, 9, 5])]  # a window in layer 0


@pytest.mark.parametrize("kernel", [True, False], ids=["by the kernel", "by torch"])
@pytest.mark.parametrize(("variant", "layer", "chunks"), slow_but(GROUPED_CASES, GROUPED_CASES[:1]))
def test_grouped_module(
    pool: Pool, variant: str, layer: int, chunks: list[int], kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch: the earlier context 4 tokens at a time, some groups at a time. Rows of others are NaN."""
    monkeypatch.setattr(grouped, "FEW_TOKENS", N_TOKENS if kernel else 0)
    monkeypatch.setattr(fused, "CONTEXT", 4)
    monkeypatch.setattr(grouped, "GPU_ATTENTION_WORK_BYTES", 100_000)
    check_grouped(pool, variant, layer, chunks)


@pytest.mark.parametrize(
    ("window", "chunks"),
    slow_but([(5, [9, 1, 3]), (5, [13]), (5, [1] * 13), (12, [3, 10]), (20, [13])], [(5, [9, 1, 3])]),
)
def test_windows(pool: Pool, window: int, chunks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With sinks. Rows go round: 3 more than a window are kept, so that 4 tokens at a time have what they see."""
    monkeypatch.setattr(models, "WINDOW_SPARE", 3)
    heads = {"num_attention_heads": 4, "head_dim": 16, "qk_rope_head_dim": 16, "hidden_size": 64}
    variant = tiny_models.gpt_oss(num_hidden_layers=2, sliding_window=window, vocab_size=64, **heads)
    check_grouped(pool, variant, 0, chunks)


def check_grouped(pool: Pool, variant: tiny_models.Variant, layer: int, chunks: list[int]) -> None:
    """A layer's results and rows beside the CPU's."""
    file = open_gguf(tiny_models.shared(variant))
    c, n_tokens = read_config(file), sum(chunks)
    weights, rope = LayerWeights(file, pool), Rope(c)
    device = grouped.GroupedQueryAttention(c, OnDevice(weights), layer, Turns(rope, DEVICE))
    x_TD = random(n_tokens, c.hidden_size).cpu()
    host_cache = Cache([c.rows(i) for i in range(layer + 1)], n_tokens, np.float32)
    device_cache = new_cache(c, n_tokens + 3, DEVICE, bits=32, n_layers=layer + 1)
    for rows in (*device_cache.keys, *device_cache.values):
        rows.fill_(float("nan"))
    found = by_chunks(device, x_TD.to(DEVICE), chunks, device_cache)
    host = cpu.GroupedQueryAttention(c, weights, layer, rope)
    # As in test_module.
    assert_close(found, by_chunks(host, x_TD, chunks, host_cache), EXACT)
    of_layer = {name: rows for name, rows in host_cache.save().items() if name.startswith(f"{layer}.")}
    n_rows = c.rows(layer)[0].count(n_tokens)
    for name, rows in of_layer.items():
        ours = device_cache.save()[name][-n_rows:]
        assert_close(torch.from_numpy(ours), torch.from_numpy(rows[-len(ours) :]), EXACT)
    again = new_cache(c, n_tokens, DEVICE, bits=32, n_layers=layer + 1)
    again.load(host_cache.save(), n_tokens)
    assert again.length == n_tokens and np.array_equal(again.save()[f"{layer}.1"], of_layer[f"{layer}.1"])


# Of "two pieces" the number of pieces alone is another one.
TILES = [("small", shape, bits) for shape in ("odd", "wide") for bits in (8, 16)]
TILES += [("16 heads", "two blocks of heads", bits) for bits in (8, 16)]


@pytest.mark.parametrize(("name", "shape", "bits"), slow_but(TILES, {("small", "odd", 16)}))
def test_tiles(name: str, shape: str, bits: int) -> None:
    config = dataclasses.replace(CONFIG, **SHAPES[shape])
    for dtype, tolerance in ((torch.float16, HALF), (torch.float32, EXACT)):
        with cut("attention", name):
            assert_close(*attended(filled(config, 139, bits, 160), config, 2, 4, dtype), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "16 heads"])
@pytest.mark.parametrize(("variant", "layer"), [("glm4moe", 0), ("gpt-oss", 0), ("gpt-oss", 1)])
def test_tiles_of_groups(pool: Pool, name: str, variant: str, layer: int) -> None:
    """With windows and sinks, and without."""
    with cut("attention", name):
        check_grouped(pool, variant, layer, [1, 9, 5])


@pytest.mark.parametrize("bits", [16, 8])
def test_module_over_rounded_rows(pool: Pool, bits: int) -> None:
    """Both ways read the same rows: few tokens as many."""
    device, host = modules(pool, "v3")
    c, x_TD = device.config, random(N_TOKENS, device.config.hidden_size)
    cache = new_cache(c, N_TOKENS, DEVICE, bits, n_layers=1)
    few = by_chunks(device, x_TD, [11, 4], cache)
    cache.truncate(11)
    device._absorbing_is_cheaper = lambda n_tokens: False
    many = by_chunks(device, x_TD[11:], [4], cache)
    assert_close(many, few[11:], EXACT if DEVICE.type == "cpu" else HALF)
    host_cache = Cache([c.rows(0)], N_TOKENS, np.float16)
    want = by_chunks(host, x_TD.cpu(), [N_TOKENS], host_cache)
    # 16 bits: rows differ where sums of other orders fall to other sides, 2^-11. 8 bits: as its own test says, and
    # here a value's own rounding shows in the first tokens, which see few others: up to 2^-4.
    assert_close(few, want, {16: 1e-3 if DEVICE.type == "cpu" else HALF, 8: 2**-4}[bits])


def test_work_memory_does_not_grow_with_the_context(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    device, _ = modules(pool, "v3")
    c = device.config
    sizes: list[tuple[int, int]] = []
    right = fused._fused_attention
    monkeypatch.setattr(
        fused, "_fused_attention", lambda q, k, v, *rest: sizes.append(k.shape[:2]) or right(q, k, v, *rest)
    )
    monkeypatch.setattr(fused, "CONTEXT", 64)
    bytes_per_head = (4 * 3 * 64 + 3 * 4 * 8) * 96  # V3's miniature: 64 + 32 values a key
    monkeypatch.setattr(latent, "GPU_ATTENTION_WORK_BYTES", 3 * bytes_per_head)
    device._absorbing_is_cheaper = lambda n_tokens: False
    cache = filled(dataclasses.replace(c, num_hidden_layers=2), 500, 16, 508)
    device.index = 1
    device(random(8, c.hidden_size), cache)
    assert {n for n, _ in sizes} == {3, 2} and max(length for _, length in sizes) == 64
    assert sum(length for n, length in sizes if n == 3) == 2 * 508
