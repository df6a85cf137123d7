"""The start of the localrun command, and the one place where errors become a line and an exit code.

Little is imported before main() runs, since a Ctrl-C until then is Python's own affair.
"""

import os
import sys

from cli.interrupt import INTERRUPTED, end_at_once

_SHARING = ("chat", "generate", "bench", "serve")  # commands whose models ranks may share


def run(args: list[str]) -> int:
    """The exit code of a command line: 0 done, 1 the user can fix it, 2 usage, 130 interrupted."""
    from cli.app import app
    from cli.explain import EXPECTED, explain
    from cli.output import note

    try:
        try:
            app(args, prog_name="localrun")
        finally:
            sys.stdout.flush()  # so that a closed or full output shows here
    except SystemExit as end:  # typer's, 2 and 130 too
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:  # while an error was on its way
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; nor tries the exit again
        return 1
    except EXPECTED as error:
        note(explain(error))
    return 1


def main() -> None:
    """The console script."""
    end_at_once()
    import logging

    from cli.output import Notes

    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  open until the end
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that lacks a character gets a question mark, not a crash
    logging.getLogger("quant").addHandler(Notes())
    _leave_to_the_first_rank(sys.argv[1:])
    sys.exit(run(sys.argv[1:]))


def _leave_to_the_first_rank(args: list[str]) -> None:
    """Under an mpiexec of the user's, processes but the first serve what that one loads, or have nothing to do."""
    from localrun.ranks.mpi import place_in_mpiexec

    if place_in_mpiexec()[0] > 0:
        if args[:1] and args[0] in _SHARING and not {"-h", "--help"} & set(args):
            from localrun.ranks.rank_child import main_in_mpiexec

            main_in_mpiexec()
        sys.exit(0)


if __name__ == "__main__":
    main()
