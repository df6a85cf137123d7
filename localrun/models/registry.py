"""The architectures that are declared, one line each."""

from localrun.models.architecture import Architecture
from localrun.models.deepseek2 import DEEPSEEK2
from localrun.models.llama import LLAMA
from localrun.models.qwen3moe import QWEN3MOE

_DECLARED: tuple[Architecture, ...] = (
    DEEPSEEK2,
    LLAMA,
    QWEN3MOE,
)
ARCHITECTURES = {architecture.name: architecture for architecture in _DECLARED}
CHECKPOINTS = {each.name: (architecture, each) for architecture in _DECLARED for each in architecture.checkpoints}
