"""What opening a model decides: which backend runs it, how long its context is, what goes where; and its kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from localrun import hardware
from localrun.cpu.warmup import for_prompts, for_steps, warm_up
from localrun.errors import LocalrunError, UnsupportedModelError
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.gguf.types import laid_out
from localrun.gpu.proof.prove import Others, Proof, task_of
from localrun.models.config import Config
from localrun.models.dspark import is_dspark
from localrun.models.mtp_file import is_mtp_only
from localrun.models.names import INTEGERS, check_tensors, check_types
from localrun.models.reader import context_length, read_config
from localrun.placement.devices import DeviceRequest, choose
from localrun.placement.memory_table import RAM
from localrun.placement.placement import CPU, GPU, DraftFile, Placement
from localrun.runtime import Model

if TYPE_CHECKING:
    from localrun.ranks.remote import Remote
    from localrun.ranks.sharing import Ranks
    from localrun.ranks.world import World

_KERNEL_BYTES = 128 << 20  # of address space: loading them takes 65 MB, and LLVM aborts where it has too little
DEFAULT_CTX = 8192  # tokens, where the model allows as many
Progress = Callable[[int, int, str], None]
Notice = Callable[[str], None]


def native_config(file: GGUFFile, backend: str, notice: Notice) -> Config | None:
    """The configuration if the native backend runs this model; None, with a notice, if llama.cpp is to."""
    try:
        config = read_config(file)
        check_tensors(file, config)
        check_types(file)
    except UnsupportedModelError as error:
        if backend == "native" or file.is_interleaved:
            raise
        if backend == "auto":
            notice(f"{error}; running it with llama.cpp")
        return None
    if backend == "llama.cpp" and file.is_interleaved:
        raise LocalrunError(f"{file.path}: has interleaved rows, which only the native backend reads")
    return config if backend != "llama.cpp" else None  # checked all the same: llama.cpp aborts on some faults


def attending(config: Config | None, to_all: bool, notice: Notice) -> Config | None:
    """The configuration of a model that is to attend to all tokens, if `to_all`. Says what is not as one may think."""
    if config is None or not config.index_topk:
        if config is not None and config.lacks_indexer:
            notice(
                "the file has no indexer tensors: attention goes over all tokens, which the model was not trained for"
            )
        elif to_all:
            notice("--dense-attention has no effect: no indexer chooses tokens here")
        return config
    return replace(config, index_topk=0) if to_all else config


def choose_ctx(file: GGUFFile, wanted: int | None, notice: Notice) -> int:
    """Tokens of context: what is wanted, else what the model was made for up to DEFAULT_CTX."""
    trained = context_length(file) or DEFAULT_CTX
    ctx = min(DEFAULT_CTX, trained) if wanted is None else wanted
    if ctx > trained:
        notice(f"a context of {ctx} tokens, but the model was made for {trained}: text beyond that may be poor")
    return ctx


def check_no_gpu(where: DeviceRequest, notice: Notice) -> None:
    """Where llama.cpp runs the model. Raises LocalrunError if the GPU was asked for."""
    if where.repack:
        notice("llama.cpp lays weights out itself: --repack has no effect")
    if where.wants_gpu:
        raise LocalrunError(f"device '{where.device}': llama.cpp runs this model, on the CPU; use --device cpu")
    if where.asks_for_gpu:
        notice("llama.cpp runs this model, on the CPU: options for the GPU have no effect")
    if where.cache_bits != 16:
        raise LocalrunError("llama.cpp runs this model, with a cache of 16 bits; leave out --cache-bits 8")


def repacking_if_it_pays(where: DeviceRequest, file: GGUFFile, notice: Notice) -> DeviceRequest:
    """Without --repack, and with a line that says so, where it would gain nothing."""
    if not where.repack:
        return where
    from localrun.cpu.repack import repacking_pays

    return replace(where, repack=repacking_pays(file, notice))


def check_ranks(where: DeviceRequest) -> None:
    """Where experts are to be shared among ranks. Raises LocalrunError if something else is asked for that can't be."""
    if where.n_experts not in ("auto", 0) or where.caches_experts or where.expert_usage is not None:
        raise LocalrunError(
            "with several ranks VRAM takes routed experts of whole layers: leave out --expert-usage, and --gpu-experts "
            "but for auto or 0"
        )
    if where.repack:
        raise LocalrunError("several ranks lay out their own shares: Sharing(repack=True) in place of repack")


def check_readers(where: DeviceRequest) -> None:
    """Where other hosts are to read prompts. Raises LocalrunError if something else is asked for that can't be."""
    if where.wants_gpu:
        raise LocalrunError(f"device '{where.device}' does not go with prompts that are read on other hosts' CPUs")


def among_ranks(backend: str, where: DeviceRequest, shares: bool, reads: bool) -> tuple[str, DeviceRequest]:
    """The backend and the device of a model whose experts other processes share, or whose prompts they read.

    Raises LocalrunError.
    """
    if shares:
        check_ranks(where)
    if backend == "llama.cpp":
        raise LocalrunError("backend 'llama.cpp' runs in one process; several ranks take the native one")
    if reads:
        check_readers(where)
        where = replace(where, device=CPU)
    return "native", where


def draft_file(path: str | os.PathLike[str]) -> DraftFile | None:
    """What a file is that holds layers alone that draft for a model; None of another. Raises GGUFError."""
    with open_gguf(path) as file:
        needs_head = is_dspark(file)
        if not needs_head and not is_mtp_only(file):
            return None
        return DraftFile(sum(tensor.n_bytes for tensor in file.tensors.values()), needs_head)


def proof_of(
    file: GGUFFile,
    config: Config,
    threads: int,
    ctx: int,
    where: DeviceRequest,
    notice: Notice,
    ranks: Ranks | None = None,
) -> Proof | None:
    """What the card is asked before it is used; None where it is not to be."""
    if where.unproven:
        return None
    others = _others(file, ranks.world.size) if ranks and ranks.world.size > 1 else None
    return Proof(file, config, task_of(file.path, threads, ctx, where), where, notice, others)


def _others(file: GGUFFile, n_ranks: int) -> Others:
    """What other ranks do for either side, by the model of `plan --hosts`, with the link that it assumes."""

    def seconds(figures: Mapping[str, Any]) -> Mapping[str, float]:
        from localrun.plan.first_host import over_hosts
        from localrun.plan.link import DEFAULT_LINK, load_link
        from localrun.plan.shapes import load_model

        return over_hosts(figures, load_model(str(file.path)), n_ranks, load_link(DEFAULT_LINK))

    return Others("1 more rank" if n_ranks == 2 else f"{n_ranks - 1} more ranks", seconds)


def place(
    file: GGUFFile,
    config: Config,
    ctx: int,
    where: DeviceRequest,
    proof: Proof | None,
    own_drafts: bool,
    notice: Notice,
    draft_file: DraftFile | None = None,
    ranks: Ranks | None = None,
) -> Placement:
    """What goes where. Raises LocalrunError if the GPU was asked for in vain, or the cache does not fit."""
    share = 1 / ranks.world.size if ranks else 1.0  # about: who has what is decided once this is known
    placement = choose(where, file, config, ctx, own_drafts, notice, proof, draft_file, share)
    needed, free = placement.n_bytes(RAM, "KV cache"), hardware.free_ram()
    if needed > free:
        per_token = config.kv_token_bytes(placement.cache_bits)
        in_windows = config.kv_bytes(ctx, placement.cache_bits) - ctx * per_token
        most = max(0, free - in_windows) // per_token
        raise LocalrunError(
            f"a context of {ctx} tokens takes {needed / 2**30:.1f} GiB of RAM and {free / 2**30:.1f} GiB are "
            f"free; -c {most} would fit"
        )
    return placement


def told(file: GGUFFile, config: Config, placement: Placement, threads: int, ranks: Ranks) -> Remote:
    """Other ranks, told what each is to have of the experts: they get ready while this one does. Raises LocalrunError.

    Whoever has it closes it, unless a model does.
    """
    from localrun.ranks.remote import Remote

    return Remote(file, config, ranks, threads, placement)


def native_model(
    file: GGUFFile,
    config: Config,
    placement: Placement,
    threads: int,
    repack: bool,
    choices: Mapping[str, Any],
    progress: Progress | None,
    notice: Notice,
    remote: Remote | None = None,
    readers: World | None = None,
) -> Model:
    """Its kernels are got ready first, so that the user sees what takes the time; then this rank's share of experts.

    Args:
        choices: those of the cards' proof.
        remote: other ranks, which know what each is to have of the experts.
        readers: others that read prompts.

    Raises LocalrunError.
    """
    tensors = [tensor for name, tensor in file.tensors.items() if not INTEGERS.fullmatch(name)]
    types = {tensor.type.name for tensor in tensors}
    if repack or (remote and remote.ranks.sharing.repack):
        from quant.target import tuning

        pays = tuning.current().interleaving_pays
        types |= {laid_out(tensor.type.name, tensor.shape, pays) for tensor in tensors}
    left = hardware.free_addresses()
    if left < _KERNEL_BYTES:
        need, have = _KERNEL_BYTES >> 20, left >> 20
        raise LocalrunError(f"the kernels need {need} MiB of address space, and {have} are left; raise ulimit -v")
    bits = 16 if placement.device == GPU else placement.cache_bits  # of what runs here
    worlds = [remote.ranks.world if remote else None, readers]

    def check() -> None:
        for world in filter(None, worlds):
            world.check()

    warm_up(for_steps(config, types, bits), progress, notice, check)
    if repack:
        from localrun.cpu.repack import repack_experts

        repack_experts(file, config, threads, placement.needed[RAM], progress, notice)
    if placement.device == GPU:
        warm_up(for_prompts(config, types), progress, notice, check)
    if remote:
        remote.get_ready()
    if placement.device == GPU:
        from localrun.gpu.hybrid import HybridModel

        return HybridModel(config, file, threads, placement, notice=notice, remote=remote, **choices)
    from localrun.cpu.model import NativeModel

    for_network = lambda: warm_up(for_prompts(config, types, bits), None, notice, check)  # noqa: E731
    return NativeModel(config, file, threads, remote, for_network, readers, bits)


def warn_of_memory(file: GGUFFile, placement: Placement | None, notice: Notice) -> None:
    """Say so where the machine has less RAM than the model takes."""
    what, size = "the file has", file.file_size
    if placement and placement.device == GPU:
        what, size = "what stays in RAM has", placement.needed[RAM]
    if size > hardware.total_ram():
        gib, ram = size / 2**30, hardware.total_ram() / 2**30
        notice(f"{what} {gib:.0f} GiB and this machine {ram:.0f} GiB of RAM: it will run at the disk's speed")
