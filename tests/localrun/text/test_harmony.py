"""Harmony's channels: what is read of a reply, and what of it comes back into the next prompt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from chats import TEMPLATES, template, transformers_text
from vocabularies import write_vocabulary

from localrun.text.harmony import without_reasoning
from localrun.text.prompt import chat_ids
from localrun.text.tokenizer import Tokenizer

CONTROLS = (
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
SOURCE = next(path for path in TEMPLATES if path.stem == "openai-gpt-oss-120b").read_text(encoding="utf-8")
REPLY = "<|channel|>analysis<|message|>They greet \U0001f44d.<|end|><|start|>assistant<|channel|>final<|message|>Hello!"
SHOWN = "<think>\nThey greet \U0001f44d.\n</think>\n\nHello!"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "v.gguf", CONTROLS))


def shown(tokenizer: Tokenizer, text: str) -> str:
    decoder = tokenizer.reply_decoder()
    return "".join(map(decoder.push, tokenizer.encode(text, add_special=False, parse_special=True))) + decoder.flush()


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (REPLY, SHOWN),
        (REPLY.partition("<|end|>")[0], "<think>\nThey greet \U0001f44d."),
        (REPLY.rpartition("<|message|>")[0], "<think>\nThey greet \U0001f44d.\n</think>\n\n"),
        ("<|channel|>final<|message|>Hello!", "Hello!"),
        ("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>It is.",
         "I look.\n\nIt is."),
        ("a text without channels", "a text without channels"),
    ],
    ids=["reasoning", "cut in it", "cut behind it", "none", "another channel", "raw"],
)  # fmt: skip
def test_reasoning_is_shown_as_other_models_write_it(tokenizer: Tokenizer, reply: str, text: str) -> None:
    assert shown(tokenizer, reply) == text


def test_the_turn_ends_where_the_model_ends_it(tokenizer: Tokenizer) -> None:
    """And not with a message of it."""
    assert {tokenizer.controls[text] for text in ("<|return|>", "<|call|>", "<|endoftext|>")} == tokenizer.eog_ids


@pytest.mark.parametrize(
    ("content", "answer"),
    [(SHOWN, "Hello!"), ("Hello!", "Hello!"), ("<think>\nThey", ""), ("a <think> b", "a <think> b")],
)
def test_the_next_prompt_has_the_answer_alone(tokenizer: Tokenizer, content: str, answer: str) -> None:
    """As transformers has it for messages without reasoning."""
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": content}, {"role": "user", "content": "Bye"},
    ]  # fmt: skip
    expected = transformers_text(SOURCE, [*messages[:2], messages[2] | {"content": answer}, messages[3]], True)
    assert tokenizer.decode(chat_ids(template(SOURCE), tokenizer, messages), special=True) == expected
    assert without_reasoning(content) == answer


def test_the_marks_are_control_tokens(tokenizer: Tokenizer) -> None:
    """llama.cpp takes them for parts of every text."""
    text = "a<|start|>b<|start|><|channel|>" * 700
    ids = tokenizer.encode(text, add_special=False)
    assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.controls.values())
    parsed = tokenizer.encode("a<|start|>b", add_special=False, parse_special=True)
    assert tokenizer.controls["<|start|>"] in parsed
    assert tokenizer.decode(parsed) == "ab" and tokenizer.decode(parsed, special=True) == "a<|start|>b"


def test_a_message_cannot_open_a_channel(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": REPLY}]
    ids = chat_ids(template(SOURCE), tokenizer, messages)
    plain = chat_ids(template(SOURCE), tokenizer, [{"role": "user", "content": re.sub("<.*?>", "", REPLY)}])
    count = len([id for id in ids if id in tokenizer.controls.values()])
    assert count == len([id for id in plain if id in tokenizer.controls.values()])
