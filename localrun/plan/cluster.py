"""Beyond one machine: what the interconnect allows expert-parallel decoding, and how many devices serve a load.

Source: arXiv 2505.09343, section 2.3.2. Every device holds experts and takes n_tokens tokens at a time; each token's
hidden vector goes to its experts (dispatch, 1 byte a value) and comes back from them (combine, 2 bytes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from localrun.errors import LocalrunError
from localrun.plan.known import load_data
from localrun.plan.shapes import ModelShape, Tensor
from localrun.plan.tables import active_weights, heads_of

DISPATCH_BYTES, COMBINE_BYTES = 1, 2  # FP8 there, BF16 back
KV_BYTES = 2


@dataclass(frozen=True)
class Device:
    """An accelerator in a cluster: bytes/s of its memory and of its network, FLOP/s in FP8; rates as on data sheets."""

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops: float
    network_bytes_per_s: float


def devices() -> list[str]:
    """The names that load_device knows."""
    return list(load_data("devices"))


def load_device(name: str) -> Device:
    """Raises LocalrunError if it is not known."""
    known = load_data("devices")
    if name not in known:
        raise LocalrunError(f"unknown device {name!r}; expected one of {', '.join(known)}")
    entry = known[name]
    return Device(name, **{key: entry[key]["value"] for key in Device.__dataclass_fields__ if key != "name"})


@dataclass(frozen=True)
class ExpertParallel:
    """The limit of decoding with one micro-batch of n_tokens a device; times in seconds.

    Attributes:
        bytes_per_step: that a device sends and receives for one micro-batch in one layer.
        step_s: the time of that.
        layer_compute_s: attention and experts of one micro-batch in one layer.
    """

    n_layers: int
    n_tokens: int
    bytes_per_step: float
    step_s: float
    layer_compute_s: float

    @property
    def layer_s(self) -> float:
        """Two micro-batches in one layer: one computes while the other communicates."""
        return 2 * max(self.step_s, self.layer_compute_s)

    @property
    def layer_without_overlap_s(self) -> float:
        """The same, each waiting for its own messages."""
        return 2 * (self.step_s + self.layer_compute_s)

    @property
    def token_s(self) -> float:
        """Time per output token."""
        return self.n_layers * self.layer_s

    @property
    def token_without_overlap_s(self) -> float:
        """Seconds of all layers, one batch at a time."""
        return self.n_layers * self.layer_without_overlap_s

    def tokens_per_device_s(self) -> float:
        """Of both micro-batches."""
        return 2 * self.n_tokens / self.token_s

    def with_mtp(self, acceptance: float) -> float:
        """Tokens/s of one request with a drafted token a step, kept at this rate, and a layer more for the draft.

        Verifying takes no longer where tokens wait for each other's messages: n_tokens is then made of half as many
        requests with two tokens each.
        """
        return (1 + acceptance) / (self.token_s * (1 + 1 / self.n_layers))


def expert_parallel(
    model: ModelShape,
    bytes_per_s: float,
    n_tokens: int = 32,
    *,
    hidden_size: int | None = None,
    layer_compute_s: float = 0.0,
) -> ExpertParallel:
    """The limit for a model on an interconnect.

    Args:
        hidden_size: in place of the model's; the paper computes with 7K = 7000.
        layer_compute_s: 0 for the paper's best case.

    Raises:
        LocalrunError: a model without routed experts.
    """
    c = model.config
    if not model.is_moe:
        raise LocalrunError(f"{model.name} has no routed experts to spread over devices")
    shared = int("shared experts" in model.groups())
    per_token = (DISPATCH_BYTES + COMBINE_BYTES) * (c.num_experts_per_tok + shared) * (hidden_size or c.hidden_size)
    n_bytes = n_tokens * per_token
    return ExpertParallel(c.num_hidden_layers, n_tokens, n_bytes, n_bytes / bytes_per_s, layer_compute_s)


def layer_compute_s(model: ModelShape, device: Device, n_tokens: int, ctx: int, experts_per_device: int = 1) -> float:
    """One micro-batch in one layer with expert: FP8 weights and the cache over memory, FLOPs over the peak.

    Every device computes attention for its own tokens, and its experts for as many as it sends away.
    """
    c, groups = model.config, model.groups()
    attention = _layer_weights(groups["attention"], c.num_hidden_layers)
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    shared = _layer_weights(groups.get("shared experts", []), model.n_moe_layers)
    per_layer_kv = c.kv_bytes_read(ctx) / c.num_hidden_layers
    n_bytes = attention + shared + experts_per_device * expert + n_tokens * per_layer_kv
    heads = heads_of(model.config)
    width = 2 * c.kv_lora_rank + c.qk_rope_head_dim if c.attention == "mla" else heads.key_dim + heads.value_dim
    scores = heads.n_heads * ctx * width
    flops = 2 * n_tokens * (attention + shared + c.num_experts_per_tok * expert + scores)
    return max(n_bytes / device.memory_bytes_per_s, flops / device.flops)


def _layer_weights(tensors: list[Tensor], n_layers: int) -> float:
    return sum(tensor.n_weights for tensor in tensors) / n_layers if tensors else 0.0


@dataclass(frozen=True)
class Load:
    """What is to be served: requests a second, tokens of a prompt and of a reply."""

    requests_per_s: float
    prompt_tokens: int
    reply_tokens: int


@dataclass(frozen=True)
class Split:
    """Devices for each half, whole units of them; concurrent requests; what bounds the decoding half."""

    prefill_devices: int
    decode_devices: int
    concurrent: float
    prefill_tokens_per_device_s: float
    decode_tokens_per_device_s: float
    bound: str


def split_sizes(
    model: ModelShape, device: Device, limit: ExpertParallel, load: Load, *, utilisation: float, units: tuple[int, int]
) -> Split:
    """How many devices read prompts and how many decode.

    Prompts are bound by FLOPs: two a weight and token, and causal attention, at a utilisation of the peak. Decoding is
    bound by the interconnect or by memory (limit), and by room for the cache beside an even share of the weights.

    Args:
        units: the smallest groups of prefill and decode devices; numbers are rounded up to them.
    """
    c, heads = model.config, heads_of(model.config)
    scores = c.num_hidden_layers * heads.n_heads * load.prompt_tokens * (heads.key_dim + heads.value_dim)
    prefill_rate = device.flops * utilisation / (2 * active_weights(model) + scores)
    prefill = load.requests_per_s * load.prompt_tokens / prefill_rate
    decode_rate = limit.tokens_per_device_s()
    concurrent = load.requests_per_s * load.reply_tokens * limit.token_s
    by_rate = load.requests_per_s * load.reply_tokens / decode_rate
    cache = concurrent * c.kv_bytes(load.prompt_tokens + load.reply_tokens)
    weights = sum(tensor.n_weights for tensor in model.tensors if not model.is_nextn(tensor))  # in FP8
    by_room = (cache + weights) / device.memory_bytes
    decode = max(by_rate, by_room)
    return Split(
        prefill_devices=_whole_units(prefill, units[0]),
        decode_devices=_whole_units(decode, units[1]),
        concurrent=concurrent,
        prefill_tokens_per_device_s=prefill_rate,
        decode_tokens_per_device_s=decode_rate,
        bound="smallest group" if decode <= units[1] else "rate" if by_rate >= by_room else "memory",
    )


def _whole_units(n_devices: float, unit: int) -> int:
    return unit * max(1, math.ceil(n_devices / unit - 1e-9))


def with_compute(limit: ExpertParallel, seconds: float) -> ExpertParallel:
    """The same limit with a layer's arithmetic taken into account."""
    return replace(limit, layer_compute_s=seconds)
