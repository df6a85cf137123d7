"""How many threads torch has, by how much there is for them."""

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
