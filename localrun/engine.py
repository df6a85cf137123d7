"""A loaded model: which backend runs it, its tokenizer and template, and sessions over it."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from localrun import opening
from localrun.arguments import flag, function, path_text, refuse, shown, token_ids, whole
from localrun.bundled import model_path
from localrun.errors import LocalrunError
from localrun.generate.drafts import BlockDraft, Draft, MTPDraft, NGramDraft
from localrun.generate.model_draft import ModelDraft, check_vocabulary
from localrun.generate.sampling import Sampling
from localrun.generate.session import Session
from localrun.generate.speculative import Speculation, check_setting
from localrun.generate.together import evaluate_each
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.limits import cut
from localrun.opening import Notice, Progress
from localrun.placement.devices import DeviceRequest
from localrun.placement.placement import CPU, DraftFile, Placement
from localrun.runtime import DraftedModel, KVCache, Model, MTPModel
from localrun.text import chat_template as templates
from localrun.text.chat_template import ChatTemplate
from localrun.text.tokenizer import Tokenizer
from localrun.turn import Turn
from localrun.workers import n_workers

if TYPE_CHECKING:
    from localrun.ranks.readers import Readers
    from localrun.ranks.sharing import Ranks
    from localrun.ranks.world import World

MOST_CTX = 2**31 - 1  # positions are int32


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    threads: int | None = None,
    ctx: int | None = None,
    backend: str = "auto",
    vram: float | None = None,
    gpu_experts: int | str = "auto",
    cache_bits: int = 16,
    expert_usage: str | os.PathLike[str] | None = None,
    repack: bool = False,
    unproven: bool = False,
    dense_attention: bool = False,
    speculative: str | int = "auto",
    draft: str | os.PathLike[str] | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    ranks: "Ranks | None" = None,
    readers: "World | None" = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
    placed: Callable[[Placement], None] | None = None,
) -> "Engine":
    """Open a GGUF model for generation.

    Args:
        path: the file, or the first part of a split one; or the name of a bundled model: miniature, smollm2.
        device: "cuda": all but routed experts on a GPU, or on several if one has no room, and of these as many as fit;
            "cuda:1": the same on the second card; "cpu"; or "auto": "cuda" where the card has proven itself with this
            model and is faster than the CPU. A card that has no verdict yet proves itself now, which takes some
            minutes, with a notice for each part (docs/gpu.md).
        threads: worker threads, at most 512; None for one a physical core.
        ctx: tokens that a session can hold; None for 8192, or the model's own length if that is less.
        backend: "native", "llama.cpp", or "auto": native where it can, else llama.cpp with a notice.
        vram: GiB of each card's memory that may be used; None for all that is free.
        gpu_experts: routed experts of each layer that go to the GPU; "auto" for those of as many layers as fit; "cache"
            or "cache:N" for as many of each layer as fit, or N, which change with what is used, while all stay in RAM.
        expert_usage: an importance matrix (localrun imatrix): the experts that its text used most go to the GPU first.
        cache_bits: of the values that are kept of each token: 16, or 8, which changes the text a little.
        repack: lay the rows of routed experts out anew in RAM as far as it is free, where that makes replies
            faster on this CPU.
        unproven: with device "cuda": use the card without its proof, or in spite of it.
        dense_attention: attend to all tokens where the model would choose some of them by an indexer: for comparison,
            as the model was not trained so, and long contexts take longer.
        speculative: how many drafts of the next tokens a step verifies: "off", 1 to 4, or "auto" for as many as make
            it faster. The reply is the same (docs/speculative.md).
        draft: a small model with the same vocabulary that makes them; None for the model's own head for multi-token
            prediction, or where it has none, for what followed the same tokens before.
        chat_template: a file that holds one, or the name of one: chatml, or those that the model's file has besides
            its own; None for the file's own.
        ranks: other processes, in which localrun.ranks.worker.serve_share() runs, and how they share routed experts:
            those in RAM; a card of this process has the rest of the network, and whole layers of experts.
        readers: other processes, in which localrun.cpu.reader.serve_reading() runs, to read prompts.
        progress: called as progress(done, total, what) during long steps.
        notice: called with one line for each fact the user should know.
        placed: called with what will be where, before it is loaded; not where llama.cpp runs the model.

    The file is mapped, so reading it while somebody cuts it short raises SIGBUS, which ends the process; the commands
    make that a line (localrun.gguf.bus_error), a program that calls this may do so too. A file that is written to while
    it is in use is a LocalrunError of the next step; one that is replaced by another of its name is a notice.

    Raises:
        LocalrunError: anything the user can mend: no such file, a broken one, too large a context, a wrong option.
    """
    given, draft = _model_path("path", path), None if draft is None else _model_path("draft", draft)
    where = DeviceRequest(device, vram, gpu_experts, cache_bits, expert_usage, repack, unproven)
    dense_attention = flag("dense_attention", dense_attention)
    if not isinstance(backend, str) or backend not in ("auto", "native", "llama.cpp"):
        refuse("backend", backend, "auto, native or llama.cpp")
    if ctx is not None:
        ctx = whole("ctx", ctx, f"1 to {MOST_CTX} tokens", low=1, high=MOST_CTX)
    if ranks is not None or readers is not None:
        backend, where = opening.among_ranks(backend, where, ranks is not None, readers is not None)
    if check_setting(speculative) == "off" and draft is not None:
        raise LocalrunError("a draft model, but speculative 'off'; expected auto, or 1 to 4 drafts a step")
    progress, notice = function("progress", progress), function("notice", notice) or (lambda line: None)
    placed = function("placed", placed) or (lambda placement: None)
    threads, own_drafts = n_workers(threads), speculative != "off" and draft is None
    draft_file = None if draft is None else opening.draft_file(draft)
    template = None if chat_template is None else path_text("chat_template", chat_template)
    with ExitStack() as undo:
        file = undo.enter_context(open_gguf(given))
        where = opening.repacking_if_it_pays(where, file, notice)
        engine = Engine(
            file, threads, ctx, backend, where, dense_attention, own_drafts, template, progress, notice, placed, ranks,
            draft_file, readers,
        )  # fmt: skip
        undo.pop_all()
        undo.callback(engine.close)
        engine.speculate(speculative, draft, progress, notice)
        undo.pop_all()
    return engine


def _model_path(name: str, given: Any) -> Path:
    """The file that a path, or the name of a bundled model, stands for."""
    return model_path(path_text(name, given))


class Engine:
    """A model ready to run. Close it, or use it as a context manager. Threads that share it take turns.

    Attributes:
        model: what evaluates tokens.
        file: the open GGUF file.
        config: the model's configuration; None where llama.cpp runs it.
        tokenizer, template: text to ids; chat messages to text (None if the file has no chat template).
        backend: "native" or "llama.cpp".
        placement: what is where, on the GPU and in RAM; None where llama.cpp runs the model.
        device: "cuda", with routed experts on the CPU as well, or "cpu".
        ctx: tokens that a session can hold.
        threads: worker threads.
        ranks: other processes that have shares of the routed experts; None where all are here.
        readers: other processes that read prompts; None where this one does.
        speculative: "auto", "off", or how many drafts every step verifies.
        draft_model: the model that makes them, if another does.
        turn: taken around every use of the model.
    """

    model: Model

    def __init__(
        self,
        file: GGUFFile,
        threads: int,
        ctx: int | None,
        backend: str,
        where: DeviceRequest,
        dense_attention: bool,
        own_drafts: bool,
        template: str | None,
        progress: Progress | None,
        notice: Notice,
        placed: Callable[[Placement], None],
        ranks: "Ranks | None" = None,
        draft_file: DraftFile | None = None,
        readers: "World | None" = None,
    ):
        self.file, self.threads, self.turn, self._notice = file, threads, Turn(), notice
        self._said_replaced = False
        self.config = opening.attending(opening.native_config(file, backend, notice), dense_attention, notice)
        self.backend = "native" if self.config else "llama.cpp"
        self.ctx = opening.choose_ctx(file, ctx, notice)
        self.placement: Placement | None = None
        with ExitStack() as undo:
            remote = None
            if self.config:
                proof = opening.proof_of(file, self.config, threads, self.ctx, where, notice, ranks)
                self.placement = opening.place(
                    file, self.config, self.ctx, where, proof, own_drafts, notice, draft_file, ranks
                )
                if ranks:
                    remote = opening.told(file, self.config, self.placement, threads, ranks)
                    undo.callback(remote.close)
                    self.placement = self.placement.with_share(remote.own_part)
                placed(self.placement)
            else:
                opening.check_no_gpu(where, notice)
            self.device = self.placement.device if self.placement else CPU
            self.tokenizer = Tokenizer(file.path, file)
            self.template: ChatTemplate | None = templates.chat_template(file, self.tokenizer, template)
            if self.config and self.placement:
                choices = proof.choices(self.placement.cards) if proof else {}
                self.model = opening.native_model(
                    file, self.config, self.placement, threads, where.repack, choices, progress, notice, remote, readers
                )
            else:
                from localrun.backends.llama_cpp import LlamaCppModel

                self.model = LlamaCppModel(file.path, self.ctx, threads, progress, file)
            undo.pop_all()
        if ranks is None:
            opening.warn_of_memory(file, self.placement, notice)
        self.ranks = ranks
        self.readers: Readers | None = self.model.readers if readers else None
        self.speculative: str | int = "off"
        self.draft_model: Engine | None = None
        self._mtp_file: GGUFFile | None = None

    def speculate(
        self,
        setting: str | int,
        draft: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        notice: Notice = lambda line: None,
    ) -> None:
        """Let sessions made from now on verify drafts, as load() says.

        llama.cpp's logits depend on how many tokens it evaluates at once: there "auto" without a draft model is "off".

        Raises:
            LocalrunError: a wrong setting, a draft model that can't be loaded or has another vocabulary, or a model
                whose cache can't forget single tokens.
        """
        setting = check_setting(setting)
        if setting == "auto" and draft is None and not self.config:
            setting = "off"
        if draft is not None and not self._take_layers(draft):
            self.draft_model = load(
                draft, device="cpu", threads=self.threads, speculative="off", progress=progress, notice=notice
            )
            check_vocabulary(self, self.draft_model)
        for engine in (self, self.draft_model):
            if setting != "off" and engine and not engine.model.can_forget():
                raise LocalrunError(f"{engine.file.path}: its state can't forget single tokens, as drafts need it to")
        self.speculative = setting

    def _take_layers(self, path: str | os.PathLike[str]) -> bool:
        """Whether a file holds layers alone that draft for a model; then they draft for this one from now on."""
        from localrun.models.dspark import is_dspark
        from localrun.models.mtp_file import is_mtp_only

        file = open_gguf(path)
        try:
            takes_blocks = is_dspark(file)
            if takes_blocks and self.readers:
                raise LocalrunError(f"{path}: DSpark's blocks read what prompts leave here, not on other hosts")
            if not takes_blocks and not is_mtp_only(file):
                file.close()
                return False
            take = getattr(self.model, "take_dspark" if takes_blocks else "take_mtp", None)
            if take is None:
                what = f"models on {self.device} by {self.backend}"
                raise LocalrunError(f"{path}: layers that draft for a model, though not for {what}")
            take(file)
        except BaseException:
            file.close()
            raise
        self._mtp_file = file
        return True

    def new_cache(self) -> KVCache:
        """An empty cache for ctx tokens."""
        with self.turn:
            return self.model.new_cache(self.ctx)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises LocalrunError unless there are ids, the model knows them all, and its file is as it was.

        That another file has its name by now is said once.
        """
        with self.turn:  # or another thread may close the file meanwhile
            self.file.check_unchanged()
            if not self._said_replaced and (path := self.file.replaced()):
                self._said_replaced = True
                self._notice(f"{path}: was replaced; the file that was opened stays in use until the next start")
        if not len(ids):
            raise LocalrunError("the prompt is empty")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self.model.vocab_size:
                raise LocalrunError(f"token id {shown(token)}; this model has ids 0 to {self.model.vocab_size - 1}")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 (T, vocab): the logits after each of the ids, from an empty context; no state is kept.

        The native backend keeps the keys and values of this one call in 32 bits, so nothing is rounded to the 16 bits
        of a session's cache.
        """
        rest, rows = token_ids(ids), []
        self.check_ids(rest)
        with self.turn:
            cache = self.model.new_cache(len(rest), exact=True)
        for n_tokens in cut(len(rest)):
            with self.turn:
                rows.append(self.model.forward(rest[:n_tokens], cache, all_logits=True))
            rest = rest[n_tokens:]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def prepare(self) -> None:
        """Load what only long prompts need, which takes a second or two, so that the first one need not wait for it."""
        with self.turn:
            self.model.prepare()

    def step_many(self, contexts: Sequence[tuple[Session, int]]) -> np.ndarray:
        """float32 (T, vocab): the logits after one token of each of these sessions, which then hold it too.

        On the CPU, up to quant.batch.MOST_TOKENS sessions share a step, which reads each weight once for all of them;
        their logits are to the bit those of session.advance([token]).

        Raises:
            LocalrunError: a session that is there twice or is another engine's, or an id that the vocabulary lacks.
            ContextFullError: a session has no room.
        """
        sessions, ids = [session for session, _ in contexts], token_ids([token for _, token in contexts])
        self.check_ids(ids)
        if len(set(map(id, sessions))) < len(sessions) or any(session.engine is not self for session in sessions):
            raise LocalrunError("a step takes different sessions of this engine, a token of each")
        return evaluate_each(sessions, ids)

    def generate(
        self, ids: Sequence[int], sampling: Sampling | None = None, max_tokens: int | None = None
    ) -> Iterator[int]:
        """The ids that follow the prompt `ids`; an end token ends it and is not yielded."""
        return self.session().tokens(ids, sampling, max_tokens=max_tokens)

    def session(self, speculative: str | int | None = None) -> Session:
        """A conversation with a cache of its own; speculative, if given, in place of the engine's."""
        setting = self.speculative if speculative is None else check_setting(speculative)
        with self.turn:
            return Session(self, None if setting == "off" else Speculation(self._new_draft(), setting))

    def _new_draft(self) -> Draft:
        if self.draft_model:
            return ModelDraft(self.draft_model.session())
        if getattr(self.model, "drafter", None):
            return BlockDraft(cast(DraftedModel, self.model), self.ctx)
        if self.model.mtp:
            return MTPDraft(cast(MTPModel, self.model), self.ctx)
        return NGramDraft()

    def describe(self) -> dict[str, str | int]:
        """What runs, where and with what, for -v and --json."""
        from quant.target import isa

        self.turn.check()
        facts: dict[str, str | int] = {
            "model": str(self.file.metadata.get("general.name", self.file.path.name)),
            "architecture": self.file.string("general.architecture"),
            "backend": self.backend,
            "device": self.device,
            "threads": self.threads,
            "ctx": self.ctx,
            "speculative": self.speculative,
            "weight_bytes": sum(tensor.n_bytes for tensor in self.file.tensors.values()),
        }
        if self.config:
            bits = self.placement.cache_bits if self.placement else 16
            facts |= {"isa": isa.LEVEL, "kv_bytes_per_token": self.config.kv_token_bytes(bits)}
            if isa.REFUSED:
                facts["isa_refused"] = isa.REFUSED
        if self.ranks:
            facts |= {"ranks": self.ranks.world.size, "message": self.ranks.sharing.message}
        if self.readers:
            facts["readers"] = len(self.readers)
        return facts

    def rank_figures(self) -> dict[str, float]:
        """What was sent to other ranks, and what that cost: Remote.figures; nothing where there are none."""
        return self.model.remote.figures() if self.ranks else {}

    def reader_figures(self) -> dict[str, float]:
        """What was read elsewhere, and what that cost: Readers.figures; nothing where all is read here."""
        return self.readers.figures() if self.readers else {}

    def close(self) -> None:
        """End the worker threads and free the file, once no thread computes; sessions can't be used afterwards.

        Raises LocalrunError if this thread is computing, in a signal handler say.
        """
        if not self.turn.end():
            return
        if self.draft_model:
            self.draft_model.close()
        self.model.close()
        if self._mtp_file:
            self._mtp_file.close()
        self.tokenizer.close()
        self.file.close()

    def __enter__(self) -> "Engine":
        self.turn.check()
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()
