"""The calls into llama.cpp that running a model and trying it out share. Light to import, for the trial's process.

What the functions promise is in include/llama.h of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

from localrun.backends import llama_log

_SEQUENCE = 0  # each context has this one sequence


def load_model(
    paths: Sequence[str],
    *,
    vocab_only: bool = False,
    use_extra_bufts: bool = True,
    progress: Callable[[float], None] | None = None,
) -> Any:
    """The model in these files, all parts of it in order; None, with llama_log.last_error() set, if it can't be loaded.

    Args:
        use_extra_bufts: whether weights may be copied into other layouts.
        progress: called with what part of the weights is there.
    """
    import llama_cpp

    llama_log.silence()
    llama_log.clear()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.vocab_only, params.use_extra_bufts = vocab_only, use_extra_bufts
    if progress is not None:

        def report(fraction: float, _user_data: Any) -> bool:
            progress(fraction)
            return True

        params.progress_callback = llama_cpp.llama_progress_callback(report)
    names = (ctypes.c_char_p * len(paths))(*map(os.fsencode, paths))
    return llama_cpp.llama_model_load_from_splits(names, len(paths), params)


def free_model(model: Any) -> None:
    """Frees the weights; no context may be left."""
    import llama_cpp

    llama_cpp.llama_model_free(model)


def new_context(model: Any, ctx: int, threads: int) -> Any:
    """An empty context for ctx tokens; None, with llama_log.last_error() set, if it can't be had."""
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx = ctx
    params.n_threads = params.n_threads_batch = threads
    params.offload_kqv = params.op_offload = False
    llama_log.clear()
    return llama_cpp.llama_init_from_model(model, params)


def evaluate(context: Any, ids: Sequence[int], start: int, n_logits: int) -> int:
    """Append ids at position start, with the logits of the last n_logits wanted: 0, or llama_decode's error."""
    import llama_cpp

    first_logits = len(ids) - n_logits
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, i >= first_logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, _SEQUENCE
        return llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
