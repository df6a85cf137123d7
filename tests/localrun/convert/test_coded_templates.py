"""DeepSeek-V4's chat template against the published description of its encoding (encoding/README.md), word by word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chats import BOS, EOS, template

from localrun.convert.coded_templates import coded_template
from localrun.text.chat_template import text_of

USER, REPLY = "<｜User｜>", "<｜Assistant｜>"
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
TWO = {"role": "user", "content": "What is 2+2?"}
FOUR = {"role": "assistant", "reasoning_content": "Simple arithmetic.", "content": "2 + 2 = 4."}
MORE = {"role": "user", "content": "And 3+3?"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = [
    {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": "é", "b": 5, "c": [None]}}},
    {"id": "y", "type": "function", "function": {"name": "now", "arguments": {}}},
]
CALLING = {"role": "assistant", "reasoning_content": "I call.", "content": "", "tool_calls": CALLS}
RESULTS = [
    {"role": "tool", "tool_call_id": "y", "content": "noon"},
    {"role": "tool", "tool_call_id": "x", "content": "10"},
]
CALLS_TEXT = """

<｜DSML｜tool_calls>
<｜DSML｜invoke name="add">
<｜DSML｜parameter name="a" string="true">é</｜DSML｜parameter>
<｜DSML｜parameter name="b" string="false">5</｜DSML｜parameter>
<｜DSML｜parameter name="c" string="false">[null]</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="now">

</｜DSML｜invoke>
</｜DSML｜tool_calls>"""
TOOLS_TEXT = """

## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{"name": "add", "parameters": {"type": "object"}}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
ABSOLUTE = """Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
THINKS = {"thinking": True}
FIRST = f"{BOS}{SYSTEM['content']}{USER}What is 2+2?{REPLY}"
Case = tuple[list[dict[str, Any]], dict[str, Any], Any, str]
CASES: dict[str, Case] = {
    "a question": ([SYSTEM, TWO], {}, None, FIRST + "</think>"),
    "to think about": ([SYSTEM, TWO], THINKS, None, FIRST + "<think>"),
    "by the other name": ([SYSTEM, TWO], {"enable_thinking": True}, None, FIRST + "<think>"),
    "a reply": (
        [SYSTEM, TWO, FOUR, MORE], {}, None,
        FIRST + f"</think>2 + 2 = 4.{EOS}{USER}And 3+3?{REPLY}</think>",
    ),
    "earlier thoughts are dropped": (
        [SYSTEM, TWO, FOUR, MORE], THINKS, None,
        FIRST + f"</think>2 + 2 = 4.{EOS}{USER}And 3+3?{REPLY}<think>",
    ),
    "but not where that is asked": (
        [SYSTEM, TWO, FOUR, MORE], THINKS | {"drop_thinking": False}, None,
        FIRST + f"<think>Simple arithmetic.</think>2 + 2 = 4.{EOS}{USER}And 3+3?{REPLY}<think>",
    ),
    "nor where there are tools": (
        [TWO, FOUR, MORE], THINKS, TOOLS,
        f"{BOS}{TOOLS_TEXT}{USER}What is 2+2?{REPLY}<think>Simple arithmetic.</think>2 + 2 = 4.{EOS}"
        f"{USER}And 3+3?{REPLY}<think>",
    ),
    "results in the order of calls": (
        [SYSTEM, TWO, CALLING, *RESULTS, MORE], THINKS, TOOLS,
        f"{BOS}{SYSTEM['content']}{TOOLS_TEXT}{USER}What is 2+2?{REPLY}<think>I call.</think>{CALLS_TEXT}{EOS}"
        f"{USER}<tool_result>10</tool_result>\n\n<tool_result>noon</tool_result>\n\nAnd 3+3?{REPLY}<think>",
    ),
    "a result is a user's turn": (
        [SYSTEM, TWO, CALLING, RESULTS[0]], THINKS, None,
        FIRST + f"</think>{CALLS_TEXT}{EOS}{USER}<tool_result>noon</tool_result>{REPLY}<think>",
    ),
    "effort": ([TWO], THINKS | {"reasoning_effort": "max"}, None, f"{BOS}{ABSOLUTE}{USER}What is 2+2?{REPLY}<think>"),
    "the usual effort": ([TWO], THINKS | {"reasoning_effort": "high"}, None, f"{BOS}{USER}What is 2+2?{REPLY}<think>"),
    "no effort without thoughts": (
        [TWO], {"reasoning_effort": "max"}, None, f"{BOS}{USER}What is 2+2?{REPLY}</think>",
    ),
    "a schema": (
        [SYSTEM, TWO], {"response_format": {"type": "object"}}, None,
        f"{BOS}{SYSTEM['content']}\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to "
        f'reply:\n{{"type": "object"}}{USER}What is 2+2?{REPLY}</think>',
    ),
    "a system message on the way": (
        [TWO, FOUR, SYSTEM, MORE], {}, None,
        f"{BOS}{USER}What is 2+2?{REPLY}</think>2 + 2 = 4.{EOS}{SYSTEM['content']}{USER}And 3+3?{REPLY}</think>",
    ),
}  # fmt: skip


def test_conversations_are_written_as_published(tmp_path: Path) -> None:
    source = coded_template("deepseek4", tmp_path, [])
    by_settings: dict[str, list[str]] = {}
    for name, (_, settings, _, _) in CASES.items():
        by_settings.setdefault(repr(settings), []).append(name)
    for names in by_settings.values():
        conversations, tools = [CASES[name][0] for name in names], [CASES[name][2] for name in names]
        answers = template(source).answers(conversations, settings=CASES[names[0]][1], tools=tools)
        for name, answer in zip(names, answers, strict=True):
            assert text_of(answer) == CASES[name][3], name


@pytest.mark.parametrize(
    ("name", "program", "is_later"),
    [
        ("DeepSeek-V4-Flash", None, False),
        ("DeepSeek-V4-Flash-0731", None, True),
        ("DeepSeek-V4-Flash-0731", "REASONING_EFFORT_MAX = 'Absolute maximum'", False),
        ("model", "REASONING_EFFORT_MAX = 'Beyond maximum'", True),
    ],
)
def test_efforts_are_those_of_the_checkpoints_program(
    name: str, program: str | None, is_later: bool, tmp_path: Path
) -> None:
    folder, read = tmp_path / name, []
    (folder / "encoding").mkdir(parents=True)
    if program:
        (folder / "encoding" / "encoding_dsv4.py").write_text(program)
    source = coded_template("deepseek4", folder, read)
    assert ("'high': absolute" in source) == is_later
    assert len(read) == (program is not None)
    assert coded_template("deepseek2", folder, read) is None
