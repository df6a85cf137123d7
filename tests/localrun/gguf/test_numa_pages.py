"""Pages of the file's map go to the node whose workers read them: by the system here, which has one node at least, and
by a stand-in for a system that has three.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import closing

import numpy as np
import pytest
import tiny_models

import localrun
from localrun import hardware
from localrun.gguf import numa_pages
from localrun.gguf.file import open_gguf
from localrun.gguf.numa_pages import move_to_node, nodes_of_pages
from localrun.gguf.residency import Near, Resident, within

PAGE = mmap.PAGESIZE
linux = pytest.mark.skipif(numa_pages._CALL is None, reason="move_pages is Linux's")


class ThreeNodes:
    """A system whose pages lie on nodes in turn, but for those that were moved, and one in ten that lies nowhere."""

    def __init__(self) -> None:
        self.moved: dict[int, int] = {}

    def __call__(self, *arguments: ctypes._SimpleCData) -> int:
        """As the system call: its number, a process, how many, addresses, nodes or None, results, flags."""
        number, process, count, *places, flags = arguments
        assert (number.value, process.value, flags.value) == (numa_pages._CALL, 0, 2)
        kinds = ctypes.c_uint64, ctypes.c_int, ctypes.c_int
        pages, nodes, status = (
            place and np.ctypeslib.as_array((kind * count.value).from_address(place.value))
            for kind, place in zip(kinds, places, strict=True)
        )
        for i, page in enumerate(pages.tolist()):
            assert page % PAGE == 0
            if nodes is not None:
                assert self.node(page) not in (-2, nodes[i]), "nowhere, or there already"
                self.moved[page] = int(nodes[i])
            status[i] = self.node(page)
        return 0

    def node(self, page: int) -> int:
        return self.moved.get(page, -2 if page // PAGE % 10 == 0 else page // PAGE % 3)


@linux
def test_the_system_tells_where_pages_are() -> None:
    with closing(mmap.mmap(-1, 4 * PAGE)) as memory:
        memory[0], memory[2 * PAGE] = 1, 1
        view = np.frombuffer(memory, np.uint8)
        found = nodes_of_pages(view.ctypes.data, 4 * PAGE)
        assert found[[0, 2]].min() >= 0 and found[[1, 3]].max() < 0
        move_to_node(view.ctypes.data, 4 * PAGE, int(found[0]))  # where they are: nothing to do
        assert (memory[0], memory[2 * PAGE]) == (1, 1)
        del view


def test_where_the_system_does_not_tell_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa_pages, "_syscall", lambda *arguments: -1)
    assert nodes_of_pages(1 << 30, 4 * PAGE).size == 0
    move_to_node(1 << 30, 4 * PAGE, 1)
    monkeypatch.setattr(numa_pages, "_CALL", None)
    assert nodes_of_pages(1 << 30, 4 * PAGE).size == 0


@linux
def test_pages_elsewhere_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    system, first = ThreeNodes(), 1 << 30
    monkeypatch.setattr(numa_pages, "_syscall", system)
    monkeypatch.setattr(numa_pages, "_TOGETHER", 7)  # several calls
    pages = range(first, first + 60 * PAGE, PAGE)
    nowhere = [page for page in pages if system.node(page) == -2]
    move_to_node(first, 60 * PAGE, 1)
    assert {system.node(page) for page in pages if page not in nowhere} == {1}
    assert len(nowhere) == 6 and {system.node(page) for page in nowhere} == {-2}


def test_what_lies_in_the_files_maps() -> None:
    assert within([(10, 5), (90, 20), (210, 5), (5, 10)], [(10, 90), (200, 100)]) == [(10, 5), (210, 5)]


@linux
def test_a_model_on_two_nodes_replies_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of the experts' pages end where the workers are that read them first."""
    path, ids = tiny_models.shared("wide", type={"": "Q4_K"}), tiny_models.token_ids("wide", 6)

    def logits() -> tuple[np.ndarray, list[Near]]:
        with localrun.load(path, device="cpu", threads=4, ctx=64) as model:
            cache = model.new_cache()
            found = np.array([model.model.forward([token], cache)[0] for token in ids])
            model.model._resident.wait()
            return found, list(model.model._resident._near)

    expected, near = logits()
    assert near == [] or len(hardware.usable_nodes()) > 1
    here, system = tuple(sorted(os.sched_getaffinity(0))), ThreeNodes()
    monkeypatch.setattr(hardware, "usable_nodes", lambda: {0: here, 2: here})
    monkeypatch.setattr(numa_pages, "_syscall", system)
    found, near = logits()
    assert np.array_equal(found, expected)
    assert [each.node for each in near] == [0, 2] and set(system.moved.values()) == {0, 2}
    sizes = [sum(size for _, size in each.spans) for each in near]
    assert min(sizes) > 0.4 * sum(sizes)
    with open_gguf(path) as file:
        weights = sum(t.n_bytes for name, t in file.tensors.items() if "exps" in name)
    assert sum(sizes) >= weights


def test_closing_ends_the_threads_of_nodes() -> None:
    with open_gguf(tiny_models.shared("v3")) as file:
        near = [Near(0, (0,), file.spans), Near(1, (10_000,), file.spans)]  # a core that is not there: it runs anywhere
        resident = Resident(file, None, near)
        resident.wait()
        resident.close()
        assert not resident._thread.is_alive()
