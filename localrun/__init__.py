"""Run DeepSeek-class mixture-of-experts models on one machine.

    import localrun
    model = localrun.load("model.gguf", device="cpu", threads=2, ctx=4096)
    model.logits([1, 2, 3])
    for token_id in model.generate(ids, localrun.Sampling(temperature=0.0), max_tokens=64): ...

Importing this package loads neither torch nor numba; load() does.
"""

from importlib import import_module

from localrun.errors import ContextFullError, GGUFError, LocalrunError, UnsupportedModelError

__version__ = "0.1.0"
__all__ = ["Constraint", "ContextFullError", "GGUFError", "LocalrunError", "Sampling", "UnsupportedModelError", "load"]

_LAZY = {
    "Constraint": "localrun.generate.constraint",
    "load": "localrun.engine",
    "Sampling": "localrun.generate.sampling",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'localrun' has no attribute '{name}'")
    return getattr(import_module(_LAZY[name]), name)
