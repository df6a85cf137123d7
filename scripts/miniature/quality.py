"""What packing costs: loss, divergence from float32 and agreement of first choices, on held-out stories.

Files are made by the commands of the product: export, `localrun convert`, `localrun imatrix` on training stories; what
runs them is Engine.logits. So the rows of 8 bits and less include what its kernels do to activations (8 bits as well).
V vocab_size, T tokens.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from miniature.config import Config
from miniature.data import Tokens, plain_text
from miniature.export import export, trained_config
from miniature.model import Model

PACKED = {"Q8_0": False, "Q6_K": True, "Q5_K_M": True, "Q4_K_M": True, "MXFP4_MOE": False}  # type: imatrix matters
N_IMATRIX_STORIES = 400  # of those to train on, evenly spaced: about 110,000 tokens
_FP8 = "FP8 (block)"  # the FP8 checkpoint: weights in E4M3, scaled by 128x128 blocks; activations are not rounded
_FP8_ACTIVATIONS = f"{_FP8}, activations too"  # in E4M3, scaled by 1x128 tiles, as an FP8 tensor core would have them

Logits = Callable[[np.ndarray], np.ndarray]  # ids (T,) to float32 (T, V)


@dataclass(frozen=True)
class Variant:
    """One way to hold the weights.

    Attributes:
        path: the GGUF that is evaluated; None for what the trainer's emulation evaluates.
        file_bytes, bits_per_weight: of the file that one would ship.
    """

    name: str
    imatrix: bool
    path: Path | None
    file_bytes: int
    bits_per_weight: float


def table(checkpoint: Path, data: Path, work: Path, stories: int | None, length: int, threads: int) -> dict[str, Any]:
    """Figures of every variant of a trained checkpoint, which are written to the folder `work` first."""
    state = torch.load(checkpoint, weights_only=True)
    variants = make_files(state, data, work, threads)
    held_out = [story[:length].astype(np.int64) for story in Tokens.load(data / "validation.npz").first(stories)]
    reference: list[np.ndarray] = []
    rows = []
    for variant in variants:
        _say(f"evaluating {variant.name}{' with imatrix' if variant.imatrix else ''}")
        with _runner(variant, state, threads) as logits:
            found = log_probabilities(logits, held_out)
            reference = reference or list(found)  # F32 comes first
            figures = compare(found if rows else reference, reference, held_out)
        rows.append({name: value for name, value in asdict(variant).items() if name != "path"} | figures)
    loss = {row["name"]: row["loss"] for row in rows}
    return {
        "step": state["step"],
        "stories": len(held_out),
        "tokens": sum(len(ids) - 1 for ids in held_out),
        "rows": rows,
        "fp8_loss_over_bf16": {name: loss[name] / loss["BF16"] - 1 for name in (_FP8, _FP8_ACTIVATIONS)},
    }


def make_files(state: dict[str, Any], data: Path, work: Path, threads: int) -> list[Variant]:
    """Checkpoints, an importance matrix and GGUF files in `work`; what was made, in the table's order."""
    config, tokenizer = trained_config(state["settings"]), data / "tokenizer.json"
    export(config, state["model"], tokenizer, work / "Miniature-F32", dtype=torch.float32)
    export(config, state["model"], tokenizer, work / "Miniature")
    export(config, state["model"], tokenizer, work / "Miniature-FP8", fp8=True)

    def convert(source: str, name: str, type_: str, *options: str) -> Variant:
        path = work / f"{name}.gguf"
        arguments = [str(work / source), str(path), "--type", type_, "--force", "-t", str(threads), *options]
        made = _localrun("convert", *arguments)
        return Variant(type_, bool(options), path, path.stat().st_size, made["bits_per_weight"])

    variants = [convert("Miniature-F32", "F32", "F32"), convert("Miniature", "BF16", "BF16")]
    unpacked = convert("Miniature-FP8", "FP8", "F32").path  # E4M3 times scale is exact in float32
    shipped = work / "Miniature-FP8" / "model.safetensors"
    bits = 8 * _tensor_bytes(shipped) / _n_weights(work / "Miniature-F32" / "model.safetensors")
    variants += [Variant(name, False, path, shipped.stat().st_size, bits)
                 for name, path in ((_FP8, unpacked), (_FP8_ACTIVATIONS, None))]  # fmt: skip
    imatrix = collect_imatrix(data, work, threads)
    for type_, by_importance in PACKED.items():
        variants.append(convert("Miniature", type_, type_))
        if by_importance:
            variants.append(convert("Miniature", f"{type_}-imatrix", type_, "--imatrix", str(imatrix)))
    return variants


def collect_imatrix(data: Path, work: Path, threads: int) -> Path:
    """What `localrun imatrix` makes of stories that the model was trained on."""
    tokenizer, stories = Tokenizer.from_file(str(data / "tokenizer.json")), list(Tokens.load(data / "train.npz"))
    chosen = stories[:: max(1, len(stories) // N_IMATRIX_STORIES)]
    text, path = work / "imatrix.txt", work / "imatrix.gguf"
    text.write_text(plain_text(chosen, tokenizer))
    _localrun("imatrix", str(work / "BF16.gguf"), "-f", str(text), "-o", str(path), "-t", str(threads))
    return path


def _localrun(*arguments: str) -> dict[str, Any]:
    """What a command says with --json."""
    _say(f"localrun {' '.join(arguments)}")
    command = [sys.executable, "-m", "cli.main", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"localrun {arguments[0]} ended with {done.returncode}")
    return json.loads(done.stdout)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tensor_bytes(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _n_weights(path: Path) -> int:
    """Weights of a safetensors file of float32."""
    return _tensor_bytes(path) // 4


@contextmanager
def _runner(variant: Variant, state: dict[str, Any], threads: int) -> Iterator[Logits]:
    import localrun

    if variant.path is None:
        yield _emulated_fp8(state)
        return
    with localrun.load(variant.path, device="cpu", backend="native", threads=threads, speculative="off") as engine:
        yield engine.logits


def _emulated_fp8(state: dict[str, Any]) -> Logits:
    """The model with the operands of its linear layers rounded as in FP8 training: weights and activations."""
    torch.compiler.set_stance("force_eager")  # every length would be compiled for itself
    model = Model(Config(**state["settings"]["model"]), "fp8")
    model.load_state_dict(state["model"])

    @torch.inference_mode()
    def logits(ids: np.ndarray) -> np.ndarray:
        return model.logits(model.hidden(torch.from_numpy(ids)[None]))[0].numpy()

    return logits


def log_probabilities(logits: Logits, stories: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """float32 (T - 1, V) for each story: of every token in the place of the next."""
    for ids in stories:
        rows = logits(ids)[:-1].astype(np.float64)
        rows -= rows.max(1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(1, keepdims=True))
        yield rows.astype(np.float32)


def compare(
    found: Iterable[np.ndarray], reference: Iterable[np.ndarray], stories: Sequence[np.ndarray]
) -> dict[str, float]:
    """Of log-probabilities as log_probabilities gives them.

    Returns:
        loss: nats a token; perplexity: exp of it.
        kl: mean Kullback-Leibler divergence of `found` from the reference, nats a token.
        top_1: share of places where both have the same first choice.
    """
    nats = divergence = n_agreeing = n_tokens = 0.0
    for log_q, log_p, ids in zip(found, reference, stories, strict=True):
        nats -= log_q[np.arange(len(log_q)), ids[1:]].sum(dtype=np.float64)
        divergence += (np.exp(log_p) * (log_p - log_q)).sum(dtype=np.float64)
        n_agreeing += (log_q.argmax(1) == log_p.argmax(1)).sum()
        n_tokens += len(log_q)
    loss = nats / n_tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "kl": divergence / n_tokens,
        "top_1": n_agreeing / n_tokens,
    }


def markdown(report: dict[str, Any]) -> str:
    """The rows as a table, and how far FP8's loss is from BF16's."""
    base = report["rows"][0]["perplexity"]
    lines = [
        "| weights | imatrix | bytes | bits a weight | perplexity | over F32 | KL divergence | same first choice |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        figures = [
            f"{row['file_bytes']:,}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.4f}",
            f"{row['perplexity'] / base - 1:+.3%}",
            f"{row['kl']:.6f}",
            f"{row['top_1']:.2%}",
        ]
        lines.append(f"| {row['name']} | {'yes' if row['imatrix'] else ''} | {' | '.join(figures)} |")
    lines += [f"{name}: loss {over:+.3%} of BF16's" for name, over in report["fp8_loss_over_bf16"].items()]
    return "\n".join(lines)
