"""The tensors that a Hugging Face checkpoint of a given config.json holds: names and shapes, without the checkpoint.

They follow from the declaration of the architecture. The converter checks them: it wants every tensor in its shape and
none besides.
"""

from collections.abc import Iterator

from localrun.convert.builder import layer_prefix
from localrun.convert.settings import Settings, read_config
from localrun.errors import LocalrunError
from localrun.models.architecture import Architecture
from localrun.models.config import Config

Shapes = Iterator[tuple[str, tuple[int, ...]]]

MAX_LAYERS, MAX_EXPERTS = 512, 1024  # llama.cpp's limits, llama.h @3f545becc; no published model is near them
MAX_HEADS, MAX_HEAD_DIM = 1 << 14, 1 << 16  # what takes a step of its own each; published models have 128 and 576
_LIMITS = {
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_HEADS,
    "num_key_value_heads": MAX_HEADS,
    "head_dim": MAX_HEAD_DIM,
    "qk_rope_head_dim": MAX_HEAD_DIM,
    "n_routed_experts": MAX_EXPERTS,
    "num_nextn_predict_layers": MAX_LAYERS,
}


def checkpoint_shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Name -> shape. Raises CheckpointError on what is missing or no number, LocalrunError on absurd sizes."""
    architecture, config = settings.architecture, read_config(settings)
    for field, most in _LIMITS.items():
        if getattr(config, field) > most:
            name, found = architecture.setting_of(field), getattr(config, field)
            raise LocalrunError(f"{settings.where}: {name} is {found}; expected at most {most}")
    shapes = dict(_model(architecture, config))
    for name, shape in shapes.items():
        if 0 in shape:
            raise LocalrunError(f"{settings.where}: its sizes give '{name}' the shape {list(shape)}")
    return shapes


def _model(architecture: Architecture, config: Config) -> Shapes:
    for tensor in architecture.ends:
        if tensor.when(config):
            yield from tensor.sources(config)
    for index in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        for tensor in architecture.layer_in_checkpoint(config, index):
            for name, shape in tensor.sources(config):
                yield layer_prefix(architecture, index) + name, shape
