"""A converted checkpoint against transformers, which is the reference for what a checkpoint means.

Two comparisons, since a 4-bit file's logits are far from the checkpoint's for good reasons that would hide bad ones:
the network, with weights that nothing has rounded (a conversion to F32), against transformers' logits; and the weights
of the file in its own types against those, each type by the error that it makes of random weights. The two files have
the same keys, so a file that passes both computes what transformers does, but for the rounding of its weights.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localrun.engine import load
from localrun.errors import LocalrunError
from localrun.gguf.file import Tensor, open_gguf
from localrun.gguf.types import ROWS
from quant.formats import registry
from quant.quantize.tensor import pack
from quant.threads.pool import Pool

N_TOKENS = 48
# Of the logits' range. float32 sums in another order give up to 1e-5, llama.cpp's 16-bit keys up to 4e-4; a key of
# config.json that means something else gives some 1e-2 or more (scripts/vary_config.py).
NETWORK_TOLERANCE = 1e-3
# A block of 32 weights, one of which is large, has 2.7 times the relative error of a random block.
WORST_BLOCK = 4.0
NOTHING_IN_COMMON = 0.9  # relative error: 1 for zeros, 1.4 for other weights of the same size
_SAMPLED = 8  # groups of ROWS rows of a tensor


class TransformersError(LocalrunError):
    """transformers cannot run a checkpoint."""


@dataclass(frozen=True)
class Reference:
    """transformers' logits of a few tokens.

    Attributes:
        ids: the tokens.
        logits: float32 (T, vocab).
    """

    ids: list[int]
    logits: np.ndarray

    def difference(self, path: Path, threads: int) -> float:
        """How far a GGUF's logits are from these, as a part of their range: the median over the tokens of the largest.

        The median, since one token whose router was all but undecided goes another way for a rounding.
        """
        with load(path, threads=threads, ctx=N_TOKENS, speculative="off") as engine:
            found = engine.logits(self.ids)
        if found.shape != self.logits.shape:
            raise LocalrunError(f"{path}: gives logits {found.shape}; transformers {self.logits.shape}")
        largest = np.abs(found - self.logits).max(-1)
        return float(np.median(largest) / max(np.ptp(self.logits), np.finfo(np.float32).tiny))


def is_available() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def reference(folder: Path, class_name: str, n_vocab: int) -> Reference:
    """What the class of transformers makes of a checkpoint folder, in float32; takes 4 bytes a weight of memory.

    Raises TransformersError if it cannot run it.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ids = np.random.default_rng(0).integers(0, n_vocab, N_TOKENS).tolist()
    try:
        model_class = getattr(transformers, class_name)
        model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            return Reference(ids, model(torch.tensor([ids]), return_dict=True).logits[0].float().numpy())
    except Exception as error:  # whatever it ends in: another version, a missing package, too little memory
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise TransformersError(f"transformers cannot run it: {what}") from None


def check_weights(path: Path, exact: Path) -> float:
    """The largest relative error (rms) of a tensor of a GGUF, against the same in F32; some rows of each are read.

    Raises LocalrunError naming a tensor whose error its type does not explain.
    """
    worst, limits = 0.0, {}
    with open_gguf(path) as file, open_gguf(exact) as plain:
        for name, tensor in file.tensors.items():
            type_ = tensor.type.name
            if type_ == "I32":  # a table of whole numbers
                if not np.array_equal(tensor.data, plain.tensors[name].data):
                    raise LocalrunError(f"{path}: tensor '{name}' has other numbers than the checkpoint")
                continue
            found, expected = _sample(tensor), _sample(plain.tensors[name])
            if type_ not in limits:
                limits[type_] = min(WORST_BLOCK * _error_of(type_), NOTHING_IN_COMMON)
            error = _relative(found, expected)
            if not error <= limits[type_]:
                raise LocalrunError(
                    f"{path}: tensor '{name}' is {error:.2g} of its size off; expected at most {limits[type_]:.2g} "
                    f"for {type_}"
                )
            worst = max(worst, error)
    return worst


def _sample(tensor: Tensor) -> np.ndarray:
    """float32 (rows, columns): groups of ROWS rows that lie evenly over a tensor."""
    format_, n_cols = registry.get(tensor.type.name), tensor.shape[-1]
    blocks = tensor.data.reshape(-1).view(np.uint8).reshape(-1, format_.row_bytes(n_cols))
    groups = np.unique(np.linspace(0, max(0, len(blocks) // ROWS - 1), _SAMPLED).astype(int))
    return np.concatenate([format_.unpack(blocks[ROWS * group : ROWS * (group + 1)]) for group in groups])


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    size = np.sqrt(np.square(expected, dtype=np.float64).mean())
    difference = np.sqrt(np.square(found.astype(np.float64) - expected).mean())
    return float(difference / size) if size else float(difference)


def _error_of(type_: str) -> float:
    """The relative error that a format makes of Gaussian weights."""
    plain = registry.get(type_.removesuffix(f"_R{ROWS}"))
    weights = np.random.default_rng(0).standard_normal((ROWS, 1024)).astype(np.float32)
    blocks = np.empty((ROWS, plain.row_bytes(1024)), np.uint8)
    pool = Pool(1)
    try:
        pack(pool, plain, weights.ctypes.data, *weights.shape, blocks.ctypes.data)
    finally:
        pool.close()
    return _relative(plain.unpack(blocks), weights)
