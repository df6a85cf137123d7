"""Layers split between cards: stand-ins for them, one after the other, give what one device gives.

To the bit: what is computed is the same, only where differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiny_deepseek4
import tiny_models
import torch
from gpu_device import HAS_GPU
from gpu_torch import use_torch
from tiny_models import SMALLEST as V3

import localrun
from localrun.gguf.file import open_gguf
from localrun.gpu import hybrid
from localrun.gpu.caches.cache import new_cache
from localrun.gpu.device import StandIn
from localrun.gpu.hybrid import HybridModel
from localrun.models.reader import read_config
from localrun.placement import available
from localrun.placement.available import Gpu
from localrun.placement.placement import Request, lay_out

pytestmark = pytest.mark.skipif(HAS_GPU, reason="cards are stand-ins")

CTX, MUCH = 48, 1 << 40
DEEP = replace(V3, num_hidden_layers=4)
MODELS = {
    "V3": DEEP,
    "with a tied head": replace(DEEP, tie_word_embeddings=True),
    "gpt-oss": tiny_models.gpt_oss(
        hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=4, vocab_size=64,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, qk_rope_head_dim=16, n_routed_experts=8,
        num_experts_per_tok=2, sliding_window=5,
    ),
    "GLM-5.2": tiny_models.sparse(
        index_n_heads=5, index_head_dim=16, index_topk=8, architecture="glm-dsa", num_hidden_layers=4,
        indexer_types="FSFS", yarn_factor=None, rms_norm_eps=1e-5,
    ),
    "DeepSeek-V4": None,
}  # fmt: skip


def ids_of(n_tokens: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 64, n_tokens).tolist()


@contextmanager
def opened(
    name: str, cuts: Sequence[Sequence[int]], devices: Sequence[StandIn] = (), gpu_experts: int = 0
) -> Iterator[list[HybridModel]]:
    """The model on so many cards as there are first layers in each of `cuts`."""
    shape = MODELS[name]
    path = tiny_deepseek4.shared() if shape is None else tiny_models.shared(shape, type="F32")
    with open_gguf(path) as file, ExitStack() as stack:
        config = read_config(file)
        tensors = tuple(file.tensors.values())
        request = Request(tensors, config, CTX, MUCH, MUCH, MUCH, gpu_experts=gpu_experts)
        models = []
        for firsts in cuts:
            bounds = [*firsts, config.num_hidden_layers]
            layers = tuple(range(*each) for each in pairwise(bounds))
            split = replace(request, more_vram=(MUCH,) * (len(firsts) - 1), cards=tuple(range(len(firsts))))
            placement = replace(lay_out(split), layers=layers)
            here = devices or [StandIn() for _ in firsts]
            models.append(stack.enter_context(closing(HybridModel(config, file, 1, placement, here))))
        yield models


def conversation(model: HybridModel) -> list[np.ndarray]:
    """What it gives: prompts, steps, of several contexts, after tokens were forgotten, of saved sessions."""
    ids, model.keep_hidden, found = ids_of(40), True, []
    first, second = model.new_cache(CTX), model.new_cache(CTX)
    found += [model.forward(ids[:17], first, all_logits=True), model.hidden]
    found += [model.forward(ids[17:19], first, all_logits=True), model.hidden]
    found.append(model.forward(ids[:3], second))
    for token in ids[19:23]:
        found += [model.forward_each([token, ids[3]], [first, second]), model.hidden]
    first.truncate(first.kept(20))
    found.append(model.forward(ids[first.length : 30], first))
    again = model.new_cache(CTX)
    saved = first.save()
    again.load(saved, first.length)
    found += [*saved.values(), model.forward(ids[30:31], again), model.forward(ids[30:31], first)]
    return found


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_a_cache_has_its_rows_where_layers_are(bits: int) -> None:
    with open_gguf(tiny_models.shared(DEEP, type="F32")) as file:
        config = read_config(file)
    here, there = torch.device("cpu"), torch.device("meta")
    one, several = new_cache(config, 8, here, bits), new_cache(config, 8, [here, here, there, there], bits)
    assert several.n_bytes == one.n_bytes and several.addresses.shape == one.addresses.shape
    for layer, blocks in enumerate(several.blocks):
        parts = [blocks.values, blocks.keys, *([] if bits != 8 else [blocks.scales])]
        assert {part.device for part in parts} == {here if layer < 2 else there}
    assert [several.places(2, device).positions.device for device in (None, here, there)] == [here, here, there]


@pytest.mark.parametrize(
    ("name", "firsts", "gpu_experts"),
    [
        ("V3", (0, 2), 0),
        ("V3", (0, 1, 3), 3),
        ("with a tied head", (0, 3), 8),
        ("GLM-5.2", (0, 2), 0),
        ("gpt-oss", (0, 1), 0),
        pytest.param("DeepSeek-V4", (0, 2), 0, marks=pytest.mark.slow),
    ],
)
def test_cards_give_what_one_gives(
    name: str, firsts: tuple[int, ...], gpu_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_torch(monkeypatch)
    with opened(name, [(0,), firsts], gpu_experts=gpu_experts) as (one, several):
        assert len(several.parts) == len(firsts)
        for expected, found in zip(conversation(one), conversation(several), strict=True):
            assert np.array_equal(expected, found)


def test_a_model_is_opened_on_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither has room for it, and not on one with less."""
    use_torch(monkeypatch)
    monkeypatch.setattr(hybrid, "Cuda", StandIn)
    monkeypatch.setattr(available, "count", lambda: 3)
    monkeypatch.setattr(available, "card", lambda index: "Acme 5000")
    monkeypatch.setattr(
        available,
        "find",
        lambda index: Gpu("Acme 5000", (8, 9), 1 << 34, (1 << 29) * (index > 0) + (22 << 20), "", "", index),
    )
    path, ids = tiny_models.shared("v3"), ids_of(12)
    with localrun.load(path, device="cuda", unproven=True, gpu_experts=0, ctx=4096, threads=1) as engine:
        assert engine.placement.cards == (1, 2) and engine.placement.document()["cards"] == [
            {"card": 1, "layers": [0, 1]},
            {"card": 2, "layers": [2, 4]},
        ]
        found = engine.logits(ids)
    with localrun.load(path, device="cpu", ctx=4096, threads=1) as engine:
        assert np.abs(found - engine.logits(ids)).max() < 1e-5 * np.ptp(found)
