"""Every low-bit type by one table: files of localrun convert and of llama.cpp's quantiser, of the same F16 and imatrix.

    python scripts/compare_types.py [MODEL=TEXT ...] [--types Q2_K IQ2_XXS] [--tokens 2048] [-t 2] [--mirrored]

Each MODEL is unpacked to F16; importances come from the first part of its TEXT, what is measured from the part after
it. Like is compared with like: where a mix gives a tensor more bits here than in llama.cpp, ours is packed in
llama.cpp's type. All files run on the native backend, with 8-bit activations as always. A table goes to stderr; the
last line of stdout is one JSON document: for each model and type perplexity, its error, how far ours is from
llama.cpp's and that difference's own error (both predict the same tokens), Kullback-Leibler divergence from the F16
file (nats a token), the same first choice, bits a weight, seconds, and tensors whose types would differ.

With --mirrored also how much of each file's loss beyond F16's is due to its errors' size and how much to their signs,
in nats: half the sum and half the difference of it and the loss with all errors turned around. A model is not at its
best on every text, so errors change its loss to first order, down as well as up, but not its divergence.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import localrun
from localrun.bundled import model_path
from localrun.convert import Options, convert, make_plan
from localrun.convert.gguf_source import GGUFSource, read_model
from localrun.convert.imatrix import Importances
from localrun.convert.mixes import Override, parse_mix
from localrun.convert.plan import Plan
from localrun.errors import LocalrunError
from localrun.measure.imatrix import Importance, collect, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import llama_quantize
from paths import DATA

TEXT = DATA / "text" / "wikitext2.txt"
TYPES = [
    *["Q2_K_S", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "TQ2_0"],
    *["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"],
]
CHUNK = 512  # tokens; predictions count from its second half on
MADE = "llama.cpp", "localrun"


@dataclass(frozen=True)
class Work:
    """What all types of a model share.

    Attributes:
        f16: the file that is packed.
        imatrix: its importances.
        chunks: ids to be predicted.
        reference: float32 log-probabilities (T, V) of each chunk by the F16 file.
    """

    f16: Path
    imatrix: Path
    chunks: list[list[int]]
    reference: list[np.ndarray]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prepare(folder: Path, model: str, text: Path, arguments: argparse.Namespace) -> Work:
    """The F16 file, its importances and its predictions."""
    path = folder / "F16.gguf"
    options = Options(mix="F16", allow_requantize=True)
    convert(make_plan(model_path(model), path, options), threads=arguments.threads)
    with load(path, arguments) as engine:
        ids = engine.tokenizer.encode(read(text, arguments))
        n_seen, n_chunks = arguments.imatrix_tokens, arguments.tokens // CHUNK
        if len(ids) < n_seen + n_chunks * CHUNK:
            raise SystemExit(f"{text}: {len(ids)} tokens, fewer than --imatrix-tokens and --tokens")
        imatrix = folder / "imatrix.gguf"
        write(imatrix, complete(collect(engine, ids[:n_seen], CHUNK), path), text.name)
        chunks = [ids[start : start + CHUNK] for start in range(n_seen, n_seen + n_chunks * CHUNK, CHUNK)]
        return Work(path, imatrix, chunks, list(log_probabilities(engine, chunks)))


def complete(found: Importance, path: Path) -> Importance:
    """With importances of 1 for what no text reaches, layers for multi-token prediction: the lowest types want some."""
    for target in read_model(GGUFSource(path)).targets:
        if len(target.shape) > 1 and target.name.startswith("blk.") and target.name not in found.squares:
            n_slices = target.n_rows // target.shape[-2]
            found.squares[target.name] = np.ones((n_slices, target.n_cols), np.float32)
            found.counts[target.name] = np.ones(n_slices, np.float32)
    return found


def read(text: Path, arguments: argparse.Namespace) -> str:
    """As much of a text as its tokens may take."""
    with text.open("rb") as file:
        return file.read(8 * (arguments.imatrix_tokens + arguments.tokens)).decode("utf-8", "ignore")


def load(path: Path, arguments: argparse.Namespace) -> localrun.Engine:
    options = {"device": "cpu", "backend": "native", "speculative": "off"}
    return localrun.load(path, threads=arguments.threads, ctx=CHUNK, **options)


def log_probabilities(engine: localrun.Engine, chunks: Sequence[list[int]]) -> Iterator[np.ndarray]:
    """float32 (T, V) of the second half of each chunk."""
    for chunk in chunks:
        rows = engine.logits(chunk)[CHUNK // 2 : -1].astype(np.float32)
        rows -= rows.max(1, keepdims=True)
        yield rows - np.log(np.exp(rows).sum(1, keepdims=True))


def measure(path: Path, work: Work, arguments: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of a file, and each prediction's loss in nats, float64."""
    losses, divergences, agreeing = [], [], []
    with load(path, arguments) as engine:
        found = log_probabilities(engine, work.chunks)
        for log_q, log_p, chunk in zip(found, work.reference, work.chunks, strict=True):
            losses.append(-log_q[np.arange(len(log_q)), chunk[CHUNK // 2 + 1 :]])
            divergences.append((np.exp(log_p) * (log_p - log_q)).sum(1))
            agreeing.append(log_q.argmax(1) == log_p.argmax(1))
    nats = np.concatenate(losses).astype(np.float64)
    perplexity = float(np.exp(nats.mean()))
    tensors = gguf.GGUFReader(path).tensors
    figures = {
        "perplexity": perplexity,
        "error": perplexity * float(nats.std()) / (len(nats) - 1) ** 0.5,
        "kl": float(np.concatenate(divergences).mean(dtype=np.float64)),
        "top_1": float(np.concatenate(agreeing).mean()),
        "bits_per_weight": 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors),
    }
    return figures, nats


def compare(type_: str, work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both files of a type; "error" instead where one cannot be made or run."""
    paths = {who: work.f16.with_name(f"{who}.gguf") for who in MADE}
    try:
        rows, nats, same = {}, {}, {}
        for who, path in paths.items():
            started = time.perf_counter()
            if who == "localrun":
                same = differing(type_, work, paths["llama.cpp"])
                convert(plan(path, type_, work, same), threads=arguments.threads)
            else:
                pack_by_llama_cpp(path, type_, work, arguments)
            seconds = time.perf_counter() - started
            figures, nats[who] = measure(path, work, arguments)
            rows[who] = figures | {"pack_s": round(seconds, 2)}
            if arguments.mirrored:
                rows[who] |= size_and_sign(path, nats[who], work, arguments)
        apart = nats["localrun"] - nats["llama.cpp"]
        return {
            "relative_difference": float(np.exp(apart.mean()) - 1),
            "difference_error": float(apart.std() / (len(apart) - 1) ** 0.5),
            "differing_types": same,
        } | rows
    except (LocalrunError, llama_quantize.QuantizeError) as error:
        return {"error": str(error).splitlines()[-1]}
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


def plan(path: Path, type_: str, work: Work, types: dict[str, list[str]]) -> Plan:
    """How we pack; types: of tensors that are to have another than their mix says (differing)."""
    overrides = [
        Override(re.compile(f"^{re.escape(name)}$"), theirs, name, True) for name, (_, theirs) in types.items()
    ]
    return make_plan(work.f16, path, Options(mix=type_, overrides=overrides, imatrix=work.imatrix))


def mirror(packed: Path, f16: Path) -> Path:
    """An F16 file whose weights are as far from those of `f16` as those of `packed`, on the other side."""
    path = f16.with_name("mirrored.gguf")
    shutil.copy(f16, path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(packed).tensors}
    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        found = tensors[tensor.name]
        if found.tensor_type != tensor.tensor_type:
            values = gguf.quants.dequantize(found.data, found.tensor_type).reshape(tensor.data.shape)
            tensor.data[...] = 2 * tensor.data.astype(np.float32) - values
    reader.data.flush()
    return path


def size_and_sign(packed: Path, nats: np.ndarray, work: Work, arguments: argparse.Namespace) -> dict[str, float]:
    """What the size and what the signs of a file's errors add to F16's loss; nats: its own losses."""
    path = mirror(packed, work.f16)
    _, mirrored = measure(path, work, arguments)
    path.unlink()
    rows = zip(work.reference, work.chunks, strict=True)
    f16 = [-log_p[np.arange(len(log_p)), chunk[CHUNK // 2 + 1 :]] for log_p, chunk in rows]
    size = (nats + mirrored) / 2 - np.concatenate(f16)
    return {"by_size": float(size.mean()), "by_sign": float((nats - mirrored).mean() / 2)}


def pack_by_llama_cpp(path: Path, type_: str, work: Work, arguments: argparse.Namespace) -> None:
    found = Importances(work.imatrix, read_model(GGUFSource(work.f16)).targets)
    means = {name: np.nan_to_num(values, nan=1.0) for name, values in found.items()}  # as llama-quantize fills them
    llama_quantize.quantize(work.f16, path, type_, means, arguments.threads)


def differing(type_: str, work: Work, path: Path) -> dict[str, list[str]]:
    """Tensors whose types our mix and llama.cpp's file differ in, with both: small ones that stay at Q8_0 here."""
    ours = plan(path.with_suffix(".plan"), type_, work, {})
    types = {target.name: each for target, each in zip(ours.targets, ours.types, strict=True)}
    theirs = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    return {name: [types[name], other] for name, other in theirs.items() if types[name] != other}


def table(model: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [
        f"| {model} | bits a weight | llama.cpp's | perplexity | llama.cpp's | ours over theirs | KL | llama.cpp's "
        "| pack s | llama.cpp's |",
        "|---" * 10 + "|",
    ]
    for type_, row in rows.items():
        if "error" in row:
            lines.append(f"| {type_} | {row['error']} |")
            continue
        ours, theirs = row["localrun"], row["llama.cpp"]
        cells = [
            *(f"{each['bits_per_weight']:.3f}" for each in (ours, theirs)),
            *(f"{each['perplexity']:.4f}" for each in (ours, theirs)),
            f"{row['relative_difference']:+.2%} +- {row['difference_error']:.2%}",
            *(f"{each['kl']:.5f}" for each in (ours, theirs)),
            *(f"{each['pack_s']:.1f}" for each in (ours, theirs)),
        ]
        lines.append(f"| {type_} | {' | '.join(cells)} |")
    return lines


def run(model: str, text: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All types of a model, with the F16 file's own figures."""
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(Path(folder), model, text, arguments)
        rows = {}
        for type_ in arguments.types:
            say(f"{model} {type_}")
            rows[type_] = compare(type_, work, arguments)
        f16, _ = measure(work.f16, work, arguments)
    for line in [*table(model, rows), f"F16: perplexity {f16['perplexity']:.4f} +- {f16['error']:.4f}"]:
        say(line)
    return {"text": text.name, "F16": f16, "types": rows}


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL=TEXT", default=["smollm2", "miniature"])
    parser.add_argument("--types", nargs="+", type=parse_mix, default=TYPES)
    parser.add_argument("--tokens", type=int, default=2048, help="that are measured with")
    parser.add_argument("--imatrix-tokens", type=int, default=4096, help="that importances are collected from")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--mirrored", action="store_true", help="tell the errors' size from their signs")
    arguments = parser.parse_args()
    found = {}
    for name in arguments.models:
        model, _, text = name.partition("=")
        found[model] = run(model, Path(text or TEXT), arguments)
    print(json.dumps({"tokens": arguments.tokens, "imatrix_tokens": arguments.imatrix_tokens, "models": found}))


if __name__ == "__main__":
    main()
