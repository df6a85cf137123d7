"""What is printed of files that anyone may have made: nothing that deceives, nothing endless; JSON whole everywhere."""

import ast
import io
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fake_engine import Engine
from paths import ROOT

from cli.figures import messages_line
from cli.main import run
from cli.output import brief, note, print_json, printable, visible, write
from cli.text import read_text
from localrun.errors import LocalrunError

CONTROLS = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Cc", "Zl", "Zp")]
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
NAMES = ["Größe 漢字 😀", "a", "", "x" * 200, "C:\\models", "it's"]


@pytest.mark.parametrize("text", NAMES)
def test_names_are_printed_as_they_are(text: str) -> None:
    assert printable(text) == visible(text) == text


@pytest.mark.parametrize("char", [*CONTROLS, *BIDI, "\ufeff", "\udcff", "\U000e0041", "\ufff9"])
def test_what_could_deceive_is_spelled_out(char: str) -> None:
    assert printable(f"ä{char}b") == f"ä{ascii(char)[1:-1]}b"
    if char not in "\t\n":
        assert visible(f"ä{char}b") == f"ä{ascii(char)[1:-1]}b"


def test_texts_keep_what_they_need() -> None:
    """Lines, tabs, joiners of Persian and emoji, soft hyphens, French spaces, letters that Python does not know."""
    text = "a\tb\nمی\u200cخواهم 👩\u200d💻 Silben\u00adtrennung 10\u00a0%\u202f! \u2060 \U0003fffd \ue000"
    assert visible(text) == text
    assert printable("می\u200cخواهم") == "می\\u200cخواهم"  # a name that looks like another is no text


def test_a_reply_in_pieces(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for terminal, shown in ((False, "\x1b]0;owned\x07\n"), (True, "\\x1b]0;owned\\x07\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        for piece in ("\x1b", "]0", ";owned", "\x07\n"):
            write(piece)
        assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    "foreign",
    [
        "'" + "a b " * 1000 + "'",
        repr("it's " * 1000),
        repr("both' and \" " * 1000),
        "A" * 100_000,
        repr(list(range(1000))),
        repr({"a": "b", "c": ["d"] * 500}),
    ],
    ids=["quoted", "apostrophes", "both quotes", "word", "list", "object"],
)
def test_a_message_repeats_little(foreign: str, capsys: pytest.CaptureFixture[str]) -> None:
    note(f"m.gguf: key 'x' is {foreign}; expected a number")
    err = capsys.readouterr().err
    assert err.startswith("localrun: m.gguf: key 'x' is ") and err.endswith("; expected a number\n")
    assert "[...]" in err and len(err) <= len("localrun: m.gguf: key 'x' is ; expected a number\n") + 200


def test_any_message_ends(capsys: pytest.CaptureFixture[str]) -> None:
    note("many words " * 100_000)
    assert len(capsys.readouterr().err) < 850
    ours = "a context of 8192 tokens takes 3.2 GiB of RAM and 1.1 GiB are free; -c 2800 would fit (the model's own)"
    assert brief(ours) == ours


def test_only_one_module_prints() -> None:
    """So nothing reaches a terminal but through it."""
    for path in (ROOT / "cli").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        allowed = {"interrupt.py": {"write"}, "lines.py": {"buffer"}, "text.py": {"buffer"}}.get(path.name, set())
        if path.name != "output.py":
            assert not names & {"print", "Console"} and not attributes & {"write", "buffer"} - allowed, path


def hostile(path: Path, **keys: str) -> Path:
    """A llama file whose names and texts move the cursor and turn letters around; a part of a model."""
    writer = gguf.GGUFWriter(path, keys.pop("architecture", "llama"))
    writer.add_name("\x1b[2J\u202egpj.\r" + "n" * 5000)
    for key, value in keys.items():
        writer.add_string(key, value)
    writer.add_tensor("t\x1b[31m\x85\u202e", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["llama", "no\x1b[2Jsuch\u202e"])
@pytest.mark.parametrize(
    "args", [["inspect"], ["inspect", "--verify"], ["generate", "-p", "x"], ["plan"], ["convert", "DST", "--dry-run"]]
)
def test_commands_deceive_nobody(
    args: list[str], architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hostile(tmp_path / "m.gguf", architecture=architecture)
    command, *options = [str(tmp_path / "out.gguf") if arg == "DST" else arg for arg in args]
    run([command, str(path), *options])
    out, err = capsys.readouterr()
    text = out + err
    assert text and all(char == "\n" or char.isprintable() for char in text)
    assert max(map(len, text.splitlines())) < 1000


# --- JSON


class Stream(io.TextIOWrapper):
    """A stdout of some encoding, as main() sets it up."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="replace", write_through=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_json_is_whole_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {"text": 'é "\\" 😀 漢\u2028\x1b', "ü": ["ÿ", {"ß": 1}]}
    stream = Stream(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    print_json(document)
    data = stream.buffer.getvalue()  # type: ignore[attr-defined]
    assert json.loads(data.decode(encoding)) == document
    assert data.isascii() == (encoding != "utf-8")


def test_a_reply_as_json_on_an_ascii_stdout(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.model.reply, engine.model.turn = "Größe\x1b", ":"
    stream = Stream("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(["generate", "-p", "x:", "--raw", "--json"]) == 0
    assert json.loads(stream.buffer.getvalue())["text"] == "Größe\x1b"  # type: ignore[attr-defined]


# --- texts


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"he\n", "he"),
        (b"\xef\xbb\xbfhe\n", "he"),
        (b"he\r\n", "he"),
        (b"\xef\xbb\xbfa\r\nb\r\n\r\n", "a\nb\n"),
        (b"a\rb", "a\rb"),
        ("a\ufeffb".encode(), "a\ufeffb"),
        (b"", ""),
    ],
)
def test_texts_from_windows(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    assert read_text(str(tmp_path / "x")) == text


@pytest.mark.parametrize("mark", [b"\xff\xfeh\0e\0", b"\xfe\xff\0h\0e"])
def test_utf_16_is_named(mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(mark)
    with pytest.raises(LocalrunError, match=r"is not UTF-8 text: byte 0xf[ef] at 0; save it as UTF-8, not UTF-16"):
        read_text(str(tmp_path / "x"))


def test_a_text_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.text.MOST_BYTES", 1000)
    with pytest.raises(LocalrunError, match="/dev/zero: is larger than 1,000 bytes"):
        read_text("/dev/zero")


@pytest.mark.parametrize("name", ["", "~nosuchuser/x"])
def test_no_text(name: str) -> None:
    with pytest.raises(LocalrunError, match=r"is no file name|~nosuchuser/x: cannot be read: No such file"):
        read_text(name)


def test_a_closed_or_strange_stdin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Folder:
        def read(self, *_: Any) -> bytes:
            raise IsADirectoryError(21, "Is a directory")

    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Folder()})())
    with pytest.raises(LocalrunError, match="stdin: cannot be read: Is a directory"):
        read_text("-")


def test_a_git_lfs_pointer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")
    assert run(["inspect", str(tmp_path / "m.gguf")]) == 1
    assert "m.gguf: is a Git LFS pointer, not the file itself" in capsys.readouterr().err


def test_an_importance_matrix_replaces_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (hostile(tmp_path / "m.gguf"), tmp_path / "text"):
        path.exists() or path.write_text("mine")
        before = path.read_bytes()
        assert run(["imatrix", "-f", __file__, "-o", str(path)]) == 1
        assert "is there, and no importance matrix" in capsys.readouterr().err and path.read_bytes() == before


def test_what_messages_between_ranks_took() -> None:
    sent = {"bytes_out": 3 << 20, "bytes_back": 2048}
    times = {"message_us_median": 29.4, "message_us_p90": 51.6, "overlap": 0.875}
    line = "messages between ranks: sent 3.0 MiB, received 2.0 KiB"
    steps = "; 29 us a layer (median; 90%: 52), 88% of the others' time under work of its own"
    assert messages_line(sent) == line
    assert messages_line(sent | times | {"many_overlap": 0.5}) == f"{line}{steps}; of prompts 50%"
