"""How a tokenizer.json splits text before merging, and llama.cpp's name for it (tokenizer.ggml.pre).

The patterns are those of the published tokenizers; llama.cpp repeats them in src/llama-vocab.cpp (@3f545becc).
"""

from __future__ import annotations

from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_BYTES, _BYTES_WITH_WORDS, _DIGITS = "ByteLevel", "ByteLevel words", "Digits single"

# Steps by name. A step that ends in "..." stands for all that begin so: DeepSeek-LLM lists every letter by hand.
_STEPS = {
    "gpt-2": [_BYTES_WITH_WORDS],
    "smollm": [_DIGITS, _BYTES_WITH_WORDS],
    "llama-bpe": [_CONTRACTIONS + r"\p{N}{1,3}" + _ENDS, _BYTES],
    "chatglm-bpe": [_CONTRACTIONS + r"\p{N}{1,3}" + _ENDS, _BYTES],
    "minimax-m2": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTED + "|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTED + "|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        _BYTES,
    ],
    "bailingmoe2": [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        _BYTES,
    ],
    "qwen2": [_CONTRACTIONS + r"\p{N}" + _ENDS, _BYTES],
    "deepseek-llm": [
        r"[\r\n]",
        r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿ...",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        _DIGITS,
        _BYTES,
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGITS, _BYTES],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        _BYTES,
    ],
}
# As llama-bpe, of a tokenizer without a token that begins a text: of those, llama.cpp takes one for granted.
WITHOUT_BOS = {"llama-bpe": "glm4"}
NAMES = (*_STEPS, *WITHOUT_BOS.values(), "kimi-k2", "default")


def recognise(pre_tokenizer: Any, ignore_merges: bool) -> str | None:
    """llama.cpp's name for the pre_tokenizer section of a tokenizer.json; None if it is none of those known here.

    Args:
        ignore_merges: the model section's setting; llama.cpp ties it to the name.
    """
    steps = _steps(pre_tokenizer)
    for name, expected in _STEPS.items():
        if len(steps) == len(expected) and all(map(_same, steps, expected)) and ignore_merges == (name == "llama-bpe"):
            return name
    return None


def _same(step: str, expected: str) -> bool:
    return step.startswith(expected[:-3]) if expected.endswith("...") else step == expected


def _steps(section: Any) -> list[str]:
    if not isinstance(section, dict):
        return []
    kind = section.get("type")
    if kind == "Sequence":
        return [step for part in section.get("pretokenizers", []) for step in _steps(part)]
    if kind == "Split":
        pattern = section.get("pattern")
        isolated = section.get("behavior") == "Isolated" and not section.get("invert")
        text = pattern.get("Regex", "") if isinstance(pattern, dict) and isolated else "?"
        return [text.replace("\r", r"\r").replace("\n", r"\n")]
    if kind == "Digits":
        return [_DIGITS if section.get("individual_digits") else "Digits"]
    if kind == "ByteLevel" and not section.get("add_prefix_space"):
        return [_BYTES_WITH_WORDS if section.get("use_regex", True) else _BYTES]
    return [str(kind)]
