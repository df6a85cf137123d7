"""deepseek4 against transformers and llama.cpp, far beyond windows and open pooled rows, in every way that tokens come.

Tolerances are fractions of the logit range. Caches have 32 bits: with 16, another expert or row is chosen now and then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import llama_cpp_oracle
import numpy as np
import pytest
import tiny_deepseek4 as tiny
import torch
from closeness import error

import localrun
from localrun.cpu.bridge import AttendChosen
from localrun.engine import Engine
from localrun.errors import GGUFError
from localrun.models import config as model_config
from localrun.network import cache as cache_module
from localrun.network.cache import Cache
from localrun.network.weight_source import Seen, Turned
from quant.threads.pool import Pool

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


# ---- kernels ---------------------------------------------------------------------------------------------------------


def attended(q_THd: torch.Tensor, seen: Seen, turned: Turned, sinks_H: torch.Tensor) -> torch.Tensor:
    """What attention is to give, token by token in float64."""
    n_tokens = q_THd.shape[0]
    n_rope, out = 2 * turned.turns.shape[-1], []
    q_THd = q_THd.double()
    q_THd = q_THd / (q_THd.square().mean(-1, keepdim=True) + turned.epsilon).sqrt()
    for t, turn in enumerate(turned.turns):
        q_Hd = torch.cat([q_THd[t, :, :-n_rope], turned_pairs(q_THd[t, :, -n_rope:], turn)], -1)
        last = seen.window_SW.shape[0] - n_tokens + t + 1
        rows = [seen.window_SW[max(0, last - seen.window) : last]]
        if seen.keys_SW is not None:
            n_seen = (seen.n_before + t + 1) // seen.ratio
            chosen = torch.arange(n_seen) if seen.chosen_TK is None else seen.chosen_TK[t, :n_seen].long()
            rows.append(seen.keys_SW[chosen])
        rows_Sd = torch.cat(rows).double()
        weights = torch.cat([0.7 * q_Hd @ rows_Sd.T, sinks_H.double()[:, None]], -1).softmax(-1)
        mixed_Hd = weights[:, :-1] @ rows_Sd
        out.append(torch.cat([mixed_Hd[:, :-n_rope], turned_pairs(mixed_Hd[:, -n_rope:], turn.conj())], -1))
    return torch.stack(out)


def turned_pairs(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn.to(torch.complex128)).flatten(-2)


@pytest.mark.parametrize(
    ("dtype", "n_heads", "ratio", "top_k", "n_before"),
    [
        (torch.float32, 8, 4, 30, 250), (torch.float16, 40, 4, 30, 100), (torch.float16, 70, 128, None, 1000),
        (torch.float32, 3, None, None, 0),
    ],
)  # fmt: skip
def test_attention_over_pooled_rows_and_a_window(
    dtype: torch.dtype, n_heads: int, ratio: int | None, top_k: int | None, n_before: int
) -> None:
    """Queries as they are projected, in place; windows that are not full yet; chosen rows, all of them, and none."""
    generator, (n_tokens, window, width, n_rope) = torch.Generator().manual_seed(n_heads), (41, 16, 48, 12)
    ahead = min(window - 1, n_before)
    queries, rows, pooled, sinks = (
        torch.randn(*shape, generator=generator)
        for shape in ((n_tokens, n_heads, width), (ahead + n_tokens, width), (300, width), (n_heads,))
    )
    angles = torch.rand(n_tokens, 1, n_rope // 2, generator=generator) * 6
    turned = Turned(torch.polar(torch.ones_like(angles), angles), 1e-3)
    chosen = None
    if top_k:
        n_seen = (n_before + 1) // ratio
        chosen = torch.stack([torch.randperm(n_seen, generator=generator)[:top_k] for _ in range(n_tokens)]).int()
        chosen = torch.nn.functional.pad(chosen, (0, top_k - chosen.shape[1]), value=n_seen)
    seen = Seen(n_before, pooled.to(dtype) if ratio else None, ratio or 1, chosen, rows.to(dtype), window)
    expected = attended(queries, seen, turned, sinks)
    with closing(Pool(2)) as pool:
        AttendChosen(pool)([queries], seen, 0.7, queries, sinks, turned)
    # Scores are up to 30 here, so that their float32 rounding moves weights by 2e-6. Beside rows of 16 bits 16-bit
    # integers are multiplied: each row is rounded once more, by about as much as it was.
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(queries.double(), expected, rtol=1e-5, atol=tolerance)
