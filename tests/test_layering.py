"""The architecture, held by a test: imports point down only, and ``functional`` needs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ibro_lightning

PACKAGE = Path(ibro_lightning.__file__).parent

# From the bottom up. A part may import what is listed for it, and nothing else of ours.
ALLOWED = {
    "version": set(),
    "errors": set(),
    "timing": set(),
    "seeding": set(),
    "functional": set(),
    "sequences": set(),
    "rendering": set(),
    "coefficients": {"errors"},
    "responses": {"errors"},
    "types": {"responses", "sequences"},
    "experience": {"ranks", "sequences", "types"},
    "tasks": {"errors"},
    "recipes": {"errors"},
    "run_folders": {"guards", "errors"},
    "answers": set(),
    "guards": {"errors", "sequences"},
    "ranks": {"errors", "guards"},
    "records": {"guards", "run_folders", "types"},
    "checkpoints": {"errors", "run_folders"},
    "resume": {"checkpoints", "guards", "errors", "run_folders", "seeding"},
    "arguments": {"recipes"},
    "compare": {"errors", "functional", "records", "run_folders"},
    "metrics": {"functional", "types"},
    "regularizers": {"coefficients", "errors", "experience", "rendering", "sequences", "types"},
    "models": {"errors", "functional", "sequences", "tasks", "types"},
    "engines": {"errors", "guards", "seeding", "types"},
    "rewards": {"answers", "errors", "responses", "tasks"},
    "datamodules": {
        "answers",
        "engines",
        "errors",
        "functional",
        "ranks",
        "rendering",
        "rewards",
        "seeding",
        "sequences",
        "tasks",
    }
    | {"records", "run_folders", "timing", "types", "version"},
    "modules": {"coefficients", "errors", "experience", "functional", "metrics", "models", "regularizers", "seeding"}
    | {"guards", "ranks", "records", "run_folders", "sequences", "timing", "types"},
    "callbacks": {"checkpoints", "guards", "seeding", "timing"}
    | {"errors", "metrics", "modules", "ranks", "records", "run_folders", "types", "version"},
    "strategies": {"checkpoints", "errors", "models"},
    "exporting": {"arguments", "checkpoints", "errors", "modules", "resume"},
    "estimate": {"datamodules", "engines", "errors", "experience", "functional", "models", "modules", "regularizers"}
    | {"rewards", "sequences", "strategies", "types"},
    "cli": {"callbacks", "compare", "datamodules", "engines", "errors", "modules", "recipes", "regularizers", "rewards"}
    | {"arguments", "checkpoints", "guards", "estimate", "exporting", "resume"}
    | {"run_folders", "strategies", "version"},
    "__main__": {"cli"},
    "__init__": {"version"},
}


def imports_of(path: Path) -> set[str]:
    """The parts of our package that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    ours = [name.split(".") for name in names]
    return {parts[1] for parts in ours if parts[0] == "ibro_lightning" and len(parts) > 1}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in ALLOWED, f"{part} is new: say in this test what it may import"
    assert imports_of(path) - {part} <= ALLOWED[part]


def test_the_allowed_imports_have_no_cycle() -> None:
    seen: set[str] = set()
    remaining = dict(ALLOWED)
    while remaining:
        ready = {part for part, needs in remaining.items() if needs <= seen}
        assert ready, f"cycle among {sorted(remaining)}"
        seen |= ready
        remaining = {part: needs for part, needs in remaining.items() if part not in ready}


def test_functional_needs_torch_alone() -> None:
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "transformers", "vllm", "datasets", "torchmetrics", "jsonargparse"):
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Block())
import torch
from ibro_lightning.functional import group_advantages
print(group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0])).tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("[0.707")
