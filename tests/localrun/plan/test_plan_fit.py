"""plan --fit: the largest mix that fits, and the next one."""

from __future__ import annotations

import pytest
import tiny_models

from localrun.convert.mixes import MIXES
from localrun.errors import LocalrunError
from localrun.plan.fit import find_fit, with_ram
from localrun.plan.machine import load_machine
from localrun.plan.memory import plan_memory
from localrun.plan.shapes import load_model, n_bytes
from quant.formats import registry


@pytest.mark.parametrize("ram", ["11GB", "13.5 GiB", "20g", "0.02T"])
def test_all_that_is_larger_does_not_fit(ram: str) -> None:
    model, machine, ctx = load_model("deepseek-v2-lite"), with_ram(load_machine("laptop"), ram), 8192
    found = find_fit(model, machine, ctx)
    assert plan_memory(found.chosen, machine, ctx).fits and not plan_memory(found.next, machine, ctx).fits
    sizes = {}
    for name, mix in MIXES.items():
        other = model.with_type(name)
        if mix.compared and {tensor.type for tensor in other.tensors} <= set(registry.QUANTIZABLE):
            sizes[name] = n_bytes(other.tensors)
            assert sizes[name] <= n_bytes(found.chosen.tensors) or not plan_memory(other, machine, ctx).fits
    between = [name for name in sizes if sizes[found.chosen.type] < sizes[name] < sizes[found.next.type]]
    assert between == []


def test_more_context_takes_a_smaller_type() -> None:
    model, machine = load_model("deepseek-v3"), load_machine("10k-server")
    short, long = (find_fit(model, machine, ctx).chosen for ctx in (4096, 1_000_000))
    assert n_bytes(long.tensors) < n_bytes(short.tensors)


def test_a_gguf_is_fitted_as_it_would_be_converted() -> None:
    model = load_model(str(tiny_models.shared("wide")))
    found = find_fit(model, load_machine("desktop"), 256)
    assert found.chosen.type == "BF16" and found.next is None


def test_a_size_is_that_of_memory_modules() -> None:
    laptop = load_machine("laptop")
    machine = with_ram(laptop, "256GB")
    assert machine.ram_bytes == 256 * 2**30 and machine.reserved_bytes == laptop.reserved_bytes
    assert with_ram(laptop, "this") is laptop
    for text in ("", "256", "-1GB", "1e3GB", "9" * 15 + "TB", "256KB"):
        with pytest.raises(LocalrunError, match="expected this, or a size of RAM such as 256GB"):
            with_ram(laptop, text)
