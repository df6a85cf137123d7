"""localrun pull: a model from Hugging Face's hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.hub.folder import Folder, chosen
from cli.output import note, print_json, printable, progress_bar, show, size

if TYPE_CHECKING:
    from pathlib import Path

    from localrun.hub.names import Model
    from localrun.hub.remote import Repository

_CTX = 8192  # tokens, as plan's default
_GUESS = 1 << 30  # bytes of cache and work memory


def pull(
    reference: Annotated[
        str, typer.Argument(metavar="REPO[:QUANT]", help="OWNER/NAME on Hugging Face, and which of its files.")
    ],
    folder: Folder = None,
    as_json: options.Json = False,
) -> None:
    """List the GGUF files of a repository, or download one of them: REPO:QUANT.

    What was interrupted goes on where it was. `localrun chat REPO:QUANT` then uses it.
    """
    from localrun.hub import names, remote
    from localrun.hub.download import download

    wanted, place = names.reference(reference), chosen(folder)
    repository = remote.Repository(wanted.repo)
    models = names.models_of(repository.files)
    if wanted.quant is None and models:  # none at all is an error below
        _list(repository, models, as_json)
        return
    model = names.choose(models, wanted, "there")
    with progress_bar() as report:
        path = download(repository, model, place, report)
    shortage = _shortage(path)
    if as_json:
        print_json({"reference": str(wanted), "path": str(path), "bytes": model.n_bytes, "shortage": shortage or None})
        return
    show(str(path))
    if shortage:
        note(shortage)


def _shortage(path: Path) -> str:
    """What plan says if a file does not fit in this machine's free memory; nothing of one that it cannot read."""
    from localrun.errors import LocalrunError
    from localrun.plan.measure import unmeasured
    from localrun.plan.memory import refusal
    from localrun.plan.shapes import load_model

    try:
        return refusal(load_model(str(path)), unmeasured(), _CTX)
    except LocalrunError:
        return ""


def _list(repository: Repository, models: list[Model], as_json: bool) -> None:
    fit = _Fit(repository, models)
    if as_json:
        print_json({"repository": repository.name, "models": [fit.document(model) for model in models]})
        return
    width = max(len(printable(model.quant)) for model in models)
    for model in models:
        parts = f", {model.n_parts} parts" if model.n_parts > 1 else ""
        state = "fits" if fit.fits(model) else f"needs some {size(fit.needed(model))} of memory"
        show(f"{printable(model.quant):<{width}}  {size(model.n_bytes):>11}  {state}{parts}")
    note(f"{size(fit.free)} of memory are free; to download one: localrun pull {repository.name}:QUANT")


class _Fit:
    """Whether models fit: their weights, and what the plan of one of them says is needed besides."""

    def __init__(self, repository: Repository, models: list[Model]) -> None:
        from localrun.hardware import free_ram

        self.free = free_ram()
        self._besides = _besides(repository, models)

    def needed(self, model: Model) -> int:
        return model.n_bytes + self._besides

    def fits(self, model: Model) -> bool:
        return self.needed(model) <= self.free

    def document(self, model: Model) -> dict[str, Any]:
        return {
            "quant": model.quant,
            "bytes": model.n_bytes,
            "parts": model.n_parts,
            "files": [file.path for file in model.files],
            "needed_bytes": self.needed(model),
            "fits": self.fits(model),
        }


def _besides(repository: Repository, models: list[Model]) -> int:
    """Bytes of cache and work memory, by the header of the smallest model in one file; a rough guess if there is none.

    All of a repository's files hold the same model: what they differ in are its weights.
    """
    from localrun.errors import LocalrunError
    from localrun.hub.remote import header_of
    from localrun.plan.measure import unmeasured
    from localrun.plan.memory import plan_memory
    from localrun.plan.shapes import load_model, n_bytes

    for model in models:
        if model.n_parts == 1:
            try:
                with header_of(repository, model.files[0]) as path:
                    shape = load_model(str(path))
                return sum(plan_memory(shape, unmeasured(), _CTX).needed.values()) - n_bytes(shape.tensors)
            except LocalrunError:
                break
    return _GUESS
