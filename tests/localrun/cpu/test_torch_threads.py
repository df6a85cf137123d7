"""How many threads torch has, by how much there is for them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from localrun.cpu.torch_threads import TorchThreads, torch_at_work
from quant.threads.pool import Pool


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_few_elements_are_one_threads() -> None:
    for n_elements, n_threads in [(32 * 2048, 1), (1 << 18, 1), (512 * 2048, 2)]:
        with TorchThreads.for_tensors(n_elements):
            assert torch.get_num_threads() == n_threads
        assert torch.get_num_threads() == 2
    with pytest.raises(KeyboardInterrupt), TorchThreads.for_tensors(1):
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("n_tokens", "n_threads"), [(32, 1), (512, 2)])
def test_few_tokens_of_a_model_are_one_threads(n_tokens: int, n_threads: int) -> None:
    with closing(Pool(1)) as pool:
        with torch_at_work(pool, SimpleNamespace(hidden_size=2048), n_tokens):
            assert torch.get_num_threads() == n_threads
        assert torch.get_num_threads() == 2


MEMORY = """
import re, sys
from pathlib import Path
from localrun.cpu.torch_threads import TorchThreads
from localrun.gguf.residency import own_memory
TorchThreads.hold(1)
import torch
def grown():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024 - before
before = 0
before = grown()
memory = own_memory(64 << 20)
memory[:] = 1
del memory
print(grown())
tensor = torch.ones(16 << 20)
del tensor
print(grown())
TorchThreads.release()
print(grown())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_goes_back() -> None:
    """What --repack made does with its last view, what tensors of 64 MiB had when no model is open."""
    found = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    own, kept, given_back = map(int, found.split())
    assert own < 16 and kept >= 48 and given_back < 16  # MiB: 64 or none, and what imports and torch leave
