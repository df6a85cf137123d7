"""Perplexity of one text by the native kernels, by llama.cpp and by transformers: the same chunks and settings.

    python scripts/compare_perplexity.py [MODEL] -f TEXT [--checkpoint FOLDER] [-c 512] [--bytes 51200] [-t N]

The first two run `localrun perplexity` on the same file, with --backend native and --backend llama.cpp. With
--checkpoint transformers reads the text, too, with that checkpoint's weights; it computes in float32. The last line of
stdout is one JSON document: the perplexities and how far each is from native's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


def perplexity(backend: str, text: Path, arguments: argparse.Namespace) -> dict:
    """What `localrun perplexity --json` says, run with one backend."""
    model = [arguments.model] if arguments.model else []
    threads = ["-t", str(arguments.threads)] if arguments.threads else []
    command = [sys.executable, "-m", "cli.main", "perplexity", *model, "-f", str(text), "-c", str(arguments.ctx)]
    done = subprocess.run([*command, "--backend", backend, "--json", *threads], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Vocabulary:
    """What localrun.measure.perplexity asks of a tokenizer."""

    add_bos: bool
    bos_id: int | None


class Transformers:
    """What localrun.measure.perplexity asks of an engine, by transformers."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging

        logging.set_verbosity_error()  # it warns of the layer for multi-token prediction, which it leaves out
        logging.disable_progress_bar()
        self._torch = torch
        self._encode = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        bos = self._encode.bos_token_id
        self.tokenizer = Vocabulary(bos is not None and self.encode("a")[:1] == [bos], bos)

    def encode(self, text: str) -> list[int]:
        return self._encode(text)["input_ids"]

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 (T, vocab)."""
        with self._torch.inference_mode():
            return self._model(self._torch.tensor([ids])).logits[0].numpy()


def transformers_perplexity(folder: Path, text: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures under the names of `localrun perplexity --json`."""
    import torch

    from localrun.measure.perplexity import perplexity as compute

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = Transformers(folder)
    result = compute(model, model.encode(text.read_text(encoding="utf-8")), arguments.ctx)  # type: ignore[arg-type]
    return {"perplexity": result.ppl, "error": result.error, "tokens": result.n_tokens, "running": result.running}


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; the bundled model if not given")
    parser.add_argument("-f", "--file", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face checkpoint of the same weights")
    parser.add_argument("-c", "--ctx", type=int, default=512)
    parser.add_argument("--bytes", type=int, help="only the first so many bytes of the text")
    parser.add_argument("-t", "--threads", type=int)
    arguments = parser.parse_args()
    data = arguments.file.read_bytes()[: arguments.bytes]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_bytes(data.decode("utf-8", "ignore").encode())
        results = {backend: perplexity(backend, text, arguments) for backend in ("native", "llama.cpp")}
        if arguments.checkpoint:
            results["transformers"] = transformers_perplexity(arguments.checkpoint, text, arguments)
    ours = results["native"]["perplexity"]
    apart = {who: abs(ours / result["perplexity"] - 1) for who, result in results.items() if who != "native"}
    for who, result in results.items():
        difference = f", {apart[who]:.3%} from native" if who in apart else ""
        print(f"{who}: {result['perplexity']:.4f}, {result['tokens']} tokens{difference}", file=sys.stderr)
    print(json.dumps({"bytes": len(data), **results, "relative_difference": apart}))


if __name__ == "__main__":
    main()
