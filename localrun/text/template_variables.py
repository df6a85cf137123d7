"""The variables of a chat template that a user sets: whether the model thinks before it replies, and others by name.

Which ones a template reads is found in its text, which is not run for that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from localrun.errors import LocalrunError
from localrun.text.chat_template import OWN_VARIABLES

_SWITCHES = ("enable_thinking", "thinking")  # of Qwen, GLM and most others; of DeepSeek since V3.1
_EFFORT, _MOST_EFFORT = "reasoning_effort", "high"  # of gpt-oss and Hunyuan
_NO_EFFORT = ("no_think", "none")  # what such a template may call a reply without thoughts
_STRING = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_CODE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)
_NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*")


def variables(source: str) -> set[str]:
    """Every name in a template's code, those of its own and of Jinja among them."""
    return {name for code in _CODE.findall(_COMMENT.sub("", source)) for name in _NAME.findall(_STRING.sub("''", code))}


def thinking(source: str, thinks: bool) -> dict[str, Any] | None:
    """The variables that have a template ask for thoughts, or for none; None where it has no switch for that."""
    read = variables(source)
    if switches := [name for name in _SWITCHES if name in read]:
        return dict.fromkeys(switches, thinks)
    spelled = {text[1:-1] for text in _STRING.findall(source)}
    nothing = next((word for word in _NO_EFFORT if word in spelled), None) if _EFFORT in read else None
    return {_EFFORT: _MOST_EFFORT if thinks else nothing} if nothing else None


def check_names(given: Mapping[str, Any], source: str | None = None) -> None:
    """Raises LocalrunError for a variable that is not the user's to set, or that a template's source does not read."""
    for name in given:
        if name in OWN_VARIABLES:
            raise LocalrunError(f"the template variable {name} is set by the conversation itself")
        if source is not None and name not in variables(source):
            raise LocalrunError(f"the chat template reads no variable {name}")
