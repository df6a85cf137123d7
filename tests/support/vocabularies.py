"""Small byte-level vocabularies as GGUF files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
LETTERS = [chr(byte) if byte in _PLAIN else chr(256 + _OTHERS.index(byte)) for byte in range(256)]
"""GPT-2's letters of the bytes, whose ids are the bytes."""
WORDS = ["he", "\u0120t", "\u010a\u010a"]
MERGES = ["h e", "\u0120 t", "\u010a \u010a"]
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool|>")


def write_vocabulary(
    path: Path,
    controls: Sequence[str] = CHATML,
    defined: Sequence[str] = ("<think>", "</think>"),
    strings: Mapping[str, str] | None = None,
    **keys: tuple[Any, gguf.GGUFValueType],
) -> Path:
    """Bytes, three merges, control tokens, tokens that users may write; keys: of tokenizer.ggml; strings: any."""
    tokens = [*LETTERS, *WORDS, *controls, *defined]
    n_normal = len(LETTERS) + len(WORDS)
    types = [TokenType.NORMAL] * n_normal
    types += [TokenType.CONTROL] * len(controls) + [TokenType.USER_DEFINED] * len(defined)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(n_normal)
    writer.add_eos_token_id(n_normal)
    for name, (value, type_) in ({"add_bos_token": (False, gguf.GGUFValueType.BOOL)} | keys).items():
        writer.add_key_value(f"tokenizer.ggml.{name}", value, type_)
    for name, text in (strings or {}).items():
        writer.add_string(name, text)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
