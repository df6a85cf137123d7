"""llama.cpp's logits and greedy tokens, at their most exact: flash attention off, F32 keys and values, no repacking.

Each call runs in a process of its own: a failed GGML_ASSERT ends that process and comes back as OracleError with
llama.cpp's message. They are forked from one that has imported llama.cpp, which takes longer than most answers. Answers
are kept for as long as the process lives. With flash attention (16-bit accumulation on the CPU) or 16-bit keys, random
weights turn the rounding into errors of the size of the tolerances.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

_TIMEOUT_S = 120


class OracleError(RuntimeError):
    """llama.cpp refused the file or aborted; the message is the end of its log."""


def logits(path: Path | str, ids: list[int]) -> np.ndarray:
    """float32 (T, vocab): llama.cpp's logits after every token of `ids`, evaluated as one batch."""
    return _ask(str(path), tuple(ids), 0)


def greedy(path: Path | str, ids: list[int], n: int) -> tuple[list[int], np.ndarray]:
    """(n tokens, float32 (n, vocab)): the likeliest continuation of `ids` and the logits that each token came from."""
    rows = _ask(str(path), tuple(ids), n)[len(ids) - 1 :]
    return rows.argmax(axis=1).tolist(), rows


def prediction_logits(path: Path | str, ids: list[int], hidden: Path) -> np.ndarray:
    """float32 (T, vocab) of the layer for multi-token prediction, of next tokens and an .npy file's float32 (T, n)."""
    return _ask(str(path), tuple(ids), 0, str(hidden))


def block_logits(path: Path | str, ids: list[int], features: Path) -> np.ndarray:
    """float32 (T, vocab) of a block of drafts, the Markov head's part added; features: an .npy file's float32 (n, F).

    The file has an embedding and a head of its own.
    """
    return _ask(str(path), tuple(ids), 0, features=str(features))


@functools.lru_cache(maxsize=256)
def _ask(path: str, ids: tuple[int, ...], n_greedy: int, hidden: str = "", features: str = "") -> np.ndarray:
    with tempfile.TemporaryDirectory(prefix="llama-cpp-") as folder:
        answer, log = Path(folder, "answer.npy"), Path(folder, "log")
        request = {"path": path, "ids": ids, "n_greedy": n_greedy, "hidden": hidden, "features": features}
        status = _answered({"answer": str(answer), "log": str(log), "request": request})
        if status != 0:
            last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-12:])
            raise OracleError(f"llama.cpp on {path} ended with {status}:\n{last}")
        result = np.load(answer)
    result.flags.writeable = False
    return result


def _answered(asked: dict[str, object]) -> int:
    """What the process ended with that was forked for a question."""
    forks = _forks()
    assert forks.stdin and forks.stdout
    forks.stdin.write(json.dumps(asked) + "\n")
    forks.stdin.flush()
    if not select.select([forks.stdout], [], [], _TIMEOUT_S)[0]:
        forks.kill()
        _forks.cache_clear()
        raise OracleError(f"no answer of llama.cpp in {_TIMEOUT_S} s")
    return int(forks.stdout.readline())


@functools.cache
def _forks() -> subprocess.Popen[str]:
    """It ends when this process does, which closes its stdin."""
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}  # or gdb's pages push the assertion off the end
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True)


# ---- in the process that forks, and in those that it forks -----------------------------------------------------------


def _serve() -> None:
    """For each line of stdin a process that answers it; what it ended with to stdout."""
    import llama_cpp  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _answer(**asked)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _answer(answer: str, log: str, request: dict[str, Any]) -> NoReturn:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    status = 1
    try:
        np.save(answer, _evaluate(**request))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _evaluate(path: str, ids: list[int], n_greedy: int, hidden: str, features: str) -> np.ndarray:
    """Logits of all prompt positions, then of n_greedy - 1 greedy steps."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = False
    model_params.load_mtp = bool(hidden)
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    if not model:
        raise SystemExit(f"llama.cpp could not load {path}")
    params = llama_cpp.llama_context_default_params()
    injected = np.load(features) if features else np.empty((0, 0), np.float32)
    params.n_ctx = params.n_batch = params.n_ubatch = len(injected) + len(ids) + n_greedy
    params.n_threads = params.n_threads_batch = 1  # more would spin, beside those of the suite
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.ctx_type = int(bool(hidden))  # LLAMA_CONTEXT_TYPE_MTP
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit(f"llama.cpp could not make a context for {path}")
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    if features:
        llama_cpp.llama_set_causal_attn(context, False)
        _inject(context, injected)
    rows = _decode(context, ids, len(injected), n_vocab, np.load(hidden) if hidden else None)
    for step in range(n_greedy - 1):
        rows = np.concatenate([rows, _decode(context, [int(rows[-1].argmax())], len(ids) + step, n_vocab)])
    return rows


def _inject(context: object, features: np.ndarray) -> None:
    """What a model's layers left of its first tokens, to a context of blocks that draft for it."""
    import llama_cpp

    batch = llama_cpp.llama_batch_init(len(features), features.shape[1], 1)
    ctypes.memmove(batch.embd, features.ctypes.data, features.nbytes)
    batch.n_tokens = len(features)
    for i in range(len(features)):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, 0
    if (status := llama_cpp.llama_decode(context, batch)) != 0:
        raise SystemExit(f"llama_decode of features returned {status}")


def _decode(context: object, ids: list[int], start: int, n_vocab: int, hidden: np.ndarray | None = None) -> np.ndarray:
    import llama_cpp

    batch = llama_cpp.llama_batch_init(len(ids), 0 if hidden is None else hidden.shape[1], 1)
    if hidden is not None:  # such a batch has room for these alone
        tokens = (ctypes.c_int32 * len(ids))()
        batch.token = ctypes.cast(tokens, type(batch.token))
        ctypes.memmove(batch.embd, hidden.ctypes.data, hidden.nbytes)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i] = token, start + i
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
    status = llama_cpp.llama_decode(context, batch)
    if status != 0:
        raise SystemExit(f"llama_decode returned {status}")
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (n_vocab,)) for i in range(len(ids))]
    result = np.array(rows, dtype=np.float32)
    if hidden is None:
        llama_cpp.llama_batch_free(batch)
    return result


if __name__ == "__main__":
    _serve()
