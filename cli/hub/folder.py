"""The option that says where models are kept."""

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[
    str | None,
    typer.Option(
        "--folder",
        metavar="FOLDER",
        help="Where models are kept; LOCALRUN_MODELS, or ~/.local/share/localrun/models, if not given.",
        show_default=False,
    ),
]


def chosen(folder: str | None) -> Path:
    """The folder meant. Raises LocalrunError if there can be none."""
    from localrun.files import user_path
    from localrun.hub.store import models_folder

    return models_folder() if folder is None else user_path(folder)
