"""localrun bench: how fast a model runs here, and how near that is to what the memory allows."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.figures import messages_line, reading_line
from cli.output import note, print_json, printable, progress_bar, show, size
from localrun.errors import LocalrunError

if TYPE_CHECKING:
    from localrun.engine import Engine
    from localrun.measure.bench import TimedEngine


_LLAMA_CPP = "llama.cpp"
_SWEEP = 8  # depths besides 0


@options.takes(
    load=options.LoadOptions(backend=options.BackendChoice.native, speculative="off"),
    ranks=options.RankOptions(),
    without=("ctx", "backend"),
)
def bench(
    model: options.Model = None,
    n_prompt: Annotated[int, typer.Option("-p", "--n-prompt", help="Tokens of prompt; 0 to leave it out.")] = 512,
    n_tokens: Annotated[int, typer.Option("-n", "--n-tokens", help="Tokens to generate; 0 to leave it out.")] = 128,
    depth: Annotated[
        str, typer.Option("-d", "--depth", help="Tokens of context before that; several with commas: 0,4096,16384.")
    ] = "0",
    sweep: Annotated[
        int | None,
        typer.Option("--sweep", metavar="N", help="The same for 0 to N tokens, by eighths.", show_default=False),
    ] = None,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="How often; a warm-up comes first.")] = 3,
    *,
    load: options.LoadOptions,
    ranks: options.RankOptions,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="llama.cpp|NAME:PATH",
            help="Run the same file there too, in turn with ours: in llama.cpp, or by a llama-bench at PATH, of "
            "ik_llama.cpp for one, which may have options: 'ik_llama.cpp:PATH -rtr 1'.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw rates by depth: png, svg or pdf.", show_default=False),
    ] = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure tokens a second of a prompt (pp) and of generation (tg), and memory bandwidth."""
    from cli.model import open_model, placement_document
    from localrun.bundled import model_path
    from localrun.gguf.file import open_gguf
    from localrun.measure.bench import Settings, run
    from localrun.measure.depth_plot import plot_depths
    from localrun.models.reader import read_config
    from localrun.pictures import check_picture

    settings = Settings(n_prompt, n_tokens, repetitions, _depths(depth) if sweep is None else _swept(sweep))
    settings.check()
    if plot is not None:
        check_picture(plot)
    with open_gguf(model_path(model)) as file:  # before kernels are compiled for nothing
        settings.check_fits(read_config(file))
    with ExitStack() as stack:
        engine = stack.enter_context(open_model(model, replace(load, ctx=settings.ctx), verbose, ranks=ranks))
        other, name = None, _LLAMA_CPP
        if against is not None:
            name, other = _other(against, engine, settings.ctx, stack)
            if verbose:
                note(f"{name}: {', '.join(f'{key} {value}' for key, value in other.description.items())}")
        with progress_bar() as report:
            document = run(engine, settings, other, report, name) | {"placement": placement_document(engine)}
    if plot is not None:
        plot_depths(plot, document)
    if as_json:
        print_json(document)
    else:
        _print(document)


def _depths(text: str) -> tuple[int, ...]:
    """Each once, in order."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise LocalrunError(f"-d {text}: expected numbers of tokens with commas between, such as 0,4096") from None


def _swept(deepest: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(deepest * i // _SWEEP for i in range(_SWEEP + 1)))


def _other(against: str, engine: "Engine", ctx: int, stack: ExitStack) -> "tuple[str, TimedEngine]":
    """Another runner, and what it is called. Raises LocalrunError."""
    name, colon, command = against.partition(":")
    if colon and name:
        from localrun.measure.llama_bench import LlamaBench

        return name, LlamaBench(command, engine.file, engine.threads)
    if against != _LLAMA_CPP:
        raise LocalrunError(f"--against {against}: expected {_LLAMA_CPP}, or NAME:PATH of a llama-bench")
    from localrun.measure.llama_cpp_compare import TimedLlamaCpp

    note("loading the file into llama.cpp, which may take minutes where it repacks weights")
    other = TimedLlamaCpp(engine.file, engine.threads, ctx)
    stack.callback(other.close)
    return name, other


def _print(document: dict[str, Any]) -> None:
    machine, isa, threads = document["machine"], document["isa"], document["threads"]
    show(f"{printable(document['model'])}, {size(document['weight_bytes'])}")
    show(f"{machine['cpu']}, {threads} of {machine['cores']} cores, {isa}, on {document['device']}")
    for line in [*_table(document), *_reading(document)]:
        show(line)
    for line in _speculation(document["speculation"]) if "speculation" in document else ():
        show(line)
    if "messages" in document:
        show(messages_line(document["messages"]))
    if "reading" in document:
        show(reading_line(document["reading"]))
    other = printable(document["against"]["engine"]) if "against" in document else ""
    for test, ratio in document.get("ratio", {}).items():
        best = document["ratio_of_best"][test]
        show(f"{test}: {ratio:.2f} times as fast as {other} (best by best {best:.2f})")


def _table(document: dict[str, Any]) -> list[str]:
    engines = {"localrun": document["results"]}
    if "against" in document:
        engines[printable(document["against"]["engine"])] = document["against"]["results"]
    width, name = max(map(len, document["results"])) + 1, max(10, *map(len, engines))
    lines = [f"{'test':<{width}} {'engine':<{name}} {'tokens/s':>10} {'':<10} {'median':>9} {'best':>9}"]
    for test in document["results"]:
        for engine, results in engines.items():
            r = results[test]
            rates = f"{r['mean']:>10.2f} +/- {r['deviation']:<6.2f} {r['median']:>9.2f} {r['best']:>9.2f}"
            lines.append(f"{test:<{width}} {engine:<{name}} {rates}")
    return lines


def _reading(document: dict[str, Any]) -> list[str]:
    read = document["read_bytes_per_s"]
    roof = f"{document['threads']} thread(s) can read {read['median'] / 1e9:.1f} GB/s (best {read['best'] / 1e9:.1f})"
    weights = f"weights read a token: {document['weight_bytes_per_token'] / 1e9:.3f} GB"
    if "weight_bytes_per_s" not in document:
        return [weights, roof]
    rate, fraction = document["weight_bytes_per_s"] / 1e9, document["fraction_of_read"]
    return [f"{weights}; generation reads {rate:.1f} GB/s, {fraction:.0%} of what can be read", roof]


def _speculation(found: dict[str, Any]) -> list[str]:
    rates = f"{found['tokens_per_s']:.2f} against {found['plain_tokens_per_s']:.2f} tokens/s"
    accepted = f"{found['accepted_tokens']} of {found['drafted_tokens']} drafts accepted ({found['draft']})"
    return [
        f"greedy text with drafts: {rates}, {found['speed_up']:.2f} times as fast",
        f"{accepted}, {found['tokens_per_step']:.2f} tokens a step",
    ]
