"""Stories to tokens: which are used, how they are split, the tokenizer, and the order they are read in.

The tokenizer is byte-level BPE that splits text as DeepSeek-V3's does, a way that llama.cpp and localrun know by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# What may be used, by collection: TinyStories (CDLA-Sharing-1.0), TinyFabulist (MIT), the Library of Congress's Aesop
# (public domain).
SOURCES = {
    "tinystories": (
        "ToonTalk-1000",
        "chaitanya-nb",
        "lab:ts_2M.txt",
        "lab:ts_val_decoded.txt",
        "lab:ts_test_decoded.txt",
        "maxme1-3000",
        "yuninxia-val",
        "aditya-bpe1024",
    ),
    "tinyfabulist": ("tf1-fables",),
    "aesop": ("aesop4children",),
}
VALIDATION_SHARE = 100  # one story in so many
# DeepSeek-V3's: numbers of up to three digits, scripts without spaces, then words with what stands before them.
_PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Typographic signs that the sources use without rule; one spelling saves a small vocabulary.
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "\u00a0": " ", "\r": None, "\ufeff": None})


@dataclass(frozen=True)
class Story:
    source: str
    text: str

    def is_validation(self) -> bool:
        """By its own text, so that no order of files or stories changes the split."""
        return hashlib.sha256(self.text.encode()).digest()[0] * VALIDATION_SHARE < 256


def read_stories(folder: Path, collections: Iterable[str] = SOURCES) -> list[Story]:
    """The stories of some collections of SOURCES from stories.txt, by the places in stories_index.tsv."""
    used = {source for collection in collections for source in SOURCES[collection]}
    corpus = (folder / "stories.txt").read_bytes()
    stories = []
    for line in (folder / "stories_index.tsv").read_text().splitlines()[1:]:
        _, source, offset, n_bytes = line.split("\t")
        if source in used:
            text = corpus[int(offset) : int(offset) + int(n_bytes)].decode().translate(_PLAIN).strip()
            stories.append(Story(source, text))
    return stories


def train_tokenizer(texts: Iterator[str] | list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; ids 0 and 1 begin and end a text."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def prepare(
    stories: list[Story], folder: Path, vocab_size: int, tokenizer: Tokenizer | None = None
) -> dict[str, object]:
    """Writes tokenizer.json, {train,validation}.npz and sources.json to the folder; what sources.json says.

    A given tokenizer is used as it is; else one of vocab_size entries is trained on the stories.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = {
        "train": [story for story in stories if not story.is_validation()],
        "validation": [story for story in stories if story.is_validation()],
    }
    tokenizer = tokenizer or train_tokenizer((story.text for story in split["train"]), vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    report: dict[str, object] = {}
    for name, part in split.items():
        n_tokens = _write_tokens(folder / f"{name}.npz", tokenizer, part)
        sources = dict(Counter(story.source for story in part))
        n_bytes = sum(len(story.text.encode()) for story in part)
        report[name] = {"stories": len(part), "bytes": n_bytes, "tokens": n_tokens, "stories_by_source": sources}
    (folder / "sources.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _write_tokens(path: Path, tokenizer: Tokenizer, stories: list[Story]) -> int:
    """Each story between its two special tokens, uint16, and where each begins."""
    eos = tokenizer.token_to_id(EOS)
    encoded = [[*one.ids, eos] for one in tokenizer.encode_batch([story.text for story in stories])]
    starts = np.cumsum([0, *map(len, encoded)])
    tokens = np.fromiter((id for ids in encoded for id in ids), np.uint16, starts[-1])
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, tokens=tokens, starts=starts)
    os.replace(temporary, path)
    return len(tokens)


@dataclass(frozen=True)
class Tokens:
    """Stories as tokens, one after the other; story i is tokens[starts[i] : starts[i + 1]]."""

    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Tokens:
        with np.load(path) as arrays:
            return cls(arrays["tokens"], arrays["starts"])

    def first(self, n: int | None) -> Tokens:
        """The first n stories; all for None."""
        starts = self.starts if n is None else self.starts[: n + 1]
        return Tokens(self.tokens[: starts[-1]], starts)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.tokens[start:end] for start, end in zip(self.starts[:-1], self.starts[1:], strict=True))


def plain_text(stories: Iterable[np.ndarray], tokenizer: Tokenizer) -> str:
    """Stories as text, a blank line between them: for programs that read a text file."""
    return "\n\n".join(tokenizer.decode(story.tolist()) for story in stories)


class Stream:
    """The endless text of training: all stories in an order drawn for each epoch, packed without gaps.

    A batch is known by its step alone, so going on after an interruption needs no state.
    """

    def __init__(self, stories: Tokens, seed: int) -> None:
        self.stories, self.seed = stories, seed
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, step: int, n_sequences: int, length: int) -> np.ndarray:
        """int64 (n_sequences, length + 2): inputs and the two tokens behind them, which the next sequence repeats."""
        first = step * n_sequences * length
        flat = self._read(first, n_sequences * length + 2)
        return np.stack([flat[i * length : (i + 1) * length + 2] for i in range(n_sequences)]).astype(np.int64)

    def _read(self, start: int, n_tokens: int) -> np.ndarray:
        epoch, offset = divmod(start, len(self.stories.tokens))
        parts = []
        while n_tokens > 0:
            part = self._epoch(epoch)[offset : offset + n_tokens]
            parts.append(part)
            epoch, offset, n_tokens = epoch + 1, 0, n_tokens - len(part)
        return np.concatenate(parts)

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.stories.starts) - 1)
        starts, tokens = self.stories.starts, self.stories.tokens
        return np.concatenate([tokens[starts[i] : starts[i + 1]] for i in order])
