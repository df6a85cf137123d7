"""A picture of a measurement along the context: tokens a second of prompts and replies against its depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localrun.pictures import new_figure, save_figure


def plot_depths(path: Path, document: dict[str, Any]) -> None:
    """document: of bench.run. Raises LocalrunError if the picture can't be written."""
    figure, axes = new_figure()
    engines = {"localrun": document["results"]}
    if "against" in document:
        engines[document["against"]["engine"]] = document["against"]["results"]
    for style, (engine, results) in zip(("-", "--"), engines.items(), strict=False):
        for color, kind in (("tab:blue", "pp"), ("tab:orange", "tg")):
            of_kind = {test: result for test, result in results.items() if test.startswith(kind)}
            depths = [int(test.partition("@ d")[2] or 0) for test in of_kind]
            rates = [result["median"] for result in of_kind.values()]
            if rates:
                name = next(iter(of_kind)).split()[0]
                axes.plot(depths, rates, style, color=color, marker="o", label=f"{engine}, {name}")
    axes.set(yscale="log", xlabel="tokens of context before", ylabel="tokens a second", title=document["model"])
    save_figure(figure, axes, path)
