"""Decoding a few tokens in one call: a model's tensors laid out as phases that the workers run without Python or torch.

The network itself is network/model.py, for any number of tokens; this is the same arithmetic over the same weights and
caches, and is tested against it.
"""

from collections.abc import Sequence

import numpy as np

from localrun.models import names
from localrun.models.config import Config
from localrun.models.tensors import GGUFTensors
from localrun.network.cache import Cache
from localrun.network.rope import attention_scale, frequencies, rotation_magnitude
from quant.decode.attention import Heads, attend_phase, lift_phase
from quant.decode.experts import SIGMOID, SOFTMAX, SOFTMAX_AFTER_TOPK, Router, expert_phases
from quant.decode.linear import Input, normed, rows_phase
from quant.decode.program import MOST_TOKENS, Program
from quant.decode.queries import grouped_queries_phase, latent_queries_phase
from quant.matrix import QuantMatrix
from quant.threads.pool import Pool

SCORING = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "softmax_after_topk": SOFTMAX_AFTER_TOPK}
_HEADS_TOGETHER = 16  # of MLA: they share each expanded cache row; more would crowd the second-level cache


class Layers:
    """A program whose phases are layers of a model, laid out one after the other. T: quant.decode.program.MOST_TOKENS.

    Attributes:
        x: address of float32 (T, hidden_size), the sums that layers add to; set before the first.
    """

    def __init__(self, config: Config, tensors: GGUFTensors, pool: Pool, embedding: QuantMatrix, n_layers: int):
        """The tensors must stay mapped. n_layers: with a cache row each."""
        self.config, self.tensors, self.pool = config, tensors, pool
        factors = tensors.array(names.ROPE_FREQS) if tensors.has(names.ROPE_FREQS) else None
        n_slots = n_layers * (1 if config.attention == "mla" else 2)
        self.program = Program(pool, embedding, frequencies(config, factors), rotation_magnitude(config), n_slots)
        self.x = self.program.x
        self._buffers: dict[str, tuple[int, int]] = {}

    def _layer(self, index: int, cache_layer: int) -> None:
        """Layer `index` of the file, over one layer of the cache."""
        norm = self._normed(self.x, names.layer(index, "input_layernorm"))
        if self.config.attention == "mla":
            self._latent_attention(index, cache_layer, norm)
        else:
            self._grouped_attention(index, cache_layer, norm)
        norm = self._normed(self.x, names.layer(index, "post_attention_layernorm"))
        if self.tensors.has(names.layer(index, "mlp.gate")):
            self._moe(index, norm)
        else:
            self._mlp(index, norm)

    def _head(self, norm: str, head: QuantMatrix) -> None:
        """The last phase: logits of the normed sums."""
        self._final, self._logits = self._normed(self.x, norm), np.zeros((MOST_TOKENS, head.n_rows), np.float32)
        logits = self.program.keep(self._logits)
        self.program.add(rows_phase(self._final, [(head, logits)], self.pool.n_workers, is_head=True))
        self.program.finish()

    def __call__(self, ids: Sequence[int], cache: Cache, n_logits: int) -> np.ndarray:
        """Evaluate up to MOST_TOKENS ids, which the cache then holds.

        Returns:
            float32 (n_logits, vocab): the logits after the last ones.

        Raises:
            ContextFullError: the cache has no room for them.
        """
        cache.check_room(len(ids))
        first = len(ids) - n_logits
        self.program.run(ids, cache.length, cache.addresses, first)
        cache.advance(len(ids))
        return self._logits[first : len(ids)].copy()

    def hidden(self, first: int, last: int) -> np.ndarray:
        """float32 (last - first, hidden_size): what the head reads of the last step's tokens first..last."""
        return normed(self._final, first, last, self.config.hidden_size)

    def _array(self, name: str) -> int:
        """Address of a 1-D tensor in float32."""
        return self.program.keep(self.tensors.array(name))

    def _normed(self, x: int, name: str) -> Input:
        """The vector at x after the norm `name`."""
        return Input(x, self._array(name), self.config.rms_norm_eps)

    def _vector(self, name: str, n: int) -> int:
        """Address of float32 (T, n) that all layers use in turn under this name."""
        address, size = self._buffers.get(name, (0, -1))
        if size < n:
            address = self.program.vector(n)
            self._buffers[name] = address, n
        return address

    def _rows(self, input_: Input, matrices: list[tuple[QuantMatrix, int]], residual: bool = False) -> None:
        self.program.add(rows_phase(input_, matrices, self.pool.n_workers, residual))

    def _attend(self, heads: Heads, queries: int, v_b: QuantMatrix | None, o_proj: QuantMatrix) -> None:
        """From turned queries to the sum with the residual."""
        partials = self._vector("partials", heads.partials_bytes // 4)
        mixed = self._vector("mixed", o_proj.n_cols)
        self.program.add(attend_phase(heads, queries, partials))
        self.program.add(lift_phase(heads, partials, v_b, mixed))
        self._rows(Input(mixed), [(o_proj, self.x)], residual=True)

    def _latent_attention(self, index: int, cache_layer: int, norm: Input) -> None:
        c = self.config

        def name(module: str) -> str:
            return names.layer(index, f"self_attn.{module}")

        row_width = c.kv_lora_rank + c.qk_rope_head_dim
        q_width = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        projected, kv = self._vector("queries projected", q_width), self._vector("kv", row_width)
        kv_a = (self.tensors.matrix(name("kv_a_proj_with_mqa")), kv)
        if c.q_lora_rank is None:
            self._rows(norm, [(self.tensors.matrix(name("q_proj")), projected), kv_a])
        else:
            q_a = self._vector("q_a", c.q_lora_rank)
            self._rows(norm, [(self.tensors.matrix(name("q_a_proj")), q_a), kv_a])
            q_norm = self._normed(q_a, name("q_a_layernorm"))
            self._rows(q_norm, [(self.tensors.matrix(name("q_b_proj")), projected)])
        is_split = self.tensors.has(name("k_b_proj"))
        if is_split:
            k_b, v_b = self.tensors.matrix(name("k_b_proj")), self.tensors.matrix(name("v_b_proj"))
        else:
            rows = c.qk_nope_head_dim, c.v_head_dim
            k_b, v_b = self.tensors.split_matrix(name("kv_b_proj"), c.num_attention_heads, rows)
        together = max(n for n in range(1, _HEADS_TOGETHER + 1) if c.num_attention_heads % n == 0)
        heads = Heads(
            n_groups=c.num_attention_heads // together, per_group=together,
            key_width=row_width, value_width=c.kv_lora_rank, key_slot=cache_layer, value_slot=cache_layer,
            key_row=2 * row_width, value_row=2 * row_width, key_group=0, value_group=0,
        )  # fmt: skip
        queries = self._vector("queries", heads.n_heads * heads.query_width)
        self.program.add(
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
                slot=cache_layer,
            )
        )
        self._attend(heads, queries, v_b, self.tensors.matrix(name("o_proj")))

    def _grouped_attention(self, index: int, cache_layer: int, norm: Input) -> None:
        c = self.config
        q_proj, k_proj, v_proj, o_proj = (
            self.tensors.matrix(names.layer(index, f"self_attn.{part}_proj")) for part in "qkvo"
        )
        groups = c.num_key_value_heads
        key_width, value_width = groups * c.head_dim, groups * c.v_head_dim
        projected = self._vector("queries projected", c.num_attention_heads * c.head_dim)
        keys, values = self._vector("keys", key_width), self._vector("values", value_width)
        self._rows(norm, [(q_proj, projected), (k_proj, keys), (v_proj, values)])
        q_norm, k_norm = (
            self._array(names.layer(index, f"self_attn.{part}_norm")) if c.qk_norm else 0 for part in "qk"
        )
        heads = Heads(
            n_groups=groups, per_group=c.num_attention_heads // groups,
            key_width=c.head_dim, value_width=c.v_head_dim, key_slot=2 * cache_layer, value_slot=2 * cache_layer + 1,
            key_row=2 * key_width, value_row=2 * value_width, key_group=2 * c.head_dim, value_group=2 * c.v_head_dim,
        )  # fmt: skip
        queries = self._vector("queries", heads.n_heads * heads.query_width)
        self.program.add(
            grouped_queries_phase(
                projected,
                queries,
                keys,
                values,
                q_norm=q_norm,
                k_norm=k_norm,
                by_halves=c.rope == "halves",
                epsilon=c.rms_norm_eps,
                n_heads=c.num_attention_heads,
                n_key_heads=groups,
                head_dim=c.head_dim,
                value_width=value_width,
                n_rope=c.qk_rope_head_dim,
                query_width=heads.query_width,
                scale=attention_scale(c),
                slot=2 * cache_layer,
            )
        )
        self._attend(heads, queries, None, o_proj)

    def _mlp(self, index: int, norm: Input) -> None:
        gate, up, down = self._gate_up_down(index, "mlp")
        self._rows(norm, [gate, up])
        self._rows(Input(gate[1], up=up[1]), [(down, self.x)], residual=True)

    def _gate_up_down(
        self, index: int, prefix: str
    ) -> tuple[tuple[QuantMatrix, int], tuple[QuantMatrix, int], QuantMatrix]:
        """Gate and up with the places of their outputs, and down."""
        gate, up, down = (
            self.tensors.matrix(names.layer(index, f"{prefix}.{part}_proj")) for part in ("gate", "up", "down")
        )
        gated, upped = (self._vector(f"{prefix} {part}", gate.n_rows) for part in ("gated", "upped"))
        return (gate, gated), (up, upped), down

    def _moe(self, index: int, norm: Input) -> None:
        c = self.config
        logits = self._vector("router", c.n_routed_experts)
        first, shared = [(self.tensors.matrix(names.layer(index, "mlp.gate")), logits)], None
        if self.tensors.has(names.layer(index, "mlp.shared_experts.gate_proj")):
            gate, up, down = self._gate_up_down(index, "mlp.shared_experts")
            first += [gate, up]
            shared = gate[1], up[1], down
        self._rows(norm, first)
        bias_name = names.layer(index, "mlp.gate.e_score_correction_bias")
        bias = self._array(bias_name) if self.tensors.has(bias_name) else 0
        router = Router(
            logits, bias, c.n_routed_experts, c.num_experts_per_tok, c.n_group, c.topk_group,
            SCORING[c.scoring_func], c.norm_topk_prob, c.routed_scaling_factor,
        )  # fmt: skip
        experts = self.tensors.expert_matrices(index)
        n_inner = c.num_experts_per_tok * experts.gate.n_rows
        gated, upped = self._vector("experts gated", n_inner), self._vector("experts upped", n_inner)
        for phase in expert_phases(norm, router, experts, gated, upped, shared, self.x, self.pool.n_workers):
            self.program.add(phase)


class DecodeStep(Layers):
    """The step of one model. Its buffers hold a few tokens of one context, so one step at a time."""

    def __init__(self, config: Config, tensors: GGUFTensors, pool: Pool):
        """The tensors must stay mapped."""
        n_layers = config.num_hidden_layers
        super().__init__(config, tensors, pool, tensors.matrix(names.EMBED_TOKENS), n_layers)
        for index in range(n_layers):
            self._layer(index, index)
        self._head(names.NORM, tensors.matrix(names.LM_HEAD if tensors.has(names.LM_HEAD) else names.EMBED_TOKENS))
