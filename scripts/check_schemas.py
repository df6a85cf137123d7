"""Random JSON schemas: every reply that ends by itself has to parse and to validate, whatever the temperature.

    python scripts/check_schemas.py [MODEL] [--schemas 2000] [--calls 2000] [--temperature 1.5] [--seed 0]
        [--vocabulary GGUF]

Schemas hold objects, arrays, enums, numbers with bounds, strings with lengths or patterns, nested, and anyOf. Replies
are judged by jsonschema. As many calls follow: there the schemas are those of functions' parameters, and each reply has
to be a call, in one form of calls after the other; a form that cannot write a schema refuses it. What a mask takes is
measured in these replies, and again on random logits over a large vocabulary (102,400 tokens unless another file is
given). A line for every 100 on stderr; the last line of stdout is one JSON document. Exit 1 if a reply is wrong, or if
none of a kind ended by itself.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

import localrun
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.generate import session as session_module
from localrun.generate.constraint import Constraint, Guide
from localrun.generate.sampling import Sampling
from localrun.serve.errors import APIError
from localrun.serve.reply import Reply
from localrun.serve.tools import forms
from localrun.serve.tools.form import CallParser, Form
from localrun.serve.tools.held import Holding
from localrun.text.tokenizer import Tokenizer

VOCABULARY = Path(__file__).resolve().parents[1] / "tests" / "data" / "vocab" / "ggml-vocab-deepseek-llm.gguf"
PROMPT = "Once upon a time, there was a little girl named Lily."
PATTERNS = (
    "^[a-z]{2,8}$",
    r"^\d{3}-\d{4}$",
    "^(red|green|blue)( (red|green|blue)){0,3}$",
    "[aeiou]",
    "^[A-Z][a-z]*$",
    "é|ü",
)
NAMES = ("name", "age", "tags", "a b", 'quo"te', "日本", "x", "items", "is_ready", "back\\slash")
WORDS = ("red", "green", "", " ", 'say "no"', "naïve", "🙂", "line\nbreak", "a/b")
FORMS = (
    *(forms.DEEPSEEK_V3, forms.DEEPSEEK_V31, forms.DSML, forms.MINIMAX, forms.KIMI),
    *(forms.GLM, forms.HUNYUAN, forms.QWEN3_CODER, forms.QWEN3),
)

Schema = dict[str, Any]
# A schema, what makes the constraint of it, and where a reply has the document that it is about.
Case = tuple[Schema, Callable[[], Constraint], Callable[[str], str]]


def random_schema(rng: random.Random, depth: int = 3) -> Schema:
    """A schema that something satisfies."""
    kinds = ["string", "string", "integer", "number", "boolean", "null", "enum", "const"]
    if depth:
        kinds += ["object", "object", "object", "array", "array", "anyOf"]
    kind = rng.choice(kinds)
    if kind == "string":
        return {"type": "string", **_string(rng)}
    if kind in ("integer", "number"):
        return {"type": kind, **_bounds(rng)}
    if kind == "enum":
        return {"enum": [_value(rng) for _ in range(rng.randint(1, 4))]}
    if kind == "const":
        return {"const": _value(rng)}
    if kind == "object":
        return _object(rng, depth)
    if kind == "array":
        fewest = rng.randint(0, 2)
        return {
            "type": "array",
            "items": random_schema(rng, depth - 1),
            "minItems": fewest,
            "maxItems": fewest + rng.randint(0, 3),
        }
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    return {"type": kind}


def _string(rng: random.Random) -> Schema:
    kind = rng.randrange(4)
    if kind == 0:
        return {}
    if kind == 1:
        return {"pattern": rng.choice(PATTERNS)}
    if kind == 2:
        return {"format": rng.choice(("date", "time", "uuid", "ipv4"))}
    fewest = rng.randint(0, 5)
    return {"minLength": fewest, "maxLength": fewest + rng.randint(0, 10)}


def _bounds(rng: random.Random) -> Schema:
    low = rng.randint(-1000, 1000)
    bounds: Schema = {}
    if rng.random() < 0.6:
        bounds[rng.choice(("minimum", "exclusiveMinimum"))] = low
    if rng.random() < 0.6:
        bounds[rng.choice(("maximum", "exclusiveMaximum"))] = low + rng.randint(2, 500)
    return bounds


def _value(rng: random.Random) -> Any:
    return rng.choice(
        (rng.choice(WORDS), rng.randint(-99, 99), rng.randint(-99, 99) / 4, None, True, [1, "a"], {"k": []})
    )


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(NAMES, rng.randint(0, 4))
    schema: Schema = {"type": "object", "properties": {name: random_schema(rng, depth - 1) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.7]
    if rng.random() < 0.7:
        schema["additionalProperties"] = False
    return schema


def _parameters(rng: random.Random) -> Schema:
    """A function's; of some it is anyOf that says what they are."""
    if rng.random() < 0.8:
        return _object(rng, 3)
    branches = [_object(rng, 2) for _ in range(rng.randint(1, 3))]
    return {"type": "object", "properties": {}, "required": [], "anyOf": branches}


@dataclass
class Counts:
    """Replies by how they ended, the seconds that masks took, and what is wrong."""

    ended: int = 0
    cut: int = 0
    refused: int = 0
    mask_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Something was judged, and nothing is wrong."""
        return self.ended > 0 and not self.wrong

    def document(self) -> dict[str, int]:
        """The numbers."""
        return {"ended": self.ended, "cut": self.cut, "refused": self.refused, "wrong": len(self.wrong)}


def check(engine: Engine, n: int, temperature: float, seed: int, max_tokens: int = 150) -> Counts:
    """Replies to n schemas, judged."""
    return _judged(engine, _documents(n, seed), temperature, seed, max_tokens)


def check_calls(engine: Engine, n: int, temperature: float, seed: int, max_tokens: int = 300) -> Counts:
    """Replies that must call functions with n schemas, judged."""
    return _judged(engine, _calls(engine.tokenizer, n, seed), temperature, seed, max_tokens)


def _documents(n: int, seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    for _ in range(n):
        schema = random_schema(rng)
        yield schema, partial(Constraint.json_schema, schema), str


def _calls(tokenizer: Tokenizer, n: int, seed: int) -> Iterator[Case]:
    """In one form after the other."""
    rng = random.Random(seed)
    for number in range(n):
        schema, form = _parameters(rng), FORMS[number % len(FORMS)]
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        yield (
            schema,
            partial(Holding(True, False).constraint, form, tools, tokenizer),
            partial(_arguments, form, schema),
        )


def _arguments(form: Form, schema: Schema, text: str) -> str:
    """Those of the one call that a text is. Raises ValueError if it is none, or several."""
    reply, parser = Reply(), CallParser(form, {"f": schema})
    for part in (*parser.push(text), *parser.flush()):
        reply.add(part)
    (call,) = reply.calls
    return call.arguments


def _judged(engine: Engine, cases: Iterable[Case], temperature: float, seed: int, max_tokens: int) -> Counts:
    counts, session, ids = Counts(), engine.session(), engine.tokenizer.encode(PROMPT)
    for number, (schema, make, document_in) in enumerate(cases):
        if number and number % 100 == 0:
            print(f"{number}: {counts.document()}", file=sys.stderr, flush=True)
        try:
            constraint = make()
        except (LocalrunError, APIError) as error:
            counts.refused += 1
            print(f"refused: {error}: {json.dumps(schema)}", file=sys.stderr)
            continue
        sampling = Sampling(temperature, top_k=0, top_p=1, min_p=0, seed=seed + number, constraint=constraint)
        with _timed(counts.mask_s):
            text = "".join(session.reply(ids, sampling, max_tokens=max_tokens))
        if session.finish_reason != "stop":
            counts.cut += 1
            continue
        counts.ended += 1
        try:
            jsonschema.validate(json.loads(document_in(text)), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            counts.wrong.append(f"{' '.join(str(error).split())[:300]}: {text!r} of {json.dumps(schema)}")
    return counts


class _timed:
    """While it lasts, sessions note what their masks take."""

    def __init__(self, seconds: list[float]):
        class Timed(Guide):
            def restrict(self, logits: np.ndarray) -> None:
                started = time.perf_counter()
                super().restrict(logits)
                seconds.append(time.perf_counter() - started)

        self._timed = Timed

    def __enter__(self) -> None:
        session_module.Guide = self._timed  # type: ignore[misc]

    def __exit__(self, *_: object) -> None:
        session_module.Guide = Guide  # type: ignore[misc]


def masks(tokenizer: Tokenizer, n: int, seed: int) -> list[float]:
    """Seconds of the masks of n schemas, on random logits."""
    rng, logits_rng, seconds = random.Random(seed), np.random.default_rng(seed), list[float]()
    for guide in _guides(tokenizer, n, rng):
        for _ in range(60):
            logits = logits_rng.standard_normal(tokenizer.n_vocab)
            started = time.perf_counter()
            guide.restrict(logits)
            seconds.append(time.perf_counter() - started)
            guide.accept(int(logits.argmax()))
            if guide.is_complete:
                break
    return seconds


def _guides(tokenizer: Tokenizer, n: int, rng: random.Random) -> Iterator[Guide]:
    for _ in range(n):
        yield Guide(Constraint.json_schema(random_schema(rng)), tokenizer, [])


def _microseconds(seconds: Sequence[float]) -> dict[str, float]:
    median, most = np.percentile(seconds, [50, 90])
    return {"masks": len(seconds), "median_us": round(1e6 * median, 1), "p90_us": round(1e6 * most, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="miniature")
    parser.add_argument("--schemas", type=int, default=2000)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=Path, default=VOCABULARY)
    options = parser.parse_args()
    with localrun.load(options.model) as engine:
        replies = check(engine, options.schemas, options.temperature, options.seed)
        calls = check_calls(engine, options.calls, options.temperature, options.seed)
        small = engine.tokenizer.n_vocab
    tokenizer = Tokenizer(options.vocabulary)
    started = time.perf_counter()
    Constraint.json_object().check(tokenizer)
    prepare_s = time.perf_counter() - started
    large = masks(tokenizer, max(1, options.schemas // 20), options.seed)
    for line in (*replies.wrong, *calls.wrong):
        print("wrong:", line, file=sys.stderr)
    is_good = all(counts.is_good for counts, n in ((replies, options.schemas), (calls, options.calls)) if n)
    document = {
        "temperature": options.temperature,
        "replies": {"schemas": options.schemas, **replies.document()},
        "calls": {"schemas": options.calls, **calls.document()},
        "mask": [
            {"vocabulary": small, **_microseconds(replies.mask_s + calls.mask_s)},
            {"vocabulary": tokenizer.n_vocab, "prepare_s": round(prepare_s, 3), **_microseconds(large)},
        ],
        "good": is_good,
    }
    print(json.dumps(document))
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
