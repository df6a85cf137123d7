"""JSON files: the package's own (models, machines, devices and prices, each entry with its sources), and the user's."""

import json
import math
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from localrun.errors import LocalrunError


@cache
def load_data(name: str) -> dict[str, Any]:
    """The content of data/<name>.json; not to be changed."""
    return json.loads(files("localrun.plan").joinpath("data", f"{name}.json").read_text(encoding="utf-8"))


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse(text)


def read_json(path: Path, shown: str, missing: str) -> Any:
    """What a user's JSON file holds. Raises LocalrunError that calls it `shown` and, where there is none, `missing`."""
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse, parse_float=_finite)
    except FileNotFoundError:
        raise LocalrunError(f"{shown}: {missing}") from None
    except OSError as error:
        raise LocalrunError(f"{shown}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise LocalrunError(f"{shown}: not JSON: {error}") from None
