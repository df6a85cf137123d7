"""The token ids of a prompt: whose control tokens count.

In a chat, those that the template writes. What a message spells out, "<|im_end|>" say, is text like any other: a
user's words cannot end his turn. Templates trim, split and escape messages, so where their text has gone is found by
rendering the conversation twice: as it is, and with private characters around each control token that a message
spells. Without these characters the second text must be the first one, or the prompt is refused.

Some templates read a message as one text, others walk over its parts ({"type": "text", "text": ...}). Which it is shows
when private characters stand in for the words: where they do not come out, the words would not either. llama.cpp finds
it out by rendering too (common/jinja/caps.cpp of https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localrun import arguments
from localrun.errors import ContextFullError
from localrun.text.chat_template import Answer, ChatTemplate, Message, TemplateError, Tools, text_of
from localrun.text.harmony import CHANNEL, without_reasoning
from localrun.text.tokenizer import Tokenizer

# Of the private planes of Unicode, so that no filter changes them and trimming takes them for letters.
_OPEN, _CLOSE = "\U00100000", "\U00100001"
_FIRST_WORD = 0xF0000  # three of it stand for the first message's words, of the next for the second's
_ENCLOSED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]")
REASONING = "reasoning_content"  # a message's key for what the model thought before it
THINKING = "thinking"  # the same, where Harmony's template wants it
_FREE = ("content", REASONING, THINKING, "name", "tool_calls", "tool_call_id")  # what a message may say in any words
_LONG = 16  # characters a token: a longer text is looked at before it is tokenized; English has four, code three
_MUST_BE_THERE = ("user", "system", "tool")  # templates may leave an earlier reply out


@dataclass(frozen=True)
class Prompt:
    """A conversation as the template writes it.

    Attributes:
        text: equal to what transformers' apply_chat_template gives.
        spelled: where messages spell control tokens in it, (start, stop) each, in order.
    """

    text: str
    spelled: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Offer:
    """What a model is told of functions that it may call.

    Attributes:
        tools: for the template.
        notes: for the end of the system message, which is the first then, where the template says nothing of tools; its
            control tokens count.
    """

    tools: Tools = None
    notes: str = ""


_NOTHING = Offer()


def chat_ids(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: list[Message],
    settings: Mapping[str, Any] | None = None,
    offer: Offer = _NOTHING,
    room: int | None = None,
) -> list[int]:
    """The ids that a reply to messages continues: the template's control tokens as such, and one BOS where one is due.

    Args:
        messages: with tool_calls, and with results of role "tool", as the template wants them.
        settings: other variables of the template.
        room: tokens that there is room for, if that is known: a prompt that is far longer is not tokenized whole.

    Raises TemplateError if the template is broken, refuses the messages, leaves words of theirs out, or changes them
    so that its own control tokens cannot be told from theirs. Raises LocalrunError if they are no messages of texts,
    and ContextFullError for a prompt that is far longer than there is room for.
    """
    controls = _any_of(tokenizer.controls)
    prompt = chat_prompt(template, _checked(template, messages), controls, settings, offer)
    _check_length(tokenizer, prompt.text, room)
    ids = _encode(tokenizer, prompt, controls)
    is_due = tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]
    return [tokenizer.bos_id, *ids] if is_due else ids


def chat_text(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: list[Message],
    settings: Mapping[str, Any] | None = None,
    offer: Offer = _NOTHING,
) -> str:
    """The text that chat_ids encodes. Raises as that does."""
    return chat_prompt(template, _checked(template, messages), _any_of(tokenizer.controls), settings, offer).text


def _checked(template: ChatTemplate, given: Any) -> list[Message]:
    """Messages as the template wants them. Raises LocalrunError if they are none."""
    messages = arguments.messages(given)
    return [_without_reasoning(message) for message in messages] if CHANNEL in template.source else messages


def _without_reasoning(message: Message) -> Message:
    """A reply as Harmony's templates want it."""
    is_reply = message["role"] == "assistant"
    return message | {"content": without_reasoning(message["content"])} if is_reply else message


def raw_ids(tokenizer: Tokenizer, text: str, room: int | None = None) -> list[int]:
    """The ids of a prompt that the user writes himself, control tokens included; not a second BOS if he writes one.

    Raises ContextFullError if the text is far longer than there is room for, in tokens.
    """
    _check_length(tokenizer, text, room)
    ids = tokenizer.encode(text, parse_special=True)
    return ids[1:] if tokenizer.add_bos and ids[:2] == [tokenizer.bos_id] * 2 else ids


def _check_length(tokenizer: Tokenizer, text: str, room: int | None) -> None:
    """Raises ContextFullError if the beginning of a long text is twice as much as there is room for.

    Nothing that could follow would halve that: at most the word changes that the beginning ends in.
    """
    if room is None or len(text) <= _LONG * room:
        return
    n_tokens = len(tokenizer.encode(text[: _LONG * room], add_special=False, parse_special=True))
    if n_tokens > 2 * room:
        raise ContextFullError(f"the prompt has more than {n_tokens - 1} tokens; the context holds {room}")


def chat_prompt(
    template: ChatTemplate,
    messages: list[Message],
    controls: re.Pattern[str],
    settings: Mapping[str, Any] | None = None,
    offer: Offer = _NOTHING,
) -> Prompt:
    """The conversation as text, and where its messages spell what controls matches. Raises as chat_ids does."""
    rendered = _render(template, messages, set(), controls, settings, offer)
    if rendered.lost:
        as_parts = _render(template, messages, rendered.lost, controls, settings, offer)
        rendered = as_parts if as_parts.lost < rendered.lost else rendered
    text = text_of(rendered.answer)
    for index in sorted(rendered.lost):
        if messages[index]["role"] in _MUST_BE_THERE:
            raise TemplateError(f"the chat template leaves the {messages[index]['role']} message out")
    return Prompt(text, _spelled(text, rendered.marked, controls) if rendered.marked else ())


@dataclass(frozen=True)
class _Rendered:
    """A conversation's text; messages whose words it lacks; its text with marks, if there is anything to mark."""

    answer: Answer
    lost: set[int]
    marked: Answer | None


def _render(
    template: ChatTemplate,
    messages: list[Message],
    parts: set[int],
    controls: re.Pattern[str],
    settings: Mapping[str, Any] | None,
    offer: Offer,
) -> _Rendered:
    """The conversation, those messages whose indices are in `parts` as parts."""
    words = {
        index: 3 * chr(_FIRST_WORD + index) for index, message in enumerate(messages) if message["content"].strip()
    }
    probes = [message | {"content": words.get(index, "")} for index, message in enumerate(messages)]
    marked = [_marked(message, controls) for message in messages]
    tools, marked_tools = offer.tools, _marked_texts(offer.tools, controls)
    conversations, each_tools = [messages, probes], [tools, tools]
    if (marked, marked_tools) != (messages, tools):
        conversations, each_tools = [*conversations, marked], [*each_tools, marked_tools]
    conversations = [_with_parts(_with_notes(each, offer.notes), parts) for each in conversations]
    answer, probe, *rest = template.answers(conversations, settings=settings, tools=each_tools)
    lost = {index for index, word in words.items() if "error" in answer or _is_lost(word, probe)}
    return _Rendered(answer, lost, rest[0] if rest else None)


def _marked(message: Message, controls: re.Pattern[str]) -> Message:
    """A message with marks around the control tokens that it spells, in whatever is not the protocol's."""
    return message | {key: _marked_texts(message[key], controls) for key in _FREE if key in message}


def _marked_texts(value: Any, controls: re.Pattern[str]) -> Any:
    """The same of all texts within a value."""
    if isinstance(value, str):
        return controls.sub(f"{_OPEN}\\g<0>{_CLOSE}", value)
    if isinstance(value, list):
        return [_marked_texts(item, controls) for item in value]
    if isinstance(value, dict):
        return {_marked_texts(key, controls): _marked_texts(item, controls) for key, item in value.items()}
    return value


def _with_notes(messages: list[Message], notes: str) -> list[Message]:
    """Notes at the end of the system message, which is always the first."""
    if not notes:
        return messages
    return [messages[0] | {"content": f"{messages[0]['content']}\n\n{notes}"}, *messages[1:]]


def _with_parts(messages: list[Message], parts: set[int]) -> list[Message]:
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]} if index in parts else message
        for index, message in enumerate(messages)
    ]


def _is_lost(word: str, probe: Answer) -> bool:
    """Whether a message's words do not come out, or as a part in Python's spelling."""
    text = probe.get("text")
    return text is not None and (word not in text or f"'text': '{word}'" in text)


def _spelled(text: str, marked: Answer, controls: re.Pattern[str]) -> list[tuple[int, int]]:
    """Where text spells control tokens that messages brought: those that stand between marks in `marked`."""
    spans, plain, at = [], "", 0
    with_marks = marked.get("text", "")
    for mark in _ENCLOSED.finditer(with_marks):
        plain += with_marks[at : mark.start()]
        inner, at = mark[1] or "", mark.end()
        if controls.fullmatch(inner):
            spans.append((len(plain), len(plain) + len(inner)))
        plain += inner
    if plain + with_marks[at:] != text:
        raise TemplateError("a message spells a control token, and the chat template changes it: write it otherwise")
    return spans


def _encode(tokenizer: Tokenizer, prompt: Prompt, controls: re.Pattern[str]) -> list[int]:
    """The ids of a prompt. Between two control tokens of the template all is text where a message spells one."""
    hidden = _hide(prompt)
    edges = [0, *(edge for control in controls.finditer(hidden) for edge in control.span()), len(hidden)]
    ids: list[int] = []
    done = 0
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if _OPEN in hidden[start:stop]:
            ids += tokenizer.encode(prompt.text[done:start], add_special=False, parse_special=True)
            ids += tokenizer.encode(prompt.text[start:stop], add_special=False)
            done = stop
    return ids + tokenizer.encode(prompt.text[done:], add_special=False, parse_special=True)


def _hide(prompt: Prompt) -> str:
    """The text with a mark for each character of what messages spell."""
    hidden, at = "", 0
    for start, stop in prompt.spelled:
        hidden += prompt.text[at:start] + _OPEN * (stop - start)
        at = stop
    return hidden + prompt.text[at:]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches each of these texts, the longest that there is; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
