"""What either side is told to do, what it reports, and the recipe that both follow. Imports neither torch nor
Lightning."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import psutil
import yaml


@dataclass(frozen=True)
class Job:
    """One run of one side: ``iterations`` of ``recipe`` from ``policy``, on the prompts in ``problems``."""

    side: str
    recipe: str
    policy: str
    problems: str
    iterations: int
    seed: int
    report: str
    micro_batch: int | None = None
    """Responses per forward pass, for a peer; None: those of a whole optimizer step."""
    arguments: tuple[str, ...] = ()
    """Further arguments of our own command."""

    @classmethod
    def read(cls, path: str) -> Self:
        return cls(**json.loads(Path(path).read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


@dataclass
class Iteration:
    """What one iteration took and did; the lists have one number per prompt, in the order of the prompts."""

    cpu_s: float
    """CPU seconds of all processes of this side."""
    wall_s: float
    prompts: list[str]
    prompt_tokens: list[int]
    """Tokens of each prompt, once."""
    completions: int
    lengths: list[float]
    """Mean response tokens of each prompt's group, EOS included."""
    accuracies: list[float]
    optimizer_steps: int
    phases: dict[str, float] = field(default_factory=dict)
    """CPU seconds of the main process by phase; ours only."""

    def __post_init__(self) -> None:
        if self.phases:
            self.phases.setdefault("other", self.cpu_s - sum(self.phases.values()))

    @property
    def generated(self) -> float:
        """Response tokens."""
        return sum(self.lengths) * self.completions / len(self.prompts)

    @property
    def trained(self) -> float:
        """Prompt and response tokens, counted once per response."""
        return self.generated + sum(self.prompt_tokens) * self.completions / len(self.prompts)


@dataclass
class Report:
    """A side's iterations, the first of which warms up, and the peak resident memory of its processes."""

    side: str
    iterations: list[Iteration]
    peak_mib: float
    threads: int
    versions: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> Self:
        content = json.loads(Path(path).read_text())
        return cls(**{**content, "iterations": [Iteration(**one) for one in content["iterations"]]})

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self)))

    @property
    def warm(self) -> list[Iteration]:
        return self.iterations[1:]


def cpu_seconds() -> float:
    """CPU seconds so far of this process and of all that it has started, whether they still run or not."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            total += sum(child.cpu_times()[:4])  # user, system, and those of its own ended children
        except psutil.NoSuchProcess:  # ended meanwhile, and is among the ended ones from now on
            continue
    return total


def peak_mib() -> float:
    """Peak resident memory so far of this process and of those that it has started and that still run, added up.

    Of the address space since ``exec``: ``ru_maxrss`` would begin with what the starting process had."""
    return (
        sum(_peak_kib(process.pid) for process in [psutil.Process(), *psutil.Process().children(recursive=True)]) / 1024
    )


def _peak_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def comparable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A shipped recipe without what a peer lacks: dynamic sampling and evaluation; in float32, with our own engine."""
    recipe = json.loads(json.dumps(recipe))
    data, trainer = recipe["data"]["init_args"], recipe["trainer"]
    data["dynamic_sampling"], data["eval_sets"] = None, None
    if data["engine"]["class_path"] != "HFEngine":
        data["engine"] = {"class_path": "HFEngine", "init_args": {}}
    trainer |= {"precision": "32-true", "num_sanity_val_steps": 0, "check_val_every_n_epoch": None}
    recipe["checkpoint"] = {"every_n_iterations": 0}
    recipe.pop("samples", None)
    return recipe


def read_recipe(path: str | Path) -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load(Path(path).read_text())
    return recipe


def built(spec: Any) -> Any:
    """The object that a recipe describes by ``class_path`` and ``init_args``: a reward or a source."""
    if isinstance(spec, list):
        return [built(one) for one in spec]
    if not isinstance(spec, Mapping) or "class_path" not in spec:
        return spec
    name = spec["class_path"].rpartition(".")[2]
    modules = map(import_module, ("ibro_lightning.tasks", "ibro_lightning.rewards"))
    kind = next(getattr(module, name) for module in modules if hasattr(module, name))
    return kind(**{key: built(value) for key, value in spec.get("init_args", {}).items()})
