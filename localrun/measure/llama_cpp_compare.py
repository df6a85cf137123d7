"""llama.cpp in the fastest configuration that works here, to be measured against.

Weights are repacked at load where llama.cpp does so and RAM holds both copies; flash attention is tried on and off, and
each kind of work uses what was faster. Knows nothing of text. Functions: include/llama.h of
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import inf
from typing import Any

from localrun import hardware
from localrun.backends import llama_log
from localrun.backends.loading import load
from localrun.errors import LocalrunError
from localrun.gguf.file import GGUFFile

N_BATCH = 512
_TRIALS, _TRIAL_PROMPT, _TRIAL_REPLY = 3, 32, 6  # how often, tokens


class TimedLlamaCpp:
    """A loaded model with an empty context; a bench.TimedEngine.

    Attributes:
        description: how it runs, for the reader of its figures.
    """

    def __init__(self, file: GGUFFile, threads: int, ctx: int, sequences: int = 1) -> None:
        """Load it, for so many sequences of ctx tokens. Raises LocalrunError with llama.cpp's reason."""
        if file.is_interleaved:
            raise LocalrunError(f"{file.path}: has interleaved rows, which llama.cpp can't read; give the plain file")
        import llama_cpp

        self._lib, repacks = llama_cpp, _may_repack(file)
        self._model = load(file, threads, use_extra_bufts=repacks)
        contexts = {flash: self._context(threads, ctx, sequences, flash) for flash in (True, False)}
        self._contexts = {flash: context for flash, context in contexts.items() if context}
        if not self._contexts:
            self.close()
            raise LocalrunError(f"{file.path}: llama.cpp cannot make a context: {llama_log.last_error()}")
        self._held: list[int] = []
        self._for_prompt, self._for_reply = self._choose()
        self.hold([])
        self.description: dict[str, Any] = {
            "weights": "repacked where it can" if repacks else "as mapped",
            "flash_attention": {"prompt": self._for_prompt, "generation": self._for_reply},
            "threads": threads,
            "n_batch": N_BATCH,
        }

    def _context(self, threads: int, ctx: int, sequences: int, flash: bool) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = max(ctx, _TRIAL_PROMPT) * sequences, sequences
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_threads = params.n_threads_batch = threads
        on, off = self._lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = on if flash else off
        params.offload_kqv = params.op_offload = False
        return self._lib.llama_init_from_model(self._model, params)

    def _choose(self) -> tuple[bool, bool]:
        """Whether flash attention is on, for prompts and for replies: what was faster in the best of some tries."""
        prompt_s, reply_s = dict.fromkeys(self._contexts, inf), dict.fromkeys(self._contexts, inf)
        for _ in range(_TRIALS):
            for flash in self._contexts:
                self._for_prompt = self._for_reply = flash
                self.hold([])
                prompt_s[flash] = min(prompt_s[flash], self.prompt([1] * _TRIAL_PROMPT))
                self.hold([])
                reply_s[flash] = min(reply_s[flash], *self.generate([1] * _TRIAL_REPLY))
        return min(prompt_s, key=prompt_s.__getitem__), min(reply_s, key=reply_s.__getitem__)

    def hold(self, ids: Sequence[int]) -> None:
        """Have a context of these tokens, where prompts and where replies are evaluated."""
        contexts = [self._contexts[flash] for flash in {self._for_prompt, self._for_reply}]
        same = list(ids) == self._held
        for context in contexts:
            memory = self._lib.llama_get_memory(context)
            if not (same and self._lib.llama_memory_seq_rm(memory, 0, len(ids), -1)):
                self._lib.llama_memory_clear(memory, True)
                self._read(context, ids, 0)
        self._held = list(ids)

    def prompt(self, ids: Sequence[int]) -> float:
        """Evaluate a prompt behind what is held, with the logits of its last token; seconds of it."""
        start = time.perf_counter()
        self._read(self._contexts[self._for_prompt], ids, len(self._held))
        return time.perf_counter() - start

    def _read(self, context: Any, ids: Sequence[int], position: int) -> None:
        for start in range(0, len(ids), N_BATCH):
            chunk = ids[start : start + N_BATCH]
            self._evaluate(context, _in_a_row(chunk, position + start), start + len(chunk) == len(ids))

    def generate(self, ids: Sequence[int]) -> list[float]:
        """Evaluate the ids one by one behind what is held; seconds of each."""
        context = self._contexts[self._for_reply]
        seconds = []
        for position, token in enumerate(ids, len(self._held)):
            start = time.perf_counter()
            self._evaluate(context, [(token, position, 0)], True)
            seconds.append(time.perf_counter() - start)
        return seconds

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Have sequences 0, 1 and so on hold these prompts, each of at most N_BATCH tokens, and nothing else."""
        context = self._contexts[self._for_reply]
        self._lib.llama_memory_clear(self._lib.llama_get_memory(context), True)
        for sequence, ids in enumerate(prompts):
            self._evaluate(context, _in_a_row(ids, 0, sequence), False)

    def step(self, ids: Sequence[int], position: int, prompt: Sequence[int] = (), start: int = 0) -> None:
        """Evaluate a token of each of the first sequences, at one position, with logits; and a piece of the prompt of
        the sequence behind them, from `start` on."""
        tokens = [(token, position, sequence) for sequence, token in enumerate(ids)]
        context = self._contexts[self._for_reply]
        self._evaluate(context, [*_in_a_row(prompt, start, len(ids)), *tokens], True, n_logits=len(ids))

    def cut(self, length: int) -> None:
        """Have all sequences forget their tokens from `length` on."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._contexts[self._for_reply]), -1, length, -1)

    def _evaluate(
        self, context: Any, tokens: Sequence[tuple[int, int, int]], wants_logits: bool, n_logits: int = 1
    ) -> None:
        """tokens: id, position and sequence of each; the last n_logits have logits, if they are wanted."""
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, (token, position, sequence) in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = wants_logits and i >= len(tokens) - n_logits
            status = self._lib.llama_decode(context, batch)
            self._lib.llama_synchronize(context)
        finally:
            self._lib.llama_batch_free(batch)
        if status:
            raise LocalrunError(
                f"llama.cpp failed to evaluate {len(tokens)} tokens ({status}): {llama_log.last_error()}"
            )

    def close(self) -> None:
        """Free it."""
        for context in self._contexts.values():
            self._lib.llama_free(context)
        self._contexts = {}
        self._lib.llama_model_free(self._model)


def _in_a_row(ids: Sequence[int], start: int, sequence: int = 0) -> list[tuple[int, int, int]]:
    """Tokens of a sequence from a position on."""
    return [(token, position, sequence) for position, token in enumerate(ids, start)]


def _may_repack(file: GGUFFile) -> bool:
    """Whether weights may go into buffers of other layouts: RAM holds them twice, and llama.cpp does not abort.

    With AMX it does abort, on the batched product with attn_k_b that multi-head latent attention makes.
    """
    from quant.target import isa

    batched = any(name.endswith(".attn_k_b.weight") for name in file.tensors)
    aborts = batched and "amx-int8" in isa.host_features()
    return not aborts and hardware.free_ram() > 2 * file.file_size
