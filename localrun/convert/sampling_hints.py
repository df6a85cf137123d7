"""What a model's makers recommend for sampling: generation_config.json to GGUF's general.sampling keys.

They are hints. One that is of another type or out of its range is left out with a line, and stops nothing.
"""

from __future__ import annotations

from typing import Any

from localrun.convert.errors import CheckpointError
from localrun.convert.metadata import Metadata
from localrun.convert.sources.checkpoint import Checkpoint
from localrun.convert.sources.json_file import is_kind, read_json, shown

_LARGEST_INT = 2**31 - 1
# generation_config.json's name -> the key of llama.cpp's common/common.cpp, its type, and what is in range.
_HINTS = {
    "temperature": ("temp", "f32", lambda x: x >= 0, "0 or more"),
    "top_p": ("top_p", "f32", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": ("min_p", "f32", lambda x: 0 <= x <= 1, "between 0 and 1"),
    "repetition_penalty": ("penalty_repeat", "f32", lambda x: x > 0, "above 0"),
    "top_k": ("top_k", "i32", lambda x: 0 <= x <= _LARGEST_INT and x == int(x), "a whole number, 0 or more"),
}


def add_sampling(metadata: Metadata, checkpoint: Checkpoint) -> list[str]:
    """Add the keys of what is recommended, if anything is; a line for each hint that is left out."""
    path = checkpoint.path / "generation_config.json"
    if not path.exists():
        return []
    try:
        hints = read_json(path)
    except CheckpointError as error:
        return [f"{error}; no sampling is recommended"]
    checkpoint.files.append(path)
    if hints.get("do_sample") is not True:
        return []
    warnings = []
    for name, (key, type_, in_range, expected) in _HINTS.items():
        value = _all(hints.get(name)) if name == "top_k" else hints.get(name)
        if value is None:
            continue
        if is_kind(value, float) and in_range(value):
            getattr(metadata, type_)(f"general.sampling.{key}", value)
        else:
            warnings.append(f"{path}: {name} is {shown(value)}, not {expected}; left out")
    return warnings


def _all(top_k: Any) -> Any:
    """0 for -1, which some write where they mean all."""
    return 0 if is_kind(top_k, float) and top_k == -1 else top_k
