"""localrun plan and plan cluster: options, output, exit codes, one-line errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import typer.main

from cli.app import app
from cli.main import run
from localrun.plan import measure, shapes
from localrun.plan.known import load_data
from localrun.plan.machine import load_machine

OPTIONS = {
    "model": [
        *["--type", "-c", "--ctx", "--prompt", "--machine", "--fit", "-t", "--threads", "--acceptance"],
        *["--hosts", "--prefill-hosts", "--reply", "--link", "--kv-table", "--compute-table", "--plot", "--json"],
    ],
    "cluster": [
        *["--model", "--device", "--bandwidth", "--tokens", "--hidden", "-c", "--ctx", "--acceptance", "--requests"],
        *["--prompt", "--reply", "--utilisation", "--prefill-unit", "--decode-unit", "--ports", "--planes"],
        *["--endpoints", "--prices", "--fabric", "--plot", "--json"],
    ],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_are_these(name: str) -> None:
    group = typer.main.get_command(app).commands["plan"]  # type: ignore[attr-defined]
    assert sorted(group.commands) == sorted(OPTIONS)
    found = [option for parameter in group.commands[name].params for option in parameter.opts if option[0] == "-"]
    assert found == OPTIONS[name]


@pytest.mark.parametrize("args", [["--help"], ["cluster", "--help"], ["model", "-h"]])
def test_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *args]) == 0
    assert "Usage:" in capsys.readouterr().out


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "deepseek-v3", "--machine", "10k-server"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("DeepSeek-V3 671B, Q4_K_M: 684.49 G weights, 36.63 G active")
    assert "tokens/s" in out and "13 memory channels, not 12" in out and "bound by routed experts on the CPU" in out


def test_a_refusal_prints_the_memory_and_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "deepseek-v3", "--machine", "laptop"]) == 1
    out, err = capsys.readouterr()
    assert "weights, mapped from the file" in out and "tokens/s" not in out
    assert err.startswith("localrun: DeepSeek-V3 671B, Q4_K_M, 8192 tokens of context, does not fit a laptop")
    assert err.count("\n") == 1


def test_a_refusal_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "kimi-k2", "--machine", "desktop", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["memory"]["fits"] is False and "no type fits" in document["refusal"]


def test_the_largest_type_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "deepseek-v2-lite", "--machine", "laptop", "-c", "4096"]
    assert run([*arguments, "--fit", "14GB"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("DeepSeek-V2-Lite 16B, Q4_K_S: ") and "14.0 GiB of RAM" in lines[1]
    assert lines[2] == "largest type that fits: Q4_K_S, 8.9 GiB"
    assert lines[3].startswith("the next larger, Q4_K_M, needs 10.") and lines[3].endswith("of RAM (10.0 GiB usable)")
    assert "tokens/s" in out
    assert run([*arguments, "--fit", "this", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fit"]["type"] == document["model"]["type"] == "Q8_0" and document["decode"]["tokens_per_s"] > 0
    assert document["fit"]["next"]["type"] == "BF16" and document["fit"]["next"]["needed"]["RAM"] > 28 * 2**30


def test_a_fit_without_rates_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A description that knows few types: the bytes are known all the same."""
    rates = [{"type": "F32", "n_cols": 256, "gemv": 1e9, "expand": 1e9, "gemm": 1e9}]
    path = edited(tmp_path / "machine.json", cpu__kernels=rates)
    assert run(["plan", "deepseek-v2-lite", "--machine", path, "--fit", "14GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("no speeds: the machine description has no rates for ")
    assert not any("tokens/s" in line for line in lines)


def test_hosts_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "deepseek-v3", "--machine", "10k-server", "--hosts", "2", "--link", "25GbE"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("DeepSeek-V3 671B, Q4_K_M, on 2 hosts, each a 10,000-dollar server")
    assert "a layer: 2 messages, 14,496 bytes to each other host and 14,400 back; a token: 1.6 MB" in out
    ways = [line[:21].split(maxsplit=1) for line in out.splitlines()[18:22]]
    assert [[way.strip() for way in each] for each in ways] == [
        ["1", "-"],
        ["2", "slices"],
        ["2", "slices by time"],
        ["2", "experts"],
    ]
    assert "only the first host's card computes" in out and "what pays for decoding: " in out


def test_hosts_without_room(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "kimi-k2", "--machine", "desktop", "--hosts", "3", "--json"]) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["memory"]["fits"] is False and "rows" not in document
    assert "does not fit 3 hosts, each a desktop" in err and "the first needs" in err and err.count("\n") == 1


def test_readers_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "deepseek-v3", "--machine", "10k-server", "--prefill-hosts", "1", "--reply", "512"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "a prompt of 512: 34.3 MiB of cache, 0.03 s on the wire, 0.002 s of it not under" in out
    assert [line.split("  ")[0] for line in out.splitlines()[5:8]] == [
        "one host",
        "experts shared",
        "prompts elsewhere",
    ]
    assert "most requests with replies of 512 tokens: " in out


def test_readers_without_room(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "kimi-k2", "--machine", "desktop", "--prefill-hosts", "1", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["pays"] is None and "does not fit a desktop" in err and err.count("\n") == 1


def test_a_link_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What --json says of a link can be saved and used again."""
    arguments = ["plan", "deepseek-v2-lite", "--machine", "laptop", "--hosts", "2", "--json", "--link"]
    assert run([*arguments, "100GbE"]) == 0
    first = json.loads(capsys.readouterr().out)
    (tmp_path / "mine.json").write_text(json.dumps(first["link"]["file"]))
    assert run([*arguments, str(tmp_path / "mine.json")]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["rows"] == first["rows"] and second["link"]["name"] == "mine"


BAD_LINKS = {
    "missing": ({"bytes_per_s": 1e9, "message_s": 1e-6}, "round_trip_s is missing"),
    "no time": ({"bytes_per_s": 1e9, "message_s": 1e-6, "round_trip_s": 1e-6}, "at least two of message_s"),
    "unknown": ({"bytes_per_s": 1e9, "message_s": 0, "round_trip_s": 1e-6, "colour": 1}, "colour is not known"),
    "negative": ({"bytes_per_s": -1, "message_s": 0, "round_trip_s": 1e-6}, "bytes_per_s is -1; expected a positive"),
}


@pytest.mark.parametrize(("document", "message"), BAD_LINKS.values(), ids=BAD_LINKS.keys())
def test_bad_link_files(
    document: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "link.json"
    path.write_text(json.dumps(document))
    assert run(["plan", "deepseek-v2-lite", "--machine", "laptop", "--hosts", "2", "--link", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_tables_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two models; the figures of all are in tests/localrun/plan/test_plan_figures.py."""
    monkeypatch.setattr(shapes, "known_models", lambda: ["deepseek-v3", "deepseek-v2"])
    assert run(["plan", "--kv-table", "--compute-table"]) == 0
    out = capsys.readouterr().out
    assert "70,272" in out and "published 250 (+0.2%)" in out


def test_a_cluster_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "cluster", "--hidden", "7000", "--fabric", "2x2x2x2"]) == 0
    out = capsys.readouterr().out
    assert "takes 120.96 us" in out and "14.76 ms a token" in out and "MPFT" in out


def test_a_config_json_and_a_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(load_data("models")["deepseek-v2-lite"]["config"]))
    found = []
    for model in (str(path), str(tmp_path), "deepseek-v2-lite"):
        assert run(["plan", model, "--machine", "laptop", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["decode"])
    assert found[0] == found[1] == found[2]
    assert run(["plan", str(tiny_models.shared("v3")), "--machine", "laptop", "-c", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["type"] == "as in the file"


def test_a_machine_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What --json says of a machine can be saved and used again."""
    assert run(["plan", "deepseek-v2-lite", "--machine", "laptop", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(first["machine"]["file"]))
    assert run(["plan", "deepseek-v2-lite", "--machine", str(path), "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["decode"] == first["decode"] and second["machine"]["name"] == "mine"


def test_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured: of the right order, and every rate there. How near it comes is scripts/compare_plan.py's to say."""
    monkeypatch.setattr(measure, "_TRY_S", 0.02)
    monkeypatch.setattr(measure, "_PASSED_BYTES", 1 << 30)
    assert run(["plan", str(tiny_models.shared("v2-lite")), "-t", "1", "-c", "256", "--prompt", "64", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("localrun: measuring this machine") and err.count("\n") == 1
    document = json.loads(out)
    cpu = document["machine"]["file"]["cpu"]
    assert 1e8 < cpu["memory"]["read_bytes_per_s"]["value"] < 1e12
    assert {row["type"] for row in cpu["kernels"]} == {"F32"}
    assert 10 < document["decode"]["tokens_per_s"] < 1e5
    assert document["prefill"]["tokens_per_s"] > document["decode"]["tokens_per_s"] / 10


def test_this_machine_is_not_measured_in_vain(capsys: pytest.CaptureFixture[str]) -> None:
    """A model of a terabyte is refused by this machine's memory before anything is measured."""
    assert run(["plan", "kimi-k2", "--type", "F32"]) == 1
    err = capsys.readouterr().err
    assert "measuring" not in err and "does not fit this machine" in err


def edited(path: Path, **changes: Any) -> str:
    """The laptop's description with some keys changed (dotted), None for removed."""
    document = json.loads(json.dumps(load_machine("laptop").document))
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = document
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(document))
    return str(path)


BAD_MACHINES = {
    "missing": ({"ram_bytes": None}, "ram_bytes is missing"),
    "no cpu": ({"cpu": None}, "cpu is missing"),
    "text": ({"ram_bytes": "much"}, "ram_bytes is 'much'; expected a positive number"),
    "beyond any float": ({"ram_bytes": 10**400}, "expected a positive number"),
    "zero": ({"cpu__cores": 0}, "cpu.cores is 0; expected a positive number"),
    "half a core": ({"cpu__cores": 1.5}, "cpu.cores is 1.5; expected a whole number"),
    "negative": ({"cpu__layer_s": -1}, "cpu.layer_s is -1; expected a number of at least 0"),
    "more than all": ({"cpu__memory__read_fraction": 1.5}, "read_fraction is 1.5; expected a number between 0 and 1"),
    "unknown key": ({"cpu__colour": "red"}, "cpu.colour is not known"),
    "unknown kernels": ({"cpu__kernels": "mmx"}, "cpu.kernels is 'mmx'; expected a table, or one of"),
    "no kernels": ({"cpu__kernels": []}, "expected a list of rates"),
    "kernel without rate": (
        {"cpu__kernels": [{"type": "Q4_K", "n_cols": 1}]},
        "cpu.kernels[0].gemv is missing",
    ),
    "a list": ({"cpu": []}, "cpu is no object"),
    "type without rates": (
        {"cpu__kernels": [{"type": "IQ2_XS", "n_cols": 256, "gemv": 1, "expand": 1, "gemm": 1}]},
        "has no rates for",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_MACHINES.values(), ids=BAD_MACHINES.keys())
def test_bad_machine_files(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = edited(tmp_path / "machine.json", **changes)
    assert run(["plan", "deepseek-v2-lite", "--machine", path]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


ERRORS = {
    "unknown machine": (["deepseek-v3", "--machine", "cray"], "cray: no such machine file; presets: this, 10k-server"),
    "not JSON": (["deepseek-v3", "--machine", __file__], "not JSON"),
    "a folder": (["deepseek-v3", "--machine", "/"], "/: cannot be read"),
    "unknown model": (["deepseek-v9", "--machine", "laptop"], "known models: deepseek-v3"),
    "unknown type": (["deepseek-v3", "--type", "Q9", "--machine", "laptop"], "unknown type 'Q9'"),
    "fit": (["deepseek-v3", "--fit", "soon", "--machine", "laptop"], "--fit 'soon'; expected this, or a size of RAM"),
    "fit nothing": (["deepseek-v3", "--fit", "0GB", "--machine", "laptop"], "--fit '0GB'; expected"),
    "fit and a type": (["deepseek-v3", "--fit", "this", "--type", "Q8_0"], "--fit chooses the type; leave out --type"),
    "nothing fits": (["deepseek-v3", "--fit", "64GB", "--machine", "laptop"], "no type fits a laptop: 128 bits of"),
    "ctx": (["deepseek-v3", "-c", "0", "--machine", "laptop"], "-c/--ctx 0; expected 1"),
    "prompt": (["deepseek-v3", "--prompt", "-1", "--machine", "laptop"], "--prompt -1"),
    "acceptance": (["deepseek-v3", "--acceptance", "nan", "--machine", "laptop"], "--acceptance nan"),
    "threads": (["deepseek-v2-lite", "-t", "0"], "threads is 0; expected 1 to 512"),
    "threads of a preset": (["deepseek-v3", "-t", "2", "--machine", "laptop"], "-t/--threads goes with --machine this"),
    "hosts": (["deepseek-v3", "--hosts", "0", "--machine", "laptop"], "--hosts 0; expected 1 to 64"),
    "hosts of none": (["llama-3.1-405b", "--hosts", "2", "--machine", "laptop"], "no routed experts to spread"),
    "link": (["deepseek-v3", "--hosts", "2", "--link", "x", "--machine", "laptop"], "x: no such link file; presets:"),
    "link alone": (
        ["deepseek-v3", "--link", "10GbE", "--machine", "laptop"],
        "--link goes with --hosts or --prefill-hosts",
    ),
    "readers": (
        ["llama-3.1-405b", "--prefill-hosts", "0", "--machine", "laptop"],
        "--prefill-hosts 0; expected 1 to 63",
    ),
    "readers and hosts": (["deepseek-v3", "--hosts", "2", "--prefill-hosts", "1"], "give one of them"),
    "readers and fit": (["deepseek-v3", "--prefill-hosts", "1", "--fit", "this"], "--prefill-hosts goes with neither"),
    "reply": (["deepseek-v3", "--reply", "0"], "--reply 0; expected 1 to 10^8"),
    "hosts and fit": (["deepseek-v3", "--hosts", "2", "--fit", "this"], "--hosts goes with neither --fit nor --plot"),
    "not a model": ([__file__, "--machine", "laptop"], "not a GGUF file"),
    "plot's name": (["--kv-table", "--plot", "x.txt"], "x.txt: a picture's name ends in"),
    "device": (["cluster", "--device", "abacus"], "unknown device 'abacus'"),
    "bandwidth": (["cluster", "--bandwidth", "0"], "bytes a second 0.0; expected 1e-06 to 1e+18"),
    "tokens": (["cluster", "--tokens", "0"], "tokens 0; expected 1"),
    "ports": (["cluster", "--ports", "7"], "switches of 7 ports"),
    "fabric": (["cluster", "--fabric", "big"], "--fabric 'big'"),
    "large fabric": (["cluster", "--fabric", "8x64x32x32"], "are too many flows"),
    "prices": (["cluster", "--prices", "/no/such"], "/no/such: no such file"),
    "dense": (["cluster", "--model", "llama-3.1-405b"], "no routed experts"),
    "unit": (["cluster", "--decode-unit", "0"], "a unit of 0 devices"),
}


@pytest.mark.parametrize(("args", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_one_line_and_1(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *args]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("localrun: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("args", [["--nosuch"], ["cluster", "--tokens", "many"], ["cluster", "extra"]])
def test_usage_errors_are_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *args]) == 2
    assert "Error:" in capsys.readouterr().err


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert run(["plan", "--kv-table", "--plot", "kv.png"]) == 1
    assert capsys.readouterr().err == "localrun: --plot needs matplotlib: pip install 'localrun[plot]'\n"


PLOTS = {
    "kv.svg": ["--kv-table"],
    "decode.png": ["deepseek-v3", "--machine", "10k-server"],
    "interconnect.svg": ["cluster", "--fabric", "2x2x2x2"],
}


@pytest.mark.parametrize("name", PLOTS)
def test_plots(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert run(["plan", *PLOTS[name], "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


def test_a_plot_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *PLOTS["decode.png"], "--plot", str(tmp_path / "none" / "x.png")]) == 1
    assert "none does not exist" in capsys.readouterr().err
