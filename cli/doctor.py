"""localrun doctor: what this machine has, what it measures, and what to do where something is amiss.

With --gpu: whether the card computes what the CPU does, and how fast.
"""

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.interrupt import raising
from cli.output import end_line, note, print_json, printable, show, show_again, terminal_size
from localrun.errors import LocalrunError
from localrun.files import user_path

_WIDTH = 14


Place = Annotated[
    str | None,
    typer.Argument(
        metavar="PATH",
        help="A model file, or a folder of them, whose disk to measure; the bundled model's if not given. With "
        "--gpu: the model.",
        show_default=False,
    ),
]
Prove = Annotated[bool, typer.Option("--gpu", help="Have the GPU prove itself with a model; takes some minutes.")]
Report = Annotated[
    str | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="With --gpu: write all figures, with nothing private, for a report of a problem.",
        show_default=False,
    ),
]
Ranks = Annotated[
    str | None,
    typer.Option(
        "--ranks", metavar="N|numa", help="Time messages between processes of this machine.", show_default=False
    ),
]
Hosts = Annotated[
    str | None, typer.Option("--hosts", metavar="A,B,...", help="Time messages to other machines.", show_default=False)
]
Link = Annotated[
    str | None,
    typer.Option(
        "--link",
        metavar="FILE",
        help="With --ranks or --hosts: write what was measured, for plan --link.",
        show_default=False,
    ),
]


def doctor(
    path: Place = None,
    gpu: Prove = False,
    report: Report = None,
    ranks: Ranks = None,
    hosts: Hosts = None,
    link: Link = None,
    threads: options.Threads = None,
    ctx: options.Ctx = None,
    as_json: options.Json = False,
) -> None:
    """Look at this machine: processor, memory, GPU, disk. Takes some seconds."""
    is_link = ranks is not None or hosts is not None
    if link is not None and not is_link:
        raise LocalrunError("--link is for doctor --ranks or --hosts")
    if is_link:
        _refuse_others("doctor --ranks and --hosts take no {}", PATH=path, gpu=gpu or None, threads=threads, ctx=ctx)
        _time_messages(ranks, hosts, link, as_json)
    elif gpu:
        _prove(path, report, threads, ctx, as_json)
    else:
        _refuse_others("{} is for doctor --gpu", report=report, threads=threads, ctx=ctx)
        _examine(path, as_json)


def _refuse_others(message: str, **given: object) -> None:
    """Raises LocalrunError about the first option that was given."""
    for name, value in given.items():
        if value is not None:
            raise LocalrunError(message.format(name if name.isupper() else f"--{name}"))


def _examine(path: str | None, as_json: bool) -> None:
    """All findings: as lines, or one JSON document."""
    from localrun.measure.doctor import examine

    findings = examine(_path(path))
    if as_json:
        fields = ("status", "text", "advice", "data")
        print_json({each.name: {name: getattr(each, name) for name in fields} for each in findings})
        return
    for each in findings:
        show(f"{each.status:<8} {each.name:<{_WIDTH}} {printable(each.text)}")
        if each.advice:
            show(f"{'':<8} {'':<{_WIDTH}} -> {printable(each.advice)}")


def _path(path: str | None) -> Path | None:
    """What was given, else where the bundled model is, if it is installed. Raises LocalrunError if it is not there."""
    from localrun.bundled import model_path

    if path is not None:
        if not (found := user_path(path)).exists():
            raise LocalrunError(f"{path}: no such file or folder")
        return found
    try:
        return model_path(None)
    except LocalrunError:
        return None


def _time_messages(ranks: str | None, hosts: str | None, link: str | None, as_json: bool) -> None:
    """Between the ranks: as lines, or one JSON document."""
    from localrun.files import check_place, write_json
    from localrun.measure.link import link_document, measure_links
    from localrun.ranks.places import names_of, places_of
    from localrun.ranks.start import echoing_ranks

    places = places_of(ranks, hosts)
    if len(places) == 1:
        raise LocalrunError("one rank sends no messages that could be timed; give two or more")
    target = None if link is None else user_path(link)
    if target is not None:
        check_place(target)
    with echoing_ranks(places, note) as comm:
        found = measure_links(comm, names_of(places))
    document = link_document(found, f"measured: {hosts or f'{len(places)} ranks of this machine'}")
    if target is not None:
        write_json(target, document)
    if as_json:
        print_json({"ranks": found, "link": document})
        return
    show(f"{'':<20} {'empty, us':>10} {'p90':>7} {'a layer, us':>12} {'p90':>7} {'GB/s':>7}")
    for each in found:
        empty, layer = (f"{1e6 * each[f'{what}_s']:.1f}" for what in ("round_trip", "layer"))
        tails = [f"{1e6 * each[f'{what}_p90_s']:.1f}" for what in ("round_trip", "layer")]
        rate = f"{each['bytes_per_s'] / 1e9:>7.2f}"
        show(f"{printable(each['rank']):<20} {empty:>10} {tails[0]:>7} {layer:>12} {tails[1]:>7} {rate}")


def _prove(model: str | None, report: str | None, threads: int | None, ctx: int | None, as_json: bool) -> None:
    """The cards' verdicts: as lines, or one JSON document. Exits with 1 if one failed."""
    import sys

    from localrun.bundled import model_path
    from localrun.files import check_place, write_json
    from localrun.gpu.proof import prove
    from localrun.gpu.proof.report import lines
    from localrun.workers import n_workers

    place = None if report is None else user_path(report)
    if place is not None:
        check_place(place)
    width = terminal_size()[0] - 1 if sys.stderr.isatty() else 0

    def doing(what: str) -> None:
        if width:
            show_again(what, width)

    def say(line: str) -> None:
        if width:
            end_line(width)
        note(line)

    with raising():
        found = prove.examine(model_path(model), n_workers(threads), ctx, say, doing)
    if width:
        end_line(width)
    documents = [each.document() for each in found]
    document = documents[0] if len(found) == 1 else {"verdicts": documents}
    if place is not None:
        write_json(place, document)
    if as_json:
        print_json(document)
    else:
        for each in found:
            if len(found) > 1:
                show(f"{each.identity.card}:")
            for status, what, text in lines(each):
                show(f"{status:<8} {what:<{_WIDTH + 4}} {text}")
    if any(each.refusal for each in found):
        raise typer.Exit(1)
