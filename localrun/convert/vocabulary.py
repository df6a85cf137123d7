"""The vocabulary of a checkpoint as GGUF's tokenizer.ggml keys.

Byte-level BPE from tokenizer.json, or vocab.json and merges.txt, and Kimi-K2's tiktoken.model; SentencePiece's BPE from
tokenizer.json or tokenizer.model. Keys and token types are those of llama.cpp's converter: conversion/base.py
(get_vocab_base, _create_vocab_sentencepiece) and conversion/deepseek.py of https://github.com/ggml-org/llama.cpp
@3f545becc.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from localrun.convert import pretokenizers
from localrun.convert.chat_templates import add_chat_templates
from localrun.convert.errors import CheckpointError
from localrun.convert.metadata import Metadata
from localrun.convert.sources.checkpoint import Checkpoint
from localrun.convert.sources.json_file import is_kind, read_json, shown
from localrun.convert.sources.sentencepiece_file import SPACE, Pieces
from localrun.convert.sources.tokenizer_files import KINDS, AddedToken, TokenizerConfig, TokenizerFiles, read_tokenizer

_TIKTOKEN_SPECIALS = 256  # ids behind the ranks that Kimi-K2 keeps for control tokens (its tokenization_kimi.py)
# Added tokens that are control tokens whatever their file says.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>")
# Files of tokenizers that cannot be converted: a folder that has one of them is not one without a tokenizer.
_OTHERS = ("spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.json", "vocab.txt")
_NO_SCORE = -1e6  # of pieces that no merge makes: below all that one does
# GGUF's names where they differ from Hugging Face's.
_ID_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}


@dataclass
class _Vocabulary:
    """Tokens by id, texts as GGUF has them."""

    pre: str
    tokens: dict[int, str]
    types: dict[int, TokenType]
    files: TokenizerFiles


def add_vocabulary(metadata: Metadata, checkpoint: Checkpoint, pre: str | None) -> list[str]:
    """Add the vocabulary's keys; warnings, one line each.

    Args:
        pre: the pre-tokenizer's name, if the user gives one.

    Raises CheckpointError if the tokenizer is of a kind that cannot be converted.
    """
    if pre is not None and pre not in pretokenizers.NAMES:
        raise CheckpointError(f"--pre {pre!r}: expected one of {', '.join(pretokenizers.NAMES)}")
    folder = checkpoint.path
    config = TokenizerConfig(folder)
    vocabulary = _read(folder, config, checkpoint.config.get("model_type"), pre)
    if vocabulary is None:
        metadata.string("tokenizer.ggml.model", "none")
        return [
            f"{folder} has no tokenizer.json, tokenizer.model or tiktoken.model: the result has no vocabulary, ids only"
        ]
    files, n_vocab = vocabulary.files, metadata.get(".vocab_size")
    checkpoint.files.extend(files.paths)
    warnings = [*files.warnings, *_add_tokens(metadata, vocabulary, n_vocab, folder)]
    warnings += _add_special_ids(metadata, files, checkpoint, n_vocab)
    return warnings + add_chat_templates(metadata, folder, config.values, checkpoint.files)


def _read(folder: Path, config: TokenizerConfig, model_type: Any, pre: str | None) -> _Vocabulary | None:
    files = read_tokenizer(folder, config, model_type)
    if files is not None:
        return _from_pieces(files, files.pieces, config, pre) if files.pieces else _from_files(files, pre)
    if (folder / "tiktoken.model").exists():
        return _read_tiktoken(folder, config, pre)
    for name in _OTHERS:
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder / name}: a tokenizer of this kind cannot be converted; "
                "expected byte-level BPE, or SentencePiece's in tokenizer.json or tokenizer.model"
            )
    return None


def _from_files(files: TokenizerFiles, pre: str | None) -> _Vocabulary:
    path = files.paths[0]
    name = pre or files.pre
    if name is None and files.document:
        ignores_merges = bool(files.document["model"].get("ignore_merges"))
        name = pretokenizers.recognise(files.document.get("pre_tokenizer"), ignores_merges)
        if "bos" not in files.named:
            name = pretokenizers.WITHOUT_BOS.get(name, name)
    if name is None:
        names = ", ".join(pretokenizers.NAMES)
        raise CheckpointError(f"{path}: splits text in a way not known here; --pre names the nearest: {names}")
    return _Vocabulary(name, *_tokens(files), files)


def _tokens(files: TokenizerFiles) -> tuple[dict[int, str], dict[int, TokenType]]:
    """Texts and types by id, as transformers has them."""
    tokens = {id: word for word, id in files.words.items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for id, token in files.added.items():
        is_control = token.special or _LOOKS_SPECIAL.fullmatch(token.text)
        tokens[id], types[id] = token.text, TokenType.CONTROL if is_control else TokenType.USER_DEFINED
    return tokens, types


def _from_pieces(files: TokenizerFiles, pieces: Pieces, config: TokenizerConfig, pre: str | None) -> _Vocabulary:
    if pre not in (None, "default"):
        raise CheckpointError(f"--pre {pre}: {files.paths[0]} is SentencePiece's, which splits no texts; leave it out")
    tokens, types = _tokens(files)
    types |= {id: kind for id, kind in pieces.types.items() if id not in files.added or kind == TokenType.UNKNOWN}
    for id, kind in types.items():
        if kind == TokenType.USER_DEFINED:  # looked for in a text as it is, before spaces are spelled anew
            tokens[id] = tokens[id].replace(SPACE, " ")
    said = config.values.get("add_prefix_space")
    pieces.adds_space = said if isinstance(said, bool) and not files.document else pieces.adds_space
    return _Vocabulary("default", tokens, types, files)


def _read_tiktoken(folder: Path, config: TokenizerConfig, pre: str | None) -> _Vocabulary:
    """Kimi-K2's vocabulary: ranks of byte strings, then 256 control tokens, those without a name reserved."""
    path = folder / "tiktoken.model"
    ranks = _read_ranks(path)
    if pre is None and config.class_name != "TikTokenTokenizer":
        raise CheckpointError(f"{config.path}: tokenizer_class is not Kimi-K2's; --pre names the way to split text")
    named = {token.id: token.text for token in config.by_id or ()}
    first = len(ranks)
    tokens = {rank: _printable(token) for token, rank in ranks.items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    added = {}
    for id in range(first, first + _TIKTOKEN_SPECIALS):
        tokens[id] = named.get(id) or _unused(f"<|reserved_token_{id}|>", named.values())
        types[id], added[id] = TokenType.CONTROL, AddedToken(tokens[id], special=True)
    merges = [" ".join(map(_printable, pair)) for token in ranks if (pair := _last_merge(ranks, token))]
    adds = {kind: flag for kind in ("bos", "eos") if isinstance(flag := config.values.get(f"add_{kind}_token"), bool)}
    files = TokenizerFiles({}, merges, added, config.named, adds, [path, *config.paths])
    return _Vocabulary(pre or "kimi-k2", tokens, types, files)


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


def _unused(name: str, names: Collection[str]) -> str:
    """The name, or a longer one that no token has."""
    while name in names:
        name += "_"
    return name


def _add_tokens(metadata: Metadata, vocabulary: _Vocabulary, n_vocab: int, folder: Path) -> list[str]:
    """Tokens, their types and merges; a line if some have no row in the embedding, or bytes have no token."""
    files = vocabulary.files
    last = max(vocabulary.tokens.keys() - files.added.keys(), default=-1)
    if last >= n_vocab:
        raise CheckpointError(f"{folder}: the tokenizer has id {last}; config.json's vocab_size is {n_vocab}")
    names = set(vocabulary.tokens.values())
    texts = [vocabulary.tokens.get(id) or _unused(f"[PAD{id}]", names) for id in range(n_vocab)]
    types = [int(vocabulary.types.get(id, TokenType.UNUSED)) for id in range(n_vocab)]
    pieces = files.pieces
    metadata.string("tokenizer.ggml.model", "gpt2" if pieces is None else "llama")
    metadata.string("tokenizer.ggml.pre", vocabulary.pre)
    metadata.array("tokenizer.ggml.tokens", GGUFValueType.STRING, texts)
    metadata.array("tokenizer.ggml.token_type", GGUFValueType.INT32, types)
    if pieces is None:
        metadata.array("tokenizer.ggml.merges", GGUFValueType.STRING, files.merges)
    else:
        scores = [pieces.scores.get(id, _NO_SCORE) for id in range(n_vocab)]
        metadata.array("tokenizer.ggml.scores", GGUFValueType.FLOAT32, scores)
        metadata.bool("tokenizer.ggml.add_space_prefix", pieces.adds_space)
    warnings = []
    if pieces is None and (lost := len(set(_LETTERS.values()) - names)):
        warnings.append(f"{folder}: {lost} of the 256 bytes have no token: texts lose them, as with transformers")
    beyond = [token.text for id, token in sorted(files.added.items()) if id >= n_vocab]
    if beyond:
        n_more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        warnings.append(f"added token {shown(beyond[0])}{n_more}: behind config.json's vocab_size, {n_vocab}; left out")
    return warnings


def _add_special_ids(metadata: Metadata, files: TokenizerFiles, checkpoint: Checkpoint, n_vocab: int) -> list[str]:
    """Special ids, and whether they are put around texts; one line each for what has no place."""
    config, where = checkpoint.config, str(checkpoint.path / "config.json")
    ids: dict[str, int] = {}
    for kind in KINDS:
        named = files.id_of(files.named.get(kind, ""))
        candidates = [*([] if named is None else [named]), *_token_ids(config, f"{kind}_token_id", where)]
        found = [id for id in candidates if id < n_vocab]
        if found:
            ids[kind] = found[0]
            metadata.u32(f"tokenizer.ggml.{_ID_KEYS.get(kind, kind)}_token_id", found[0])
    warnings = _add_ends(metadata, checkpoint, ids.get("eos"), n_vocab)
    for kind in ("bos", "eos"):
        adds = files.adds.get(kind, False)
        if adds and kind not in ids:
            warnings.append(f"add_{kind}_token is true, but there is no such token: left out")
        metadata.bool(f"tokenizer.ggml.add_{kind}_token", adds and kind in ids)
    return warnings


def _add_ends(metadata: Metadata, checkpoint: Checkpoint, eos: int | None, n_vocab: int) -> list[str]:
    """Other tokens that end a reply, as far as a GGUF has keys for them: of a turn, of a message."""
    listed = _token_ids(checkpoint.config, "eos_token_id", str(checkpoint.path / "config.json"))
    path = checkpoint.path / "generation_config.json"
    with suppress(CheckpointError):  # hints, of which convert.sampling_hints says that they are broken
        listed += _token_ids(read_json(path), "eos_token_id", str(path))
    ends = [id for id in dict.fromkeys(listed) if id < n_vocab and id != eos]
    for kind, id in zip(("eot", "eom"), ends, strict=False):
        metadata.u32(f"tokenizer.ggml.{kind}_token_id", id)
    if len(ends) <= 2:
        return []
    return [f"{len(ends) - 2} more token(s) end a reply than a GGUF has keys for, {ends[2]} the first: see --stop"]


def _token_ids(values: dict[str, Any], key: str, where: str) -> list[int]:
    """One id or a list of them; none for null and for -1, which some write where they mean none."""
    given = values.get(key)
    ids = [id for id in (given if isinstance(given, list) else [given]) if id not in (None, -1)]
    for id in ids:
        if not is_kind(id, int):
            raise CheckpointError(f"{where}: {key} is {shown(given)}; expected ids of tokens")
    return ids
