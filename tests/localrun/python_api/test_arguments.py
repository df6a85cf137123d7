"""Wrong arguments from Python: one line that names which, and what was expected."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_engines import GREEDY, alone

import localrun
from localrun.bundled import MINIATURE
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.generate.sampling import Sampling
from localrun.text.chat_template import CHATML, ChatTemplate
from localrun.text.prompt import chat_ids

HUGE = 10**5000  # Python refuses to write it out


def name_of(value: Any) -> str:
    return "huge" if isinstance(value, int) and abs(value) == HUGE else str(value)[:20]


WRONG_IDS = {
    "text": "abc",
    "bytes": b"abc",
    "fractions": [1.0, 2.5],
    "an array of fractions": np.array([1.0, 2.0]),
    "a truth": [True],
    "texts": ["1", "2"],
    "none": None,
    "nothing in it": [None],
    "a number": 5,
    "an array without dimensions": np.array(5),
    "rows": np.ones((2, 2), np.int64),
    "a set": {1, 2},
    "negative": [1, -1],
    "beyond the vocabulary": [10**6],
    "beyond all": [HUGE],
    "no ids": [],
}


@pytest.mark.parametrize("name", WRONG_IDS)
def test_wrong_ids(engine: Engine, name: str) -> None:
    ids = WRONG_IDS[name]
    for use in (engine.logits, engine.generate, engine.session().tokens, engine.session().reply):
        with pytest.raises(LocalrunError, match=r"ids|token id|prompt") as caught:
            use(ids)
        assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ids",
    [(1, 2), np.array([1, 2]), np.array([1, 2], np.uint16), [np.int64(1), np.int8(2)], range(1, 3)],
    ids=str,
)
def test_ids_of_all_kinds(engine: Engine, ids: Any) -> None:
    assert list(engine.generate(ids, GREEDY, max_tokens=4)) == alone(engine, [1, 2], 4)
    assert list(engine.generate(iter(ids), GREEDY, max_tokens=4)) == alone(engine, [1, 2], 4)


def test_ids_in_a_torch_tensor(engine: Engine) -> None:
    assert list(engine.generate(torch.tensor([1, 2]), GREEDY, max_tokens=4)) == alone(engine, [1, 2], 4)


WRONG_REPLIES: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (-1, 1.5, 2.0, "5", True, float("nan"), -HUGE, [1])),
    *(("sampling", value) for value in (0.7, {"temperature": 1}, "greedy", Sampling)),
    *(("stop", value) for value in (5, b"x", ["a", 5], [None], {"a": 1}, True)),
    *(("progress", value) for value in (5, "x", True)),
]


@pytest.mark.parametrize(("name", "value"), WRONG_REPLIES, ids=name_of)
def test_wrong_arguments_of_a_reply(engine: Engine, name: str, value: Any) -> None:
    with pytest.raises(LocalrunError, match=rf"^{name} is ") as caught:
        engine.session().reply([1, 2], **{name: value})
    assert len(str(caught.value)) < 200


@pytest.fixture(scope="module")
def story_model() -> Iterator[Engine]:
    """One with a vocabulary."""
    with localrun.load(MINIATURE, threads=1, ctx=64) as model:
        yield model


def test_one_stop_text(story_model: Engine) -> None:
    """A text is not a list of letters."""
    session, ids = story_model.session(), story_model.tokenizer.encode("Once upon a time")
    whole = "".join(session.reply(ids, GREEDY, max_tokens=30))
    found = "".join(session.reply(ids, GREEDY, max_tokens=30, stop=whole[4:8]))
    assert found == whole[: whole.index(whole[4:8])] and session.finish_reason == "stop"


WRONG_SAMPLING: list[tuple[str, Any]] = [
    ("temperature", "0.5"),
    ("temperature", None),
    ("temperature", True),
    ("temperature", HUGE),
    ("temperature", 1j),
    ("temperature", np.float32("nan")),
    ("top_p", [0.5]),
    ("min_p", "x"),
    ("repeat_penalty", None),
    ("top_k", 5.5),
    ("top_k", 5.0),
    ("top_k", "5"),
    ("top_k", None),
    ("repeat_last_n", 1.5),
    ("seed", 1.5),
    ("seed", "x" * 10_000),
    ("seed", -HUGE),
    ("seed", True),
    ("presence_penalty", None),
    ("logit_bias", None),
    ("constraint", {"type": "object"}),
    ("top_logprobs", 1.0),
]


@pytest.mark.parametrize(("name", "value"), WRONG_SAMPLING, ids=name_of)
def test_wrong_settings(name: str, value: Any) -> None:
    with pytest.raises(LocalrunError, match=rf"^{name} is ") as caught:
        Sampling(**{name: value})
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_settings_from_numpy_and_of_any_size(engine: Engine) -> None:
    sampling = Sampling(np.float32(0.5), np.int64(5), np.float64(0.5), 0, np.float16(1), np.int32(5), np.uint8(5))
    assert sampling == Sampling(0.5, 5, 0.5, 0.0, 1.0, 5, 5)
    large = Sampling(1e308, HUGE, 1, 0, 1e308, HUGE, HUGE)
    tiny = Sampling(5e-324, 1, 5e-324, 1, 5e-324, -1, 0)
    for extreme in (large, tiny):
        assert len(list(engine.generate([1, 2], extreme, max_tokens=3))) <= 3


WRONG_LOADS: list[tuple[str, Any]] = [
    *(("path", value) for value in (None, 5, ["x"], True)),
    *(("draft", value) for value in (5, ["x"])),
    *(("device", value) for value in ("gpu", None, 5, np.array(["cpu", "cuda"]))),
    *(("threads", value) for value in (0, -1, 1.5, "2", True, 513, HUGE)),
    *(("ctx", value) for value in (0, "128", 1.5, 2**31, HUGE, float("nan"))),
    *(("backend", value) for value in ("cuda", None, 5)),
    *(("vram", value) for value in ("8", 0, float("nan"), HUGE, True)),
    *(("gpu_experts", value) for value in ("x", None, 1.5, -1, True)),
    *(("cache_bits", value) for value in (4, "16", None, 12, 16.0)),
    *(("expert_usage", value) for value in (5, True)),
    *(("repack", value) for value in ("no", None, 1)),
    *(("dense_attention", value) for value in ("no", None, 1)),
    *(("speculative", value) for value in (None, 0, 5, 2.0, True, "on", np.array([1, 2]))),
    *((name, value) for name in ("progress", "notice", "placed") for value in (5, "x")),
]


@pytest.mark.parametrize(("name", "value"), WRONG_LOADS, ids=name_of)
def test_wrong_arguments_of_load(name: str, value: Any) -> None:
    with pytest.raises(LocalrunError, match=rf"^{name} is ") as caught:
        localrun.load(**{"path": MINIATURE} | {name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [0, 5, "on", True])
def test_wrong_settings_of_a_session(engine: Engine, value: Any) -> None:
    with pytest.raises(LocalrunError, match=r"^speculative is "):
        engine.session(value)


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda tokenizer: tokenizer.encode(5), "text"),
        (lambda tokenizer: tokenizer.encode(None), "text"),
        (lambda tokenizer: tokenizer.encode(["a"]), "text"),
        (lambda tokenizer: tokenizer.decode("abc"), "ids"),
        (lambda tokenizer: tokenizer.decode(5), "ids"),
        (lambda tokenizer: tokenizer.decode([1.5]), r"ids\[0\]"),
        (lambda tokenizer: tokenizer.decode([HUGE]), "token id"),
        (lambda tokenizer: tokenizer.piece(1.5), "id"),
        (lambda tokenizer: tokenizer.piece(-1), "token id"),
    ],
)
def test_wrong_arguments_of_the_tokenizer(story_model: Engine, use: Callable[[Any], Any], name: str) -> None:
    with pytest.raises(LocalrunError, match=f"^{name} ") as caught:
        use(story_model.tokenizer)
    assert len(str(caught.value)) < 300  # one names the file


@pytest.mark.parametrize(
    ("messages", "name"),
    [
        (None, "messages"),
        ("hi", "messages"),
        ({"role": "user", "content": "hi"}, "messages"),
        (["hi"], r"messages\[0\]"),
        ([{"role": "user"}], r"messages\[0\]\['content'\]"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 5}], r"messages\[1\]\['content'\]"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\]\['content'\]"),
        ([{"content": "x"}], r"messages\[0\]\['role'\]"),
    ],
)
def test_wrong_messages(story_model: Engine, messages: Any, name: str) -> None:
    template = ChatTemplate(CHATML, bos_token="", eos_token="")
    with pytest.raises(LocalrunError, match=f"^{name} is "):
        chat_ids(template, story_model.tokenizer, messages)
    with pytest.raises(LocalrunError):
        template.render(messages)


@pytest.mark.parametrize("value", [5, None, ["x"]])
def test_wrong_paths_of_a_session(engine: Engine, value: Any) -> None:
    for use in (engine.session().save, engine.session().load):
        with pytest.raises(LocalrunError, match=r"^path is "):
            use(value)


def test_load_takes_what_the_command_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ok.gguf").symlink_to(MINIATURE)
    for path in (
        "miniature",
        "Miniature",
        "~/ok.gguf",
        Path("~/ok.gguf"),
        tmp_path / "ok.gguf",
        os.fsencode(MINIATURE),
    ):
        with localrun.load(path, threads=1, ctx=16) as engine:
            assert engine.file.path.resolve() == MINIATURE
    for path in ("nosuchmodel", "x\0y", "~/nosuchfile.gguf"):
        with pytest.raises(LocalrunError, match=r"no such file|is no file name"):
            localrun.load(path)


def test_threads_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ulimit -v: one line, and those that did start have ended."""
    start, begun = threading.Thread.start, []

    def few(thread: threading.Thread) -> None:
        if len(begun) == 5:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", few)
    with pytest.raises(LocalrunError, match="20 threads can't be started here, for want of memory; ask for fewer"):
        localrun.load(MINIATURE, threads=20)
    assert len(begun) == 5 and not any(thread.is_alive() for thread in begun)
