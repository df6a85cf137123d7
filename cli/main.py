"""The localrun command: its subcommands, and the one place where errors become a line and an exit code.

Nothing here or in the command modules imports torch, numba, llama_cpp or gguf at the top, so that --help is quick.
"""

import logging
import os
import sys
from typing import Annotated

import typer

import localrun
from cli.bench import bench
from cli.chat import chat
from cli.convert import convert
from cli.doctor import doctor
from cli.generate import generate
from cli.imatrix import imatrix
from cli.inspect import inspect
from cli.output import Notes
from cli.perplexity import perplexity
from cli.plan import app as plan

app = typer.Typer(
    name="localrun",
    help="Run large language models on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich would add 0.1 s to every --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (chat, generate, inspect, perplexity, convert, imatrix, bench, doctor):
    app.command()(command)
app.add_typer(plan, name="plan")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"localrun {localrun.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run large language models on this machine."""


def run(args: list[str]) -> int:
    """The exit code of a command line: 0 done, 1 the user can fix it, 2 usage, 130 interrupted."""
    from quant.errors import QuantError

    try:
        try:
            app(args, prog_name="localrun")
        finally:
            sys.stdout.flush()  # so that a closed or full output shows here
    except SystemExit as end:  # typer's, 2 and 130 too
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; nor tries the exit again
        return 1
    except (localrun.LocalrunError, QuantError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'output'}: {error.strerror}"
    print(f"localrun: {' '.join(message.split())}", file=sys.stderr)
    return 1


def main() -> None:
    """The console script."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  open until the end
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that lacks a character gets a question mark, not a crash
    logging.getLogger("quant").addHandler(Notes())
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
