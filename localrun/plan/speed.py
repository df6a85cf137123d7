"""Time of a decoding step and of a prompt: bytes and FLOPs over the machine's rates. Derivation: docs/plan.md.

A matrix takes the longer of two times: its bytes over the memory's rate, its arithmetic over the kernel's. Matrices
come one after another, so times add up; what runs at the same time on CPU and GPU is taken off again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from localrun.limits import PREFILL_CHUNK, prefill_chunk
from localrun.models.config import Config
from localrun.plan import launches
from localrun.plan.machine import Cpu, Gpu, Machine
from localrun.plan.memory import Placement
from localrun.plan.shapes import ModelShape, Tensor
from quant.batch import ATTENTION_TOKENS
from quant.formats.registry import INTERLEAVED

_SHARED_LAUNCHES = "launches of shared experts"
MESSAGES, OTHERS = "messages", "other hosts"  # parts in which the first host waits: for bytes; for who computes more


@dataclass(frozen=True)
class Phase:
    """A part of the time.

    Attributes:
        part: "experts", "attention", ..., "waiting".
        device: "CPU", "GPU", or "" for neither.
        bound: what it waits for: "memory", "kernel", "FLOPs", "fixed".
    """

    part: str
    device: str
    seconds: float
    n_bytes: float = 0.0
    bound: str = "fixed"


@dataclass(frozen=True)
class Speed:
    """A prediction: tokens in seconds; hidden_s is what runs beside other phases and is not part of seconds."""

    tokens: float
    phases: tuple[Phase, ...]
    hidden_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Of a step, less what happens at the same time as something else."""
        return sum(phase.seconds for phase in self.phases) - self.hidden_s

    @property
    def tokens_per_s(self) -> float:
        """Of a step's tokens."""
        return self.tokens / self.seconds

    def split(self) -> dict[str, float]:
        """Seconds by where they go: GPU, expert reads, other CPU work, waiting."""
        kinds = {"GPU": 0.0, "experts": 0.0, "CPU": 0.0, "waiting": 0.0}
        for phase in self.phases:
            on_cpu = "experts" if phase.part == "routed experts" else "CPU"
            kinds[{"GPU": "GPU", "CPU": on_cpu}.get(phase.device, "waiting")] += phase.seconds
        kinds["GPU"] -= self.hidden_s
        return {kind: seconds for kind, seconds in kinds.items() if seconds > 0}

    def bottleneck(self) -> Phase:
        """The longest phase."""
        return max(self.phases, key=lambda phase: phase.seconds)


def experts_touched(n_experts: int, per_token: int, n_tokens: float) -> float:
    """Experts of a layer that n_tokens use, routed uniformly and independently."""
    return n_experts * (1 - (1 - per_token / n_experts) ** n_tokens)


def decode_speed(model: ModelShape, machine: Machine, placement: Placement, ctx: float, n_tokens: int = 1) -> Speed:
    """One step of n_tokens (1, or 2 with a drafted one) with ctx tokens in the cache."""
    return _step(model, machine, placement, ctx, n_tokens, layer_s=lambda device: device.layer_s)


def prefill_speed(
    model: ModelShape, machine: Machine, placement: Placement, n_tokens: int = PREFILL_CHUNK, ctx: float = 0
) -> Speed:
    """A prompt of n_tokens after ctx others, in chunks as they are evaluated."""
    most = prefill_chunk(n_tokens, model.config.rebuilds_keys and not placement.layers)
    phases: list[Phase] = []
    done = 0
    while done < n_tokens:
        count = min(most, n_tokens - done)
        seen = ctx + done + (count + min(count, ATTENTION_TOKENS)) / 2  # on average, by blocks of tokens
        chunk = _step(model, machine, placement, seen, count, layer_s=_chunk_layer_s, is_prompt=True)
        phases = _merged(phases, list(chunk.phases))
        done += count
    return Speed(n_tokens, tuple(phases))


def _chunk_layer_s(device: Cpu | Gpu) -> float:
    return device.chunk_layer_s if isinstance(device, Cpu) else device.layer_s


def _merged(a: list[Phase], b: list[Phase]) -> list[Phase]:
    if not a:
        return b
    return [replace(x, seconds=x.seconds + y.seconds, n_bytes=x.n_bytes + y.n_bytes) for x, y in zip(a, b, strict=True)]


def _step(
    model: ModelShape,
    machine: Machine,
    placement: Placement,
    ctx: float,
    n_tokens: int,
    layer_s: Callable[[Cpu | Gpu], float],
    is_prompt: bool = False,
) -> Speed:
    c, gpu = model.config, machine.gpu
    share = placement.layers / c.num_hidden_layers  # layers are alike, but for the first few
    phases = []
    for group, tensors in model.groups().items():
        if group == "mtp" or (group == "embedding" and "head" in model.groups()):
            continue  # of the embedding a row a token is read; a tied one is the head as well
        on_gpu = {"routed experts": float(placement.experts), "head": float(placement.head)}.get(group, share)
        on_gpu = float(placement.head) if group == "embedding" else on_gpu
        last_only = is_prompt and group in ("head", "embedding")  # logits of the last token only
        count = 1 if last_only else n_tokens
        if on_gpu and gpu:
            phases.append(_gpu_phase(gpu, group, tensors, model, count, on_gpu))
        if on_gpu < 1:
            phases.append(_cpu_phase(machine.cpu, group, tensors, model, count, 1 - on_gpu))
    phases += _attention(model, machine, share, ctx, n_tokens, is_prompt)
    if gpu and share:
        phases += _launches(c, layer_s(gpu), share)
    if share < 1:
        between = layer_s(machine.cpu) * c.num_hidden_layers
        if is_prompt:
            between += activation_bytes(model, n_tokens) / machine.cpu.activation_bytes_per_s
        phases.append(Phase("between kernels", "CPU", between * (1 - share)))
    moved = 2 * 4 * c.hidden_size * n_tokens / gpu.link_bytes_per_s if gpu else 0.0  # float32 there and back
    if gpu and placement.cards > 1:  # one after the other; by way of RAM, as long as to the CPU and back: assumed
        phases.append(Phase("from card to card", "", (gpu.handover_s + moved) * (placement.cards - 1)))
    if gpu and share and model.is_moe and placement.experts < 1:
        n_layers = model.n_moe_layers * (1 if placement.slots else 1 - placement.experts)  # with experts in RAM
        phases.append(Phase("waiting", "", (gpu.handover_s + moved) * n_layers * share))
    return Speed(n_tokens, tuple(phases), 0.0 if is_prompt else beside_s(phases, placement.slots > 0))


def _launches(config: Config, layer_s: float, share: float) -> list[Phase]:
    """Of the layers on the GPU: those of shared experts, and all others."""
    counts = [launches.of_layer(config, index) for index in range(config.num_hidden_layers)]
    n_shared = launches.SHARED * sum(
        count is not None and config.n_shared_experts > 0 and index >= config.first_k_dense_replace
        for index, count in enumerate(counts)
    )
    total = sum(launches.OF_LAYER_S if count is None else count for count in counts)
    seconds = layer_s * share / launches.OF_LAYER_S
    return [
        Phase("launches", "GPU", (total - n_shared) * seconds),
        Phase(_SHARED_LAUNCHES, "GPU", n_shared * seconds),
    ]


def beside_s(phases: Sequence[Phase], is_cache: bool = False) -> float:
    """The GPU's shared experts run while the CPU runs the routed ones, and so do those of a layer that it caches.

    Or while it waits for other hosts'.
    """
    parts = {"shared experts", _SHARED_LAUNCHES} | ({"routed experts"} if is_cache else set())
    shared = sum(p.seconds for p in phases if p.part in parts and p.device == "GPU")
    at_once = {("routed experts", "CPU"), (OTHERS, ""), (MESSAGES, "")}
    routed = sum(p.seconds for p in phases if (p.part, p.device) in at_once)
    return min(shared, routed)


def used(model: ModelShape, group: str, n_tokens: int) -> tuple[float, float]:
    """Of a group's weights: the part that is read, and how many tokens each read weight is multiplied with."""
    if group != "routed experts":
        return 1.0, n_tokens
    c = model.config
    touched = experts_touched(c.n_routed_experts, c.num_experts_per_tok, n_tokens)
    return touched / c.n_routed_experts, n_tokens * c.num_experts_per_tok / touched


def _cpu_phase(cpu: Cpu, group: str, tensors: list[Tensor], model: ModelShape, n_tokens: int, share: float) -> Phase:
    part, each = used(model, group, n_tokens)
    memory = kernel = read = 0.0
    seconds = 0.0
    for tensor in tensors:
        if len(tensor.shape) < 2:
            continue  # norms and biases: counted with what is between kernels
        n_bytes, weights = tensor.n_bytes * part * share, tensor.n_weights * part * share
        in_memory = n_bytes / cpu.read_bytes_per_s
        in_kernel = _kernel_s(cpu, tensor, n_bytes, weights, each)
        memory, kernel, read = memory + in_memory, kernel + in_kernel, read + n_bytes
        seconds += max(in_memory, in_kernel)
    return Phase(group, "CPU", seconds, read, "memory" if memory >= kernel else "kernel")


def _kernel_s(cpu: Cpu, tensor: Tensor, n_bytes: float, weights: float, n_tokens: float) -> float:
    """Arithmetic of a matrix on all cores: the decoding kernel for few tokens, expansion and products for many."""
    rates = cpu.kernel(tensor.type, tensor.shape[-1])
    packed_from = cpu.packed_from_interleaved if tensor.type in INTERLEAVED else cpu.packed_from
    if n_tokens < packed_from:  # the decoding kernels, taken as once each
        return n_bytes * n_tokens / (rates.gemv * cpu.cores)
    return weights / (rates.expand * cpu.cores) + 2 * weights * n_tokens / (rates.gemm * cpu.cores)


def _gpu_phase(gpu: Gpu, group: str, tensors: list[Tensor], model: ModelShape, n_tokens: int, share: float) -> Phase:
    part, each = used(model, group, n_tokens)
    n_bytes = sum(tensor.n_bytes for tensor in tensors) * part * share
    flops = 2 * sum(tensor.n_weights for tensor in tensors if len(tensor.shape) > 1) * part * share * each
    in_memory, in_flops = n_bytes / gpu.read_bytes_per_s, flops / gpu.flops
    return Phase(group, "GPU", max(in_memory, in_flops), n_bytes, "memory" if in_memory >= in_flops else "FLOPs")


def attention_flops(model: ModelShape, ctx: float, n_tokens: int) -> float:
    """FLOPs of scores and weighted sums in all layers; for many latent tokens, of rebuilding keys and values too.

    The cheaper of the two ways is taken, as localrun.network.attention does. With an indexer: its scores of
    all tokens, and latent attention over those that are chosen.
    """
    c = model.config
    if c.attention == "compressed":  # a row is key and value of all heads
        scored = _n_indexers(c) * c.index_n_heads * c.index_head_dim * ctx / 4 if c.index_topk < ctx / 4 else 0
        return 2 * n_tokens * (scored + c.num_attention_heads * c.attended(ctx) * 2 * c.head_dim)
    if 0 < c.index_topk < ctx:
        indexers = _n_indexers(c) * c.index_n_heads * c.index_head_dim * ctx
        chosen = c.index_topk * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
        return 2 * n_tokens * (indexers + c.num_hidden_layers * c.num_attention_heads * chosen)
    if c.attention == "gqa":
        return 2 * c.num_attention_heads * c.attended(ctx) * n_tokens * (c.head_dim + c.v_head_dim)
    rebuilt = c.qk_nope_head_dim + c.v_head_dim
    absorbed = n_tokens * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    decompressed = rebuilt * c.kv_lora_rank + n_tokens * (rebuilt + c.qk_rope_head_dim)
    return 2 * c.num_hidden_layers * c.num_attention_heads * ctx * min(absorbed, decompressed)


def _n_indexers(c: Config) -> int:
    return sum(c.chooses_rows(index) for index in range(c.num_hidden_layers))


def activation_bytes(model: ModelShape, n_tokens: int) -> float:
    """float32 bytes that the operations between a prompt's matrices read and write, in all layers.

    Of each hidden vector: two norms (2 passes each) and two residual sums (3 each). Of each query, key and value:
    rotation, scaling, copies into heads (6). Of gate and up outside the routed experts: SiLU (2) and product (3).
    Of streams, twice: a norm (2), their sum (1), and each anew of all (2).
    """
    c = model.config
    heads = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim + c.head_dim)
    if c.attention == "compressed":  # queries, outputs, and one row
        heads = (2 * c.num_attention_heads + 1) * c.head_dim
    inner = sum(t.shape[0] for t in model.tensors if t.name.endswith(("ffn_gate.weight", "ffn_gate_shexp.weight")))
    hidden = 10 + 2 * 5 * c.hc_mult
    return 4 * n_tokens * (c.num_hidden_layers * (hidden * c.hidden_size + 6 * heads) + 5 * inner)


def _attention(
    model: ModelShape, machine: Machine, share: float, ctx: float, n_tokens: int, is_prompt: bool
) -> list[Phase]:
    """Over the cache: its bytes over the memory's rate, or the FLOPs over the cores'."""
    n_bytes, flops = model.config.kv_bytes_read(ctx), attention_flops(model, ctx, n_tokens)
    phases = []
    if machine.gpu and share:
        in_memory, in_flops = n_bytes / machine.gpu.read_bytes_per_s, flops / machine.gpu.flops
        phases.append(Phase("KV cache", "GPU", share * max(in_memory, in_flops), share * n_bytes, "memory"))
    if share < 1:
        rest, cpu = 1 - share, machine.cpu
        rate = cpu.attention_prefill_flops if is_prompt else cpu.attention_decode_flops
        in_memory, in_flops = n_bytes / cpu.read_bytes_per_s, flops / rate
        bound = "memory" if in_memory >= in_flops else "FLOPs"
        phases.append(Phase("KV cache", "CPU", rest * max(in_memory, in_flops), rest * n_bytes, bound))
    return phases


def mtp_speed(model: ModelShape, machine: Machine, placement: Placement, ctx: float, acceptance: float) -> Speed | None:
    """Decoding with one drafted token a step, kept at the given rate; None if the model has no layer for it.

    A step verifies two tokens and runs the prediction layer and the head once more, on the CPU (placement.placement).
    """
    mtp = model.groups().get("mtp")
    if mtp is None:
        return None
    verify = decode_speed(model, machine, placement, ctx, n_tokens=2)
    renumbered = [replace(t, name=t.name.replace(f"blk.{model.config.num_hidden_layers}.", "blk.0.")) for t in mtp]
    ends = [t for name in ("head", "embedding") for t in model.groups().get(name, [])]
    draft_tensors = [t for t in renumbered if "nextn.embed_tokens" not in t.name and "shared_head_head" not in t.name]
    layer = replace(
        model,
        config=replace(model.config, num_hidden_layers=1, index_topk=0),  # it attends to all tokens
        tensors=tuple(ends + draft_tensors),
    )
    draft = decode_speed(layer, machine, Placement(0, head=False, experts=0.0), ctx)  # it lives in RAM
    return Speed(1 + acceptance, verify.phases + draft.phases, verify.hidden_s + draft.hidden_s)
