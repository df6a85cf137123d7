"""Cases of a parametrised test, some of them marked."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def mark_some(cases: Iterable[Any], chosen: Container[Any], mark: pytest.MarkDecorator) -> list[Any]:
    """The parameters (a tuple is several), those that are among `chosen` with the mark."""
    values = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    return [pytest.param(*each, marks=mark if case in chosen else ()) for case, each in values]


def slow_but(cases: Iterable[Any], chosen: Container[Any]) -> list[Any]:
    """The parameters, of which only those among `chosen` are in the fast suite."""
    cases = list(cases)
    return mark_some(cases, [case for case in cases if case not in chosen], pytest.mark.slow)
