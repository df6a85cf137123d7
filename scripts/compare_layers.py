"""Where the decode step leaves the torch network: layer by layer and phase by phase, for the last tokens of a prompt.

    python scripts/compare_layers.py MODEL -p TEXT [--source CHECKPOINT]

Every layer of the network starts from what the step has at that layer, with the same rows in its cache, so that errors
do not add up: the first phase that leaves the tolerance is the one to look at. --source compares the sums after each
layer, of the step and of the network by itself, with those of transformers for the checkpoint that MODEL was made of.
An error is the largest difference of the largest magnitude; of rows that an indexer has chosen, the part of them that
the other one has not. A table goes to stderr; the last line of stdout is one JSON document. Exit 1 if something leaves
its tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import localrun
from localrun.bundled import model_path
from localrun.cpu.bridge import Experts, HeadLinear, Linear
from localrun.cpu.compressed import decode_step
from localrun.cpu.weights import LayerWeights
from localrun.engine import Engine
from localrun.models import names
from localrun.models.config import Config
from localrun.models.tensors import GGUFTensors
from localrun.network.cache import Cache, new_cache
from localrun.network.hyper import Return
from localrun.network.model import HyperLayer, Network
from localrun.network.weight_source import Seen, Turned
from quant.decode.attention import PARTIAL, VALUES_AT
from quant.decode.program import MAX_SPLITS, MOST_TOKENS, most_splits
from quant.threads.pool import Pool

# An input whose rounding to 8 bits tips the other way changes a sum of some hundred terms by a 127th of one: below
# 0.5% of the largest where measured, a few times over within a layer. A wrong sign or scale is tens of percent.
TOLERANCE = 0.02
SOURCE_TOLERANCE = 0.2  # weights of 4 bits, over all layers

# What the vectors that a phase writes are in the network: outputs of modules.
MODULES = {
    "q_a": "self_attn.q_a_proj", "kv": "self_attn.kv_a_proj_with_mqa", "keys": "self_attn.k_proj",
    "values": "self_attn.v_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "router": "mlp.gate",
    "shared gate": "mlp.shared_experts.gate_proj", "shared up": "mlp.shared_experts.up_proj",
    "indexer's keys": "self_attn.indexer.wk", "indexer's weights": "self_attn.indexer.weights_proj",
    "indexer's queries": "self_attn.indexer.wq_b",
}  # fmt: skip
_INDEXER = "self_attn.compressor.indexer"
COMPRESSED_MODULES = MODULES | {
    "kv": "self_attn.kv_proj", "vectors": "self_attn.compressor.kv_proj", "gates": "self_attn.compressor.gate_proj",
    "index vectors": f"{_INDEXER}.kv_proj", "index gates": f"{_INDEXER}.gate_proj",
    "indexer's weights": f"{_INDEXER}.weights_proj", "indexer's queries": f"{_INDEXER}.q_b_proj",
    "output_a": "self_attn.o_a_proj",
}  # fmt: skip
STREAMS, CHOSEN = "stream products", "chosen rows"


class _Watched:
    """A module of the network that notes what it gives. may_expand: attention is to call it, not its matrices."""

    may_expand = False

    def __init__(self, module: Linear | HeadLinear, note: Callable[[torch.Tensor], None]):
        self._module, self._note = module, note

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self._module(x)
        self._note(out)
        return out

    def transposed(self, x: torch.Tensor) -> torch.Tensor:
        return self._module.transposed(x)


class WatchedWeights(LayerWeights):
    """A model's modules; `seen` has what they gave last, by their names, float32 (T, n)."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.seen: dict[str, np.ndarray] = {}
        self._attend, self.attend = self.attend, self._watched_attend
        self._attend_chosen, self.attend_chosen = self.attend_chosen, self._watched_attend_chosen

    def note(self, name: str, x: torch.Tensor) -> None:
        self.seen[name] = x.flatten(1).numpy().copy()

    def linear(self, name: str) -> _Watched:
        return _Watched(super().linear(name), lambda out: self.note(name, out))

    def heads(self, name: str, n_groups: int | None = None) -> _Watched:
        noted = "heads' values" if n_groups is None else name  # of v_b, the last to be called
        return _Watched(super().heads(name, n_groups), lambda out: self.note(noted, out))

    def split_heads(self, *arguments: Any) -> tuple[_Watched, _Watched]:
        first, last = super().split_heads(*arguments)
        return _Watched(first, lambda out: None), _Watched(last, lambda out: self.note("heads' values", out))

    def joined_mlp(self, *names: str) -> None:
        return None

    def _watched_attend(
        self,
        parts: list,
        v: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        window: int = 0,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.note("queries", torch.cat([q for q, _ in parts], -1) * scale)
        parts = [(q, k.float()) for q, k in parts]  # in float32, of a 16-bit cache as well
        self._attend(parts, v.float(), scale, out, window, sinks)
        self.note("attended", out)
        self.note("heads' values", out)

    def _watched_attend_chosen(
        self,
        parts: list,
        seen: Seen,
        scale: float,
        out: torch.Tensor,
        sinks: torch.Tensor | None = None,
        turned: Turned | None = None,
    ) -> None:
        queries = torch.cat(parts, -1)
        if turned is not None:
            queries = torch.rms_norm(queries, queries.shape[-1:], None, turned.epsilon)
            queries = _turned(queries, turned.turns)
        self.note("queries", queries * scale)
        if seen.chosen_TK is not None:
            self.seen[CHOSEN] = seen.chosen_TK.numpy().copy()
        seen = replace(seen, **{part: _in_f32(getattr(seen, part)) for part in ("keys_SW", "window_SW")})
        self._attend_chosen(parts, seen, scale, out, sinks, turned)
        # Values are keys: what is turned back comes behind what the step's splits hold.
        self.note("attended", out if turned is None else _turned(out, turned.turns))
        self.note("heads' values", out)

    def experts(self, index: int) -> WatchedExperts:
        return WatchedExperts(super().experts(index), self.note)


class WatchedExperts:
    """Routed experts that note what gate and up give, in the router's order."""

    def __init__(self, module: Experts, note: Callable[[str, torch.Tensor], None]):
        self._module, self._note = module, note

    def begin(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Callable[[], torch.Tensor]:
        experts = self._module.experts
        for part, biases in zip(("gate", "up"), experts.biases or (None, None), strict=False):
            matrix = getattr(experts, part)
            rows = [
                Linear(self._module.pool, replace(matrix, address=matrix.address + matrix.group_bytes * e, n_groups=1))
                for e in ids.flatten().tolist()
            ]
            inputs = x.repeat_interleave(ids.shape[1], 0)
            outs = torch.cat([linear(row[None]) for linear, row in zip(rows, inputs, strict=True)])
            outs = outs if biases is None else outs + torch.from_numpy(biases)[ids.flatten()]
            self._note(f"experts' {part}", outs.unflatten(0, ids.shape))
        return self._module.begin(x, ids, weights)


def _in_f32(rows: torch.Tensor | None) -> torch.Tensor | None:
    return None if rows is None else rows.float()


def _turned(x_THd: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """The last values of each head turned, pair by pair."""
    rope_dim = 2 * turns.shape[-1]
    pairs = torch.view_as_complex(x_THd[..., -rope_dim:].unflatten(-1, (-1, 2)).contiguous())
    return torch.cat([x_THd[..., :-rope_dim], torch.view_as_real(pairs * turns).flatten(-2)], -1)


def chosen_error(found: np.ndarray, expected: np.ndarray | None, n_seen: list[int]) -> float:
    """Which part of a token's rows the other one has not chosen, of the worst token; n_seen: rows that each has seen.

    0 where tokens see no more rows than are chosen.
    """
    parts = [0.0]
    for t, n in enumerate(n_seen):
        if expected is not None and n > (top_k := expected.shape[1]):
            parts.append(len(set(found[t, :top_k].tolist()) - set(expected[t].tolist())) / top_k)
    return max(parts)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, of the largest magnitude; infinite if something is no number."""
    difference = float(np.abs(found - expected).max()) / max(float(np.abs(expected).max()), 1e-30)
    return difference if np.isfinite(difference) else float("inf")


def _combined(partials: np.ndarray, n_heads: int, n_seen: list[int], sinks: np.ndarray | None) -> np.ndarray:
    """float32 (T, H * width): attention's results of all splits, put together. n_seen: rows, of each token."""
    partials = partials.reshape(len(partials), MAX_SPLITS, n_heads, -1)
    largest, sums = partials[..., PARTIAL.offset("maximum") // 4], partials[..., PARTIAL.offset("sum") // 4]
    values, out = partials[..., VALUES_AT // 4 :], []
    for t in range(len(partials)):
        used = slice(0, most_splits(n_seen[t]))
        most = largest[t, used].max(0)
        weights = np.exp(largest[t, used] - most)
        total = np.sum(weights * sums[t, used], 0) + (0 if sinks is None else np.exp(sinks - most))
        out.append((np.sum(weights[..., None] * values[t, used], 0) / total[:, None]).ravel())
    return np.stack(out)


def _seen_rows(config: Config, index: int, n_cached: int) -> int:
    """Rows that attention of layer `index` goes over for the last of so many tokens."""
    if config.attention != "compressed":
        return min(n_cached, config.window(index) or config.index_topk or n_cached)
    ratio = config.compress_ratio(index)
    pooled = n_cached // ratio if ratio else 0
    return min(n_cached, config.sliding_window) + (min(pooled, config.index_topk) if ratio == 4 else pooled)


class Comparison:
    """The step and the network of one model, over the same tensors."""

    def __init__(self, engine: Engine, threads: int):
        self.config, self._pool = engine.config, Pool(threads)
        self._weights = WatchedWeights(engine.file, self._pool)
        self.step = decode_step(self.config, GGUFTensors(engine.file), self._pool)
        self.network = Network(self.config, self._weights)
        self._modules = COMPRESSED_MODULES if self.config.attention == "compressed" else MODULES
        for layer in self.network.layers:
            if isinstance(layer, HyperLayer):
                layer.attn_hc = partial(self._watched_streams, layer.attn_hc)

    def _watched_streams(
        self, mix: Callable[..., tuple[torch.Tensor, Return]], *arguments: torch.Tensor
    ) -> tuple[torch.Tensor, Return]:
        """A hyper-connection that notes the streams behind attention."""
        read, expand = mix(*arguments)

        def noted(y: torch.Tensor) -> torch.Tensor:
            out = expand(y)
            self._weights.note("streams", out)
            return out

        return read, noted

    def close(self) -> None:
        self._pool.close()

    def _caches(self, ids: list[int]) -> tuple[Cache, Cache]:
        """Two caches with the step's rows of all tokens but the last MOST_TOKENS."""
        mine, other = (new_cache(self.config, len(ids)) for _ in range(2))
        before = ids[: max(0, len(ids) - MOST_TOKENS)]
        for first in range(0, len(before), MOST_TOKENS):
            self.step(before[first : first + MOST_TOKENS], mine, 0)
        other.load(mine.save(), mine.length)
        return mine, other

    def _embedded(self, ids: list[int]) -> torch.Tensor:
        """float32 (T, D), or streams of it."""
        x = self.network.embed_tokens(torch.tensor(ids))
        return x if self.network.hc_head is None else x[:, None].repeat(1, self.config.hc_mult, 1)

    @torch.inference_mode()
    def phases(self, ids: list[int]) -> Iterator[tuple[str, dict[str, float], np.ndarray | None]]:
        """Of each phase its name, the errors of what it writes, and the sums behind a layer: of its last phase."""
        mine, other = self._caches(ids)
        last = ids[mine.length :]
        n_cached = [mine.length + t + 1 for t in range(len(last))]
        x, layer, after, attended = self._embedded(last), -1, None, None
        for phase in self.step.program.names:
            found = self.step.run_until(phase, last, mine)
            if phase == "head":
                yield phase, {"logits": error(found["logits"], self._logits(x))}, None
                return
            if phase == "head: streams":
                products = self._stream_products(found[STREAMS])
                self.network.hc_head(x)
                expected = self._weights.seen["output_hc_fn.weight"]
                yield phase, {STREAMS: error(products, expected)}, None
                continue
            if int(phase.split(".")[1]) != layer:
                layer += 1
                self._weights.seen.clear()
                after = self.network.layers[layer](x, other, torch.tensor(last)).flatten(1).numpy()
                attended = self._attended(layer, x)
            sublayer = "attn" if ".attn" in phase else "ffn"
            errors = {
                name: self._error(name, value, layer, sublayer, n_cached, attended, after)
                for name, value in found.items()
            }
            if "x" in found:
                attended = found["x"] if sublayer == "attn" else attended
                x = torch.from_numpy(found["x"]).view_as(x) if sublayer == "ffn" else x
            yield phase, errors, found["x"] if sublayer == "ffn" and "x" in found else None

    def _attended(self, layer: int, before: torch.Tensor) -> np.ndarray:
        """The network's sums behind attention, or streams, (T, n)."""
        seen = self._weights.seen
        if "streams" in seen:
            return seen["streams"]
        return before.numpy() + self._product(self._name(layer, "self_attn.o_proj"))

    def _logits(self, x: torch.Tensor) -> np.ndarray:
        c = self.config
        x = x if self.network.hc_head is None else self.network.hc_head(x)
        return self.network.lm_head(torch.rms_norm(x, (c.hidden_size,), self.network.norm, c.rms_norm_eps)).numpy()

    def _name(self, layer: int, module: str) -> str:
        return names.layer(self.config.architecture, layer, module)

    def _stream_products(self, value: np.ndarray) -> np.ndarray:
        """The step's, of each stream alone, as the network's: of all as one vector."""
        return value.reshape(len(value), self.config.hc_mult, -1).sum(1)

    def _error(
        self, name: str, value: np.ndarray, layer: int, sublayer: str, n_cached: list[int],
        attended: np.ndarray, after: np.ndarray,
    ) -> float:  # fmt: skip
        """Of a phase's vectors against the network's. attended, after: sums behind the sublayers.

        attended is the network's until attention has been compared, and the step's then.
        """
        seen = self._weights.seen
        if name == "x":
            return error(value, attended if sublayer == "attn" else after)
        if name == STREAMS:
            return error(self._stream_products(value), seen[self._name(layer, f"{sublayer}_hc.fn")])
        if name == CHOSEN:
            ratio = max(1, self.config.compress_ratio(layer))
            return chosen_error(value.view(np.int32), seen.get(CHOSEN), [n // ratio for n in n_cached])
        return error(*self._pair(name, value, layer, n_cached))

    def _pair(self, name: str, value: np.ndarray, layer: int, n_cached: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """A phase's vectors and the network's."""
        seen, layer_name = self._weights.seen, partial(self._name, layer)
        if name == "projected queries":
            both = (layer_name(f"self_attn.{part}") for part in ("q_proj", "q_b_proj"))
            return value, next(self._product(module) for module in both if module in seen)
        if name in self._modules:
            module = layer_name(self._modules[name])
            # The indexer's queries are not asked for while all rows are attended to.
            return (value, self._product(module)) if module in seen else (value, value)
        expected, n_heads = seen["attended" if name == "partials" else name], self.config.num_attention_heads
        if name == "partials":
            n_seen = [_seen_rows(self.config, layer, n) for n in n_cached]
            value = _combined(value, n_heads, n_seen, self._sinks(layer))
        # Queries and values are padded to whole vectors, a head at a time.
        heads = n_heads if name in ("queries", "partials") else 1
        wanted = expected.reshape(len(value), heads, -1)
        return value.reshape(len(value), heads, -1)[..., : wanted.shape[-1]], wanted

    def _sinks(self, layer: int) -> np.ndarray | None:
        name = self._name(layer, "self_attn.sinks")
        return self._weights.array(name) if self._weights.has(name) else None

    def _product(self, matrix: str) -> np.ndarray:
        """What a matrix gave last, and its bias, if it has one."""
        bias = names.bias(matrix)
        return self._weights.seen[matrix] + (self._weights.array(bias) if self._weights.has(bias) else 0)

    @torch.inference_mode()
    def by_itself(self, ids: list[int]) -> list[np.ndarray]:
        """The network's sums after each layer, of the last tokens, from its own beginning; then its logits."""
        cache, x, sums = new_cache(self.config, len(ids), exact=True), self._embedded(ids), []
        for layer in self.network.layers:
            x = layer(x, cache, torch.tensor(ids))
            sums.append(x[-MOST_TOKENS:].flatten(1).numpy())
        return sums


@torch.inference_mode()
def source_sums(checkpoint: Path, ids: list[int]) -> list[np.ndarray]:
    """The sums after each layer but the last by transformers, whose last ones are normed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [state[0, -MOST_TOKENS:].flatten(1).numpy() for state in states[1:-1]]


def report(engine: Engine, ids: list[int], source: Path | None, threads: int, tolerance: float) -> dict[str, Any]:
    """What the last line of stdout has."""
    comparison, phases, layers, sums, first = Comparison(engine, threads), [], [], [], None
    try:
        for phase, errors, x in comparison.phases(ids):
            phases.append({"phase": phase, "errors": errors})
            print(f"{phase:40}", *(f"{name} {value:.1e}" for name, value in errors.items()), sep="  ", file=sys.stderr)
            sums += [] if x is None else [x]
            if first is None and max(errors.values(), default=0) > tolerance:
                first = phase
        if source is not None:
            for index, (step, network, right) in enumerate(
                zip(sums, comparison.by_itself(ids), source_sums(source, ids), strict=False)
            ):
                errors = {"step": error(step, right), "network": error(network, right)}
                layers.append({"layer": index, "errors": errors})
                print(f"layer {index}: step {errors['step']:.1e}, network {errors['network']:.1e}", file=sys.stderr)
                if first is None and max(errors.values()) > SOURCE_TOLERANCE:
                    first = f"layer {index} against the source"
    finally:
        comparison.close()
    return {"tokens": len(ids), "tolerance": tolerance, "first": first, "phases": phases, "layers": layers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file or the name of a bundled model")
    parser.add_argument("-p", "--prompt", required=True)
    parser.add_argument("--source", type=Path, help="the checkpoint that the model was made of, a folder")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"of a phase; {TOLERANCE} if not given")
    parser.add_argument("-t", "--threads", type=int, default=2)
    options = parser.parse_args()
    with localrun.load(model_path(options.model), device="cpu", threads=options.threads) as engine:
        ids = engine.tokenizer.encode(options.prompt)
        if not ids:
            parser.error("the prompt has no tokens")
        found = report(engine, ids, options.source, options.threads, options.tolerance)
    if found["first"] is not None:
        print(f"first beyond its tolerance: {found['first']}", file=sys.stderr)
    print(json.dumps(found))
    return int(found["first"] is not None)


if __name__ == "__main__":
    sys.exit(main())
