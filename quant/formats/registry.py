"""The block formats by ggml's names, each in a module of its own that is imported when first used."""

from importlib import import_module

from quant.block_format import Format
from quant.errors import QuantError

_MODULES = {
    "F32": "floats",
    "F16": "floats",
    "BF16": "floats",
    "Q4_0": "q4_0",
    "Q4_1": "q4_1",
    "Q5_0": "q5_0",
    "Q5_1": "q5_1",
    "Q8_0": "q8_0",
    "Q4_K": "q4_k",
    "Q5_K": "q5_k",
    "Q6_K": "q6_k",
    "IQ4_NL": "iq4_nl",
    "IQ4_XS": "iq4_xs",
    "MXFP4": "mxfp4",
}
NAMES = tuple(_MODULES)
INTERLEAVED = (
    "Q4_K_R16",
    "Q5_K_R16",
    "Q6_K_R16",
)  # names of our own: 16 rows of the format before _R16


def get(name: str) -> Format:
    """The format called `name`. Raises QuantError."""
    if name not in _MODULES and name not in INTERLEAVED:
        raise QuantError(f"no kernels for type {name}; there are some for {', '.join((*NAMES, *INTERLEAVED))}")
    return getattr(import_module(f"quant.formats.{_MODULES.get(name, name.lower())}"), name)
