"""What the parts of a running program ask of each other: an engine of its model, sessions and drafts of their engine.

Models are cpu.model.NativeModel, gpu.hybrid.HybridModel and backends.llama_cpp.LlamaCppModel; the engine is
engine.Engine. Letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from localrun.gguf.file import GGUFFile
from localrun.text.tokenizer import Tokenizer
from localrun.turn import Turn


class KVCache(Protocol):
    """What a model keeps of the tokens of one text, in memory of its own."""

    @property
    def length(self) -> int:
        """Tokens that it holds."""

    def mark(self) -> None:
        """Have truncate() go back to here, whatever comes, where that is not so anyway; as far as memory lasts."""

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on, and those before that kept() says; all, where it says nothing."""

    @property
    def n_bytes(self) -> int:
        """Of memory that it takes by now; 0 where nobody says."""

    def kept(self, length: int) -> int:
        """Tokens that truncate(length) would leave, where that is known before."""

    def copy(self, other: KVCache, length: int) -> None:
        """Hold the first kept(length) tokens of another cache of the same model and capacity."""

    def save(self) -> dict[str, np.ndarray]:
        """The content as named arrays, for a file."""

    def load(self, tensors: dict[str, np.ndarray], length: int) -> None:
        """Take over what save() gave for `length` tokens. Raises LocalrunError if it is something else, or too long."""


class MTPHead(Protocol):
    """A model's head for multi-token prediction."""

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for up to `capacity` positions."""

    def forward(self, next_ids: Sequence[int], hidden: np.ndarray, cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate positions after the cache's: the last one's logits (1, vocab) and what to go on from, (1, D).

        Args:
            next_ids: T tokens, each behind its position.
            hidden: float32 (T, hidden_size), what the model's head reads at these positions.
        """


class Model(Protocol):
    """Token ids in, logits out.

    Attributes:
        vocab_size: logits a token.
        most_together: contexts that can share a step; 1 where each takes its own.
        least_chunk: tokens of a prompt's piece that is evaluated as a whole chunk is; fewer may go another way, which
            rounds differently.
        mtp: the head for multi-token prediction; None if there is none.
    """

    vocab_size: int
    most_together: int
    least_chunk: int

    @property
    def mtp(self) -> MTPHead | None: ...

    def new_cache(self, capacity: int, exact: bool = False) -> KVCache:
        """An empty cache for at least `capacity` tokens; if exact, of 32-bit values where there is the choice."""

    def can_forget(self) -> bool:
        """Whether caches can drop their last tokens alone, as drafts need it."""

    def prepare(self) -> None:
        """Load what only long prompts need."""

    def chunks(self, n_tokens: int) -> list[int]:
        """How many of a prompt's n_tokens to evaluate at a time."""

    def forward(self, ids: Sequence[int], cache: KVCache, all_logits: bool = False) -> np.ndarray:
        """Evaluate ids after the cache's tokens; the cache then holds them too.

        Returns: float32 (T, vocab) logits with all_logits, else (1, vocab), those of the last token.
        Raises: ContextFullError, the cache has no room for them.
        """

    def close(self) -> None:
        """Free what it holds; its caches can't be used afterwards."""


class MTPModel(Model, Protocol):
    """One that has such a head.

    Attributes:
        keep_hidden: whether forward() is to leave `hidden` behind.
        hidden: float32 (T, hidden_size), what the head reads (after the final norm) of the last forward()'s tokens.
    """

    keep_hidden: bool
    hidden: np.ndarray


class BlockDrafter(Protocol):
    """What drafts a block of tokens in one pass, of what a model leaves in `hidden`."""

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for up to `capacity` positions."""

    def keep(self, features: np.ndarray, cache: KVCache) -> None:
        """Take (T, n), of the positions after the cache's."""

    def draft(self, last: int, n: int, cache: KVCache) -> list[int]:
        """Up to n tokens that may follow the cache's and the token `last`."""


class DraftedModel(Model, Protocol):
    """One that such drafts are made for; else as MTPModel.

    Attributes:
        drafter: what makes them; None if nothing does.
    """

    keep_hidden: bool
    hidden: np.ndarray
    drafter: BlockDrafter | None


class SharingModel(Model, Protocol):
    """One whose steps carry tokens of several contexts: most_together is more than 1."""

    def forward_each(self, ids: Sequence[int], caches: Sequence[KVCache]) -> np.ndarray:
        """Evaluate up to most_together ids, each after the tokens of a cache of its own.

        Returns: float32 (T, vocab), the logits after each: to the bit those of forward() with the token alone.
        Raises: ContextFullError, one of the caches has no room; all are as they were.
        """


class Runner(Protocol):
    """An engine, as sessions and drafts see it.

    Attributes:
        backend: whose code runs the model: a saved session is good for that alone.
        ctx: tokens that a session can hold.
        turn: taken around everything that sessions and drafts do with the model or their caches.
    """

    file: GGUFFile
    model: Model
    tokenizer: Tokenizer
    backend: str
    ctx: int
    turn: Turn

    def new_cache(self) -> KVCache:
        """An empty cache for ctx tokens."""

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises LocalrunError unless there are ids and the model knows them all."""
