"""The kinds of files that come from outside, as scripts/fuzz.py tries them: how a case is made, and who reads it.

A reader is given a probe and runs each of its steps through it: a refusal is noted, and the next step still runs.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_checkpoint
import fuzz_gguf
import fuzz_sessions
import fuzz_templates
from fuzz_vocabulary import plan_tokenizer_files, tokenizer_files_case, use_vocabulary, vocabulary_case

import localrun
from localrun.convert import Options, convert, make_plan
from localrun.gguf.file import open_gguf
from localrun.models.names import check_tensors, check_types
from localrun.models.reader import read_config
from localrun.models.summary import summary_of
from localrun.placement.devices import DeviceRequest, choose
from localrun.plan.shapes import load_model
from localrun.text.chat_template import chat_template
from localrun.text.tokenizer import Tokenizer

Files = bytes | dict[str, bytes | None]  # None for a folder


class Probe:
    """Runs steps; errors are those of the steps that refused."""

    def __init__(self, refusals: tuple[type[Exception], ...]) -> None:
        self._refusals, self.errors = refusals, []

    def __call__(self, step: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What the step returns; None if it refuses."""
        try:
            return step(*arguments, **options)
        except self._refusals as error:
            self.errors.append(error)
            return None


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        share: of all cases.
        case: seed and number to what was done and the files.
        check: reads the file, or the folder where there are several.
        batch: cases of one child.
        in_process: whether a case runs in the child itself; others may take longer.
    """

    name: str
    share: float
    case: Callable[[int, int], tuple[str, Files]]
    check: Callable[[Probe, Path], None]
    batch: int = 4000
    in_process: bool = True


def kinds() -> list[Kind]:
    """All kinds; what they are made of is readied, as far as no model is loaded for it."""
    fuzz_gguf.bases()
    fuzz_checkpoint.bases()
    shares = {"conversation": 0.1, "journal": 0.08, "imatrix": 0.08, "machine": 0.002, "prices": 0.03}
    return [
        Kind("header", 0.45, fuzz_gguf.header_case, _header),
        Kind("header run", 0.004, _other_numbers(fuzz_gguf.header_case), _native_run, 500),
        Kind("header llama.cpp", 0.0002, _other_numbers(fuzz_gguf.header_case), _llama_cpp_run, 20, False),
        Kind("checkpoint", 0.15, fuzz_checkpoint.checkpoint_case, _checkpoint),
        Kind("checkpoint run", 0.001, _other_numbers(fuzz_checkpoint.checkpoint_case), _conversion, 200),
        Kind("vocabulary", 0.03, vocabulary_case, _simple(use_vocabulary), 1000),
        Kind("tokenizer files", 0.03, tokenizer_files_case, _simple(plan_tokenizer_files)),
        Kind("template", 0.0003, fuzz_templates.template_case, _simple(fuzz_templates.render), 50, False),
        *(_kept_beside(kind, shares.get(kind, 0.02)) for kind in fuzz_sessions.KINDS),
    ]


def _simple(attempt: Callable[[Path], None]) -> Callable[[Probe, Path], None]:
    """The check of one step."""
    return lambda probe, path: probe(attempt, path)


def _kept_beside(kind: str, share: float) -> Kind:
    """A kind of what users keep beside models."""
    attempt = _simple(functools.partial(fuzz_sessions.attempt, kind))
    return Kind(kind, share, functools.partial(fuzz_sessions.case, kind), attempt, 2000)


def in_child(work: Callable[..., None], *arguments: Any) -> None:
    """Run what may load models in a process of its own: this one is to be forked, which their threads don't survive."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("a case can't be made")


def _other_numbers(case: Callable[[int, int], tuple[str, Files]]) -> Callable[[int, int], tuple[str, Files]]:
    """The same cases from a number on that others don't reach."""
    return lambda seed, number: case(seed, number + 10**9)


def _header(probe: Probe, path: Path) -> None:
    """What inspect, plan and the start of generate do with a file, up to the first weight."""
    file = probe(open_gguf, path)
    if file is None:
        return
    with file:
        probe(summary_of, file)
        config = probe(read_config, file)
        if config is not None:
            probe(check_tensors, file, config)
            if not probe.errors:
                probe(choose, DeviceRequest(device="cpu"), file, config, 64, True, lambda line: None)
        probe(check_types, file)
        tokenizer = probe(Tokenizer, path, file)
        if tokenizer is not None:
            probe(chat_template, file, tokenizer)
            tokenizer.close()


def _native_run(probe: Probe, path: Path) -> None:
    """Planned, loaded, and evaluated by our own kernels."""
    probe(load_model, str(path))
    engine = probe(localrun.load, path, backend="native", threads=1, ctx=32, speculative="off")
    if engine is not None:
        with engine:
            probe(engine.logits, [1, 2, 3])
            probe(lambda: list(engine.generate([1, 2], localrun.Sampling(seed=0), max_tokens=3)))


def _llama_cpp_run(probe: Probe, path: Path) -> None:
    """Tried out by a process of its own, then loaded and evaluated by llama.cpp in this one."""
    engine = probe(localrun.load, path, backend="llama.cpp", threads=1, ctx=32)
    if engine is not None:
        with engine:
            probe(engine.logits, [1, 2, 3])


def _checkpoint(probe: Probe, folder: Path) -> None:
    """What convert decides before it reads a weight, and what plan says of the configuration."""
    plan = probe(make_plan, folder, folder / "out.gguf", Options())
    if plan is not None:
        plan.source.close()
    probe(load_model, str(folder))


def _conversion(probe: Probe, folder: Path) -> None:
    """Converted, and what came of it loaded and evaluated."""
    plan = probe(make_plan, folder, folder / "out.gguf", Options(mix="Q8_0"))
    if plan is None:
        return
    probe(convert, plan, threads=1)
    if (folder / "out.gguf").exists():
        _native_run(probe, folder / "out.gguf")
