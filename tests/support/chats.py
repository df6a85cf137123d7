"""Chat templates of published models, a conversation, and transformers' renderer."""

from paths import DATA

from localrun.text.chat_template import ChatTemplate

TEMPLATES = sorted((DATA / "templates").glob("*.jinja"))
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CHAT = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": 'Is 1 < 2 & "3" > 2?\n'},
    {"role": "assistant", "content": "<think>Yes.</think>Yes, 👍."},
    {"role": "user", "content": "Why?"},
]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token=BOS, eos_token=EOS)


def transformers_text(source: str, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=add_generation_prompt, bos_token=BOS, eos_token=EOS
    )
    return texts[0]
