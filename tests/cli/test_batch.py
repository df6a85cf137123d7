"""generate --batch: a line for each prompt, in order; what was killed goes on to the same file; what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from chats import template
from fake_engine import Engine

from cli.main import run
from localrun.files import Lines
from localrun.text.chat_template import CHATML

REPLY = "Aye, all is well."
BATCH = [
    {"prompt": "One"},
    {"id": "b", "messages": [{"role": "user", "content": "Two"}], "max_tokens": 3},
    {"id": "c", "prompt": "Three", "system": "Be brief.", "stop": "is", "seed": 9},
    {"prompt": "x" * 2000},
    {"prompt": "Five", "temperature": 0},
]


@pytest.fixture
def engine(engine: Engine) -> Engine:
    """Without a template: a rendering takes a process."""
    engine.template = None
    return engine


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_each_prompt(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine.template = template(CHATML)
    batch = write(tmp_path / "b", BATCH)
    assert run(["generate", "--batch", batch, "--seed", "5", "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr() == ("", "localrun: 1 of 5 prompts got no reply; their lines say why\n")
    lines = read(tmp_path / "out")
    assert [line["id"] for line in lines] == [0, "b", "c", 3, 4]
    assert [line.get("text") for line in lines] == [REPLY, "Aye", "Aye, all ", None, REPLY]
    assert [line.get("finish_reason") for line in lines] == ["stop", "length", "stop", None, "stop"]
    assert [line.get("seed") for line in lines] == [5, 6, 9, None, 9]
    assert "the context holds 1000" in lines[3]["error"]
    assert "Five<|im_end|>" in engine.heard()
    assert run(["generate", "--batch", write(tmp_path / "c", BATCH[:1])]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == REPLY


def test_resumed_after_every_byte(engine: Engine, tmp_path: Path) -> None:
    """What a kill can leave of the file, and what the seed was drawn as."""
    engine.model.reply = "é!"
    batch, out = write(tmp_path / "b", [{"prompt": "One"}, {"prompt": "Two"}]), tmp_path / "out"
    command = ["generate", "--batch", batch, "-n", "2", "--resume", "-o", str(out)]
    assert run(command) == 0
    whole = out.read_bytes()
    for length in range(0, len(whole) + 1, 11):
        out.write_bytes(whole[:length])
        first = whole.index(b"\n") + 1
        assert run(command if length >= first else [*command, "--seed", str(read_seed(whole))]) == 0
        assert out.read_bytes() == whole


def read_seed(data: bytes) -> int:
    return json.loads(data.split(b"\n")[0])["seed"]


def test_what_prompts_share_is_read_once(engine: Engine, tmp_path: Path) -> None:
    """And whatever came before, a reply begins from there."""
    read_at: list[int] = []
    engine.model.before_step = lambda cache: read_at.append(cache.length)
    shared = "The same beginning: "
    batch = write(tmp_path / "b", [{"prompt": shared + word} for word in ("a", "b", "c")])
    assert run(["generate", "--batch", batch, "-n", "1", "-o", str(tmp_path / "out")]) == 0
    assert read_at == [0, *[len(shared)] * 3]


def test_a_cut_reply_can_be_told(engine: Engine, tmp_path: Path) -> None:
    batch = write(tmp_path / "b", [{"prompt": "One"}, {"prompt": "Two", "max_tokens": 2}])
    command = ["generate", "--batch", batch, "-n", "-1", "--fail-on-cut", "-o", str(tmp_path / "out")]
    assert run(command) == run([*command, "--resume"]) == 3
    assert run(["generate", "-p", "x", "-n", "3"]) == 0
    assert run(["generate", "-p", "x", "-n", "3", "--fail-on-cut"]) == 3
    assert run(["generate", "-p", "x", "-n", "-1", "--fail-on-cut"]) == 3  # the fake says "A" until its context is full


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: is no JSON object"),
        (["[" * 100_000], "line 1: is no JSON object"),
        (["\n", "{}\n"], "line 2: expected one of prompt and messages"),
        ([{"prompt": 1}], "line 1: prompt is no text"),
        ([{"prompt": "a"}, {"prompt": "b", "temp": 0}], "line 2: unknown field 'temp'; there are id, prompt"),
        ([{"prompt": "a", "temperature": -1}], "line 1: temperature is -1.0; expected 0 or more"),
        ([{"prompt": "a", "max_tokens": 0}], "line 1: max_tokens is no whole number"),
        ([{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}], "line 2: has the id of line 1, 'x'"),
        ([{"messages": [{"role": "user"}]}], "line 1: messages[0]['content'] is None"),
        ([], "holds no prompts"),
    ],
)
def test_no_batch(
    lines: list[Any], message: str, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before anything is loaded or written."""
    out = tmp_path / "out"
    assert run(["generate", "--batch", write(tmp_path / "b", lines), "-o", str(out)]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not engine.loaded_with and not out.exists()


@pytest.mark.parametrize(
    ("out", "args", "message"),
    [
        ('{"id": 0}\n', [], "out: is there already; --resume goes on with it"),
        ('{"id": 7}\n', ["--resume"], "out: line 1: is of id 7; the batch has 0 there"),
        ('{"id": 0}\n{"id": 1}\n', ["--resume"], "out: line 2: is of id 1; the batch has fewer lines"),
        ("text\n", ["--resume"], "out: line 1: is no result of a batch"),
        ('{"id": 0, "seed": 3}\n', ["--resume", "--seed", "4"], "--seed 4, but"),
    ],
)
def test_results_that_cannot_go_on(
    out: str, args: list[str], message: str, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text(out)
    batch = write(tmp_path / "b", BATCH[:1])
    assert run(["generate", "--batch", batch, "-o", str(tmp_path / "out"), *args]) == 1
    assert message in capsys.readouterr().err and (tmp_path / "out").read_text() == out
    assert run(["generate", "--batch", batch, "-o", batch, "--resume"]) == 1
    assert "is the batch itself" in capsys.readouterr().err


def test_results_of_another_process(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch, out = write(tmp_path / "b", BATCH[:1]), tmp_path / "out"
    other = Lines(out, goes_on=False)
    assert run(["generate", "--batch", batch, "-o", str(out), "--resume"]) == 1
    assert "out: is being written by another process" in capsys.readouterr().err and not out.read_bytes()
    del other
    assert run(["generate", "--batch", batch, "-o", str(out), "--resume"]) == 0


@pytest.mark.parametrize("args", [["--batch", "b", "-p", "x"], ["--batch", "b", "--json"], ["-p", "x", "--resume"]])
def test_options_that_do_not_go_together(args: list[str]) -> None:
    assert run(["generate", *args]) == 2
