"""Chat templates of published models, a conversation, and transformers' renderer."""

from typing import Any

from paths import DATA

from localrun.text.chat_template import ChatTemplate

TEMPLATES = sorted((DATA / "templates").glob("*.jinja"))
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CHAT = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": 'Is 1 < 2 & "3" > 2?\n'},
    {"role": "assistant", "content": "<think>Yes.</think>Yes, 👍."},
    {"role": "user", "content": "Why?"},
]


THOUGHT = [
    CHAT[0],
    CHAT[1],
    {"role": "assistant", "reasoning_content": "1 is less, and 3 more.", "content": "Yes, 👍."},
    CHAT[3],
]
"""The same, with what the model thought in a field of its own."""


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token=BOS, eos_token=EOS)


def source_of(name: str) -> str:
    """A published template."""
    return next(path for path in TEMPLATES if path.stem == name).read_text(encoding="utf-8")


def transformers_text(
    source: str, messages: list[dict[str, str]], add_generation_prompt: bool, **variables: Any
) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        [messages],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        bos_token=BOS,
        eos_token=EOS,
        **variables,
    )
    return texts[0]
