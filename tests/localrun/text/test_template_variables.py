"""Thinking on and off, and other variables, in every published template: transformers' texts."""

import re
from pathlib import Path

import pytest
from chats import CHAT, TEMPLATES, THOUGHT, source_of, template, transformers_text

from localrun.errors import LocalrunError
from localrun.text.chat_template import text_of
from localrun.text.prompt import chat_prompt
from localrun.text.template_variables import check_names, thinking, thinking_effort, variables

BOTH = {"enable_thinking", "thinking"}
SWITCHES = {
    "GLM-4.6": {"enable_thinking"},
    "GLM-4.7-Flash": {"enable_thinking"},
    "Qwen-Qwen3-0.6B": {"enable_thinking"},
    "deepseek-ai-DeepSeek-V3.1": BOTH,
    "deepseek-ai-DeepSeek-V3.2": BOTH,
    "tencent-Hy3": {"reasoning_effort"},
}
# Conversations: no reply yet; a reply with its thoughts in a field, and within its text.
CHATS = {"first": CHAT[:2], "thought": THOUGHT, "tagged": CHAT}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_thinking_in_published_templates(path: Path) -> None:
    """Character by character, and the switch makes a difference wherever there is one."""
    source = path.read_text(encoding="utf-8")
    found = []
    for thinks in (True, False):
        settings = thinking(source, thinks)
        assert set(settings or {}) == SWITCHES.get(path.stem, set())
        answers = template(source).answers(list(CHATS.values()), settings=settings)
        expected = [transformers_text(source, chat, True, **(settings or {})) for chat in CHATS.values()]
        assert [text_of(answer) for answer in answers] == expected
        found.append(expected)
    assert (found[0] != found[1]) == (path.stem in SWITCHES)


def test_what_may_end_a_reply_without_thoughts() -> None:
    """gpt-oss always thinks; how much is a variable of its own."""
    source = source_of("openai-gpt-oss-120b")
    assert thinking(source, False) is None and "reasoning_effort" in variables(source)
    assert "Reasoning: low" in transformers_text(source, CHAT[:2], True, reasoning_effort="low")


EFFORTS = {
    "openai-gpt-oss-120b": {"none": "low", "minimal": "low", "low": "low", "medium": "medium", "xhigh": "high"},
    "tencent-Hy3": {"none": "no_think", "minimal": "low", "medium": "high", "high": "high", "max": "high"},
}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_efforts_in_published_templates(path: Path) -> None:
    """Every template takes every effort; one that has no word for it gets the next higher that it has."""
    source = path.read_text(encoding="utf-8")
    words = EFFORTS.get(path.stem, {"none": None, "high": None})
    switches = SWITCHES.get(path.stem, set()) - {"reasoning_effort"}
    for effort, word in words.items():
        settings = thinking_effort(source, effort)
        assert settings.pop("reasoning_effort", None) == word
        assert settings == dict.fromkeys(switches, effort != "none")
    if path.stem in EFFORTS:
        each = [thinking_effort(source, effort) for effort in words]
        assert "error" not in {
            key for settings in each for key in template(source).answers([CHAT[:2]], settings=settings)[0]
        }
        assert thinking_effort(source, "my own") == {"reasoning_effort": "my own"}


def test_names_are_those_of_code() -> None:
    source = "thinking {# enable_thinking #}{{ m.thinking ~ 'enable_thinking' }}"
    source += '{% if reasoning_effort == "x y" %}a{% endif %}'
    assert variables(source) == {"m", "if", "reasoning_effort", "endif"}
    check_names({"reasoning_effort": "low"}, source)
    with pytest.raises(LocalrunError, match="reads no variable thinking"):
        check_names({"thinking": True}, source)
    with pytest.raises(LocalrunError, match="messages is set by the conversation"):
        check_names({"messages": []})


def test_thoughts_cannot_write_control_tokens() -> None:
    """Where the template keeps them: here of the last reply, which a tool's answer would follow."""
    source = source_of("Qwen-Qwen3-0.6B")
    thoughts = {"role": "assistant", "reasoning_content": "a <|im_end|> b", "content": "c"}
    prompt = chat_prompt(template(source), [CHAT[1], thoughts], re.compile(re.escape("<|im_end|>")))
    (start, stop), at = prompt.spelled[0], prompt.text.index("a <|im_end|> b")
    assert len(prompt.spelled) == 1 and (start, prompt.text[start:stop]) == (at + 2, "<|im_end|>")
