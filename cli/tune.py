"""localrun tune: measure what is best on this CPU, and keep it for every later start."""

from typing import Any

from cli import options
from cli.interrupt import raising
from cli.output import note, print_json, printable, progress_bar, show


def tune(model: options.Model = None, threads: options.Threads = None, as_json: options.Json = False) -> None:
    """Measure what is best on this CPU, for a model's types, and keep it. Takes about a minute."""
    from localrun.bundled import model_path
    from localrun.gguf.file import open_gguf
    from localrun.measure.tune import keep
    from localrun.measure.tune import tune as measure
    from localrun.workers import n_workers
    from quant.target import tuning
    from quant.threads.pool import Pool

    threads = n_workers(threads)
    with open_gguf(model_path(model)) as file, raising(), progress_bar() as report:
        pool = Pool(threads)
        try:
            found = measure(file, pool, report)
        finally:
            pool.close()
    keep(found)
    document = found.document() | {"threads": threads, "path": str(tuning.kept_path())}
    if as_json:
        print_json(document)
        return
    _print(document)
    note("kernels are compiled anew at the next start if prefetch distances have changed")


def _print(document: dict[str, Any]) -> None:
    show(f"{printable(document['model'])}, {document['cpu']}, {', '.join(document['types'])}")
    for what, ratios in document["measured"].items():
        figures = ", ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items())
        show(f"{what + ',':<22} time against the first or without: {figures}")
    for name, value in document["tuning"].items():
        show(f"{name:<24} {value}")
    show(f"kept in {printable(document['path'])}")
