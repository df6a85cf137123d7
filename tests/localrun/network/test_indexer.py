"""Sparse attention (deepseek32, glm-dsa): which tokens are chosen, and what comes of it.

Against transformers, llama.cpp and slow, obvious code.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import hf_oracle
import llama_cpp_oracle
import naive
import numpy as np
import pytest
import tiny_models
import torch
from closeness import SESSION_TOLERANCE, error
from tiny_models import Sparse

import localrun
from localrun.cpu.bridge import AttendChosen, ChooseRows
from localrun.errors import GGUFError
from localrun.gguf.file import open_gguf
from localrun.models.reader import read_config
from localrun.network import indexer
from localrun.network.weight_source import Seen
from quant.threads.pool import Pool

TOLERANCE = 1e-5  # as in test_logits.py
TOP_K = 8

# 100 tokens, most of which see many more than they choose; seeds by which no choice is a near tie.
SEEDS = {"deepseek32": 16, "deepseek32-nextn": 11, "glm-dsa": 23, "glm-dsa-shared": 9, "glm-dsa-default-types": 20}
VARIANTS = list(SEEDS)


def prompt(variant: str, n: int = 100) -> list[int]:
    return tiny_models.token_ids(variant, n, seed=SEEDS[variant])


def choices_of(variant: str, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[np.ndarray]]:
    """Our logits, and of each layer with an indexer int (T, K), sorted; all rows of a token that sees no more."""
    found: list[np.ndarray] = []
    choose = indexer.Indexer.choose

    def noted(*arguments):
        rows = choose(*arguments)
        found.append(np.sort(rows.numpy(), axis=1))
        return rows

    monkeypatch.setattr(indexer.Indexer, "choose", noted)
    with localrun.load(tiny_models.shared(variant), device="cpu", threads=2, ctx=128) as model:
        return model.logits(ids), found


def transformers_choices(path: Path, ids: list[int]) -> list[np.ndarray]:
    """The same, as transformers' indexers give them."""
    model, found = hf_oracle.model(path), []
    for module in model.modules():
        if type(module).__name__.endswith("Indexer"):
            module.register_forward_hook(lambda _, __, out: found.append(np.sort(out[0].numpy(), axis=1)))
    with torch.no_grad():
        model(torch.tensor([ids]))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_choices_and_logits_far_beyond_top_k(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ids = tiny_models.shared(variant), prompt(variant)
    logits, found = choices_of(variant, ids, monkeypatch)
    expected = transformers_choices(path, ids)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours[TOP_K - 1 :], theirs[TOP_K - 1 :])
    # glm-dsa's rms_norm_eps of 1e-5 holds for norms of latents as well, but for transformers: 1e-5 of the logits.
    assert error(logits, hf_oracle.logits(path, ids)) < (2 * TOLERANCE if variant == "glm-dsa" else TOLERANCE)
    assert error(logits, llama_cpp_oracle.logits(path, ids)) < TOLERANCE
    reference = naive.Naive(path)
    assert error(logits, reference.logits(ids)) < TOLERANCE
    assert reference.margins.min() > 1e-5


@pytest.mark.parametrize("variant", ["deepseek32", "glm-dsa-shared"])
def test_a_session_is_the_same_however_tokens_come(variant: str) -> None:
    """In chunks through torch, by steps of 1 and of 5, and after what was taken back."""
    ids, path = prompt(variant), tiny_models.shared(variant)
    with localrun.load(path, device="cpu", threads=2, ctx=128) as model:
        native = model.model

        def evaluate(*sizes: int, cache=None) -> np.ndarray:
            cache, rows = cache or model.new_cache(), []
            for size in sizes:
                rows.append(native.forward(ids[cache.length : cache.length + size], cache, all_logits=True))
            return np.concatenate(rows)

        by_steps = evaluate(*[1] * 100)
        assert np.array_equal(evaluate(*[5] * 20), by_steps)
        native._most_steps = 5  # more go through torch
        chunks = evaluate(40, *[1] * 8, 52)
        sure = naive.Naive(path)
        expected = sure.logits(ids)
        steady = sure.margins > tiny_models.ROUTING_MARGIN  # a cache of 16 bits may choose otherwise elsewhere
        assert steady.sum() > 60
        assert error(by_steps[steady], expected[steady]) < 2 * SESSION_TOLERANCE
        assert error(chunks[steady], expected[steady]) < 2 * SESSION_TOLERANCE
        cache = model.new_cache()
        before = evaluate(50, *[1] * 20, cache=cache)
        cache.truncate(55)
        assert np.array_equal(evaluate(*[1] * 15, cache=cache), before[55:])


@pytest.mark.parametrize("variant", ["deepseek32", "glm-dsa-shared", "deepseek32-nextn"])
def test_drafts_do_not_change_a_reply(variant: str) -> None:
    path, ids = tiny_models.shared(variant), prompt(variant, 30)
    replies = {}
    for setting in ("off", 4):
        with localrun.load(path, device="cpu", threads=2, ctx=96, speculative=setting) as model:
            replies[setting] = list(model.generate(ids, localrun.Sampling(temperature=0.0), max_tokens=50))
    assert replies["off"] == replies[4]


def test_a_saved_session_goes_on(tmp_path: Path) -> None:
    path, ids = tiny_models.shared("glm-dsa-shared"), prompt("glm-dsa-shared")
    with localrun.load(path, device="cpu", threads=2, ctx=128) as model:
        cache, again = model.new_cache(), model.new_cache()
        model.model.forward(ids[:50], cache)
        again.load({name: rows.copy() for name, rows in cache.save().items()}, 50)
        rest = [model.model.forward([token], each) for each in (cache, again) for token in ids[50:60]]
    assert np.array_equal(rest[:10], rest[10:])


# ---- dense -----------------------------------------------------------------------------------------------------------


def as_deepseek2(variant: str) -> np.ndarray:
    """Logits of the prompt by the same weights without an indexer: 8 tokens are chosen of 8."""
    path, reference = tiny_models.shared(variant), naive.Naive(tiny_models.shared(variant))
    reference.meta["attention.indexer.top_k"] = 10**6
    assert path.exists()
    return reference.logits(prompt(variant))


@pytest.mark.parametrize("variant", ["deepseek32", "glm-dsa-shared"])
def test_dense_attention(variant: str) -> None:
    path, ids = tiny_models.shared(variant), prompt(variant)
    with localrun.load(path, device="cpu", threads=2, ctx=128, dense_attention=True) as model:
        dense, per_token = model.logits(ids), model.config.kv_bytes_per_token
        steps = np.concatenate([model.model.forward([token], cache) for cache in [model.new_cache()] for token in ids])
    with localrun.load(path, device="cpu", threads=2, ctx=128) as model:
        sparse = model.logits(ids)
        assert model.config.kv_bytes_per_token > per_token
    assert error(dense, as_deepseek2(variant)) < TOLERANCE
    assert error(steps, dense) < SESSION_TOLERANCE
    assert error(sparse[:TOP_K], dense[:TOP_K]) < TOLERANCE  # all tokens are chosen there
    assert error(sparse, dense) > 0.05


def test_a_file_without_indexer_tensors_is_dense_and_says_so(tmp_path: Path) -> None:
    path, lines = tiny_models.shared("deepseek32"), []
    _, tensors = tiny_models.read(path)
    bare = tiny_models.without(path, tmp_path / "bare.gguf", {name for name in tensors if ".indexer." in name})
    with localrun.load(bare, device="cpu", threads=2, ctx=128, notice=lines.append) as model:
        assert error(model.logits(prompt("deepseek32")), as_deepseek2("deepseek32")) < TOLERANCE
    assert lines == [
        "the file has no indexer tensors: attention goes over all tokens, which the model was not trained for"
    ]


@pytest.mark.parametrize("name", ["attn_q_b.weight", "k_norm.bias"])
def test_a_file_that_lacks_some_indexer_tensors_is_refused(tmp_path: Path, name: str) -> None:
    path = tiny_models.shared("glm-dsa-shared")
    bare = tiny_models.without(path, tmp_path / "bare.gguf", {f"blk.2.indexer.{name}"})
    with pytest.raises(GGUFError, match=rf"tensor 'blk.2.indexer.{name}' not found"):
        localrun.load(bare, device="cpu")


def test_dense_attention_of_a_model_without_an_indexer() -> None:
    lines = []
    with localrun.load(tiny_models.shared("v3"), device="cpu", ctx=64, dense_attention=True, notice=lines.append):
        assert lines == ["--dense-attention has no effect: no indexer chooses tokens here"]


@pytest.mark.parametrize(
    ("types", "message"),
    [("FFF", "key 'glm-dsa.attention.indexer.types' is 3 values; expected 5, one a layer"), ("SFFFF", "the first")],
)
def test_types_that_make_no_sense(tmp_path: Path, types: str, message: str) -> None:
    variant = Sparse(architecture="glm-dsa", num_hidden_layers=5, indexer_types=types, unused_indexers=True)
    path = tiny_models.tiny_model(tmp_path / "x.gguf", variant)
    with open_gguf(path) as file, pytest.raises(GGUFError, match=message):
        read_config(file)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("n_tokens", "n_heads", "head_dim", "n_cached", "top_k"),
    [
        (5, 8, 64, 40, 8),
        (7, 40, 128, 300, 33),
        (3, 4, 16, 30, 29),
        (4, 1, 20, 9, 1),
        (6, 33, 64, 6, 4),
        (9, 64, 128, 3000, 400),
    ],
)  # fmt: skip
def test_choices_equal_the_reference(dtype, n_tokens, n_heads, head_dim, n_cached, top_k) -> None:
    generator = torch.Generator().manual_seed(n_cached)
    queries, weights, keys = (
        torch.randn(*shape, generator=generator)
        for shape in ((n_tokens, n_heads, head_dim), (n_tokens, n_heads), (n_cached, head_dim))
    )
    keys = keys.to(dtype)
    with closing(Pool(2)) as pool:
        found = ChooseRows(pool)(queries, weights, keys, top_k)
    expected = indexer.choose_rows(queries, weights, keys, top_k)
    for ours, theirs, seen in zip(found, expected, range(n_cached - n_tokens + 1, n_cached + 1), strict=True):
        assert set(ours[:seen].tolist()) == set(theirs[:seen].tolist())
        assert (ours[seen:] == -1).all()


@pytest.mark.parametrize(("weight", "equal", "better"), [(1, 0, 2), (1, 3, 3.5), (-1, 5, 1), (-1, -5, None)])
def test_of_equal_scores_the_first_are_chosen(weight: float, equal: float, better: float | None) -> None:
    n_cached, top_k, best = 5000, 40, [17, 2500, 4999] if better else []
    keys, query = torch.zeros(n_cached, 16), torch.zeros(1, 1, 16)
    query[..., 0], keys[:, 0] = 1, equal
    keys[best, 0] = better or 0
    with closing(Pool(2)) as pool:
        found = ChooseRows(pool)(query, torch.full((1, 1), float(weight)), keys, top_k)[0].tolist()
    others = [row for row in range(n_cached) if row not in best][: top_k - len(best)]
    assert sorted(found) == sorted(best + others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("n_heads", "top_k"), [(6, 9), (130, 200), (32, 96)])
def test_attention_to_chosen_rows(dtype, n_heads: int, top_k: int) -> None:
    generator, (n_tokens, n_cached, rank) = torch.Generator().manual_seed(0), (5, 300, 48)
    n_rope = 16 if dtype == torch.float16 else 20
    latent, turned, keys = (
        torch.randn(*shape, generator=generator) / 4
        for shape in ((n_tokens, n_heads, rank), (n_tokens, n_heads, n_rope), (n_cached, rank + n_rope))
    )
    keys, out = keys.to(dtype), torch.full((n_tokens, n_heads, rank), torch.nan)
    rows = torch.stack([torch.randperm(n_cached, generator=generator)[:top_k] for _ in range(n_tokens)]).int()
    with closing(Pool(2)) as pool:
        AttendChosen(pool)([latent, turned], Seen(n_cached - n_tokens, keys, chosen_TK=rows), 0.7, out)
    for t, query in enumerate(torch.cat([latent, turned], -1)):
        chosen = keys[rows[t].long()].double()
        expected = (0.7 * query.double() @ chosen.T).softmax(-1) @ chosen[:, :rank]
        # Sums of up to 200 float32. Rows of 16 bits are rounded once more, to 16-bit integers: 2^-13 of their length.
        tolerance = 2e-4 if dtype == torch.float16 else 1e-6
        torch.testing.assert_close(out[t].double(), expected, rtol=1e-5, atol=tolerance)
