"""An engine that always says the same, with the real Session around it: for tests of what the user sees."""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from paths import DATA

import localrun
from localrun.errors import LocalrunError
from localrun.generate.drafts import Draft
from localrun.generate.session import Session
from localrun.generate.speculative import Speculation
from localrun.gguf.file import open_gguf
from localrun.limits import cut
from localrun.text.chat_template import CHATML, ChatTemplate
from localrun.turn import Turn

END = 0
_FILE = DATA / "vocab" / "ggml-vocab-gpt-2.gguf"  # for metadata; its vocabulary is not used


class Tokenizer:
    """Bytes as ids; 0 ends a reply."""

    knows_chatml = True
    n_vocab, bos_id, eos_id, add_bos, eog_ids = 256, None, END, False, frozenset({END})
    controls: ClassVar[dict[str, int]] = {}

    def encode(self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        if text == "<|im_end|>" and parse_special and self.knows_chatml:
            return [END]
        return list(text.encode() if isinstance(text, str) else text)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def piece(self, id: int, *, special: bool = False) -> bytes:
        return b"" if id == END and not special else bytes([id])

    def reply_decoder(self) -> "Decoder":
        return Decoder()


class Decoder:
    def push(self, id: int) -> str:
        return chr(id)

    def flush(self) -> str:
        return ""


class Cache:
    def __init__(self) -> None:
        self.ids: list[int] = []

    @property
    def length(self) -> int:
        return len(self.ids)

    def mark(self) -> None:
        pass

    def truncate(self, n: int) -> None:
        del self.ids[n:]

    n_bytes = 0

    def kept(self, length: int) -> int:
        return min(self.length, length)

    def copy(self, other: "Cache", length: int) -> None:
        self.ids = other.ids[:length]

    def save(self) -> dict[str, np.ndarray]:
        return {"ids": np.array(self.ids, np.uint8)}

    def load(self, tensors: dict[str, np.ndarray], length: int) -> None:
        self.ids = tensors["ids"].tolist()
        assert len(self.ids) == length


class Model:
    """The letters of reply, one after the other, from where the assistant's turn (or the whole text) begins.

    turn: what comes before the assistant's turn. most_together: 1, so that replies take turns unless a test shares.
    """

    vocab_size, most_together, least_chunk = 256, 1, 8
    turn = "<|im_start|>assistant\n"

    def __init__(self, reply: str) -> None:
        self.reply = reply
        self.before_step: Callable[[Cache], None] = lambda cache: None

    def chunks(self, n_tokens: int) -> list[int]:
        return cut(n_tokens)

    def can_forget(self) -> bool:
        return True

    def forward(self, ids: Sequence[int], cache: Cache, all_logits: bool = False) -> np.ndarray:
        self.before_step(cache)
        rows = []
        for id in ids:
            cache.ids.append(id)
            text = bytes(cache.ids).decode("latin-1")
            said = text.rpartition(self.turn)[2]
            letters = self.reply if said != text else said + self.reply[:1]
            row = np.full(256, -1e9, np.float32)
            row[ord(letters[len(said)]) if len(said) < len(letters) else END] = 0.0
            rows.append(row)
        return np.stack(rows if all_logits else rows[-1:])

    def forward_each(self, ids: Sequence[int], caches: Sequence[Cache]) -> np.ndarray:
        assert 1 < len(ids) == len(caches) <= self.most_together
        return np.concatenate([self.forward([id], cache) for id, cache in zip(ids, caches, strict=True)])


class Engine:
    """What localrun.load returns, as far as the command line uses it."""

    def __init__(self, reply: str = "Aye, all is well.", ctx: int = 1000, template: bool = True) -> None:
        self.file = open_gguf(_FILE)
        self.tokenizer, self.model = Tokenizer(), Model(reply)
        self.template = ChatTemplate(CHATML, bos_token="", eos_token="") if template else None
        self.backend, self.ctx, self.threads, self.config = "native", ctx, 1, None
        self.loaded_with: dict[str, Any] = {}
        self.placement, self.ranks, self.readers, self.turn = None, None, None, Turn()
        self.draft: Draft | None = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def describe(self) -> dict[str, str | int]:
        return {
            "model": "fake",
            "architecture": "none",
            "backend": self.backend,
            "device": "cpu",
            "threads": 1,
            "ctx": self.ctx,
            "weight_bytes": 5_000_000,
        }

    def prepare(self) -> None:
        """There is nothing to compile."""

    def check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise LocalrunError("the prompt is empty")

    def new_cache(self) -> Cache:
        self.cache = Cache()
        return self.cache

    def heard(self) -> str:
        """The text of the last session, prompts and replies."""
        return bytes(self.cache.ids).decode()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.model.forward(ids, Cache(), all_logits=True)

    def session(self) -> Session:
        speculation = Speculation(self.draft, 2) if self.draft else None
        return Session(self, speculation)  # type: ignore[arg-type]


def install(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A fake behind localrun.load; the test may change what it says."""
    engine = Engine()

    def load(path: Path, **options: Any) -> Engine:
        engine.loaded_with = {"path": path, **options}
        return engine

    monkeypatch.setattr(localrun, "load", load, raising=False)
    return engine


def feed(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    """text on stdin, which is no terminal."""
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
