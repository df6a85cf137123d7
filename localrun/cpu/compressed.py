"""DeepSeek-V4's step: its streams, compressors and grouped output laid out as phases, beside what decode.py has.

The same arithmetic in torch: network/compressed.py and network/hyper.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from localrun.cpu.decode import DecodeStep, Layers, heads_together
from localrun.models.config import Config
from localrun.models.tensors import GGUFTensors
from localrun.network.rope import attention_scale, compressed_rope, frequencies, rotation_magnitude
from localrun.ranks.remote import Remote
from quant.decode.attention import Heads, attend_phase
from quant.decode.compressor import Compressor, shared_key_queries_phase
from quant.decode.indexer import Indexer
from quant.decode.linear import Input, rows_phase
from quant.decode.program import Program
from quant.decode.stream_mean import stream_mean_phase
from quant.decode.stream_rows import groups_phase, stream_products_phase
from quant.decode.streams import N_WEIGHTS, Streams
from quant.decode.values import GroupedOutput, project_values_phase
from quant.gemv.activations import q8_bytes
from quant.matrix import QuantMatrix
from quant.threads.pool import Pool


class StreamLayers(Layers):
    """Layers between hyper-connections, over windows and pooled rows; their x is (T, hc_mult, hidden_size)."""

    def _new_program(self, embedding: QuantMatrix, n_slots: int) -> Program:
        c = self.config
        plain = frequencies(replace(c, rope_scaling=None))
        tables = np.concatenate([plain, compressed_rope(c).frequencies])
        return Program(self.pool, embedding, tables, rotation_magnitude(c), n_slots, n_copies=c.hc_mult)

    def _layer(self, index: int, cache_layer: int) -> None:
        c = self.config
        name = partial(self._name, index)
        self._part = f"blk.{index}.attn"
        streams, input_ = self._streams(lambda part: name(f"attn_hc.{part}"), name("input_layernorm"))
        self._compressed_attention(index, cache_layer, input_, streams)
        self._part = f"blk.{index}.ffn"
        streams, input_ = self._streams(lambda part: name(f"ffn_hc.{part}"), name("post_attention_layernorm"))
        router, shared = self._router(index, input_)
        self._experts(
            index, Input(input_.x), router, shared, self._vector("experts' sum", c.hidden_size),
            replaces=True, shared_activation=self.tensors.activation, into=streams,
        )  # fmt: skip

    def _streams(self, name: Callable[[str], str], norm: str) -> tuple[Streams, Input]:
        """A sublayer's way into the streams and out of them, after the phase of its weights."""
        c = self.config
        fn, base, scale = map(name, ("fn", "base", "scale"))
        weights = self.tensors.matrix(fn)
        products = self._vector("stream products", c.hc_mult * weights.n_rows)
        streams = Streams(
            self.x, products, weights.n_rows, self._array(base), self._array(scale), c.hc_eps, c.rms_norm_eps,
            c.hc_sinkhorn_iters, self._vector("stream weights", N_WEIGHTS),
        )  # fmt: skip
        self._add(stream_products_phase(streams, weights, self.pool.n_workers), "streams", "stream products")
        mixed = self._vector("mixed streams", c.hidden_size)
        return streams, Input(mixed, self._array(norm), c.rms_norm_eps, streams=streams)

    def _head_input(self, norm: str) -> Input:
        self._part = "head"
        _, input_ = self._streams("output_hc_{}.weight".format, norm)
        return input_

    def hidden(self, first: int, last: int) -> np.ndarray:
        """float32 (last - first, hc_mult * hidden_size): the streams behind the last layer, of tokens first..last."""
        return self._read(self.x, self._x_width, last)[first:]

    def _compressed_attention(self, index: int, cache_layer: int, input_: Input, streams: Streams) -> None:
        c, slot = self.config, self._slots[cache_layer]
        name = partial(self._module, index)
        ratio, n_heads, width = c.compress_ratio(index), c.num_attention_heads, c.head_dim
        first = {"q_a": "q_a_proj", "kv": "kv_proj"}
        second = {"projected queries": "q_b_proj"}
        if ratio:
            first |= {"vectors": "compressor.kv_proj", "gates": "compressor.gate_proj"}
        if c.chooses_rows(index):
            first |= {"index vectors": "compressor.indexer.kv_proj", "index gates": "compressor.indexer.gate_proj"}
            first |= {"indexer's weights": "compressor.indexer.weights_proj"}
            second |= {"indexer's queries": "compressor.indexer.q_b_proj"}
        self._rows("projections", input_, {out: self.tensors.matrix(name(part)) for out, part in first.items()})
        q_norm = self._normed(self._vector("q_a", c.q_lora_rank), name("q_a_norm"))
        self._rows("q_b", q_norm, {out: self.tensors.matrix(name(part)) for out, part in second.items()})
        together = heads_together(n_heads)
        heads = Heads(
            n_groups=n_heads // together, per_group=together, key_width=width, value_width=width,
            key_slot=slot, value_slot=slot, key_row=2 * width, value_row=2 * width, key_group=0, value_group=0,
            window=c.window(index), sinks=self._array(name("sinks")),
        )  # fmt: skip
        compressor = index_compressor = indexer = None
        if ratio:
            compressor = self._compressor(index, "compressor", ("vectors", "gates"), width, slot + 1)
            heads = replace(heads, ratio=ratio, pooled_slot=slot + 1)
        if c.chooses_rows(index):
            module, parts = "compressor.indexer", ("index vectors", "index gates")
            index_compressor = self._compressor(index, module, parts, c.index_head_dim, slot + 3)
            indexer = self._indexer(slot + 3, ratio)
            heads = replace(heads, most_pooled=indexer.top_k, chosen=indexer.chosen, chosen_bytes=indexer.chosen_bytes)
        self._add_queries(index, heads, slot, compressor, index_compressor, indexer)
        if indexer:
            self._add_choice(indexer)
        self._attend_and_output(index, heads, streams)

    def _first_frequency(self, index: int) -> int:
        """Of a layer, among the program's."""
        return self.config.qk_rope_head_dim // 2 if self.config.compress_ratio(index) else 0

    def _compressor(self, index: int, module: str, inputs: tuple[str, str], width: int, slot: int) -> Compressor:
        """One of a layer's, over inputs by name; its pooled rows lie in `slot`, open windows behind."""
        c, name = self.config, partial(self._module, index)
        overlaps = c.compress_ratio(index) == 4
        vectors, gates = (self._vector(part, 2 * width if overlaps else width) for part in inputs)
        bias, norm = (self._array(name(f"{module}.{part}")) for part in ("position_bias", "kv_norm"))
        return Compressor(c.compress_ratio(index), width, overlaps, vectors, gates, bias, norm, slot + 1, slot)

    def _add_queries(
        self, index: int, heads: Heads, slot: int, compressor: Compressor | None, index_compressor: Compressor | None,
        indexer: Indexer | None,
    ) -> None:  # fmt: skip
        c, size = self.config, heads.n_heads * heads.key_width
        phase = shared_key_queries_phase(
            self._vector("projected queries", size),
            self._vector("queries", size),
            self._vector("kv", heads.key_width),
            self._array(self._module(index, "kv_norm")),
            n_heads=heads.n_heads,
            width=heads.key_width,
            n_rope=c.qk_rope_head_dim,
            first_frequency=self._first_frequency(index),
            scale=attention_scale(c),
            epsilon=c.rms_norm_eps,
            slot=slot,
            compressor=compressor,
            index_compressor=index_compressor,
            indexer=indexer,
        )
        self._add(phase, "queries", "queries")

    def _attend_and_output(self, index: int, heads: Heads, streams: Streams) -> None:
        """From queries to the streams."""
        c, workers, size = self.config, self.pool.n_workers, heads.n_heads * heads.value_width
        o_a = self.tensors.grouped(self._module(index, "o_a_proj"), c.o_groups)
        q8 = self._vector("heads' values, quantised", c.o_groups * q8_bytes(o_a.n_cols) // 4)
        partials = self._vector("partials", heads.partials_bytes // 4)
        values, low = self._vector("heads' values", size), self._vector("output_a", c.o_groups * c.o_lora_rank)
        output = GroupedOutput(c.qk_rope_head_dim, self._first_frequency(index), o_a, q8)
        self._add(attend_phase(heads, self._vector("queries", size), partials), "attend", "partials")
        self._add(project_values_phase(heads, partials, None, values, output), "values", "heads' values")
        self._add(groups_phase(o_a, q8, low, workers), "output_a", "output_a")
        o_b = self.tensors.matrix(self._module(index, "o_b_proj"))
        self._add(rows_phase(Input(low), [(o_b, 0)], workers, into=streams), "output", "x")


class CompressedStep(StreamLayers, DecodeStep):
    """The step of a model of such layers."""

    def __init__(
        self, config: Config, tensors: GGUFTensors, pool: Pool, remote: Remote | None = None,
        watched: tuple[int, ...] = (),
    ):  # fmt: skip
        """watched: layers whose streams' means hidden() is to give, in place of the last one's streams."""
        self._watched = watched
        super().__init__(config, tensors, pool, remote)

    def _layer(self, index: int, cache_layer: int) -> None:
        super()._layer(index, cache_layer)
        if index in self._watched:
            width, n_values = self.config.hidden_size, len(self._watched) * self.config.hidden_size
            out = self._vector("means", n_values) + 4 * width * self._watched.index(index)
            self._add(stream_mean_phase(self.x, width, out, n_values), "means", "means")

    def hidden(self, first: int, last: int) -> np.ndarray:
        """As StreamLayers.hidden, or float32 (last - first, watched layers * hidden_size)."""
        return self._read(*self._vectors["means"], last)[first:] if self._watched else super().hidden(first, last)


def decode_step(
    config: Config,
    tensors: GGUFTensors,
    pool: Pool,
    remote: Remote | None = None,
    watched: tuple[int, ...] = (),
    cache_bits: int = 16,
) -> DecodeStep:
    """The step of a model's kind. The tensors must stay mapped.

    remote, cache_bits: as Layers has them; watched: CompressedStep, whose caches have 16 bits.
    """
    if config.attention == "compressed":
        return CompressedStep(config, tensors, pool, remote, watched)
    return DecodeStep(config, tensors, pool, remote, cache_bits)
