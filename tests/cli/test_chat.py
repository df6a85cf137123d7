"""The chat, through a pipe and on a terminal: commands, several-line messages, Ctrl-C, saved conversations."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Engine

from cli.interrupt import Interruptible
from cli.main import run
from cli.terminal.lines import history_path

Talk = Callable[..., tuple[list[str], str]]


def test_chat_replies_until_the_end_of_input(talk: Talk) -> None:
    out, err = talk("Hello\n\nAgain\n")
    assert out == ["Aye, all is well."] * 2
    assert err.splitlines()[0] == "fake (none, 4.8 MiB), native on cpu with 1 threads, context 1000 tokens"
    assert err.count("[ prompt ") == 2


def test_chat_reuses_what_it_said(talk: Talk) -> None:
    """All of the first turn is in the cache."""
    first = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nAye, all is well."
    whole = first + "<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"
    err = talk("Hello\nAgain\n")[1]
    assert f"[ prompt {len(whole)} tokens ({len(first)} reused) " in err


@pytest.mark.parametrize("end", ["/exit\n", "/bye\n", " /exit \n"])
def test_chat_ends(talk: Talk, end: str) -> None:
    assert talk(f"Hello\n{end}Again\n")[0] == ["Aye, all is well."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\\\n b\\\nc\n", "a\n b\nc"),
        ('"""\none\n\n/two\n"""\n', "one\n\n/two"),
        ('"""one\ntwo"""\n', "one\ntwo"),
        ('"""/one"""\n', "/one"),
        ('"""never closed\nbut sent', "never closed\nbut sent"),
        ("cut off\\", "cut off"),
        ("windows\r\n", "windows"),
    ],
)
def test_messages_of_several_lines(engine: Engine, talk: Talk, text: str, message: str) -> None:
    talk(text)
    assert engine.heard().startswith(f"<|im_start|>user\n{message}<|im_end|>\n")


def test_unknown_command_stays(talk: Talk) -> None:
    out, err = talk("/nosuch\x1b[2J thing\nHello\n")
    assert "localrun: unknown command /nosuch\\x1b[2J; /help lists them" in err
    assert out == ["Aye, all is well."]


def test_help_names_every_command(talk: Talk) -> None:
    err = talk("/help\n")[1]
    for name in (
        "help",
        "exit",
        "bye",
        "clear",
        "regen",
        "system",
        "set",
        "show",
        "save",
        "load",
        "read",
        "stats",
        "continue",
        "think",
        "copy",
    ):
        assert f"\n/{name} " in err


def test_clear_forgets_all_but_the_system_message(talk: Talk, tmp_path: Path) -> None:
    talk(f"Hello\n/clear\nAgain\n/save {tmp_path / 'c'}\n", "--system", "Be brief.")
    saved = json.loads((tmp_path / "c").read_text())
    assert [message["content"] for message in saved["messages"]] == ["Again", "Aye, all is well."]
    assert saved["system"] == "Be brief."


def test_regen_replaces_the_reply(engine: Engine, talk: Talk, tmp_path: Path) -> None:
    out, err = talk(f"/regen\nHello\n/regen\n/save {tmp_path / 'c'}\n")
    assert "there is no reply to generate again" in err
    assert out == ["Aye, all is well."] * 2
    assert len(json.loads((tmp_path / "c").read_text())["messages"]) == 2


def test_system_is_shown_set_and_unset(talk: Talk) -> None:
    err = talk('/system\n/system Be brief.\n/show\n/system ""\n/set system Be long.\n')[1]
    assert err.count("system message: none") == 2
    assert "system message: Be brief." in err and "system message: Be long." in err
    assert "\nsystem: Be brief." in err


def test_set(talk: Talk) -> None:
    out, err = talk("/set n 3\nHello\n/set num_predict -1\nHello\n/set temp 0.25\n/set top_k 7\n/set seed 5\n/set\n")
    assert out == ["Aye", "Aye, all is well."]
    assert "the reply reached 3 tokens" in err
    assert "n -1, temperature 0.25, top_k 7, top_p 0.95, min_p 0.05" in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("seed 5")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temp hot", "temperature is 'hot'; expected a number"),
        ("/set temp -1", "temperature is -1.0; expected 0 or more"),
        ("/set nosuch 1", "unknown setting nosuch"),
        ("/set n 0", "-n 0; expected"),
        ("/load", "/load needs a file name"),
        ("/load /no/such", "/no/such: cannot be read: No such file"),
        ("/save /no/such/c", "/no/such/c"),
        ("/read /no/such", "/no/such: cannot be read"),
        (f"/load {__file__}", "is not a saved conversation: not JSON"),
    ],
)
def test_a_wrong_command_is_one_line_and_the_chat_goes_on(talk: Talk, line: str, message: str) -> None:
    out, err = talk(f"{line}\nHello\n")
    assert [text for text in err.splitlines() if message in text and text.startswith("localrun: ")], err
    assert out == ["Aye, all is well."] and "Traceback" not in err


def test_save_and_load(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    err = talk(f"/system Be brief.\nHello\n/save {path}\n")[1]
    assert "saved 2 messages and" in err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["talk", "talk.cache"]
    out, err = talk(f"/load {path}\n/show\nMore\n")
    assert "loaded 2 messages and " in err and "\nuser: Hello\nassistant: Aye, all is well." in err
    assert "\nsystem: Be brief." in err
    assert " reused) " in err
    (tmp_path / "talk.cache").unlink()
    out, err = talk(f"/load {path}\nMore\n")
    assert "loaded 2 messages without their cache" in err
    assert out == ["Aye, all is well."]


@pytest.mark.parametrize(
    "messages",
    [
        "text",
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}],
        [["user", "a"], ["assistant", "b"]],
    ],
)
def test_a_changed_conversation_is_refused(talk: Talk, tmp_path: Path, messages: Any) -> None:
    document = {"format": "localrun conversation 1", "system": None, "messages": messages}
    (tmp_path / "c").write_text(json.dumps(document))
    assert "expected texts of user and assistant in turn" in talk(f"/load {tmp_path / 'c'}\n")[1]


def test_read_puts_a_file_before_the_next_message(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("file text\n")
    talk(f"/read {tmp_path / 'f'}\nWhat is it?\nAgain\n/save {tmp_path / 'c'}\n")
    messages = json.loads((tmp_path / "c").read_text())["messages"]
    assert messages[0]["content"] == "file text\nWhat is it?"
    assert messages[2]["content"] == "Again"


def test_stats(talk: Talk) -> None:
    err = talk("Hello\n/stats\n")[1]
    assert "the context holds 72 of 1000 tokens" in err


def test_a_full_context_is_said_and_the_chat_goes_on(engine: Engine, talk: Talk) -> None:
    engine.ctx = 100
    out, err = talk("Hello\n" + "x" * 100 + "\n/clear\nHello\n")
    assert out == ["Aye, all is well."] * 2
    assert "the context holds 100: shorten it, or raise -c/--ctx; /clear starts afresh" in err


def test_a_reply_that_fills_the_context(engine: Engine, talk: Talk) -> None:
    engine.ctx, engine.model.reply = 100, "y" * 500
    assert "the context of 100 tokens is full; /clear starts afresh" in talk("Hello\n")[1]


def test_an_empty_reply(engine: Engine, talk: Talk) -> None:
    engine.model.reply = ""
    assert "the reply is empty; the message is forgotten" in talk("Hello\n")[1]


def test_without_a_template_chatml_and_its_end(engine: Engine, talk: Talk) -> None:
    engine.template, engine.model.reply = None, "Aye.<|im_end|>and on"
    out, err = talk("Hello\n")
    assert "using ChatML" in err and out == ["Aye."]


@pytest.fixture
def teller(engine: Engine) -> Engine:
    """A model without template and ChatML. What follows the last colon it has told."""
    engine.template, engine.tokenizer.knows_chatml, engine.model.turn = None, False, ":"
    engine.model.reply = " a fox lived. "
    return engine


def test_a_text_is_continued_until_the_model_ends_it(teller: Engine, talk: Talk, tmp_path: Path) -> None:
    out, err = talk("There:\nAnother:\n")
    assert out == [" a fox lived. "] * 2
    assert "what you write is continued" in err
    assert err.count("localrun: the text has ended; what you write next begins another\n") == 2
    assert teller.heard() == "Another: a fox lived. "


def test_a_text_that_has_not_ended_goes_on_with_what_is_written(teller: Engine, talk: Talk) -> None:
    err = talk("There:\nThen:\n, so:\n  and:\n", "-n", "2")[1]
    assert teller.heard().startswith("There: a Then: a, so: a  and: ")
    assert "has ended" not in err


def test_the_bundled_model_says_what_it_is(teller: Engine, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.chat.MINIATURE", teller.file.path)
    assert "story model: it continues what you write; `localrun chat smollm2` chats\n" in talk("")[1]


def test_a_stop_text_does_not_end_the_story(teller: Engine, talk: Talk) -> None:
    out, err = talk("There:\nThen:\n", "--stop", ".")
    assert out == [" a fox lived", " a fox lived"] and "has ended" not in err
    assert teller.heard().startswith("There: a fox lived Then: a fox lived")


def test_regen_clear_and_load_of_a_text(teller: Engine, talk: Talk, tmp_path: Path) -> None:
    err = talk(f"There:\n/regen\n/save {tmp_path / 'c'}\n/clear\nHere:\n/show\n")[1]
    assert "user: Here:\nassistant:  a fox lived. " in err and "user: There:" not in err
    messages = json.loads((tmp_path / "c").read_text())["messages"]
    assert [message["content"] for message in messages] == ["There:", " a fox lived. "]
    talk(f"Before:\n/load {tmp_path / 'c'}\nMore:\n")
    assert teller.heard() == "There: a fox lived. More: a fox lived. "


def test_an_ended_text_stays_until_another_has_begun(teller: Engine, talk: Talk) -> None:
    err = talk(f"There:\n{'x' * 1000}:\n/show\n")[1]
    assert "the context holds 1000: shorten it" in err
    assert "user: There:\nassistant:  a fox lived. " in err


def test_a_text_has_no_place_for_a_system_message(
    teller: Engine, talk: Talk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = talk("/system Be brief.\nThere:\n/system\n")
    assert "localrun: this model continues texts: there is no place for a system message\n" in err
    assert "system message: none" in err and out == [" a fox lived. "]
    assert run(["chat", "--system", "Be brief."]) == 1
    assert "no place for a system message" in capsys.readouterr().err


def test_help_says_that_texts_are_continued(teller: Engine, talk: Talk) -> None:
    assert "What you write is continued" in talk("/help\n")[1]


def test_lines_that_are_not_utf_8(talk: Talk) -> None:
    out, err = talk(b"\xff\xfe\nHello\n")
    assert "the line: is not UTF-8 text" in err and out == ["Aye, all is well."]


def press_ctrl_c_at(engine: Engine, length: int) -> None:
    """Sends this process SIGINT when the cache has reached that many tokens."""

    def step(cache: Any) -> None:
        if cache.length >= length:
            engine.model.before_step = lambda cache: None
            os.kill(os.getpid(), signal.SIGINT)

    engine.model.before_step = step


def test_ctrl_c_stops_the_reply_and_keeps_it(engine: Engine, talk: Talk, tmp_path: Path) -> None:
    press_ctrl_c_at(engine, 65)
    out, err = talk(f"Hello\n/save {tmp_path / 'c'}\nMore\n")
    said = json.loads((tmp_path / "c").read_text())["messages"][1]["content"]
    assert out[0] == said and "Aye, all is well.".startswith(said) and 0 < len(said) < 17
    assert out[1] == "Aye, all is well."
    assert "localrun: stopped\n" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_reply_forgets_the_message(engine: Engine, talk: Talk, tmp_path: Path) -> None:
    press_ctrl_c_at(engine, 0)
    _, err = talk(f"Hello\n/save {tmp_path / 'c'}\n")
    assert "stopped before the reply began" in err
    assert json.loads((tmp_path / "c").read_text())["messages"] == []


def test_a_second_ctrl_c_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), Interruptible() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.pressed
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C had no effect")


def test_history_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = history_path()
    assert path == str(tmp_path / "state" / "localrun" / "history")
    assert os.stat(path).st_mode & 0o777 == 0o600
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    assert history_path() is None


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_chat_on_a_terminal(tmp_path: Path) -> None:
    """The real program and model: a reply, Ctrl-C at the prompt, a command, Ctrl-D."""
    import pty
    import select

    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "chat", "--temp", "0", "-n", "8"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(terminal)
    shown = ""
    ready = "\x1b[?2004h"  # the editor asks for bracketed paste when it is ready for keys

    def wait_for(text: str) -> None:
        nonlocal shown
        deadline = time.monotonic() + 300  # a first run compiles kernels
        while text not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([main], [], [], 1)[0]:
                shown += os.read(main, 65536).decode("utf-8", "replace")
        shown = shown.partition(text)[2]

    try:
        wait_for(ready)
        os.write(main, b"Hello\r")
        wait_for("reply 8 tokens")
        wait_for(ready)
        os.write(main, b"\x03")
        wait_for("Ctrl-D or /exit ends the chat")
        wait_for(ready)
        os.write(main, b"/stats\r")
        wait_for("the context holds")
        wait_for(ready)
        os.write(main, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
    assert "+Hello" in (tmp_path / "localrun" / "history").read_text()
