"""How many threads torch has, by how much there is for them."""

import torch

from localrun.cpu.torch_threads import TorchThreads


def test_few_elements_are_one_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for n_elements, n_threads in [(32 * 2048, 1), (1 << 18, 1), (512 * 2048, 2)]:
            with TorchThreads.for_tensors(n_elements):
                assert torch.get_num_threads() == n_threads
            assert torch.get_num_threads() == 2
        try:
            with TorchThreads.for_tensors(1):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
