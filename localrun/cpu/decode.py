"""Decoding a few tokens in one call: a model's tensors laid out as phases that the workers run without Python or torch.

The network itself is network/model.py, for any number of tokens; this is the same arithmetic over the same weights and
caches, and is tested against it.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from localrun.models import names
from localrun.models.config import Config
from localrun.models.indexer import KEY_EPS
from localrun.models.tensors import GGUFTensors
from localrun.network.cache import Cache, row_widths
from localrun.network.rope import attention_scale, frequencies, rotation_magnitude
from localrun.ranks.remote import Remote
from quant.decode.attention import Heads, attend_phase
from quant.decode.attention_i16 import fits, integer_attend_phase
from quant.decode.experts import NOBODY, expert_phases
from quant.decode.indexer import STATE_BYTES, Indexer, Room, choice_phases, indexer_keys_phase
from quant.decode.linear import Input, normed, rows_phase
from quant.decode.program import MOST_TOKENS, Phase, Program
from quant.decode.queries import grouped_queries_phase, latent_queries_phase
from quant.decode.router import SIGMOID, SOFTMAX, SOFTMAX_AFTER_TOPK, SQRT_SOFTPLUS, Router
from quant.decode.stream_rows import stream_rows_phase
from quant.decode.values import project_values_phase
from quant.matrix import QuantMatrix
from quant.threads.pool import Pool

SCORING = {
    "softmax": SOFTMAX,
    "sigmoid": SIGMOID,
    "softmax_after_topk": SOFTMAX_AFTER_TOPK,
    "sqrtsoftplus": SQRT_SOFTPLUS,
}
_HEADS_TOGETHER = 16  # of MLA: they share each expanded cache row; more would crowd the second-level cache


def heads_together(n_heads: int) -> int:
    """How many of so many heads over latents share the expanded rows."""
    return max(n for n in range(1, _HEADS_TOGETHER + 1) if n_heads % n == 0)


class Layers:
    """A program whose phases are layers of a model, laid out one after the other. T: quant.decode.program.MOST_TOKENS.

    Phases have names like "blk.3.attn: queries".

    Attributes:
        x: address of float32 (T, hidden_size), the sums that layers add to; set before the first.
    """

    def __init__(
        self,
        config: Config,
        tensors: GGUFTensors,
        pool: Pool,
        embedding: QuantMatrix,
        cached: Sequence[tuple[int, ...]],
        remote: Remote | None = None,
    ):
        """The tensors must stay mapped.

        Args:
            cached: widths of the cache rows of each layer.
            remote: ranks that have shares of the experts, if `tensors` has this one's alone.
        """
        self.config, self.tensors, self.pool, self._remote = config, tensors, pool, remote
        self._slots = [0, *accumulate(len(widths) for widths in cached)]  # of each layer's first block of cache rows
        self.program = self._new_program(embedding, self._slots[-1])
        self.x, self._x_width = self.program.x, max(1, config.hc_mult) * config.hidden_size
        self._room: dict[str, int] = {}  # floats of a token that a vector has room for
        self._vectors: dict[str, tuple[int, int]] = {}  # addresses and lengths, as used last
        self._outputs: dict[str, dict[str, tuple[int, int]]] = {}  # by phase: what it writes, "x" or others
        self._part = ""  # of the model, that phases are added for
        self._rank_room = Room()
        self._choice: dict[str, int] = {}  # of the last layer with an indexer, for Heads

    def _new_program(self, embedding: QuantMatrix, n_slots: int) -> Program:
        config, tensors = self.config, self.tensors
        factors = tensors.array(names.ROPE_FREQS) if tensors.has(names.ROPE_FREQS) else None
        return Program(self.pool, embedding, frequencies(config, factors), rotation_magnitude(config), n_slots)

    def _add(self, phase: Phase, name: str, *outputs: str) -> None:
        """Append a phase of the part at hand, which writes these vectors."""
        name = f"{self._part}: {name}"
        x = self.x, self._x_width
        self._outputs[name] = {output: x if output == "x" else self._vectors[output] for output in outputs}
        self.program.add(phase, name)

    def _layer(self, index: int, cache_layer: int) -> None:
        """Layer `index` of the file, over one layer of the cache."""
        self._part = f"blk.{index}.attn"
        norm = self._normed(self.x, self._name(index, "input_layernorm"))
        if self.config.attention == "mla":
            self._latent_attention(index, cache_layer, norm)
        else:
            self._grouped_attention(index, cache_layer, norm)
        self._part = f"blk.{index}.ffn"
        norm = self._normed(self.x, self._name(index, "post_attention_layernorm"))
        if self.tensors.has(self._name(index, "mlp.gate")):
            self._moe(index, norm)
        else:
            self._mlp(index, norm)

    def _head(self, norm: str, head: QuantMatrix) -> None:
        """The last phase: logits of the normed sums."""
        self._final, self._logits = self._head_input(norm), np.zeros((MOST_TOKENS, head.n_rows), np.float32)
        logits = self.program.keep(self._logits)
        self.program.add(self._rows_phase(self._final, [(head, logits)], is_head=True), "head")
        self._outputs["head"] = {"logits": (logits, head.n_rows)}
        self.program.finish()

    def _head_input(self, norm: str) -> Input:
        return self._normed(self.x, norm)

    def __call__(self, ids: Sequence[int], cache: Cache, n_logits: int) -> np.ndarray:
        """Evaluate up to MOST_TOKENS ids, which the cache then holds.

        Returns:
            float32 (n_logits, vocab): the logits after the last ones.

        Raises:
            ContextFullError: the cache has no room for them.
        """
        cache.check_room(len(ids))
        first = len(ids) - n_logits
        self._run(ids, cache, head_from=first)
        cache.advance(len(ids))
        return self._logits[first : len(ids)].copy()

    def together(self, ids: Sequence[int], caches: Sequence[Cache]) -> np.ndarray:
        """Evaluate up to MOST_TOKENS ids, each after the tokens of a cache of its own, which then holds it too.

        Returns:
            float32 (T, vocab): the logits after each, to the bit those that it would have alone.

        Raises:
            ContextFullError: one of the caches has no room; all are as they were.
        """
        for cache in caches:
            cache.check_room(1)
        self._rank_room.make(max(cache.capacity for cache in caches))
        addresses, n_rows = (np.stack([getattr(c, name) for c in caches]) for name in ("addresses", "n_rows"))
        self._run_program(ids, [cache.length for cache in caches], addresses, cache_rows=n_rows)
        for cache in caches:
            cache.advance(1)
        return self._logits[: len(ids)].copy()

    def _run(self, ids: Sequence[int], cache: Cache, **options: Any) -> None:
        """A step of tokens that follow each other after the cache's."""
        self._rank_room.make(cache.capacity)
        positions = range(cache.length, cache.length + len(ids))
        self._run_program(ids, positions, cache.addresses, cache_rows=cache.n_rows, **options)

    def _run_program(self, *args: Any, **options: Any) -> None:
        """A step, as Program.run; raises RankError if other ranks have not done their part."""
        self.program.run(*args, **options)
        if self._remote:
            self._remote.check()

    def run_until(self, phase: str, ids: Sequence[int], cache: Cache) -> dict[str, np.ndarray]:
        """Evaluate up to MOST_TOKENS ids after the cache's as far as this phase: what it writes, by name, (T, n).

        The cache counts as before. Raises QuantError if no phase is called so.
        """
        self._run(ids, cache, until=phase)
        return {name: self._read(*place, len(ids)) for name, place in self._outputs[phase].items()}

    @staticmethod
    def _read(address: int, n: int, n_tokens: int) -> np.ndarray:
        floats = (ctypes.c_float * (n_tokens * n)).from_address(address)
        return np.array(floats, np.float32).reshape(n_tokens, n)

    def hidden(self, first: int, last: int) -> np.ndarray:
        """float32 (last - first, hidden_size): what the head reads of the last step's tokens first..last."""
        return normed(self._final, first, last, self.config.hidden_size)

    def _name(self, index: int, module: str) -> str:
        """Of a tensor of a layer."""
        return names.layer(self.config.architecture, index, module)

    def _module(self, index: int, module: str) -> str:
        """Of a module of a layer's attention."""
        return self._name(index, f"self_attn.{module}")

    def _array(self, name: str) -> int:
        """Address of a 1-D tensor in float32."""
        return self.program.keep(self.tensors.array(name))

    def _normed(self, x: int, name: str) -> Input:
        """The vector at x after the norm `name`."""
        return Input(x, self._array(name), self.config.rms_norm_eps)

    def _vector(self, name: str, n: int) -> int:
        """Address of float32 (T, n) that all layers use in turn under this name."""
        address, _ = self._vectors.get(name, (0, 0))
        if self._room.get(name, -1) < n:
            address, self._room[name] = self.program.vector(n), n
        self._vectors[name] = address, n
        return address

    def _rows(self, name: str, input_: Input, matrices: dict[str, QuantMatrix], biases: Sequence[int] = ()) -> None:
        """A phase of matrices, by the names of the vectors that are their outputs."""
        places = [(matrix, self._vector(output, matrix.n_rows)) for output, matrix in matrices.items()]
        self._add(self._rows_phase(input_, places, biases=biases), name, *matrices)

    def _rows_phase(self, input_: Input, places: list[tuple[QuantMatrix, int]], **options: Any) -> Phase:
        make = stream_rows_phase if input_.streams else rows_phase
        return make(input_, places, self.pool.n_workers, **options)

    def _bias(self, weight: str) -> int:
        """Address of what is added to a matrix's products; 0 for nothing."""
        bias = names.bias(weight)
        return self._array(bias) if self.tensors.has(bias) else 0

    def _add_to_x(self, name: str, input_: Input, matrix: QuantMatrix, bias: int = 0) -> None:
        phase = rows_phase(input_, [(matrix, self.x)], self.pool.n_workers, residual=True, biases=[bias])
        self._add(phase, name, "x")

    def _attend(self, heads: Heads, queries: int, v_b: QuantMatrix | None, o_proj: QuantMatrix, bias: int = 0) -> None:
        """From rotated queries to the sum with the residual; bias: of the output.

        In integers where v_b's products are in integers of fewer bits.
        """
        partials = self._vector("partials", heads.partials_bytes // 4)
        values = self._vector("heads' values", o_proj.n_cols)
        in_integers = v_b is not None and v_b.format.integer and fits(heads)
        attend = (integer_attend_phase if in_integers else attend_phase)(heads, queries, partials)
        self._add(attend, "attend", "partials")
        self._add(project_values_phase(heads, partials, v_b, values), "values", "heads' values")
        self._add_to_x("output", Input(values), o_proj, bias)

    def _latent_attention(self, index: int, cache_layer: int, norm: Input) -> None:
        c = self.config
        name = partial(self._module, index)
        row_width = c.kv_lora_rank + c.qk_rope_head_dim
        q_width = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        projected, kv = self._vector("projected queries", q_width), self._vector("kv", row_width)
        kv_a = self.tensors.matrix(name("kv_a_proj_with_mqa"))
        has_indexer = c.chooses_rows(index)
        if c.q_lora_rank is None:
            self._rows("projections", norm, {"projected queries": self.tensors.matrix(name("q_proj")), "kv": kv_a})
        else:
            first = {"q_a": self.tensors.matrix(name("q_a_proj")), "kv": kv_a}
            second = {"projected queries": self.tensors.matrix(name("q_b_proj"))}
            if has_indexer:
                first["indexer's keys"] = self.tensors.matrix(name("indexer.wk"))
                first["indexer's weights"] = self.tensors.matrix(name("indexer.weights_proj"))
                second["indexer's queries"] = self.tensors.matrix(name("indexer.wq_b"))
            self._rows("projections", norm, first)
            q_norm = self._normed(self._vector("q_a", c.q_lora_rank), name("q_a_layernorm"))
            self._rows("q_b", q_norm, second)
        is_split = self.tensors.has(name("k_b_proj"))
        if is_split:
            k_b, v_b = self.tensors.matrix(name("k_b_proj")), self.tensors.matrix(name("v_b_proj"))
        else:
            rows = c.qk_nope_head_dim, c.v_head_dim
            k_b, v_b = self.tensors.split_matrix(name("kv_b_proj"), c.num_attention_heads, rows)
        slot = self._slots[cache_layer]
        if has_indexer:
            self._choose_rows(index, slot + 1)
        elif index >= c.num_hidden_layers:  # for multi-token prediction: dense
            self._choice = {}
        together = heads_together(c.num_attention_heads)
        heads = Heads(
            n_groups=c.num_attention_heads // together, per_group=together,
            key_width=row_width, value_width=c.kv_lora_rank, key_slot=slot, value_slot=slot,
            key_row=2 * row_width, value_row=2 * row_width, key_group=0, value_group=0, **self._choice,
        )  # fmt: skip
        queries = self._vector("queries", heads.n_heads * heads.query_width)
        self._add(
            latent_queries_phase(
                projected,
                queries,
                kv,
                self._array(name("kv_a_layernorm")),
                k_b,
                transposed=not is_split,
                n_rope=c.qk_rope_head_dim,
                query_width=heads.query_width,
                scale=attention_scale(c),
                epsilon=c.rms_norm_eps,
                slot=slot,
            ),
            "queries",
            "queries",
        )
        self._attend(heads, queries, v_b, self.tensors.matrix(name("o_proj")))

    def _choose_rows(self, index: int, slot: int) -> None:
        """The indexer of a layer: its key to the cache, and the rows that this layer and the next ones attend to."""
        c = self.config

        def norm(part: str) -> int:
            return self._array(self._module(index, f"indexer.{part}"))

        indexer = self._indexer(slot, 1)
        by_halves, keys = c.indexer_rope == "halves", self._vector("indexer's keys", c.index_head_dim)
        norms = norm("k_norm"), norm("k_norm.bias")
        self._add(indexer_keys_phase(indexer, keys, *norms, KEY_EPS, c.qk_rope_head_dim, by_halves), "indexer's keys")
        self._add_choice(indexer)
        self._choice = {"window": c.index_topk, "chosen": indexer.chosen, "chosen_bytes": indexer.chosen_bytes}

    def _indexer(self, slot: int, ratio: int) -> Indexer:
        """A layer's, over keys of so many tokens in a block of cache rows."""
        c = self.config
        sizes = Indexer(c.index_n_heads, c.index_head_dim, c.index_topk, ratio, slot)
        return replace(
            sizes,
            queries=self._vector("indexer's queries", c.index_n_heads * c.index_head_dim),
            weights=self._vector("indexer's weights", c.index_n_heads),
            packed=self._vector("indexer's packed queries", sizes.packed_bytes // 4),
            packed_weights=self._vector("indexer's packed weights", sizes.weight_bytes // 4),
            in_bytes=self._vector("indexer's queries in bytes", sizes.query_bytes // 4),
            states=self._vector("indexer's states", STATE_BYTES // 4),
            room=self._rank_room.address,
            chosen=self._vector("chosen rows", sizes.chosen_bytes // 4),
        )

    def _add_choice(self, indexer: Indexer) -> None:
        """The rows that attention is to go over, int32."""
        *phases, (last, choice) = choice_phases(indexer).items()
        for what, phase in phases:
            self._add(phase, f"indexer's {what}")
        self._add(choice, f"indexer's {last}", "chosen rows")

    def _grouped_attention(self, index: int, cache_layer: int, norm: Input) -> None:
        c = self.config
        name = partial(self._module, index)
        q_proj, k_proj, v_proj, o_proj = (self.tensors.matrix(name(f"{part}_proj")) for part in "qkvo")
        groups, slot = c.num_key_value_heads, self._slots[cache_layer]
        key_width, value_width = groups * c.head_dim, groups * c.v_head_dim
        projected = self._vector("projected queries", c.num_attention_heads * c.head_dim)
        keys, values = self._vector("keys", key_width), self._vector("values", value_width)
        biases = [self._bias(name(f"{part}_proj")) for part in "qkv"]
        self._rows("projections", norm, {"projected queries": q_proj, "keys": k_proj, "values": v_proj}, biases)
        q_norm, k_norm = (self._array(name(f"{part}_norm")) if c.qk_norm else 0 for part in "qk")
        sinks = name("sinks")
        heads = Heads(
            n_groups=groups, per_group=c.num_attention_heads // groups,
            key_width=c.head_dim, value_width=c.v_head_dim, key_slot=slot, value_slot=slot + 1,
            key_row=2 * key_width, value_row=2 * value_width, key_group=2 * c.head_dim, value_group=2 * c.v_head_dim,
            window=c.window(index), sinks=self._array(sinks) if self.tensors.has(sinks) else 0,
        )  # fmt: skip
        queries = self._vector("queries", heads.n_heads * heads.query_width)
        self._add(
            grouped_queries_phase(
                projected,
                queries,
                keys,
                values,
                q_norm=q_norm,
                k_norm=k_norm,
                norms_rows=c.qk_norm_whole,
                by_halves=c.rope == "halves",
                epsilon=c.rms_norm_eps,
                n_heads=c.num_attention_heads,
                n_key_heads=groups,
                head_dim=c.head_dim,
                value_width=value_width,
                n_rope=c.qk_rope_head_dim,
                query_width=heads.query_width,
                scale=attention_scale(c),
                slot=slot,
            ),
            "queries",
            "queries",
        )
        self._attend(heads, queries, None, o_proj, self._bias(name("o_proj")))

    def _mlp(self, index: int, norm: Input) -> None:
        gate, up, down = self._gate_up_down(index, "mlp")
        self._rows("gate, up", norm, {"gate": gate, "up": up})
        self._add_to_x("down", Input(self._vector("gate", gate.n_rows), up=self._vector("up", up.n_rows)), down)

    def _gate_up_down(self, index: int, prefix: str) -> tuple[QuantMatrix, QuantMatrix, QuantMatrix]:
        gate, up, down = (
            self.tensors.matrix(self._name(index, f"{prefix}.{part}_proj")) for part in ("gate", "up", "down")
        )
        return gate, up, down

    def _moe(self, index: int, norm: Input) -> None:
        self._experts(index, norm, *self._router(index, norm), self.x)

    def _router(self, index: int, norm: Input) -> tuple[Router, tuple[int, int, QuantMatrix] | None]:
        """The router, and what expert_phases takes of the shared expert, after the phase of their matrices."""
        c = self.config
        gate_name = self._name(index, "mlp.gate")
        first, shared = {"router": self.tensors.matrix(gate_name)}, None
        if self.tensors.has(self._name(index, "mlp.shared_experts.gate_proj")):
            gate, up, down = self._gate_up_down(index, "mlp.shared_experts")
            first |= {"shared gate": gate, "shared up": up}
            shared = self._vector("shared gate", gate.n_rows), self._vector("shared up", up.n_rows), down
        self._rows("router", norm, first, [self._bias(gate_name)] + [0] * (len(first) - 1))
        bias_name = self._name(index, "mlp.gate.e_score_correction_bias")
        bias = self._array(bias_name) if self.tensors.has(bias_name) else 0
        table = self.program.keep(self.tensors.expert_ids(index)) if index < c.num_hash_layers else 0
        router = Router(
            self._vector("router", c.n_routed_experts), bias, c.n_routed_experts, c.num_experts_per_tok, c.n_group,
            c.topk_group, SCORING[c.scoring_func], c.norm_topk_prob, c.routed_scaling_factor, table,
            self._remote.owners(index) if self._remote else 0,
        )  # fmt: skip
        return router, shared

    def _experts(
        self, index: int, input_: Input, router: Router, shared: tuple[int, int, QuantMatrix] | None, out: int,
        **options: Any,
    ) -> None:  # fmt: skip
        """The routed experts and the shared one, by expert_phases."""
        c = self.config
        experts = self.tensors.expert_matrices(index)
        n_inner = c.num_experts_per_tok * experts.gate.n_rows
        gate_out, up_out = self._vector("experts' gate", n_inner), self._vector("experts' up", n_inner)
        others = self._remote.told(index) if self._remote else NOBODY
        into = options.pop("into", None)
        gate_up, down = expert_phases(
            input_, router, experts, gate_out, up_out, shared, out, self.pool.n_workers,
            into=into if others is NOBODY else None, told=others, **options,
        )  # fmt: skip
        self._add(gate_up, "experts' gate, up", "experts' gate", "experts' up")
        self._add(down, "experts' down", "x")
        if others is not NOBODY:
            self._add(self._remote.collect_phase(out, into), "other ranks' sums", "x")


class DecodeStep(Layers):
    """The step of one model. Its buffers hold a few tokens, so one step at a time."""

    def __init__(self, config: Config, tensors: GGUFTensors, pool: Pool, remote: Remote | None = None):
        """The tensors must stay mapped. remote: as Layers has it."""
        n_layers = config.num_hidden_layers
        cached = [row_widths(config, index) for index in range(n_layers)]
        super().__init__(config, tensors, pool, tensors.matrix(names.EMBED_TOKENS), cached, remote)
        for index in range(n_layers):
            self._layer(index, index)
        self._head(names.NORM, tensors.matrix(names.lm_head(tensors.has)))
