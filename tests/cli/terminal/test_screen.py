"""A reply on a terminal, as pyte shows it: Markdown that grows in place, thoughts that fold, no word lost."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from screens import Screen

from cli.output import width_of
from cli.terminal.command_completer import CommandCompleter
from cli.terminal.display import FOLD, HIDE, SHOW, TerminalDisplay
from cli.terminal.lines import EditedLines, read_message
from cli.terminal.markdown import closed_blocks, last_code, markdown_lines
from localrun.errors import LocalrunError
from localrun.generate.reasoning import CONTENT, REASONING

TEXT = """# A title

Some **bold** and `code`, <b>tags</b>, ![picture](http://x.y/z) and [a link](http://evil.example/)
with a line break of its own.

- first
- second, with a very long sentence that will surely be wrapped at any width that a terminal may have
  ```
  nested = 1
  ```

1. one
2. two

```python
def long_function(argument):  # a comment that is rather long, so that it is wider than eighty columns are
    return argument + 1
```

| name | value |
|---|---|
| averylongwordwithoutanyspace | 1 |

[note]: http://defined.example/ "kept"

The end.
"""
WORDS = re.compile(r"[^\W_]+")
COLOURS = re.compile(r"\x1b\[[\d;]*m")


def words(text: str) -> str:
    return "".join(WORDS.findall(COLOURS.sub("", text)))


def shown(screen: Screen, pieces: list[str], kind: str = CONTENT, thoughts: str = FOLD) -> list[str]:
    display = TerminalDisplay(thoughts)
    for piece in pieces:
        display.push(kind, piece)
        display._draw_at = 0.0  # however fast they come
    display.end()
    return screen.lines()


@pytest.mark.parametrize("columns", [80, 40, 12, 3])
def test_nothing_is_lost(columns: int) -> None:
    """The text's letters, in their order, at any width: only marks are gone."""
    lines = "\n".join(markdown_lines(TEXT, columns))
    left_out = r"python" if columns >= 30 else r"(?!)"  # the language is not code
    assert words(lines) == words(re.sub(left_out, "", TEXT))


def test_code_is_code() -> None:
    """Neither framed nor wrapped nor padded."""
    lines = [COLOURS.sub("", line) for line in markdown_lines(TEXT, 40)]
    code = TEXT.partition("```python\n")[2].partition("\n```")[0].split("\n")
    assert lines[lines.index(code[0]) :][:2] == code
    assert last_code(TEXT) == "\n".join(code) + "\n"
    with pytest.raises(LocalrunError, match="no block of code"):
        last_code("none")


@pytest.mark.parametrize("size", [(80, 24), (30, 6), (12, 5)], ids=str)
def test_pieces_do_not_matter(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Letter by letter as in one piece, also where most of it scrolls off; and each block as of the whole text."""
    text = TEXT.split("| name")[0]  # a table's columns may still grow when its first rows have scrolled off
    by_letter = shown(Screen(monkeypatch, *size), list(text))
    assert by_letter == shown(Screen(monkeypatch, *size), [text])
    whole = [COLOURS.sub("", line) for line in markdown_lines(text, size[0])]
    if all(len(line) <= size[0] for line in whole):
        assert by_letter == whole


def test_only_what_differs_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain paragraph goes out as it comes: no cursor moves, nothing is cleared."""
    screen = Screen(monkeypatch)
    shown(screen, list("A plain paragraph.\n\nAnother one."))
    assert "\x1b" not in "".join(screen.written)
    styled = Screen(monkeypatch)
    shown(styled, list("A **bold** paragraph, which is rewritten."))
    for text in styled.written:
        assert not re.search(r"\x1b\[[JK][^\n]", text), text  # cleared is what is behind, not what comes


@pytest.mark.parametrize(("first", "then"), [(40, 80), (80, 40), (80, 33)])
def test_another_width(first: int, then: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before stays, and the end of the reply is whole."""
    screen, display = Screen(monkeypatch, first), TerminalDisplay()
    screen.feed("Before\n" * 5)
    text = "Several words of one long paragraph that goes on. " * 6
    for index, piece in enumerate(re.findall(r"\S+ ", text)):
        if index == 30:
            screen.resize(then)
        display._draw_at = 0.0
        display.push(CONTENT, piece)
    display.end()
    tail = words("\n".join(screen.lines()[-3:]))
    assert words(text).endswith(tail) and len(tail) > 50
    assert screen.lines().count("Before") == 5


def test_thoughts_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, display = Screen(monkeypatch, 40, 10), TerminalDisplay()
    for number in range(60):
        display.push(REASONING, f"word{number} ")
        display._draw_at = 0.0
    assert len(screen.lines()) == 8 and "word59" in screen.lines()[-1] and "word0" not in "".join(screen.lines())
    display.push(CONTENT, "Aye.")
    display.end()
    lines = screen.lines()
    assert lines[0].startswith("[ thought for ") and "60 words" in " ".join(lines)
    assert "word" not in " ".join(lines).replace("60 words", "") and lines[-1] == "Aye."


def test_thoughts_are_shown_or_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(Screen(monkeypatch), [f"word{number} " for number in range(200)], REASONING, SHOW)
    assert words("".join(lines)) == "".join(f"word{number}" for number in range(200))
    screen = Screen(monkeypatch)
    assert shown(screen, ["secret"], REASONING, HIDE)[0].startswith("[ thought for")
    assert "secret" not in "".join(screen.written) and "thinking, 0 s" in "".join(screen.written)


def test_nothing_of_a_reply_moves_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch)
    lines = shown(screen, ["a\x1b[2Jb \u202e `\x9b1m` [x](http://\x07)\n\n```\n\x1b]0;x\x07\n```"])
    assert "a\\x1b[2Jb" in lines[0] and "\\x1b]0;x\\x07" in lines[-1]


LINES = ["- a", "1. b", "# c", "```", "~~~", "    d", "> e", "", "|f|g|", "|-|-|", "---", "h"]


@given(st.lists(st.sampled_from(LINES)))
@settings(max_examples=30)
def test_closed_blocks_stay_closed(lines: list[str]) -> None:
    """What was cut off earlier is a beginning of what is cut off later, and is shown as in the whole."""
    text, closed = "".join(line + "\n" for line in lines), ""
    for end in range(len(text) + 1):
        now, rest = closed_blocks(text[:end], 80)
        assert now.startswith(closed) and now + rest == text[:end]
        closed = now
    both = [line for part in (closed, text[len(closed) :]) for line in markdown_lines(part, 80) if part.strip()]
    assert [line for line in both if line] == [line for line in markdown_lines(text, 80) if line]


COMMANDS = {"/save": ("save it", None), "/set": ("set it", ("temp", "top_k")), "/show": ("show it", ())}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/s", ["/save", "/set", "/show"]),
        ("/set t", ["temp", "top_k"]),
        ("/set temp ", []),
        ("/show ", []),
        ("say /s", []),
        ("/s\nx", []),
    ],
)
def test_commands_are_completed(text: str, found: list[str]) -> None:
    assert [each.text for each in CommandCompleter(COMMANDS).get_completions(Document(text), None)] == found


def test_names_of_files_are_completed(tmp_path) -> None:
    (tmp_path / "talk one").touch()
    (found,) = CommandCompleter(COMMANDS).get_completions(Document(f"/save {tmp_path}/ta"), None)
    assert found.text == "lk one"


def test_a_paste_is_one_message(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bracketed, as terminals do it: its ends of lines send nothing, and a slash in it is no command."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        lines = EditedLines(COMMANDS, lambda: "status")
        keys.send_text("\x1b[200~/one\r\ntwo\r  three\x1b[201~\r/show\r")
        message, command = read_message(lines), read_message(lines)
    assert (message.text, message.is_command) == ("/one\ntwo\n  three", False)
    assert (command.text, command.is_command) == ("/show", True)


def test_width_of_a_line() -> None:
    assert width_of("\x1b[1;32mab\x1b[0m漢") == 4
