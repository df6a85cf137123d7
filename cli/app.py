"""The localrun command's subcommands and what they have in common.

Nothing here or in the command modules imports torch, numba, llama_cpp or gguf at the top, so that --help is quick.
"""

from typing import Annotated

import typer

import localrun
from cli.bench import bench
from cli.chat import chat
from cli.completion import answer_shells, completion
from cli.convert import convert
from cli.doctor import doctor
from cli.generate import generate
from cli.hub.pull import pull
from cli.hub.stored import list_, remove
from cli.imatrix import imatrix
from cli.inspect import inspect
from cli.output import show
from cli.perplexity import perplexity
from cli.plan import app as plan
from cli.serve import serve
from cli.tune import tune

app = typer.Typer(
    name="localrun",
    help="Run large language models on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich would add 0.1 s to every --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (chat, generate, serve, inspect, perplexity, convert, imatrix, bench, doctor, tune):
    app.command()(command)
app.add_typer(plan, name="plan")
for name, command in (("pull", pull), ("list", list_), ("remove", remove), ("completion", completion)):
    app.command(name)(command)
answer_shells()


def _print_version(wanted: bool) -> None:
    if wanted:
        show(f"localrun {localrun.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run large language models on this machine."""
