"""localrun bench: how fast a model runs here, and how near that is to what the memory allows."""

from contextlib import ExitStack
from dataclasses import replace
from enum import Enum
from typing import Annotated, Any

import typer

from cli import options
from cli.output import note, print_json, printable, progress_bar, show, size
from localrun.errors import LocalrunError


class Against(str, Enum):
    """Who else runs the same file."""

    llama_cpp = "llama.cpp"


@options.takes(
    load=options.LoadOptions(backend=options.BackendChoice.native, speculative="off"), without=("ctx", "backend")
)
def bench(
    model: options.Model = None,
    n_prompt: Annotated[int, typer.Option("-p", "--n-prompt", help="Tokens of prompt; 0 to leave it out.")] = 512,
    n_tokens: Annotated[int, typer.Option("-n", "--n-tokens", help="Tokens to generate; 0 to leave it out.")] = 128,
    depth: Annotated[
        str, typer.Option("-d", "--depth", help="Tokens of context before that; several with commas: 0,4096,16384.")
    ] = "0",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="How often; a warm-up comes first.")] = 3,
    *,
    load: options.LoadOptions,
    against: Annotated[
        Against | None,
        typer.Option("--against", help="Run the same file there too, in turn with ours.", show_default=False),
    ] = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure tokens a second of a prompt (pp) and of generation (tg), and memory bandwidth."""
    from cli.model import open_model, placement_document
    from localrun.bundled import model_path
    from localrun.gguf.file import open_gguf
    from localrun.measure.bench import Settings, run
    from localrun.models.reader import read_config

    settings = Settings(n_prompt, n_tokens, repetitions, _depths(depth))
    settings.check()
    with open_gguf(model_path(model)) as file:  # before kernels are compiled for nothing
        settings.check_fits(read_config(file))
    with ExitStack() as stack:
        engine = stack.enter_context(open_model(model, replace(load, ctx=settings.ctx), verbose))
        other = None
        if against is not None:
            from localrun.measure.llama_cpp_compare import TimedLlamaCpp

            note("loading the file into llama.cpp, which may take minutes where it repacks weights")
            other = TimedLlamaCpp(engine.file, engine.threads, settings.ctx)
            stack.callback(other.close)
            if verbose:
                note(f"llama.cpp: {', '.join(f'{name} {value}' for name, value in other.description.items())}")
        with progress_bar() as report:
            document = run(engine, settings, other, report) | {"placement": placement_document(engine)}
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


def _print(document: dict[str, Any]) -> None:
    machine, isa, threads = document["machine"], document["isa"], document["threads"]
    show(f"{printable(document['model'])}, {size(document['weight_bytes'])}")
    show(f"{machine['cpu']}, {threads} of {machine['cores']} cores, {isa}, on {document['device']}")
    for line in [*_table(document), *_reading(document)]:
        show(line)
    for line in _speculation(document["speculation"]) if "speculation" in document else ():
        show(line)
    for test, ratio in document.get("ratio", {}).items():
        best = document["ratio_of_best"][test]
        show(f"{test}: {ratio:.2f} times as fast as llama.cpp (best by best {best:.2f})")


def _table(document: dict[str, Any]) -> list[str]:
    engines = {"localrun": document["results"]}
    if "against" in document:
        engines["llama.cpp"] = document["against"]["results"]
    width = max(len(test) for test in document["results"]) + 1
    lines = [f"{'test':<{width}} {'engine':<10} {'tokens/s':>10} {'':<10} {'median':>9} {'best':>9}"]
    for test in document["results"]:
        for engine, results in engines.items():
            r = results[test]
            rates = f"{r['mean']:>10.2f} +/- {r['deviation']:<6.2f} {r['median']:>9.2f} {r['best']:>9.2f}"
            lines.append(f"{test:<{width}} {engine:<10} {rates}")
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
