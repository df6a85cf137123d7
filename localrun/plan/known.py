"""The JSON files that come with this package: models, machines, devices and prices, each entry with its sources."""

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def load_data(name: str) -> dict[str, Any]:
    """The content of data/<name>.json; not to be changed."""
    return json.loads(files("localrun.plan").joinpath("data", f"{name}.json").read_text(encoding="utf-8"))
