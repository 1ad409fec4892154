"""Faults planted into training runs of the command line: what is not finite, memory, a reward's worker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from helpers.processes import logs, run_ranks
from ibro_lightning.cli.main import main
from ibro_lightning.engines import HFEngine
from ibro_lightning.update.loss import PolicyLoss
from ibro_lightning.update.updater import Updater

FIT = ["fit", "--config", "tiny.yaml", "--checkpoint.every_n_iterations=1", "--trainer.max_epochs=3"]
FIT += ["--trainer.limit_val_batches=0"]


class NaNGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


def plant(patch: pytest.MonkeyPatch, fault: str, iteration: int | None = None) -> None:
    """In one iteration or in all of them."""
    loss, update = PolicyLoss.__call__, Updater.update

    def bad_loss(self: PolicyLoss, stats: Any, micro: Any) -> Any:
        value, metrics = loss(self, stats, micro)
        if iteration in (None, micro.iteration):
            if fault == "gradient":
                value = NaNGradient.apply(value)  # type: ignore[no-untyped-call]
            elif fault == "loss":
                value, metrics = value * torch.inf, {**metrics, "update/policy_loss": torch.inf}
            elif fault == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
        return value, metrics

    def bad_advantages(self: Updater, step: Any, *others: Any) -> Any:
        if iteration in (None, step.iteration):
            step.advantages[step.mask.nonzero()[0].unbind()] = torch.nan
        return update(self, step, *others)

    patch.setattr(PolicyLoss, "__call__", bad_loss)
    if fault == "advantage":
        patch.setattr(Updater, "update", bad_advantages)


def fit_with_a_fault(rank: int, fault: str, iteration: int | None, settings: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ.get("RANK", "0")) == rank:
            plant(patch, fault, iteration)
        main([*FIT, *settings])


def curve(run: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.mark.parametrize(
    ("strategy", "fault"),
    [
        pytest.param("ddp", "gradient", marks=pytest.mark.slow),
        pytest.param("fsdp2", "gradient", marks=pytest.mark.slow),
        ("ddp", "loss"),
        ("fsdp2", "advantage"),
        (None, "gradient"),
    ],
)
def test_what_is_not_finite_on_one_rank_is_left_out_on_all_and_counted(
    strategy: str | None, fault: str, workspace: Path
) -> None:
    several = ["--trainer.devices=2", f"--trainer.strategy={strategy}"] if strategy else []
    ranks = 2 if strategy else 1
    codes = run_ranks(ranks, fit_with_a_fault, ranks - 1, fault, 2, several, folder=workspace)
    assert codes == [0] * ranks, logs(workspace)
    skipped = curve(workspace / "run", "update/skipped_steps")
    assert skipped[1] == skipped[3] == 0
    assert skipped[2] == curve(workspace / "run", "update/steps")[2] > 0
    assert all(weight.isfinite().all() for weight in load_file(workspace / "run/model/model.safetensors").values())
    assert f"not finite is the policy {fault}" in (workspace / "rank_0.log").read_text()


def test_training_stops_on_all_ranks_and_the_batch_is_on_disk(workspace: Path) -> None:
    settings = ["--trainer.devices=2", "--trainer.strategy=ddp", "--model.max_nonfinite_steps=3"]
    codes = run_ranks(2, fit_with_a_fault, 1, "gradient", None, settings, folder=workspace)
    assert codes == [2, 2], logs(workspace)
    folder = workspace / "run" / "nonfinite"
    said = (workspace / "rank_0.log").read_text()
    assert "error: iteration 2: " in said
    assert "of the policy in a row were left out, as the gradient is not finite" in said
    assert str(folder.relative_to(workspace)) in said
    for rank in range(2):
        saved = torch.load(folder / f"iteration_000002_rank_{rank}.pt", weights_only=True)
        assert saved["cause"] == "gradient"
        assert saved["advantages"].shape == saved["mask"].shape
        rows = pandas.read_parquet(folder / f"iteration_000002_rank_{rank}.parquet")
        assert len(rows) >= len(saved["groups"])
        assert {"response", "token_ids", "logp"} <= set(rows.columns)


def test_the_count_goes_on_in_a_resumed_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "gradient")
    main([*FIT, "--trainer.max_epochs=1"])
    left_out = int(curve(workspace / "run", "update/skipped_steps")[1])
    with pytest.raises(SystemExit):
        main([*FIT, "--ckpt_path=last", f"--model.max_nonfinite_steps={left_out + 1}"])
    assert (workspace / "run" / "nonfinite" / "iteration_000002_rank_0.pt").exists()


def test_out_of_memory_in_an_update_names_the_setting(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, "memory", 2)
    with pytest.raises(SystemExit) as end:
        main(FIT)
    assert end.value.code == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: model.micro_batch_tokens: 16384 - out of memory in update: a micro-batch of ")
    rows, tokens = int(said.split("micro-batch of ")[1].split()[0]), int(said.split(" in memory)")[0].split("(")[-1])
    smaller = int(said.split("write ")[1].split()[0])
    assert rows > 1
    assert 0 < smaller <= tokens / 2


def test_out_of_memory_in_generation_names_the_engines_setting(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    monkeypatch.setattr(HFEngine, "_generate", full)
    with pytest.raises(SystemExit) as end:
        main([*FIT, "--data.weight_check=null"])
    assert end.value.code == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: data.engine.max_batch_size: 256 - out of memory in generate: 16 responses of up to ")
    assert "write 8 (÷ 32)" in said


KILLER = """
import os, signal
from pathlib import Path
from ibro_lightning.rewards import VerifiableReward


class Killer(VerifiableReward):
    def verify(self, prompt, completion):
        if completion.token_ids and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "=" in completion.text
"""


@pytest.mark.slow
def test_a_reward_worker_that_is_killed_changes_nothing(workspace: Path) -> None:
    """It is replaced, and what it was judging is judged again."""
    (workspace / "killer.py").write_text(KILLER)
    judged = [
        "--data.reward.class_path=killer.Killer",
        "--data.reward_pool.workers=2",
        "--data.reward_pool.deadline_s=60",
    ]
    main([*FIT, *judged])
    assert (workspace / "killed").exists()
    crashes = curve(workspace / "run", "verifier/crash")
    assert sum(crashes.values()) == 0, "a first crash is not the response's doing"
    main([*FIT, "--trainer.default_root_dir=here"])
    for name, weight in load_file(workspace / "here/model/model.safetensors").items():
        assert torch.equal(weight, load_file(workspace / "run/model/model.safetensors")[name])
