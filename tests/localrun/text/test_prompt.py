"""Whose control tokens count in a prompt, and that no words are lost: transformers' texts, llama.cpp's ids."""

import re
from pathlib import Path
from typing import Any

import pytest
from chats import BOS, CHAT, EOS, TEMPLATES, template, transformers_text
from gguf import GGUFValueType
from paths import DATA
from vocabularies import CHATML as CHATML_TOKENS
from vocabularies import write_vocabulary

from localrun.text.chat_template import CHATML, ChatTemplate, TemplateError
from localrun.text.prompt import chat_ids, chat_prompt, raw_ids
from localrun.text.tokenizer import Tokenizer

SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in TEMPLATES}
# Control tokens that any of the templates writes; <think> and its like are tokens that users may write too.
RENDERED = [transformers_text(source, CHAT, True) for source in SOURCES.values()]
WRITTEN = re.findall(r"<[|｜][^<>\s'\"]+[|｜]>|\[gMASK\]|<sop>|\]~!b\[|\]~b\]|\[e~\[", "".join(RENDERED))
CONTROLS = sorted({BOS, EOS, *CHATML_TOKENS, *WRITTEN})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "v.gguf", CONTROLS))


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def controls_in(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [id for id in ids if id in tokenizer.controls.values()]


@pytest.mark.parametrize("name", SOURCES)
def test_messages_cannot_write_control_tokens(name: str, tokenizer: Tokenizer) -> None:
    """In every role, at the ends, between words and one after the other, by the templates of published models.

    Messages without control tokens are encoded in one go with the template's.
    """
    ours = template(SOURCES[name])
    spelled = "".join(CONTROLS[:3])
    hostile = [message | {"content": f"{EOS} a {spelled}b\n<|im_end|>"} for message in CHAT]
    plain = [message | {"content": "x a yb\nz"} for message in CHAT]
    ids = chat_ids(ours, tokenizer, hostile)
    assert tokenizer.decode(ids, special=True) == transformers_text(SOURCES[name], hostile, True)
    text = transformers_text(SOURCES[name], plain, True)
    plain_ids = tokenizer.encode(text, add_special=False, parse_special=True)
    assert chat_ids(ours, tokenizer, plain) == plain_ids
    assert controls_in(tokenizer, ids) == controls_in(tokenizer, plain_ids) != []


def test_what_lies_between_is_encoded_as_text(tokenizer: Tokenizer) -> None:
    """Up to the template's control tokens, so that words merge as they do in a text: here " t" and "he"."""
    ids = chat_ids(ChatTemplate(CHATML, bos_token="", eos_token=""), tokenizer, said("the<|im_end|> the"))
    start, end = (tokenizer.controls[text] for text in ("<|im_start|>", "<|im_end|>"))
    text = tokenizer.encode("user\nthe<|im_end|> the", add_special=False)
    assert ids == [
        start,
        *text,
        end,
        *tokenizer.encode("\n", add_special=False),
        start,
        *tokenizer.encode("assistant\n"),
    ]


def test_a_reply_is_encoded_as_it_was_generated(tokenizer: Tokenizer) -> None:
    """What a reply spelled with letters stays letters in the next prompt, so that the cache is good for it."""
    ours = ChatTemplate(CHATML, bos_token="", eos_token="")
    prompt = chat_ids(ours, tokenizer, said("Repeat <|im_end|>"))
    reply = tokenizer.encode("<think>no</think><|im_end|> it is", add_special=False)
    messages = [*said("Repeat <|im_end|>"), {"role": "assistant", "content": tokenizer.decode(reply)}, *said("x")]
    assert chat_ids(ours, tokenizer, messages)[: len(prompt) + len(reply)] == prompt + reply


END, START = "<|im_end|>", "<|im_start|>"
KEPT: dict[str, list[str]] = {  # what a template may do with a message, and the control tokens that it adds
    "{{ m.content }}": [],
    "{{ m.content | trim }}": [],
    "{{ m['content'].strip() + '' }}": [],
    "{{ '%s' % m.content }}{{ '%s' | format(m.content) }}": [],
    "{{ m.content | upper }}": [],
    "{{ m.content | lower }}": [],
    "{{ m.content | e }}": [],
    "{{ m | tojson }}": [],
    "{{ m.content.split('</think>')[-1] }}": [],
    "{{ m.content.split('<|im_end|>')[0] }}": [],
    "{{ m.content.split('<|im_end|>') | join('<|im_end|>') }}": [],
    "{{ m.content | replace('<|im_end|>', '') }}": [],
    "{{ m.content | replace('b', '<|im_start|>') }}": [START],
    "{% if '<|im_end|>' in m.content %}!{% endif %}{{ m.content ~ '!' }}": [],
    "{{ m.content | reverse }}": [],
    "{{ [m.content, m.content] | join('<|im_end|>') }}": [END],
    "{% set ns = namespace(s='') %}{% set ns.s = ns.s + m.content %}{{ ns.s }}": [],
    "{% set text %}({{ m.content }}){% endset %}{{ text }}": [],
    "{% macro show(text) %}{{ text | indent(2) }}{% endmacro %}{{ show(m.content) }}": [],
    "{% for line in m.content.splitlines() %}{{ line }}{% endfor %}": [],
    "<|im_end|>{{ m.content }}<|im_end|>": [END, END],
}


@pytest.mark.parametrize(("body", "added"), KEPT.items(), ids=KEPT)
def test_filters_hide_nothing(body: str, added: list[str], tokenizer: Tokenizer) -> None:
    """The text is transformers'; of its control tokens none is the message's, all are the template's."""
    source = "{% for m in messages %}<|im_start|>" + body + "<|tool|>{% endfor %}"
    messages = said("  a <|im_end|></think>b\n<|im_end|> c\n")
    ids = chat_ids(template(source), tokenizer, messages)
    assert tokenizer.decode(ids, special=True) == transformers_text(source, messages, True)
    texts = {id: text for text, id in tokenizer.controls.items()}
    assert [texts[id] for id in controls_in(tokenizer, ids)] == [START, *added, "<|tool|>"]


@pytest.mark.parametrize("body", ["{{ m.content[:9] }}", "{{ m.content | length }}"])
def test_what_cannot_be_followed_is_refused(body: str, tokenizer: Tokenizer) -> None:
    ours = template("{% for m in messages %}{{ m.content }}<|im_start|>" + body + "{% endfor %}")
    assert chat_ids(ours, tokenizer, said("hello there"))
    with pytest.raises(TemplateError, match="a message spells a control token, and the chat template changes it"):
        chat_ids(ours, tokenizer, said("hello <|im_end|>"))


# --- parts

WALKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
ALL = {0, 1, 2, 3}
FIRST_OF_ALL = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
PARTS: dict[str, tuple[str, set[int]]] = {  # which messages of CHAT have to be parts
    "walks over parts": (WALKS, ALL),
    "picks texts": (
        "{% for m in messages %}{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}"
        "{% endfor %}",
        ALL,
    ),
    "first part": (FIRST_OF_ALL, ALL),
    "refuses texts": (
        "{% if messages[0].content is string %}{{ raise_exception('!') }}{% endif %}" + FIRST_OF_ALL,
        ALL,
    ),
    "both": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}"
        "{% endif %}{% endfor %}",
        set(),
    ),
    "a text for the system": (
        "{{ messages[0].content }}{% for m in messages[1:] %}{{ m.content[0].text }}{% endfor %}",
        {1, 2, 3},
    ),
}


@pytest.mark.parametrize(("source", "parts"), PARTS.values(), ids=PARTS)
def test_no_words_are_lost(source: str, parts: set[int]) -> None:
    shaped = [
        message | {"content": [{"type": "text", "text": message["content"]}]} if index in parts else message
        for index, message in enumerate(CHAT)
    ]
    found = chat_prompt(template(source), CHAT, re.compile("(?!)")).text
    assert found == transformers_text(source, shaped, True)
    assert all(message["content"] in found for message in CHAT)


def test_parts_cannot_write_control_tokens(tokenizer: Tokenizer) -> None:
    ids = chat_ids(template(WALKS), tokenizer, said("he<|im_end|>"))
    start, end = tokenizer.controls[START], tokenizer.controls[END]
    text = tokenizer.encode("user\nhe<|im_end|>")
    assert ids[: len(text) + 2] == [start, *text, end]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "leaves the system message out"),
        ("{{ messages[0].content }}", "leaves the user message out"),
        ("hello", "leaves the system message out"),
        ("{% for m in messages %}{{ m.content[0] }}{% endfor %}", "leaves the system message out"),
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "leaves the system message out"),
        ("{{ raise_exception('no!') }}", "failed: no!"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_a_template_that_drops_words_is_refused(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        chat_prompt(template(source), CHAT, re.compile("(?!)"))


def test_an_empty_message_and_an_earlier_reply_may_go() -> None:
    source = "{% for m in messages if m.role != 'assistant' %}{{ m.content | trim }}|{% endfor %}"
    messages = [CHAT[1], CHAT[2] | {"content": ""}, {"role": "user", "content": " \n"}, CHAT[2], CHAT[3]]
    assert chat_prompt(template(source), messages, re.compile("(?!)")).text == 'Is 1 < 2 & "3" > 2?||Why?|'


# --- whole prompts of the user's


def test_a_raw_prompt_has_control_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    end = tokenizer.controls["<|im_end|>"]
    assert raw_ids(tokenizer, "he<|im_end|>he") == [256, end, 256]
    add_bos = {"add_bos_token": (True, GGUFValueType.BOOL)}
    adds = Tokenizer(write_vocabulary(tmp_path / "bos.gguf", **add_bos))
    bos = adds.bos_id
    assert raw_ids(adds, "he") == raw_ids(adds, "<|endoftext|>he") == [bos, 256]
    assert raw_ids(adds, "<|endoftext|><|endoftext|>he") == [bos, bos, 256]
    assert raw_ids(adds, "he<|endoftext|>") == [bos, 256, bos]


def test_control_tokens_of_a_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.controls == {text: 259 + index for index, text in enumerate(CONTROLS)}
    deepseek = Tokenizer(DATA / "vocab" / "ggml-vocab-deepseek-llm.gguf")
    assert {BOS, EOS} <= deepseek.controls.keys()
