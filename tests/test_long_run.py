"""benchmarks/long_run.py: it tells flat runs from others, and runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "long_run.py"


@pytest.fixture(scope="module")
def long_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_run", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["long_run"] = module
    spec.loader.exec_module(module)
    return module


def rows(resident: float = 0.0, cpu: float = 0.0) -> list[tuple[float, float, float]]:
    """200 iterations in which memory and CPU time grow by as much per iteration."""
    return [(500.0 + number * resident, 0.1, 0.1 + number * cpu) for number in range(200)]


def test_what_is_flat(long_run: ModuleType) -> None:
    assert long_run.verdicts(rows()) == []
    assert long_run.verdicts(rows(resident=0.2)) == []  # 18 MiB either way after the first tenth
    (grown,) = long_run.verdicts(rows(resident=0.3))
    assert grown.startswith("memory leaves its median by 26.")
    (slower,) = long_run.verdicts(rows(cpu=0.001))
    assert slower.startswith("CPU time per iteration grows 2.")


def test_memory_may_grow_at_first(long_run: ModuleType) -> None:
    measured = rows()
    for number in range(20):
        measured[number] = (300.0, 0.1, 0.5)
    assert long_run.verdicts(measured) == []


@pytest.mark.slow
def test_a_short_one_is_measured(long_run: ModuleType, tmp_path: Path) -> None:
    measured = long_run.run(tmp_path, 6, [])
    assert len(measured) == 5
    assert all(100 < resident < 5000 and cpu > 0 for resident, _, cpu in measured)
