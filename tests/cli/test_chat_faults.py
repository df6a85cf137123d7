"""What goes wrong in a chat is a line, and the conversation stays; saved ones are private, whole, replace nothing."""

import errno
import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from fake_engine import Engine, feed
from safetensors import safe_open
from safetensors.numpy import save_file

import cli.terminal.repl
from cli.main import run
from cli.terminal.lines import history_path
from localrun.ranks.world import RankError
from localrun.text.chat_template import CHATML, ChatTemplate

Talk = Callable[..., tuple[list[str], str]]
REPLY = "Aye, all is well."


@pytest.fixture
def engine(engine: Engine) -> Engine:
    """Without a template, which costs a process a turn: what follows a text's last colon it has said."""
    engine.template, engine.tokenizer.knows_chatml, engine.model.turn = None, False, ":"
    return engine


def line_of(err: str, message: str) -> str:
    """The one line of the program's own that has the message."""
    (line,) = [line for line in err.splitlines() if line.startswith("localrun: ") and message in line]
    return line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/save .", ".: is a folder"),
        ("/save /", "/: is a folder"),
        ("/save ~nosuchuser/x", "~nosuchuser/x: folder "),
        ("/load ~nosuchuser/x", "~nosuchuser/x: cannot be read: No such file"),
        ("/read ~nosuchuser/x", "~nosuchuser/x: cannot be read: No such file"),
        ("/load .", ".: cannot be read: Is a directory"),
        ("/read /", "/: cannot be read: Is a directory"),
        ("/save a\0b", "'a\\x00b' is no file name"),
        ("/load a\0b", "'a\\x00b' is no file name"),
        ("/read a\0b", "'a\\x00b' is no file name"),
        ('/save ""', "/save needs a file name"),
        (f"/save {'x' * 255}", "xxx.cache: cannot be written: File name too long"),
        (f"/load {'x' * 5000}", "xxx: cannot be read: File name too long"),
        ("/set recommended 1", "unknown setting recommended"),
        ("/set __class__ 1", "unknown setting __class__"),
        ("/set n 1.5", "n is '1.5'; expected a whole number"),
        (f"/set seed {'9' * 5000}", "999'; expected a whole number"),
        ("/set temp nan", "temperature is nan"),
        ("/set top_p", "top_p is ''; expected a number"),
        ("/" + "y" * 100_000, "unknown command /yyy"),
        ("/", "unknown command /;"),
    ],
)
def test_a_command_that_cannot_be_done(talk: Talk, tmp_path: Path, line: str, message: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = talk(f"Hello:\n{line}\nHello:\n")
    assert len(line_of(err, message)) < 500
    assert out == [REPLY] * 2 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "not enough memory"),
        (OSError(errno.EIO, "Input/output error", "m.gguf"), "m.gguf: Input/output error"),
        (ImportError("libx.so: cannot open shared object file", name="torch"), "torch cannot be loaded: libx.so"),
        (OSError("libx.so: file too short"), "a library cannot be loaded: libx.so: file too short"),
        (KeyError("system"), "internal error, please report it: KeyError: 'system'"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_an_error_of_a_turn(engine: Engine, talk: Talk, error: BaseException, message: str) -> None:
    """The second turn fails; the conversation is what it was, and the third goes on with it."""
    turns = []

    def fail(cache: Any) -> None:
        turns.extend([None] * (cache.length == 0))
        if len(turns) == 2:
            turns.append(None)
            raise error

    engine.model.before_step = fail
    out, err = talk("Hello:\nAgain:\n/show\nMore:\n")
    assert out == [REPLY] * 2
    assert line_of(err, message) and "\nuser: Hello:\nassistant: Aye" in err and "user: Again" not in err


def test_a_rank_is_lost(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second reply: the chat ends, and what was said until then is in a file that can be loaded."""
    engine.model.reply = REPLY * 2  # the first reply is cut, so that the second goes on with the same text

    def fail(cache: Any) -> None:
        if bytes(cache.ids).endswith(b"Again:Ay"):
            raise RankError(1, "host b (rank 1): is gone")

    engine.model.before_step = fail
    monkeypatch.chdir(tmp_path)
    feed(monkeypatch, "Hello:\nAgain:\nMore:\n")
    assert run(["chat", "-n", str(len(REPLY))]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [REPLY, "Aye"]
    line = line_of(err, "host b (rank 1): is gone; the conversation is kept: /load ")
    path = Path(line.partition("/load ")[2])
    assert path.parent == tmp_path and len(list(tmp_path.iterdir())) == 2
    engine.model.before_step = lambda cache: None
    feed(monkeypatch, f"/load {path}\n/show\n")
    assert run(["chat"]) == 0
    assert f"user: Hello:\nassistant: {REPLY}\nuser: Again:\nassistant: Aye\n" in capsys.readouterr().err


def test_a_rank_is_lost_before_anything_was_said(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(cache: Any) -> None:
        raise RankError(1, "rank 1: is gone")

    engine.model.before_step = fail
    monkeypatch.chdir(tmp_path)
    feed(monkeypatch, "Hello:\n")
    assert run(["chat"]) == 1
    assert line_of(capsys.readouterr().err, "rank 1") == "localrun: rank 1: is gone" and not list(tmp_path.iterdir())


def test_the_reader_goes_away(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise BrokenPipeError

    engine.model.before_step = fail
    feed(monkeypatch, "Hello:\nAgain:\n")
    assert run(["chat"]) == 1
    assert "localrun: " not in capfd.readouterr().err.replace("localrun: the file has no", "")


def test_ctrl_c_in_a_command(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a pipe that nobody writes to."""
    monkeypatch.setattr(cli.terminal.repl, "read_text", lambda _: os.kill(os.getpid(), signal.SIGINT))
    out, err = talk("/read pipe\nHello:\n")
    assert out == [REPLY] and line_of(err, "interrupted")


# --- saved conversations


def save(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_only_what_is_needed_need_be_there(talk: Talk, tmp_path: Path) -> None:
    path = save(tmp_path / "c", {"format": "localrun conversation 1", "messages": []})
    out, err = talk(f"/load {path}\nHello:\n")
    assert "loaded 0 messages" in err and out == [REPLY]


@pytest.mark.parametrize(
    "text", ["", "[]", "nonsense", "[" * 100_000, '{"format": 1}', "{" + '"a":' * 50_000, "1" * 10_000, "\ufeff{}"]
)
def test_what_is_no_saved_conversation(talk: Talk, tmp_path: Path, text: str) -> None:
    (tmp_path / "c").write_text(text)
    err = talk(f"Hello:\n/load {tmp_path / 'c'}\n/show\n")[1]
    assert line_of(err, "c: is not a saved conversation") and "\nuser: Hello:\n" in err


def test_a_system_message_without_a_place_is_refused(talk: Talk, tmp_path: Path) -> None:
    path = save(tmp_path / "c", {"format": "localrun conversation 1", "system": "Be brief.", "messages": []})
    err = talk(f"There:\n/load {path}\n/show\n")[1]
    assert line_of(err, "no place for a system message") and "\nuser: There:\n" in err


def test_what_is_saved_is_private(talk: Talk, tmp_path: Path) -> None:
    talk(f"Hello:\n/save {tmp_path / 'c'}\n/save {tmp_path / 'c'}\n")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"c": 0o600, "c.cache": 0o600}


@pytest.mark.parametrize("name", ['"my chat"', "'my chat'", "my chat"])
def test_names_in_quotes(talk: Talk, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    err = talk(f"Hello:\n/save {name}\n/clear\n/load {name}\n")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my chat", "my chat.cache"]
    assert "loaded 2 messages and " in err


@pytest.mark.parametrize("name", ["c", "c.cache"])
@pytest.mark.parametrize("kind", ["text", "model", "folder", "pipe", "broken link", "other conversation"])
def test_nothing_else_is_replaced(talk: Talk, tmp_path: Path, name: str, kind: str) -> None:
    """Whatever has the name of the conversation or of its cache, nothing is written."""
    other = tmp_path / name
    if kind == "folder":
        other.mkdir()
    elif kind == "pipe":
        os.mkfifo(other)
    elif kind == "broken link":
        other.symlink_to(tmp_path / "none")
    elif kind == "model":
        save_file({"w": np.zeros(3, np.float32)}, other)
    else:
        other.write_text("mine" if kind == "text" else '{"format": "another"}')
    before = other.read_bytes() if other.is_file() else os.lstat(other).st_mode
    out, err = talk(f"Hello:\n/save {tmp_path / 'c'}\nHello:\n")
    assert out == [REPLY] * 2
    assert len([line for line in err.splitlines() if line.startswith(f"localrun: {tmp_path / 'c'}")]) == 1
    assert (other.read_bytes() if other.is_file() else os.lstat(other).st_mode) == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_link_to_a_conversation_is_replaced_and_not_followed(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    talk(f"Hello:\n/save {tmp_path / 'b' / 'c'}\n")
    before = (tmp_path / "b" / "c").read_bytes()
    (tmp_path / "c").symlink_to(tmp_path / "b" / "c")
    talk(f"Bye:\n/save {tmp_path / 'c'}\n")
    assert (tmp_path / "b" / "c").read_bytes() == before
    assert "Bye" in (tmp_path / "c").read_text() and not (tmp_path / "c").is_symlink()


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_full_disk_leaves_the_last_save_as_it_was(
    talk: Talk, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    talk(f"Hello:\n/save {path}\n")
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", ".localrun-0.tmp")

    monkeypatch.setattr(*((Path, "write_text", fail) if step == "write" else (os, "replace", fail)))
    out, err = talk(f"Bye:\n/save {path}\nHello:\n")
    assert line_of(err, "No space left on device").startswith(f"localrun: {path}")
    assert ".tmp" not in err and out == [REPLY] * 2
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["cut", "pipe", "another", "types", "ids"])
def test_without_its_cache_a_conversation_goes_on(engine: Engine, talk: Talk, tmp_path: Path, damage: str) -> None:
    path, cache = tmp_path / "c", tmp_path / "c.cache"
    talk(f"Hello:\n/save {path}\n")
    data = cache.read_bytes()
    if damage == "cut":
        cache.write_bytes(data[:100])
    elif damage == "pipe":
        cache.unlink()
        os.mkfifo(cache)
    elif damage == "another":
        save_file({"ids": np.zeros(3, np.uint8)}, cache)
    elif damage == "types":  # one that NumPy lacks
        with safe_open(cache, "np") as file:
            metadata = file.metadata()
        safetensors.torch.save_file({"ids": torch.zeros(23).to(torch.float8_e4m3fn)}, cache, metadata)
    else:
        cache.write_bytes(data.replace(b"[72, 101, ", b"[72, x01, "))
    out, err = talk(f"/load {path}\n/show\nMore:\n")
    assert "loaded 2 messages without their cache (" in err and "\nuser: Hello:\n" in err
    assert out == [REPLY]


# --- surroundings


def test_a_template_needs_no_temporary_folder(engine: Engine, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.template = ChatTemplate(CHATML, bos_token="", eos_token="")
    engine.model.turn = "assistant\n"

    def fail(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    assert talk("Hello:\n")[0] == [REPLY]
    monkeypatch.setattr(os, "memfd_create", fail, raising=False)  # a system that has no files in memory
    out, err = talk("Hello:\n/stats\n")
    assert line_of(err, "No usable temporary directory found; set TMPDIR") and "context holds" in err and out == []


def test_lines_from_windows(engine: Engine, talk: Talk) -> None:
    talk("\ufeffHello:\r\n")
    assert engine.heard().startswith("Hello:Aye")


@pytest.mark.parametrize("state", ["~nosuchuser/state", "relative", "/dev/null", "/proc"])
def test_no_place_for_a_history(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", state)
    assert history_path() is None and list(tmp_path.iterdir()) == []


def test_a_history_that_is_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "localrun").mkdir()
    os.mkfifo(tmp_path / "localrun" / "history")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() is None


@pytest.mark.parametrize("terminal", [True, False])
def test_escapes_in_a_reply(engine: Engine, talk: Talk, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spelled out on a terminal, letter by letter as the reply comes; in a pipe the text is as the model wrote it."""
    engine.model.reply = "a\x1b[2Jb\x9bc\rd\te"
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    out, err = talk("Hello:\n/show\n")
    assert "\n".join(out) == ("a\\x1b[2Jb\\x9bc\\rd\te" if terminal else "a\x1b[2Jb\x9bc\nd\te")
    assert "\nassistant: a\\x1b[2Jb\\x9bc\\rd\te\n" in err
