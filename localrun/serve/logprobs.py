"""Log-probabilities of a reply's tokens, in the forms of the OpenAI API.

They are the model's own, before bias, penalties, constraints and temperature, as llama.cpp and vLLM have them. All of a
reply's tokens have one, those of reasoning and of calls too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from localrun.generate.sampling import Logprobs
from localrun.text.tokenizer import Tokenizer

Document = dict[str, Any]
Writer = Callable[[Sequence[Document], int], Document]


def entry(tokenizer: Tokenizer, each: Logprobs) -> Document:
    """Of one token, as a chat has it."""

    def token(id: int, logprob: float) -> Document:
        piece = tokenizer.piece(id, special=True)
        return {"token": piece.decode("utf-8", "replace"), "bytes": list(piece), "logprob": logprob}

    return {**token(each.id, each.logprob), "top_logprobs": [token(*other) for other in each.top]}


def of_chat(entries: Sequence[Document], offset: int) -> Document:
    """The field logprobs of a chat's choice."""
    return {"content": list(entries), "refusal": None}


def of_text(entries: Sequence[Document], offset: int) -> Document:
    """That of a completion's choice. offset: characters of the tokens before."""
    offsets = []
    for each in entries:
        offsets.append(offset)
        offset += len(each["token"])
    return {
        "tokens": [each["token"] for each in entries],
        "token_logprobs": [each["logprob"] for each in entries],
        "top_logprobs": [{other["token"]: other["logprob"] for other in each["top_logprobs"]} for each in entries],
        "text_offset": offsets,
    }


class Told:
    """How much of one reply's log-probabilities is out: each goes with the first choice that is written after it."""

    def __init__(self, entries: Sequence[Document], write: Writer):
        """entries: a list that grows."""
        self._entries, self._write = entries, write
        self._count = self._offset = 0

    def into(self, choice: Document) -> Document:
        """The choice with what is new."""
        new = self._entries[self._count :]
        if new:
            choice["logprobs"] = self._write(new, self._offset)
            self._count += len(new)
            self._offset += sum(len(each["token"]) for each in new)
        return choice
