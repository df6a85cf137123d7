"""Opening a model for a command, and streaming a reply from it, both with progress shown."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import localrun
from cli.figures import messages_line, reading_line
from cli.interrupt import show_cursor
from cli.options import LoadOptions, RankOptions, SamplingOptions, ShareChoice, TemplateOptions, ThinkChoice
from cli.output import note, printable, progress_bar, size, tell
from localrun.bundled import model_path
from localrun.text.template_variables import check_names, thinking

if TYPE_CHECKING:
    from pathlib import Path

    from localrun.engine import Engine
    from localrun.generate.sampling import Sampling
    from localrun.generate.session import Session
    from localrun.placement.placement import Placement
    from localrun.ranks.sharing import Ranks
    from localrun.ranks.world import World
    from localrun.text.chat_template import ChatTemplate

# The numbers among localrun.Sampling's fields: what is told of it, and what a chat can set.
SETTINGS = (
    *("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n"),
    *("presence_penalty", "frequency_penalty", "seed"),
)


def exit_if_cut(path: "str | Path") -> None:
    """Should a mapped file be cut short, the process ends with a line that names path, and exit code 1."""
    from localrun.gguf.bus_error import exit_with

    exit_with(f"localrun: {printable(str(path))}: was cut short while it was in use, or its disk failed")


@contextmanager
def open_model(
    model: str | None,
    options: LoadOptions,
    verbose: bool = False,
    chat_template: str | None = None,
    ranks: RankOptions | None = None,
) -> "Iterator[Engine]":
    """The loaded model, until the block ends; with verbose, what goes where and what runs, on stderr."""
    path, draft_path = model_path(model), None if options.draft is None else model_path(options.draft)
    exit_if_cut(path)
    with ExitStack() as stack:
        began = time.perf_counter()
        others, readers, threads = _start_others(stack, path, ranks or RankOptions(), options)
        with _ending_at_loss(others.world if others else None, readers), progress_bar() as report:
            engine = localrun.load(
                path,
                device=options.device,
                threads=threads,
                ctx=options.ctx,
                backend=options.backend.value,
                vram=options.vram,
                gpu_experts=options.gpu_experts,
                expert_usage=None if others and others.sharing.usage else options.expert_usage,
                cache_bits=int(options.cache_bits.value),
                repack=options.repack and others is None,
                unproven=options.unproven,
                dense_attention=options.dense_attention,
                speculative=options.speculative,
                draft=draft_path,
                chat_template=chat_template,
                ranks=others,
                readers=readers,
                progress=report,
                notice=note,
                placed=_show_placement if verbose else None,
            )
        stack.enter_context(engine)
        if verbose:
            facts = ", ".join(f"{name} {value}" for name, value in engine.describe().items())
            note(f"loaded in {time.perf_counter() - began:.1f} s: {facts}")
        yield engine
        if verbose and engine.ranks:
            note(messages_line(engine.rank_figures()))
        if verbose and engine.readers:
            note(reading_line(engine.reader_figures()))


def _ending_at_loss(*worlds: "World | None") -> AbstractContextManager[None]:
    """A block in which a rank that is lost ends the program with a line, at once."""
    if not any(worlds):
        return nullcontext()
    from localrun.ranks.loss import ending_at_loss

    def say(line: str) -> None:
        show_cursor()
        note(line)

    return ending_at_loss([world for world in worlds if world], say)


def _start_others(
    stack: ExitStack, path: "Path", options: RankOptions, load: LoadOptions
) -> "tuple[Ranks | None, World | None, int | None]":
    """Other ranks and readers, if there are to be any, and threads of this process. Raises LocalrunError."""
    if options.prefill_hosts is None:
        ranks, threads = _start_ranks(stack, path, options, load)
        return ranks, None, threads
    from localrun.ranks.places import reader_places, threads_at
    from localrun.ranks.start import reading_ranks

    places = reader_places(options.prefill_hosts)

    def start_readers() -> "World":
        return stack.enter_context(reading_ranks(path, places, load.threads, load.dense_attention))

    # MPI, which starts once, is told to stay inside this machine where all that it starts first for are here.
    if any(place.host for place in places):
        readers, (ranks, threads) = start_readers(), _start_ranks(stack, path, options, load)
    else:
        (ranks, threads), readers = _start_ranks(stack, path, options, load), start_readers()
    return ranks, readers, threads_at(places[0], threads)


def _start_ranks(
    stack: ExitStack, path: "Path", options: RankOptions, load: LoadOptions
) -> "tuple[Ranks | None, int | None]":
    """Other ranks, if there are to be any, and threads of this one. Raises LocalrunError."""
    from localrun.ranks.mpi import place_in_mpiexec

    is_given, threads = options.ranks is not None or options.hosts is not None, load.threads
    if not is_given and place_in_mpiexec()[1] == 1:
        return None, threads
    from localrun.ranks.places import places_of, threads_at
    from localrun.ranks.sharing import Sharing
    from localrun.ranks.start import places_in_mpiexec, sharing_ranks

    places = places_of(options.ranks, options.hosts) if is_given else places_in_mpiexec()
    if len(places) == 1:  # no other to share with
        return None, threads
    usage = None if options.rank_share is ShareChoice.slices else load.expert_usage
    by_speed, repack = options.rank_sizes == "auto", load.repack and _repacking_pays(path)
    sharing = Sharing(
        options.rank_messages.value, () if by_speed else _sizes(options.rank_sizes), options.rank_share.value,
        None if usage is None else str(usage), options.rank_copies, by_speed, repack,
    )  # fmt: skip
    ranks = stack.enter_context(sharing_ranks(path, places, sharing, threads))
    return ranks, threads_at(places[0], threads)


def _repacking_pays(path: "Path") -> bool:
    from localrun.cpu.repack import repacking_pays
    from localrun.gguf.file import open_gguf

    with open_gguf(path) as file:
        return repacking_pays(file, note)


def _sizes(text: str | None) -> tuple[float, ...]:
    """--rank-sizes. Raises LocalrunError."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise localrun.LocalrunError(f"--rank-sizes {text}: expected auto, or numbers such as 2,1") from None


def placement_document(engine: "Engine") -> dict[str, Any] | None:
    """What is where, for --json."""
    return engine.placement.document() if engine.placement else None


def _show_placement(placement: "Placement") -> None:
    """The table on stderr: bytes by memory, and what is needed of what there is."""
    width = max(map(len, placement.available)) + 1
    for row in placement.rows:
        tell(f"{row.where:<{width}} {size(row.n_bytes):>11}  {row.what}")
    for where, needed in placement.needed.items():
        usable = size(max(0, placement.available[where]))
        tell(f"{where:<{width}} {size(needed):>11}  needed, {usable} usable")
    if len(placement.cards) > 1:
        for where, card, layers in zip(placement.needed, placement.cards, placement.layers, strict=False):
            tell(f"{where:<{width}} {f'cuda:{card}':>11}  layers {layers.start} to {layers.stop - 1}")


def sampling_for(engine: "Engine", given: dict[str, Any]) -> "Sampling":
    """The sampling the model recommends, with what the user gave in its place."""
    return replace(localrun.Sampling.recommended(engine.file.metadata, note), **given)


def given_sampling(options: SamplingOptions, **others: Any) -> dict[str, Any]:
    """The sampling options the user gave. Raises LocalrunError on a wrong one, before anything is loaded."""
    given = {name: value for name, value in (asdict(options) | others).items() if value is not None}
    localrun.Sampling(**given)
    return given


def max_tokens(n: int) -> int | None:
    """-n as the engine takes it: None for -1, which is until the end."""
    if n < -1 or n == 0:
        raise localrun.LocalrunError(f"-n {n}; expected 1 or more, or -1 for until the end")
    return None if n == -1 else n


def given_variables(options: TemplateOptions) -> dict[str, Any]:
    """--template-var as a template gets it: true, false and what else is JSON as such, any other value as a text.

    Raises LocalrunError on one that is no NAME=VALUE, or not the user's to set, before anything is loaded.
    """
    given = {}
    for text in options.template_var or []:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise localrun.LocalrunError(f"--template-var {text}: expected NAME=VALUE")
        try:
            given[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except (ValueError, RecursionError):
            given[name] = value
    check_names(given)
    return given


def template_settings(template: "ChatTemplate | None", think: ThinkChoice, given: dict[str, Any]) -> dict[str, Any]:
    """The template's variables for --think, and those that the user gave. Raises LocalrunError on an unknown one."""
    if template is None:
        if given or think is not ThinkChoice.auto:
            raise localrun.LocalrunError("there is no chat template whose variables could be set")
        return {}
    check_names(given, template.source)
    if think is ThinkChoice.auto:
        return given
    switch = thinking(template.source, think is ThinkChoice.on)
    if switch is None:
        note(f"the chat template has no switch for thinking: {think.value} has no effect")
    return {**(switch or {}), **given}


def stream(
    session: "Session",
    ids: Sequence[int],
    sampling: "Sampling",
    limit: int | None,
    stop: Sequence[str],
    spelled: Mapping[int, str] | None = None,
    between: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """The reply in pieces, with a progress bar while the prompt is read; closing it early ends the reply.

    between is called between the steps of reading the prompt; what it raises ends the reply.
    """
    with progress_bar() as report:

        def read(done: int, total: int) -> None:
            between()
            if report is not None:
                report(done, total, "Reading the prompt")

        pieces = session.reply(ids, sampling, max_tokens=limit, stop=list(stop), spelled=spelled, progress=read)
        first = next(pieces, "")
    try:
        yield first
        yield from pieces
    finally:
        pieces.close()
