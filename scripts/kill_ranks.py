"""Kill a rank of a chat at a random moment, again and again, and check what the user is left with.

    python scripts/kill_ranks.py [--times 20] [--ranks 3 | --readers 1] [--seed 0] [--model FILE]

Each time `localrun chat --ranks N`, or with --prefill-hosts on this machine, is fed with messages, and one of its other
processes is killed, or stopped so that it hangs: while ranks start, load, read a prompt or reply. Then within 10 s
there must be one line that names the rank, and exit code 1; the conversation must be in the file that the line names,
as far as it was shown; and no process of the run may be left. The model is a synthetic one unless a file with routed
experts is given.

A line a kill on stderr; the last line of stdout is one JSON document. Exit code 1 if something was not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
MARK = "LOCALRUN_KILL_RANKS"  # in the environment of all processes of a run
LIMIT_S, LEFT_S = 10.0, 2.0  # until the line; for killed processes to be gone after that
KINDS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
_MESSAGES = "\n".join(f"tell me of the number {i}" for i in range(400)) + "\n"
_LONG = "\n".join(f"tell me of the number {i}; " + "and so on, " * 30 for i in range(150)) + "\n"  # a pipe holds it
_CHILDREN = ("localrun.ranks.rank_child", "localrun.cpu.reader_child")
_NAMED = r"localrun: .*(rank|reader) \d+"


class Wrong(Exception):
    """What was not as it must be."""


def synthetic(folder: Path) -> Path:
    """A small model whose experts can be shared: blocks of 32."""
    path, mix = folder / "tiny.gguf", folder / "tiny.mix"
    mix.write_text("_exps Q8_0\nbase Q4_K_M\n")
    command = [sys.executable, str(ROOT / "scripts/make_synthetic.py"), "tiny", str(path), "--mix", str(mix)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return path


def of_run(mark: str) -> list[psutil.Process]:
    """The processes of a run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Chat:
    """One run, fed with messages."""

    def __init__(self, model: Path, others: list[str], folder: Path):
        """others: the options that start them."""
        self.mark, self.folder = uuid.uuid4().hex, folder
        options = [*others, "-t", "1", "-c", "60000", "-n", "40", "--seed", "1"]
        self.out, self.err = folder / f"{self.mark}.out", folder / f"{self.mark}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", "chat", str(model), *options],
                stdin=subprocess.PIPE, stdout=out, stderr=err, cwd=folder,
                env=os.environ | {MARK: self.mark, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
            )  # fmt: skip
        with suppress(BrokenPipeError):
            self.process.stdin.write((_MESSAGES if "--ranks" in others else _LONG).encode())  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]

    def others(self) -> list[psutil.Process]:
        """The ranks but the first."""
        found = []
        for process in of_run(self.mark):
            with suppress(psutil.Error):
                if set(_CHILDREN) & set(process.cmdline()) and "mpiexec" not in process.name():
                    found.append(process)
        return found

    def shown(self) -> str:
        return self.out.read_text("utf-8", "replace")

    def wait_for_reply(self) -> float:
        """Seconds until something is shown."""
        began = time.monotonic()
        while not self.shown():
            if self.process.poll() is not None or time.monotonic() - began > 120:
                raise Wrong(f"no reply: {self.err.read_text('utf-8', 'replace')[-500:]}")
            time.sleep(0.02)
        return time.monotonic() - began

    def end(self) -> None:
        """All of it, whatever state it is in."""
        for process in of_run(self.mark):
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()


def check(chat: Chat, killed_at: float) -> tuple[float, int]:
    """Seconds until the line, and messages that were kept. Raises Wrong."""
    while not re.search(f"^{_NAMED}", text := chat.err.read_text("utf-8", "replace"), re.MULTILINE):
        if chat.process.poll() is not None or time.monotonic() > killed_at + LIMIT_S:
            raise Wrong(f"no line within {LIMIT_S:g} s, exit code {chat.process.poll()}: {text[-300:]}")
        time.sleep(0.02)
    took = time.monotonic() - killed_at
    try:
        code = chat.process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        raise Wrong(f"still running {LIMIT_S:g} s after the line") from None
    lines = chat.err.read_text("utf-8", "replace").splitlines()
    if code != 1 or not lines or not re.match(_NAMED, lines[-1]):
        raise Wrong(f"exit code {code}, last line {lines[-1:]}")
    if any("Traceback" in line for line in lines):
        raise Wrong(f"a traceback: {lines[-5:]}")
    until = time.monotonic() + LEFT_S
    while (left := of_run(chat.mark)) and time.monotonic() < until:
        time.sleep(0.05)
    if left:
        raise Wrong(f"left running: {[process.info or process for process in left]}")
    return took, kept(chat, lines[-1])


def kept(chat: Chat, line: str) -> int:
    """Messages in the file that the line names; all that was shown must be among them. Raises Wrong."""
    shown = "".join(chat.shown().split())
    found = re.search(r"/load (\S+)$", line)
    if found is None:
        if shown:
            raise Wrong(f"shown, but not kept: {shown[:80]}; {line}")
        return 0
    messages = json.loads(Path(found[1]).read_text("utf-8", "surrogatepass"))["messages"]
    said = "".join("".join(m["content"].split()) for m in messages if m["role"] == "assistant")
    said = said.encode("utf-8", "replace").decode()
    # A text that the model ends is forgotten where the next one begins.
    is_so = shown.endswith(said) if "the text has ended" in chat.err.read_text("utf-8", "replace") else shown == said
    if not is_so:
        raise Wrong(f"kept is {len(said)} characters, shown {len(shown)}: {said[-40:]!r}, {shown[-40:]!r}")
    return len(messages)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--readers", type=int, default=0, help="in place of ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    others = ["--ranks", str(arguments.ranks)]
    if arguments.readers:
        others = ["--prefill-hosts", f"localhost:{arguments.readers}"]
    rng, wrong, took, counts = random.Random(arguments.seed), [], [], Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.model.resolve() if arguments.model else synthetic(folder)
        first = Chat(model, others, folder)
        try:
            usual_s = first.wait_for_reply()  # kernels are compiled by now
        finally:
            first.end()
        for number in range(arguments.times):
            result = one(Chat(model, others, folder), rng, usual_s)
            print(f"{number + 1}: {shlex.join(map(str, result.values()))}", file=sys.stderr, flush=True)
            counts[result["kind"]] += 1
            (wrong if "wrong" in result else took).append(result)
    seconds = sorted(result["took_s"] for result in took)
    document: dict[str, Any] = {"times": arguments.times, "kinds": counts, "wrong": wrong}
    if seconds:
        document |= {"median_s": seconds[len(seconds) // 2], "slowest_s": seconds[-1]}
        document |= {"with_messages": sum(result["kept"] > 0 for result in took)}
    print(json.dumps(document))
    return int(bool(wrong))


def one(chat: Chat, rng: random.Random, usual_s: float) -> dict[str, Any]:
    """Kill a rank of the chat at some time up to twice what it takes to reply, and check the rest."""
    kind, delay = rng.choice(list(KINDS)), rng.uniform(0, 2 * usual_s)
    until = time.monotonic() + delay
    result: dict[str, Any] = {"kind": kind, "after_s": round(delay, 2)}
    try:
        while time.monotonic() < until or not chat.others():
            if chat.process.poll() is not None:
                raise Wrong(f"ended before it was killed: {chat.err.read_text('utf-8', 'replace')[-300:]}")
            time.sleep(0.01)
        rng.choice(chat.others()).send_signal(KINDS[kind])
        seconds, n_kept = check(chat, time.monotonic())
        return result | {"took_s": round(seconds, 2), "kept": n_kept}
    except (Wrong, psutil.Error, OSError, ValueError) as error:
        return result | {"wrong": f"{type(error).__name__}: {error}"}
    finally:
        chat.end()


if __name__ == "__main__":
    sys.exit(main())
