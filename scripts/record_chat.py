"""A chat with a model that thinks, recorded as text: what the terminal shows at each moment, as pyte draws it.

    python scripts/record_chat.py [--columns 72] [--rows 18]

The program is the real one, behind a pseudo-terminal; the engine behind it is a stub that says what is written here, in
Qwen's chat template. Exits with 1 if something that should be seen is not.
"""

from __future__ import annotations

import argparse
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

REPLIES = (
    "<think>\nSix times seven. Six times six is thirty-six, and six more are forty-two. Nothing else was asked. "
    "I could show it in Python, which is short.\n</think>\n\n# Six times seven\n\nIt is **42**. In Python:\n\n"
    "```python\nprint(6 * 7)\n```\n\n- six sevens\n- or seven sixes\n",
    "<think>\nThis needs a longer thought, of which the user may not wish to see the end. Let me count again: one, "
    "two, three, four, five, six, seven, eight, nine, ten.\n</think>\n\nTen, as I counted.",
    "<think>\nA greeting in two lines.\n</think>\n\nHello to you, on both lines.",
)
STEP_S = 0.004
DEADLINE_S = 60.0


def child() -> None:
    """The program with the stub behind localrun.load."""
    import fake_engine
    from chats import source_of, template

    import cli.main
    import localrun

    class Model(fake_engine.Model):
        """The reply of the turn that the cache holds."""

        def forward(self, ids: Any, cache: Any, all_logits: bool = False) -> Any:
            time.sleep(STEP_S)
            text = bytes([*cache.ids, *ids]).decode("latin-1")
            self.reply = REPLIES[min(text.count("<|im_start|>user"), len(REPLIES)) - 1]
            return super().forward(ids, cache, all_logits)

    engine = fake_engine.Engine(ctx=2000)
    engine.model, engine.template = Model(""), template(source_of("Qwen-Qwen3-0.6B"))
    localrun.load = lambda path, **options: engine  # type: ignore[assignment]
    sys.argv[1:] = ["chat", "--temp", "0"]
    cli.main.main()


class Terminal:
    """The program on a pseudo-terminal, and its screen."""

    def __init__(self, columns: int, rows: int, home: Path) -> None:
        import fcntl
        import struct
        import termios

        import pyte

        self._screen = pyte.HistoryScreen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._main, terminal = pty.openpty()
        self._screen.write_process_input = lambda data: os.write(self._main, data.encode())
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {"XDG_STATE_HOME": str(home), "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child"],
            **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
            env=os.environ | environment,
            cwd=home,
            start_new_session=True,
        )
        os.close(terminal)

    def type(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._screen.display]

    def wait(self, text: str, caption: str = "") -> None:
        """Until the screen shows a text; then record it."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in "\n".join(self.lines()):
            if time.monotonic() > deadline:
                self._process.kill()
                sys.exit("\n".join([*self.lines(), f"--- never seen: {text}"]))
            if select.select([self._main], [], [], 0.05)[0]:
                self._stream.feed(os.read(self._main, 4096))
        if caption:
            self.record(caption)

    def record(self, caption: str) -> None:
        print(f"\n--- {caption} ".ljust(self._screen.columns, "-"))
        print("\n".join(self.lines()).rstrip("\n"))

    def ready(self) -> None:
        """Until keys are read: the line below is there then, and only then."""
        self.wait(" of 2000 tokens (")

    def lacks(self, text: str) -> None:
        if text in "\n".join(self.lines()):
            sys.exit("\n".join([*self.lines(), f"--- still seen: {text}"]))

    def leave(self) -> None:
        self.ready()
        self.type("\x04")
        with suppress(OSError):  # the other end is closed
            while os.read(self._main, 4096):  # what it still writes has to be read
                pass
        if self._process.wait(DEADLINE_S):
            sys.exit(f"exit code {self._process.returncode}")
        os.close(self._main)


def record(columns: int, rows: int, home: Path) -> None:
    """The whole conversation."""
    terminal = Terminal(columns, rows, home)
    terminal.wait("0 of 2000 tokens", "the start: the line below says how full the context is")
    terminal.type("What is six times seven?\r")
    terminal.wait("thirty-six", "thoughts, while they come")
    terminal.wait("t/s ]")
    terminal.ready()
    terminal.record("they fold to a line; the reply is Markdown")
    terminal.lacks("thirty-six")
    terminal.type("Count to ten.\r")
    terminal.wait("a longer thought")
    terminal.interrupt()
    terminal.wait("localrun: stopped", "Ctrl-C in the thoughts")
    terminal.ready()
    terminal.type("/continue\r")
    terminal.wait("Ten, as I counted.", "/continue goes on from there")
    terminal.ready()
    terminal.type("/sa")
    terminal.wait("save messages and cache", "commands are completed")
    terminal.type("\t")
    terminal.wait("> /save")
    terminal.type(" talk\r")
    terminal.wait("saved 4 messages", "saved")
    terminal.leave()
    terminal = Terminal(columns, rows, home)
    terminal.wait("0 of 2000 tokens")
    terminal.type("/load talk\r")
    terminal.wait("loaded 4 messages and")
    terminal.ready()
    terminal.type("/think show\r")
    terminal.wait("nine, ten.", "another day: loaded; /think show shows the last thoughts")
    terminal.ready()
    terminal.type("\x1b[200~Good morning.\nAnd good day.\x1b[201~")
    terminal.wait("And good day.", "two lines, pasted")
    terminal.type("\r")
    terminal.wait("Hello to you", "are one message; thoughts are shown now")
    terminal.wait("both lines.")
    terminal.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--columns", type=int, default=72)
    parser.add_argument("--rows", type=int, default=18)
    given = parser.parse_args()
    if given.child:
        child()
        return
    with tempfile.TemporaryDirectory() as home:
        record(given.columns, given.rows, Path(home))


if __name__ == "__main__":
    main()
