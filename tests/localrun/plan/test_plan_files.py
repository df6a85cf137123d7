"""Descriptions of machines and price lists as users write them: numbers beyond all machines, wrong types, no JSON."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from localrun.errors import LocalrunError
from localrun.plan.known import load_data
from localrun.plan.machine import load_machine
from localrun.plan.topology import load_prices


def described(tmp_path: Path, **changes: Any) -> str:
    """A machine with a card, and values changed; cpu__cores is cores of cpu."""
    machine = copy.deepcopy(next(each for each in load_data("machines")["machines"].values() if each.get("gpu")))
    for name, value in changes.items():
        *parts, key = name.split("__")
        place = machine
        for part in parts:
            place = place[part]
        place[key] = value
    path = tmp_path / "m.json"
    path.write_text(json.dumps(machine).replace('"1e400"', "1e400"))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ram_bytes": 10**400}, "ram_bytes is 1000"),
        ({"ram_bytes": 1e300}, r"ram_bytes is 1e\+300; expected a positive number, 1e-18 to 1e\+24"),
        ({"ram_bytes": 1e-300}, "ram_bytes is 1e-300"),
        ({"ram_bytes": "1e400"}, "not JSON: 1e400 is no number"),
        ({"ram_bytes": float("nan")}, "not JSON: NaN is no number"),
        ({"ram_bytes": {"value": 1e10, "source": float("inf")}}, "not JSON: Infinity is no number"),
        ({"ram_bytes": {"value": {"value": 1}}}, "ram_bytes is .'value': 1.; expected a positive number"),
        ({"ram_bytes": True}, "ram_bytes is True; expected a positive number"),
        ({"reserved_bytes": -1}, "reserved_bytes is -1; expected a number of at least 0"),
        ({"cpu__cores": 1e30}, r"cpu\.cores is 1e\+30"),
        ({"cpu__cores": 1.5}, r"cpu\.cores is 1\.5; expected a whole number"),
        ({"cpu__kernels": []}, r"cpu\.kernels is 'list'; expected a list of rates"),
        ({"cpu__kernels": [7]}, r"cpu\.kernels\[0\] is no object"),
        ({"cpu": None}, "cpu is missing"),
        ({"gpu__unified": "yes"}, r"gpu\.unified is 'yes'; expected true or false"),
        ({"gpu": []}, "gpu is no object"),
        ({"title": 7}, "title is 7; expected text"),
        ({"nosuch": 7}, "nosuch is not known"),
    ],
)
def test_a_machine_that_is_none(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = described(tmp_path, **changes)
    with pytest.raises(LocalrunError, match=message) as caught:
        load_machine(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("number", [1e24, 1e-18, 1])
def test_machines_at_the_bounds_are_planned_for(number: float, tmp_path: Path, capsys: Any) -> None:
    """Whatever comes of it is a document, without numbers that JSON lacks."""
    speeds = {"cpu__attention_decode_flops": number, "cpu__layer_s": number, "cpu__process_bytes": number}
    path = described(tmp_path, ram_bytes=number, **speeds)
    assert run(["plan", "qwen3-30b-a3b", "--machine", path, "--json"]) in (0, 1)
    out, err = capsys.readouterr()
    assert json.loads(out)["memory"] and err.count("\n") <= 1


@pytest.mark.parametrize("value", [1e308, -1, "1", True, None, [], 10**400])
def test_prices_that_are_none(value: Any, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(dict(load_data("prices")) | {"switch": value}))
    with pytest.raises(LocalrunError, match=r"p\.json: switch is .*; expected dollars"):
        load_prices(tmp_path / "p.json")


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{", "\0", "1" * 5000, '{"a": -Infinity}'])
@pytest.mark.parametrize("read", [load_machine, load_prices])
def test_what_is_no_json(read: Any, text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(LocalrunError) as caught:
        read(str(path) if read is load_machine else path)
    assert str(caught.value).startswith(f"{path}: not JSON: ")


@pytest.mark.parametrize("name", ["", "~nosuchuser/m.json", "/", "x" * 300])
def test_no_machine_of_that_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "deepseek-v3", "--machine", name]) == 1
    err = capsys.readouterr().err
    assert err.startswith("localrun: ") and err.count("\n") == 1 and "output" not in err


@pytest.mark.parametrize("option", ["--requests=1e308", "--requests=0", "--bandwidth=1e-320", "--bandwidth=nan"])
def test_rates_that_nobody_has(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "cluster", option]) == 1
    err = capsys.readouterr().err
    assert "a second " in err and "; expected 1e-06 to 1e+18" in err and err.count("\n") == 1
