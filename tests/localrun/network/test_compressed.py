"""deepseek4 against transformers and llama.cpp, far beyond windows and open pooled rows, in every way that tokens come.

Tolerances are fractions of the logit range. Caches have 32 bits: with 16, another expert or row is chosen now and then.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llama_cpp_oracle
import numpy as np
import pytest
import tiny_deepseek4 as tiny
from closeness import error

import localrun
from localrun.engine import Engine
from localrun.errors import GGUFError
from localrun.models import config as model_config
from localrun.network import cache as cache_module
from localrun.network.cache import Cache

# Three float32 programs differ by up to 6e-7 here; 1% on any of a layer's sums moves logits by more than 1e-4.
TOLERANCE = 1e-5
GREEDY = localrun.Sampling(temperature=0.0)
N_TOKENS = 300
IDS = tiny.token_ids(N_TOKENS)
VARIANTS = {
    "without yarn": tiny.Deepseek4(
        compress_ratios=(0, 0, 4, 128, 4, 128), yarn_factor=None, sliding_window=7, num_attention_heads=4,
        swiglu_limit=1.0,
    ),
    "one layer": tiny.Deepseek4(
        compress_ratios=(4,), num_hash_layers=0, head_dim=128, index_topk=5, rms_norm_eps=1e-3
    ),
    "all rows": tiny.Deepseek4(compress_ratios=(128, 4), num_hash_layers=1, index_topk=100, qk_rope_head_dim=32),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with localrun.load(tiny.shared(), device="cpu", threads=2, ctx=400, speculative="off") as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine: Engine) -> np.ndarray:
    """float32 (300, vocab), of one chunk."""
    return engine.model.forward(IDS, engine.model.new_cache(N_TOKENS, exact=True), all_logits=True)


def evaluate(engine: Engine, cache: Cache, ids: list[int], sizes: list[int]) -> np.ndarray:
    rows, done = [], 0
    for size in sizes:
        rows.append(engine.model.forward(ids[done : done + size], cache, all_logits=True))
        done += size
    return np.concatenate(rows)


def test_logits_equal_both_programs(expected: np.ndarray) -> None:
    assert error(expected, tiny.hf_logits(tiny.SHARED, tuple(IDS))) < TOLERANCE
    assert error(expected, llama_cpp_oracle.logits(tiny.shared(), IDS)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("m", VARIANTS.values(), ids=VARIANTS)
def test_other_mixes_of_layers_do_too(m: tiny.Deepseek4) -> None:
    with localrun.load(tiny.shared(m), device="cpu", threads=2, ctx=400) as engine:
        found = engine.logits(IDS)
    assert error(found, tiny.hf_logits(m, tuple(IDS))) < TOLERANCE
    assert error(found, llama_cpp_oracle.logits(tiny.shared(m), IDS)) < TOLERANCE


@pytest.mark.parametrize(
    "sizes", [[100, *[1] * 30], [7] * 20, [130, 1, 1, 5, 100, 3, 60]], ids=["one by one", "sevens", "mixed"]
)
def test_however_tokens_come(engine: Engine, expected: np.ndarray, sizes: list[int]) -> None:
    cache = engine.model.new_cache(N_TOKENS, exact=True)
    assert error(evaluate(engine, cache, IDS, sizes), expected[: sum(sizes)]) < TOLERANCE


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MARK_EVERY", 100)
    monkeypatch.setattr(model_config, "OPEN_SPARE", 9)


@pytest.mark.parametrize("length", [299, 290, 289, 129, 127, 5])
def test_a_text_goes_on_from_anywhere(often: None, engine: Engine, expected: np.ndarray, length: int) -> None:
    """At most MARK_EVERY tokens are evaluated again; what was written behind leaves nothing."""
    cache = engine.model.new_cache(N_TOKENS, exact=True)
    evaluate(engine, cache, [*IDS[:200], *reversed(IDS[200:])], [50] * 6)
    evaluate(engine, cache_of(engine, cache, length), IDS, [1])
    cache.truncate(length)
    assert length - 100 < cache.length <= length and (cache.length == length) == (length >= 290)
    cache.truncate(200)  # the text is another one from there on
    start = cache.length
    assert error(evaluate(engine, cache, IDS[start:], [50, 1, 10]), expected[start : start + 61]) < TOLERANCE


def cache_of(engine: Engine, cache: Cache, length: int) -> Cache:
    """A copy, which what is written to must not show in the other one."""
    copy = engine.model.new_cache(N_TOKENS, exact=True)
    copy.copy(cache, length)
    return copy


def test_drafts_come_and_go(engine: Engine, expected: np.ndarray) -> None:
    """Up to 7 tokens that come to nothing after every few, across the ends of windows."""
    cache = engine.model.new_cache(N_TOKENS, exact=True)
    engine.model.forward(IDS[:120], cache)
    rows = []
    for first in range(120, 141, 3):
        engine.model.forward([5, 6, 7, 8, 9, 10, 11], cache)
        cache.truncate(first)
        assert cache.length == first
        rows.append(engine.model.forward(IDS[first : first + 3], cache, all_logits=True))
    assert error(np.concatenate(rows), expected[120:141]) < TOLERANCE


def test_a_saved_session_goes_on(engine: Engine, tmp_path: Path) -> None:
    """Another reply to the same prompt evaluates its last token alone."""
    session, other = engine.session(), engine.session()
    reply = list(session.tokens(IDS[:150], GREEDY, max_tokens=40))
    session.save(tmp_path / "session")
    other.load(tmp_path / "session")
    for each in (session, other):
        assert list(each.tokens(IDS[:150], GREEDY, max_tokens=4)) == reply[:4]
        assert each.stats.reused_tokens == 149
    assert session._cache.n_bytes >= engine.config.kv_bytes(150)


def test_experts_of_a_table_are_checked(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "x.gguf", tiny.Deepseek4(compress_ratios=(4,), num_hash_layers=1))
    content = path.read_bytes()
    table = tiny.tensors(tiny.Deepseek4(compress_ratios=(4,), num_hash_layers=1))["blk.0.ffn_gate_tid2eid.weight"]
    at = content.index(table.tobytes())
    path.write_bytes(content[:at] + (16).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(GGUFError) as caught:
        localrun.load(path, device="cpu", threads=1, ctx=16)
    assert "holds 0 to 16; expected experts 0 to 15" in str(caught.value)
