"""How long it takes to hand work to the CPU and back in a captured step, by the driver's host nodes.

Many nodes in a row, each of which does nothing but count, between two kernels that take no time: what is around them is
what each layer waits. Then a layer's experts through the same way: the bits that the workers give by themselves.
"""

from __future__ import annotations

import numpy as np
import torch

from localrun.gpu.device import StandIn
from localrun.gpu.experts.on_host import StepExperts
from localrun.gpu.proof.speed import seconds
from localrun.gpu.proof.subject import Subject
from localrun.gpu.proof.task import Findings
from localrun.gpu.ways import HOST_NODES
from localrun.models.tensors import GGUFTensors
from quant.decode.coordinator import count
from quant.threads.pool import Pool

_TRIES = 20  # of experts, with other inputs


def prove(subject: Subject, findings: Findings) -> None:
    """By host nodes."""
    measure(subject, findings, HOST_NODES)


def measure(subject: Subject, findings: Findings, way: str) -> None:
    """figures and choices: handover, handover_s."""
    device = subject.device
    device.use(way)
    with torch.inference_mode(), device.errors():
        findings.doing(f"{subject.effort.nodes} empty nodes in a row")
        each_s = _empty_nodes(subject, findings)
        findings.doing("a layer's experts")
        _experts(subject, findings)
    findings.figures |= {"handover": way, "handover_s": each_s}
    findings.choices |= {"handover": way, "handover_s": each_s}


def _empty_nodes(subject: Subject, findings: Findings) -> float:
    """Seconds of each."""
    device, n_nodes = subject.device, subject.effort.nodes
    calls, x = np.zeros(1, np.int64), torch.zeros(1, device=device.torch)

    def step() -> None:
        for _ in range(n_nodes):
            with device.side() as branch:
                device.call(count.address, calls.ctypes.data)
            device.join(branch)
            x.add_(1)

    replay = device.capture(step)
    device.synchronize()
    before = int(calls[0]), float(x)
    runs = subject.effort.runs

    def run() -> None:
        replay()
        device.synchronize()

    each_s = seconds(run, runs) / n_nodes
    if int(calls[0]) - before[0] != n_nodes * (runs + 1) or float(x) - before[1] != n_nodes * (runs + 1):
        findings.fault(f"{int(calls[0]) - before[0]} nodes were called, and {n_nodes * (runs + 1)} were queued")
    return each_s


def _experts(subject: Subject, findings: Findings) -> None:
    c, device = subject.config, subject.device
    index = subject.moe_layers[0]
    layers = {index: GGUFTensors(subject.file).expert_matrices(index)}
    pool = Pool(subject.task.threads)
    try:
        here = StepExperts(device, pool, layers, c.num_experts_per_tok).layer(index)
        alone = StepExperts(StandIn(), pool, layers, c.num_experts_per_tok).layer(index)
        inputs = [each.to(device.torch) for each in _inputs(subject, 0)]
        out = torch.zeros(1, c.hidden_size, device=device.torch)
        with pool.exclusive():
            replay = device.capture(lambda: out.copy_(here.begin(*inputs)()))
            for turn in range(_TRIES):
                new = _inputs(subject, turn)
                for x, value in zip(inputs, new, strict=True):
                    x.copy_(value)
                replay()
                device.synchronize()
                if not torch.equal(out.cpu(), alone.begin(*new)()):
                    findings.fault("a layer's experts: other bits than the workers' by themselves")
                    return
    finally:
        pool.close()


def _inputs(subject: Subject, seed: int) -> tuple[torch.Tensor, ...]:
    """x, ids and weights of a token."""
    c, random = subject.config, np.random.default_rng(seed)
    ids = random.permutation(c.n_routed_experts)[None, : c.num_experts_per_tok].astype(np.int64)
    weights = random.random(ids.shape, np.float32)
    return subject.vectors(1, c.hidden_size, seed), torch.from_numpy(ids), torch.from_numpy(weights)
