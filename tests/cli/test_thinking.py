"""What a model thinks before it replies: seen or not, saved, left out of prompts and copies; its switches."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from chats import source_of, template
from fake_engine import Engine
from vocabularies import write_vocabulary

import localrun
from cli.main import run
from cli.model import given_variables
from cli.options import TemplateOptions
from localrun.gguf.file import open_gguf
from localrun.text.chat_template import CHATML, chat_template
from localrun.text.tokenizer import Tokenizer

Talk = Callable[..., tuple[list[str], str]]
THOUGHTS, ANSWER = "Is it?\nIt is.", "Aye, all is well."
REPLY = f"<think>\n{THOUGHTS}\n</think>\n\n{ANSWER}"


@pytest.fixture
def thinker(engine: Engine) -> Engine:
    """Qwen's template: the switch is enable_thinking, and thoughts of earlier turns are dropped."""
    engine.template, engine.model.reply = template(source_of("Qwen-Qwen3-0.6B")), REPLY
    return engine


def test_a_pipe_gets_the_answer_alone(thinker: Engine, talk: Talk) -> None:
    out, err = talk("Hello\n")
    assert out == [ANSWER] and err.count("thinking ...") == 1
    assert talk("Hello\n", "--show-thinking")[0] == ["<think>", *THOUGHTS.split("\n"), "</think>", "", ANSWER]


def test_dropped_thoughts_are_not_read_again(thinker: Engine, talk: Talk) -> None:
    """All before them is reused."""
    first = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    err = talk("Hello\nAgain\n")[1]
    second = f"{first}{ANSWER}<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"
    assert thinker.heard() == second + REPLY
    assert f"[ prompt {len(second)} tokens ({len(first)} reused) " in err


def test_thoughts_are_saved_and_loaded(thinker: Engine, talk: Talk, tmp_path: Path) -> None:
    talk(f"Hello\n/save {tmp_path / 'c'}\n")
    reply = {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHTS}
    assert json.loads((tmp_path / "c").read_text())["messages"][1] == reply
    err = talk(f"/load {tmp_path / 'c'}\n/think show\n/think later\n")[1]
    assert f"\n{THOUGHTS}\n" in err and "thoughts: show, auto" in err
    assert "/think later; expected show, hide, fold, on, off or auto" in err


def test_a_cut_reply_goes_on(thinker: Engine, talk: Talk, tmp_path: Path) -> None:
    """Within the thoughts, behind them, and to its end; not from there. As if it had not been cut."""
    command = f"/set n 12\nHello\n/continue\n/set n -1\n/continue\n/save {tmp_path / 'c'}\n/continue\n"
    err = talk(command, "--show-thinking")[1]
    saved = json.loads((tmp_path / "c").read_text())["messages"]
    assert saved[1] == {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHTS}
    assert thinker.heard().endswith(f"<|im_start|>assistant\n{REPLY}")
    assert "reached 12 tokens" in err and "there is no reply that was cut" in err
    assert err.count(" reused) ") == 2


def test_a_switch_is_turned(thinker: Engine, talk: Talk) -> None:
    """Qwen's template begins a reply without thoughts by empty ones."""
    nothing = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    thinker.model.reply = ANSWER
    talk("Hello\n", "--think", "off")
    assert nothing in thinker.heard()
    err = talk("/think off\n/think auto\nHello\n", "--template-var", "enable_thinking=True")[1]
    assert nothing not in thinker.heard() and "thoughts: fold, off" in err
    thinker.template = template(CHATML)
    assert "no switch for thinking: on has no effect" in talk("Hello\n", "--think", "on")[1]


def test_generate_leaves_thoughts_out(thinker: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "-p", "x"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"
    assert run(["generate", "-p", "x", "--show-thinking"]) == 0
    assert capsys.readouterr().out == f"{REPLY}\n"
    assert run(["generate", "-p", "x", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["text"], document["reasoning_content"]) == (ANSWER, THOUGHTS)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--template-var", "x"], 1, "--template-var x: expected NAME=VALUE"),
        (["--template-var", "messages=[]"], 1, "messages is set by the conversation itself"),
        (["--template-var", "nosuch=1"], 1, "the chat template reads no variable nosuch"),
        (["--raw", "--think", "on"], 2, "--think needs the chat template"),
    ],
)
def test_wrong_variables(
    thinker: Engine, args: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "-p", "x", *args]) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err


def test_values_of_variables() -> None:
    given = ["a=true", "b=False", "c=low", "d=3", 'e="3"', "f=", "g=x=y"]
    expected = {"a": True, "b": False, "c": "low", "d": 3, "e": "3", "f": "", "g": "x=y"}
    assert given_variables(TemplateOptions(template_var=given)) == expected


def test_another_template(tmp_path: Path) -> None:
    """A file's own text, or a name; the model's file has two besides its own, which is broken."""
    keys = {"chat_template": "{% for %}", "chat_template.rag": "{{ bos_token }}rag"}
    types = {f"tokenizer.{key}": value for key, value in keys.items()}
    path = write_vocabulary(tmp_path / "v.gguf", strings=types)
    (tmp_path / "mine.jinja").write_text("mine {{ messages[0].content }}")
    message = [{"role": "user", "content": "x"}]
    with open_gguf(path) as file:
        tokenizer = Tokenizer(path, file)
        found = {wanted: chat_template(file, tokenizer, wanted) for wanted in (str(tmp_path / "mine.jinja"), "rag")}
        assert [each.render(message) for each in found.values()] == ["mine x", "<|endoftext|>rag"]
        assert chat_template(file, tokenizer, "chatml").source == CHATML
        with pytest.raises(localrun.LocalrunError, match=r"nosuch: no such file, .*there are: chatml, rag"):
            chat_template(file, tokenizer, "nosuch")


def test_another_template_is_asked_for(engine: Engine, talk: Talk) -> None:
    talk("", "--chat-template", "chatml")
    assert engine.loaded_with["chat_template"] == "chatml"
