"""Where a model's bytes go, whether they fit, and the nearest setting that does.

The rules (docs/plan.md): attention, dense layers, shared experts, router and head go to the GPU, layer by layer while
there is room; routed experts stay in RAM unless all of them fit beside the rest. Layers for multi-token prediction stay
in the file until they are used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from localrun.plan.machine import Machine
from localrun.plan.shapes import ModelShape, Tensor, n_bytes

CHUNK = 512  # tokens of a prompt evaluated at a time: session.PREFILL_CHUNK
ATTENTION_WORK_BYTES = 1 << 26  # attention._WORK_BYTES: scores, keys and values at a time
_CTX_STEP = 256


@dataclass(frozen=True)
class Row:
    """A line of the memory table: where ("RAM", "VRAM", "disk"), what, bytes."""

    where: str
    what: str
    n_bytes: int


@dataclass(frozen=True)
class Placement:
    """What lives on the GPU: layers (attention, KV cache, all but routed experts), head and embedding, experts."""

    layers: int
    head: bool
    experts: bool


@dataclass(frozen=True)
class Memory:
    """A placement with its table; bytes needed and available by memory."""

    placement: Placement
    rows: tuple[Row, ...]
    needed: dict[str, int]
    available: dict[str, int]

    @property
    def fits(self) -> bool:
        return all(self.needed[where] <= self.available[where] for where in self.needed)

    def shortage(self) -> str:
        """ "386.0 GiB of RAM (there are 60.0)", for each memory that is too small."""
        short = [where for where in self.needed if self.needed[where] > self.available[where]]
        return ", ".join(f"{gib(self.needed[w])} of {w} ({gib(max(0, self.available[w]))} usable)" for w in short)


def gib(n_bytes: float) -> str:
    """ "1.5 GiB"."""
    return f"{n_bytes / 2**30:.1f} GiB"


def plan_memory(model: ModelShape, machine: Machine, ctx: int) -> Memory:
    """The table for a context of ctx tokens. Never raises for lack of room: see Memory.fits."""
    placement = _place(model, machine, ctx)
    bundles = _Bundles(model, ctx)
    gpu_weights, cpu_weights = bundles.weights(placement)
    gpu_kv = bundles.kv(placement.layers)
    cpu_kv = bundles.kv(model.config.num_hidden_layers) - gpu_kv
    mtp = n_bytes(model.groups().get("mtp", []))
    fast = "VRAM" if machine.gpu is not None and not machine.gpu.unified else "RAM"
    rows = [
        Row(fast, "weights on the GPU", gpu_weights),
        Row(fast, f"KV cache of {ctx} tokens on the GPU", gpu_kv),
        Row("RAM", "weights, mapped from the file", cpu_weights),
        Row("RAM", f"KV cache of {ctx} tokens", cpu_kv),
        Row("RAM", "work memory", work_bytes(model)),
        Row("RAM", "the runner itself", int(machine.cpu.process_bytes)),
    ]
    available = {"RAM": int(machine.ram_bytes - machine.reserved_bytes)}
    if machine.gpu is not None and machine.gpu.unified:  # nearly everything is the GPU's, which may not have it all
        available["RAM"] = min(available["RAM"], int(machine.gpu.vram_bytes))
    if machine.gpu is not None:
        rows += [Row(fast, "work memory on the GPU", work_bytes(model)), Row(fast, "driver", _driver_bytes(machine))]
        if fast == "VRAM":
            available["VRAM"] = int(machine.gpu.vram_bytes)
    needed = {where: sum(row.n_bytes for row in rows if row.where == where) for where in available}
    rows.append(Row("disk", "the file, but for its vocabulary", n_bytes(model.tensors)))
    if mtp:
        rows.append(Row("disk", "of which for multi-token prediction, not loaded", mtp))
    return Memory(placement, tuple(row for row in rows if row.n_bytes), needed, available)


def work_bytes(model: ModelShape) -> int:
    """Activations of one chunk in float32: the widest layer's inputs and outputs, queries, scores of attention."""
    c = model.config
    heads = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim + c.head_dim)
    inner = max(c.intermediate_size, c.num_experts_per_tok * c.moe_intermediate_size)
    return 4 * CHUNK * (4 * c.hidden_size + heads + 3 * inner) + 4 * c.vocab_size + ATTENTION_WORK_BYTES


def _driver_bytes(machine: Machine) -> int:
    return int(machine.gpu.reserved_bytes) if machine.gpu else 0


class _Bundles:
    """Bytes that move together: one layer's share, the head and embedding, all routed experts."""

    def __init__(self, model: ModelShape, ctx: int) -> None:
        groups = model.groups()
        self.n_layers = model.config.num_hidden_layers
        self.kv_bytes = model.config.kv_bytes_per_token * ctx
        self.experts = n_bytes(groups.get("routed experts", []))
        self.head = n_bytes(groups.get("head", []) + groups.get("embedding", []))
        rest = [
            t for name, ts in groups.items() if name not in ("routed experts", "head", "embedding", "mtp") for t in ts
        ]
        self.layers = _by_layer(rest, self.n_layers)

    def kv(self, layers: int) -> int:
        """Bytes of the cache of the first layers."""
        return self.kv_bytes * layers // self.n_layers

    def weights(self, placement: Placement) -> tuple[int, int]:
        """Bytes on the GPU, and elsewhere."""
        gpu = sum(self.layers[: placement.layers])
        gpu += self.head * placement.head + self.experts * placement.experts
        return gpu, sum(self.layers) + self.head + self.experts - gpu


def _by_layer(tensors: Iterable[Tensor], n_layers: int) -> list[int]:
    """Bytes a layer; what belongs to none counts with the first."""
    sizes = [0] * n_layers
    for tensor in tensors:
        parts = tensor.name.split(".")
        sizes[int(parts[1]) if parts[0] == "blk" else 0] += tensor.n_bytes
    return sizes


def _place(model: ModelShape, machine: Machine, ctx: int) -> Placement:
    if machine.gpu is None:
        return Placement(0, head=False, experts=False)
    bundles = _Bundles(model, ctx)
    if machine.gpu.unified:
        return Placement(bundles.n_layers, head=True, experts=True)
    free = machine.gpu.vram_bytes - machine.gpu.reserved_bytes - work_bytes(model)
    layers = 0
    while layers < bundles.n_layers and bundles.layers[layers] + bundles.kv(layers + 1) - bundles.kv(layers) <= free:
        free -= bundles.layers[layers] + bundles.kv(layers + 1) - bundles.kv(layers)
        layers += 1
    head = layers == bundles.n_layers and bundles.head <= free
    free -= bundles.head * head
    return Placement(layers, head=head, experts=head and bundles.experts <= free)


def refusal(model: ModelShape, machine: Machine, ctx: int) -> str:
    """What is needed, what there is, and the nearest setting that fits; empty if this one does."""
    memory = plan_memory(model, machine, ctx)
    if memory.fits:
        return ""
    what = f"{model.name}, {model.type}, {ctx} tokens of context"
    advice = nearest_that_fits(model, machine, ctx)
    return f"{what}, does not fit {machine.title}: needs {memory.shortage()}; {advice}"


def nearest_that_fits(model: ModelShape, machine: Machine, ctx: int) -> str:
    """A shorter context if that is enough, else the type with the most bits, else what the smallest would need."""
    if shorter := _longest_ctx(model, machine, ctx):
        return f"--ctx {shorter} would fit"
    smaller = _smaller_types(model)
    for other in smaller:
        if plan_memory(other, machine, ctx).fits:
            return f"--type {other.type} would fit"
    for other in smaller:
        if shorter := _longest_ctx(other, machine, ctx):
            return f"--type {other.type} --ctx {shorter} would fit"
    smallest = (smaller or [model])[-1]
    least = plan_memory(smallest, machine, _CTX_STEP)
    need = " and ".join(f"{gib(size)} of {where}" for where, size in least.needed.items())
    return f"no type fits: the smallest, {smallest.type}, needs {need} with {_CTX_STEP} tokens of context"


def _longest_ctx(model: ModelShape, machine: Machine, ctx: int) -> int:
    """The longest context below ctx that fits, in steps; 0 if none does."""
    low, high = 0, (ctx - 1) // _CTX_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan_memory(model, machine, middle * _CTX_STEP).fits else (low, middle - 1)
    return low * _CTX_STEP


def _smaller_types(model: ModelShape) -> list[ModelShape]:
    """The model in every mix with fewer bytes, largest first."""
    from localrun.convert.mixes import MIXES

    size = n_bytes(model.tensors)
    others = [model.with_type(mix) for mix in MIXES]
    return sorted((o for o in others if n_bytes(o.tensors) < size), key=lambda o: -n_bytes(o.tensors))
