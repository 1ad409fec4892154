"""The architecture: imports point down, no files import each other in a circle, ``functional`` needs torch alone, and
``update`` needs no Lightning."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ibro_lightning
from helpers.processes import logs, run_ranks

PACKAGE = Path(ibro_lightning.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# From the bottom up. A file may import from its own part and from those above it in this list, which lie below it.
LAYERS = [
    *("version", "errors", "timing", "resampling", "seeding", "types", "methods", "functional", "rendering"),
    *("batches.ragged", "batches.sequences", "guards", "ranks", "batches", "runs"),
    *("regularizers", "models", "engines", "rewards", "sources", "tasks", "evaluation", "update"),
    *("callbacks", "modules", "datamodules", "strategies", "dry_run", "studies", "cli"),
    *("__init__", "__main__"),
]


def layer_of(module: str) -> int:
    """The position of the longest entry that names the module or a package around it."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in LAYERS:
            return LAYERS.index(name)
    raise AssertionError(f"{module} is new: give its part a place in this test")


def imports_of(path: Path) -> set[str]:
    """The files of our package that a file names in its imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:  # a file of the package, or what the package itself has
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner.removeprefix("ibro_lightning.") in FILES else node.module)
    ours = {name.removeprefix("ibro_lightning.") for name in names if name.startswith("ibro_lightning.")}
    return {name for name in ours if name in FILES}


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down_only(module: str) -> None:
    above = {name for name in imports_of(FILES[module]) if layer_of(name) > layer_of(module)}
    assert not above


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module: imports_of(path) - {module} for module, path in FILES.items()}
    # A package's own __init__ gathers its files for those outside; inside, files name each other.
    TopologicalSorter(graph).prepare()


TESTS = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_file_imports_another(path: Path) -> None:
    """What several share lies in ``helpers/``."""
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in imports for alias in node.names}
    assert not {name for name in names if name.split(".")[0] == "conftest" or name.split(".")[-1].startswith("test_")}


def write_origin() -> None:
    Path("origin").write_text(str(ibro_lightning.__file__))


def test_tests_and_the_processes_they_start_import_this_checkout(tmp_path: Path) -> None:
    """Whichever package is installed: a subprocess, and a process that is forked from the server."""
    ours = str(TESTS.parent / "src" / "ibro_lightning" / "__init__.py")
    assert ibro_lightning.__file__ == ours
    code = "import ibro_lightning; print(ibro_lightning.__file__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.strip() == ours
    assert run_ranks(1, write_origin, folder=tmp_path) == [0], logs(tmp_path)
    assert (tmp_path / "origin").read_text() == ours


def without(packages: tuple[str, ...], code: str) -> str:
    """What ``code`` prints in a process that cannot import these packages."""
    block = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ImportError(f"blocked: {{name}}")
sys.meta_path.insert(0, Block())
"""
    result = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_functional_needs_torch_alone() -> None:
    code = """
import torch
from ibro_lightning.functional import group_advantages
print(group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0])).tolist())
"""
    others = ("lightning", "transformers", "vllm", "datasets", "torchmetrics", "jsonargparse")
    assert without(others, code).startswith("[0.707")


UPDATE = [module for module in FILES if module.split(".")[0] == "update"]


def test_update_needs_no_lightning() -> None:
    """Neither its files nor whatever they import, and it trains without; nor does an engine's process, for which a run
    waits."""
    code = f"""
import importlib
for module in ["engines.process_child", *{UPDATE}]:
    importlib.import_module(f"ibro_lightning.{{module}}")
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from ibro_lightning.batches import Rollout
from ibro_lightning.models import Policy
from ibro_lightning.regularizers import InformationBottleneck
from ibro_lightning.types import Completion, Group, Prompt, RewardResult
from ibro_lightning.update import PlainLoop, PolicyLoss, Scorer, Updater
config = Qwen2Config(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                     intermediate_size=8)
policy = Policy(Qwen2ForCausalLM(config))
answers = tuple(Completion((token, 0), (-1.0, -1.0), "stop", "", 2, seed=token) for token in (3, 4))
group = Group(Prompt("p", "", (1, 2), answer=None), answers, (RewardResult(1.0, {{}}), RewardResult(0.0, {{}})))
rollout = Rollout.from_groups([group], name="train", iteration=1, temperature=1.0)
loop = PlainLoop({{"policy": policy}}, [torch.optim.AdamW(policy.parameters(), lr=1e-4)])
loss = PolicyLoss(InformationBottleneck(0.005))
scorer, updater = Scorer(loop, loss), Updater(loop)
experience = scorer(rollout, first_step=updater.first_step(rollout))
for step in updater.steps(experience, loss, scorer.context()):
    step, metrics = updater.update(step, loss, scorer.context())
    print(metrics["update/skipped_steps"], step.old_logp.shape, updater.policy_shift([metrics], step, scorer.context()))
"""
    assert without(("lightning", "pytorch_lightning"), code).startswith("0.0 torch.Size([4]) {'update/policy_shift'")
