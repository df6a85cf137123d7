"""What an agent's conversation costs: prompt tokens that the server computes, of all that it is sent.

    python scripts/replay_agent.py [--turns 30] [--system 8000] [--tokens 20000] [--model MODEL] [--ctx 24576]

A prompt with a long system text (tools and rules) grows turn by turn to --tokens. After a third and after two thirds of
the turns a sub-agent begins: the same system text, another task, five turns of its own. Every prompt is sent whole, as
agents do. Once with one server, once with a server that is stopped and started again in the middle and has
--cache-dir. The bundled miniature is good enough: its replies mean nothing at such lengths, but its tokens do.

new_tokens are those that no prompt or reply before had: fewer cannot be computed, and in short conversations they are
more than 5%. A line for each on stderr; the last line of stdout is one JSON document. Exit code 1 if less than 95% of
the prompts' tokens were reused in either, or the replies differ.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from server_process import ServerProcess

LEAST_SHARE = 0.95
SUB_TURNS = 5
REPLY_TOKENS = 24
TEXT = "the fox ran to a tall tree and saw some water near her house while two birds sang of long days in spring"
WORDS = TEXT.split()


@dataclass
class Conversation:
    """A text that grows."""

    text: str
    rng: random.Random
    tokens_a_turn: int
    n_known: int  # tokens at its beginning that some prompt or reply has had

    def next_prompt(self, tokens_a_word: float) -> str:
        """The text with what the user, or a tool, says next."""
        self.text += f"\nUser: {some_text(self.rng, self.tokens_a_turn, tokens_a_word)}\nAssistant:"
        return self.text


def some_text(rng: random.Random, n_tokens: int, tokens_a_word: float) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(max(1, int(n_tokens / tokens_a_word))))


def turns(arguments: argparse.Namespace, tokens_a_word: float) -> Iterator[Conversation]:
    """Whose turn it is: the agent's, and now and then five times a sub-agent's."""
    system = some_text(random.Random(0), arguments.system, tokens_a_word)
    a_turn = (arguments.tokens - arguments.system) // arguments.turns - REPLY_TOKENS
    agent = Conversation(system, random.Random(1), a_turn, 0)
    for turn in range(arguments.turns):
        yield agent
        if turn + 1 in (arguments.turns // 3, 2 * arguments.turns // 3):
            sub_agent = Conversation(system, random.Random(2 + turn), a_turn, arguments.system)
            yield from [sub_agent] * SUB_TURNS


def replay(arguments: argparse.Namespace, restarts: bool) -> dict[str, Any]:
    """All turns, one after the other."""
    options = ["-c", str(arguments.ctx), "--speculative", "off", "--slots", "2"]
    started, said, sent, new, computed, longest = time.perf_counter(), [], 0, 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        if restarts:
            options += ["--cache-dir", folder]
        server = ServerProcess(arguments.model, *options)
        try:
            tokens_a_word = len(server.post("/tokenize", {"content": TEXT})[1]["tokens"]) / len(WORDS)
            order = list(turns(arguments, tokens_a_word))
            for index, conversation in enumerate(order):
                if restarts and index == len(order) // 2:
                    assert server.stop() == 0
                    server = ServerProcess(arguments.model, *options)
                prompt = conversation.next_prompt(tokens_a_word)
                body = {"prompt": prompt, "temperature": 0, "max_tokens": REPLY_TOKENS}
                status, answer = server.post("/v1/completions", body)
                if status != 200:
                    raise SystemExit(f"{status}: {answer}")
                conversation.text += answer["choices"][0]["text"]
                said.append(answer["choices"][0]["text"])
                usage = answer["usage"]
                sent += usage["prompt_tokens"]
                new += usage["prompt_tokens"] - conversation.n_known
                conversation.n_known = usage["total_tokens"]
                computed += usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
                longest = max(longest, usage["prompt_tokens"])
        finally:
            server.stop()
    found = {
        **{"prompts": len(said), "longest": longest, "prompt_tokens": sent},
        **{"new_tokens": new, "computed_tokens": computed},
        **{"reused": round(1 - computed / sent, 4), "seconds": round(time.perf_counter() - started, 1)},
    }
    print(f"{'with' if restarts else 'without'} a restart: {found}", file=sys.stderr, flush=True)
    return found | {"said": said}


def main() -> None:
    """Both, and the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="miniature")
    for name, usual in (("turns", 30), ("system", 8000), ("tokens", 20_000), ("ctx", 24_576)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    arguments = parser.parse_args()
    runs = [replay(arguments, restarts) for restarts in (False, True)]
    said = [run.pop("said") for run in runs]
    is_good = said[0] == said[1] and all(run["reused"] >= LEAST_SHARE for run in runs)
    document = {"without_restart": runs[0], "with_restart": runs[1], "equal_replies": said[0] == said[1]}
    print(json.dumps(document | {"good": is_good}))
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
