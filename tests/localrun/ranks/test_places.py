"""What --ranks and --hosts say."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cli.main import _run_in_mpiexec
from localrun import hardware
from localrun.errors import LocalrunError
from localrun.hardware import NumaNode
from localrun.ranks.places import Place, host_places, local_places, names_of, places_of, reader_places

HERE = Place()


def test_ranks_of_this_machine_share_its_cores() -> None:
    assert local_places("3") == [Place(together=3)] * 3
    assert names_of(local_places("2")) == ["rank 0", "rank 1"]


def test_a_rank_on_each_numa_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [NumaNode(0, "0-1,8-9", 1), NumaNode(1, "2,10", 1)]
    monkeypatch.setattr(hardware, "numa_nodes", lambda: nodes)
    assert local_places("numa") == [Place(cores=(0, 1, 8, 9)), Place(cores=(2, 10))]
    monkeypatch.setattr(hardware, "numa_nodes", lambda: nodes[:1])
    with pytest.raises(LocalrunError, match="one NUMA node; give a number"):
        local_places("numa")


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("b", [HERE, Place("b")]),
        ("b:2,c", [HERE, Place("b", together=2), Place("b", together=2), Place("c")]),
        ("b=/m/x.gguf", [HERE, Place("b", "/m/x.gguf")]),
        ("b:2=/m/x.gguf", [HERE, *[Place("b", "/m/x.gguf", together=2)] * 2]),
        ("localhost,b", [HERE, Place("b")]),
        ("b,localhost:2", [Place(together=2), Place(together=2), Place("b")]),
        ("10.0.0.2", [HERE, Place("10.0.0.2")]),
        (f"{socket.gethostname()},b", [HERE, Place("b")]),
    ],
)
def test_hosts(text: str, places: list[Place]) -> None:
    """The first rank is here, in a place of this machine's if that is named."""
    assert host_places(text) == places
    assert names_of(places)[0] == "rank 0"


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("b", [HERE, Place("b")]),
        ("b=/m/x.gguf,c:2", [HERE, Place("b", "/m/x.gguf"), *[Place("c", together=2)] * 2]),
        ("localhost", [Place(together=2)] * 2),
    ],
)
def test_readers_are_beside_this_process(text: str, places: list[Place]) -> None:
    """One on this machine shares its cores with it."""
    assert reader_places(text) == places


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b,", "--prefill-hosts ''; expected"),
        ("b,b", "--prefill-hosts b,b: b is there twice"),
        ("b:64", "64 readers; expected 1 to 63"),
    ],
)
def test_what_are_no_readers(text: str, message: str) -> None:
    with pytest.raises(LocalrunError, match=message):
        reader_places(text)


def test_names_say_the_host() -> None:
    assert names_of(host_places("b:2")) == ["rank 0", "host b (rank 1)", "host b (rank 2)"]


@pytest.mark.parametrize(
    ("ranks", "hosts", "message"),
    [
        ("0", None, "--ranks 0; expected numa, or 1 to 64"),
        ("65", None, "--ranks 65; expected"),
        ("two", None, "--ranks two; expected"),
        ("9" * 5000, None, "expected numa"),
        (None, "", "--hosts ''; expected NAME, NAME:RANKS or NAME=PATH"),
        (None, "b,", "--hosts ''; expected"),
        (None, "b:0", "--hosts 'b:0'; expected"),
        (None, "-oProxyCommand=x", "--hosts '-oProxyCommand=x'; expected"),
        (None, "b;c", "--hosts 'b;c'; expected"),
        (None, "b,b", "b is there twice; NAME:RANKS"),
        (None, "b:64", "65 ranks; expected 1 to 64"),
        ("2", "b", "give one of them"),
    ],
)
def test_what_is_none(ranks: str | None, hosts: str | None, message: str) -> None:
    with pytest.raises(LocalrunError, match=message.replace("(", r"\(")):
        places_of(ranks, hosts)


def test_under_an_mpiexec_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has started ranks; processes but the first leave commands alone that have nothing for them to do."""
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(LocalrunError, match="leave them out under mpiexec"):
        places_of("2", None)
    with pytest.raises(LocalrunError, match="leave it out under mpiexec"):
        reader_places("b")
    for args in (["inspect"], ["generate", "--help"], []):
        assert _run_in_mpiexec(args, is_first=False) == 0
    assert _run_in_mpiexec(["inspect", "nothing.gguf"], is_first=True) == 1


def test_core_lists() -> None:
    """As /sys writes them."""
    assert list(hardware.core_list("0-2,8")) == [0, 1, 2, 8] and list(hardware.core_list("")) == []
    online = Path("/sys/devices/system/cpu/online")
    if online.exists():
        assert 0 in hardware.core_list(online.read_text().strip())
