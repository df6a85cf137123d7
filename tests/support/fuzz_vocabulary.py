"""Broken and odd vocabularies by the thousand: the keys of small GGUF files, and the tokenizer files of a checkpoint.

Every case follows from the seed and its number alone, so that one can be had again: vocabulary_case(seed, number),
tokenizer_files_case(seed, number). use_vocabulary and plan_tokenizer_files do with a case what generate and convert do.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_checkpoint
import gguf_builder as b
from fuzz_checkpoint import ODD, spelled
from vocabularies import LETTERS, MERGES, WORDS

from localrun.convert import Options, make_plan
from localrun.gguf.file import open_gguf
from localrun.text.chat_template import chat_template
from localrun.text.tokenizer import Tokenizer

Keys = dict[str, tuple[int, Any, int]]  # name -> type, value, type of an array's items
Change = Callable[[random.Random, Keys], str]

_CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
_TEXTS = (
    b"", b" ", b"\n", b"a", b"he", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80",
    b"\0", b"a\0b", b"<0x0A>", b"<0xZZ>", b"[EMPTY_3]", b"[PAD5]", b"<s>", b"</s>", b"<unk>", b"<|im_end|>",
    b"<|eot_id|>", b"<end_of_turn>", "\u2581".encode(), "\u2581a".encode(), "\u0120t".encode(), b"x" * 300,
    b"x" * 70_000, "\U0001f642".encode(), b"\x1b[31m", b"{{ 1/0 }}", b"<|" + b"|" * 300,
)  # fmt: skip
_SAID = (
    b"a the he<|im_end|>\n<think> x" + "\u2581a \U0001f642 \u0120".encode() + bytes(range(256)) + b"".join(_TEXTS[:20])
)
_MERGES = (b"", b" ", b"  ", b"a", b"a ", b" a", b"a b", b"a b c", b"h e", b"\xff \xff", b"zz yy", b"x" * 5000 + b" y")
_IDS = (0, 1, 2, 3, 11, 255, 256, 258, 263, 264, 10**6, 2**31 - 1, 2**31, 2**32 - 1)
_TYPES = (-(2**31), -1, 0, 1, 2, 3, 4, 5, 6, 7, 100, 2**31 - 1)
_SCORES = (0.0, -0.0, -1.0, 1.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan"), 1e-45)
_MODELS = ("gpt2", "llama", "none", "no_vocab", "bert", "t5", "rwkv", "plamo2", "gemma4", "hybriddna", "", "x" * 99)
_PRES = (
    "gpt-2", "default", "llama-bpe", "qwen2", "deepseek-llm", "deepseek-coder", "deepseek-v3", "kimi-k2", "smollm",
    "falcon", "starcoder", "refact", "command-r", "olmo", "dbrx", "poro-chat", "chatglm-bpe", "viking", "jais",
    "tekken", "codeshell", "bloom", "exaone", "gpt-4o", "superbpe", "trillion", "bailingmoe", "llama4", "pixtral",
    "seed-coder", "hunyuan", "hunyuan-dense", "glm4", "minerva-7b", "megrez", "jina-v2-es", "granite-docling",
    "", "nonsense",
)  # fmt: skip
_ID_KEYS = ("bos", "eos", "unknown", "seperator", "padding", "cls", "mask", "eot", "eom", "fim_pre", "fim_rep")
_FLAGS = (
    "add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces",
    "escape_whitespaces", "treat_whitespace_as_suffix", "normalizer.lowercase",
)  # fmt: skip
_TEMPLATES = ("", " ", "{{ messages[0].content }}", "{% for %}", "\0", "x" * 300_000)


@functools.cache
def vocabularies() -> dict[str, Keys]:
    """Sound ones: byte pairs, SentencePiece."""
    pairs = [*LETTERS, *WORDS, *_CONTROLS]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a", *_CONTROLS]
    types = [2, 3, 3] + [6] * 256 + [1] * 3 + [3, 3, 3, 4, 4]
    shared: Keys = {"general.architecture": (b.STRING, b"llama", 0), "llama.vocab_size": (b.U32, 264, 0)}
    shared |= {f"tokenizer.ggml.{name}": (b.BOOL, 0, 0) for name in ("add_bos_token", "add_space_prefix")}
    return {
        "pairs": shared | _vocabulary("gpt2", pairs, [1] * 259 + [3, 3, 3, 4, 4]) | {
            "tokenizer.ggml.pre": (b.STRING, b"gpt-2", 0),
            "tokenizer.ggml.merges": (b.ARRAY, [merge.encode() for merge in MERGES], b.STRING),
            "tokenizer.ggml.eos_token_id": (b.U32, 259, 0),
        },
        "pieces": shared | _vocabulary("llama", pieces, types) | {
            "tokenizer.ggml.scores": (b.ARRAY, [-float(at) for at in range(len(pieces))], b.F32),
        },
    }  # fmt: skip


def _vocabulary(model: str, tokens: list[str], types: list[int]) -> Keys:
    return {
        "tokenizer.ggml.model": (b.STRING, model.encode(), 0),
        "tokenizer.ggml.tokens": (b.ARRAY, [token.encode() for token in tokens], b.STRING),
        "tokenizer.ggml.token_type": (b.ARRAY, types, b.I32),
    }


# ---- changes of keys -------------------------------------------------------------------------------------------------


def _items(name: str, item: int, values: tuple[Any, ...]) -> Change:
    """Some items of an array become others, go, come, or stand twice; it may come where there was none."""

    def change(rng: random.Random, keys: Keys) -> str:
        key = f"tokenizer.ggml.{name}"
        items = list(keys[key][1]) if key in keys and keys[key][2] == item else []
        for _ in range(rng.choice((1, 1, 1, 2, 20))):
            at, how = rng.randrange(len(items) + 1), rng.randrange(5)
            if how == 0:
                del items[at : at + rng.choice((1, 1, 300))]
            elif how == 1 and items:
                items[at:at] = [rng.choice(items)]
            elif how == 2:
                items[at:at] = [rng.choice(values)]
            else:
                items[at : at + 1] = [rng.choice(values)]
        keys[key] = (b.ARRAY, items, item)
        return f"{name}: {len(items)} items"

    return change


def _scalar(names: tuple[str, ...], type_: int, values: tuple[Any, ...], prefix: str = "tokenizer.ggml.") -> Change:
    def change(rng: random.Random, keys: Keys) -> str:
        name, value = rng.choice(names), rng.choice(values)
        keys[prefix + name] = (type_, value.encode() if isinstance(value, str) else value, 0)
        return f"{name} = {value!r:.40}"

    return change


def _of_another_type(rng: random.Random, keys: Keys) -> str:
    name = rng.choice(list(keys))
    type_ = rng.choice((b.U32, b.I32, b.U16, b.U64, b.F32, b.F64, b.BOOL, b.STRING, b.ARRAY))
    if type_ == b.ARRAY:
        item = rng.choice((b.U32, b.I32, b.F32, b.F64, b.U8, b.STRING))
        values = [b"a"] if item == b.STRING else [0]
        keys[name] = (type_, values * rng.choice((0, 1, 3, 264)), item)
    else:
        keys[name] = (type_, b"a" if type_ == b.STRING else 1, 0)
    return f"{name} of type {type_}"


def _without(rng: random.Random, keys: Keys) -> str:
    name = rng.choice(list(keys))
    del keys[name]
    return f"without {name}"


_CHANGES: tuple[tuple[Change, int], ...] = (
    (_items("tokens", b.STRING, _TEXTS), 6),
    (_items("token_type", b.I32, _TYPES), 4),
    (_items("scores", b.F32, _SCORES), 3),
    (_items("merges", b.STRING, _MERGES), 5),
    (_items("precompiled_charsmap", b.U8, (0, 1, 4, 255)), 1),
    (_scalar(tuple(f"{name}_token_id" for name in _ID_KEYS), b.U32, _IDS), 4),
    (_scalar(_FLAGS, b.BOOL, (0, 1)), 3),
    (_scalar(("model",), b.STRING, _MODELS), 1),
    (_scalar(("pre",), b.STRING, _PRES), 4),
    (_scalar(("token_type_count",), b.U32, _IDS), 1),
    (_scalar(("chat_template",), b.STRING, _TEMPLATES, "tokenizer."), 1),
    (_scalar(("general.name",), b.STRING, ("phi-3", "jina-v2-de", "\x1b[31m"), ""), 1),
    (_of_another_type, 2),
    (_without, 1),
)


def vocabulary_case(seed: int, number: int) -> tuple[str, bytes]:
    """What was done, and a GGUF file without tensors."""
    rng = random.Random(f"vocabulary {seed} {number}")
    name = rng.choice(("pairs", "pairs", "pieces"))
    keys = dict(vocabularies()[name])
    changes, weights = zip(*_CHANGES, strict=True)
    n_changes = rng.choice((0, 1, 1, 1, 2, 2, 3, 5))
    said = [change(rng, keys) for change in rng.choices(changes, weights, k=n_changes) if keys]
    return f"{name}: {', '.join(said)}", b.build([_packed(key, *entry) for key, entry in keys.items()])


def _packed(name: str, type_: int, value: Any, item: int) -> bytes:
    return b.array(name, item, value) if type_ == b.ARRAY else b.key(name, type_, value)


def use_vocabulary(path: Path) -> None:
    """Open it, encode some texts, decode every token. Raises LocalrunError if it is refused."""
    with open_gguf(path) as file:
        tokenizer = Tokenizer(path, file)
        chat_template(file, tokenizer)
    try:
        if not tokenizer.controls and tokenizer.n_vocab > 2**20:
            return  # ids without texts
        texts = [
            b"a the he<|im_end|>\n<think> x",
            "\u2581a \U0001f642 \u0120".encode(),
            bytes(range(256)),
            b"",
            *_TEXTS[:20],
        ]
        for text in texts:
            for parse_special in (False, True):
                tokenizer.decode(tokenizer.encode(text, parse_special=parse_special), special=True)
        tokenizer.decode(range(tokenizer.n_vocab))
    finally:
        tokenizer.close()


# ---- tokenizer files -------------------------------------------------------------------------------------------------

_N_VOCAB = fuzz_checkpoint.CONFIGS["llama"]["vocab_size"]
_SPLITS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@functools.cache
def tokenizer_files() -> dict[str, Any]:
    """Sound ones, all that there can be, for the small llama of fuzz_checkpoint: a few bytes, words, added tokens."""
    words = [LETTERS[byte] for byte in b"\n !abcdefhlortx0189"] + ["he", "\u0120t"]
    vocab = {word: id for id, word in enumerate(words)}
    added = [_ADDED | {"id": len(words) + at, "content": text, "special": at < 3} for at, text in enumerate(_CONTROLS)]
    model = {"type": "BPE", "vocab": vocab, "merges": ["h e", ["\u0120", "t"]], "byte_fallback": False}
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>"}}, {"Sequence": {"id": "A"}}],
    }
    by_id = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added}
    return {
        "tokenizer.json": {
            "added_tokens": added, "model": model, "pre_tokenizer": _SPLITS, "post_processor": post,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "add_bos_token": True,
            "eos_token": _ADDED | {"content": "<|im_end|>"},
            "added_tokens_decoder": by_id, "additional_special_tokens": ["<|im_end|>"],
        },
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "extra_special_tokens": {"image_token": "<i>"}},
        "added_tokens.json": {"<think>": len(words) + 3, "<tool>": len(words) + 5},
        "vocab.json": vocab,
        "merges.txt": "#version: 0.2\nh e\n\u0120 t\n",
    }  # fmt: skip


def _change_one(rng: random.Random, files: dict[str, Any]) -> str:
    """A value anywhere in a file becomes another, goes, comes, or stands for another place's."""
    name = rng.choice(list(files))
    places = _places(files[name])
    if not places or rng.random() < 0.1:
        files[name] = rng.choice((*map(copy.deepcopy, ODD), b"", b"{", b"\xff", b"\xef\xbb\xbf{}", None))
        return f"{name} is {files[name]!r:.40}"
    container, key = rng.choice(places)
    value = rng.choice(
        (*ODD, *_CONTROLS, "\u2581x", " x", f"[PAD{_N_VOCAB - 1}]", _N_VOCAB - 1, _N_VOCAB, "he", ["h", "e"])
    )
    if rng.random() < 0.2:
        value = rng.choice(places)[0]
    how = rng.randrange(4)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[rng.choice(("", "he", "<|im_end|>", "\ud800", "-1", "7", "x" * 300))] = container.pop(key)
    elif how == 2 and isinstance(container, list):
        container.append(copy.deepcopy(value))
    else:
        container[key] = copy.deepcopy(value)
    return f"{name}: {key!r:.40} to {value!r:.40}"


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    found, pending = [], [value] if isinstance(value, dict | list) else []
    while pending:
        container = pending.pop()
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            found.append((container, key))
            if isinstance(container[key], dict | list):
                pending.append(container[key])
    return found


def tokenizer_files_case(seed: int, number: int) -> tuple[str, dict[str, bytes | None]]:
    """What was done, and the files of a checkpoint folder; its configuration and weights are sound."""
    rng = random.Random(f"tokenizer files {seed} {number}")
    files = {name: copy.deepcopy(content) for name, content in tokenizer_files().items() if rng.random() < 0.7}
    if rng.random() < 0.02:  # rendered in a process of its own, which takes a while
        files[rng.choice(("chat_template.jinja", "chat_template.json"))] = rng.choice(_TEMPLATES)
    said = [_change_one(rng, files) for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))) if files]
    sound = fuzz_checkpoint.bases()["llama"].files()
    return ", ".join(said), sound | {name: _content(content) for name, content in files.items()}


def _content(value: Any) -> bytes | None:
    """A file's bytes; None, for a folder of that name, as it is."""
    if isinstance(value, bytes) or value is None:
        return value
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else spelled(value)


def plan_tokenizer_files(folder: Path) -> None:
    """Plan the folder's conversion, which reads back what it will write. Raises LocalrunError if it is refused."""
    make_plan(folder, folder / "out.gguf", Options(mix="F32", pre="gpt-2")).source.close()
