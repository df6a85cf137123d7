"""The tokenizer files of a checkpoint, put together as transformers puts them together.

Words and merges stand in tokenizer.json, in SentencePiece's tokenizer.model, or in vocab.json and merges.txt. Added
tokens stand in tokenizer.json, in tokenizer_config.json (by id, or as the value of bos_token and the like), and in the
older special_tokens_map.json and added_tokens.json, which count only where tokenizer_config.json lists none by id.
Tokens are added in that order. One gets the id that its text has already, or else the next free one: an id that a file
says is not asked.

Source: tokenization_utils_base.py (_from_pretrained) and tokenization_utils_tokenizers.py (__init__) of transformers
5.24, added_vocabulary.rs (add_tokens) of tokenizers 0.23.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import TokenType

from localrun.convert.errors import CheckpointError
from localrun.convert.sources import sentencepiece_file
from localrun.convert.sources.json_file import is_kind, read_json, shown, typed
from localrun.convert.sources.sentencepiece_file import Pieces

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("lstrip", "rstrip", "single_word")
# Classes that name the way to split text themselves: llama.cpp's name for it, and the tokens that they take for given.
_CLASSES = {
    "GPT2Tokenizer": ("gpt-2", ("bos", "eos", "unk")),
    "Qwen2Tokenizer": ("qwen2", ("eos", "unk", "pad")),
}
_CLASS_OF_MODEL = {"qwen3_moe": "Qwen2Tokenizer"}
_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the text is split.

    Attributes:
        special: whether it is a control token.
        is_bounded: whether spaces or words beside it matter, which a GGUF cannot say.
        id: what the file says, if it says it.
    """

    text: str
    special: bool
    is_bounded: bool = False
    id: int | None = None


@dataclass
class TokenizerFiles:
    """What they say.

    Attributes:
        words: the vocabulary of a BPE, text -> id.
        merges: "a b" each; none of a tokenizer.model.
        added: id -> token.
        named: text of the bos token and so on, by kind.
        adds: whether bos and eos are put around every text, by kind; absent where nothing says it.
        paths: the files that were read.
        document: tokenizer.json; empty if there is none.
        pre: llama.cpp's name for the way to split text, where the class of the tokenizer says it.
        pieces: what makes a SentencePiece BPE of words; None of a byte-level one.
        warnings: one line each.
    """

    words: dict[str, int]
    merges: list[str]
    added: dict[int, AddedToken] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)
    document: dict[str, Any] = field(default_factory=dict)
    pre: str | None = None
    pieces: Pieces | None = None
    warnings: list[str] = field(default_factory=list)

    def id_of(self, text: str) -> int | None:
        """The id of a whole token."""
        return next((id for id, token in self.added.items() if token.text == text), self.words.get(text))


class TokenizerConfig:
    """tokenizer_config.json, with the older files beside it. All absent is as good as empty.

    Attributes:
        values: what it says, with special_tokens_map.json's in their place.
        by_id: the added tokens that it lists by id; None if it lists none.
        paths: the files that were read.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if a file is broken."""
        self.path, self.paths = folder / "tokenizer_config.json", []
        self.values = self._read(self.path)
        self.by_id: list[AddedToken] | None = None
        if self.values.get("added_tokens_decoder") is not None:
            entries = typed(self.values, "added_tokens_decoder", dict, str(self.path))
            self.by_id = sorted(
                (_by_id(entry, id, self.path) for id, entry in entries.items()), key=lambda t: t.id or 0
            )
        else:
            self.values |= self._read(folder / "special_tokens_map.json")
        self.named = {kind: text for kind in KINDS if (text := _text(self.values.get(f"{kind}_token")))}
        self._added = {} if self.by_id is not None else self._read(folder / "added_tokens.json")

    @property
    def class_name(self) -> str:
        """The tokenizer's class, as slow and fast tokenizers share it; "" if there is none."""
        name = self.values.get("tokenizer_class")
        return name.removesuffix("Fast") if isinstance(name, str) else ""

    def added(self, in_tokenizer_json: Iterable[AddedToken]) -> Iterator[AddedToken]:
        """All added tokens in the order in which they are added; a later one says what an earlier one is."""
        listed = list(in_tokenizer_json)
        yield from listed
        yield from self.by_id or ()
        where, specials = str(self.path.with_name("added_tokens.json")), {*self.named.values(), *self.extra}
        rest = {text: _id(self._added, text, where) for text in self._added.keys() - {t.text for t in listed}}
        for text, id in sorted(rest.items(), key=lambda item: item[1]):
            yield AddedToken(text, text in specials, id=id)
        for text in (*self.named.values(), *self._of_the_model(), *self.extra):
            yield AddedToken(text, special=True)

    @property
    def extra(self) -> list[str]:
        """Control tokens without a name of their own."""
        values = self.values.get("extra_special_tokens") or self.values.get("additional_special_tokens") or []
        if isinstance(values, dict):
            values = list(values.values())
        if not isinstance(values, list):
            raise CheckpointError(f"{self.path}: extra_special_tokens is {shown(values)}; expected a list")
        return [text for value in values if (text := _text(value))]

    def _of_the_model(self) -> list[str]:
        """Control tokens that a model names for itself, "image_token" and the like."""
        known = {f"{kind}_token" for kind in KINDS}
        return [
            text
            for key, text in self.values.items()
            if key.endswith("_token") and key not in known and isinstance(text, str)
        ]

    def _read(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        self.paths.append(path)
        return read_json(path)


def read_tokenizer(folder: Path, config: TokenizerConfig, model_type: Any) -> TokenizerFiles | None:
    """The tokenizer of a folder; None if there is none of a kind that is read here.

    Raises CheckpointError if a file is broken, or its words are neither byte-level BPE nor SentencePiece's.
    """
    if (folder / "tokenizer.json").exists():
        files = _read_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").exists():
        files = _read_tokenizer_model(folder / "tokenizer.model")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        files = _read_vocab_and_merges(folder)
    else:
        return None
    name = config.class_name or _CLASS_OF_MODEL.get(model_type, "")
    files.named |= config.named
    if not files.document and name in _CLASSES:
        files.pre, given = _CLASSES[name]
        files.named |= {kind: _END_OF_TEXT for kind in given if kind not in files.named and _END_OF_TEXT in files.words}
    where = str(folder / "tokenizer.json")
    listed = files.document.get("added_tokens") or []
    if not isinstance(listed, list):
        raise CheckpointError(f"{where}: added_tokens is {shown(listed)}; expected a list")
    in_document = [_added_token(entry, where, typed(_object(entry, where), "id", int, where)) for entry in listed]
    own = _of_the_pieces(files)
    tokens = [*own, *config.added(in_document), *(AddedToken(text, special=True) for text in files.named.values())]
    files.added = _assign(files.words, tokens, files.warnings)
    files.adds |= _adds(files, config)
    files.paths += config.paths
    return files


def _read_tokenizer_json(path: Path) -> TokenizerFiles:
    document, where = read_json(path), str(path)
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = shown(model.get("type")) if isinstance(model, dict) else "missing"
        raise CheckpointError(
            f"{path}: the kind of its model is {kind}; only byte-level and SentencePiece's BPE can be converted"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise CheckpointError(f"{path}: {key} is {shown(model[key])}; a GGUF cannot say that")
    words = _words(typed(model, "vocab", dict, where), where)
    merges = [_merge(pair, where) for pair in typed(model, "merges", list, where)]
    files = TokenizerFiles(words, merges, document=document, paths=[path])
    if sentencepiece_file.is_sentencepiece(document):
        files.pieces = sentencepiece_file.pieces_of(document, words, merges, where)
        files.warnings += files.pieces.warnings
    else:
        _check_normalizer(document.get("normalizer"), where)
    return files


def _read_tokenizer_model(path: Path) -> TokenizerFiles:
    """SentencePiece's own file. Its class puts bos in front of a text where nothing says otherwise."""
    words, pieces = sentencepiece_file.read_model(path)
    named = {kind: text for kind, text in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>")) if text in words}
    return TokenizerFiles(
        words, [], named=named, adds={"bos": "bos" in named}, paths=[path], pieces=pieces, warnings=pieces.warnings
    )


def _of_the_pieces(files: TokenizerFiles) -> Iterator[AddedToken]:
    """The pieces of a tokenizer.model that are found in a text before it is split."""
    if files.pieces is not None:
        kinds = files.pieces.types
        for text, id in files.words.items():
            if kinds.get(id) in (TokenType.CONTROL, TokenType.USER_DEFINED):
                yield AddedToken(text, kinds[id] == TokenType.CONTROL, id=id)


def _check_normalizer(section: Any, where: str) -> None:
    """Refuses what changes texts before they are split; NFC, which only rare texts need, has no place in a GGUF."""
    parts = section.get("normalizers", [section]) if isinstance(section, dict) else [section]
    for part in parts if isinstance(parts, list) else [parts]:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in (None, "NFC"):
            raise CheckpointError(f"{where}: normalizer is {shown(kind)}; it changes texts, and a GGUF cannot say that")


def _read_vocab_and_merges(folder: Path) -> TokenizerFiles:
    vocab, path = folder / "vocab.json", folder / "merges.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: is not UTF-8 text") from None
    merges = [
        _merge(line.rstrip("\r"), str(path)) for line in lines if line.strip() and not line.startswith("#version")
    ]
    return TokenizerFiles(_words(read_json(vocab), str(vocab)), merges, paths=[vocab, path])


def _words(vocab: dict[str, Any], where: str) -> dict[str, int]:
    words: dict[str, int] = {}
    taken: dict[int, str] = {}
    for word in vocab:
        words[word] = id = _id(vocab, word, where)
        if id in taken:
            raise CheckpointError(f"{where}: id {id} is both {shown(taken[id])} and {shown(word)}")
        taken[id] = word
    return words


def _id(ids: dict[str, Any], text: str, where: str) -> int:
    if not is_kind(ids[text], int):
        raise CheckpointError(f"{where}: the id of {shown(text)} is {shown(ids[text])}; expected a whole number")
    return ids[text]


def _merge(pair: Any, where: str) -> str:
    """ "a b", from any of the formats that there are."""
    parts = pair.split(" ") if isinstance(pair, str) else pair
    if isinstance(parts, list) and len(parts) == 2:
        left, right = parts
        if isinstance(left, str) and isinstance(right, str) and left and right and " " not in left + right:
            return f"{left} {right}"
    raise CheckpointError(f"{where}: merge {shown(pair)}; expected two texts without spaces")


def _by_id(entry: Any, id: str, path: Path) -> AddedToken:
    if not id.isascii() or not id.isdigit() or not is_kind(int(id), int):
        raise CheckpointError(f"{path}: added_tokens_decoder has the id {shown(id)}; expected a whole number")
    return _added_token(entry, str(path), int(id))


def _added_token(entry: Any, where: str, id: int) -> AddedToken:
    """An object of added_tokens or added_tokens_decoder."""
    entry = _object(entry, where)
    flags = {key: typed({key: False} | entry, key, bool, where) for key in ("special", *_FLAGS)}
    return AddedToken(typed(entry, "content", str, where), flags.pop("special"), any(flags.values()), id)


def _object(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: added token {shown(entry)}; expected an object")
    return entry


def _text(value: Any) -> str:
    """The text of a token that is named: itself, or its content."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _assign(words: dict[str, int], tokens: Iterable[AddedToken], warnings: list[str]) -> dict[int, AddedToken]:
    """Added tokens by id; a line if files say other ids."""
    ids: dict[str, int] = {}
    added: dict[int, AddedToken] = {}
    others: dict[str, int] = {}
    highest = len(words) - 1
    for token in tokens:
        if not token.text:
            continue
        if token.text not in ids:
            ids[token.text] = words.get(token.text, highest + 1)
            highest = max(highest, ids[token.text])
        id = ids[token.text]
        if token.id not in (None, id):
            others[token.text] = id
        is_bounded = token.is_bounded or (token.id is None and id in added and added[id].is_bounded)
        added[id] = AddedToken(token.text, token.special, is_bounded, id)
    if others:
        text, id = next(iter(others.items()))
        n_more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warnings.append(
            f"added token {shown(text)}{n_more}: not the id that the file says, but {id}, as in transformers"
        )
    if any(token.is_bounded for token in added.values()):
        warnings.append(
            "some added tokens take in the spaces beside them: a GGUF cannot say that, ids can differ there"
        )
    return added


def _adds(files: TokenizerFiles, config: TokenizerConfig) -> dict[str, bool]:
    """Whether bos and eos are put around texts: tokenizer_config.json says it, or the template of tokenizer.json."""
    adds: dict[str, bool] = {}
    post = files.document.get("post_processor")
    steps = post.get("processors", [post]) if isinstance(post, dict) else []
    for step in steps if isinstance(steps, list) else []:
        single = step.get("single") if isinstance(step, dict) and step.get("type") == "TemplateProcessing" else None
        if isinstance(single, list) and len(single) > 1:
            for kind, piece in (("bos", single[0]), ("eos", single[-1])):
                token = piece.get("SpecialToken") if isinstance(piece, dict) else None
                text = token.get("id") if isinstance(token, dict) else None
                if isinstance(text, str):
                    adds[kind] = files.named.setdefault(kind, text) == text
    for kind in ("bos", "eos"):
        value = config.values.get(f"add_{kind}_token")
        if isinstance(value, bool):
            adds[kind] = value
    return adds
