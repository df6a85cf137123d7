"""Attention of many tokens through torch's fused kernels, which keep no scores: by pieces of the context.

First the new tokens among themselves, causal, then chunks of the earlier context, summed by their log-sum-exp. Letters:
N heads handled at a time, T new tokens, S cached tokens, d the width of keys and values in torch's kernels.
Source: FlashAttention-2 (arXiv 2307.08691).
"""

from collections.abc import Callable

import torch

_FLASH = (8, 0)  # compute capability that torch's flash attention needs
CONTEXT = 4096  # cached tokens decompressed at a time


def attend_by_pieces(
    q_NTd: torch.Tensor,
    rows: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
    start: int,
    scale: float,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 (N, T, d) of tokens from `start` on; rows(first, last) gives keys and values (N, last - first, d)."""
    out, log_sum = _fused_attention(q_NTd, *rows(start, start + q_NTd.shape[1]), True, scale)
    for first in range(0, start, CONTEXT):
        earlier, earlier_log_sum = _fused_attention(q_NTd, *rows(first, min(first + CONTEXT, start)), False, scale)
        both = torch.logaddexp(log_sum, earlier_log_sum)
        out = out * (log_sum - both).exp()[..., None] + earlier * (earlier_log_sum - both).exp()[..., None]
        log_sum = both
    return out if sinks_N is None else out * (log_sum - sinks_N[:, None]).sigmoid()[..., None]


def _fused_attention(
    q_NTd: torch.Tensor, k_NSd: torch.Tensor, v_NSd: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (N, T, d) and the natural logarithms (N, T) of the softmax's sums.

    The operators that scaled_dot_product_attention dispatches to: itself, it keeps the sums back. is_causal: T = S.
    """
    q, k, v = q_NTd[None], k_NSd[None], v_NSd[None]
    aten, n_tokens = torch.ops.aten, q_NTd.shape[1]
    if q.device.type == "cpu":
        out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    elif q.dtype == torch.float32 or torch.cuda.get_device_capability(q.device) < _FLASH:
        out, log_sum = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)[
            :2
        ]
    else:
        out, log_sum = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[:2]
    return out[0].float(), log_sum[0, :, :n_tokens].float()
