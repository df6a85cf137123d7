"""Text to token ids and back, by llama.cpp's own vocabulary code (through llama-cpp-python, vocabulary only).

Ids are therefore llama.cpp's by construction. What this adds is the guarding: llama.cpp aborts the process on
vocabularies that do not hold together and on texts that need a deeper stack than there is; both are seen to here first.

Facts: include/llama.h and src/llama-vocab.cpp of https://github.com/ggml-org/llama.cpp @3f545becc.
"""

from __future__ import annotations

import codecs
import ctypes
import itertools
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from localrun.arguments import refuse, shown, token_ids, whole
from localrun.backends import binding, llama_log
from localrun.errors import ClosedError, GGUFError, LocalrunError
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.gguf.mapped import path_of
from localrun.text.harmony import ChannelDecoder, has_channels

# Values of tokenizer.ggml.model. The other kinds (bert, t5, rwkv, plamo2) belong to models that do not write text or
# are rare, and llama.cpp's code for them aborts or loops on faulty files.
NO_VOCABULARY = ("none", "no_vocab")
BYTE_PAIRS, SENTENCE_PIECE = ("gpt2", "gemma4"), ("llama",)
# Four bytes that would spell a code point past U+10FFFF: on them llama.cpp's byte pair code ends the process.
_PAST_UNICODE = re.compile(rb"\xf4[\x90-\xbf][\x80-\xbf]{2}|[\xf5-\xf7][\x80-\xbf]{3}")

_SCORES = "tokenizer.ggml.scores"
MAX_TOKEN_BYTES = 65_536  # longest known: 1,024 spaces; llama.cpp counts token bytes in int32
MAX_TEXT_BYTES = 2**31 - 1  # llama_tokenize takes an int32

# llama.cpp splits text with std::regex, which recurses once per character of a word or a run of spaces (measured: 420
# bytes of stack each), and an overflow kills the process. So tokenizing has a stack of its own, as large as it needs.
_STACK_BASE, _STACK_PER_CHAR = 16 << 20, 1 << 10
_SHORT_RUN = 256  # characters that any thread's stack has room for, and a thread takes ten times as long to start
_MAX_RUN = 4_000_000  # characters without a break; 4 GB of stack, reserved but touched only as deep as it recurses
_stack_size_lock = threading.Lock()  # threading.stack_size is one setting for the process


class Tokenizer:
    """The vocabulary of one GGUF file.

    n_vocab: number of ids; bos_id, eos_id: None where the vocabulary has none; add_bos: whether encode puts bos_id
    first; eog_ids: the ids that end a reply (end of sequence, of turn, of message). A file without a vocabulary
    (tokenizer.ggml.model "none") opens too: it has ids but no text.

    Args:
        path: the GGUF file, or the first part of a split one.
        file: the same file, already open; else it is opened for the checks and closed.

    Raises GGUFError on a file or a vocabulary that does not hold together, LocalrunError where llama.cpp refuses it.
    """

    def __init__(self, path: str | os.PathLike[str], file: GGUFFile | None = None) -> None:
        self.path = os.fspath(path)
        self._loaded: _Loaded | None = None
        self._is_closed = False
        if file is not None:
            self._open(file)
        else:
            with open_gguf(path) as opened:
                self._open(opened)

    def _open(self, file: GGUFFile) -> None:
        self._cached: dict[tuple[int, bool], bytes] = {}
        self.bos_id = self.eos_id = None
        self.add_bos = False
        self.eog_ids: frozenset[int] = frozenset()
        self._shown: dict[int, str] = {}
        kind = file.string("tokenizer.ggml.model")
        self._byte_pairs = kind in BYTE_PAIRS
        if kind in NO_VOCABULARY:
            self.n_vocab = file.u32(f"{file.string('general.architecture')}.vocab_size")
            return
        _check_vocabulary(file, kind)
        # The keys as they were checked, and nothing else: llama.cpp refuses types of tensors that it does not know.
        with path_of(file.without_tensors(as_floats=_SCORES)) as keys:
            self._load(keys)
        self._find_marks(file)

    def _find_marks(self, file: GGUFFile) -> None:
        """Control tokens of gpt-oss that llama.cpp makes a part of every text: here they are what the file says."""
        from gguf import GGUFValueType, TokenType

        loaded, kinds = self._vocabulary(), file.array("tokenizer.ggml.token_type", GGUFValueType.INT32, None)
        for id in (id for id, kind in enumerate([] if kinds is None else kinds) if kind == TokenType.CONTROL):
            if self._lib.llama_vocab_get_attr(loaded.vocab, id) & self._lib.LLAMA_TOKEN_ATTR_USER_DEFINED:
                self._shown[id] = self._piece(loaded, id, True).decode("utf-8", "replace")

    def _load(self, path: str) -> None:
        llama_log.silence()
        import llama_cpp

        self._lib = llama_cpp
        model = binding.load_model([path], vocab_only=True)
        if not model:
            raise LocalrunError(f"{self.path}: llama.cpp cannot read the vocabulary: {llama_log.last_error()}")
        self._loaded = _Loaded(llama_cpp, model)
        vocab = self._loaded.vocab
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self.bos_id = self._special("bos", llama_cpp.llama_vocab_bos(vocab), llama_cpp.llama_vocab_get_add_bos(vocab))
        self.eos_id = self._special("eos", llama_cpp.llama_vocab_eos(vocab), llama_cpp.llama_vocab_get_add_eos(vocab))
        self.add_bos = llama_cpp.llama_vocab_get_add_bos(vocab)
        self.eog_ids = frozenset(id for id in range(self.n_vocab) if llama_cpp.llama_vocab_is_eog(vocab, id))

    @cached_property
    def controls(self) -> dict[str, int]:
        """The ids of control tokens by their texts, as encode reads them with parse_special and only then."""
        loaded = self._loaded
        if loaded is None:
            return {}
        attributes = self._lib.LLAMA_TOKEN_ATTR_CONTROL | self._lib.LLAMA_TOKEN_ATTR_UNKNOWN
        ids = [id for id in range(self.n_vocab) if self._lib.llama_vocab_get_attr(loaded.vocab, id) & attributes]
        ids += self._shown
        texts = {self.piece(id, special=True).decode("utf-8", "replace"): id for id in ids}
        return {text: id for text, id in texts.items() if text.strip()}

    def _special(self, name: str, id: int, added: bool) -> int | None:
        """id, or None where there is none; llama.cpp's defaults for absent keys can lie outside a small vocabulary."""
        if 0 <= id < self.n_vocab:
            return id
        if added:
            raise GGUFError(f"{self.path}: key 'tokenizer.ggml.add_{name}_token' is true, but there is no {name} token")
        return None

    def encode(self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of text. Bytes need not be UTF-8.

        Args:
            add_special: add the ids the vocabulary puts around every text (BOS, EOS), as its metadata says.
            parse_special: read "<|im_end|>" and the like as their control tokens instead of as plain text.

        Raises LocalrunError if the file has no vocabulary, or the text is too long for llama.cpp.
        """
        if not isinstance(text, str | bytes):
            refuse("text", text, "a text, or bytes")
        loaded = self._vocabulary()
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if len(data) > MAX_TEXT_BYTES:
            raise LocalrunError(f"the text has {len(data)} bytes, more than the {MAX_TEXT_BYTES} a tokenizer can take")
        if self._shown and not parse_special:
            first, *rest = self._without_marks(data)
            ids = self._encode(loaded, first, add_special, False)
            return ids + [id for part in rest for id in self._encode(loaded, part, False, False)]
        return self._encode(loaded, data, add_special, parse_special)

    def _without_marks(self, data: bytes) -> list[bytes]:
        """The text in parts, of which none has one of these control tokens: cut in two it is a text like any other."""
        marks = b"|".join(re.escape(text.encode()) for text in self._shown.values())
        cuts = [0, *(mark.start() + 1 for mark in re.finditer(marks, data)), len(data)]
        return [data[start:stop] for start, stop in itertools.pairwise(cuts)]

    def _encode(self, loaded: _Loaded, data: bytes, add_special: bool, parse_special: bool) -> list[int]:
        if self._byte_pairs:
            data = _PAST_UNICODE.sub(b"\xff" * 4, data)  # as invalid, a byte each
        run = _longest_run(data)
        capacity = len(data) + 8  # a byte is at most one token; plus the special ones around
        for _ in range(2):
            buffer = (self._lib.llama_token * capacity)()
            count = _with_stack(
                run,
                self._lib.llama_tokenize,
                (loaded.vocab, data, len(data), buffer, capacity, add_special, parse_special),
            )
            if count >= 0:
                return buffer[:count]
            capacity = -count
        raise AssertionError(f"llama_tokenize asked for {capacity} ids and then for {-count}")

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ids: their pieces, joined, a leading space kept; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.piece(id, special=special) for id in token_ids(ids)).decode("utf-8", "replace")

    def piece(self, id: int, *, special: bool = False) -> bytes:
        """The bytes of one token, which may be part of a character; b"" for a control token unless special.

        Raises LocalrunError if the id is not in the vocabulary.
        """
        id = whole("id", id, "a token id, a whole number")
        loaded = self._vocabulary()
        if not 0 <= id < self.n_vocab:
            raise LocalrunError(
                f"token id {shown(id)} is not in the vocabulary of {self.path}, expected 0 to {self.n_vocab - 1}"
            )
        if id in self._shown and not special:
            return b""
        key = (id, special)
        if key not in self._cached:
            self._cached[key] = self._piece(loaded, id, special)
        return self._cached[key]

    def _piece(self, loaded: _Loaded, id: int, special: bool) -> bytes:
        size = 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            length = self._lib.llama_token_to_piece(loaded.vocab, id, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length  # negative: the bytes it needs
        raise AssertionError(f"llama_token_to_piece asked for {size} bytes and then for {-length}")

    def stream_decoder(self) -> StreamDecoder:
        """Decodes ids one at a time, holding back the bytes of a character that is not complete yet."""
        return StreamDecoder(self)

    def reply_decoder(self) -> StreamDecoder | ChannelDecoder:
        """The same, of a reply: where it has channels, their reasoning stands between <think> and </think>."""
        decoder = self.stream_decoder()
        return ChannelDecoder(decoder, self.controls) if has_channels(self.controls) else decoder

    def close(self) -> None:
        """Frees the vocabulary, once no thread reads it; the tokenizer cannot be used after. Safe to call twice."""
        self._is_closed, self._loaded = True, None

    def _vocabulary(self) -> _Loaded:
        """What llama.cpp holds, for as long as the caller keeps it. Raises LocalrunError if there is none."""
        loaded = self._loaded
        if self._is_closed:
            raise ClosedError("the model is closed; load it again")
        if loaded is None:
            raise LocalrunError(f"{self.path}: the file has no vocabulary, so text and tokens cannot be converted")
        return loaded


class _Loaded:
    """A vocabulary in llama.cpp's memory; freed when the last who uses it lets go of it."""

    def __init__(self, lib: Any, model: Any) -> None:
        self.vocab = lib.llama_model_get_vocab(model)
        weakref.finalize(self, lib.llama_model_free, model)


class StreamDecoder:
    """Token ids in, whole characters out; what push and flush return, joined, is what decode gives."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that id completes, often none or several."""
        return self._decoder.decode(self._tokenizer.piece(id))

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD; the decoder starts afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _longest_run(data: bytes) -> int:
    """An upper bound of the characters one match of a splitting regex can take: a word with the spaces around it."""
    longest = max((len(run) for run in data.split()), default=0)
    return longest + 2 * max((len(run) for run in re.findall(rb"\s+", data)), default=0)


def _with_stack(run: int, function: Callable[..., int], args: tuple[Any, ...]) -> int:
    """What function returns, called in a thread whose stack is deep enough for a run of that many characters."""
    if run > _MAX_RUN:
        raise LocalrunError(f"the text has {run} bytes without a break between words, expected at most {_MAX_RUN}")
    if run <= _SHORT_RUN:
        return function(*args)
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(function(*args)), name="tokenizer", daemon=True)
    with _stack_size_lock:
        before = threading.stack_size(_STACK_BASE + run * _STACK_PER_CHAR)
        try:
            thread.start()
        except RuntimeError:
            raise LocalrunError(f"no memory for the stack that tokenizing a run of {run} bytes needs") from None
        finally:
            threading.stack_size(before)
    thread.join()
    return results[0]


def _check_vocabulary(file: GGUFFile, kind: str) -> None:
    """Refuses the vocabularies that llama.cpp would abort on or read past the end of."""
    from gguf import GGUFValueType

    if kind not in BYTE_PAIRS + SENTENCE_PIECE:
        raise GGUFError(f"{file.path}: key 'tokenizer.ggml.model' is {kind[:50]!r}, expected 'gpt2' or 'llama'")
    tokens = file.array("tokenizer.ggml.tokens", GGUFValueType.STRING)
    kinds = file.array("tokenizer.ggml.token_type", GGUFValueType.INT32, None)
    for key, items in ((_SCORES, file.floats(_SCORES, None)), ("tokenizer.ggml.token_type", kinds)):
        if items is not None and len(items) != len(tokens):
            raise GGUFError(f"{file.path}: key '{key}' has {len(items)} items, expected {len(tokens)}, one a token")
    _check_tokens(file, tokens, kind)


def _check_tokens(file: GGUFFile, tokens: list[str], kind: str) -> None:
    """Refuses token lists that are empty, hold a token twice, a very long one or, for SentencePiece, not every byte."""
    key = f"{file.path}: key 'tokenizer.ggml.tokens'"
    if not tokens:
        raise GGUFError(f"{key} is empty, expected a vocabulary")
    # llama.cpp reads a token up to a NUL, and has a name for an empty one.
    names = {token.partition("\0")[0] or f"[EMPTY_{index}]" for index, token in enumerate(tokens)}
    if len(names) != len(tokens):
        raise GGUFError(f"{key} has {len(tokens)} tokens but {len(names)} different ones, expected no token twice")
    longest = max(map(_n_bytes, tokens))
    if longest > MAX_TOKEN_BYTES:
        raise GGUFError(f"{key} has a token of {longest} bytes, expected at most {MAX_TOKEN_BYTES}")
    if kind in SENTENCE_PIECE:
        for byte in range(256):
            if f"<0x{byte:02X}>" not in names and bytes([byte]).decode("utf-8", "surrogateescape") not in names:
                raise GGUFError(f"{key} has no token for the byte {byte:#04x}, expected one for every byte")


def _n_bytes(token: str) -> int:
    return len(token.encode("utf-8", "surrogateescape"))
