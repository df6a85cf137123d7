"""The indexer on the device: keys, scores and choices of tokens with a cache each, beside the network's.

Letters: T tokens, S cached tokens, I the indexer's heads, d index_head_dim, K index_topk.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from gpu_device import DEVICE

from localrun.models.config import Config
from localrun.network.indexer import choose_rows

pytest.importorskip("triton", reason="localrun.gpu needs Triton")

from localrun.gpu.attention import indexer
from localrun.gpu.caches.cache import new_cache
from localrun.gpu.caches.latent import LatentCache
from localrun.gpu.caches.places import Places

CONFIG = Config(
    architecture="deepseek32", attention="mla", rope="pairs",
    hidden_size=8, intermediate_size=1, num_hidden_layers=2, num_attention_heads=3,
    vocab_size=1, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, qk_rope_head_dim=6,
    v_head_dim=4, kv_lora_rank=20, qk_nope_head_dim=5, index_n_heads=19, index_head_dim=12, index_topk=7,
    indexer_types=("shared", "full"),
)  # fmt: skip
LENGTHS = 70, 0, 6, 30


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def of_several(bits: int, most: int) -> tuple[Places, list[LatentCache]]:
    """A token of each of some caches, whose earlier keys are random, and later ones NaN."""
    caches = [new_cache(CONFIG, length + 1 + i, DEVICE, bits) for i, length in enumerate(LENGTHS)]
    for i, (cache, length) in enumerate(zip(caches, LENGTHS, strict=True)):
        keys = cache.indexer_keys[1].fill_(float("nan"))
        keys[:length] = random(length, 12, seed=i)
        cache.advance(length)
    table = torch.from_numpy(np.stack([cache.addresses for cache in caches], 1)).to(DEVICE)
    return Places(torch.tensor(LENGTHS, device=DEVICE), table, bits, most), caches


@pytest.mark.parametrize("bits", [16, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (8, 32))])
def test_keys_scores_and_choices(bits: int) -> None:
    places, caches = of_several(bits, 100)
    new, q_TId, weights_TI = random(4, 12, seed=9), random(4, 19, 12, seed=10), random(4, 19, seed=11)
    indexer.append_keys(new, places, 1)
    scores = indexer.scores_of(q_TId, weights_TI, places, 1, torch.float32)
    assert scores.shape == (4, 100)
    rows_TK = indexer.best_rows(scores, places.positions, 7)
    assert rows_TK.dtype == torch.int32
    for t, (cache, length) in enumerate(zip(caches, LENGTHS, strict=True)):
        keys_Sd = cache.indexer_keys[1][: length + 1]
        assert torch.equal(keys_Sd[-1], new[t].to(keys_Sd.dtype)) and cache.indexer_keys[1][length + 1 :].isnan().all()
        right = weights_TI[t].double() @ (q_TId[t].double() @ keys_Sd.double().T).relu()
        # float32 sums of 19 heads' 12 products, of weights up to 3 and products up to 20.
        torch.testing.assert_close(scores[t, : length + 1].double(), right, rtol=0, atol=1e-4)
        assert torch.isneginf(scores[t, length + 1 :]).all()
        best = choose_rows(q_TId[t : t + 1].cpu(), weights_TI[t : t + 1].cpu(), keys_Sd.cpu(), 7)[0]
        seen = min(7, length + 1)
        assert rows_TK[t, :seen].tolist() == best[:seen].tolist() and (rows_TK[t, seen:] == 100).all()


def test_half_products_choose_by_rounded_scores() -> None:
    places, _ = of_several(16, 128)
    indexer.append_keys(random(4, 12, seed=9), places, 1)
    q_TId, weights_TI = 1e5 * random(4, 19, 12, seed=10), random(4, 19, seed=11)
    exact, half = (indexer.scores_of(q_TId, weights_TI, places, 1, d) for d in (torch.float32, torch.float16))
    seen = exact.isfinite()
    # Queries rounded by 2^-11 of a head's largest: of sums of some 200 products 1e-3 of the largest.
    assert torch.equal(seen, half.isfinite())
    assert float((half - exact)[seen].abs().max() / exact[seen].abs().max()) < 2e-3


def test_of_equal_scores_the_first() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0, 0.0, -torch.inf], [0.0, 0.0, -torch.inf, -torch.inf, -torch.inf]])
    assert indexer.best_rows(scores, torch.tensor([3, 1]), 3).tolist() == [[0, 1, 2], [0, 1, 5]]


def test_what_is_saved() -> None:
    cache = new_cache(CONFIG, 9, DEVICE, 8)
    rows = {f"{layer}.0": np.ones((5, 26), np.float16) for layer in range(2)}
    rows["1.1"] = np.arange(60, dtype=np.float16).reshape(5, 12)
    cache.load(rows, 5)
    assert sorted(cache.save()) == ["0.0", "1.0", "1.1"] and np.array_equal(cache.save()["1.1"], rows["1.1"])
    bytes_of = new_cache(dataclasses.replace(CONFIG, index_topk=0), 9, DEVICE, 8).n_bytes
    assert cache.n_bytes == bytes_of + 2 * 12 * 9
