"""A mapped file comes into memory behind the program's back, where it fits, and can be closed meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from localrun import hardware
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.gguf.residency import Resident, let_go


@pytest.fixture
def file() -> GGUFFile:
    with open_gguf(tiny_models.shared("v3")) as file:
        yield file


def resident_bytes(file: GGUFFile) -> int:
    """What the kernel says of the file's maps (proc(5), smaps: Rss)."""
    found, wanted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            wanted = line.endswith(str(file.path))
        elif wanted and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def test_all_of_the_file_is_mapped(file: GGUFFile) -> None:
    before = resident_bytes(file)
    resident = Resident(file)
    resident.wait()
    assert before < file.file_size / 2 and resident_bytes(file) >= file.file_size
    resident.close()


def test_what_does_not_fit_is_left_alone(file: GGUFFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_ram", lambda: file.file_size)
    before = resident_bytes(file)
    resident = Resident(file)
    resident.wait()
    assert resident_bytes(file) == before
    resident.close()


def span_of(file: GGUFFile, name: str) -> tuple[int, int]:
    data = file.tensors[name].data
    return data.ctypes.data, data.nbytes


def test_a_part_of_the_file(file: GGUFFile) -> None:
    before, span = resident_bytes(file), span_of(file, "output.weight")
    resident = Resident(file, [span])
    resident.wait()
    assert 0 <= resident_bytes(file) - before - span[1] < 100_000  # whole pages, and some the kernel adds
    resident.close()


def test_what_is_let_go_is_read_again(file: GGUFFile) -> None:
    span, data = span_of(file, "output.weight"), file.tensors["output.weight"].data
    expected, before = data.copy(), resident_bytes(file)
    let_go([span])
    assert before - resident_bytes(file) > span[1] - 3 * 4096  # pages that others share stay
    assert np.array_equal(data, expected)


def test_spans_are_the_files(file: GGUFFile) -> None:
    ((address, n_bytes),) = file.spans
    assert n_bytes == file.path.stat().st_size
    data = file.tensors["token_embd.weight"].data
    start = data.ctypes.data - address
    assert np.array_equal(np.fromfile(file.path, np.uint8)[start : start + data.size], data)


def test_closing_ends_the_thread(file: GGUFFile) -> None:
    Resident(file).close()
    assert "localrun-resident" not in [thread.name for thread in threading.enumerate()]
