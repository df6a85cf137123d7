"""Where the tests of Triton kernels run: on the GPU, or without one on the CPU through Triton's interpreter.

Import this before triton: whether kernels are compiled or interpreted is decided when they are defined.
"""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

gpu = pytest.mark.skipif(not HAS_GPU, reason="torch sees no CUDA device")


def compiled_environment() -> dict[str, str]:
    """The environment of a process that shall compile kernels, not interpret them."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
