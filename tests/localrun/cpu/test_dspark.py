"""DSpark's drafts: its blocks against llama.cpp and a program in float64, what they read, and replies with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llama_cpp_oracle
import numpy as np
import pytest
import tiny_deepseek4 as tiny
import tiny_dspark
from closeness import error

import localrun
from localrun.cpu import warmup
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.network import dspark
from localrun.network.cache import Cache

GREEDY = localrun.Sampling(temperature=0.0)
N_TOKENS = 40  # more than the window's
TOLERANCE = 1e-5  # float32 in another order
STEP_TOLERANCE = 5e-3  # caches of 16 bits, over four layers


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dspark.write(tmp_path_factory.mktemp("dspark") / "dspark.gguf", tiny.SHARED)


@pytest.fixture(scope="module")
def engine(blocks: Path) -> Iterator[Engine]:
    with localrun.load(tiny.shared(), draft=blocks, speculative=3, device="cpu", threads=2, ctx=256) as engine:
        yield engine


def features_of(n_tokens: int) -> np.ndarray:
    """float32 (T, F) of the size of streams."""
    shape = n_tokens, len(tiny_dspark.TARGET) * tiny.SHARED.hidden_size
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def test_the_reference_is_llama_cpps(tmp_path: Path) -> None:
    """The Markov head's chain included; beyond the window."""
    path, features = tiny_dspark.write(tmp_path / "x.gguf", tiny.SHARED, with_ends=True), features_of(N_TOKENS)
    np.save(tmp_path / "features.npy", features)
    found = llama_cpp_oracle.block_logits(path, [9, *[tiny_dspark.NOISE] * 4], tmp_path / "features.npy")
    expected = tiny_dspark.Reference(tiny.SHARED).biased_logits(features.astype(np.float64), 9)
    assert error(found, expected) < TOLERANCE


def test_a_block_is_the_references(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits, drafts and confidences; over few tokens, and over more than the window's, kept in pieces."""
    monkeypatch.setattr(dspark, "LEAST_CONFIDENCE", 0.0)
    features = features_of(N_TOKENS)
    reference, network = tiny_dspark.Reference(tiny.SHARED), engine.model.drafter._network
    seen: list[np.ndarray] = []
    head, network.lm_head = network.lm_head, lambda x: seen.append(head(x)) or seen[-1]
    try:
        for pieces in ([4], [1] * 17 + [23]):
            kinds = [engine.model.drafter.spark.config.rows(index) for index in range(2)]
            cache, n = Cache(kinds, 64, np.float32), 0
            for count in pieces:
                network.keep(features[n : n + count], cache)
                n += count
            drafts = network.draft(9, 5, cache)
            assert error(seen[-1].numpy(), reference.logits(features[:n].astype(np.float64), 9)) < TOLERANCE
            assert drafts == reference.biased_logits(features[:n].astype(np.float64), 9).argmax(1).tolist()
            assert network.draft(9, 2, cache) == drafts[:2] and cache.length == n
            confidences = reference.confidences(features[:n].astype(np.float64), 9)
            for least in confidences:
                for nearly in (least - TOLERANCE, least + TOLERANCE):
                    monkeypatch.setattr(dspark, "LEAST_CONFIDENCE", nearly)
                    assert network.draft(9, 5, cache) == drafts[: [*(confidences < nearly), True].index(True)]
            monkeypatch.setattr(dspark, "LEAST_CONFIDENCE", 0.0)
    finally:
        network.lm_head = head


def test_what_reads_the_means_is_compiled_before(engine: Engine) -> None:
    kernels = warmup.needed(warmup.for_steps(engine.config, {"F32"}))
    phases = engine.model._step.program._phases
    assert {id(phase.run) for phase in phases} <= {id(kernel) for kernel, _ in kernels}


@pytest.mark.slow
def test_what_they_read_is_transformers(engine: Engine) -> None:
    """Means of streams behind the target layers: of the network, and of steps over caches of 16 bits."""
    import torch

    ids, model = tiny.token_ids(120), engine.model
    with torch.no_grad():
        states = tiny.hf_model(tiny.SHARED)(torch.tensor([ids]), output_hidden_states=True).hidden_states
    expected = np.concatenate([states[layer + 1][0].mean(1).numpy() for layer in tiny_dspark.TARGET[:2]], 1)
    found, model.keep_hidden = {}, True  # the last layer's streams are not among transformers' states
    for kind, pieces in (("network", [100, 20]), ("steps", [5] * 24)):
        cache, rows, done = model.new_cache(128, exact=kind == "network"), [], 0
        for count in pieces:
            model.forward(ids[done : done + count], cache, all_logits=True)
            rows.append(model.hidden)
            done += count
        found[kind] = np.concatenate(rows)
        assert found[kind].shape == (120, 3 * tiny.SHARED.hidden_size)
    assert error(found["network"][:, : expected.shape[1]], expected) < TOLERANCE
    # A row that is rounded to 16 bits may tip a choice between two near equals, of some tokens.
    off = np.abs(found["steps"] - found["network"]).max(1) / np.ptp(found["network"])
    assert np.quantile(off, 0.9) < STEP_TOLERANCE


def plain(engine: Engine, ids: list[int], n: int) -> list[int]:
    return list(engine.session("off").tokens(ids, GREEDY, max_tokens=n))


@pytest.mark.slow
@pytest.mark.parametrize("least", [0.0, dspark.LEAST_CONFIDENCE])
def test_replies_are_those_without_drafts(
    engine: Engine, tmp_path: Path, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over turns that go back, and a saved session; whether or not blocks end where confidence is low."""
    monkeypatch.setattr(dspark, "LEAST_CONFIDENCE", least)
    session, ids = engine.session(), tiny.token_ids(90)
    assert session.speculation.draft.name == "dspark"
    for n in (60, 20, 90):
        assert list(session.tokens(ids[:n], GREEDY, max_tokens=24)) == plain(engine, ids[:n], 24)
        assert session.stats.drafted_tokens > 0
    session.save(tmp_path / "saved")
    loaded = engine.session()
    loaded.load(tmp_path / "saved")
    following = [*loaded.ids, 1, 2, 3]
    assert list(loaded.tokens(following, GREEDY, max_tokens=12)) == plain(engine, following, 12)


def test_drafts_that_come_true_are_taken(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a drafter that knows the reply."""
    ids = tiny.token_ids(30)
    reply = plain(engine, ids, 24)

    def draft(last: int, n: int, cache: Cache) -> list[int]:
        at = cache.length - len(ids)  # of the reply's tokens, all but the last have been evaluated
        assert (reply[at] if at >= 0 else ids[-1]) == last
        return reply[at + 1 : at + 1 + n]

    monkeypatch.setattr(engine.model.drafter, "draft", draft)
    session = engine.session()
    assert list(session.tokens(ids, GREEDY, max_tokens=24)) == reply
    assert session.stats.accepted_tokens == session.stats.drafted_tokens > 12


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.head_count": 4}, "drafts for another model: attention.head_count is 4"),
        ({"target_layers": [1, 9]}, "target_layers' is .*expected 1 to 4"),
        ({"block_size": 1000}, "block_size' is 1000; expected at most 64"),
        ({"block_count": 3}, "tensor 'blk.2.*missing"),
    ],
)
def test_blocks_of_something_else_are_refused(keys: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tiny_dspark.write(tmp_path / "x.gguf", tiny.SHARED, **keys)
    with pytest.raises(LocalrunError, match=message):
        localrun.load(tiny.shared(), draft=path, speculative=2, device="cpu", threads=1, ctx=64)


def test_blocks_are_no_model(blocks: Path) -> None:
    with pytest.raises(LocalrunError, match="'dflash' is no model but drafts for one; --draft takes those"):
        localrun.load(blocks)
