"""The command line: options, exit codes, one-line errors, what goes to stdout and what to stderr."""

import inspect as python_inspect
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import typer.main
from fake_engine import Engine
from typer.testing import CliRunner

import localrun
from cli.app import app
from cli.main import run
from cli.output import printable, size
from localrun.bundled import model_path

HEAVY = ("torch", "numba", "llvmlite", "llama_cpp", "gguf", "numpy", "jinja2", "rich.console", "prompt_toolkit")

SAMPLING = ["--temp", "--top-k", "--top-p", "--min-p", "--repeat-penalty"]
SAMPLING += ["--presence-penalty", "--frequency-penalty", "--seed"]
DEVICE = ["--device", "--vram", "--gpu-experts", "--expert-usage", "--cache-bits", "--repack"]
DEVICE += ["--unproven", "--dense-attention"]
RUNTIME = [*DEVICE, "-t", "--threads", "-c", "--ctx", "--backend"]
TEMPLATE = ["--think", "--template-var", "--chat-template", "--show-thinking"]
DRAFTS = ["--speculative", "--draft"]
RANKS = ["--ranks", "--hosts", "--rank-messages", "--rank-share", "--rank-sizes", "--rank-copies"]
RANKS += ["--prefill-hosts"]
OPTIONS = {
    "chat": [
        *["-n", "--n-tokens", "--system", "--stop", "--plain", *TEMPLATE, *SAMPLING, *RUNTIME, *DRAFTS, *RANKS],
        *["-v", "--verbose"],
    ],
    "generate": [
        *["-p", "--prompt", "-f", "--file", "-n", "--n-tokens", "--raw", "--system", "--stop"],
        *["--json-schema", "--grammar", "--logprobs", "--batch", "-o", "--output", "--resume", "--fail-on-cut"],
        *[*TEMPLATE, *SAMPLING, *RUNTIME, *DRAFTS, *RANKS],
        *["--json", "-v", "--verbose"],
    ],
    "serve": [
        *["--host", "--port", "--api-key", "--slots", "--cache-ram", "--cache-dir", "--cache-disk"],
        *["--max-pause", "--allow-origin", *TEMPLATE[:3], *RUNTIME, *DRAFTS, *RANKS],
        *["-v", "--verbose"],
    ],
    "bench": [
        *["-p", "--n-prompt", "-n", "--n-tokens", "-d", "--depth", "--sweep", "-r", "--repetitions", *DEVICE],
        *["-t", "--threads", *DRAFTS, *RANKS, "--against", "--plot", "--json", "-v", "--verbose"],
    ],
    "tune": ["-t", "--threads", "--json"],
    "doctor": ["--gpu", "--report", "--ranks", "--hosts", "--link", "-t", "--threads", "-c", "--ctx", "--json"],
    "inspect": ["--verify", "--mix", "--json"],
    "convert": [
        *[
            "--type",
            "--tensor-type",
            "--mix",
            "--no-mtp",
            "--drafts",
            "--imatrix",
            "--pre",
            "--resume",
            "--force",
            "--dry-run",
        ],
        *["--split-max-size", "--allow-requantize", "--pack", "--check", "-t", "--threads", "--json"],
    ],
    "imatrix": [
        *["-f", "--file", "-o", "--output", "-c", "--ctx", "--chunks", "--device", "-t", "--threads"],
        *["--json", "-v", "--verbose"],
    ],
    "pull": ["--folder", "--json"],
    "list": ["--folder", "--json"],
    "remove": ["--folder"],
    "completion": [],
    "plan": [],  # a group: the options of its commands are in tests/cli/test_plan_cli.py
    "perplexity": [
        *["-f", "--file", "-c", "--ctx", "--chunks", *DEVICE, "-t", "--threads", "--backend"],
        *["--json", "-v", "--verbose"],
    ],
}


def command(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *args], capture_output=True, text=True, timeout=300, **options
    )


# --- the frame


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_are_these(name: str) -> None:
    """A changed option is a changed interface: scripts of users rely on them."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert sorted(commands) == sorted(OPTIONS)
    found = [option for parameter in commands[name].params for option in parameter.opts if option.startswith("-")]
    assert found == OPTIONS[name]


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["chat", "--help"], ["generate", "-h"], ["inspect", "-h"]])
def test_help(args: list[str]) -> None:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0
    assert "Usage:" in result.output


def children_s() -> float:
    """Processor time of the processes that this one has started and that have ended: no other program's counts."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, cli.main\n"
        "try: cli.main.main()\n"
        f"finally: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    best = float("inf")
    for _ in range(3):
        before = children_s()
        done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
        best = min(best, children_s() - before)
        assert (done.returncode, done.stderr) == (0, "[]\n")
    assert best < 0.5  # 0.08 s on an idle machine of 2026; the limit users were promised


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"localrun {localrun.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        ["nosuch"],
        ["generate", "--nosuch"],
        ["generate", "-p", "a", "-f", "b"],
        ["generate", "-p", "a", "--raw", "--system", "b"],
        ["generate", "-p", "a", "--device", "tpu"],
        ["generate", "-p", "a", "--cache-bits", "4"],
        ["generate", "-p", "a", "--vram", "much"],
        ["generate", "-p", "a", "-n", "many"],
        ["perplexity"],
        ["imatrix", "-f", "x"],
        ["imatrix", "-o", "x"],
    ],
)
def test_usage_errors_are_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Error:" in err and "Traceback" not in err


# --- real processes


def test_module_run_and_one_line_error() -> None:
    done = command("inspect", "/no/such.gguf")
    assert (done.returncode, done.stdout) == (1, "")
    known = "there are: miniature, smollm2"
    assert done.stderr == f"localrun: /no/such.gguf: no such file, and no bundled model of that name ({known})\n"


@pytest.mark.parametrize("args", [["--version"], ["inspect", "--json"]], ids=["short", "long"])
def test_a_reader_that_goes_away_is_no_error(args: list[str]) -> None:
    """Short output meets the closed pipe when it is flushed at the end, long output while it is printed."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # before anything is written
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", "inspect"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "localrun: output: No space left on device\n")


def test_closed_streams() -> None:
    done = subprocess.run(["sh", "-c", f"exec {sys.executable} -m cli.main inspect <&- >&- 2>&-"])
    assert done.returncode == 0


def test_inspect_loads_no_engine() -> None:
    code = (
        "import sys, cli.main\n"
        "cli.main.run(['inspect', 'smollm2', '--json'])\n"
        "print([n for n in ('torch', 'numba', 'llama_cpp') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "[]\n"
    assert json.loads(done.stdout)["parameters"] == 134_515_008


# --- inspect and perplexity


def test_inspect_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "smollm2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["parameters", "134,515,008"] for line in lines)
    kept = "23,040 bytes a token (12,240 with --cache-bits 8)"
    assert any(line.split() == ["KV", "cache", *kept.split()] for line in lines)
    assert any(line.split() == ["Q4_1", "63.3", "MiB", "210", "5.000"] for line in lines)
    assert sum(line.startswith("blk.") for line in lines) == 30 * 9


def test_inspect_prints_the_mix_that_convert_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "miniature", "--mix"]) == 0
    text = capsys.readouterr().out
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["^output\\.weight$", "Q6_K"],
        ["^blk\\.[256]\\.ffn_down_(exps|shexp)\\.weight$", "Q6_K"],
        ["^blk\\.\\d+\\.attn_(k|v)_b\\.weight$", "Q8_0"],
        [".", "Q5_K"],
    ]
    assert run(["inspect", "miniature", "--mix", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["mix"]
    assert rows[-1] == {"pattern": ".", "type": "Q5_K", "tensors": 63}
    (tmp_path / "my.mix").write_text(text)
    source, options = str(model_path("miniature")), ["--mix", str(tmp_path / "my.mix"), "--dry-run", "--json"]
    assert run(["convert", source, str(tmp_path / "x.gguf"), *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["type"], document["mix_file"]) == (None, str(tmp_path / "my.mix"))
    assert len(document["plan"]) == 128 and all(row["from"] == row["to"] for row in document["plan"])


def test_inspect_spells_out_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_name("evil\x1b[2J")
    writer.add_tensor("t\x07", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert run(["inspect", str(tmp_path / "a.gguf")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert "evil\\x1b[2J" in out and "t\\x07" in out


def test_perplexity_prints_and_reports(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("A" * 40)  # raw text: after anything the fake says "A" for certain
    assert run(["perplexity", "-f", str(tmp_path / "t.txt"), "-c", "8", "--chunks", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == "perplexity 1.0000 +/- 0.00000 (2 chunks of 8 tokens)\n"
    assert err == "localrun: 2 chunks, about 0 s left\n[1]1.0000,[2]1.0000\n"
    assert run(["perplexity", "-f", str(tmp_path / "t.txt"), "-c", "8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    expected = {"perplexity": 1.0, "error": 0.0, "chunk_tokens": 8, "chunks": 5, "tokens": 40, "counted_tokens": 15}
    assert {name: document[name] for name in expected} == expected
    assert document["running"] == [1.0] * 5


@pytest.mark.parametrize("model", [[], ["smollm2"]])
def test_a_bundled_model_twice_the_same(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The main job, as the README has it: in a process of its own, and in this one."""
    arguments = ["generate", *model, "-p", "One day, a small", "--temp", "0", "-n", "12", "--json"]
    assert run(arguments) == 0
    first, second = json.loads(capsys.readouterr().out), json.loads(command(*arguments).stdout)
    assert first["text"] == second["text"] != ""


# --- small things


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5_000_000, "4.8 MiB"),
        (2**30, "1.0 GiB"),
        (2**43, "8192.0 GiB"),
    ],
)
def test_size(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text


def test_printable() -> None:
    assert printable("Größe 漢字") == "Größe 漢字"
    assert printable("a\x1b[0m\n") == "a\\x1b[0m\\n"


def test_every_command_documents_itself() -> None:
    for registered in app.registered_commands:
        assert python_inspect.getdoc(registered.callback)
