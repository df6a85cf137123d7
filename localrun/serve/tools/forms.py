"""The forms of calls by family of models, and which one a chat template is of.

Sources: the chat templates of deepseek-ai/DeepSeek-R1, -V3.1 and -V3.2 (encoding/), moonshotai/Kimi-K2-Instruct,
zai-org/GLM-4.6 and GLM-4.7-Flash, tencent/Hy3, Qwen/Qwen3-0.6B and Qwen3-Coder-30B-A3B-Instruct, MiniMaxAI/MiniMax-M2,
openai/gpt-oss-120b. gpt-oss's calls come as Qwen3's out of text.harmony.
"""

from __future__ import annotations

import re

from localrun.serve.tools.form import Form
from localrun.serve.tools.json_form import JSONForm
from localrun.serve.tools.xml_form import XMLForm

_DSML = "｜DSML｜"
_DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_BEGIN, _DEEPSEEK_END, _SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_KIND = r'(?: string="(?P<string>true|false)")?'
_OBJECT = r"\{\s*\"name\"\s*:\s*\"(?P<name>[^\"\\]+)\"\s*,\s*\"(?:arguments|parameters)\"\s*:\s*(?=\{)"


def _deepseek(kind: str, before: str, after: str, closing: str) -> JSONForm:
    """V3.1's; V3's and R1's have a kind of tool, and the arguments in a block of code."""
    return JSONForm(
        begin=_DEEPSEEK_BEGIN,
        end=_DEEPSEEK_END,
        opening=f"{_DEEPSEEK_BEGIN}{kind}{{name}}{after}",
        closing=f"{closing}{_DEEPSEEK_END}",
        sections=(_DEEPSEEK_SECTION,),
        header=re.compile(rf"\s*{kind}(?P<name>[^\s<`]+){before}\s*(?=\{{)"),
        tail=re.compile(rf"\s*(?:```)?\s*{_DEEPSEEK_END}"),
    )


def _object(bare: str | None) -> JSONForm:
    """An object with name and arguments."""
    return JSONForm(
        begin="<tool_call>",
        end="</tool_call>",
        opening='<tool_call>\n{{"name": "{name}", "arguments": ',
        closing="}\n</tool_call>",
        header=re.compile(rf"\s*{_OBJECT}"),
        tail=re.compile(r"\s*\}?\s*</tool_call>"),
        bare=re.compile(bare) if bare else None,
    )


def _invokes(mark: str, sections: tuple[str, ...], key_end: str, kind: str) -> XMLForm:
    """Anthropic's early form, which MiniMax and DeepSeek took over with marks of their own."""
    return XMLForm(
        begin=f'<{mark}invoke name="',
        end=f"</{mark}invoke>",
        opening=f'<{mark}invoke name="{{name}}">',
        closing=f"</{mark}invoke>",
        sections=tuple((f"<{section}>", f"</{section}>") for section in sections),
        header=re.compile(r'(?P<name>[^"<>]+)">'),
        key=re.compile(rf'\s*<{mark}parameter name="(?P<key>[^"]+)"{key_end}>'),
        parameter=f'<{mark}parameter name="{{key}}"{kind}>',
        value_ends=(f"</{mark}parameter>",),
        tail=re.compile(rf"\s*</{mark}invoke>"),
    )


def _tagged(suffix: str, separator: str) -> XMLForm:
    """GLM's, and Hunyuan 3's with a suffix to every tag."""
    return XMLForm(
        begin=f"<tool_call{suffix}>",
        end=f"</tool_call{suffix}>",
        opening=f"<tool_call{suffix}>{{name}}{separator}",
        closing=f"</tool_call{suffix}>",
        sections=((f"<tool_calls{suffix}>", f"</tool_calls{suffix}>"),) if separator else (),
        header=re.compile(rf"\s*(?P<name>[^\s<{{]+){separator}\s*(?=<arg_key{suffix}>|</tool_call{suffix}>)"),
        key=re.compile(rf"\s*<arg_key{suffix}>(?P<key>[^<]+)</arg_key{suffix}>\s*<arg_value{suffix}>"),
        parameter=f"<arg_key{suffix}>{{key}}</arg_key{suffix}>\n<arg_value{suffix}>",
        value_ends=(f"</arg_value{suffix}>",),
        tail=re.compile(rf"\s*</tool_call{suffix}>"),
    )


DEEPSEEK_V3 = _deepseek(f"function{_SEP}", r"\s*```json", "\n```json\n", "\n```")
DEEPSEEK_V31 = _deepseek("", _SEP, _SEP, "")
DSML = _invokes(_DSML, (f"{_DSML}function_calls", f"{_DSML}tool_calls"), _KIND, ' string="{string}"')
MINIMAX = _invokes("", ("minimax:tool_call",), "", "")
KIMI = JSONForm(
    begin="<|tool_call_begin|>",
    end="<|tool_call_end|>",
    opening="<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>",
    closing="<|tool_call_end|>",
    sections=(("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),),
    header=re.compile(r"\s*(?P<id>(?:functions\.)?(?P<name>[^:\s<]+):\d+)\s*<\|tool_call_argument_begin\|>\s*(?=\{)"),
    tail=re.compile(r"\s*<\|tool_call_end\|>"),
)
GLM = _tagged("", "")
HUNYUAN = _tagged(":opensource", "<tool_sep:opensource>")
QWEN3_CODER = XMLForm(
    begin="<function=",
    end="</function>",
    opening="<function={name}>",
    closing="</function>",
    sections=(("<tool_call>", "</tool_call>"),),
    header=re.compile(r"(?P<name>[^\s<>]+)>"),
    key=re.compile(r"\s*<parameter=(?P<key>[^>\s]+)>(?:\n|(?=[^\n]))"),
    parameter="<parameter={key}>\n",
    value_ends=("\n</parameter>", "</parameter>"),
    tail=re.compile(r"\s*</function>"),
)
QWEN3 = _object(bare=None)
HARMONY = _object(bare=None)
GENERIC = _object(bare=rf"\s*(?:```(?:json)?\s*|\[\s*|\[TOOL_CALLS\]\s*\[?\s*)?{_OBJECT}")

# What a template has to have in it, all of it: the first form whose signs are there.
_SIGNS: tuple[tuple[tuple[str, ...], Form], ...] = (
    ((_DSML,), DSML),
    (("<|channel|>",), HARMONY),
    (("<minimax:tool_call>",), MINIMAX),
    (("<|tool_call_argument_begin|>",), KIMI),
    ((_SEP, "```json"), DEEPSEEK_V3),
    ((_SEP,), DEEPSEEK_V31),
    (("<tool_sep{}>", ":opensource"), HUNYUAN),
    (("<arg_key>",), GLM),
    (("<function=",), QWEN3_CODER),
    (("<tool_call>", "arguments"), QWEN3),
)


def form_of(source: str) -> Form:
    """The form that a chat template writes, or GENERIC."""
    return next((form for signs, form in _SIGNS if all(sign in source for sign in signs)), GENERIC)
