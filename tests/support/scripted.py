"""A model that answers from a script, through the real server: for agents, whose prompts are long.

Its template declares tools and writes calls and results as Qwen3's does: a call is {"name", "arguments"} between
<tool_call> tags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from fake_engine import END, Cache, Engine, Model

from localrun.text.chat_template import ChatTemplate

MOST_BYTES = 1 << 20  # of a prompt and its reply; a byte is a token
_TURN = "<|im_start|>assistant\n"
_TEMPLATE = """
{%- if tools -%}
<|im_start|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


class Scripted(Model):
    """answer: the reply to a prompt, in ASCII."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__("")
        self.answer = answer
        self._answers: dict[bytes, bytes] = {}

    def forward(self, ids: Sequence[int], cache: Cache, all_logits: bool = False) -> np.ndarray:
        cache.ids += ids
        prompt, turn, said = bytes(cache.ids).rpartition(_TURN.encode())
        row = np.full((1, 256), -1e9, np.float32)
        row[0, self._next(prompt, len(said)) if turn else END] = 0.0
        return row

    def _next(self, prompt: bytes, n_said: int) -> int:
        if prompt not in self._answers:
            self._answers[prompt] = self.answer(prompt.decode("utf-8", "replace")).encode("ascii")
        answer = self._answers[prompt]
        return answer[n_said] if n_said < len(answer) else END


def scripted_engine(answer: Callable[[str], str]) -> Engine:
    """An engine whose model answers so."""
    engine = Engine(ctx=MOST_BYTES)
    engine.template = ChatTemplate(_TEMPLATE, bos_token="", eos_token="")
    engine.model = Scripted(answer)
    return engine
