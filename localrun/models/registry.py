"""The architectures that are declared, one line each."""

from localrun.models.architecture import Architecture
from localrun.models.deepseek2 import DEEPSEEK2
from localrun.models.llama import LLAMA

_DECLARED: tuple[Architecture, ...] = (
    DEEPSEEK2,
    LLAMA,
)
ARCHITECTURES = {architecture.name: architecture for architecture in _DECLARED}
CHECKPOINTS = {name: architecture for architecture in ARCHITECTURES.values() for name in architecture.checkpoints}
