"""Where ranks run: what --ranks and --hosts say. The first place is the user's own process."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from localrun import hardware
from localrun.errors import LocalrunError
from localrun.ranks.mpi import place_in_mpiexec

MOST_RANKS = 64
_HOST = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,252})(:(?P<slots>\d{1,3}))?(=(?P<path>.+))?")


@dataclass(frozen=True)
class Place:
    """Of one rank.

    Attributes:
        host: by its name in --hosts; "" for this machine.
        path: of the model there; "" for the same as here.
        cores: hardware threads to stay on; none for all.
        together: ranks that share the host's cores, or those that it stays on.
    """

    host: str = ""
    path: str = ""
    cores: tuple[int, ...] = ()
    together: int = 1


def places_of(ranks: str | None, hosts: str | None) -> list[Place]:
    """Those of --ranks or of --hosts, of which one must be there. Raises LocalrunError."""
    if place_in_mpiexec()[1] > 1:
        raise LocalrunError("--ranks and --hosts start ranks by themselves; leave them out under mpiexec")
    if ranks is not None and hosts is not None:
        raise LocalrunError("--ranks is for this machine, --hosts for several: give one of them")
    return local_places(ranks) if ranks is not None else host_places(str(hosts))


def local_places(text: str) -> list[Place]:
    """Those of --ranks: a number, or "numa" for one on each NUMA node. Raises LocalrunError."""
    if text == "numa":
        nodes = [tuple(hardware.core_list(node.cores)) for node in hardware.numa_nodes()]
        if len(nodes) < 2:
            raise LocalrunError("--ranks numa: this machine has one NUMA node; give a number of ranks")
        return [Place(cores=cores) for cores in nodes]
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MOST_RANKS:
        raise LocalrunError(f"--ranks {text}; expected numa, or 1 to {MOST_RANKS}")
    return [Place(together=int(text))] * int(text)


def host_places(text: str) -> list[Place]:
    """Those of --hosts: "a,b:2,c=/models/m.gguf", with numbers of ranks, and paths of the model where they differ.

    The first rank runs here: it takes one of this machine's if that is among them, and comes besides if it is not.
    Raises LocalrunError.
    """
    here, others = _parts("--hosts", text)
    places = [Place(together=max(1, here))] * max(1, here) + others
    if len(places) > MOST_RANKS:
        raise LocalrunError(f"--hosts {text}: {len(places)} ranks; expected 1 to {MOST_RANKS}")
    return places


def reader_places(text: str) -> list[Place]:
    """This process's place, and those of --prefill-hosts, which are written as those of --hosts.

    A reader on this machine shares its cores with this process. Raises LocalrunError.
    """
    if place_in_mpiexec()[1] > 1:
        raise LocalrunError("--prefill-hosts starts readers by itself; leave it out under mpiexec")
    here, others = _parts("--prefill-hosts", text)
    places = [Place(together=1 + here)] * (1 + here) + others
    if len(places) > MOST_RANKS:
        raise LocalrunError(f"--prefill-hosts {text}: {len(places) - 1} readers; expected 1 to {MOST_RANKS - 1}")
    return places


def _parts(option: str, text: str) -> tuple[int, list[Place]]:
    """Ranks on this machine, and the places of the others. Raises LocalrunError."""
    here, others = 0, dict[str, list[Place]]()
    for part in text.split(","):
        match = _HOST.fullmatch(part)
        if match is None or not 1 <= int(match["slots"] or 1) <= MOST_RANKS:
            raise LocalrunError(f"{option} {part!r}; expected NAME, NAME:RANKS or NAME=PATH, several with commas")
        slots = int(match["slots"] or 1)
        if _is_here(match["name"]):
            here += slots
        else:
            if match["name"] in others:
                raise LocalrunError(f"{option} {text}: {match['name']} is there twice; NAME:RANKS says how many ranks")
            others[match["name"]] = [Place(match["name"], match["path"] or "", together=slots)] * slots
    return here, [place for each in others.values() for place in each]


def _is_here(name: str) -> bool:
    own = socket.gethostname()
    return name.lower() in {"localhost", own.lower(), own.lower().partition(".")[0]}


def names_of(places: Sequence[Place]) -> list[str]:
    """What messages call ranks: "host b (rank 2)"."""
    return [f"host {p.host} (rank {rank})" if p.host else f"rank {rank}" for rank, p in enumerate(places)]


def threads_at(place: Place, threads: int | None) -> int:
    """Worker threads of a rank: as many as asked for, or its part of the cores that it may use."""
    return threads or max(1, hardware.usable_cores() // place.together)


def prepare(place: Place) -> None:
    """What a process does first that runs at a place: stay on its cores."""
    if place.cores:
        os.sched_setaffinity(0, place.cores)
