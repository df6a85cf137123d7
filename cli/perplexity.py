"""localrun perplexity: how well a model predicts a text, by llama.cpp's procedure."""

import sys
import time
from dataclasses import replace
from typing import Annotated

import typer

from cli import options
from cli.output import note, print_json, rate, show, show_again, tell
from cli.text import read_text
from localrun.errors import LocalrunError


@options.takes(load=options.LoadOptions(speculative="off"), without=("ctx", "speculative", "draft"))
def perplexity(
    model: options.Model = None,
    file: Annotated[str, typer.Option("-f", "--file", metavar="FILE", help="The text, - for stdin.")] = ...,
    chunk: Annotated[int, typer.Option("-c", "--ctx", help="Tokens a chunk; the second half of each counts.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", metavar="N", help="Only the first N chunks.", show_default=False)
    ] = None,
    *,
    load: options.LoadOptions,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure how well the model predicts a text: perplexity, as llama.cpp computes it."""
    from cli.model import open_model, placement_document
    from localrun.measure.perplexity import perplexity as compute

    text = read_text(file)
    if not text:
        raise LocalrunError(f"{file}: is empty")
    with open_model(model, replace(load, ctx=chunk), verbose) as engine:
        ids = engine.tokenizer.encode(text)
        eta = _Eta()
        result = compute(engine, ids, chunk, chunks, eta.show)
        facts = engine.describe() | {"placement": placement_document(engine)}
    if as_json:
        print_json(
            facts
            | {
                "file": file,
                "perplexity": result.ppl,
                "error": result.error,
                "chunk_tokens": result.n_ctx,
                "chunks": len(result.running),
                "tokens": result.n_tokens,
                "counted_tokens": result.n_counted,
                "running": result.running,
                "seconds": round(eta.seconds(), 3),
                "tokens_per_s": rate(result.n_tokens, eta.seconds()),
            }
        )
        return
    show(f"perplexity {result.ppl:.4f} +/- {result.error:.5f} ({len(result.running)} chunks of {result.n_ctx} tokens)")


class _Eta:
    """Progress on stderr: a line that is rewritten on a terminal, else llama.cpp's row of running values."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def show(self, done: int, total: int, ppl: float) -> None:
        left = self.seconds() / done * (total - done)
        if sys.stderr.isatty():
            show_again(f"chunk {done} of {total}, perplexity {ppl:.4f}, {left:.0f} s left", 70)
            if done == total:
                tell("")
        else:
            if done == 1:
                note(f"{total} chunks, about {left:.0f} s left")
            tell(f"[{done}]{ppl:.4f}", end="\n" if done == total else ",")
