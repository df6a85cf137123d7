"""DeepSeek-V3 for training: multi-head latent attention, routed experts, one module for multi-token prediction (MTP).

Parameters have the names that transformers' DeepseekV3ForCausalLM gives them; the MTP module is the layer behind the
last, as in V3's checkpoints, and shares embedding and head. It takes the main model's hidden state after the final norm
and the embedding of the next token, and predicts the token after that: vLLM's deepseek_mtp.py and SGLang's
deepseek_nextn.py feed it so. Everything is float32 but the operands of linear layers (miniature.precision).

B batch, T tokens of a sequence, N = B*T, D hidden_size, H heads, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from miniature.config import Config
from miniature.elementwise import queries_keys_values, rms_norm, swiglu
from miniature.precision import PRECISIONS, Precision, grouped_linear, linear
from miniature.routing import Dispatch, Router

# Deviation of a weight matrix in units of 1/sqrt(inputs); what ends in the residual stream is damped by its depth.
INIT_GAIN = 0.6


class Linear(nn.Module):
    """A weight (O, I) without a bias."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))


class RMSNorm(nn.Module):
    """x over its root mean square, times a weight by feature."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Rope:
    """Cosines and sines (T, 1, R/2) of positions 0 to T-1."""

    def __init__(self, config: Config, n_positions: int) -> None:
        exponents = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float32) / config.qk_rope_head_dim
        angles = torch.outer(torch.arange(n_positions, dtype=torch.float32), 1.0 / config.rope_theta**exponents)
        self.cos, self.sin = angles.cos()[:, None], angles.sin()[:, None]


class Attention(nn.Module):
    """Multi-head latent attention, not absorbed."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        c = self.config = config
        self.precision = precision
        head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
        self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = Linear(c.q_lora_rank, c.num_attention_heads * head_dim)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = Linear(c.kv_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """(B, T, D) from the same."""
        c, (batch, length, _) = self.config, x.shape
        heads = (batch, length, c.num_attention_heads, -1)
        down = torch.cat((self.q_a_proj.weight, self.kv_a_proj_with_mqa.weight))
        latent = linear(x.flatten(0, 1), down, self.precision)
        q_latent, kv_latent, k_rope = latent.split((c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim), -1)
        q = linear(self.q_a_layernorm(q_latent), self.q_b_proj.weight, self.precision).view(heads)
        kv = linear(self.kv_a_layernorm(kv_latent), self.kv_b_proj.weight, self.precision).view(heads)
        k_rope = k_rope.reshape(batch, length, 1, -1)
        q, k, v = queries_keys_values(q, kv, k_rope, rope.cos, rope.sin, c.v_head_dim)
        out = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (q, k, v)), is_causal=True)
        out = out.transpose(1, 2)[..., : c.v_head_dim].flatten(2)  # values were padded: torch's kernel has one width
        return linear(out.flatten(0, 1), self.o_proj.weight, self.precision).view(x.shape)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, n_in: int, n_inner: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.gate_proj, self.up_proj = Linear(n_in, n_inner), Linear(n_in, n_inner)
        self.down_proj = Linear(n_inner, n_in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) from the same."""
        gate_up = linear(x, torch.cat((self.gate_proj.weight, self.up_proj.weight)), self.precision)
        return linear(swiglu(gate_up), self.down_proj.weight, self.precision)


class Experts(nn.Module):
    """Routed experts, gate and up stacked."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        n, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.precision = precision
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(n, hidden, inner))

    def forward(self, x: torch.Tensor, n_rows: list[int]) -> torch.Tensor:
        """Rows of x, sorted by expert, each through its own."""
        gate_up = grouped_linear(x, self.gate_up_proj, n_rows, self.precision)
        return grouped_linear(swiglu(gate_up), self.down_proj, n_rows, self.precision)


class MoE(nn.Module):
    """Routed experts and the shared one."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config, precision)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared, precision)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) from the same."""
        weights, experts = self.gate(x)
        dispatch = Dispatch(experts, self.gate.load)
        return dispatch.combine(self.experts(dispatch.sort(x), dispatch.n_rows), weights) + self.shared_experts(x)


class Layer(nn.Module):
    """A decoder block."""

    def __init__(self, config: Config, index: int, precision: Precision) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, precision)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = config.is_dense(index)
        self.mlp = MLP(config.hidden_size, config.inner_size(index), precision) if dense else MoE(config, precision)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """(B, T, D) from the same."""
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x).flatten(0, 1)).view(x.shape)


class MTPLayer(Layer):
    """The block that predicts one token further, with what joins a hidden state and an embedding."""

    def __init__(self, config: Config, index: int, precision: Precision) -> None:
        super().__init__(config, index, precision)
        self.precision = precision
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def join(self, hidden: torch.Tensor, embedded: torch.Tensor, rope: Rope) -> torch.Tensor:
        """(B, T, D), ready for the head, from hidden states after the final norm and embeddings of the next tokens."""
        both = torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1).flatten(0, 1)
        x = linear(both, self.eh_proj.weight, self.precision).view(hidden.shape)
        return self.shared_head["norm"](self(x, rope))


class Trunk(nn.Module):
    """Embedding, layers with the MTP module as the last, final norm."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers: list[Layer] = [Layer(config, index, precision) for index in range(config.num_hidden_layers)]
        if config.num_nextn_predict_layers:
            layers.append(MTPLayer(config, config.num_hidden_layers, precision))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Model(nn.Module):
    """The miniature.

    Args:
        precision: a key of miniature.precision.PRECISIONS.
        seed: of the initial weights.
    """

    def __init__(self, config: Config, precision: str = "f32", seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config, PRECISIONS[precision])
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        _initialise(self, torch.Generator().manual_seed(seed))
        self._rope: dict[int, Rope] = {}

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 (B, T, D): hidden states after the final norm for ids (B, T)."""
        x, rope = self.model.embed_tokens(ids), self._rope_of(ids.shape[1])
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            x = layer(x, rope)
        return self.model.norm(x)

    def draft_hidden(self, hidden: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
        """float32 (B, T, D): the MTP module's states, which the head turns into predictions two tokens on.

        Args:
            hidden: (B, T, D), of self.hidden.
            next_ids: (B, T), the token after each state's own.
        """
        return self.model.layers[-1].join(hidden, self.model.embed_tokens(next_ids), self._rope_of(next_ids.shape[1]))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 (..., V)."""
        return F.linear(hidden, self.lm_head.weight)

    def losses(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy in nats of the next token, and of the one after by the MTP module, for ids (B, T+2)."""
        hidden = self.hidden(ids[:, :-2])
        main = cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, ids[:, 1:-1].flatten())
        if not self.config.num_nextn_predict_layers:
            return main, torch.zeros(())
        drafted = self.draft_hidden(hidden, ids[:, 1:-1])
        return main, cross_entropy(drafted.flatten(0, 1), self.lm_head.weight, ids[:, 2:].flatten())

    def routers(self) -> Iterator[tuple[int, Router]]:
        """Layer and router of every layer with experts."""
        for index, layer in enumerate(self.model.layers):
            if isinstance(layer.mlp, MoE):
                yield index, layer.mlp.gate

    def _rope_of(self, n_positions: int) -> Rope:
        if n_positions not in self._rope:
            self._rope[n_positions] = Rope(self.config, n_positions)
        return self._rope[n_positions]


def _initialise(model: Model, generator: torch.Generator) -> None:
    """Normal weights in the order of names, so that a seed says all; norms stay 1."""
    depth = math.sqrt(2 * len(model.model.layers))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            continue
        damping = depth if "o_proj" in name or "down_proj" in name else 1.0
        deviation = INIT_GAIN / math.sqrt(parameter.shape[-1]) / damping
        nn.init.normal_(parameter, std=deviation, generator=generator)


class _CrossEntropy(torch.autograd.Function):
    """Head and loss together, a chunk of rows at a time: the logits of a whole batch never exist.

    The gradients are computed on the way forward, for a loss whose own gradient is a scalar.
    """

    CHUNK = 1024

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total, grad_hidden, grad_head = hidden.new_zeros(()), torch.empty_like(hidden), torch.zeros_like(head)
        chunks = (tensor.split(_CrossEntropy.CHUNK) for tensor in (hidden, targets, grad_hidden))
        for rows, wanted, grad_rows in zip(*chunks, strict=True):
            logits = rows @ head.t()
            total += F.cross_entropy(logits, wanted, reduction="sum")
            grad = torch.softmax(logits, -1, out=logits)
            grad[torch.arange(len(wanted)), wanted] -= 1
            torch.mm(grad, head, out=grad_rows)
            grad_head.addmm_(grad.t(), rows)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.n_rows = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        factor = grad / ctx.n_rows
        return grad_hidden * factor, grad_head * factor, None


def cross_entropy(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats: hidden (N, D), head (V, D), targets (N,) int64."""
    return _CrossEntropy.apply(hidden, head, targets)
