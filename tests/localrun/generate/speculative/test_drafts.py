"""What drafts: sessions that go on, draft models, the model's own head; settings that are refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from forced_draft import ForcedDraft
from speculating import CTX, GREEDY, N_VOCAB, SETTINGS, plain, prompt

import localrun
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.generate.drafts import MTPDraft, NGramDraft
from localrun.generate.model_draft import ModelDraft
from localrun.generate.session import Session
from localrun.generate.speculative import Speculation
from localrun.network.cache import Cache


@pytest.mark.parametrize("kind", ["n-gram", "model"])
def test_turns_reuse_what_they_share(engine: Engine, other: Engine, kind: str) -> None:
    draft = NGramDraft(shortest=1) if kind == "n-gram" else ModelDraft(other.session("off"))
    session, ids = Session(engine, Speculation(draft, 3)), prompt(engine, 15)
    for cut in (0, 0, 9, 3):  # a turn more, one more, an edited one, another
        reply = list(session.tokens(ids, GREEDY, max_tokens=9))
        assert reply == plain(engine, ids, 9)
        ids = [*[*ids, *reply][: (len(ids) + 9) - cut], *ids[:3]][: CTX - 10]


def test_a_loaded_session_goes_on(engine: Engine, tmp_path: Path) -> None:
    ids = prompt(engine)
    session = Session(engine, Speculation(NGramDraft(shortest=1), 2))
    first = list(session.tokens(ids, GREEDY, max_tokens=9))
    session.save(tmp_path / "saved")
    loaded = Session(engine, Speculation(ModelDraft(engine.session("off")), 2))
    list(loaded.tokens(ids[::-1], GREEDY, max_tokens=5))
    loaded.load(tmp_path / "saved")
    following = [*ids, *first, 5, 9]
    assert list(loaded.tokens(following, GREEDY, max_tokens=12)) == plain(engine, following, 12)
    assert loaded.stats.reused_tokens == len(ids) + 8


def test_sessions_side_by_side(engine: Engine, other: Engine) -> None:
    a, b = prompt(engine), prompt(engine)[::-1]
    expected = plain(engine, a, 20), plain(engine, b, 20)
    one = Session(engine, Speculation(ModelDraft(other.session("off")), 2)).tokens(a, GREEDY, max_tokens=20)
    two = Session(engine, Speculation(NGramDraft(), "auto")).tokens(b, GREEDY, max_tokens=20)
    assert tuple(map(list, zip(*zip(one, two, strict=True), strict=True))) == expected


def test_a_draft_model_says_what_it_would_say(engine: Engine) -> None:
    ids = prompt(engine)
    draft, expected = ModelDraft(engine.session("off")), plain(engine, ids, 12)
    draft.read(ids)
    assert draft.propose([*ids, *expected[:1]], 3) == expected[1:4]
    draft.forget(len(ids) + 3)
    assert draft.propose([*ids, *expected[:4]], 4) == expected[4:8]


def test_a_draft_model_that_fell_behind_goes_on_from_the_last_tokens(engine: Engine) -> None:
    draft, ids = ModelDraft(engine.session("off")), (prompt(engine) * 5)[:90]
    draft.propose(ids[:10], 2)
    assert draft.propose(ids, 1) == plain(engine, ids[-48:], 1)  # half of its context of 96
    assert draft.propose([*ids, 7, 8, 9], 1) == plain(engine, [*ids[-48:], 7, 8, 9], 1)
    draft.forget(20)  # before where it began
    assert draft.propose(ids[:20], 1) == plain(engine, ids[:20], 1)


def test_a_draft_model_of_a_shorter_context(engine: Engine) -> None:
    variant = "v3" if engine.config.kv_lora_rank else "llama"
    with localrun.load(tiny_models.shared(variant), threads=1, ctx=20) as small:
        ids = prompt(engine, 40)
        session = Session(engine, Speculation(ModelDraft(small.session("off")), 4))
        assert list(session.tokens(ids, GREEDY, max_tokens=50)) == plain(engine, ids, 50)
        assert session.stats.drafted_tokens > 40


class Head:
    """A head for multi-token prediction that knows what the model will say, and checks what it is given.

    A hidden state holds the token it belongs to and a mark of those before it, so that none can be taken for another.
    """

    def __init__(self, engine: Engine, acceptance: float):
        self.engine, self.acceptance, self.random = engine, acceptance, random.Random(0)
        self.ids: list[int] = []  # that the model has evaluated, those that will be taken back too
        self.truth: list[int] = []
        self.mtp, self.keep_hidden, self.longest = self, False, 0

    @staticmethod
    def state(ids: Sequence[int]) -> np.ndarray:
        return np.array([len(ids), ids[-1], hash(tuple(ids)) % 4093], np.float32)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = self.engine.model.forward

        def watched(ids: list[int], cache: Cache, all_logits: bool = False) -> np.ndarray:
            self.ids[cache.length :] = ids
            self.hidden = np.stack([self.state(self.ids[: cache.length + i + 1]) for i in range(len(ids))])
            return forward(ids, cache, all_logits)

        monkeypatch.setattr(self.engine.model, "forward", watched)

    def new_cache(self, capacity: int) -> Cache:
        return Cache([], capacity, np.float16)

    def forward(self, next_ids: Sequence[int], hidden: np.ndarray, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
        assert len(next_ids) == len(hidden) > 0 and self.keep_hidden
        assert int(hidden[0, 0]) - 1 == self.draft._first + cache.length  # rows of the cache without a gap
        cache.check_room(len(next_ids))
        cache.advance(len(next_ids))
        self.longest = max(self.longest, len(next_ids))
        text = self.ids[: int(hidden[0, 0])]
        for token, state in zip(next_ids, hidden, strict=True):
            assert np.array_equal(state, self.state(text))
            text = [*text, int(token)]
        token = self.truth[len(text)] if len(text) < len(self.truth) else 0
        token = token if self.random.random() < self.acceptance else token ^ 1
        self.ids[len(text) - 1 :] = text[-1:]  # a chained row's state includes this token
        return np.eye(1, N_VOCAB, token, dtype=np.float32), self.state(text)[None]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_the_models_own_head_gets_each_state_with_the_token_after_it(
    engine: Engine, setting: str | int, acceptance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over turns that go on, that are edited, and that begin anew; a long prompt is read in part."""
    head = Head(engine, acceptance)
    turns = [prompt(engine, 30)]
    replies = [plain(engine, turns[0], 12)]
    for cut in (0, 9, 40):
        turns.append([*[*turns[-1], *replies[-1]][: 42 - cut], 3, 1, 4])
        replies.append(plain(engine, turns[-1], 12))
    head.watch(monkeypatch)
    monkeypatch.setattr(MTPDraft, "_WINDOW", 16)
    head.draft = MTPDraft(head, CTX)
    session = Session(engine, Speculation(head.draft, setting))
    for ids, expected in zip(turns, replies, strict=True):
        head.truth = [*ids, *expected]
        assert list(session.tokens(ids, GREEDY, max_tokens=12)) == expected
        if setting != "auto":
            assert session.stats.drafted_tokens >= 10 - session.stats.accepted_tokens  # the last needs none
            assert acceptance < 1 or session.stats.accepted_tokens == session.stats.drafted_tokens
            assert head.draft._first < len(ids)  # it did not begin anew in the reply
    assert head.longest in (15, 16)  # the prompt's end, then what was kept of it


@pytest.mark.parametrize(
    ("variant", "setting"),
    [*(("v3-nextn", setting) for setting in SETTINGS), ("glm4moe", 2), ("hy_v3", 2)],
)
def test_a_file_with_a_head_uses_it(variant: str, setting: str | int, tmp_path: Path) -> None:
    """Of random weights: almost never right, over turns and a saved session."""
    with localrun.load(tiny_models.shared(variant), threads=2, ctx=CTX, speculative=setting) as model:
        session, ids = model.session(), tiny_models.prompt(variant)
        assert session.speculation.draft.name == "mtp"
        for n in (40, 12, 50):
            assert list(session.tokens(ids[:n], GREEDY, max_tokens=30)) == plain(model, ids[:n], 30)
            assert session.stats.drafted_tokens > 0 or setting == "auto"
        session.save(tmp_path / "saved")
        loaded = model.session()
        loaded.load(tmp_path / "saved")
        following = [*loaded.ids, 1, 2, 3]
        assert list(loaded.tokens(following, GREEDY, max_tokens=12)) == plain(model, following, 12)


@pytest.mark.parametrize("value", ["x", "5", 0, "0", 5, "", "1.5", True])
def test_settings_that_are_none(value: object) -> None:
    with pytest.raises(LocalrunError, match="expected auto, off, or 1 to 4 drafts a step"):
        localrun.load(tiny_models.shared("llama"), speculative=value)


def test_a_draft_model_while_off() -> None:
    with pytest.raises(LocalrunError, match="a draft model, but speculative 'off'"):
        localrun.load(tiny_models.shared("llama"), speculative="off", draft=tiny_models.shared("llama", seed=1))


def test_a_draft_model_of_another_vocabulary() -> None:
    with pytest.raises(LocalrunError) as caught:
        localrun.load(tiny_models.shared("llama"), threads=1, draft=tiny_models.shared("v2-lite"))
    assert "its vocabulary is another (160 tokens; " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["auto", 3])
def test_a_draft_model_by_its_file(setting: str | int) -> None:
    path, ids = tiny_models.shared("llama"), tiny_models.prompt("llama")
    with localrun.load(
        path, threads=1, ctx=CTX, speculative=setting, draft=tiny_models.shared("llama", seed=1)
    ) as model:
        session = model.session()
        assert session.speculation.draft.name == "draft model" and session.speculation.setting == setting
        assert list(session.tokens(ids, GREEDY, max_tokens=20)) == plain(model, ids, 20)
        assert list(model.generate(ids, GREEDY, max_tokens=20)) == plain(model, ids, 20)


def test_llama_cpp_verifies_on_request_only() -> None:
    path, ids = tiny_models.shared("llama"), tiny_models.prompt("llama")
    with localrun.load(path, threads=1, ctx=CTX, backend="llama.cpp") as model:
        assert model.speculative == "off" and model.session().speculation is None
        expected = plain(model, ids, 30)
    with localrun.load(path, threads=1, ctx=CTX, backend="llama.cpp", speculative=2) as model:
        session = Session(model, Speculation(ForcedDraft([*ids, *expected], 0.6, N_VOCAB), 2))
        # Float32 weights: rows together or alone differ by 1e-6 of the range, the two likeliest of these by far more.
        assert list(session.tokens(ids, GREEDY, max_tokens=30)) == expected
        assert 0 < session.stats.accepted_tokens < session.stats.drafted_tokens
