"""Tokenizer files of a checkpoint to GGUF's tokenizer.ggml keys.

Byte-level BPE from tokenizer.json, and Kimi-K2's tiktoken.model. Keys and token types are those of llama.cpp's
converter: conversion/base.py (get_vocab_base) and conversion/deepseek.py of https://github.com/ggml-org/llama.cpp
@3f545becc. Special ids and chat templates are found by gguf.SpecialVocab.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, SpecialVocab, TokenType

from localrun.convert import pretokenizers
from localrun.convert.errors import CheckpointError
from localrun.convert.metadata import Metadata
from localrun.convert.sources.checkpoint import Checkpoint
from localrun.convert.sources.json_file import read_json

_TIKTOKEN_SPECIALS = 256  # ids behind the ranks that Kimi-K2 keeps for control tokens (its tokenization_kimi.py)
# Added tokens that are control tokens whatever their file says.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>")


@dataclass
class _Vocabulary:
    """Tokens by id, texts as GGUF has them."""

    pre: str
    tokens: dict[int, str]
    types: dict[int, TokenType]
    merges: list[str]
    files: list[Path] = field(default_factory=list)


def add_vocabulary(metadata: Metadata, checkpoint: Checkpoint, pre: str | None) -> list[str]:
    """Add the vocabulary's keys; warnings, one line each.

    Args:
        pre: the pre-tokenizer's name, if the user gives one.

    Raises CheckpointError if the tokenizer is of a kind that cannot be converted.
    """
    if pre is not None and pre not in pretokenizers.NAMES:
        raise CheckpointError(f"--pre {pre!r}: expected one of {', '.join(pretokenizers.NAMES)}")
    vocabulary = _read(checkpoint.path, pre)
    if vocabulary is None:
        metadata.string("tokenizer.ggml.model", "none")
        return [f"{checkpoint.path} has no tokenizer.json or tiktoken.model: the result has no vocabulary, ids only"]
    checkpoint.files.extend(vocabulary.files)
    n_vocab = metadata.get(".vocab_size")
    _add_tokens(metadata, vocabulary, n_vocab, checkpoint.path)
    return _add_special(metadata, checkpoint, n_vocab)


def _read(folder: Path, pre: str | None) -> _Vocabulary | None:
    if (folder / "tokenizer.json").exists():
        return _read_bpe(folder / "tokenizer.json", pre)
    if (folder / "tiktoken.model").exists():
        return _read_tiktoken(folder, pre)
    if (folder / "tokenizer.model").exists():
        raise CheckpointError(
            f"{folder / 'tokenizer.model'}: SentencePiece cannot be converted; expected byte-level BPE"
        )
    return None


def _read_bpe(path: Path, pre: str | None) -> _Vocabulary:
    document = read_json(path)
    model, added = document.get("model"), document.get("added_tokens") or []
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise CheckpointError(f"{path}: is no byte-level BPE tokenizer; no other kind can be converted")
    name = pre or pretokenizers.recognise(document.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    if name is None:
        names = ", ".join(pretokenizers.NAMES)
        raise CheckpointError(f"{path}: splits text in a way not known here; --pre names the nearest: {names}")
    try:
        tokens = {int(id): token for token, id in model["vocab"].items()}
        merges = [_merge(pair) for pair in model["merges"]]
        types = dict.fromkeys(tokens, TokenType.NORMAL)
        for token in added:
            tokens[token["id"]], types[token["id"]] = _added(token["content"], bool(token.get("special")))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: has a broken vocabulary, merge or added token: {error!r}") from None
    return _Vocabulary(name, tokens, types, merges, [path])


def _merge(pair: str | list[str]) -> str:
    """ "a b", from either of the formats that there are."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return f"{left} {right}"


def _added(text: str, special: bool) -> tuple[str, TokenType]:
    if special or _LOOKS_SPECIAL.fullmatch(text):
        return text, TokenType.CONTROL
    return text.replace("\u2581", " "), TokenType.USER_DEFINED


def _read_tiktoken(folder: Path, pre: str | None) -> _Vocabulary:
    """Kimi-K2's vocabulary: ranks of byte strings, then 256 control tokens, those without a name reserved."""
    path, config_path = folder / "tiktoken.model", folder / "tokenizer_config.json"
    ranks = _read_ranks(path)
    config = read_json(config_path)
    if pre is None and config.get("tokenizer_class") != "TikTokenTokenizer":
        raise CheckpointError(f"{config_path}: tokenizer_class is not Kimi-K2's; --pre names the way to split text")
    named = config.get("added_tokens_decoder") or {}
    first = len(ranks)
    tokens = {rank: _printable(token) for token, rank in ranks.items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for id in range(first, first + _TIKTOKEN_SPECIALS):
        entry = named.get(str(id)) or {}
        tokens[id], types[id] = entry.get("content", f"<|reserved_token_{id}|>"), TokenType.CONTROL
    merges = [" ".join(map(_printable, pair)) for token in ranks if (pair := _last_merge(ranks, token))]
    return _Vocabulary(pre or "kimi-k2", tokens, types, merges, [path, config_path])


def _read_ranks(path: Path) -> dict[bytes, int]:
    """tiktoken's format: a line a token, base64 and rank. Raises CheckpointError unless ranks are 0, 1, 2, ..."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(f"{path}: line {len(ranks) + 1} is no base64 token with a rank: {error}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: ranks are not 0 to {len(ranks) - 1}, each once")
    return ranks


def _last_merge(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes] | None:
    """The two tokens that merge to this one, by merging its bytes with the ranks below its own; None for a byte."""
    parts = [bytes([byte]) for byte in token]
    limit = ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        best = min(pairs)
        if best >= limit:
            return None  # no sequence of merges makes it; such tokens are never produced
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _byte_letters() -> dict[int, str]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(plain)))
    return letters


_LETTERS = _byte_letters()


def _printable(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _add_tokens(metadata: Metadata, vocabulary: _Vocabulary, n_vocab: int, folder: Path) -> None:
    last = max(vocabulary.tokens, default=-1)
    if last >= n_vocab:
        raise CheckpointError(f"{folder}: the tokenizer has id {last}; config.json's vocab_size is {n_vocab}")
    metadata.string("tokenizer.ggml.model", "gpt2")
    metadata.string("tokenizer.ggml.pre", vocabulary.pre)
    texts = [vocabulary.tokens.get(id, f"[PAD{id}]") for id in range(n_vocab)]
    types = [int(vocabulary.types.get(id, TokenType.UNUSED)) for id in range(n_vocab)]
    metadata.array("tokenizer.ggml.tokens", GGUFValueType.STRING, texts)
    metadata.array("tokenizer.ggml.token_type", GGUFValueType.INT32, types)
    metadata.array("tokenizer.ggml.merges", GGUFValueType.STRING, vocabulary.merges)


# GGUF's names where they differ from Hugging Face's.
_ID_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}


def _add_special(metadata: Metadata, checkpoint: Checkpoint, n_vocab: int) -> list[str]:
    """Special ids, whether they are added to texts, chat templates."""
    try:
        special = SpecialVocab(checkpoint.path, n_vocab=n_vocab)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # what its reading of broken files ends in
        raise CheckpointError(f"{checkpoint.path}: special tokens or chat template are broken: {error!r}") from None
    for kind, id in special.special_token_ids.items():
        metadata.u32(f"tokenizer.ggml.{_ID_KEYS.get(kind, kind)}_token_id", id)
    for kind, added in special.add_special_token.items():
        metadata.bool(f"tokenizer.ggml.add_{kind}_token", added)
    if special.chat_template is None:
        return ["no chat template: chat continues texts, or takes ChatML where the vocabulary has it"]
    _add_templates(metadata, special.chat_template, checkpoint.path)
    return []


def _add_templates(metadata: Metadata, templates: Any, folder: Path) -> None:
    """One template, or several by name, of which "default" is the one that is used."""
    if isinstance(templates, str):
        metadata.string("tokenizer.chat_template", templates)
        return
    try:
        named = {re.sub(r"[^A-Za-z0-9]", "_", each["name"]): str(each["template"]) for each in templates}
    except (KeyError, TypeError):
        raise CheckpointError(f"{folder}: special tokens or chat template are broken: one has no name") from None
    others = sorted(name for name in named if name != "default")
    for name in others:
        metadata.string(f"tokenizer.chat_template.{name}", named[name])
    metadata.array("tokenizer.chat_templates", GGUFValueType.STRING, others)
    if "default" in named:
        metadata.string("tokenizer.chat_template", named["default"])
