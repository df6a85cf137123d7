"""Perplexity of a model packed by localrun convert and by llama.cpp's own quantiser, from the same F16 file.

    python scripts/compare_quantised.py -f TEXT [MODEL] [--type Q4_K_M] [--imatrix FILE] [--packed-only]

MODEL, the bundled one if not given, is unpacked to F16 by localrun convert. All files run on the native backend; the
F16 one only without --packed-only. The last line of stdout is one JSON document: perplexities and their relative
difference, seconds, sizes, and tensors whose types differ.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf

from localrun.bundled import model_path
from localrun.convert.gguf_source import GGUFSource, read_model
from localrun.convert.imatrix import Importances

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import llama_quantize


def localrun(*arguments: str) -> dict:
    """What a command says with --json."""
    command = [sys.executable, "-m", "cli.main", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"localrun {arguments[0]} ended with {done.returncode}")
    return json.loads(done.stdout)


def pack(folder: Path, model: Path, arguments: argparse.Namespace) -> dict[str, tuple[Path, float]]:
    """Who -> (file, seconds) of both packed files, and of the F16 file that they come from."""
    paths = {who: folder / f"{who}.gguf" for who in ("F16", "localrun", "llama.cpp")}
    threads = ["-t", str(arguments.threads)]
    unpacked = localrun("convert", str(model), str(paths["F16"]), "--type", "F16", *threads)
    imatrix = ["--imatrix", str(arguments.imatrix)] if arguments.imatrix else []
    ours = localrun("convert", str(paths["F16"]), str(paths["localrun"]), "--type", arguments.type, *imatrix, *threads)
    means = None
    if arguments.imatrix:
        means = dict(Importances(arguments.imatrix, read_model(GGUFSource(paths["F16"])).targets))
    started = time.perf_counter()
    llama_quantize.quantize(paths["F16"], paths["llama.cpp"], arguments.type, means, arguments.threads)
    seconds = {"F16": unpacked["seconds"], "localrun": ours["seconds"], "llama.cpp": time.perf_counter() - started}
    return {who: (path, seconds[who]) for who, path in paths.items()}


def types(path: Path) -> dict[str, str]:
    """Tensor name -> type."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def measure(path: Path, seconds: float, arguments: argparse.Namespace) -> dict:
    """Size, seconds it took to write, perplexity."""
    chunks = ["--chunks", str(arguments.chunks)] if arguments.chunks else []
    text = ["-f", str(arguments.file), "-c", str(arguments.ctx)]
    result = localrun("perplexity", str(path), *text, *chunks, "-t", str(arguments.threads))
    return {"file_bytes": path.stat().st_size, "seconds": round(seconds, 3)} | {
        key: result[key] for key in ("perplexity", "error", "chunks", "chunk_tokens")
    }


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; the bundled model if not given")
    parser.add_argument("-f", "--file", type=Path, required=True)
    parser.add_argument("-c", "--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--packed-only", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = pack(Path(folder), model_path(arguments.model), arguments)
        measured = [who for who in files if who != "F16" or not arguments.packed_only]
        results = {who: measure(*files[who], arguments) for who in measured}
        ours, theirs = types(files["localrun"][0]), types(files["llama.cpp"][0])
    differing = {name: [ours[name], theirs[name]] for name in theirs if ours[name] != theirs[name]}
    difference = results["localrun"]["perplexity"] / results["llama.cpp"]["perplexity"] - 1
    for who, result in results.items():
        print(f"{who}: {result['perplexity']:.4f}", file=sys.stderr)
    print(
        json.dumps({"type": arguments.type, "relative_difference": difference, "differing_types": differing} | results)
    )


if __name__ == "__main__":
    main()
