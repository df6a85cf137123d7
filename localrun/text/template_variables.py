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
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_USUAL_EFFORTS = {"low", "medium", "high"}  # of templates that name none but a default, as gpt-oss's
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


def thinking_effort(source: str, effort: str) -> dict[str, Any]:
    """The variables that have a template ask for thoughts of an effort, none to max; {} where it has none for that.

    An effort that a template does not know becomes the next higher one that it knows, or the highest.
    """
    if effort in _NO_EFFORT and (nothing := thinking(source, False)):
        return nothing
    read, spelled = variables(source), {text[1:-1] for text in _STRING.findall(source)}
    settings: dict[str, Any] = dict.fromkeys((name for name in _SWITCHES if name in read), True)
    if _EFFORT in read:
        known = spelled if {"low", "high"} <= spelled else spelled | _USUAL_EFFORTS
        settings[_EFFORT] = _nearest(effort, [each for each in _EFFORTS if each in known])
    return settings


def _nearest(effort: str, known: list[str]) -> str:
    """One of the known efforts, which go up; an effort of another name as it is."""
    if effort not in _EFFORTS:
        return effort
    rank = _EFFORTS.index(effort)
    return next((each for each in known if _EFFORTS.index(each) >= rank), known[-1])


def check_names(given: Mapping[str, Any], source: str | None = None) -> None:
    """Raises LocalrunError for a variable that is not the user's to set, or that a template's source does not read."""
    for name in given:
        if name in OWN_VARIABLES:
            raise LocalrunError(f"the template variable {name} is set by the conversation itself")
        if source is not None and name not in variables(source):
            raise LocalrunError(f"the chat template reads no variable {name}")
