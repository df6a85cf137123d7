"""A conversation to the text a model was trained on, by the Jinja template in its file.

The template is a program that came with the weights, so it runs in a sandbox, in a short-lived process with limits on
memory, time and output (template_child.py). Costs about 0.1 s a rendering.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError
from localrun.files import nameless_file, read_bytes, user_path
from localrun.gguf.file import GGUFFile
from localrun.text.tokenizer import Tokenizer

MAX_SOURCE = 256 * 1024  # characters; the longest of published models has some 40,000
MAX_TEXT = 16 * 1024 * 1024  # characters; a million tokens of English take 5 million
MEMORY_BYTES = 512 * 1024 * 1024  # address space; Python and Jinja take 40 MB
TIME_S = 5.0

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What llama.cpp takes for a model without a template (common/chat.cpp, common_chat_templates_init)."""
CHATML_STOP = "<|im_end|>"  # ends a reply; in the vocabulary of a model without a template it is plain text
_KEY = "tokenizer.chat_template"
# What a conversation's settings can't set.
OWN_VARIABLES = ("messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents")

Message = dict[str, Any]
Answer = dict[str, str]
Tools = list[dict[str, Any]] | None  # {"type": "function", "function": {"name", "description", "parameters"}} each


class TemplateError(LocalrunError):
    """A chat template that is broken, refuses the conversation, or runs into a limit."""


class ChatTemplate:
    """A template with the texts of its control tokens. Rendering never runs the template in this process."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters, expected at most {MAX_SOURCE}")
        self.source, self.bos_token, self.eos_token = source, bos_token, eos_token

    def render(self, messages: list[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, control tokens written out, as transformers' apply_chat_template has it.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text} each.
            add_generation_prompt: end where the assistant's reply starts.

        Raises TemplateError if the template is broken, refuses the messages, or runs into a limit.
        """
        (answer,) = self.answers([messages], add_generation_prompt)
        return text_of(answer)

    def answers(
        self,
        conversations: list[list[Message]],
        add_generation_prompt: bool = True,
        settings: Mapping[str, Any] | None = None,
        tools: Sequence[Tools] | None = None,
    ) -> list[Answer]:
        """{"text": the conversation as text} or {"error": why there is none}, for each, from one process.

        Args:
            settings: other variables of the template, enable_thinking say; what may go into JSON.
            tools: of each conversation, the functions that the model may call; None for no tools in any.

        Raises TemplateError if the template is broken or runs into a limit of the process.
        """
        variables = {
            **(settings or {}),
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "documents": None,
        }
        each = [None] * len(conversations) if tools is None else tools
        given = [{"messages": messages, "tools": own} for messages, own in zip(conversations, each, strict=True)]
        return _in_child(self.source, variables, given)


def text_of(answer: Answer) -> str:
    """The text. Raises TemplateError where there is none."""
    if "error" in answer:
        raise TemplateError(f"the chat template failed: {answer['error']}")
    return answer["text"]


def chat_template(file: GGUFFile, tokenizer: Tokenizer, wanted: str | None = None) -> ChatTemplate | None:
    """The template of the file, or None if it has none; or the one that is wanted in its place.

    Args:
        wanted: a file that holds a template, or the name of one: chatml, or those that the model's file has besides
            its own (tokenizer.chat_template.NAME).

    Raises LocalrunError if there is none of that name, and TemplateError if it is too long.
    """
    source = file.string(_KEY, "") if wanted is None else _wanted(wanted, file)
    if not source.strip():
        return None
    return ChatTemplate(
        source, bos_token=_text(tokenizer, tokenizer.bos_id), eos_token=_text(tokenizer, tokenizer.eos_id)
    )


def _wanted(wanted: str, file: GGUFFile) -> str:
    path = user_path(wanted)
    if path.is_file():
        try:
            return read_bytes(path, wanted, 4 * MAX_SOURCE).decode("utf-8")
        except UnicodeDecodeError:
            raise TemplateError(f"{wanted}: is not UTF-8 text, as a chat template is") from None
    if wanted.lower() == "chatml":
        return CHATML
    names = sorted(key.removeprefix(f"{_KEY}.") for key in file.metadata if key.startswith(f"{_KEY}."))
    if wanted in names:
        return file.string(f"{_KEY}.{wanted}")
    raise LocalrunError(
        f"{wanted}: no such file, and no chat template of that name (there are: {', '.join(['chatml', *names])})"
    )


def stops_of(template: ChatTemplate | None) -> list[str]:
    """Texts that end a reply, since a vocabulary may lack the template's own mark for that."""
    return [CHATML_STOP] if template is not None and template.source == CHATML else []


def chatml(tokenizer: Tokenizer) -> ChatTemplate | None:
    """ChatML, for a file without a template; None if its vocabulary lacks ChatML's marks, which are just letters then.

    CHATML_STOP ends its replies.
    """
    knows_it = len(tokenizer.encode(CHATML_STOP, add_special=False, parse_special=True)) == 1
    return ChatTemplate(CHATML, bos_token="", eos_token="") if knows_it else None


def _text(tokenizer: Tokenizer, id: int | None) -> str:
    return "" if id is None else tokenizer.decode([id], special=True)


def _in_child(source: str, variables: dict[str, Any], conversations: list[dict[str, Any]]) -> list[Answer]:
    """The child's answers. Files, not pipes: the system then bounds what the child can write, and nothing can block."""
    request = {
        "path": [os.path.abspath(entry) for entry in sys.path],
        "limits": {
            "memory_bytes": MEMORY_BYTES,
            "output_bytes": 8 * MAX_TEXT * len(conversations),  # JSON writes a character as up to 6 bytes
            "cpu_s": round(TIME_S) + 1,
            "chars": MAX_TEXT,
        },
        "source": source,
        "variables": variables,
        "conversations": conversations,
    }
    try:
        text = json.dumps(request)
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"messages can't be given to the chat template: {error}") from None
    with nameless_file() as stdin, nameless_file() as stdout:
        stdin.write(text.encode())
        stdin.seek(0)
        code = _run([sys.executable, "-I", "-S", str(Path(__file__).with_name("template_child.py"))], stdin, stdout)
        stdout.seek(0)
        answer = stdout.read()
    if not answer:
        raise TemplateError(f"the chat template failed: it ended its process (exit code {code})")
    answers = json.loads(answer)
    if isinstance(answers, dict):
        text_of(answers)  # an error of all
    return answers


def _run(command: list[str], stdin: Any, stdout: Any) -> int:
    try:
        return subprocess.run(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            timeout=TIME_S,
            start_new_session=True,  # Ctrl-C is for the parent to deal with
        ).returncode
    except subprocess.TimeoutExpired:
        raise TemplateError(f"the chat template failed: it takes more than {TIME_S:g} s") from None
    except OSError as error:
        raise TemplateError(f"the chat template cannot be run: {sys.executable}: {error.strerror}") from None
