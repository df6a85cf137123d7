"""Ctrl-C at any moment: at once and silent while a program starts, in order where something is being written."""

import os
import signal
import subprocess
import sys
import time

import pytest
from fake_engine import Engine

from cli.interrupt import raising
from cli.main import run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")

_MOMENTS = {
    "plain code": "press()",
    "a callback of ctypes": "ctypes.CFUNCTYPE(None)(press)()",
    "a callback of a weak reference": "r = weakref.ref(x := type('X', (), {})(), lambda _: press()); del x",
    "a finaliser": "type('X', (), {'__del__': lambda _: press()})()",
    "an import": "sys.meta_path.insert(0, type('F', (), {'find_spec': lambda *a: press()})()); import nosuch",
    "a bare except": "try: press()\nexcept BaseException: pass",
    "the end": "atexit.register(press)",
}
_PROGRAM = """
import atexit, ctypes, os, signal, sys, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)
from cli.interrupt import end_at_once
end_at_once()
def press(): os.kill(os.getpid(), signal.SIGINT)
{}
"""


@pytest.mark.parametrize("moment", _MOMENTS)
def test_nothing_swallows_it(moment: str) -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM.format(_MOMENTS[moment])], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_background_job_goes_on_ignoring_it() -> None:
    program = _PROGRAM.replace("signal.default_int_handler", "signal.SIG_IGN").format("press(); print('done')")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_the_command_is_ended_at_once_from_its_first_line_on() -> None:
    """Importing what main() imports before it runs takes no time in which Ctrl-C would still be a traceback."""
    ours = "sorted(name for name in sys.modules if name.split('.')[0] in ('cli', 'typer', 'localrun'))"
    code = f"import sys, cli.main; print(*{ours})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "cli cli.interrupt cli.main\n"


def test_a_lost_one_is_sent_again() -> None:
    """Raised in a finaliser, it is lost; the block ends by it nevertheless."""

    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), raising():
        Finalised()
        time.sleep(10)
        pytest.fail("the Ctrl-C was lost")


def test_an_interrupt_is_130(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.model.before_step = lambda _: os.kill(os.getpid(), signal.SIGINT)
    assert run(["generate", "-p", "x", "--raw"]) == 130
    assert "Traceback" not in capsys.readouterr().err
