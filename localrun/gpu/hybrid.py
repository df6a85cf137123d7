"""A model whose network runs on GPUs and whose routed experts stay in RAM, but for those that VRAM has room for.

What localrun.cpu.model.NativeModel is to the engine, with a placement. A few tokens are a recorded step (decode.py);
more go through the layers in one or two micro-batches (prefill.py). On several cards each has a run of layers, one
after the other. What drafts, the layer for multi-token prediction or DSpark's blocks, stays on the CPU. Other ranks may
have shares of the experts in RAM, of which devices learn nothing.

Letters: T tokens, D hidden_size.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from localrun.cpu.torch_threads import TorchThreads
from localrun.gguf.file import GGUFFile
from localrun.gguf.residency import Resident, let_go
from localrun.gpu import compiling, prefill
from localrun.gpu.attention.attention import attention_on
from localrun.gpu.caches.cache import AnyCache, new_cache
from localrun.gpu.decode import DecodeStep, Part
from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.means import features, watch
from localrun.gpu.tuning import Tuning
from localrun.gpu.ways import HOST_NODES
from localrun.gpu.weights import DeviceWeights, spans_in_ram, spans_on_device
from localrun.models import names
from localrun.models.config import Config
from localrun.models.dspark import read_dspark
from localrun.models.mtp_file import read_mtp_config
from localrun.models.tensors import GGUFTensors
from localrun.network.model import Network
from localrun.placement.placement import Placement
from localrun.ranks.remote import Remote
from quant.decode.program import MOST_TOKENS
from quant.threads.pool import Pool

if TYPE_CHECKING:
    from localrun.cpu.dspark import Drafter
    from localrun.cpu.mtp import MTP
    from localrun.cpu.weights import LayerWeights
    from localrun.network.model import MTPBlock

Device = Cuda | StandIn


def _gpus(cards: Sequence[int], choices: Sequence[Mapping[str, Any]]) -> list[Cuda]:
    """These cards, each as was found to be fastest on it."""
    devices = []
    for index, chosen in zip_longest(cards, choices[: len(cards)], fillvalue={}):
        device = Cuda(index)
        device.use(chosen.get("handover", HOST_NODES))
        device.cut(chosen.get("tiles", {}))
        devices.append(device)
    return devices


class HybridModel:
    """A model with experts over the tensors of a file, on one or more devices and on the CPU.

    Attributes:
        vocab_size: logits a token.
        most_together: contexts that can share a step.
        least_chunk: tokens that are no step.
        keep_hidden: whether forward() is to leave `hidden` behind.
        hidden: float32 (T, hidden_size), what the head reads (after the final norm) of the last forward()'s tokens; of
            streams what they are before, (T, hc_mult * hidden_size); with a drafter, what that reads.
        drafter: what drafts blocks of tokens, once take_dspark() has been called.
        network: the modules on devices.
        step: what evaluates a few tokens.
        pool: the workers of routed experts in RAM.
        remote: other ranks that have shares of the experts; None where all are here.
        parts, tunings: each device with its layers, and how prompts go through these.
        device, routed, tuning: the first device's, and only one's where there are no more.
    """

    def __init__(
        self,
        config: Config,
        file: GGUFFile,
        n_threads: int,
        placement: Placement,
        device: Device | Sequence[Device] | None = None,
        notice: Callable[[str], None] = lambda line: None,
        choices: Sequence[Mapping[str, Any]] = (),
        workers: int | None = None,
        remote: Remote | None = None,
    ):
        """Uploads what the placement gives to the devices. The file must stay open.

        Args:
            device: those of the placement's cards, which are GPUs unless given.
            notice: told when kernels are compiled, now or later, and when a cache of experts stands still.
            choices: of each GPU, "handover" of a step's work to the workers (ways.py), and "tiles", names by kind.
            workers: threads that compute, if not n_threads.
            remote: others that have shares of the experts, but of layers that VRAM holds, and are ready.

        Raises:
            LocalrunError: the GPU can't be used, or has no room.
        """
        self.config, self.file, self.vocab_size = config, file, config.vocab_size
        self.most_together, self.least_chunk = MOST_TOKENS, MOST_TOKENS + 1
        self.keep_hidden = False
        self.hidden = np.empty((0, config.hidden_size), np.float32)
        if device is None:
            self.devices: Sequence[Device] = _gpus(placement.cards, choices)
        else:
            self.devices = device if isinstance(device, Sequence) else [device]
        self.device = self.devices[0]
        compiling.set_up(notice)
        self._placement, self._tensors, self._notice = placement, GGUFTensors(file), notice
        self.drafter: Drafter | None = None
        self._mtp: MTP | None = None
        self._mtp_file, self._n_mtp = file, config.num_nextn_predict_layers
        self._holds_torch = False
        self.remote = remote
        with ExitStack() as undo:
            self.pool = Pool(workers or n_threads)
            undo.callback(self.pool.close)
            self._load()
            undo.pop_all()

    def _load(self) -> None:
        with self.device.errors():
            weights = DeviceWeights(
                self.file, self.config, self._placement, self.devices, self.pool, self._notice, self.remote
            )
            self.network = Network(self.config, weights, attention_on(weights.devices))
            self._of_layers, layers = tuple(weights.devices), self._placement.layers
            self.parts = [Part(*each) for each in zip(self.devices, layers, weights.routed, strict=True)]
            self.step = self._new_step()
            self.tunings = [
                Tuning(part.device, self.network, part.routed, self._placement.spare(card))
                for card, part in enumerate(self.parts)
            ]
            self.routed, self.tuning = self.parts[0].routed, self.tunings[0]
            for device in self.devices:
                with device.errors():
                    device.synchronize()
        let_go(spans_on_device(self._tensors, self._placement))
        share = self.remote.share if self.remote else None
        self.resident = Resident(self.file, spans_in_ram(self._tensors, self.config, self._placement, share))

    def _new_step(self) -> DecodeStep:
        return DecodeStep(self.parts, self.pool, self.network, self.remote)

    @property
    def mtp(self) -> "MTP | None":
        """The model's head for multi-token prediction, on the CPU, if a file has all of it."""
        config = replace(self.config, num_nextn_predict_layers=self._n_mtp)
        if self._mtp is None and names.has_mtp(self._mtp_file, config):
            from localrun.cpu.mtp import MTP

            remote = self._mtp_remote
            tensors = GGUFTensors(self._mtp_file, remote.own if remote else None)
            self._mtp = MTP(config, tensors, self.pool, self._mtp_block, remote)
        return self._mtp

    def take_mtp(self, file: GGUFFile) -> None:
        """As NativeModel.take_mtp."""
        self._n_mtp = read_mtp_config(file, self.config).num_nextn_predict_layers
        self._mtp, self._mtp_file = None, file

    def take_dspark(self, file: GGUFFile) -> None:
        """As NativeModel.take_dspark."""
        from localrun.cpu.dspark import Drafter

        spark = read_dspark(file, self.config)
        self.drafter = Drafter(spark, file, self.pool, lambda: self._on_cpu(self.file))
        self.network.watched = spark.target_layers
        with self.device.errors():
            self.step = self._new_step()

    @property
    def _mtp_remote(self) -> Remote | None:
        """As NativeModel has it."""
        return self.remote if self._mtp_file is self.file else None

    def _mtp_block(self) -> "MTPBlock":
        from localrun.network.model import MTPBlock

        return MTPBlock(self.config, self._on_cpu(self._mtp_file, self._mtp_remote), self.network.rope)

    def _on_cpu(self, file: GGUFFile, remote: Remote | None = None) -> "LayerWeights":
        """What drafts, for any number of tokens: its file's tensors, or the model's."""
        from localrun.cpu.weights import LayerWeights

        if not self._holds_torch:
            TorchThreads.hold(self.pool.n_workers)
            self._holds_torch = True
        return LayerWeights(file, self.pool, remote)

    def new_cache(self, capacity: int, exact: bool = False) -> AnyCache:
        """An empty cache for up to `capacity` tokens, of 16 or 8 bits as placed or, if exact, of 32."""
        with self.device.errors():
            bits = 32 if exact else self._placement.cache_bits
            return new_cache(self.config, capacity, self._of_layers, bits)

    def can_forget(self) -> bool:
        """Always."""
        return True

    def prepare(self) -> None:
        """Nothing: it is loaded."""

    @torch.inference_mode()
    def chunks(self, n_tokens: int) -> list[int]:
        """Into how many tokens at a time to cut a prompt, for forward(). Raises LocalrunError: the device failed."""
        tuning, part = min(zip(self.tunings, self.parts, strict=True), key=lambda each: each[0].most)
        with part.device.errors():
            return tuning.chunks(n_tokens)

    @torch.inference_mode()
    def forward(self, ids: Sequence[int], cache: AnyCache, all_logits: bool = False) -> np.ndarray:
        """Evaluate ids after the cache's tokens; the cache then holds them too.

        Returns:
            float32 (T, vocab) logits with all_logits, else (1, vocab), those of the last token.

        Raises:
            ContextFullError: the cache has no room for them.
            LocalrunError: the device failed, or another rank (RankError).
        """
        cache.check_room(len(ids))
        with self.device.errors(), cache.all_or_none():
            if len(ids) <= MOST_TOKENS and not cache.is_exact:
                hidden, logits = self.step(ids, cache)
            else:
                hidden, logits = self._prefill(ids, cache, all_logits)
            self._settle(len(ids))
        if self.keep_hidden:
            self.hidden = hidden
        return logits if all_logits else logits[-1:]

    @torch.inference_mode()
    def forward_each(self, ids: Sequence[int], caches: Sequence[AnyCache]) -> np.ndarray:
        """As SharingModel.forward_each: one step, recorded once for whatever contexts. Raises as forward()."""
        for cache in caches:
            cache.check_room(1)
        with self.device.errors(), ExitStack() as stack:
            for cache in caches:
                stack.enter_context(cache.all_or_none())
            hidden, logits = self.step.together(ids, caches)
            self._settle(len(ids))
        if self.keep_hidden:
            self.hidden = hidden
        return logits

    def _prefill(self, ids: Sequence[int], cache: AnyCache, all_logits: bool) -> tuple[np.ndarray, np.ndarray]:
        """Of all tokens, or as far as they are wanted of the last alone: what the head reads, and logits."""
        network, x_TD = self.network, None
        watched = network.watched if self.keep_hidden else ()
        layers = watch(network.layers, watched)
        for part, tuning in zip(self.parts, self.tunings, strict=True):
            with part.device.errors():
                x_TD = self._through(part, tuning, layers, ids, x_TD, cache)
        needs_all = all_logits or (self.keep_hidden and not watched)
        with self.devices[-1].errors():
            hidden_TD, x_TD = network.last(x_TD if needs_all else x_TD[-1:])
            logits = network.lm_head(x_TD if all_logits else x_TD[-1:]).cpu().numpy()
            hidden = self.hidden
            if self.keep_hidden:
                hidden = features(layers) if watched else hidden_TD.cpu().numpy()
        cache.advance(len(ids))
        return hidden, logits

    def _through(
        self,
        part: Part,
        tuning: Tuning,
        layers: Sequence[prefill.Layer],
        ids: Sequence[int],
        x_TD: torch.Tensor | None,
        cache: AnyCache,
    ) -> torch.Tensor:
        """A prompt's tokens through a part, on its device: behind it.

        Args:
            layers: of the whole network.
            x_TD: what the part before gave, if any.
        """
        network, c, here = self.network, self.config, part.device.torch
        part.routed.mode, n_batches = tuning.choose(len(ids))
        if "shared" in c.indexer_types and c.index_topk:  # a layer's choice is the next one's: of one batch
            n_batches = 1
        part.routed.start()
        ids_T = torch.tensor(ids, dtype=torch.int64).to(here)
        x_TD = network.first(ids_T) if x_TD is None else x_TD.to(here)
        layers = layers[part.layers.start : part.layers.stop]
        x_TD = prefill.forward(layers, x_TD, ids_T, cache, n_batches, part.routed.cancel)
        part.routed.end()
        return x_TD

    def _settle(self, n_tokens: int) -> None:
        for part in self.parts:
            part.routed.settle(n_tokens)

    def close(self) -> None:
        """End all threads, but of a device that is stuck: they may never come back; and what other ranks do."""
        self.resident.close()
        if not any(device.is_stuck for device in self.devices):
            for part in self.parts:
                part.routed.close()
            self.pool.close()
        if self.remote:
            self.remote.close()
        if self._holds_torch:
            TorchThreads.release()
