"""What a reply has to be, a JSON document of a schema say, and what holds it to that: masks of tokens by llguidance.

llguidance (https://github.com/guidance-ai/llguidance, docs/syntax.md and docs/json_schema.md) runs a parser over the
reply's bytes and says before each token which ones of the vocabulary may come next. Where the text is forced it allows
the tokens that the tokenizer would make of it. A reply is cut where its limit of tokens or the context ends it; one
that ends by itself is what the constraint says, whatever the temperature.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, proxy

import numpy as np

from localrun.arguments import refuse, texts
from localrun.errors import LocalrunError
from localrun.generate.reasoning_end import NoReasoning, ReasoningEnd, reasoning_end
from localrun.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Between JSON's tokens: a model that is not sure of the next one would go on with spaces for good.
JSON_OPTIONS = {"whitespace_pattern": r"[ \t]{1,2}|\r?\n[ \t]{0,24}", "lenient": False}
_MOST_COMPILED = 32  # grammars that a vocabulary keeps
_MOST_FORCED = 4096  # texts whose ids it keeps
_MOST_SHOWN = 300  # characters of an error of llguidance's
_LONGEST_PIECE = 32  # bytes, of the tokens that forced text is cut into where the tokenizer changes it


@dataclass(frozen=True)
class Constraint:
    """What the text of a reply has to be.

    Attributes:
        grammar: in llguidance's JSON form, or in its variant of Lark.
        after_reasoning: the model may think before, as the end of the prompt and its vocabulary say.
    """

    grammar: str
    after_reasoning: bool = True

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Constraint:
        """A JSON document that a JSON Schema accepts.

        Raises LocalrunError if it is none, nothing satisfies it, or it has a keyword that llguidance does not know.
        """
        if not isinstance(schema, Mapping):
            refuse("the schema", schema, "a JSON object")
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise LocalrunError(f"the schema is not JSON: {error}") from None
        return cls._checked("the schema", "json_schema", text)

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """A text all of which a regular expression matches (Rust's syntax, without look-around)."""
        if not isinstance(pattern, str):
            refuse("the regular expression", pattern, "a text")
        return cls._checked("the regular expression", "rx", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Constraint:
        """One of some texts."""
        if not (found := texts("the choice", choices)) or not all(found):
            raise LocalrunError("the choice has no texts, or an empty one; expected a list of texts")
        return cls._checked("the choice", "choice", "start: " + " | ".join(map(json.dumps, found)))

    @classmethod
    def lark(cls, text: str) -> Constraint:
        """What a grammar makes: llguidance's variant of Lark, or GBNF, llama.cpp's form of grammars.

        A mistake in Lark shows when the grammar is first used, as it may name tokens of a vocabulary.

        Raises LocalrunError if it is GBNF and broken.
        """
        from llguidance.gbnf_to_lark import any_to_lark

        if not isinstance(text, str) or not text.strip():
            refuse("the grammar", text, "a text")
        try:
            return cls(any_to_lark(text))
        except Exception as error:  # of several kinds, an IndexError among them
            raise LocalrunError(f"the grammar is neither Lark with a rule 'start' nor GBNF: {_line(error)}") from None

    @classmethod
    def _checked(cls, what: str, kind: str, text: str) -> Constraint:
        from llguidance import LLMatcher

        try:
            if kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(text, defaults=JSON_OPTIONS, overrides={"lenient": False})
            else:
                grammar = LLMatcher.grammar_from_regex(text) if kind == "rx" else LLMatcher.grammar_from_lark(text)
            error = LLMatcher.validate_grammar(grammar)
        except ValueError as failure:  # nested too deeply
            error = str(failure)
        if error and not error.startswith("WARNING"):
            raise LocalrunError(f"{what} is not usable: {_line(error)}")
        return cls(grammar)

    def check(self, tokenizer: Tokenizer) -> None:
        """Get it ready for a vocabulary. Raises LocalrunError if it is broken, or too large."""
        _vocabulary(tokenizer).matcher(self.grammar)


class Guide:
    """A constraint at work on one reply.

    Args:
        prompt: its end says whether the model is thinking when the reply begins.

    Raises LocalrunError if the constraint is broken, or too large.
    """

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer, prompt: Sequence[int]):
        vocabulary = _vocabulary(tokenizer)
        self._matcher = vocabulary.matcher(constraint.grammar)
        self._reasoning: ReasoningEnd = (
            reasoning_end(tokenizer, prompt) if constraint.after_reasoning else NoReasoning()
        )
        self._ends, self._n_vocab = tokenizer.eog_ids, tokenizer.n_vocab
        self._mask = np.zeros((vocabulary.size + 31) // 32, np.uint32)

    @property
    def is_complete(self) -> bool:
        """Nothing but the end may come."""
        return self._reasoning.is_over and self._matcher.is_stopped()

    def restrict(self, logits: np.ndarray) -> None:
        """Set what may not come next to -inf, in float64 (vocab).

        Raises LocalrunError where nothing may, or llguidance gives up.
        """
        if self._reasoning.is_over:
            allowed = self._allowed()[: len(logits)]
            allowed[list(self._reasoning.may_begin)] = True
            np.copyto(logits[: len(allowed)], -np.inf, where=~allowed)
            logits[len(allowed) :] = -np.inf
        else:
            self._reasoning.restrict(logits)
        if logits.max() == -np.inf:
            raise LocalrunError("the constraint leaves no token that the model could say")

    def accept(self, token: int) -> None:
        """Take notice of the token that was chosen."""
        if self._reasoning.takes(token) or token in self._ends:
            return
        self._matcher.consume_token(token)
        self._check()

    def possible(self, drafts: list[int]) -> list[int]:
        """The first ones of drafts that may come."""
        return drafts[: self._matcher.validate_tokens(drafts)] if self._reasoning.is_over else drafts

    def _allowed(self) -> np.ndarray:
        """Whether each token may come, bool (n_vocab)."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        return np.unpackbits(self._mask.view(np.uint8), count=self._n_vocab, bitorder="little").view(bool)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise LocalrunError(f"the constraint cannot be followed: {_line(self._matcher.get_error())}")


class _Vocabulary:
    """A tokenizer's tokens for llguidance, and the grammars that were compiled for them.

    There is one more token than the tokenizer has: what ends a reply where the vocabulary has nothing for it.
    """

    def __init__(self, tokenizer: Tokenizer):
        from llguidance import LLTokenizer, TokenizerWrapper

        self._tokenizer, self._lock = proxy(tokenizer), threading.Lock()  # or neither would ever be freed
        self._compiled: dict[str, LLMatcher] = {}
        self._forced: dict[bytes, list[int]] = {}
        self.size = tokenizer.n_vocab + 1
        special = set(tokenizer.controls.values()) | tokenizer.eog_ids
        self.eos_token_id, self.bos_token_id = self.size - 1, None
        self.special_token_ids = [*sorted(special), self.eos_token_id]
        self.tokens = [tokenizer.piece(id, special=id in special) for id in range(tokenizer.n_vocab)] + [b"<end>"]
        ends = sorted(tokenizer.eog_ids) or [self.eos_token_id]
        self._llguidance = LLTokenizer(TokenizerWrapper(self), n_vocab=self.size, eos_token=ends)

    def __call__(self, text: bytes) -> list[int]:
        """The ids of forced text: the tokenizer's, unless it changes the text, as SentencePiece does at its start."""
        ids = self._forced.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special=False)
            if b"".join(self.tokens[id] for id in ids) != text:
                ids = self._longest_pieces(text)
            if len(self._forced) >= _MOST_FORCED:
                self._forced.clear()
            self._forced[text] = ids
        return ids

    def _longest_pieces(self, text: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + _LONGEST_PIECE), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:
                break  # a byte that the vocabulary lacks: what comes before it is forced all the same
            ids.append(self._ids[text[start:end]])
            start = end
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {piece: id for id, piece in reversed(list(enumerate(self.tokens))) if piece and id not in special}

    def matcher(self, grammar: str) -> LLMatcher:
        """A parser at its start. Compiling one takes up to a second, a copy microseconds."""
        from llguidance import LLMatcher, LLParserLimits

        with self._lock:
            compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            compiled = LLMatcher(self._llguidance, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
            if compiled.is_error():
                raise LocalrunError(f"the constraint is not usable: {_line(compiled.get_error())}")
        with self._lock:
            self._compiled[grammar] = compiled  # the latest last
            while len(self._compiled) > _MOST_COMPILED:
                del self._compiled[next(iter(self._compiled))]
        return compiled.deep_copy()


_vocabularies: WeakKeyDictionary[Tokenizer, _Vocabulary] = WeakKeyDictionary()
_making = threading.Lock()


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    """Made once, in half a second for 128,000 tokens."""
    with _making:
        if tokenizer not in _vocabularies:
            _vocabularies[tokenizer] = _Vocabulary(tokenizer)
        return _vocabularies[tokenizer]


def _line(error: object) -> str:
    """An error of llguidance's on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
