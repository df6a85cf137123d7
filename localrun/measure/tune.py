"""What is best on this CPU (quant.target.tuning), measured on blocks of a file's own types.

One layer of experts is laid out in RAM for each type, of the file's blocks, repeated until caches are of no help.
Candidates take turns, round by round, each first in some rounds, on the same choices of experts; what counts is the
median of their ratios to the first.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from localrun import hardware
from localrun.errors import LocalrunError
from localrun.files import write_json
from localrun.gguf.file import GGUFFile
from quant.block_format import Format
from quant.formats import registry
from quant.formats.interleave import interleave
from quant.gemv.plain import with_near
from quant.matrix import ExpertMatrices, quant_matrix
from quant.ops import experts
from quant.target import tuning
from quant.target.tuning import Tuning
from quant.threads.pool import Pool

HIDDEN, INNER, TOP_K = 7168, 2048, 8  # DeepSeek-V3: when repacking pays depends on the width
MOST_TYPES = 2  # of the file, by the bytes that they take
_CACHES = 3  # times the last level cache that the experts take at least
_TRY_S = 1.2
_NOISE = 0.98  # of the time: what gains less than that is no better
_NEAR = 3456, 2304, 6144, 8192  # bytes
FEW = 1, 4  # tokens of a step
_COUNTS = 3, 4, 5, 6, 8, 10  # tokens of an expert, among which repacking begins to pay

_ASKED = "near, one token", "near, a few tokens", "repacking"
_ASKED_OF_INTERLEAVED = "interleaved: near", "interleaved rows", "interleaved: repacking"

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tuned:
    """What was chosen and measured.

    Attributes:
        types: on which.
        measured: by what was asked, times relative to the first choice, below 1 for faster.
    """

    tuning: Tuning
    types: list[str]
    measured: dict[str, dict[str, float]]

    def document(self) -> dict[str, Any]:
        """As it is kept and printed."""
        return {
            "cpu": tuning.cpu(),
            "model": hardware.cpu_model(),
            "types": self.types,
            "tuning": tuning.as_json(self.tuning),
            "measured": self.measured,
        }


def tune(file: GGUFFile, pool: Pool, report: Report | None = None) -> Tuned:
    """Measure for about a minute. Raises LocalrunError if the file has no type that there is anything to choose for."""
    types, measured = _types(file), dict[str, dict[str, float]]()
    steps = iter(enumerate((*_ASKED, *_ASKED_OF_INTERLEAVED)))

    def ask(measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
        done, what = next(steps)
        if report is not None:
            report(done, len(_ASKED) + len(_ASKED_OF_INTERLEAVED), what)
        measured[what] = measure(*arguments)
        return measured[what]

    layers = [_Layer(file, type_, pool) for type_ in types]
    plain = [layer.plain for layer in layers]
    near_one, near_few = (_best(ask(_near, layers, plain, [count])) for count in FEW)
    plain = [_with_near(each, near_one, near_few) for each in plain]
    chosen = replace(tuning.found().tuning, near_one=near_one, near_few=near_few)
    chosen = replace(chosen, packed_from=_pays_from(ask(_packing, layers, plain)))
    pairs = [(layer, each) for layer, each in zip(layers, plain, strict=True) if layer.interleaved]
    if pairs:
        layers, plain = [layer for layer, _ in pairs], [each for _, each in pairs]
        laid = [layer.interleaved for layer in layers if layer.interleaved]
        near = _best(ask(_near, layers, laid, FEW))
        laid = [_with_near(each, near, near) for each in laid]
        gain = statistics.geometric_mean(ask(_interleaving, layers, plain, laid).values())
        from_ = _pays_from(ask(_packing, layers, laid))
        chosen = replace(
            chosen, near_interleaved=near, packed_from_interleaved=from_, interleaving_pays=gain < _NOISE
        )  # fmt: skip
    return Tuned(chosen, types, measured)


def keep(tuned: Tuned) -> None:
    """For every later start on this CPU. Raises LocalrunError."""
    path = tuning.kept_path()
    if path is None:
        raise LocalrunError("there is no home folder to keep it in; set LOCALRUN_CACHE to a folder of your own")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise LocalrunError(f"{path.parent}: {error.strerror}; set LOCALRUN_CACHE to a folder of your own") from None
    write_json(path, tuned.document())


def _types(file: GGUFFile) -> list[str]:
    """The plain types of the file that most bytes are of. Raises LocalrunError if there is none."""
    n_bytes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        name = tensor.type.name.removesuffix("_R16")
        if name == tensor.type.name and len(tensor.shape) > 1 and name in registry.NAMES:
            format_ = registry.get(name)
            if format_.integer and not HIDDEN % format_.block:
                n_bytes[name] += tensor.n_bytes
    if not n_bytes:
        raise LocalrunError(f"{file.path}: no matrices of a type that there is anything to tune for")
    return [name for name, _ in n_bytes.most_common(MOST_TYPES)]


class _Layer:
    """Experts of one type, plain and where there is such a type interleaved, in RAM."""

    def __init__(self, file: GGUFFile, type_: str, pool: Pool) -> None:
        """Raises LocalrunError if there is too little RAM."""
        format_, self._pool = registry.get(type_), pool
        size = HIDDEN * INNER // format_.block * format_.block_bytes  # of a matrix of one expert
        self.n_experts = max(3 * TOP_K // 2, -(-_CACHES * hardware.last_level_cache() // (3 * size)))
        name = f"{type_}_R16"
        formats = [format_, *([registry.get(name)] if name in registry.INTERLEAVED else [])]
        needed = len(formats) * 3 * self.n_experts * size
        if needed > hardware.free_ram():
            raise LocalrunError(f"tuning for {type_} takes {needed / 2**30:.1f} GiB of RAM that are not free")
        of_type = [tensor for tensor in file.tensors.values() if tensor.type.name == type_]
        blocks = max(of_type, key=lambda tensor: tensor.n_bytes).data
        self.plain = self._experts(format_, np.resize(blocks, 3 * self.n_experts * size))
        self.interleaved = None
        for other in formats[1:]:
            rows = self.plain.gate.owner.reshape(-1, format_.row_bytes(INNER))
            laid = interleave(other, rows.reshape(-1), len(rows), rows.shape[1])
            self.interleaved = self._experts(other, laid.reshape(-1))

    def _experts(self, format_: Format, data: np.ndarray) -> ExpertMatrices:
        """Any blocks are a matrix of any shape."""
        n, third = self.n_experts, data.size // 3
        shapes = (n, INNER, HIDDEN), (n, INNER, HIDDEN), (n, HIDDEN, INNER)
        parts = (data[third * i : third * (i + 1)] for i in range(3))
        matrices = (quant_matrix(part, format_, shape) for part, shape in zip(parts, shapes, strict=True))
        gate, up, down = matrices
        return ExpertMatrices(replace(gate, owner=data), up, down)

    def seconds(self, matrices: ExpertMatrices, n_tokens: int, random: np.random.Generator, same: bool) -> float:
        """Of one run. same: all tokens choose the same experts."""
        x = random.standard_normal((n_tokens, HIDDEN), np.float32)
        weights = np.full((n_tokens, TOP_K), 1 / TOP_K, np.float32)
        rows = np.tile(np.arange(self.n_experts), (n_tokens, 1))
        ids = random.permuted(rows, axis=1)[:, :TOP_K]
        ids, out = np.ascontiguousarray(ids[:1].repeat(n_tokens, 0) if same else ids), np.empty_like(x)
        start = time.perf_counter()
        experts.run(self._pool, matrices, x.ctypes.data, ids, weights, out.ctypes.data)
        return time.perf_counter() - start


def _ratios(candidates: Sequence[Callable[[int], float]]) -> list[float]:
    """Each one's time over the first's, the median over rounds. A candidate takes the round's number as a seed."""
    rounds: list[list[float]] = []
    for candidate in candidates:  # what comes first compiles and brings pages in
        candidate(0)
    until = time.perf_counter() + _TRY_S
    while time.perf_counter() < until or len(rounds) < 3:
        order = list(range(len(candidates)))
        order = order[len(rounds) % len(order) :] + order[: len(rounds) % len(order)]
        seconds = {i: candidates[i](len(rounds)) for i in order}
        rounds.append([seconds[i] / seconds[0] for i in range(len(candidates))])
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def _mean(ratios: Sequence[Sequence[float]]) -> list[float]:
    """The geometric mean, by candidate, of what several comparisons gave."""
    return [round(statistics.geometric_mean(column), 3) for column in zip(*ratios, strict=True)]


def _run(layer: _Layer, matrices: ExpertMatrices, n_tokens: int, same: bool = False) -> Callable[[int], float]:
    return lambda seed: layer.seconds(matrices, n_tokens, np.random.default_rng(seed), same)


def _near(layers: Sequence[_Layer], matrices: Sequence[ExpertMatrices], counts: Sequence[int]) -> dict[str, float]:
    """By distance, for so many tokens: the time over that of the first distance."""
    found = []
    for layer, each in zip(layers, matrices, strict=True):
        candidates = [_with_near(each, near, near) for near in _NEAR]
        for n_tokens in counts:
            found.append(_ratios([_run(layer, candidate, n_tokens) for candidate in candidates]))
    return dict(zip(map(str, _NEAR), _mean(found), strict=True))


def _with_near(matrices: ExpertMatrices, near_one: int, near_few: int) -> ExpertMatrices:
    format_ = matrices.gate.format
    gemv, batch = with_near(format_.gemv, near_one), with_near(format_.gemv_batch, near_few)
    format_ = replace(format_, gemv=gemv, gemv_batch=batch)
    gate, up, down = (replace(each, format=format_) for each in (matrices.gate, matrices.up, matrices.down))
    return replace(matrices, gate=gate, up=up, down=down)


def _packing(layers: Sequence[_Layer], matrices: Sequence[ExpertMatrices]) -> dict[str, float]:
    """By tokens of an expert: the time with repacked rows over that without."""

    def run(layer: _Layer, each: ExpertMatrices, count: int, packed_from: int) -> Callable[[int], float]:
        def seconds(seed: int) -> float:
            chosen = replace(tuning.current(), packed_from=packed_from, packed_from_interleaved=packed_from)
            with tuning.using(chosen):
                return _run(layer, each, count, same=True)(seed)

        return seconds

    found = {}
    for count in _COUNTS:
        ratios = [
            _ratios([run(layer, each, count, from_) for from_ in (count + 1, count)])
            for layer, each in zip(layers, matrices, strict=True)
        ]
        found[str(count)] = _mean(ratios)[1]
    return found


def _interleaving(
    layers: Sequence[_Layer], plain: Sequence[ExpertMatrices], laid: Sequence[ExpertMatrices]
) -> dict[str, float]:
    """By tokens of a step: the time with interleaved rows over that without."""
    found = {}
    for count in FEW:
        ratios = [
            _ratios([_run(layer, each, count) for each in pair])
            for layer, *pair in zip(layers, plain, laid, strict=True)
        ]
        found[str(count)] = _mean(ratios)[1]
    return found


def _best(ratios: dict[str, float]) -> int:
    """The distance that is fastest; the first unless another is so much faster."""
    best = min(ratios, key=lambda name: ratios[name])
    return int(best if ratios[best] < _NOISE else next(iter(ratios)))


def _pays_from(ratios: dict[str, float]) -> int:
    """The first number of tokens from which on repacking is never slower."""
    slower = [int(count) for count, ratio in ratios.items() if ratio > 1]
    return max(slower, default=int(next(iter(ratios))) - 1) + 1
