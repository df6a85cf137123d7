"""The bodies of requests: their fields by name and type, and what of them is refused.

Fields and their meaning: https://platform.openai.com/docs/api-reference/chat and /completions. Those that change no
reply here (user, store, ...) are taken and left; those that would change it and are not supported are refused unless
they ask for nothing. min_p, top_k, repeat_penalty, cache_prompt, return_progress and chat_template_kwargs are
llama.cpp's (tools/server/README.md).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from localrun.arguments import shown
from localrun.errors import LocalrunError
from localrun.generate.constraint import Constraint
from localrun.generate.sampling import MOST_TOP_LOGPROBS, Sampling
from localrun.serve.errors import invalid, unsupported
from localrun.serve.messages import Message, function_offered
from localrun.serve.structured import constraint_of
from localrun.serve.tools.held import Holding

MOST_CHOICES = 16
MOST_STOPS = 16
_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed"}
_SAMPLING |= {"presence_penalty", "frequency_penalty"}
_GUIDED = ("json", "regex", "choice", "grammar")
_PLACE = re.compile(r" - at `\$\.?([^`]*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")

Body = TypeVar("Body", bound=Struct)


class StreamOptions(Struct, forbid_unknown_fields=True):
    """stream_options."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # random padding, which this server never sends


class Generation(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of completion take."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None
    # Of no effect here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    cache_prompt: bool | None = None

    @property
    def choices(self) -> int:
        """Replies to a prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Texts that end a reply."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, usual: Sampling) -> Sampling:
        """The usual one with what the request sets. Raises APIError where a value is out of its range."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        given["logit_bias"] = _biases(self.logit_bias or {})
        given["top_logprobs"], given["constraint"] = self.told_logprobs, self.constraint()
        try:
            return replace(usual, **given)
        except LocalrunError as error:
            raise invalid(str(error), re.split(r"[ \[]", str(error))[0]) from None

    @property
    def told_logprobs(self) -> int | None:
        """Of how many of the likeliest tokens log-probabilities are told, beside those of the chosen; None for none."""
        raise NotImplementedError

    def constraint(self) -> Constraint | None:
        """What the reply has to be. Raises APIError if that is asked for in a wrong way, or twice."""
        guided = {name: getattr(self, f"guided_{name}") for name in _GUIDED}
        return constraint_of(self.response_format, guided, self.structured_outputs)

    def check(self) -> None:
        """Raises APIError for what is not supported."""
        if len(self.stops) > MOST_STOPS:
            raise invalid(f"stop has {len(self.stops)} texts; expected at most {MOST_STOPS}", "stop")
        if self.stream_options and not self.stream:
            raise invalid("stream_options is for streams; set stream to true", "stream_options")


class Chat(Generation, kw_only=True):
    """/v1/chat/completions; requests of the other protocols for chats are translated to this."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    # Supported only where they ask for nothing.
    functions: list[Any] | None = None
    modalities: list[str] | None = None

    @property
    def told_logprobs(self) -> int | None:
        """top_logprobs, where logprobs are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Tokens of a reply; None for as many as come."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        """Raises APIError on what is not understood, or does not go together."""
        super().check()
        if self.functions:
            raise unsupported("functions")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs is for log-probabilities; set logprobs to true", "top_logprobs")
        if self.modalities not in (None, ["text"]):
            raise unsupported("modalities", "a modality other than text")
        self.functions_offered()

    def functions_offered(self) -> list[Message]:
        """The functions that the reply may call, as templates take them. Raises APIError for what is none."""
        tools = [function_offered(tool, f"tools[{index}]") for index, tool in enumerate(self.tools or ())]
        choice = self.call_choice()
        if choice in ("required", "auto") or choice in [tool["function"]["name"] for tool in tools]:
            if choice != "auto" and not tools:
                raise invalid("tool_choice asks for a call, but there are no tools", "tool_choice")
            return tools
        if choice != "none":
            raise invalid(f"tool_choice names {choice!r}, which is none of the tools", "tool_choice")
        return []

    @property
    def calls_once(self) -> bool:
        """Whether a reply ends with its first call."""
        return self.parallel_tool_calls is False or self.call_choice() not in ("none", "auto", "required")

    @property
    def must_call(self) -> bool:
        """Whether a reply is nothing but calls."""
        return self.call_choice() not in ("none", "auto")

    def callable(self, offered: list[Message]) -> list[Message]:
        """Those of the functions offered that tool_choice leaves."""
        choice = self.call_choice()
        return offered if choice in ("auto", "required") else [t for t in offered if t["function"]["name"] == choice]

    def holding(self, offered: list[Message], answer: Constraint | None) -> Holding | None:
        """What a reply with calls is held to; None where it is free.

        Args:
            answer: what it has to be where it is no call.
        """
        if self.must_call:
            return Holding(True, not self.calls_once)
        strict = {tool["function"]["name"] for tool in self.tools or () if tool["function"].get("strict") is True}
        if not strict and not answer:
            return None
        loose = {tool["function"]["name"] for tool in offered} - strict
        return Holding(False, not self.calls_once, loose, answer)

    def call_choice(self) -> str:
        """none, auto, required, or the function to call. Raises APIError for anything else."""
        choice = self.tool_choice
        if choice is None:
            return "auto"
        if isinstance(choice, dict) and choice.get("type") == "function":
            function = choice.get("function")
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                return function["name"]
        if choice not in ("none", "auto", "required"):
            raise invalid("tool_choice is not none, auto, required, or a function", "tool_choice")
        return choice


class Completion(Generation, kw_only=True):
    """/v1/completions."""

    prompt: Any
    logprobs: Annotated[int, Meta(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    # Supported only where they ask for nothing.
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @property
    def told_logprobs(self) -> int | None:
        """The number that logprobs is here."""
        return self.logprobs

    def constraint(self) -> Constraint | None:
        """What the reply has to be, from its first token on. Raises APIError."""
        constraint = super().constraint()
        return constraint and replace(constraint, after_reasoning=False)

    @property
    def limit(self) -> int:
        """Tokens of a reply; 16 unless the request says, as the API has it."""
        return self.max_tokens or 16

    def check(self) -> None:
        """Raises APIError on what is not understood."""
        super().check()
        for name in ("echo", "suffix"):
            if getattr(self, name):
                raise unsupported(name)
        if self.best_of not in (None, self.choices):
            raise unsupported("best_of", "best_of other than n")

    def prompts(self) -> list[str | list[int]]:
        """Texts, or token ids. Raises APIError if they are neither."""
        given = self.prompt
        prompts = [given] if isinstance(given, str) or _is_ids(given) else given
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
            raise invalid("prompt is a text, a list of token ids, or a list of one of these, and not empty", "prompt")
        if len(prompts) * self.choices > MOST_CHOICES:
            raise invalid(f"prompts times n are {len(prompts) * self.choices}; at most {MOST_CHOICES}", "prompt")
        return prompts


class Conversation(Struct, forbid_unknown_fields=True, kw_only=True):
    """/apply-template."""

    messages: list[dict[str, Any]]
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    tools: list[dict[str, Any]] | None = None

    def functions_offered(self) -> list[Message]:
        """The functions that the reply may call, as templates take them. Raises APIError for what is none."""
        return [function_offered(tool, f"tools[{index}]") for index, tool in enumerate(self.tools or ())]


class Text(Struct, forbid_unknown_fields=True):
    """/tokenize."""

    content: str
    add_special: bool = False
    parse_special: bool = True


class Tokens(Struct, forbid_unknown_fields=True):
    """/detokenize."""

    tokens: list[int]


def read(data: bytes | memoryview, kind: type[Body]) -> Body:
    """A body of this kind. Raises APIError if it is none."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise invalid(f"the body is not JSON: {error}") from None


def _biases(given: dict[str, float]) -> dict[int, float]:
    """logit_bias by token id."""
    for token in given:
        if not token.isdecimal() or len(token) > 9:
            raise invalid(f"logit_bias has the key {shown(token)}; expected a token id", "logit_bias")
    return {int(token): bias for token, bias in given.items()}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _invalid_field(message: str) -> Exception:
    """msgspec's message in the API's words."""
    unknown, place = _UNKNOWN.search(message), _PLACE.search(message)
    where = place[1] if place else ""
    if unknown:
        name = f"{where}.{unknown[1]}" if where else unknown[1]
        return invalid(f"Unrecognized request argument supplied: {name}", name, "unknown_parameter")
    return invalid(f"{where or 'the body'}: {_PLACE.sub('', message)}", where or None)
