"""A GGUF file into llama.cpp, after the checks that llama.cpp makes with GGML_ASSERT or not at all.

Checked are the numbers of load_hparams in src/llama-model.cpp (https://github.com/ggml-org/llama.cpp @3f545becc) and
the types that ggml/src/ggml-cpu/binary-ops.cpp takes; a trial in another process finds out what these leave.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from localrun.backends import binding, llama_log
from localrun.backends.trial import in_words, try_out
from localrun.errors import LocalrunError
from localrun.gguf.file import GGUFFile

_MAX_LAYERS, _MAX_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
_ADDED_OR_MULTIPLIED = re.compile(r"norm\.weight$|\.bias$")


def load(file: GGUFFile, threads: int, use_extra_bufts: bool, progress: Callable[[float], None] | None = None) -> Any:
    """llama.cpp's model of the very file that is open.

    Raises LocalrunError, one line naming the file and llama.cpp's reason, if it cannot be loaded or run.
    """
    _check_counts(file)
    _check_vectors(file)
    try_out(file, threads, use_extra_bufts)
    paths = [part.same_path for part in file.files]
    model = binding.load_model(paths, use_extra_bufts=use_extra_bufts, progress=progress)
    if not model:
        raise LocalrunError(f"{file.path}: llama.cpp cannot load it: {in_words(file, llama_log.last_error())}")
    try:
        for part in file.files:
            part.check_same()
    except LocalrunError:
        binding.free_model(model)
        raise
    return model


def _check_counts(file: GGUFFile) -> None:
    """Refuses numbers on which llama.cpp would abort, whatever the architecture."""
    arch = file.string("general.architecture")

    def count(name: str) -> int:
        value = file.metadata.get(f"{arch}.{name}", 0)
        return value if isinstance(value, int) else 0  # other types, and arrays by layer, are llama.cpp's to judge

    n_experts, n_groups = count("expert_count"), count("expert_group_count")
    limits = {"block_count": (1, _MAX_LAYERS), "expert_count": (0, _MAX_EXPERTS)}
    if isinstance(file.metadata.get(f"{arch}.expert_used_count", 0), int):
        limits["expert_used_count"] = (min(1, n_experts), n_experts)
    limits["expert_group_count"] = (0, max(0, n_experts - 1))
    if n_groups > 1:
        limits["expert_group_used_count"] = (1, n_groups - 1)
    for name, (low, high) in limits.items():
        if not low <= count(name) <= high:
            raise LocalrunError(f"{file.path}: key '{arch}.{name}' is {count(name)}, expected {low} to {high}")
    if n_groups > 1 and n_experts % n_groups:
        key = f"{arch}.expert_group_count"
        raise LocalrunError(f"{file.path}: key {key!r} is {n_groups}, expected a divisor of {n_experts}")
    for name in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
        epsilon = file.metadata.get(f"{arch}.attention.{name}", 0.0)
        if isinstance(epsilon, float) and not 0 <= epsilon < math.inf:
            raise LocalrunError(f"{file.path}: key '{arch}.attention.{name}' is {epsilon}, expected at least 0")


def _check_vectors(file: GGUFFile) -> None:
    """Refuses norms and biases of other types than F32: ggml's sums and products abort on them."""
    for tensor in file.tensors.values():
        if tensor.type.name != "F32" and _ADDED_OR_MULTIPLIED.search(tensor.name):
            found = f"tensor '{tensor.name}' has type {tensor.type.name}"
            raise LocalrunError(f"{file.path}: {found}; llama.cpp computes with norms and biases of type F32 alone")
