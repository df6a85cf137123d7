"""Perplexity of one text by the native kernels and by llama.cpp: the same file, chunks and settings.

    python scripts/compare_perplexity.py [MODEL] -f TEXT [-c 512] [--bytes 51200] [-t N]

Both run `localrun perplexity`, once with --backend native and once with --backend llama.cpp. The last line of stdout is
one JSON document: both perplexities and their relative difference.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def perplexity(backend: str, text: Path, arguments: argparse.Namespace) -> dict:
    """What `localrun perplexity --json` says, run with one backend."""
    model = [arguments.model] if arguments.model else []
    threads = ["-t", str(arguments.threads)] if arguments.threads else []
    command = [sys.executable, "-m", "cli.main", "perplexity", *model, "-f", str(text), "-c", str(arguments.ctx)]
    done = subprocess.run([*command, "--backend", backend, "--json", *threads], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; the bundled model if not given")
    parser.add_argument("-f", "--file", type=Path, required=True)
    parser.add_argument("-c", "--ctx", type=int, default=512)
    parser.add_argument("--bytes", type=int, help="only the first so many bytes of the text")
    parser.add_argument("-t", "--threads", type=int)
    arguments = parser.parse_args()
    data = arguments.file.read_bytes()[: arguments.bytes]
    with tempfile.NamedTemporaryFile(suffix=".txt") as text:
        text.write(data.decode("utf-8", "ignore").encode())
        text.flush()
        ours, theirs = (perplexity(backend, Path(text.name), arguments) for backend in ("native", "llama.cpp"))
    difference = abs(ours["perplexity"] / theirs["perplexity"] - 1)
    print(
        f"native {ours['perplexity']:.4f}, llama.cpp {theirs['perplexity']:.4f}: {difference:.3%} apart",
        file=sys.stderr,
    )
    print(json.dumps({"bytes": len(data), "native": ours, "llama.cpp": theirs, "relative_difference": difference}))


if __name__ == "__main__":
    main()
