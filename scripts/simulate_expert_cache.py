"""How often an expert would be found in VRAM: a cache of N slots a layer, by policy, on real routing.

    python scripts/simulate_expert_cache.py [MODEL] [--text FILE ...] [--tokens 2048] [--slots 1/8 1/4 1/2]
    python scripts/simulate_expert_cache.py --counts COUNTS.json

MODEL's router chooses for --tokens tokens of each text, in the order given, as if one conversation turned from one to
the next; how often each expert is used is taken from the first text, and what is reported from those after it. Or
COUNTS, {"counts": {text: [[tokens of each expert] of each layer]}}, from which tokens are drawn independently: nothing
of what makes one token's experts those of the one before is in them, so that caches look worse than they are.

Policies: static, the most used of the first text; lru, each missed expert replaces the one that was used least
recently; admitted, lru by localrun's own policy (localrun/gpu/experts/policy.py), which starts from the static ones and
is given its copies before the next token. A table goes to stderr; the last line of stdout is one JSON document. For
each text, policy and number of slots: hits, the part of the choices that were found; copies, of experts, for each
choice; traffic, what a token's experts cost the host's memory beside no cache at all, 1 - hits + 3 copies.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from localrun.bundled import model_path
from localrun.errors import LocalrunError
from localrun.gpu.experts.policy import COPY_COST, Policy

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["docs/speculative.md", "README.md", "localrun/engine.py", "docs/architecture.md"]  # prose, tables, code
SLOTS = ["1/8", "1/4", "1/2"]


@dataclass(frozen=True)
class Routing:
    """Each text's choices, int (T, L, K) by name in order, of n_experts."""

    n_experts: int
    choices: dict[str, np.ndarray]


@dataclass(frozen=True)
class Result:
    """Of one text: see the file's top."""

    text: str
    policy: str
    slots: int
    n_experts: int
    hits: float
    copies: float
    traffic: float


def of_model(model: str | None, texts: list[Path], n_tokens: int) -> Routing:
    """What a model's router chooses, in chunks of 512 tokens that see nothing before them."""
    import localrun
    from localrun.cpu.weights import LayerWeights
    from localrun.limits import PREFILL_CHUNK
    from localrun.network.model import Network
    from quant.threads.pool import Pool

    noted: list[np.ndarray] = []

    class Noting(LayerWeights):
        def choose_experts(self, logits, bias, config):
            ids_TK, weights_TK = LayerWeights.choose_experts(logits, bias, config)
            noted.append(ids_TK.numpy().copy())
            return ids_TK, weights_TK

    choices = {}
    with localrun.load(model_path(model), ctx=PREFILL_CHUNK) as engine, closing(Pool(engine.threads)) as pool:
        if not engine.config.n_routed_experts:
            raise LocalrunError(f"{engine.file.path}: a model without experts has no routing")
        network = Network(engine.config, Noting(engine.file, pool))
        for text in texts:
            ids = engine.tokenizer.encode(text.read_text(encoding="utf-8"))[:n_tokens]
            chunks = []
            for first in range(0, len(ids), PREFILL_CHUNK):
                noted.clear()
                with pool.passive_wait():
                    chunk = ids[first : first + PREFILL_CHUNK]
                    network.forward(chunk, engine.new_cache())
                chunks.append(np.stack(noted, axis=1))
            choices[text.name] = np.concatenate(chunks)
        return Routing(engine.config.n_routed_experts, choices)


def of_counts(path: Path, n_tokens: int, top_k: int) -> Routing:
    """Tokens drawn from counts, K different experts each: the K largest of log(count) + Gumbel noise."""
    counts = json.loads(path.read_text())["counts"]
    rng, choices = np.random.default_rng(0), {}
    for text, counts_LE in counts.items():
        shares_LE = np.log(np.maximum(counts_LE, 1e-9))
        noisy = shares_LE + rng.gumbel(size=(n_tokens, *shares_LE.shape))
        choices[text] = np.argsort(-noisy, axis=-1)[..., :top_k]
    return Routing(len(counts_LE[0]), choices)


def shares(choices_TLK: np.ndarray, n_experts: int) -> np.ndarray:
    """(L, E): the part of the tokens that chose each expert."""
    return (choices_TLK[..., None] == np.arange(n_experts)).any(2).mean(0)


def static(choices_TLK: np.ndarray, held_LN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hits and copies of each token, of L * K choices."""
    hits = (choices_TLK[..., None] == held_LN[:, None]).any(-1).sum((1, 2))
    return hits, np.zeros_like(hits)


def lru(choices_TLK: np.ndarray, held_LN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of a cache to which every missed expert comes."""
    caches = [OrderedDict.fromkeys(layer[::-1].tolist()) for layer in held_LN]
    hits = []
    for choices_LK in choices_TLK.tolist():
        found = 0
        for cache, choices_K in zip(caches, choices_LK, strict=True):
            found += sum(expert in cache for expert in choices_K)
            for expert in choices_K:
                if expert not in cache:
                    cache.popitem(last=False)
                    cache[expert] = None
                cache.move_to_end(expert)
        hits.append(found)
    return np.array(hits), choices_TLK[0].size - np.array(hits)


def admitted(choices_TLK: np.ndarray, held_LN: np.ndarray, policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """The same by localrun's policy."""
    n_layers = held_LN.shape[0]
    layers, hits, copies = np.arange(n_layers)[:, None], [], []
    for choices_LK in choices_TLK:
        table_LE = policy.table()
        hits.append(np.count_nonzero(table_LE[layers, choices_LK] >= 0))
        chosen_LE = np.zeros(table_LE.shape)
        chosen_LE[layers, choices_LK] = 1
        policy.observe(chosen_LE, 1)
        swaps = policy.swaps(n_layers)
        for swap in swaps:
            policy.finish(swap, arrived=True)
        copies.append(len(swaps))
    return np.array(hits), np.array(copies)


def simulate(routing: Routing, n_slots: int) -> Iterator[Result]:
    """All policies over all texts but the first, one after the other, from the first's most used experts."""
    first, *rest = routing.choices
    used_LE = shares(routing.choices[first], routing.n_experts)
    held_LN = np.argsort(-used_LE, axis=1, kind="stable")[:, :n_slots]
    choices_TLK = np.concatenate([routing.choices[text] for text in rest])
    ends = np.cumsum([len(routing.choices[text]) for text in rest])[:-1]
    n_choices = choices_TLK[0].size
    runs = {
        "static": static(choices_TLK, held_LN),
        "lru": lru(choices_TLK, held_LN),
        "admitted": admitted(choices_TLK, held_LN, Policy(routing.n_experts, held_LN)),
    }
    for policy, (hits_T, copies_T) in runs.items():
        for text, hits, copies in zip(rest, np.split(hits_T, ends), np.split(copies_T, ends), strict=True):
            hit, copied = hits.mean() / n_choices, copies.mean() / n_choices
            traffic = 1 - hit + COPY_COST * copied
            figures = (round(float(figure), 4) for figure in (hit, copied, traffic))
            yield Result(text, policy, n_slots, routing.n_experts, *figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a GGUF with experts; the bundled miniature without")
    parser.add_argument("--text", nargs="+", type=Path, default=[ROOT / name for name in TEXTS])
    parser.add_argument("--counts", type=Path, help="in place of a model")
    parser.add_argument("--top-k", type=int, default=8, help="experts a token, with --counts")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text at most")
    parser.add_argument("--slots", nargs="+", type=Fraction, default=[Fraction(part) for part in SLOTS])
    arguments = parser.parse_args()
    try:
        if arguments.counts:
            routing = of_counts(arguments.counts, arguments.tokens, arguments.top_k)
        else:
            routing = of_model(arguments.model, arguments.text, arguments.tokens)
    except (LocalrunError, OSError) as error:
        sys.exit(str(error))
    slots = [max(1, int(part * routing.n_experts)) for part in arguments.slots]
    results = [result for n_slots in slots for result in simulate(routing, n_slots)]
    print(f"{'text':24} {'slots':>9} {'policy':9} {'hits':>6} {'copies':>7} {'traffic':>8}", file=sys.stderr)
    for row in sorted(results, key=lambda row: (row.text, row.slots)):
        where = f"{row.slots} of {row.n_experts}"
        print(
            f"{row.text:24} {where:>9} {row.policy:9} {row.hits:6.1%} {row.copies:7.4f} {row.traffic:8.2f}",
            file=sys.stderr,
        )
    print(json.dumps({"copy_cost": COPY_COST, "results": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
