"""localrun imatrix: which columns of a model's matrices matter on a text, for `localrun convert --imatrix`."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.interrupt import raising
from cli.output import note, print_json, printable, progress_bar, rate, show
from cli.text import read_text
from localrun.errors import LocalrunError

if TYPE_CHECKING:
    from localrun.measure.imatrix import Importance, Progress


def imatrix(
    model: options.Model = None,
    file: Annotated[str, typer.Option("-f", "--file", metavar="FILE", help="The text, - for stdin.")] = ...,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")] = ...,
    chunk: Annotated[int, typer.Option("-c", "--ctx", help="Tokens a chunk.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", metavar="N", help="Only the first N chunks.", show_default=False)
    ] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Collect an importance matrix from a text, by expert, in llama.cpp's format."""
    from cli.model import open_model
    from localrun.measure.imatrix import check_destination, collect, write

    check_destination(out)
    if device not in ("auto", "cpu"):
        raise LocalrunError(f"device '{device}': importances are collected on the CPU; use --device cpu")
    text = read_text(file)
    if not text:
        raise LocalrunError(f"{file}: is empty")
    load = options.LoadOptions(
        "cpu", threads=threads, ctx=chunk, backend=options.BackendChoice.native, speculative="off"
    )
    with open_model(model, load, verbose) as engine:
        started = time.perf_counter()
        with progress_bar() as report:
            result = collect(engine, engine.tokenizer.encode(text), chunk, chunks, _progress(report, started))
        seconds = time.perf_counter() - started
        facts = engine.describe()
    with raising():
        write(out, result, "stdin" if file == "-" else file)
    _report(result, out, facts | {"seconds": round(seconds, 3)}, file, as_json)


def _progress(bar, started: float) -> "Progress":
    """The bar on a terminal, else one line when the first chunk has told how long it will take."""

    def show(done: int, total: int) -> None:
        if bar is not None:
            bar(done, total, "Reading the text")
        elif done == 1 and not sys.stderr.isatty():
            note(f"{total} chunks, about {(time.perf_counter() - started) * (total - 1):.0f} s left")

    return show


def _report(result: "Importance", path: Path, facts: dict[str, object], file: str, as_json: bool) -> None:
    n_missed, n_experts = sum(map(len, result.unreached.values())), sum(result.n_experts.values())
    if n_missed:
        layers = ", ".join(f"{len(missed)} in layer {index}" for index, missed in result.unreached.items())
        note(f"{n_missed} of {n_experts} experts were never reached and will be packed without importance: {layers}")
    n_tokens = result.n_chunks * result.n_ctx
    if as_json:
        print_json(
            facts
            | {
                "file": file,
                "path": str(path),
                "matrices": len(result.squares),
                "chunks": result.n_chunks,
                "chunk_tokens": result.n_ctx,
                "tokens": n_tokens,
                "tokens_per_s": rate(n_tokens, facts["seconds"]),
                "experts": n_experts,
                "unreached_experts": result.unreached,
            }
        )
        return
    show(f"{printable(str(path))}: {len(result.squares)} matrices, {result.n_chunks} chunks of {result.n_ctx} tokens")
