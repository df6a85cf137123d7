"""Deliberate faults of a card, in what stands in for it: what each is, and which part of the proof finds it."""

from gpu_faults import expert_cache, kernels, layers, memory, processes, steps

FAULTS = (
    *kernels.FAULTS,
    *processes.FAULTS,
    *layers.FAULTS,
    *steps.FAULTS,
    *expert_cache.FAULTS,
    *memory.FAULTS,
)
