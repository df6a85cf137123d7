"""localrun list, remove: the models that were pulled."""

from typing import Annotated

import typer

from cli import options
from cli.hub.folder import Folder, chosen
from cli.output import note, print_json, printable, show, size


def list_(folder: Folder = None, as_json: options.Json = False) -> None:
    """List the models that were pulled."""
    from localrun.hub import store

    place = chosen(folder)
    found = store.stored(place)
    if as_json:
        rows = [
            {"reference": str(each.reference), "bytes": each.model.n_bytes, "path": str(each.path)} for each in found
        ]
        print_json({"folder": str(place), "models": rows})
        return
    width = max((len(printable(str(each.reference))) for each in found), default=0)
    for each in found:
        show(f"{printable(str(each.reference)):<{width}}  {size(each.model.n_bytes):>11}")
    if not found:
        note(f"no models in {place}; localrun pull OWNER/NAME lists what a repository has")


def remove(
    reference: Annotated[str, typer.Argument(metavar="REPO:QUANT", help="As `localrun list` shows it.")],
    folder: Folder = None,
) -> None:
    """Delete a model that was pulled, or what has come of one."""
    from localrun.hub import names, store

    place = chosen(folder)
    n_bytes = store.remove(names.reference(reference), place)
    note(f"removed {reference}: {size(n_bytes)}")
