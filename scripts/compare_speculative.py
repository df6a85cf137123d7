"""What drafts cost and bring, against plain decoding in the same run.

    python scripts/compare_speculative.py forced MODEL        # drafts that come true as often as one likes
    python scripts/compare_speculative.py edit [MODEL]        # n-grams of a text to be repeated with a small change
    python scripts/compare_speculative.py text MODEL -f FILE  # the model's own drafts, after beginnings of paragraphs

`forced` times steps of 1 to 5 tokens, then replies with 1 to 4 drafts and with "auto" at several acceptances, beside
what (1 + a + a^2 + ...) / (cost of the step) predicts. `text` counts how many of the greedy replies are those without
drafts. Runs with drafts and without take turns. The last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import localrun
from localrun.bundled import model_path
from localrun.engine import Engine
from localrun.generate.sampling import Sampling
from localrun.generate.session import Session, Stats
from localrun.generate.speculative import Speculation
from localrun.measure import bench
from localrun.text.prompt import chat_ids

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from forced_draft import ForcedDraft

SETTINGS = (1, 2, 3, 4, "auto")
GREEDY = Sampling(temperature=0.0)
PROMPT = 16  # random tokens before a forced reply

STORY = """\
Tom lived in a small house at the edge of the forest with his grandmother. Every morning he fed the chickens, fetched
water from the well and swept the path that led to the garden gate. One day in early spring he found a wooden box under
the old apple tree. The box was locked, and there was no key anywhere. Tom carried it into the kitchen and put it on the
table. His grandmother looked at it for a long time. She said that it had belonged to a sailor who had come through the
village many years ago, on his way to the mountains. He had promised to return before winter, but nobody ever saw him
again. In the afternoon Tom walked to the village to ask the blacksmith for help. The blacksmith was a tall man with a
grey beard and hands as big as shovels. He turned the box around, knocked on its sides and listened. Then he took a thin
piece of wire from the wall, pushed it into the lock and moved it slowly to the left. The lock opened with a click.
Inside the box lay a map, a silver whistle and a letter. The letter said that whoever found the box should follow the
map to the lake behind the mountains, and blow the whistle three times at sunrise. Tom ran home as fast as he could. His
grandmother packed bread, cheese and a warm coat, and told him to be careful near the water. He left before the stars
were gone. After two days he came to the lake. The water was as smooth as glass, and there was mist between the reeds.
When the sun came up, he blew the whistle three times, and from the mist came a small white boat without anybody in it.
Tom stepped into the boat, sat down and waited. Slowly the boat turned around and carried him across the lake, to a
green island that was not on any map."""
EDIT = "Repeat the following text word by word, but write Anna in place of grandmother.\n\n" + STORY


@dataclass
class Run:
    """A reply, and the seconds of each step that was taken for it (sampling included)."""

    reply: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)

    def seconds(self) -> float:
        """Of all steps; one that was held up, 5 times as long as most, counts as most do."""
        typical = statistics.median(self.steps)
        return sum(step if step < 5 * typical else typical for step in self.steps)


def in_turn(sessions: dict[str, Session], ids: list[int], n: int, sampling: Sampling) -> dict[str, Run]:
    """Replies of all sessions, step by step in turns of random order.

    So what else the machine does, and what the step before left in the caches, slows all of them alike.
    """
    random = np.random.default_rng(0)
    runs = {name: Run() for name in sessions}
    for session in sessions.values():
        session.stats = Stats()
    replies = {name: session.tokens(ids, sampling, max_tokens=n) for name, session in sessions.items()}
    while replies:
        for name in random.permutation(list(replies)).tolist():
            stats, run = sessions[name].stats, runs[name]
            n_steps, seconds = stats.steps, stats.decode_s
            for token in replies[name]:
                run.reply.append(token)
                stats = sessions[name].stats
                if stats.steps > n_steps:
                    run.steps.append(stats.decode_s - seconds)
                    break
                if run.steps:
                    run.steps[-1] += stats.decode_s - seconds
                seconds = stats.decode_s
            else:
                run.stats = sessions[name].stats
                del replies[name]
    return runs


def summary(runs: dict[str, Run], plain: str = "off") -> dict[str, dict]:
    """Rates, speed-ups over plain decoding and acceptance, by name."""
    rates = {name: (len(run.reply) - 1) / run.seconds() for name, run in runs.items()}
    return {
        name: {
            "tokens_per_s": round(rates[name], 3),
            "speed_up": round(rates[name] / rates[plain], 3),
            "drafted": run.stats.drafted_tokens,
            "accepted": run.stats.accepted_tokens,
            "tokens_per_step": round(run.stats.tokens_per_step, 3),
            "same_reply": run.reply == runs[plain].reply,
        }
        for name, run in runs.items()
    }


def step_costs(engine: Engine, ids: list[int], rounds: int) -> list[float]:
    """Median seconds of steps of 1 to 5 tokens after PROMPT others."""
    cache, seconds = engine.new_cache(), [[] for _ in range(5)]
    engine.model.forward(ids[:PROMPT], cache)
    for turn in range(rounds + 1):  # the first meets cold weights
        for n in range(1, 6):
            start = PROMPT + 5 * turn % (len(ids) - PROMPT - 5)
            started = time.perf_counter()
            engine.model.forward(ids[start : start + n], cache, all_logits=n > 1)
            if turn:
                seconds[n - 1].append(time.perf_counter() - started)
            cache.truncate(PROMPT)
    return [statistics.median(each) for each in seconds]


def forced(engine: Engine, arguments: argparse.Namespace) -> dict:
    """The curve of speed-up over acceptance, and what auto makes of it."""
    n_vocab = engine.model.vocab_size
    ids = np.random.default_rng(0).integers(0, n_vocab, PROMPT).tolist()
    sampling = Sampling(
        temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=0
    )  # as varied as text, unlike a greedy loop
    truth = [*ids, *engine.session("off").tokens(ids, sampling, max_tokens=arguments.n)]
    costs = step_costs(engine, truth, arguments.rounds)
    ratios = [cost / costs[0] for cost in costs]
    print("step of 1 to 5 tokens, ms:", *(f"{1e3 * cost:.2f}" for cost in costs), "ratios:", *np.round(ratios, 3))
    rows = {}
    for acceptance in arguments.acceptance:
        sessions = {"off": engine.session("off")}
        for setting in arguments.settings:
            draft = ForcedDraft(truth, acceptance, n_vocab)
            sessions[str(setting)] = Session(engine, Speculation(draft, setting))
        rows[acceptance] = summary(in_turn(sessions, ids, arguments.n, sampling))
        for k in range(1, 5):
            if str(k) in rows[acceptance]:
                predicted = sum(acceptance**i for i in range(k + 1)) / ratios[k]
                rows[acceptance][str(k)]["predicted"] = round(predicted, 3)
        print(acceptance, {name: (row["speed_up"], row.get("predicted")) for name, row in rows[acceptance].items()})
    return {"step_s": costs, "cost_ratios": [round(ratio, 3) for ratio in ratios], "by_acceptance": rows}


def edit(engine: Engine, arguments: argparse.Namespace) -> dict:
    """Repeating a text of some 300 words with one word changed."""
    assert engine.template is not None
    ids = chat_ids(engine.template, engine.tokenizer, [{"role": "user", "content": EDIT}])
    sessions = {str(setting): engine.session(setting) for setting in ("off", *arguments.settings)}
    runs = in_turn(sessions, ids, arguments.n, GREEDY)
    print(engine.tokenizer.decode(runs["off"].reply))
    rows = summary(runs)
    for name, row in rows.items():
        print(name, row)
    return {"prompt_tokens": len(ids), "words": len(STORY.split()), "runs": rows}


def text(engine: Engine, arguments: argparse.Namespace) -> dict:
    """Greedy replies to the beginnings of paragraphs."""
    paragraphs = [part for part in Path(arguments.file).read_text(encoding="utf-8").split("\n\n") if len(part) > 200]
    prompts = [engine.tokenizer.encode(part[:120]) for part in paragraphs[: arguments.prompts]]
    sessions = {str(setting): engine.session(setting) for setting in ("off", *arguments.settings)}
    totals, equal = {name: Run() for name in sessions}, dict.fromkeys(sessions, 0)
    for ids in prompts:
        runs = in_turn(sessions, ids, arguments.n, GREEDY)
        for name, run in runs.items():
            total = totals[name]
            total.reply += run.reply[1:]
            total.steps += run.steps
            for count in ("steps", "drafted_tokens", "accepted_tokens"):
                setattr(total.stats, count, getattr(total.stats, count) + getattr(run.stats, count))
            equal[name] += run.reply == runs["off"].reply
    plain_rate = len(totals["off"].reply) / totals["off"].seconds()
    rows = {}
    for name, total in totals.items():
        stats, rate = total.stats, len(total.reply) / total.seconds()
        rows[name] = {
            "tokens_per_s": round(rate, 2),
            "speed_up": round(rate / plain_rate, 3),
            "drafted": stats.drafted_tokens,
            "acceptance": round(stats.accepted_tokens / stats.drafted_tokens, 4) if stats.drafted_tokens else None,
            "tokens_per_step": round(stats.tokens_per_step, 3),
            "equal_replies": equal[name],
        }
        print(name, rows[name])
    draft = engine.session(1).speculation.draft.name
    return {"prompts": len(prompts), "reply_tokens": arguments.n, "draft": draft, "runs": rows}


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("forced", "edit", "text"))
    parser.add_argument("model", nargs="?", default="smollm2", help="a GGUF file; the bundled SmolLM2 if not given")
    parser.add_argument("-f", "--file", help="text in paragraphs, for `text`")
    parser.add_argument("-n", type=int, default=64, help="tokens of each reply")
    parser.add_argument("-r", "--rounds", type=int, default=15, help="how often steps are timed")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--acceptance", type=float, nargs="*", default=[0.0, 0.5, 0.85, 1.0])
    parser.add_argument("--settings", nargs="*", default=SETTINGS, type=lambda s: s if s == "auto" else int(s))
    arguments = parser.parse_args()
    with localrun.load(model_path(arguments.model), threads=arguments.threads, ctx=2048) as engine:
        measure = {"forced": forced, "edit": edit, "text": text}[arguments.what]
        document = {"what": arguments.what} | engine.describe() | measure(engine, arguments)
    print(json.dumps(document | {"machine": bench.machine(), "versions": bench.versions()}))


if __name__ == "__main__":
    main()
