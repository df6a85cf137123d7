"""The latent cache on the device: its forms, its length there, and what it saves, beside the CPU's cache."""

from __future__ import annotations

import gpu_device
import numpy as np
import pytest
import torch
from gpu_device import DEVICE

from localrun.errors import ContextFullError, LocalrunError
from localrun.models.config import Config
from localrun.network.cache import Cache

pytest.importorskip("triton", reason="localrun.gpu needs Triton")

from localrun.gpu.caches.cache import new_cache
from localrun.gpu.caches.context import row_constants
from localrun.gpu.caches.latent import LatentCache, row_bytes
from localrun.gpu.caches.places import ENTRIES
from localrun.gpu.e4m3 import pack_e4m3

CONFIG = Config(
    architecture="deepseek2", attention="mla", rope="pairs",
    hidden_size=8, intermediate_size=1, num_hidden_layers=2, num_attention_heads=2,
    vocab_size=1, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, qk_rope_head_dim=6,
    v_head_dim=4, kv_lora_rank=10, qk_nope_head_dim=4,
)  # fmt: skip
BITS = [16, 8, 32]


def saved(length: int, dtype: type = np.float16, layers: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng(length)
    return {f"{layer}.0": random.standard_normal((length, 16)).astype(dtype) for layer in range(layers)}


def loaded(bits: int, length: int = 5) -> tuple[LatentCache, dict[str, np.ndarray]]:
    cache, tensors = new_cache(CONFIG, 8, DEVICE, bits), saved(length, np.float32 if bits == 32 else np.float16)
    cache.load(tensors, length)
    return cache, tensors


def test_its_length() -> None:
    cache = new_cache(CONFIG, 8, DEVICE)
    cache.advance(5)
    with pytest.raises(KeyboardInterrupt), cache.all_or_none():
        cache.advance(2)
        raise KeyboardInterrupt
    assert cache.length == 5
    cache.truncate(3)
    cache.truncate(9)  # no more than there is
    assert cache.length == 3
    with pytest.raises(ContextFullError):
        cache.check_room(6)
    cache.check_room(5)


@pytest.mark.parametrize("bits", BITS)
def test_where_kernels_find_it(bits: int) -> None:
    """The next tokens' positions, and addresses of both layers' rows: on the device, and for a table of several."""
    cache, _ = loaded(bits)
    places = cache.places(3)
    assert places.positions.tolist() == [5, 6, 7] and places.positions.device.type == DEVICE.type
    assert places.table[:, 0].tolist() == cache.addresses.tolist() and len(cache.addresses) == 2 * ENTRIES
    for layer in range(2):
        scales = 0 if cache.scales is None else cache.scales[layer].data_ptr()
        expected = [cache.latents[layer].data_ptr(), cache.rope_keys[layer].data_ptr(), scales, 8, 0]
        assert cache.addresses[ENTRIES * layer :][:ENTRIES].tolist() == expected
        known = row_constants(CONFIG, bits)
        assert not expected[0] % known["VALUE_ALIGNED"] and not expected[1] % known["KEY_ALIGNED"]
    strides = cache.latents.stride(1), cache.rope_keys.stride(1)
    assert strides == (known["VALUE_STRIDE"], known["KEY_STRIDE"])


@pytest.mark.parametrize("bits", [16, 32])
def test_what_is_saved_moves_between_devices(bits: int) -> None:
    cache, tensors = loaded(bits)
    there = Cache([CONFIG.rows(0)] * 2, 8, np.float32 if bits == 32 else np.float16)
    there.load(cache.save(), 5)
    again = new_cache(CONFIG, 8, DEVICE, bits)
    again.load(there.save(), 5)
    assert again.length == 5
    for name, rows in tensors.items():
        kept = there.save()[name]
        assert np.array_equal(again.save()[name], kept) and again.save()[name].dtype == rows.dtype
        # On the CPU 16 bits are integers: half of a scale, which is less than twice the row's length / 32,767.
        lengths = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
        assert (np.abs(kept.astype(np.float64) - rows) <= (lengths / 32767 if bits == 16 else 0)).all()


def test_8_bits_save_16_and_keep_what_they_rounded_to() -> None:
    cache, tensors = loaded(8)
    rounded = cache.save()
    again = new_cache(CONFIG, 8, DEVICE, 8)
    again.load(rounded, 5)
    # Codes stay: a row's largest value moves by up to 2^-11 in float16, half a step of E4M3 is 2^-5 or more.
    assert torch.equal(again.latents[:, :5], cache.latents[:, :5])
    for name, rows in tensors.items():
        latents, keys = rows[:, :10].astype(np.float64), rows[:, 10:]
        assert np.array_equal(rounded[name][:, 10:], keys) and rounded[name].dtype == np.float16
        # E4M3: half a step is 2^-4 of the value, below the row's largest / 28672 a fixed 2^-10 / 448 of the largest;
        # the float16 that is saved adds 2^-11.
        bound = np.abs(latents) * (2**-4 + 2**-10) + np.abs(latents).max(-1, keepdims=True) * 2**-10 / 448
        assert (np.abs(rounded[name][:, :10] - latents) <= bound).all()
        assert not np.array_equal(rounded[name][:, :10], rows[:, :10])


def test_8_bit_rows_of_zeros() -> None:
    codes, scales = pack_e4m3(torch.zeros(2, 5, device=DEVICE))
    assert not codes.any() and scales.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("tensors", "length", "error"),
    [
        (saved(9), 9, ContextFullError),
        (saved(5), 4, LocalrunError),
        (saved(5, np.float32), 5, LocalrunError),
        (saved(5, layers=1), 5, LocalrunError),
        ({}, 0, LocalrunError),
    ],
)
def test_other_sessions_are_refused(tensors: dict[str, np.ndarray], length: int, error: type[Exception]) -> None:
    cache = new_cache(CONFIG, 8, DEVICE)
    with pytest.raises(error):
        cache.load(tensors, length)
    assert cache.length == 0


@pytest.mark.parametrize("bits", BITS)
def test_all_memory_is_reserved_at_once(bits: int) -> None:
    cache = new_cache(CONFIG, 8, DEVICE, bits)
    assert cache.n_bytes == 2 * 8 * row_bytes(CONFIG, bits)
    assert row_bytes(CONFIG, bits) == {16: 32, 8: 10 + 12 + 4, 32: 64}[bits]
    assert new_cache(CONFIG, 8, DEVICE, bits, n_layers=1).n_bytes == cache.n_bytes // 2


@gpu_device.gpu
def test_memory_is_the_device_s() -> None:
    before = torch.cuda.memory_allocated()
    cache = new_cache(CONFIG, 100_000, DEVICE)
    assert torch.cuda.memory_allocated() - before >= cache.n_bytes
