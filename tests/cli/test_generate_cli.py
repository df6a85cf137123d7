"""localrun generate: the reply, options, JSON, and errors of one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Engine, feed

from cli.main import run
from localrun.bundled import model_path
from localrun.generate.drafts import NGramDraft


def test_generate_streams_the_reply_to_stdout(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "-p", "Is all well?"]) == 0
    assert capsys.readouterr() == ("Aye, all is well.\n", "")
    assert engine.loaded_with["path"] == model_path(None)


def test_generate_passes_its_options_on(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").touch()
    options = ["-t", "3", "-c", "77", "--device", "cuda", "--backend", "llama.cpp"]
    options += ["--vram", "7.5", "--gpu-experts", "12", "--expert-usage", "used.gguf", "--cache-bits", "8"]
    assert run(["generate", str(tmp_path / "m.gguf"), "-p", "x", *options]) == 0
    found = {name: engine.loaded_with[name] for name in ("path", "threads", "ctx", "device", "backend")}
    assert found == {
        "path": tmp_path / "m.gguf",
        "threads": 3,
        "ctx": 77,
        "device": "cuda",
        "backend": "llama.cpp",
    }
    gpu = [engine.loaded_with[name] for name in ("vram", "gpu_experts", "expert_usage", "cache_bits")]
    assert gpu == [7.5, "12", Path("used.gguf"), 8]


def test_generate_json(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "-p", "Well?", "--json", "--temp", "0.5", "--seed", "7", "--system", "Be brief."]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n"
    assert document["text"] == "Aye, all is well." and err == ""
    assert document["ids"] == list(b"Aye, all is well.")
    assert (document["prompt_tokens"], document["generated_tokens"]) == (len(prompt), 17)
    assert (document["finish_reason"], document["model"], document["backend"]) == ("stop", "fake", "native")
    assert document["sampling"] == {
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "repeat_penalty": 1.0,
        "repeat_last_n": 64,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 7,
    }
    assert set(document["timings"]) == {
        "load_s",
        "prompt_s",
        "prompt_tokens_per_s",
        "generate_s",
        "generated_tokens_per_s",
    }


@pytest.mark.parametrize(
    ("option", "text", "said", "reply"),
    [
        ("--json-schema", '{"enum": ["Aye", "Nay"]}', '"Aye', '"Aye"'),
        ("--grammar", 'start: "No" | "Nay!"', "Nay", "Nay!"),
        ("--grammar", 'root ::= "A" [k-m]', "Aye", "Ak"),
    ],
)
def test_a_reply_is_what_it_has_to_be(
    engine: Engine, tmp_path: Path, option: str, text: str, said: str, reply: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the model's own word may not come, all others are alike to the fake: the lowest byte is taken."""
    engine.model.reply = said
    (tmp_path / "f").write_text(text)
    assert run(["generate", "-p", "x", "--temp", "0", option, str(tmp_path / "f")]) == 0
    assert capsys.readouterr().out == reply + "\n"
    assert run(["generate", "-p", "x", "--temp", "0", "-n", "1", option, str(tmp_path / "f")]) == 0
    assert capsys.readouterr().err == "localrun: the reply was cut after 1 tokens and is not whole; -n allows more\n"


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--json-schema", "{", "f: is not JSON: Expecting property name"),
        ("--json-schema", "[1]", "f: the schema is of type list; expected a JSON object"),
        ("--json-schema", '{"type": "x"}', "f: the schema is not usable: Invalid type: x"),
        ("--json-schema", "[" * 100_000, "f: is not JSON: maximum recursion depth"),
        ("--grammar", "root ::= (", "f: the grammar is neither Lark with a rule 'start' nor GBNF: "),
    ],
)
def test_what_it_cannot_be(
    engine: Engine, tmp_path: Path, option: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before the model is loaded."""
    (tmp_path / "f").write_text(text)
    assert run(["generate", "-p", "x", option, str(tmp_path / "f")]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and engine.loaded_with == {}


def test_logprobs_in_json(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "-p", "x", "--json", "--logprobs", "2", "-n", "3"]) == 0
    first = json.loads(capsys.readouterr().out)["logprobs"][0]
    assert first == {
        **{"id": ord("A"), "token": "A", "logprob": 0.0},
        "top": [{"id": ord("A"), "token": "A", "logprob": 0.0}, {"id": 0, "token": "\0", "logprob": -9999.0}],
    }
    for wrong in (["--logprobs", "2"], ["--json-schema", "a", "--grammar", "b"]):
        assert run(["generate", "-p", "x", *wrong]) == 2
    assert run(["generate", "-p", "x", "--json", "--logprobs", "21"]) == 1


def test_a_seed_is_drawn_and_told(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = set()
    for _ in range(3):
        assert run(["generate", "-p", "x", "--json"]) == 0
        seeds.add(json.loads(capsys.readouterr().out)["sampling"]["seed"])
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("args", "text", "reason"),
    [
        (["-n", "3"], "Aye", "length"),
        (["-n", "-1"], "Aye, all is well.", "stop"),
        (["--stop", "is", "--stop", ", a"], "Aye", "stop"),
    ],
)
def test_generate_ends(
    engine: Engine, args: list[str], text: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "-p", "x", "--json", *args]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["text"], document["finish_reason"]) == (text, reason)


def test_generate_raw_continues_the_text(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "-p", "abc", "--raw", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prompt_tokens"] == 3


def test_generate_without_a_template_says_so(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.template = None
    assert run(["generate", "-p", "abc"]) == 0
    assert "has no chat template" in capsys.readouterr().err
    assert run(["generate", "-p", "abc", "--system", "x"]) == 1
    assert "--system has no place" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["-f", "-"]])
def test_generate_reads_a_pipe(
    engine: Engine, args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, "abc\n")
    assert run(["generate", "--raw", "--json", *args]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 3  # the one newline at the end is not the prompt's


def test_generate_reads_a_file(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("é\n\n", encoding="utf-8")
    assert run(["generate", "-f", str(tmp_path / "p.txt"), "--raw", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 3


def test_generate_fills_the_context(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.ctx, engine.model.reply = 70, "y" * 500
    assert run(["generate", "-p", "x", "-n", "-1"]) == 0
    out, err = capsys.readouterr()
    assert 0 < len(out) < 70 and err == "localrun: the context of 70 tokens is full\n"


def test_generate_verbose(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "-p", "x", "-v"]) == 0
    err = capsys.readouterr().err
    assert "localrun: loaded in" in err and "backend native" in err
    assert "[ prompt 51 tokens" in err and "reply 17 tokens" in err


def test_generate_tells_what_drafts_did(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    """The text says itself three times, so drafts of what followed before come true."""
    engine.model.reply, engine.draft = "Aye, aye, aye, aye, all is well.", NGramDraft()
    assert run(["generate", "-p", "x", "--json", "--speculative", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = document["speculation"]
    assert (found["draft"], document["text"]) == ("n-gram", engine.model.reply)
    assert 0 < found["accepted_tokens"] <= found["drafted_tokens"]
    assert found["tokens_per_step"] == pytest.approx(1 + found["accepted_tokens"] / found["steps"], abs=1e-3)
    assert engine.loaded_with["speculative"] == "2" and engine.loaded_with["draft"] is None
    assert run(["generate", "-p", "x", "-v"]) == 0
    err = capsys.readouterr().err
    assert " drafts accepted, " in err and " tokens a step" in err
    engine.draft = None
    assert run(["generate", "-p", "x", "-v", "--draft", "smollm2"]) == 0
    assert "drafts" not in capsys.readouterr().err and engine.loaded_with["draft"] == model_path("smollm2")


ERRORS = {
    "no such draft": (["generate", "-p", "x", "--draft", "none.gguf"], "none.gguf: no such file"),
    "empty prompt": (["generate", "-p", ""], "the prompt is empty"),
    "empty pipe": (["generate"], "the prompt is empty"),
    "no such file": (["generate", "-f", "/no/such"], "/no/such: cannot be read: No such file or directory"),
    "a directory": (["generate", "-f", "/"], "/: cannot be read: Is a directory"),
    "no such model": (["generate", "none.gguf", "-p", "x"], "none.gguf: no such file"),
    "-n 0": (["generate", "-p", "x", "-n", "0"], "-n 0; expected 1 or more"),
    "-n -2": (["chat", "-n", "-2"], "-n -2; expected 1 or more"),
    "temperature": (["generate", "-p", "x", "--temp", "-1"], "temperature is -1.0; expected 0 or more"),
    "NaN": (["chat", "--temp", "nan"], "temperature is nan"),
    "top-p": (["generate", "-p", "x", "--top-p", "1.5"], "top_p is 1.5"),
    "argument": (["generate", "-p", "\udcff"], "the prompt: is not UTF-8 text: byte 0xff at 0"),
    "long prompt": (["generate", "-p", "x" * 2000], "prompt has 2050 tokens; the context holds 1000"),
    "short text": (["perplexity", "-f", __file__, "-c", "100000"], "chunks of 100000 need at least 200000"),
    "chunk of 0": (["perplexity", "-f", __file__, "-c", "0"], "chunks of 0 tokens"),
    "no chunks": (["perplexity", "-f", __file__, "--chunks", "0"], "0 chunks"),
    "no text": (["perplexity", "-f", "-"], "-: is empty"),
    "imatrix, no text": (["imatrix", "-f", "-", "-o", "/tmp/no-text.imatrix"], "-: is empty"),
    "imatrix, no folder": (
        ["imatrix", "-f", __file__, "-o", "/no/such/x"],
        "/no/such/x: folder /no/such does not exist",
    ),
    "imatrix into a folder": (["imatrix", "-f", __file__, "-o", "/tmp"], "/tmp: is a folder"),
    "imatrix, no place": (["imatrix", "-f", __file__, "-o", "x" * 256], "xxx: cannot be written: File name too long"),
    "not a model": (["inspect", __file__], "not a GGUF file"),
}


@pytest.mark.parametrize(("args", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_one_line_and_1(
    engine: Engine,
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    feed(monkeypatch, "")
    assert run(args) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("localrun: ") and err.count("\n") == 1
    assert message in err


def test_a_file_that_is_not_utf_8(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").write_bytes(b"ok \xff")
    for args in (["generate", "-f"], ["perplexity", "-f"]):
        assert run([*args, str(tmp_path / "bad")]) == 1
        assert "bad: is not UTF-8 text: byte 0xff at 3\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["generate", "chat", "bench"])
def test_wrong_numbers_of_drafts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("5", "0", "x"):
        assert run([name, *(["-p", "x"] if name == "generate" else []), "--speculative", value]) == 1
        expected = f"localrun: speculative is '{value}'; expected auto, off, or 1 to 4 drafts a step\n"
        assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [(["-c", "0"], "ctx is 0"), (["-c", "-5"], "-5"), (["-t", "0"], "threads is 0"), (["-t", "3000"], "1 to 512")],
)
def test_errors_of_the_real_engine(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "-p", "x", *args]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_interrupted_is_130(engine: Engine) -> None:
    def interrupt(_cache: Any) -> None:
        raise KeyboardInterrupt

    engine.model.before_step = interrupt
    assert run(["generate", "-p", "x"]) == 130


def test_quant_errors_are_caught_too(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    from quant.errors import QuantError

    def fail(_cache: Any) -> None:
        raise QuantError("no kernel\nfor this")

    engine.model.before_step = fail
    assert run(["generate", "-p", "x"]) == 1
    assert capsys.readouterr().err == "localrun: no kernel for this\n"
