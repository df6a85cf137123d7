"""Any GGUF model through llama.cpp, by llama-cpp-python's low-level interface: token ids in, logits out.

Runs on the CPU. Knows nothing of text or sampling. What the functions promise is in include/llama.h of
https://github.com/ggml-org/llama.cpp.

Legend: T new tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakSet, finalize

import numpy as np

from localrun.backends import binding, llama_log
from localrun.backends.loading import load
from localrun.errors import ContextFullError, LocalrunError
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.limits import cut

Progress = Callable[[int, int, str], None]

_SEQUENCE = 0  # each cache is a context of its own, with this one sequence


class LlamaCppModel:
    """A model loaded by llama.cpp. Its caches share the weights and must not be used after close().

    Attributes:
        vocab_size: logits a token.
        most_together, least_chunk: 1: each cache is a context of llama.cpp's, where all goes one way.
        mtp: None: llama.cpp's heads for multi-token prediction are not used.

    Args:
        path: the GGUF file, or the first part of a split one.
        file: the same file, already open; else it is opened and closed.

    Raises GGUFError or LocalrunError, one line naming the file and llama.cpp's reason, if it cannot be loaded.
    """

    most_together, least_chunk, mtp = 1, 1, None

    def __init__(
        self, path: Path | str, ctx: int, threads: int, progress: Progress | None = None, file: GGUFFile | None = None
    ) -> None:
        import llama_cpp

        self.path, self.ctx, self.threads = Path(path), ctx, threads
        with nullcontext(file) if file else open_gguf(path) as opened:
            self._model = _load(opened, threads, progress)
        self._free = finalize(self, llama_cpp.llama_model_free, self._model)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.train_context: int = llama_cpp.llama_model_n_ctx_train(self._model)
        self._caches: WeakSet[LlamaCppCache] = WeakSet()

    def new_cache(self, capacity: int | None = None, exact: bool = False) -> LlamaCppCache:
        """An empty cache of ctx tokens in 16 bits, whatever is asked for: llama.cpp's are all alike.

        Raises LocalrunError if there is no memory for it, or nothing to cache.
        """
        cache = LlamaCppCache(self, self._model)
        self._caches.add(cache)
        return cache

    def can_forget(self) -> bool:
        """Whether caches can drop their last tokens alone; a recurrent network's can't. Found out by trying."""
        cache = self.new_cache()
        self.forward([0, 0], cache)
        cache.truncate(1)
        can_forget = cache.length == 1
        cache.close()
        return can_forget

    def prepare(self) -> None:
        """Nothing: it is loaded."""

    def chunks(self, n_tokens: int) -> list[int]:
        """How many of a prompt's n_tokens to evaluate at a time."""
        return cut(n_tokens)

    def forward(self, ids: Sequence[int], cache: LlamaCppCache, all_logits: bool = False) -> np.ndarray:
        """Logits after the last of ids, float32 (1, vocab), or after each of them, (T, vocab), if all_logits.

        The ids follow the cache.length tokens already in cache, and are in it afterwards. Raises ContextFullError if
        they do not fit and LocalrunError for an id that the vocabulary lacks; the cache is then as it was.
        """
        self._check_ids(ids, cache.length)
        rows = []
        for start in range(0, len(ids), cache.batch_size):
            chunk = ids[start : start + cache.batch_size]
            is_last = start + len(chunk) == len(ids)
            logits = cache.evaluate(chunk, len(chunk) if all_logits else int(is_last), self.vocab_size)
            rows.append(logits)
        return np.concatenate(rows)

    def close(self) -> None:
        """Frees the caches and the weights. Idempotent."""
        for cache in list(self._caches):
            cache.close()
        self._free()

    def _check_ids(self, ids: Sequence[int], length: int) -> None:
        if not ids:
            raise LocalrunError(f"{self.path}: no tokens to evaluate, expected at least one")
        if length + len(ids) > self.ctx:
            raise ContextFullError(f"{length + len(ids)} tokens do not fit in a context of {self.ctx}")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            wrong = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise LocalrunError(f"{self.path}: token id {wrong}, expected 0 to {self.vocab_size - 1}")


class LlamaCppCache:
    """What llama.cpp remembers of one sequence: keys and values, or a recurrent state. Made by new_cache()."""

    def __init__(self, model: LlamaCppModel, handle: Any) -> None:
        import llama_cpp

        self._context = binding.new_context(handle, model.ctx, model.threads)
        if not self._context:
            reason = llama_log.last_error() or "no reason given"
            raise LocalrunError(f"{model.path}: llama.cpp cannot make a context of {model.ctx} tokens: {reason}")
        self._free = finalize(self, llama_cpp.llama_free, self._context)
        self._memory = llama_cpp.llama_get_memory(self._context)
        if not self._memory or llama_cpp.llama_model_has_encoder(handle):
            raise LocalrunError(f"{model.path}: an encoder, expected a model that generates text")
        self._path = model.path
        self._owner = model  # keeps the weights alive as long as any cache
        self.batch_size: int = llama_cpp.llama_n_batch(self._context)

    @property
    def length(self) -> int:
        """Tokens in the cache; asked of llama.cpp, so it is right after an interrupted evaluation too."""
        import llama_cpp

        return llama_cpp.llama_memory_seq_pos_max(self._memory, _SEQUENCE) + 1

    def mark(self) -> None:
        """Nothing: llama.cpp keeps what it keeps."""

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on; all of them where the model cannot forget a part (a recurrent state).

        The caller looks at length afterwards and evaluates again what is missing.
        """
        import llama_cpp

        if length < self.length and not llama_cpp.llama_memory_seq_rm(self._memory, _SEQUENCE, length, -1):
            llama_cpp.llama_memory_clear(self._memory, True)

    @property
    def n_bytes(self) -> int:
        """0: llama.cpp does not say."""
        return 0

    def kept(self, length: int) -> int:
        """Tokens that truncate(length) leaves where the model can forget a part."""
        return min(self.length, max(0, length))

    def copy(self, other: LlamaCppCache, length: int) -> None:
        """Hold the first tokens of another cache of this model; none where the model can't forget a part."""
        self.load(other.save(), other.length)
        self.truncate(length)

    def save(self) -> dict[str, np.ndarray]:
        """The state of the sequence, uint8, for load() into a cache of the same model. It holds no logits."""
        import llama_cpp

        size = llama_cpp.llama_state_seq_get_size(self._context, _SEQUENCE)
        buffer = (ctypes.c_uint8 * size)()
        written = llama_cpp.llama_state_seq_get_data(self._context, buffer, size, _SEQUENCE)
        return {"state": np.ctypeslib.as_array(buffer)[:written]}

    def load(self, tensors: dict[str, np.ndarray], length: int) -> None:
        """Replaces what is in the cache by what save() gave for `length` tokens.

        Raises LocalrunError if it does not fit, and is then empty, or if it holds another number of tokens.
        """
        self._load(tensors["state"].tobytes() if "state" in tensors else b"")
        if self.length != length:
            raise LocalrunError(f"the saved session holds {self.length} tokens; expected {length}")

    def _load(self, state: bytes) -> None:
        import llama_cpp

        pointer = ctypes.cast(ctypes.c_char_p(state), ctypes.POINTER(ctypes.c_uint8))
        llama_log.clear()
        read = llama_cpp.llama_state_seq_set_data(self._context, pointer, len(state), _SEQUENCE)
        if not state or read != len(state):
            llama_cpp.llama_memory_clear(self._memory, True)
            reason = llama_log.last_error() or "its length is wrong"
            raise LocalrunError(f"{self._path}: a saved state that is not one of this model and context: {reason}")

    def evaluate(self, ids: Sequence[int], n_logits: int, vocab_size: int) -> np.ndarray:
        """Appends ids, at most batch_size of them; the logits after the last n_logits, float32 (n_logits, vocab)."""
        import llama_cpp

        start = self.length
        status = binding.evaluate(self._context, ids, start, n_logits)
        if status:
            self.truncate(start)
            reason = llama_log.last_error() or "no reason given"
            raise LocalrunError(f"{self._path}: llama.cpp failed to evaluate {len(ids)} tokens ({status}): {reason}")
        if not n_logits:
            return np.empty((0, vocab_size), np.float32)
        rows = llama_cpp.llama_get_logits(self._context)  # those asked for only, in order
        return np.ctypeslib.as_array(rows, (n_logits, vocab_size)).copy()

    def close(self) -> None:
        """Frees the memory. Idempotent."""
        self._free()


def _load(file: GGUFFile, threads: int, progress: Progress | None) -> Any:
    def report(fraction: float) -> None:
        if progress is not None:
            progress(int(fraction * file.file_size), file.file_size, "loading")

    if progress is not None:
        progress(0, file.file_size, "checking with llama.cpp")
    # On CPUs with AMX, llama.cpp puts weights into AMX buffers, and aborts on the batched product with attn_k_b that
    # multi-head latent attention makes (deepseek2 and its relatives).
    batched = any(name.endswith(".attn_k_b.weight") for name in file.tensors)
    return load(file, threads, use_extra_bufts=not batched, progress=report)
