"""Decoding a few tokens in one call: a model's tensors laid out as phases that the workers run without Python or torch.

The network itself is network/model.py, for any number of tokens; this is the same arithmetic over the same weights and
caches, and is tested against it.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from localrun.cpu.model_program import ModelProgram
from localrun.models import names
from localrun.models.config import Config
from localrun.models.indexer import KEY_EPS
from localrun.models.tensors import GGUFTensors
from localrun.network.cache import row_widths
from localrun.network.rope import attention_scale
from localrun.ranks.remote import Remote
from quant.decode import attention_i8, attention_i16
from quant.decode.attention import Heads, attend_phase
from quant.decode.experts import NOBODY, expert_phases
from quant.decode.indexer import STATE_BYTES, Indexer, choice_phases, indexer_keys_phase
from quant.decode.linear import Input
from quant.decode.queries import grouped_queries_phase, latent_queries_phase
from quant.decode.router import SIGMOID, SOFTMAX, SOFTMAX_AFTER_TOPK, SQRT_SOFTPLUS, Router
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


class Layers(ModelProgram):
    """Phases that are layers of a model."""

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

    def _module(self, index: int, module: str) -> str:
        """Of a module of a layer's attention."""
        return self._name(index, f"self_attn.{module}")

    def _attend(self, heads: Heads, queries: int, v_b: QuantMatrix | None, o_proj: QuantMatrix, bias: int = 0) -> None:
        """From rotated queries to the sum with the residual; bias: of the output.

        In integers where v_b's products are in integers of fewer bits.
        """
        partials = self._vector("partials", heads.partials_bytes // 4)
        values = self._vector("heads' values", o_proj.n_cols)
        make = attend_phase
        if v_b is not None and v_b.format.integer:
            if attention_i16.fits(heads):
                make = attention_i16.integer_attend_phase
            elif attention_i8.fits(heads):
                make = attention_i8.byte_attend_phase
        self._add(make(heads, queries, partials), "attend", "partials")
        self._add(project_values_phase(heads, partials, v_b, values), "values", "heads' values")
        self._add_to_x("output", Input(values), o_proj, bias)

    def _latent_attention(self, index: int, cache_layer: int, norm: Input) -> None:
        c, slot = self.config, self._slots[cache_layer]
        name = partial(self._module, index)
        row_width = c.kv_lora_rank + c.qk_rope_head_dim
        projected, kv = self._latent_projections(index, norm, row_width)
        k_b, v_b = self._up_projections(index)
        if c.chooses_rows(index):
            self._choose_rows(index, slot + 1)
        elif index >= c.num_hidden_layers:  # for multi-token prediction: dense
            self._choice = {}
        together, in_bytes = heads_together(c.num_attention_heads), self._cache_bits == 8
        kind = c.rows(index)[0]
        row_bytes, n_codes = kind.stored_bytes(self._cache_bits), c.kv_lora_rank * in_bytes
        is_scaled = kind.is_scaled and not in_bytes
        heads = Heads(
            n_groups=c.num_attention_heads // together, per_group=together,
            key_width=row_width, value_width=c.kv_lora_rank, key_slot=slot, value_slot=slot,
            key_row=row_bytes, value_row=row_bytes, key_group=0, value_group=0, key_codes=n_codes, value_codes=n_codes,
            is_scaled=is_scaled, **self._choice,
        )  # fmt: skip
        queries = self._vector("queries", heads.n_heads * heads.query_width)
        self._add(
            latent_queries_phase(
                projected,
                queries,
                kv,
                self._array(name("kv_a_layernorm")),
                k_b,
                transposed=not self.tensors.has(name("k_b_proj")),
                n_rope=c.qk_rope_head_dim,
                query_width=heads.query_width,
                scale=attention_scale(c),
                epsilon=c.rms_norm_eps,
                slot=slot,
                row_bytes=row_bytes,
                in_bytes=in_bytes,
                is_scaled=is_scaled,
            ),
            "queries",
            "queries",
        )
        self._attend(heads, queries, v_b, self.tensors.matrix(name("o_proj")))

    def _latent_projections(self, index: int, norm: Input, row_width: int) -> tuple[int, int]:
        """Addresses of the queries, and of latents with the key behind them, after the phases of their matrices."""
        c, matrix = self.config, self.tensors.matrix
        name = partial(self._module, index)
        q_width = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        projected, kv = self._vector("projected queries", q_width), self._vector("kv", row_width)
        kv_a = matrix(name("kv_a_proj_with_mqa"))
        if c.q_lora_rank is None:
            self._rows("projections", norm, {"projected queries": matrix(name("q_proj")), "kv": kv_a})
            return projected, kv
        first, second = {"q_a": matrix(name("q_a_proj")), "kv": kv_a}, {"projected queries": matrix(name("q_b_proj"))}
        if c.chooses_rows(index):
            first["indexer's keys"] = matrix(name("indexer.wk"))
            first["indexer's weights"] = matrix(name("indexer.weights_proj"))
            second["indexer's queries"] = matrix(name("indexer.wq_b"))
        self._rows("projections", norm, first)
        q_norm = self._normed(self._vector("q_a", c.q_lora_rank), name("q_a_layernorm"))
        self._rows("q_b", q_norm, second)
        return projected, kv

    def _up_projections(self, index: int) -> tuple[QuantMatrix, QuantMatrix]:
        """k_b and v_b, a group a head; of one tensor its parts, of which k_b's rows are columns then."""
        c, name = self.config, partial(self._module, index)
        if self.tensors.has(name("k_b_proj")):
            return self.tensors.matrix(name("k_b_proj")), self.tensors.matrix(name("v_b_proj"))
        rows = c.qk_nope_head_dim, c.v_head_dim
        return self.tensors.split_matrix(name("kv_b_proj"), c.num_attention_heads, rows)

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
        sinks, in_bytes = name("sinks"), self._cache_bits == 8
        key_row, value_row = (kind.stored_bytes(self._cache_bits) for kind in c.rows(index))
        heads = Heads(
            n_groups=groups, per_group=c.num_attention_heads // groups,
            key_width=c.head_dim, value_width=c.v_head_dim, key_slot=slot, value_slot=slot + 1,
            key_row=key_row, value_row=value_row, key_group=key_row // groups, value_group=value_row // groups,
            key_codes=c.head_dim * in_bytes, value_codes=c.v_head_dim * in_bytes,
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
                row_bytes=key_row,
                value_bytes=value_row,
                in_bytes=in_bytes,
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
        """The router, and what expert_phases takes of the shared expert, after the phase of their matrices.

        Where other ranks wait for the router, the shared expert's come behind (_experts).
        """
        c = self.config
        gate_name = self._name(index, "mlp.gate")
        first, shared = {"router": self.tensors.matrix(gate_name)}, None
        if rows := self._shared_rows(index):
            if not self._tells(index):
                first |= rows
            vectors = (self._vector(name, matrix.n_rows) for name, matrix in rows.items())
            shared = *vectors, self.tensors.matrix(self._name(index, "mlp.shared_experts.down_proj"))
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

    def _shared_rows(self, index: int) -> dict[str, QuantMatrix]:
        """The shared expert's first two matrices, by what they give; none of a layer without one."""
        if not self.tensors.has(self._name(index, "mlp.shared_experts.gate_proj")):
            return {}
        gate, up, _ = self._gate_up_down(index, "mlp.shared_experts")
        return {"shared gate": gate, "shared up": up}

    def _tells(self, index: int) -> bool:
        """Whether other ranks have shares of a layer's experts."""
        return self._remote is not None and self._remote.has(index)

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
        if shared and others is not NOBODY:  # messages are under way meanwhile
            self._rows("shared gate, up", input_, self._shared_rows(index))
        self._add(down, "experts' down", "x")
        if others is not NOBODY:
            self._add(self._remote.collect_phase(out, into), "other ranks' sums", "x")


class DecodeStep(Layers):
    """The step of one model. Its buffers hold a few tokens, so one step at a time."""

    def __init__(
        self, config: Config, tensors: GGUFTensors, pool: Pool, remote: Remote | None = None, cache_bits: int = 16
    ):
        """The tensors must stay mapped. remote, cache_bits: as Layers has them."""
        n_layers = config.num_hidden_layers
        cached = [row_widths(config, index) for index in range(n_layers)]
        super().__init__(config, tensors, pool, tensors.matrix(names.EMBED_TOKENS), cached, remote, cache_bits)
        for index in range(n_layers):
            self._layer(index, index)
        self._head(names.NORM, tensors.matrix(names.lm_head(tensors.has)))
