"""Broken and hostile chat templates, by seed and number: published ones with pieces gone, doubled, or put in."""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path

from paths import DATA

from localrun.text.chat_template import ChatTemplate
from localrun.text.prompt import chat_prompt

_PIECES = (
    "{%", "%}", "{{", "}}", "{#", "{% raw %}", "{% endfor %}", "{{ messages[99].content }}", "{{ messages }}",
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**9 }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}",
    "{% include 'x' %}", "{{ raise_exception('\x1b[31mred') }}", "{{ cycler }}", "{% set messages = 5 %}", "\0",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ lipsum(10**6) }}",
    "{{ messages | tojson(indent=10**9) }}", "{{ strftime_now('%' * 99) }}", "\udcff", "<|im_end|>", "{{ '%s' % 5 }}",
    "{{ messages.append(1) }}", "x" * 300_000,
)  # fmt: skip
_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|im_end|> {{ there }}"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Go on."},
]


@functools.cache
def _sources() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((DATA / "templates").glob("*.jinja"))]


def template_case(seed: int, number: int) -> tuple[str, bytes]:
    """A template as text, changed in up to four places."""
    rng = random.Random(f"template {seed} {number}")
    source, told = rng.choice(_sources()), []
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at, count = rng.randrange(len(source) + 1), rng.choice((1, 3, 30, 300))
        how = rng.randrange(4)
        if how == 0:
            source = source[:at] + source[at + count :]
        elif how == 1:
            source = source[:at] + source[at : at + count] + source[at:]
        else:
            source = source[:at] + (piece := rng.choice(_PIECES)) + source[at:]
            told.append(f"{piece!r:.40}")
        told.append(f"way {how} at {at}")
    return f"{number}: {', '.join(told)}", source.encode("utf-8", "surrogatepass")


def render(path: Path) -> None:
    """A conversation by the template, in a process of its own. Raises LocalrunError if it is refused."""
    source = path.read_bytes().decode("utf-8", "surrogatepass")
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    chat_prompt(template, _MESSAGES, re.compile(r"<\|im_end\|>|</s>"))
