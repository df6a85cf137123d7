"""The architectures that are declared, one line each."""

from localrun.models.architecture import Architecture
from localrun.models.bailingmoe2 import BAILINGMOE2
from localrun.models.deepseek2 import DEEPSEEK2
from localrun.models.deepseek4 import DEEPSEEK4
from localrun.models.deepseek32 import DEEPSEEK32
from localrun.models.dots1 import DOTS1
from localrun.models.ernie4_5_moe import ERNIE4_5_MOE
from localrun.models.glm4moe import GLM4MOE
from localrun.models.glm_dsa import GLM_DSA
from localrun.models.gpt_oss import GPT_OSS
from localrun.models.hy_v3 import HY_V3
from localrun.models.llama import LLAMA
from localrun.models.minimax_m2 import MINIMAX_M2
from localrun.models.qwen3moe import QWEN3MOE

_DECLARED: tuple[Architecture, ...] = (
    BAILINGMOE2,
    DEEPSEEK2,
    DEEPSEEK32,
    DEEPSEEK4,
    DOTS1,
    ERNIE4_5_MOE,
    GPT_OSS,
    GLM4MOE,
    GLM_DSA,
    HY_V3,
    LLAMA,
    MINIMAX_M2,
    QWEN3MOE,
)
ARCHITECTURES = {architecture.name: architecture for architecture in _DECLARED}
CHECKPOINTS = {each.name: (architecture, each) for architecture in _DECLARED for each in architecture.checkpoints}
