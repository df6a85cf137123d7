"""Decoding one token in one call: the network's modules laid out as phases that the workers run without Python.

The network itself is model.py, for any number of tokens; this is the same arithmetic over the same weights and caches,
and is tested against it.
"""

import numpy as np
import torch

from localrun.attention import GroupedQueryAttention, LatentAttention
from localrun.cache import Cache
from localrun.moe import MLP, MoE
from localrun.rope import Rope
from quant.linear import Weight
from quant.pool import Pool
from quant.step import Program
from quant.step_attention import Heads, attend_phase, lift_phase
from quant.step_experts import SIGMOID, SOFTMAX, SOFTMAX_AFTER_TOPK, Router, expert_phases
from quant.step_queries import grouped_queries_phase, latent_queries_phase
from quant.step_rows import Input, rows_phase

_SCORING = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "softmax_after_topk": SOFTMAX_AFTER_TOPK}
_HEADS_TOGETHER = 16  # of MLA: they share each expanded cache row; more would crowd the second-level cache


class DecodeStep:
    """The step of one model. Its buffers hold one token, so one step at a time."""

    def __init__(self, model, pool: Pool):
        """`model`: a localrun.model.Model; its weights must stay mapped."""
        self.config, self.pool = model.config, pool
        rope: Rope = model.rope
        n_slots = self.config.num_hidden_layers * (1 if self.config.kv_lora_rank else 2)
        embedding = model.embed_tokens.weight
        self.program = Program(pool, embedding, rope.frequencies, rope.magnitude, n_slots)
        self._buffers: dict[str, tuple[int, int]] = {}
        for index, layer in enumerate(model.layers):
            norm = Input(self.program.x, self._norm(layer.input_layernorm), self.config.rms_norm_eps)
            if isinstance(layer.self_attn, LatentAttention):
                self._latent_attention(layer.self_attn, index, norm)
            else:
                self._grouped_attention(layer.self_attn, index, norm)
            norm = Input(self.program.x, self._norm(layer.post_attention_layernorm), self.config.rms_norm_eps)
            if isinstance(layer.mlp, MoE):
                self._moe(layer.mlp, norm)
            else:
                self._mlp(layer.mlp, norm)
        head: Weight = model.lm_head.weight
        self._logits = np.zeros(head.n_rows, np.float32)
        norm = Input(self.program.x, self._norm(model.norm), self.config.rms_norm_eps)
        self._rows(norm, [(head, self.program.keep(self._logits))])
        self.program.finish()

    def __call__(self, token: int, cache: Cache) -> np.ndarray:
        """float32 (vocab,): the logits after `token`, which the cache then holds. Raises ContextFullError."""
        cache.check_room(1)
        self.program.run(token, cache.length, cache.addresses)
        cache.advance(1)
        return self._logits.copy()

    def _norm(self, weight: torch.Tensor) -> int:
        """Address of a norm's weight."""
        return self.program.keep(weight.numpy())

    def _vector(self, name: str, n: int) -> int:
        """Address of float32 (n,) that all layers use in turn under this name."""
        address, size = self._buffers.get(name, (0, -1))
        if size < n:
            address = self.program.vector(n)
            self._buffers[name] = address, n
        return address

    def _rows(self, input_: Input, matrices: list[tuple[Weight, int]], residual: bool = False) -> None:
        self.program.add(rows_phase(input_, matrices, self.pool.n_workers, residual))

    def _attend(self, heads: Heads, queries: int, v_b: Weight | None, o_proj: Weight) -> None:
        """From turned queries to the sum with the residual."""
        partials = self._vector("partials", heads.partials_bytes // 4)
        mixed = self._vector("mixed", o_proj.n_cols)
        self.program.add(attend_phase(heads, queries, partials))
        self.program.add(lift_phase(heads, partials, v_b, mixed))
        self._rows(Input(mixed), [(o_proj, self.program.x)], residual=True)

    def _latent_attention(self, attention: LatentAttention, index: int, norm: Input) -> None:
        c = self.config
        row_width = c.kv_lora_rank + c.qk_rope_head_dim
        q_width = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        projected, kv = self._vector("queries projected", q_width), self._vector("kv", row_width)
        kv_a = (attention.kv_a_proj_with_mqa.weight, kv)
        if c.q_lora_rank is None:
            self._rows(norm, [(attention.q_proj.weight, projected), kv_a])
        else:
            q_a = self._vector("q_a", c.q_lora_rank)
            self._rows(norm, [(attention.q_a_proj.weight, q_a), kv_a])
            q_norm = Input(q_a, self._norm(attention.q_a_layernorm), c.rms_norm_eps)
            self._rows(q_norm, [(attention.q_b_proj.weight, projected)])
        together = max(n for n in range(1, _HEADS_TOGETHER + 1) if c.num_attention_heads % n == 0)
        heads = Heads(
            n_groups=c.num_attention_heads // together, per_group=together,
            key_width=row_width, value_width=c.kv_lora_rank, key_slot=index, value_slot=index,
            key_row=2 * row_width, value_row=2 * row_width, key_group=0, value_group=0,
        )  # fmt: skip
        queries = self._vector("queries", heads.n_heads * heads.query_width)
        self.program.add(
            latent_queries_phase(
                projected,
                queries,
                kv,
                self._norm(attention.kv_a_layernorm),
                attention.k_b_proj.weight,
                transposed=not attention.is_split,
                n_rope=c.qk_rope_head_dim,
                query_width=heads.query_width,
                scale=attention.scale,
                epsilon=c.rms_norm_eps,
                slot=index,
            )
        )
        self._attend(heads, queries, attention.v_b_proj.weight, attention.o_proj.weight)

    def _grouped_attention(self, attention: GroupedQueryAttention, index: int, norm: Input) -> None:
        c = self.config
        groups = c.num_key_value_heads
        key_width, value_width = groups * c.head_dim, groups * c.v_head_dim
        projected = self._vector("queries projected", c.num_attention_heads * c.head_dim)
        keys, values = self._vector("keys", key_width), self._vector("values", value_width)
        matrices = [(attention.q_proj.weight, projected), (attention.k_proj.weight, keys)]
        self._rows(norm, [*matrices, (attention.v_proj.weight, values)])
        heads = Heads(
            n_groups=groups, per_group=c.num_attention_heads // groups,
            key_width=c.head_dim, value_width=c.v_head_dim, key_slot=2 * index, value_slot=2 * index + 1,
            key_row=2 * key_width, value_row=2 * value_width, key_group=2 * c.head_dim, value_group=2 * c.v_head_dim,
        )  # fmt: skip
        queries = self._vector("queries", heads.n_heads * heads.query_width)
        self.program.add(
            grouped_queries_phase(
                projected,
                queries,
                keys,
                values,
                n_heads=c.num_attention_heads,
                n_key_heads=groups,
                head_dim=c.head_dim,
                value_width=value_width,
                n_rope=c.qk_rope_head_dim,
                query_width=heads.query_width,
                scale=attention.scale,
                slot=2 * index,
            )
        )
        self._attend(heads, queries, None, attention.o_proj.weight)

    def _mlp(self, mlp: MLP, norm: Input) -> None:
        gate, up = self._gate_and_up(mlp, "mlp")
        self._rows(norm, [gate, up])
        self._rows(Input(gate[1], up=up[1]), [(mlp.down_proj.weight, self.program.x)], residual=True)

    def _gate_and_up(self, mlp: MLP, name: str) -> tuple[tuple[Weight, int], tuple[Weight, int]]:
        """Both matrices with where their outputs go."""
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
        return (gate, self._vector(f"{name} gated", gate.n_rows)), (up, self._vector(f"{name} upped", up.n_rows))

    def _moe(self, moe: MoE, norm: Input) -> None:
        c = self.config
        logits = self._vector("router", c.n_routed_experts)
        first, shared = [(moe.gate.weight, logits)], None
        if moe.shared_experts is not None:
            gate, up = self._gate_and_up(moe.shared_experts, "shared")
            first += [gate, up]
            shared = gate[1], up[1], moe.shared_experts.down_proj.weight
        self._rows(norm, first)
        bias = 0 if moe.e_score_correction_bias is None else self._norm(moe.e_score_correction_bias)
        router = Router(
            logits, bias, c.n_routed_experts, c.num_experts_per_tok, c.n_group, c.topk_group,
            _SCORING[c.scoring_func], c.norm_topk_prob, c.routed_scaling_factor,
        )  # fmt: skip
        experts = moe.experts.experts
        n_inner = c.num_experts_per_tok * experts.gate.n_rows
        gated, upped = self._vector("experts gated", n_inner), self._vector("experts upped", n_inner)
        x = self.program.x
        for phase in expert_phases(norm, router, experts, gated, upped, shared, x, self.pool.n_workers):
            self.program.add(phase)
