"""Collects an importance matrix: for every matrix, the sum of squares of what each of its columns is multiplied with.

The text runs through the network in chunks, as for perplexity, over modules that note their inputs as well. The file
has llama.cpp's GGUF format, for localrun.convert.imatrix and for llama-quantize. The head is left out, as llama-imatrix
does unless told otherwise: its README says that packing the head by importance makes it worse.

Format and what is counted: tools/imatrix/imatrix.cpp of https://github.com/ggml-org/llama.cpp @3f545becc.
Letters: T tokens, N those of one expert, D hidden_size, I moe_intermediate_size, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from localrun.cpu.bridge import Experts, HeadLinear, Linear
from localrun.cpu.torch_threads import TorchThreads
from localrun.cpu.weights import LayerWeights
from localrun.errors import LocalrunError
from localrun.files import check_place, replacing
from localrun.gguf.file import open_gguf
from localrun.limits import PREFILL_CHUNK
from localrun.measure.perplexity import text_chunks
from localrun.models import names
from localrun.models.reader import is_imatrix
from localrun.network.cache import Cache
from localrun.network.model import Network
from localrun.network.moe import gated
from quant.matrix import QuantMatrix
from quant.threads.pool import Pool

if TYPE_CHECKING:
    from localrun.engine import Engine
    from localrun.gguf.file import GGUFFile
    from localrun.models.config import Config

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Importance:
    """What was collected.

    Attributes:
        squares: tensor name -> float32 (slices, columns), sums of squares; a slice an expert or head, else one.
        counts: tensor name -> float32 (slices,), the rows that were summed.
        n_chunks, n_ctx: the text's chunks, and tokens in each.
        n_experts: layer -> its routed experts.
        unreached: layer -> numbers of the experts that no token was sent to; layers with none are left out.
    """

    squares: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    n_chunks: int
    n_ctx: int
    n_experts: dict[int, int]
    unreached: dict[int, list[int]]


def collect(
    engine: Engine, ids: Sequence[int], n_ctx: int, n_chunks: int | None = None, progress: Progress | None = None
) -> Importance:
    """Run ids, encoded with add_special, in chunks of n_ctx tokens: the first n_chunks of them, or all.

    Args:
        engine: a model that the native backend runs.
        progress: called as progress(done, total) after each chunk.

    Raises LocalrunError if there are fewer than 2 * n_ctx ids (llama.cpp's rule), or the model's logits make no sense.
    """
    chunks = text_chunks(engine, ids, n_ctx, n_chunks)
    inputs, pool = _Inputs(), Pool(engine.threads)
    TorchThreads.hold(engine.threads)
    try:
        with pool.passive_wait():
            model = Network(engine.config, _ObservedWeights(engine.file, pool, inputs))
            for index, chunk in enumerate(chunks):
                engine.file.check_unchanged()
                if not np.isfinite(_evaluate(model, chunk, inputs)).all():
                    raise LocalrunError(
                        f"chunk {index + 1} of {len(chunks)}: the model gives logits that make no sense"
                    )
                if progress is not None:
                    progress(index + 1, len(chunks))
    finally:
        TorchThreads.release()
        pool.close()
    return Importance(
        {name: sums.numpy() for name, sums in inputs.squares.items()},
        {name: counts.numpy() for name, counts in inputs.counts.items()},
        len(chunks),
        n_ctx,
        *_reached(inputs, engine.config),
    )


def _evaluate(model: Network, chunk: list[int], inputs: _Inputs) -> np.ndarray:
    """float32 (1, vocab): the logits after a chunk, from an empty cache of 32-bit values."""
    cache = _ObservedCache(model.config, len(chunk), inputs)
    n_parts = -(-len(chunk) // PREFILL_CHUNK)
    parts = [part.tolist() for part in np.array_split(np.array(chunk), n_parts)]
    return [model.forward(part, cache)[1] for part in parts][-1]


def _reached(inputs: _Inputs, config: Config) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Layer -> its routed experts; layer -> those of them that no token was sent to."""
    n_experts, unreached = {}, {}
    for index in range(config.num_hidden_layers):
        counts = inputs.counts.get(names.layer(config.architecture, index, "mlp.experts.down_proj"))
        if counts is not None:
            n_experts[index] = len(counts)
            missed = (counts == 0).nonzero()[:, 0].tolist()
            unreached |= {index: missed} if missed else {}
    return n_experts, unreached


class _Inputs:
    """Sums of squared inputs by tensor name: float32 (slices, columns) and (slices,).

    A chunk is summed by itself first, so the error of adding up many in 32 bits stays far below 1e-4.
    """

    def __init__(self) -> None:
        self.squares: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}

    def expect(self, n_slices: int, n_cols: int, *tensors: str) -> None:
        """Tensors which all have the same inputs."""
        squares, counts = torch.zeros(n_slices, n_cols), torch.zeros(n_slices)
        for name in tensors:
            self.squares[name], self.counts[name] = squares, counts

    def add(self, name: str, x: torch.Tensor, first: int = 0) -> None:
        """x (T, slices, columns): the inputs of slices from `first` on."""
        slices = slice(first, first + x.shape[1])
        self.squares[name][slices] += x.square().sum(0)
        self.counts[name][slices] += x.shape[0]


class _ObservedWeights(LayerWeights):
    """Weights whose modules note what the layers' matrices are multiplied with."""

    def __init__(self, file: GGUFFile, pool: Pool, inputs: _Inputs) -> None:
        super().__init__(file, pool)
        self._inputs = inputs

    def linear(self, name: str) -> Linear:
        """As LayerWeights, with its inputs noted; those of embedding and head are not."""
        if name in (names.LM_HEAD, names.EMBED_TOKENS):
            return super().linear(name)
        twin = name.replace("indexer.attn_q_b", "attn_q_b")
        if twin != name:  # an indexer's queries are not asked for in short contexts; their input is that of the model's
            self._inputs.squares[name], self._inputs.counts[name] = (
                self._inputs.squares[twin],
                self._inputs.counts[twin],
            )
            return super().linear(name)
        holder = names.holder(self.architecture, name)
        if holder in self._inputs.squares:  # of queries, keys and values in one matrix: all have the same inputs
            return super().linear(name)
        return _ObservedLinear(super().linear(name), holder, self._inputs)

    def heads(self, name: str, n_groups: int | None = None) -> HeadLinear:
        """As LayerWeights, with its inputs noted."""
        return _ObservedHeads(super().heads(name, n_groups), name, self._inputs, is_plain=n_groups is not None)

    def split_heads(self, name: str, n_heads: int, rows: tuple[int, int]) -> tuple[HeadLinear, HeadLinear]:
        """As LayerWeights; _ObservedCache notes the inputs."""
        self._inputs.expect(1, self.file.tensors[name].shape[-1], name)  # its input is seen by the cache
        return super().split_heads(name, n_heads, rows)

    def joined_mlp(self, gate: str, up: str, down: str) -> None:
        """Nothing: the inputs of down would be inside of one call."""

    def experts(self, index: int) -> Experts:
        """As LayerWeights, with the inputs of each expert's matrices noted."""
        name = partial(names.layer, self.architecture, index)
        fused = name("mlp.experts.gate_up_proj")
        parts = [name(f"mlp.experts.{part}_proj") for part in ("gate", "up")]
        first = [fused] if self.has(fused) else parts
        return _ObservedExperts(super().experts(index), first, name("mlp.experts.down_proj"), self._inputs)


class _ObservedLinear(Linear):
    def __init__(self, module: Linear, name: str, inputs: _Inputs) -> None:
        super().__init__(module.pool, module.weight)
        self._name, self._inputs = name, inputs
        inputs.expect(1, self.weight.n_cols, name)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._inputs.add(self._name, x[:, None])
        return super().__call__(x)


class _ObservedHeads(HeadLinear):
    may_expand = False

    def __init__(self, module: HeadLinear, name: str, inputs: _Inputs, is_plain: bool) -> None:
        """is_plain: whether the file holds one matrix, whose rows are taken in groups."""
        super().__init__(module.pool, module.weight)
        self._name, self._inputs, self._is_plain = name, inputs, is_plain
        inputs.expect(1 if is_plain else self.weight.n_groups, self.weight.n_cols, name)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._inputs.add(self._name, x.flatten(0, 1)[:, None] if self._is_plain else x)
        return super().__call__(x)


class _ObservedExperts(Experts):
    """The routed experts one after the other, because down's inputs are inside of what is otherwise one call."""

    def __init__(self, module: Experts, first: list[str], down: str, inputs: _Inputs) -> None:
        self.pool, self.experts = module.pool, module.experts
        self._first, self._down, self._inputs = first[0], down, inputs
        inputs.expect(self.experts.gate.n_groups, self.experts.gate.n_cols, *first)
        inputs.expect(self.experts.down.n_groups, self.experts.down.n_cols, down)

    def begin(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Callable[[], torch.Tensor]:
        """As Experts: float32 (T, D), computed before it is asked for."""
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            tokens, places = (ids == expert).nonzero(as_tuple=True)
            gate, up, down = (
                Linear(self.pool, _slice(part, expert))
                for part in (self.experts.gate, self.experts.up, self.experts.down)
            )
            x_ND = x[tokens]
            gate_bias, up_bias, down_bias = self._biases(expert)
            h_NI = gated(self.experts.activation, gate(x_ND) + gate_bias, up(x_ND) + up_bias)
            self._inputs.add(self._first, x_ND[:, None], expert)
            self._inputs.add(self._down, h_NI[:, None], expert)
            out.index_add_(0, tokens, (down(h_NI) + down_bias) * weights[tokens, places, None])
        return lambda: out

    def _biases(self, expert: int) -> list[torch.Tensor | int]:
        """Of gate, up and down; 0 for none."""
        return [torch.from_numpy(bias[expert]) for bias in self.experts.biases] if self.experts.biases else [0] * 3


def _slice(stack: QuantMatrix, index: int) -> QuantMatrix:
    """One matrix of a stack: a view."""
    return replace(stack, address=stack.address + index * stack.group_bytes, n_groups=1)


class _ObservedCache(Cache):
    """A 32-bit cache; latents are the input of a kv_b matrix, where a file has that instead of k_b and v_b."""

    def __init__(self, config: Config, capacity: int, inputs: _Inputs) -> None:
        super().__init__([config.rows(index) for index in range(config.num_hidden_layers)], capacity, np.float32)
        self._config, self._inputs = config, inputs

    def append(self, layer: int, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As Cache, with latents noted."""
        name = names.layer(self._config.architecture, layer, "self_attn.kv_b_proj")
        if name in self._inputs.squares:
            self._inputs.add(name, rows[0][:, None, : self._config.kv_lora_rank])
        return super().append(layer, *rows)


def check_destination(path: Path) -> None:
    """Raises LocalrunError where no importance matrix of that name can be written, or one would replace something else:
    sooner than after all of the text.
    """
    check_place(path)
    if path.exists() and not _is_imatrix(path):
        raise LocalrunError(f"{path}: is there, and no importance matrix; choose another name")


def _is_imatrix(path: Path) -> bool:
    try:
        with open_gguf(path) as file:
            return is_imatrix(file)
    except LocalrunError:
        return False


def write(path: Path, importance: Importance, dataset: str) -> None:
    """Write the file, in place of one of that name only when all of it is there. Raises LocalrunError.

    Args:
        dataset: what the text was, for who looks into the file.
    """
    with replacing(path) as temporary:
        _write(temporary, importance, dataset)


def _write(path: Path, importance: Importance, dataset: str) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()  # of the architecture's key: the file is no model
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", importance.n_chunks)
    writer.add_uint32("imatrix.chunk_size", importance.n_ctx)
    for name in sorted(importance.squares):
        writer.add_tensor(f"{name}.in_sum2", importance.squares[name])
        writer.add_tensor(f"{name}.counts", importance.counts[name][:, None])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
