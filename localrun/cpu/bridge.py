"""Where torch tensors meet the CPU kernels: quantised matrices as callables over float32 tensors.

Weights stay in the file's map, in their blocks; nothing here keeps a dequantised copy. What the modules promise:
network/weight_source.py. Letters: T tokens, G groups (attention heads), D hidden_size.
"""

from collections.abc import Sequence

import numpy as np
import torch

from localrun.limits import ATTENTION_WORK_BYTES
from localrun.network.attention import in_groups
from localrun.network.weight_source import Finish, Seen, Turned
from localrun.ranks.remote import Remote
from quant.matrix import ExpertMatrices, QuantMatrix
from quant.ops import attention as prompt_attention
from quant.ops import attention_i16 as integer_attention
from quant.ops import chosen as chosen_attention
from quant.ops import experts as quant_experts
from quant.ops import indexer as quant_indexer
from quant.ops import linear as quant_linear
from quant.ops import rebuild_i16
from quant.target import isa
from quant.threads.pool import Pool

# Values of the tokens that go through a matrix together: of more the panels fit no cache, and come from memory for
# every few rows.
_TOGETHER = 1 << 22
IN_INTEGERS = isa.has(integer_attention.LEVEL)  # attention over a 16-bit cache


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """float32 in C order, as the kernels read it."""
    return x.to(torch.float32).contiguous()


class Linear:
    """y = W x for one matrix (out, in)."""

    def __init__(self, pool: Pool, weight: QuantMatrix):
        self.pool, self.weight = pool, weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, in) -> (T, out)."""
        x = _as_rows(x)
        out = torch.empty(x.shape[0], self.weight.n_rows)
        for first, count in in_groups(x.shape[0], self.weight.n_cols, _TOGETHER):
            quant_linear.multiply(self.pool, self.weight, x[first:].data_ptr(), count, out[first:].data_ptr())
        return out


class JoinedMLP:
    """down(silu(gate x) * up x) as the only expert of all tokens."""

    def __init__(self, pool: Pool, matrices: ExpertMatrices):
        self.pool, self.matrices = pool, matrices

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, D) -> (T, D)."""
        x = _as_rows(x)
        out = torch.empty_like(x)
        for first, count in in_groups(*x.shape, _TOGETHER):
            ids, weights = np.zeros((count, 1), np.int64), np.ones((count, 1), np.float32)
            quant_experts.run(self.pool, self.matrices, x[first:].data_ptr(), ids, weights, out[first:].data_ptr())
        return out


class HeadLinear:
    """One matrix a head: W (G, out, in)."""

    may_expand = True

    def __init__(self, pool: Pool, weight: QuantMatrix):
        self.pool, self.weight = pool, weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, G, in) -> (T, G, out): W[g] x[t, g]."""
        x = _as_rows(x)
        out = torch.empty(*x.shape[:2], self.weight.n_rows)
        quant_linear.multiply(self.pool, self.weight, x.data_ptr(), x.shape[0], out.data_ptr())
        return out

    def transposed(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, G, out) -> (T, G, in): W[g]^T x[t, g]."""
        x = _as_rows(x)
        out = torch.empty(*x.shape[:2], self.weight.n_cols)
        quant_linear.multiply_transposed(self.pool, self.weight, x.data_ptr(), x.shape[0], out.data_ptr())
        return out

    def dense(self, first: int, count: int) -> torch.Tensor:
        """float32 (count, out, in): the matrices of heads first..first+count, for one product over many tokens."""
        weight = self.weight
        rows = torch.arange(first * weight.n_rows, (first + count) * weight.n_rows)
        out = torch.empty(count, weight.n_rows, weight.n_cols)
        quant_linear.expand_rows(self.pool, weight, rows.numpy(), out.data_ptr())
        return out


class Embedding:
    """Rows of a matrix by token id."""

    def __init__(self, pool: Pool, weight: QuantMatrix):
        self.pool, self.weight = pool, weight

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (T,) -> float32 (T, D)."""
        out = torch.empty(ids.shape[0], self.weight.n_cols)
        quant_linear.expand_rows(self.pool, self.weight, ids.numpy(), out.data_ptr())
        return out


class Attend:
    """softmax(q k^T) v over tensors whose last dimensions are contiguous; each token sees itself and before.

    Keys and values of 16 bits are multiplied in 16-bit integers where the CPU has such products, else in float32.
    """

    def __init__(self, pool: Pool):
        self.pool = pool

    def __call__(
        self,
        parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
        v_SGV: torch.Tensor,
        scale: float,
        out_THV: torch.Tensor,
        window: int = 0,
        sinks_H: torch.Tensor | None = None,
    ) -> None:
        """out_THV = softmax(scale * q k^T) v, of the last T of S tokens.

        Args:
            parts: queries (T, H, d) and keys (S, G, d) or, shared by all heads, (S, 1, d); products of two parts are
                added. H / G heads share one's keys and values.
            window, sinks_H: as in weight_source.Attend.
        """
        if v_SGV.dtype == torch.float16:
            if IN_INTEGERS and len(parts) == 1:
                return self._in_integers(*parts[0], v_SGV, scale, out_THV, window, sinks_H)
            parts, v_SGV = [(q, k.float()) for q, k in parts], v_SGV.float()
        (n_tokens, n_heads, width), (n_cached, n_groups, _) = out_THV.shape, v_SGV.shape
        prompt_attention.attend(
            self.pool,
            [(_strides(q), _strides(k), q.shape[-1]) for q, k in parts],
            _strides(v_SGV), width, _strides(out_THV),
            n_heads=n_heads, shared=n_heads // n_groups, n_tokens=n_tokens, n_before=n_cached - n_tokens, scale=scale,
            window=window, sinks=0 if sinks_H is None else sinks_H.data_ptr(),
        )  # fmt: skip

    def _in_integers(self, q_THd, k_SGd, v_SGV, scale, out_THV, window, sinks_H) -> None:
        """Some groups of heads at a time."""
        (n_cached, n_groups, depth), shared = k_SGd.shape, q_THd.shape[1] // k_SGd.shape[1]
        for first, count in in_groups(n_groups, _rounded_bytes(n_cached, depth, v_SGV.shape[-1]), ATTENTION_WORK_BYTES):
            groups, heads = slice(first, first + count), slice(shared * first, shared * (first + count))
            rounded = _rounded(self.pool, count, n_cached, depth, v_SGV.shape[-1])
            keys, values = _strides(k_SGd[:, groups]), _strides(v_SGV[:, groups])
            integer_attention.round_cache(self.pool, keys, values, count, rounded)
            integer_attention.attend(
                self.pool, [(_strides(q_THd[:, heads]), depth)], rounded, _strides(out_THV[:, heads]),
                n_heads=shared * count, shared=shared, n_tokens=q_THd.shape[0], scale=scale, window=window,
                sinks=0 if sinks_H is None else sinks_H[heads].data_ptr(),
            )  # fmt: skip


class AttendRebuilt:
    """Latent attention with the keys and values of each head, which are rebuilt from the cache, in 16-bit integers."""

    def __init__(self, pool: Pool):
        self.pool = pool

    def __call__(
        self,
        parts: Sequence[torch.Tensor],
        rows_SW: torch.Tensor,
        k_b: HeadLinear,
        v_b: HeadLinear,
        k_b_transposed: bool,
        scale: float,
        out_THV: torch.Tensor,
    ) -> None:
        """As weight_source.AttendRebuilt; some heads at a time."""
        (n_tokens, n_heads, width), n_cached = out_THV.shape, rows_SW.shape[0]
        n_nope, n_rope = (part.shape[-1] for part in parts)
        n_latent, depth = rows_SW.shape[1] - n_rope, n_nope + n_rope
        assert rows_SW.dtype == torch.float16 and rows_SW.stride(-1) == 1
        for first, count in in_groups(n_heads, _rounded_bytes(n_cached, depth, width), ATTENTION_WORK_BYTES):
            heads = slice(first, first + count)
            k, v = k_b.dense(first, count), v_b.dense(first, count)
            keys = rebuild_i16.Projection(k.data_ptr(), n_nope, k_b_transposed)
            values = rebuild_i16.Projection(v.data_ptr(), width)
            rounded = _rounded(self.pool, count, n_cached, depth, width)
            rebuild_i16.rebuild(
                self.pool, rows_SW.data_ptr(), 2 * rows_SW.stride(0), n_latent, keys, values, count, rounded
            )
            integer_attention.attend(
                self.pool, [(_strides(part[:, heads]), part.shape[-1]) for part in parts], rounded,
                _strides(out_THV[:, heads]), n_heads=count, shared=1, n_tokens=n_tokens, scale=scale,
            )  # fmt: skip


def _rounded_bytes(n_rows: int, depth: int, width: int) -> int:
    return integer_attention.Rounded(0, n_rows, depth, width).head_bytes


def _rounded(pool: Pool, n_heads: int, n_rows: int, depth: int, width: int) -> integer_attention.Rounded:
    """Room for rounded keys and values, until it is asked for again: new pages would cost as much as rebuilding."""
    address = pool.buffer("rounded rows", n_heads * _rounded_bytes(n_rows, depth, width))
    return integer_attention.Rounded(address, n_rows, depth, width)


class AttendChosen:
    """softmax(q k^T) v, each token over rows of its own; values are the first part of keys."""

    def __init__(self, pool: Pool):
        self.pool = pool

    def __call__(
        self,
        parts: Sequence[torch.Tensor],
        seen: Seen,
        scale: float,
        out_THV: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
        turned: Turned | None = None,
    ) -> None:
        """As network.weight_source.AttendChosen."""
        n_tokens, n_heads, width = out_THV.shape
        parts = [_as_rows(part) for part in parts]
        blocks = [rows for rows in (seen.keys_SW, seen.window_SW) if rows is not None]
        assert len({(rows.dtype, rows.shape[1]) for rows in blocks}) == 1
        assert all(rows.is_contiguous() for rows in blocks)
        options = {}
        if seen.keys_SW is not None:
            options |= {"keys": seen.keys_SW.data_ptr(), "ratio": seen.ratio}
        if seen.chosen_TK is not None:
            assert seen.chosen_TK.dtype == torch.int32 and seen.chosen_TK.is_contiguous()
            options |= {"chosen": seen.chosen_TK.data_ptr(), "top_k": seen.chosen_TK.shape[1]}
        if seen.window_SW is not None:
            before = seen.window_SW.shape[0] - n_tokens
            options |= {"window_rows": seen.window_SW.data_ptr(), "window_before": before, "window": seen.window}
        if turned is not None:
            rotations = torch.view_as_real(turned.turns).contiguous()
            n_rope = 2 * turned.turns.shape[-1]
            options |= {"rotations": rotations.data_ptr(), "n_rope": n_rope, "norm_epsilon": turned.epsilon}
        chosen_attention.attend(
            self.pool,
            [(_by_token(part), part.shape[-1]) for part in parts],
            _by_token(out_THV),
            **_row_format(blocks[0]), width=width, n_heads=n_heads, n_queries=n_tokens, n_before=seen.n_before,
            scale=scale, sinks=0 if sinks_H is None else sinks_H.data_ptr(), **options,
        )  # fmt: skip


class ChooseRows:
    """An indexer's choice."""

    def __init__(self, pool: Pool):
        self.pool = pool

    def __call__(
        self, q_TId: torch.Tensor, weights_TI: torch.Tensor, keys_Sd: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        """As network.indexer.choose_rows, in another order."""
        (n_tokens, n_heads, head_dim), n_cached = q_TId.shape, keys_Sd.shape[0]
        rows_TK = torch.empty(n_tokens, top_k, dtype=torch.int32)
        q_TId, weights_TI = _as_rows(q_TId), _as_rows(weights_TI)
        assert keys_Sd.is_contiguous()
        quant_indexer.choose(
            self.pool, q_TId.data_ptr(), weights_TI.data_ptr(), keys_Sd.data_ptr(), **_row_format(keys_Sd),
            n_heads=n_heads, head_dim=head_dim, n_tokens=n_tokens, n_before=n_cached - n_tokens,
            top_k=top_k, chosen=rows_TK.data_ptr(),
        )  # fmt: skip
        return rows_TK


def _row_format(rows: torch.Tensor) -> dict[str, int]:
    """Of float16 or float32 rows of the cache."""
    return {"row_bytes": rows.stride(0) * rows.element_size(), "is_f16": rows.dtype == torch.float16}


def _by_token(x: torch.Tensor) -> prompt_attention.Rows:
    """Where (T, H, d) lies, a token's heads as rows."""
    assert x.dtype == torch.float32 and x.stride(-1) == 1
    return prompt_attention.Rows(x.data_ptr(), 4 * x.stride(0), 4 * x.stride(1))


def _strides(x: torch.Tensor) -> prompt_attention.Rows:
    """Where (T, H, d) lies; a single head for all."""
    assert x.dtype in (torch.float32, torch.float16) and x.stride(-1) == 1
    size = x.element_size()
    return prompt_attention.Rows(x.data_ptr(), size * x.stride(1) if x.shape[1] > 1 else 0, size * x.stride(0))


class Experts:
    """The routed experts of a layer, for tensors on the CPU."""

    def __init__(self, pool: Pool, experts: ExpertMatrices):
        self.pool, self.experts = pool, experts

    def begin(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Finish:
        """The sum, at once."""
        x = _as_rows(x)
        out = torch.empty_like(x)
        quant_experts.run(self.pool, self.experts, x.data_ptr(), ids.numpy(), weights.numpy(), out.data_ptr())
        return lambda: out


class SharedExperts:
    """The same where other ranks have shares of them."""

    def __init__(self, own: Experts, remote: Remote, index: int):
        self._own, self._remote, self._index = own, remote, index

    def begin(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Finish:
        """This rank's part of the sum, while the others compute theirs."""
        x = _as_rows(x)
        own_ids, add_others = self._remote.begin_many(self._index, x.numpy(), ids.numpy(), weights.numpy())
        out = self._own.begin(x, torch.from_numpy(own_ids), weights)()

        def finish() -> torch.Tensor:
            add_others(out.numpy())
            return out

        return finish
