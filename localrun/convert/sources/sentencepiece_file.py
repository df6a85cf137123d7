"""SentencePiece's BPE: tokenizer.model, or a tokenizer.json that was made from one.

Of two neighbours whose join is a piece, those merge first whose join has the highest score; what is left without a
piece becomes bytes. A tokenizer.json says the same by the order of its merges.

Source: sentencepiece_model.proto and bpe_model.cc of https://github.com/google/sentencepiece 0.2, GGUF's form
src/llama-vocab.cpp (llm_tokenizer_spm_session) of https://github.com/ggml-org/llama.cpp @3f545becc, and LlamaTokenizer
of transformers 5.24.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from gguf import TokenType

from localrun.convert.errors import CheckpointError
from localrun.convert.sources.json_file import shown, typed

SPACE = "▁"  # how pieces spell a space
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "words", 4: "characters"}  # TrainerSpec.ModelType
_MAX_BYTES = 1 << 28  # the largest published has some 5 MB
_ONE_MORE = "gets one more here than in transformers: a GGUF cannot say otherwise"


@dataclass
class Pieces:
    """What a GGUF says of a SentencePiece BPE beside its words.

    Attributes:
        scores: by id, of pieces that come to be by merging.
        types: by id, of pieces that are no plain text.
        adds_space: whether a text is read with a space in front.
        warnings: one line each.
    """

    scores: dict[int, float] = field(default_factory=dict)
    types: dict[int, TokenType] = field(default_factory=dict)
    adds_space: bool = True
    warnings: list[str] = field(default_factory=list)


def read_model(path: Path) -> tuple[dict[str, int], Pieces]:
    """Words by id and the rest of a tokenizer.model. Raises CheckpointError if it is broken, or is no BPE."""
    model = _parse(path)
    kind = _MODEL_TYPES.get(model.trainer_spec.model_type, "another kind")
    if kind != "BPE":
        raise CheckpointError(f"{path}: is SentencePiece's {kind}; of its kinds only BPE can be converted")
    words: dict[str, int] = {}
    pieces = Pieces(adds_space=model.normalizer_spec.add_dummy_prefix)
    for id, piece in enumerate(model.pieces):
        if piece.piece in words:
            raise CheckpointError(
                f"{path}: piece {shown(piece.piece)} is there twice, as {words[piece.piece]} and {id}"
            )
        words[piece.piece], pieces.scores[id] = id, piece.score
        if piece.type != TokenType.NORMAL:
            pieces.types[id] = TokenType(piece.type)
    if model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces:
        name = model.normalizer_spec.name or "its own rules"
        pieces.warnings.append(
            f"{path.name} changes texts first ({shown(name)}): a GGUF cannot say that, ids can differ"
        )
    return words, pieces


def _parse(path: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise CheckpointError(f"{path}: needs the package sentencepiece; pip install 'localrun[convert]'") from None
    from google.protobuf.message import DecodeError

    model = sentencepiece_model_pb2.ModelProto()
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path}: is larger than {_MAX_BYTES >> 20} MiB")
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except DecodeError:
        raise CheckpointError(f"{path}: is no SentencePiece model") from None
    if not model.pieces:
        raise CheckpointError(f"{path}: is no SentencePiece model, or has no pieces")
    return model


def is_sentencepiece(document: dict[str, Any]) -> bool:
    """Whether a tokenizer.json falls back to bytes as SentencePiece does."""
    model = document.get("model")
    return isinstance(model, dict) and model.get("type", "BPE") == "BPE" and model.get("byte_fallback") is True


def pieces_of(document: dict[str, Any], words: dict[str, int], merges: list[str], where: str) -> Pieces:
    """What the merges of a tokenizer.json say as scores. Raises CheckpointError if it reads texts in another way."""
    scheme = _metaspace(document.get("pre_tokenizer"), where)
    schemes = [*_normalizer(document.get("normalizer"), where), *([] if scheme is None else [scheme])]
    if not schemes:
        raise CheckpointError(f"{where}: spells spaces in a way not known here; expected {SPACE!r} in their place")
    pieces = Pieces(adds_space=any(scheme != "never" for scheme in schemes))
    if scheme in ("first", "always"):
        behind = ", or stands behind a control token," if scheme == "first" else ""
        pieces.warnings.append(f"a text that begins with a space{behind} {_ONE_MORE}")
    unknown = document["model"].get("unk_token")
    for word, id in words.items():
        if _BYTE.fullmatch(word):
            pieces.types[id] = TokenType.BYTE
        elif word == unknown:
            pieces.types[id] = TokenType.UNKNOWN
    pairs = [tuple(merge.split(" ")) for merge in merges]
    joins = [left + right for left, right in pairs]
    for rank, join in enumerate(joins):
        if join in words:
            pieces.scores.setdefault(words[join], -float(rank))
    n_others = _n_missing(words, set(pairs), pieces) + len(list(groupby(joins))) - len(set(joins))
    if n_others:
        pieces.warnings.append(f"{where}: {n_others} merges are not in SentencePiece's order: ids can differ there")
    return pieces


def _normalizer(section: Any, where: str) -> list[str]:
    """What older files say: a space in front, spaces spelled anew."""
    if section is None:
        return []
    parts = section.get("normalizers", [section]) if isinstance(section, dict) else [section]
    schemes = []
    for part in parts if isinstance(parts, list) else [parts]:
        if part == {"type": "Prepend", "prepend": SPACE}:
            schemes.append("always")
        elif part == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            schemes.append("never")
        else:
            kind = part.get("type") if isinstance(part, dict) else part
            raise CheckpointError(f"{where}: normalizer is {shown(kind)}; it changes texts, and a GGUF cannot say that")
    return schemes


def _metaspace(section: Any, where: str) -> str | None:
    """What newer files say, in one step that leaves the text whole: when there is a space in front, if it is there."""
    if section is None:
        return None
    known = isinstance(section, dict) and section.get("type") == "Metaspace" and section.get("replacement") == SPACE
    if not known or section.get("split", True) is not False:
        raise CheckpointError(f"{where}: pre_tokenizer splits texts; expected Metaspace that does not, or none")
    scheme = typed({"prepend_scheme": "always"} | section, "prepend_scheme", str, where)
    if scheme not in ("always", "first", "never"):
        raise CheckpointError(f"{where}: prepend_scheme is {shown(scheme)}; expected always, first or never")
    return scheme


def _n_missing(words: dict[str, int], pairs: set[tuple[str, ...]], pieces: Pieces) -> int:
    """Merges that SentencePiece would make and the file does not."""
    return sum(
        (word[:at], word[at:]) not in pairs
        for word, id in words.items()
        if id not in pieces.types
        for at in range(1, len(word))
        if word[:at] in words and word[at:] in words
    )
