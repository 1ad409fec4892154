"""Which cases of a test ``make test`` runs. ``.ci/run`` runs the others, too, which are slow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(quick: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test; tuples are several ones. Those that are not ``quick`` are marked as slow; there must be
    some of either kind, or a case has another name now."""
    marked = [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if quick(case) else pytest.mark.slow)
        for case in cases
    ]
    assert {len(one.marks) for one in marked} == {0, 1}, "none, or all, of these cases would be quick"
    return marked
