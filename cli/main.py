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
    from localrun.ranks.mpi import place_in_mpiexec

    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  open until the end
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that lacks a character gets a question mark, not a crash
    logging.getLogger("quant").addHandler(Notes())
    args = sys.argv[1:]
    rank, n_ranks = place_in_mpiexec()
    sys.exit(run(args) if n_ranks == 1 else _run_in_mpiexec(args, is_first=rank == 0))


def _run_in_mpiexec(args: list[str], is_first: bool) -> int:
    """Of an mpiexec of the user's, processes but the first serve what that one loads, or have nothing to do."""
    if not args or args[0] not in _SHARING or {"-h", "--help"} & set(args):
        return run(args) if is_first else 0
    import traceback

    from localrun.ranks.rank_child import main_in_mpiexec
    from localrun.ranks.start import end_in_mpiexec

    if not is_first:
        main_in_mpiexec()
    code = 1
    try:
        code = run(args)
    except Exception:  # a fault of ours, of which the others must know too
        traceback.print_exc()
    end_in_mpiexec(code)


if __name__ == "__main__":
    main()
