"""localrun completion: the script by which a shell completes this program's commands and options."""

import os
from enum import Enum
from typing import Annotated

import typer

from cli.output import write

ASKED = "_LOCALRUN_COMPLETE"  # what the script sets when it asks for words


class Shell(str, Enum):
    """Those that typer has a script for."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="Which shell is to complete.", show_default=False)]) -> None:
    """Print the script by which a shell completes commands and options.

    In ~/.bashrc: eval "$(localrun completion bash)", in ~/.zshrc with zsh; fish: localrun completion fish | source.
    """
    from typer.completion import get_completion_script

    write(get_completion_script(prog_name="localrun", complete_var=ASKED, shell=shell.value) + "\n")


def answer_shells() -> None:
    """Have typer answer where the script asks: it does so only if it was told of the shells."""
    if ASKED in os.environ:
        from typer.completion import completion_init

        completion_init()
