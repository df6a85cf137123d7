"""What a machine has: memory, cores and cards, each rate with where it comes from; read from JSON.

A number may stand alone or as {"value": ..., "source": ...}. Nothing here is fitted to a prediction: a rate is either a
data sheet's, or measured by itself (localrun.plan.measure), or says that it is assumed. Units: bytes, seconds, bytes/s,
FLOP/s. The format is docs/plan.md's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from localrun.errors import LocalrunError
from localrun.files import user_path
from localrun.gpu.proof.verdict import measured_handover
from localrun.plan.fields import Fields
from localrun.plan.known import load_data, read_json
from quant.batch import PACKED_FROM, PACKED_FROM_INTERLEAVED

TRANSFER_BYTES = 8  # a DDR channel is 64 bits wide


@dataclass(frozen=True)
class Kernel:
    """What one core does with one type of block.

    Attributes:
        n_cols: columns of the matrices it was measured with.
        gemv: bytes/s of weights times one token, from memory that does not limit it.
        expand: weights/s turned into float32 before many tokens are multiplied.
        gemm: FLOP/s of that multiplication.
    """

    type: str
    n_cols: int
    gemv: float
    expand: float
    gemm: float


@dataclass(frozen=True)
class Cpu:
    """The processor side.

    Attributes:
        cores: that compute.
        read_bytes_per_s: all cores reading RAM.
        channels: of all sockets; 0 where not known.
        kernels: of one core.
        attention_decode_flops, attention_prefill_flops: of all cores, for scores and sums over the cache.
        activation_bytes_per_s: of the small operations between the matrices of a prompt.
        packed_from, packed_from_interleaved: tokens of a matrix from which on its rows are repacked, and where rows
            are interleaved.
        layer_s, chunk_layer_s: what a layer takes besides its arithmetic, a token and a chunk of a prompt.
        process_bytes: of the runner itself.
    """

    cores: int
    read_bytes_per_s: float
    channels: int
    kernels: tuple[Kernel, ...]
    attention_decode_flops: float
    attention_prefill_flops: float
    activation_bytes_per_s: float
    layer_s: float
    chunk_layer_s: float
    process_bytes: float
    packed_from: int = PACKED_FROM
    packed_from_interleaved: int = PACKED_FROM_INTERLEAVED

    def kernel(self, type_: str, n_cols: int) -> Kernel:
        """The rates for a type, measured with the nearest number of columns. Raises LocalrunError if there are none."""
        known = [kernel for kernel in self.kernels if kernel.type == type_]
        if not known:
            types = ", ".join(sorted({kernel.type for kernel in self.kernels}))
            raise LocalrunError(f"the machine description has no rates for {type_}; it has {types}")
        return min(known, key=lambda kernel: abs(math.log(kernel.n_cols / n_cols)))


@dataclass(frozen=True)
class Gpu:
    """A card, or the graphics part of a chip whose memory is the machine's own (unified).

    Attributes:
        read_bytes_per_s, flops: what kernels reach.
        layer_s: what a layer takes besides, a token.
        link_bytes_per_s: to and from RAM.
        handover_s: a layer's way to the CPU's experts and back.
        reserved_bytes: of the driver and the context.
    """

    name: str
    vram_bytes: float
    unified: bool
    read_bytes_per_s: float
    flops: float
    layer_s: float
    link_bytes_per_s: float
    handover_s: float
    reserved_bytes: float


@dataclass(frozen=True)
class Machine:
    """A machine; sources says where each number comes from, by its path in the JSON.

    Attributes:
        n_gpus: cards that are all like `gpu`.
    """

    name: str
    title: str
    ram_bytes: float
    reserved_bytes: float
    cpu: Cpu
    gpu: Gpu | None
    n_gpus: int = 1
    sources: dict[str, str] = field(default_factory=dict)
    document: dict[str, Any] = field(default_factory=dict, repr=False)

    def with_bandwidth(self, factor: float) -> Machine:
        """The same with RAM that many times as fast; a unified GPU reads from it too."""
        cpu = replace(self.cpu, read_bytes_per_s=self.cpu.read_bytes_per_s * factor)
        gpu = self.gpu
        if gpu is not None and gpu.unified:
            gpu = replace(gpu, read_bytes_per_s=gpu.read_bytes_per_s * factor)
        return replace(self, cpu=cpu, gpu=gpu)


def presets() -> list[str]:
    """The machines that come along."""
    return list(load_data("machines")["machines"])


def load_machine(name: str) -> Machine:
    """A preset, or the description in a JSON file. Raises LocalrunError."""
    known = load_data("machines")["machines"]
    if name in known:
        return parse_machine(known[name], name, f"preset {name}")
    path = user_path(name)
    document = read_json(path, name, f"no such machine file; presets: this, {', '.join(known)}")
    return parse_machine(document, path.stem, name)


def with_measured_card(machine: Machine) -> Machine:
    """The same, with the hand-over that a card of its name was measured to take here, if one has proven itself."""
    seconds = None if machine.gpu is None or machine.gpu.unified else measured_handover(machine.gpu.name)
    if seconds is None:
        return machine
    sources = machine.sources | {"gpu.handover_s": "measured by localrun doctor --gpu"}
    return replace(machine, gpu=replace(machine.gpu, handover_s=seconds), sources=sources)


def parse_machine(document: Any, name: str, where: str) -> Machine:
    """The machine that a JSON document describes. Raises LocalrunError naming the key, what was found and expected."""
    fields = Fields(document, where)
    title = fields.text("title", name)
    ram, reserved = fields.number("ram_bytes"), fields.number("reserved_bytes", 0.0)
    cpu = _cpu(fields.part("cpu"))
    gpu = _gpu(fields.part("gpu")) if fields.has("gpu") else None
    n_gpus = fields.count("gpus", 1)
    if n_gpus != 1 and (gpu is None or gpu.unified or n_gpus < 1):
        raise LocalrunError(f"{where}: gpus is {n_gpus}; expected how many cards like `gpu`, with memory of their own")
    fields.text("source", "")
    fields.refuse_unread()
    return Machine(name, title, ram, reserved, cpu, gpu, n_gpus, fields.sources, document)


def _cpu(fields: Fields) -> Cpu:
    cores, memory = fields.count("cores"), fields.part("memory")
    if memory.has("read_bytes_per_s"):
        read, channels = memory.number("read_bytes_per_s"), memory.count("channels", 0)
    else:
        sockets = memory.count("sockets", 1)
        channels = sockets * memory.count("channels")
        read = channels * memory.number("mega_transfers") * 1e6 * TRANSFER_BYTES * memory.fraction("read_fraction")
        read *= memory.fraction("numa_fraction") if sockets > 1 else 1.0
    memory.refuse_unread()
    cpu = Cpu(
        cores=cores,
        read_bytes_per_s=read,
        channels=channels,
        kernels=_kernels(fields),
        attention_decode_flops=fields.number("attention_decode_flops"),
        attention_prefill_flops=fields.number("attention_prefill_flops"),
        activation_bytes_per_s=fields.number("activation_bytes_per_s"),
        layer_s=fields.number("layer_s", at_least=0.0),
        chunk_layer_s=fields.number("chunk_layer_s", at_least=0.0),
        process_bytes=fields.number("process_bytes", at_least=0.0),
        packed_from=fields.count("packed_from", PACKED_FROM),
        packed_from_interleaved=fields.count("packed_from_interleaved", PACKED_FROM_INTERLEAVED),
    )
    fields.refuse_unread()
    return cpu


def _kernels(fields: Fields) -> tuple[Kernel, ...]:
    """The table itself, or the name of one that comes along."""
    found = fields.get("kernels")
    known = load_data("machines")["kernels"]
    if isinstance(found, str):
        if found not in known:
            fields.fail("kernels", found, f"a table, or one of {', '.join(known)}")
        fields.sources[fields.prefix + "kernels"] = known[found]["source"]
        found = known[found]["rates"]
    if not isinstance(found, list) or not found:
        fields.fail("kernels", type(found).__name__, "a list of rates")
    kernels = []
    for index, row in enumerate(found):
        rates = Fields(row, fields.where, f"{fields.prefix}kernels[{index}].", fields.sources)
        numbers = {name: rates.number(name) for name in ("gemv", "expand", "gemm")}
        kernels.append(Kernel(rates.text("type"), rates.count("n_cols"), **numbers))
        rates.refuse_unread()
    return tuple(kernels)


def _gpu(fields: Fields) -> Gpu:
    unified = fields.flag("unified", False)
    gpu = Gpu(
        name=fields.text("name", "GPU"),
        vram_bytes=fields.number("vram_bytes"),
        unified=unified,
        read_bytes_per_s=fields.number("peak_bytes_per_s") * fields.fraction("read_fraction"),
        flops=fields.number("peak_flops") * fields.fraction("flops_fraction"),
        layer_s=fields.number("layer_s", at_least=0.0),
        link_bytes_per_s=math.inf if unified else fields.number("link_bytes_per_s"),
        handover_s=0.0 if unified else fields.number("handover_s", at_least=0.0),
        reserved_bytes=fields.number("reserved_bytes", at_least=0.0),
    )
    fields.refuse_unread()
    return gpu
