"""Eight clients of all kinds at a server: nothing breaks, memory stays flat, greedy replies are the command's.

    python scripts/soak_server.py [--minutes 30] [--seed 0] [--model MODEL]

The server is a process of its own, with little room for finished conversations and a folder for more. Clients ask for
greedy replies (whole, streamed, several at once) and compare them with those of `localrun generate`, hang up at random
moments, send broken HTTP, bodies that are none, bodies that are too large, prompts that are too long, or read a stream
slowly or not at all, or want JSON of a random schema. In the end SIGTERM has to end the server.

A line a minute on stderr; the last line of stdout is one JSON document. Exit code 1 if a reply was another one, an
answer had a status that it should not have, the server printed a traceback or did not end well, or its memory was not
flat.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from check_schemas import random_schema
from paths import ROOT
from server_process import ServerProcess

import localrun
from localrun.engine import Engine

CLIENTS = 8
CTX, REPLY_TOKENS = 512, 12
# Between the two likeliest tokens, wherever a prompt is used: how much of it was cached decides which kernels read the
# rest, and keys and values of 16 bits then differ by a rounding, which moves logits by some hundredths.
LEAST_GAP = 0.1
SETTLING = 0.2  # of the time, in which pools fill
MOST_GROWTH = 1.05  # of the least memory in the last third over the least in the first
OPENINGS = ["Once upon a time", "One day", "There was", "In a small house", "Tom and his dog", "The old tree", "A bird"]
ENDINGS = ["there was", "a little girl", "a fox who", "saw a big", "went to", "and the", "said that", "had a red"]
TEXT = "Once upon a time there was a little fox who lived in a dark forest, and every day the fox went for a walk. "


class WrongError(Exception):
    """The server did what it should not."""


def expected_replies(model: str) -> dict[str, str]:
    """Prompts with a greedy reply that no rounding changes, by the library; the first of them by the command, too."""
    found = {}
    with localrun.load(model, threads=2, ctx=CTX, speculative="off") as engine:
        for opening in OPENINGS:
            for ending in ENDINGS:
                prompt = f"{TEXT if len(found) % 2 else ''}{opening} {ending}"
                ids = engine.tokenizer.encode(prompt)
                reply = list(engine.generate(ids, localrun.Sampling(temperature=0), max_tokens=REPLY_TOKENS))
                if _gap(engine, ids, reply) >= LEAST_GAP:
                    found[prompt] = engine.tokenizer.decode(reply)
    first = next(iter(found))
    command = [sys.executable, "-m", "cli.main", "generate", model, "--raw", "-p", first, "--temp", "0", "--json"]
    output = subprocess.run([*command, "-n", str(REPLY_TOKENS)], capture_output=True, text=True, cwd=ROOT, check=True)
    if json.loads(output.stdout)["text"] != found[first]:
        raise SystemExit(f"the command says something else than the library: {output.stdout}")
    return found


def _gap(engine: Engine, ids: list[int], reply: list[int]) -> float:
    """The least distance between the two likeliest tokens on the way."""
    rows = engine.logits([*ids, *reply])[len(ids) - 1 : -1]
    rows.sort(axis=1)
    return float((rows[:, -1] - rows[:, -2]).min(initial=1e9))


class Client:
    """One that does things in random order until the time is over.

    Attributes:
        done: how often each was done, and how often it was refused for want of room.
        fault: what went wrong, in words.
    """

    def __init__(self, server: ServerProcess, expected: dict[str, str], seed: str) -> None:
        self.server, self.expected, self.rng = server, expected, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.fault = ""
        self.things: list[Callable[[], None]] = [
            *[self.whole] * 8, *[self.streamed] * 8, *[self.several] * 2, *[self.hung_up] * 6, *[self.malformed] * 4,
            *[self.held] * 2, self.too_large, self.too_long, self.slow, self.unread, self.broken_http, self.half_a_body,
            self.others,
        ]  # fmt: skip

    def run(self, until: float) -> None:
        """Ends early at a fault."""
        while time.monotonic() < until and not self.fault:
            thing = self.rng.choice(self.things)
            try:
                thing()
                self.done[thing.__name__] += 1
            except (WrongError, OSError, http.client.HTTPException, ValueError) as error:
                self.fault = f"{thing.__name__}: {type(error).__name__}: {error}"

    def asked(self, **settings: Any) -> tuple[str, dict[str, Any]]:
        """A prompt whose reply is known, and the body that asks for it."""
        prompt = self.rng.choice(list(self.expected))
        return prompt, {"prompt": prompt, "temperature": 0, "max_tokens": REPLY_TOKENS, **settings}

    def check(self, prompt: str, text: str) -> None:
        if text != self.expected[prompt]:
            raise WrongError(f"{prompt!r} was answered {text!r}, not {self.expected[prompt]!r}")

    def expect(self, status: int, document: dict[str, Any], *wanted: int) -> bool:
        """Whether there is an answer; False where the queue was full."""
        if status == 429:
            self.done["refused"] += 1
            return False
        if status not in wanted or (status != 200 and "error" not in document):
            raise WrongError(f"status {status}, not {wanted}: {document}")
        return status == 200

    def whole(self) -> None:
        prompt, body = self.asked()
        status, document = self.server.post("/v1/completions", body)
        if self.expect(status, document, 200):
            self.check(prompt, document["choices"][0]["text"])

    def several(self) -> None:
        prompt, body = self.asked(n=self.rng.randrange(2, 17))
        status, document = self.server.post("/v1/completions", body)
        if self.expect(status, document, 200):
            for choice in document["choices"]:
                self.check(prompt, choice["text"])

    def streamed(self) -> None:
        prompt, body = self.asked(stream=True, return_progress=self.rng.random() < 0.5)
        with self.connected(body) as connection:
            data = connection.makefile("rb").read()
        head, _, events = data.partition(b"\r\n\r\n")
        if b" 429 " in head:
            self.done["refused"] += 1
            return
        lines = [line.strip() for line in events.split(b"\n") if line.startswith(b"data: ")]
        if not lines or lines[-1] != b"data: [DONE]":
            raise WrongError(f"a stream ended with {data[-300:]!r}")
        documents = [json.loads(line[6:]) for line in lines[:-1]]
        self.check(prompt, "".join(each["choices"][0]["text"] for each in documents))

    def held(self) -> None:
        """A reply of a schema that nobody else has; it is JSON if it ends by itself."""
        body = {"prompt": TEXT, "temperature": 1.5, "max_tokens": 60, "guided_json": random_schema(self.rng)}
        status, document = self.server.post("/v1/completions", body)
        if self.expect(status, document, 200) and document["choices"][0]["finish_reason"] == "stop":
            json.loads(document["choices"][0]["text"])

    def hung_up(self) -> None:
        """At any moment: before the first token, between two, after the last."""
        _, body = self.asked(stream=self.rng.random() < 0.5, max_tokens=self.rng.randrange(1, 200))
        with self.connected(body) as connection:
            connection.settimeout(self.rng.random())
            try:
                for _ in range(self.rng.randrange(20)):
                    if not connection.recv(self.rng.randrange(1, 2000)):
                        break
            except TimeoutError:
                pass

    def malformed(self) -> None:
        rng = self.rng
        data = rng.choice((
            b"", b"{", rng.randbytes(rng.randrange(1, 1000)), b"[" * rng.randrange(1, 100_000), b'{"prompt": NaN}',
            b'{"prompt": "a", "foo": 1}', b'{"prompt": [[]]}', b'{"prompt": "a", "max_tokens": -1}',
            b'{"prompt": [99999999]}', b'{"prompt": "a", "temperature": "hot"}', b'{"messages": [{"role": 1}]}',
        ))  # fmt: skip
        path = rng.choice(("/v1/completions", "/v1/chat/completions", "/tokenize", "/apply-template"))
        self.expect(*self.sent(path, data), 400)

    def sent(self, path: str, data: bytes) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(self.server.host, self.server.port, timeout=120)
        try:
            connection.request("POST", path, data, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def too_large(self) -> None:
        """A body that says so, and one that does not: the server may close before all of it is sent."""
        with socket.create_connection((self.server.host, self.server.port), 120) as connection:
            announced = self.rng.random() < 0.5
            length = b"content-length: 80000000" if announced else b"transfer-encoding: chunked"
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + length + b"\r\n\r\n")
            chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
            try:
                for _ in range(0 if announced else 80):
                    connection.sendall(chunk)
                head = connection.recv(1000)
            except OSError:
                return
            if head and b" 413 " not in head:
                raise WrongError(f"a body of 80 MB was answered {head!r}")

    def too_long(self) -> None:
        status, document = self.server.post("/v1/completions", {"prompt": TEXT * self.rng.randrange(50, 3000)})
        self.expect(status, document, 400)
        if f"the context holds {CTX}" not in document["error"]["message"]:
            raise WrongError(f"too long a prompt was answered {document}")

    def slow(self) -> None:
        """Reads a few bytes at a time."""
        _, body = self.asked(stream=True, max_tokens=300)
        with self.connected(body) as connection:
            for _ in range(self.rng.randrange(100)):
                if not connection.recv(10):
                    break
                time.sleep(0.02)

    def unread(self) -> None:
        """Reads nothing."""
        _, body = self.asked(stream=True, max_tokens=300)
        with self.connected(body):
            time.sleep(2 * self.rng.random())

    def half_a_body(self) -> None:
        with socket.create_connection((self.server.host, self.server.port), 120) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
            time.sleep(self.rng.random())

    def broken_http(self) -> None:
        with socket.create_connection((self.server.host, self.server.port), 120) as connection:
            connection.sendall(self.rng.randbytes(self.rng.randrange(1, 500)) + b"\r\n\r\n")
            connection.settimeout(1)
            with suppress(OSError):
                connection.recv(1000)

    def others(self) -> None:
        """What is asked of the server besides; a prompt that nobody else has."""
        connection = http.client.HTTPConnection(self.server.host, self.server.port, timeout=120)
        try:
            for path in ("/health", "/metrics", "/v1/models"):
                connection.request("GET", path)
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    raise WrongError(f"{path}: status {answer.status}")
        finally:
            connection.close()
        words = [self.rng.choice(TEXT.split()) for _ in range(self.rng.randrange(1, 200))]
        body = {"prompt": " ".join(words), "temperature": 1.5, "seed": 1, "max_tokens": 10}
        self.expect(*self.server.post("/v1/completions", body), 200)

    def connected(self, body: dict[str, Any]) -> socket.socket:
        """A connection on which this is asked, and nothing after it."""
        data = json.dumps(body).encode()
        connection = socket.create_connection((self.server.host, self.server.port), 120)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n"
        connection.sendall(head.encode() + b"connection: close\r\n\r\n" + data)
        return connection


def flatness(samples: list[float]) -> dict[str, float | bool]:
    """The least of the first and of the last third of what counts, in MB, and whether that is flat."""
    samples = samples[int(len(samples) * SETTLING) :]
    third = max(1, len(samples) // 3)
    first, last = min(samples[:third]), min(samples[-third:])
    figures = {"first": round(first, 1), "last": round(last, 1), "highest": round(max(samples), 1)}
    return figures | {"flat": last <= MOST_GROWTH * first}


def run(minutes: float, seed: int, model: str) -> dict[str, Any]:
    """Everything, until the time is over."""
    expected = expected_replies(model)
    samples: list[float] = []
    with tempfile.TemporaryDirectory(prefix="soak-server-") as folder:
        room = ["--cache-ram", "0.02", "--cache-dir", folder, "--cache-disk", "0.05"]
        server = ServerProcess(model, "-c", str(CTX), "-t", "2", "--speculative", "off", "--slots", "4", *room)
        until = time.monotonic() + 60 * minutes
        clients = [Client(server, expected, f"{seed} {index}") for index in range(CLIENTS)]
        threads = [threading.Thread(target=client.run, args=(until,)) for client in clients]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            samples.append(server.rss_mb())
            if len(samples) % 60 == 0:
                done = sum((client.done for client in clients), Counter())
                print(
                    f"{len(samples) // 60:5} min, {done.total()} done: {samples[-1]:.0f} MB",
                    file=sys.stderr,
                    flush=True,
                )
        status = server.stop()
    done = sum((client.done for client in clients), Counter())
    faults = [client.fault for client in clients if client.fault]
    faults += [line for line in server.lines if "Traceback" in line or "Error" in line or "dropped" in line]
    memory = flatness(samples)
    return {
        **{"minutes": minutes, "seed": seed, "prompts": len(expected), "done": dict(sorted(done.items()))},
        **{"said": server.lines[-40:] if faults else [], "rss_mb": memory, "exit_status": status, "faults": faults},
        "good": status == 0 and not faults and memory["flat"],
    }


def main() -> None:
    """Run, print the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="miniature")
    arguments = parser.parse_args()
    document = run(arguments.minutes, arguments.seed, arguments.model)
    print(json.dumps(document))
    sys.exit(not document["good"])


if __name__ == "__main__":
    main()
