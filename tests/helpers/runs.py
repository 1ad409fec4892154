"""Runs from the command line, and what they leave in their folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from helpers.processes import logs, run_ranks
from ibro_lightning.cli.main import main

CHECKPOINTS = Path("run", "checkpoints")
QUICK = ["fit", "--config", "tiny.yaml", "--trainer.limit_val_batches", "0"]


def trained(module: nn.Module, steps: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for step in range(steps):
        module(torch.full((2, 3), step + 1.0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def content() -> dict[str, Any]:
    """A checkpoint as Lightning makes it: two optimizers, of which the first has no state yet."""
    torch.manual_seed(0)
    policy, critic = nn.Linear(3, 4), nn.Linear(3, 1).to(torch.bfloat16).float()
    states = [trained(policy, 0).state_dict(), trained(critic).state_dict()]
    weights = {**policy.state_dict(prefix="policy."), **critic.state_dict(prefix="critic.")}
    weights["half"] = torch.randn(5).to(torch.bfloat16)
    return {"state_dict": weights, "optimizer_states": states, "pytorch-lightning_version": "2.6.6", "epoch": 3}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def weights(run: str = "run") -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model" / "model.safetensors")


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command line refuses ``argv``."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def curve(name: str, run: str = "run") -> dict[int, float]:
    events = EventAccumulator(run)
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


STRATEGIES = {"file": ["--trainer.strategy", "fsdp2"], "folder": ["--config", "folders.yaml"]}


def train(recipes: Path, algorithm: str, run: str, ranks: int, form: str, *argv: str) -> None:
    """``fit`` on so many processes to iteration 3; goes on if the run exists. Several write checkpoints of ``form``."""
    settings = ["--trainer.default_root_dir", run, "--ckpt_path", "last", *argv]
    off = ["--trainer.limit_val_batches", "0", "--checkpoint.best", "null"]
    several = ["--trainer.devices", str(ranks), *STRATEGIES[form]] if ranks > 1 else []
    codes = run_ranks(ranks, main, ["fit", "--config", f"{algorithm}.yaml", *settings, *off, *several], folder=recipes)
    assert codes == [0] * ranks, f"{run}: exit codes {codes}\n{logs(recipes)}"
