"""The head for multi-token prediction: against transformers' own modules put together as the paper says, and the step's
against torch's.

Tolerances are fractions of the range of the logits, or of the vectors. Letters: T positions, D hidden_size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hf_oracle
import numpy as np
import pytest
import tiny_models
import torch
from caches import rows_of
from closeness import QUANTIZED_TOLERANCE, SESSION_TOLERANCE, error

import localrun
from localrun.cpu.mtp import MTP
from localrun.errors import ContextFullError
from quant.decode.program import FEW_UP_TO, MOST_TOKENS

# Where the order of a sum tips the rounding of a cache row's value to 16 bits, 2^-11 of it: up to 2.1e-5 here.
ROW_TOLERANCE = 1e-4

OWN = tiny_models.shared("v3-nextn")
BLK = "blk.4.nextn."
QUANTISED = {"Q4_K_M": tiny_models.Q4_K_M, "Q8_0": "Q8_0", "F16": "F16"}


@functools.cache
def file_without(*names: str) -> Path:
    """v3-nextn without some tensors."""
    return tiny_models.without(OWN, OWN.with_name(f"without-{'-'.join(names)}.gguf"), names)


SHARED = {
    "own": (),
    "shared embedding": (BLK + "embed_tokens.weight",),
    "shared head": (BLK + "shared_head_head.weight",),
    "both shared": (BLK + "embed_tokens.weight", BLK + "shared_head_head.weight"),
    "both shared, head tied": (BLK + "embed_tokens.weight", BLK + "shared_head_head.weight", "output.weight"),
}


@contextmanager
def opened(path: Path, threads: int = 2) -> Iterator[tuple[localrun.Engine, MTP]]:
    """A model and its head; many positions go through torch."""
    with localrun.load(path, threads=threads, ctx=64) as model:
        model.prepare()
        assert model.model.mtp is not None
        yield model, model.model.mtp


def positions(n: int, seed: int = 0) -> tuple[list[int], np.ndarray]:
    """n next ids, and float32 (n, D) of the size of normed vectors."""
    ids = tiny_models.token_ids("v3-nextn", n, seed=seed)
    return ids, np.random.default_rng(seed).standard_normal((n, 256)).astype(np.float32)


def one_by_one(mtp: MTP, ids: list[int], hidden_TD: np.ndarray, cache=None) -> tuple[np.ndarray, np.ndarray]:
    """float32 (T, vocab) logits and (T, D) after each position."""
    cache = cache or mtp.new_cache(len(ids))
    rows = [mtp.forward(ids[t : t + 1], hidden_TD[t : t + 1], cache) for t in range(len(ids))]
    return np.concatenate([logits for logits, _ in rows]), np.concatenate([hidden for _, hidden in rows])


# ---- against transformers --------------------------------------------------------------------------------------------


class Oracle:
    """A file's model with its head, of transformers' modules."""

    def __init__(self, path: Path):
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

        metadata, tensors = tiny_models.read(path)
        architecture = metadata["general.architecture"]
        tensors = {hf_oracle._common(architecture, name): values for name, values in tensors.items()}
        ordinary = {name: values for name, values in tensors.items() if ".nextn." not in name}
        config = hf_oracle._config(metadata | {f"{architecture}.nextn_predict_layers": 0}, ordinary)  # its layer, too
        blk = f"blk.{metadata[f'{architecture}.block_count'] - 1}.nextn."
        self.model = hf_oracle._model_class(config)(config).eval()
        state = hf_oracle._state_dict(config, ordinary)
        self.model.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
        *layers, self.layer = self.model.model.layers
        self.model.model.layers = torch.nn.ModuleList(layers)
        config.num_hidden_layers = len(layers)
        if hasattr(self.layer.self_attn, "indexer"):  # it attends to all tokens, as in llama.cpp
            self.layer.self_attn.indexer.index_topk = 1 << 20

        def weight(name: str, module: torch.nn.Module) -> torch.nn.Module:
            module.weight = torch.nn.Parameter(torch.from_numpy(tensors[name]))
            return module

        size = config.hidden_size
        self.enorm, self.hnorm, self.norm = (
            weight(f"{blk}{name}.weight", DeepseekV3RMSNorm(size, eps=config.rms_norm_eps))
            for name in ("enorm", "hnorm", "shared_head_norm")
        )
        self.eh_proj = weight(blk + "eh_proj.weight", torch.nn.Linear(2 * size, size, bias=False))
        embedding, head = blk + "embed_tokens.weight", blk + "shared_head_head.weight"
        self.embedding, self.head = self.model.model.embed_tokens, self.model.lm_head
        if embedding in tensors:
            self.embedding = weight(embedding, torch.nn.Embedding(config.vocab_size, size))
        if head in tensors:
            self.head = weight(head, torch.nn.Linear(size, config.vocab_size, bias=False))

    @torch.no_grad()
    def hidden(self, ids: list[int]) -> np.ndarray:
        """float32 (T, D): what the model's head reads."""
        return self.model.model(torch.tensor([ids])).last_hidden_state[0].numpy()

    @torch.no_grad()
    def __call__(self, next_ids: list[int], hidden_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 (T, vocab) logits and (T, D) after the norm, of each position."""
        embedded = self.enorm(self.embedding(torch.tensor([next_ids])))
        x = self.eh_proj(torch.cat([embedded, self.hnorm(torch.from_numpy(hidden_TD)[None])], -1))
        steps, n = torch.arange(len(next_ids))[None], len(next_ids)
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        turns = self.model.model.rotary_emb(x, steps)
        x = self.norm(self.layer(x, attention_mask=mask, position_ids=steps, position_embeddings=turns))
        return self.head(x)[0].numpy(), x[0].numpy()


@pytest.mark.parametrize("name", SHARED)
def test_logits_are_transformers(name: str) -> None:
    """Position by position through the step, and all at once through torch."""
    path, (ids, hidden_TD) = file_without(*SHARED[name]), positions(40)
    logits_TV, normed_TD = Oracle(path)(ids, hidden_TD)
    with opened(path) as (_, mtp):
        step_TV, step_TD = one_by_one(mtp, ids, hidden_TD)
        last_1V, last_1D = mtp.forward(ids, hidden_TD, mtp.new_cache(40))
        assert mtp._network is not None  # 40 positions are too many for the step
    assert error(step_TV, logits_TV) < SESSION_TOLERANCE
    assert error(step_TD, normed_TD) < SESSION_TOLERANCE
    assert error(last_1V, logits_TV[-1:]) < SESSION_TOLERANCE
    assert error(last_1D, normed_TD[-1:]) < SESSION_TOLERANCE


def test_nothing_waits_for_torch_as_long_as_steps_do() -> None:
    ids, hidden_TD = positions(40)
    with localrun.load(OWN, threads=2, ctx=64) as model:
        mtp = model.model.mtp
        by_steps = mtp.forward(ids, hidden_TD, mtp.new_cache(40))
        assert model.model._network is None and mtp._network is None
        model.prepare()
        by_torch = mtp.forward(ids, hidden_TD, mtp.new_cache(40))
    assert all(error(*both) < SESSION_TOLERANCE for both in zip(by_steps, by_torch, strict=True))


@pytest.mark.parametrize("variant", ["v3-nextn", "deepseek32-nextn", "glm4moe", "hy_v3", "bailingmoe2"])
def test_the_whole_way_is_transformers(variant: str) -> None:
    """From tokens to the head's logits, over the hidden states that the model leaves; then two drafts on."""
    path = tiny_models.shared(variant)
    oracle, ids = Oracle(path), tiny_models.prompt(variant)
    hidden_TD = oracle.hidden(ids[:-1])
    expected_TV, normed_TD = oracle(ids[1:], hidden_TD)
    draft_TV, draft_TD = oracle([*ids[1:], 7], np.concatenate([hidden_TD, normed_TD[-1:]]))
    second_TV, _ = oracle([*ids[1:], 7, 300], np.concatenate([hidden_TD, normed_TD[-1:], draft_TD[-1:]]))
    with opened(path) as (model, mtp):
        model.model.keep_hidden = True
        model.model.forward(ids[:-1], model.new_cache())
        cache = mtp.new_cache(64)
        logits, hidden = mtp.forward(ids[1:], model.model.hidden, cache)
        assert error(logits, expected_TV[-1:]) < SESSION_TOLERANCE
        logits, hidden = mtp.forward([7], hidden, cache)
        assert error(logits, draft_TV[-1:]) < SESSION_TOLERANCE
        logits, _ = mtp.forward([300], hidden, cache)
        assert error(logits, second_TV[-1:]) < SESSION_TOLERANCE


# ---- the step against torch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", QUANTISED)
def test_the_step_is_the_network(mix: str) -> None:
    """Position by position, each over the rows that the step has left."""
    ids, hidden_TD = positions(40)
    errors = []
    with opened(tiny_models.shared("v3-nextn", type=QUANTISED[mix])) as (model, mtp):
        cache, block = mtp.new_cache(64), model.model._mtp_block()
        for t in range(40):
            position = ids[t : t + 1], hidden_TD[t : t + 1], cache
            step = mtp.forward(*position)
            row = rows_of(cache)[0][-1].copy()
            cache.truncate(t)
            by_torch = block.forward(*position)
            cache.save()["0.0"][t] = row
            errors.append(max(error(found, expected) for found, expected in zip(step, by_torch, strict=True)))
    if mix == "F16":
        assert max(errors) < ROW_TOLERANCE
    else:  # a rounding to 8 bits that the order of a sum tips may tip a router's choice between two near equals
        assert np.quantile(errors, 0.9) < QUANTIZED_TOLERANCE


@pytest.mark.parametrize("name", SHARED)
def test_positions_together_are_positions_alone(name: str) -> None:
    ids, hidden_TD = positions(20)
    with opened(file_without(*SHARED[name])) as (_, mtp):
        cache = mtp.new_cache(20)
        logits_TV, normed_TD = one_by_one(mtp, ids, hidden_TD, cache)
        expected_rows = rows_of(cache)
        for n in range(2, 21):
            cache.truncate(0)
            for first in range(0, 20, n):
                last = min(first + n, 20)
                logits, hidden = mtp.forward(ids[first:last], hidden_TD[first:last], cache)
                assert np.array_equal(logits, logits_TV[last - 1 : last])
                assert np.array_equal(hidden, normed_TD[last - 1 : last])
            assert all(np.array_equal(a, b) for a, b in zip(rows_of(cache), expected_rows, strict=True))


@pytest.mark.parametrize("mix", QUANTISED)
def test_positions_together_are_positions_alone_where_pieces_get_shorter(mix: str) -> None:
    with opened(tiny_models.shared("v3-nextn", type=QUANTISED[mix])) as (_, mtp):
        cache = mtp.new_cache(FEW_UP_TO + 16)
        mtp.forward(*positions(FEW_UP_TO - 2), cache)
        ids, hidden_TD = positions(MOST_TOKENS, seed=1)
        logits_TV, normed_TD = one_by_one(mtp, ids, hidden_TD, cache)
        cache.truncate(FEW_UP_TO - 2)
        logits, hidden = mtp.forward(ids, hidden_TD, cache)
        assert np.array_equal(logits, logits_TV[-1:])
        assert np.array_equal(hidden, normed_TD[-1:])


def test_workers_do_not_change_the_logits() -> None:
    answers = []
    for threads in (1, 2, 3):
        with opened(tiny_models.shared("v3-nextn", type=tiny_models.Q4_K_M), threads) as (_, mtp):
            answers.append(one_by_one(mtp, *positions(10))[0])
    assert all(np.array_equal(answers[0], answer) for answer in answers[1:])


# ---- beside the model ------------------------------------------------------------------------------------------------


def test_the_head_and_the_model_leave_each_other_alone() -> None:
    """In turn, over their two caches."""
    ids, hidden_TD = positions(20)
    with opened(OWN) as (model, mtp):
        cache, mtp_cache = model.new_cache(), mtp.new_cache(20)
        alone = np.concatenate([model.model.forward([token], cache) for token in ids])
        expected, _ = one_by_one(mtp, ids, hidden_TD)
        cache.truncate(0)
        for t, token in enumerate(ids):
            assert np.array_equal(model.model.forward([token], cache), alone[t : t + 1])
            found, _ = mtp.forward([token], hidden_TD[t : t + 1], mtp_cache)
            assert np.array_equal(found, expected[t : t + 1])


def test_positions_can_be_forgotten() -> None:
    ids, hidden_TD = positions(9)
    with opened(OWN) as (_, mtp):
        cache = mtp.new_cache(16)
        mtp.forward(ids[:5], hidden_TD[:5], cache)
        expected = mtp.forward(ids[5:7], hidden_TD[5:7], cache)
        cache.truncate(5)
        mtp.forward(ids[7:9], hidden_TD[7:9], cache)
        cache.truncate(5)
        found = mtp.forward(ids[5:7], hidden_TD[5:7], cache)
        assert cache.length == 7
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("n", [1, 6, 40])
def test_a_full_cache_is_left_as_it_is(n: int) -> None:
    ids, hidden_TD = positions(40)
    with opened(OWN) as (_, mtp):
        cache = mtp.new_cache(n + 2)
        mtp.forward(ids[:3], hidden_TD[:3], cache)
        with pytest.raises(ContextFullError, match=f"the context is full: {n + 3} tokens, room for {n + 2}"):
            mtp.forward(ids[:n], hidden_TD[:n], cache)
        assert cache.length == 3


def test_an_interrupted_call_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps."""
    ids, hidden_TD = positions(12)
    with opened(OWN) as (_, mtp):
        cache, follow = mtp.new_cache(16), mtp._step.follow
        mtp.forward(ids[:1], hidden_TD[:1], cache)

        def interrupt(*arguments: object) -> np.ndarray:
            if cache.length > 1:
                raise KeyboardInterrupt
            return follow(*arguments)

        monkeypatch.setattr(mtp._step, "follow", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mtp.forward(ids[1:], hidden_TD[1:], cache)
        assert cache.length == 1


# ---- files -----------------------------------------------------------------------------------------------------------

NEEDED = ("eh_proj", "enorm", "hnorm", "shared_head_norm")


@pytest.mark.parametrize("missing", [*(f"{BLK}{name}.weight" for name in NEEDED), "blk.4.attn_output.weight"])
def test_a_file_without_all_of_the_head_decodes_plainly(missing: str) -> None:
    ids = tiny_models.token_ids("v3-nextn", 8)
    with localrun.load(OWN, threads=2, ctx=64) as model:
        expected = model.model.forward(ids, model.new_cache())
    with localrun.load(file_without(missing), threads=2, ctx=64) as model:
        assert model.model.mtp is None
        assert np.array_equal(model.model.forward(ids, model.new_cache()), expected)


def test_a_head_of_another_shape_is_none() -> None:
    """Half of its eh_proj's columns: as much as an embedding alone would take."""
    path = OWN.with_name("narrow-eh-proj.gguf")
    narrow = {BLK + "eh_proj.weight": np.zeros((256, 256), np.float32)}
    with localrun.load(tiny_models.without(OWN, path, tuple(narrow), narrow), threads=1, ctx=64) as model:
        assert model.model.mtp is None


@pytest.mark.parametrize("variant", ["v3", "llama"])
def test_models_without_a_head_have_none(variant: str) -> None:
    with localrun.load(tiny_models.shared(variant), threads=1, ctx=64) as model:
        assert model.model.mtp is None


def test_the_head_is_made_once() -> None:
    with opened(OWN) as (model, mtp):
        assert model.model.mtp is mtp
