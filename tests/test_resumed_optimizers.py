"""A run that resumes with other optimizer settings: what can change is applied and reported, what cannot is refused."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from helpers.models import TinySource
from helpers.processes import command, logs, run_ranks
from helpers.processes import fit as fit_ranks
from helpers.quick import slow_unless
from helpers.rollouts import rollouts
from helpers.updates import Recorder
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.modules import DAPOModule, PolicyModule, PPOModule, SFTModule
from ibro_lightning.runs.checkpoints.plugin import CheckpointFiles, read_checkpoint, read_optimizers
from ibro_lightning.runs.marks import HEADER
from ibro_lightning.update.resumed_optimizers import ResumedSettings

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD
KINDS = (DAPOModule, PPOModule, SFTModule)


def batches(kind: type[PolicyModule], count: int) -> Sequence[Any]:
    if issubclass(kind, SFTModule):
        return [Sequences.collate([[1, 2], [3]], [[4, 5, 6], [7, 8]])] * count
    return rollouts(count)


def train(module: PolicyModule, epochs: int, checkpoint: Path | None = None) -> tuple[pl.Trainer, Recorder]:
    """An epoch is two batches, of one optimizer step each."""
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=CheckpointFiles(),
        callbacks=[recorder],
    )
    loader: Any = DataLoader(batches(type(module), 2), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer, recorder


SETTINGS: dict[str, Any] = {
    "optimizer": partial(AdamW, betas=(0.9, 0.99), weight_decay=0.0),
    "learning_rate": 1e-3,
    "warmup_steps": 3,
}


@pytest.fixture
def before(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A checkpoint after two steps."""
    kind, settings = request.param if isinstance(request.param, tuple) else (request.param, {})
    trainer, _ = train(kind(TinySource(), **{**SETTINGS, **settings}), 1)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    return tmp_path / "before.ckpt"


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "optimizer settings" in record.getMessage()]


def rate(recorder: Recorder) -> list[float]:
    return [metrics["update/lr"] for metrics in recorder.metrics]


@pytest.mark.parametrize("before", KINDS, indirect=True)
def test_unchanged_settings_go_on_bit_for_bit(
    before: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    kind = request.node.callspec.params["before"]
    _, whole = train(kind(TinySource(), **SETTINGS), 2)
    with caplog.at_level(logging.INFO):
        trainer, halves = train(kind(TinySource(), **SETTINGS), 2, before)
    assert said(caplog) == []
    if kind is not SFTModule:  # its cosine has learned of the longer run meanwhile
        assert rate(halves) == rate(whole)[2:]
        for name, value in whole.weights[-1].items():
            assert torch.equal(value, halves.weights[-1][name]), name
    assert trainer.global_step == 4


@dataclass
class Change:
    settings: dict[str, Any]
    line: str
    rates: Sequence[float] | None = None
    """Of the third and the fourth step."""
    group: tuple[str, Any] | None = None


def adamw(**settings: Any) -> Any:
    return partial(AdamW, **{"betas": (0.9, 0.99), "weight_decay": 0.0, **settings})


CHANGES: dict[str, Change] = {
    "learning rate": Change({"learning_rate": 4e-3}, "learning_rate 0.004 (checkpoint: 0.001)", [0.003, 0.004]),
    "an optimizer's own": Change({"optimizer": adamw(lr=4e-3), "learning_rate": 1e-6},
                                 "learning_rate 0.004 (checkpoint: 0.001)", [0.003, 0.004]),
    "weight decay": Change({"optimizer": adamw(weight_decay=0.3)}, "optimizer.weight_decay 0.3 (checkpoint: 0)",
                           [7.5e-4, 1e-3], ("weight_decay", 0.3)),
    "betas": Change({"optimizer": adamw(betas=(0.8, 0.9))}, "optimizer.betas (0.8, 0.9) (checkpoint: (0.9, 0.99))",
                    [7.5e-4, 1e-3], ("betas", (0.8, 0.9))),
    "eps": Change({"optimizer": adamw(eps=1e-6)}, "optimizer.eps 1e-06 (checkpoint: 1e-08)", None, ("eps", 1e-6)),
    "warm-up": Change({"warmup_steps": 9}, "warmup_steps 9 (checkpoint: 3)", [3e-4, 4e-4]),
    "no warm-up": Change({"warmup_steps": 0}, "warmup_steps 0 (checkpoint: 3)", [1e-3, 1e-3]),
    "a schedule": Change({"lr_scheduler": partial(schedulers.ExponentialLR, gamma=0.5), "warmup_steps": 1},
                         "lr_scheduler ExponentialLR (checkpoint: LambdaLR), warmup_steps 1 (checkpoint: 3)",
                         [5e-4, 2.5e-4]),
    "several": Change({"optimizer": adamw(weight_decay=0.3), "learning_rate": 2e-3},
                      "learning_rate 0.002 (checkpoint: 0.001), optimizer.weight_decay 0.3 (checkpoint: 0)",
                      [1.5e-3, 2e-3]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("before", "change"),
    slow_unless(lambda case: case[0] is DAPOModule or case[1] == "several", itertools.product(KINDS, CHANGES)),
    indirect=["before"],
)
def test_what_can_change_is_applied_and_reported(
    before: Path, change: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    kind, new = request.node.callspec.params["before"], CHANGES[change]
    settings = {**SETTINGS, **new.settings}
    if kind is SFTModule and change == "an optimizer's own":
        settings["learning_rate"] = 1e-5
    with caplog.at_level(logging.INFO):
        trainer, recorder = train(kind(TinySource(), **settings), 2, before)
    assert said(caplog) == [f"resumes with other optimizer settings: {new.line}"]
    if new.rates is not None and (kind is not SFTModule or change == "a schedule"):
        assert rate(recorder) == pytest.approx(new.rates)
    if new.group is not None:
        name, value = new.group
        assert [group[name] for group in trainer.optimizers[0].param_groups] == [value]
    assert trainer.global_step == 4
    # A run that goes on from there has these settings, and nothing to report.
    trainer.save_checkpoint(before.with_name("after.ckpt"))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train(kind(TinySource(), **settings), 3, before.with_name("after.ckpt"))
    assert said(caplog) == []


@pytest.mark.parametrize("before", [PPOModule], indirect=True)
def test_the_critics_settings_may_change_too(before: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {**SETTINGS, "critic_learning_rate": 4e-3, "critic_optimizer": partial(AdamW, weight_decay=0.5)}
    with caplog.at_level(logging.INFO):
        _, recorder = train(PPOModule(TinySource(), **settings), 2, before)
    assert said(caplog) == [
        "resumes with other optimizer settings: critic_learning_rate 0.004 (checkpoint: 1e-05), "
        "critic_optimizer.weight_decay 0.5 (checkpoint: 0.01)"
    ]
    assert [metrics["critic/lr"] for metrics in recorder.metrics] == pytest.approx([3e-3, 4e-3])
    assert rate(recorder) == pytest.approx([7.5e-4, 1e-3])


@pytest.mark.parametrize(
    "before", [(DAPOModule, {"lr_scheduler": partial(schedulers.CosineAnnealingLR, T_max=4)})], indirect=True
)
@pytest.mark.parametrize("t_max", [4, 8])
def test_a_schedules_settings_may_change(before: Path, t_max: int, caplog: pytest.LogCaptureFixture) -> None:
    settings = {**SETTINGS, "lr_scheduler": partial(schedulers.CosineAnnealingLR, T_max=t_max)}
    _, whole = train(DAPOModule(TinySource(), **settings), 3)
    with caplog.at_level(logging.INFO):
        _, recorder = train(DAPOModule(TinySource(), **settings), 3, before)
    assert rate(recorder) == rate(whole)[2:]
    line = "resumes with other optimizer settings: lr_scheduler.T_max 8 (checkpoint: 4)"
    assert said(caplog) == ([] if t_max == 4 else [line])


SGD_RUN: dict[str, Any] = {"optimizer": SGD, "learning_rate": 0.01}


@pytest.mark.parametrize("before", [(DAPOModule, SGD_RUN)], indirect=True)
def test_a_setting_whose_state_comes_with_its_first_step_may_change(before: Path) -> None:
    trainer, _ = train(DAPOModule(TinySource(), **{**SETTINGS, **SGD_RUN, "optimizer": partial(SGD, momentum=0.9)}), 2,
                       before)  # fmt: skip
    (group,) = trainer.optimizers[0].param_groups
    assert group["momentum"] == 0.9
    assert trainer.optimizers[0].state[group["params"][0]]["momentum_buffer"] is not None


def grouped(p: list[Any]) -> Any:
    return AdamW([{"params": p[:1]}, {"params": p[1:]}], lr=1e-3)


REFUSED: dict[str, tuple[Any, str]] = {
    "SGD": (SGD, r"model\.optimizer: 'SGD' - the checkpoint has the state of AdamW, from which SGD cannot resume: "),
    "Adam": (torch.optim.Adam, r"model\.optimizer: 'Adam' - the checkpoint has the state of AdamW, "),
    "amsgrad": (adamw(amsgrad=True), r"model\.optimizer\.amsgrad: True - the checkpoint was made with False "),
    "groups": (grouped, r"model\.optimizer: 'AdamW' - it has 2 parameter groups, the checkpoint 1"),
    "fewer": (lambda p: AdamW(p[1:], lr=1e-3), r"its groups have \[\d+\] parameters, the checkpoint's \[\d+\]"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("before", [DAPOModule], indirect=True)
def test_what_cannot_change_is_refused(before: Path, name: str) -> None:
    factory, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as caught:
        train(DAPOModule(TinySource(), **{**SETTINGS, "optimizer": factory}), 2, before)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("before", [(PPOModule, {"critic_optimizer": SGD})], indirect=True)
def test_the_critics_optimizer_is_named(before: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.critic_optimizer: 'AdamW' - the checkpoint has the state of SGD"):
        train(PPOModule(TinySource(), **SETTINGS), 2, before)


def older(path: Path) -> None:
    """As versions before wrote it: without settings, and with the state of torch's LambdaLR alone."""
    checkpoint = read_checkpoint(path)
    for state in checkpoint["optimizer_states"]:
        del state["configured"]
    checkpoint["lr_schedulers"] = [state["scheduler"] for state in checkpoint["lr_schedulers"]]
    torch.save(checkpoint, path)


@pytest.mark.parametrize("before", [DAPOModule], indirect=True)
def test_a_checkpoint_of_an_older_version_goes_on(before: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, whole = train(DAPOModule(TinySource(), **SETTINGS), 2)
    older(before)
    with caplog.at_level(logging.INFO):
        _, recorder = train(DAPOModule(TinySource(), **SETTINGS), 2, before)
    assert (rate(recorder), said(caplog)) == (rate(whole)[2:], [])
    assert all(torch.equal(value, recorder.weights[-1][name]) for name, value in whole.weights[-1].items())
    with caplog.at_level(logging.INFO):
        _, recorder = train(DAPOModule(TinySource(), **{**SETTINGS, "learning_rate": 4e-3}), 2, before)
    assert said(caplog) == ["resumes with other optimizer settings: learning_rate 0.004 (checkpoint: 0.001)"]
    assert rate(recorder) == pytest.approx([0.003, 0.004])
    with pytest.raises(ConfigError, match="the checkpoint has the state of an optimizer with amsgrad, betas, "):
        train(DAPOModule(TinySource(), **{**SETTINGS, "optimizer": SGD}), 2, before)


class OwnOptimizers(DAPOModule):
    """A user's, with a scheduler of torch's as it is."""

    own_rate = 0.01

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=self.own_rate)
        return [optimizer], [schedulers.LambdaLR(optimizer, lambda step: 0.5**step)]


class FasterOptimizers(OwnOptimizers):
    own_rate = 0.08


@pytest.mark.parametrize("before", [OwnOptimizers], indirect=True)
def test_a_subclasss_own_schedule_takes_the_new_rate(before: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _, recorder = train(FasterOptimizers(TinySource()), 2, before)
    assert rate(recorder) == pytest.approx([0.08 / 4, 0.08 / 8])
    assert said(caplog) == ["resumes with other optimizer settings: learning_rate 0.08 (checkpoint: 0.01)"]


class Own(DAPOModule):
    """A user's, which makes what it is given."""

    def __init__(self, make: Any) -> None:
        super().__init__(TinySource())
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(list(self.parameters()))


def scheduled(schedule: Any, lr: Any = 1e-3, **settings: Any) -> Any:
    def make(p: list[Any]) -> Any:
        optimizer = AdamW(p, lr=lr, **settings)
        return [optimizer], [] if schedule is None else [schedule(optimizer)]

    return make


def step_lr(gamma: float) -> Any:
    return partial(schedulers.StepLR, step_size=1, gamma=gamma)


def power(base: float) -> Any:
    return partial(schedulers.LambdaLR, lr_lambda=lambda step: base**step)


class Falls(schedulers.LRScheduler):
    factor = 0.5

    def get_lr(self) -> Any:
        return [rate * self.factor**self.last_epoch for rate in self.base_lrs]


class FallsFaster(Falls):
    factor = 0.1


FallsFaster.__qualname__ = Falls.__qualname__  # the same class, after an edit

cosine, one_cycle = partial(schedulers.CosineAnnealingLR, T_max=8), partial(schedulers.OneCycleLR, max_lr=0.1)


def in_turn(optimizer: Any) -> Any:
    return schedulers.SequentialLR(optimizer, [step_lr(0.5)(optimizer), power(0.1)(optimizer)], milestones=[1])


OWN: dict[str, tuple[Any, Any, str]] = {
    "gamma": (step_lr(0.5), step_lr(0.1), "lr_scheduler.gamma 0.1 (checkpoint: 0.5)"),
    "another": (step_lr(0.5), cosine, "lr_scheduler CosineAnnealingLR (checkpoint: StepLR)"),
    "removed": (step_lr(0.5), None, "lr_scheduler none (checkpoint: StepLR)"),
    "added": (None, step_lr(0.5), "lr_scheduler StepLR (checkpoint: none)"),
    "a function": (power(0.5), power(0.1), "lr_scheduler LambdaLR (checkpoint: one with another rule)"),
    "to a function": (step_lr(0.5), power(0.5), "lr_scheduler LambdaLR (checkpoint: StepLR)"),
    "in turn": (step_lr(0.5), in_turn, "lr_scheduler SequentialLR (checkpoint: StepLR)"),
    "code": (Falls, FallsFaster, f"lr_scheduler {__name__}.Falls (checkpoint: one with another rule)"),
    "from a cycle": (partial(one_cycle, total_steps=9), None,
                     "learning_rate 0.001 (checkpoint: 0.004), "
                     "optimizer.betas (0.9, 0.999) (checkpoint: (0.95, 0.999)), "
                     "lr_scheduler none (checkpoint: OneCycleLR)"),
    "to a cycle": (None, partial(one_cycle, total_steps=9),
                   "learning_rate 0.004 (checkpoint: 0.001), "
                   "optimizer.betas (0.95, 0.999) (checkpoint: (0.9, 0.999)), "
                   "lr_scheduler OneCycleLR (checkpoint: none)"),
}  # fmt: skip


@pytest.mark.parametrize("change", slow_unless({"a function", "to a function", "code", "to a cycle"}.__contains__, OWN))
def test_a_subclasss_own_schedule_may_change(change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new, line = OWN[change]
    trainer, _ = train(Own(scheduled(old)), 1)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    ended, whole = train(Own(scheduled(new)), 2)
    with caplog.at_level(logging.INFO):
        trainer, recorder = train(Own(scheduled(new)), 2, tmp_path / "before.ckpt")
    assert rate(recorder) == rate(whole)[2:]
    assert said(caplog) == [f"resumes with other optimizer settings: {line}"]
    groups = [{k: v for k, v in t.optimizers[0].param_groups[0].items() if k != "params"} for t in (trainer, ended)]
    assert groups[0] == groups[1]
    # Nothing has changed from there on.
    caplog.clear()
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    _, halves = train(Own(scheduled(new)), 3, tmp_path / "after.ckpt")
    assert said(caplog) == []
    assert rate(halves) == rate(train(Own(scheduled(new)), 3)[1])[4:]


def chained(optimizer: Any) -> Any:
    return schedulers.ChainedScheduler([step_lr(0.5)(optimizer), power(0.9)(optimizer)])


UNCHANGED = {
    "StepLR": step_lr(0.5),
    "LambdaLR": power(0.5),
    "SequentialLR": in_turn,
    "ChainedScheduler": chained,
    "MultiStepLR": partial(schedulers.MultiStepLR, milestones=[1, 3]),
    "CyclicLR": partial(schedulers.CyclicLR, base_lr=1e-3, max_lr=1e-2, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": partial(one_cycle, total_steps=9),
    "a user's": Falls,
}


@pytest.mark.parametrize("schedule", UNCHANGED.values(), ids=UNCHANGED)
def test_a_subclasss_own_schedule_goes_on_bit_for_bit(
    schedule: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, whole = train(Own(scheduled(schedule)), 2)
    trainer, _ = train(Own(scheduled(schedule)), 1)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    with caplog.at_level(logging.INFO):
        _, halves = train(Own(scheduled(schedule)), 2, tmp_path / "before.ckpt")
    assert (rate(halves), said(caplog)) == (rate(whole)[2:], [])
    assert all(torch.equal(value, halves.weights[-1][name]) for name, value in whole.weights[-1].items())


def test_a_schedule_that_does_not_get_so_far_is_refused(tmp_path: Path) -> None:
    trainer, _ = train(Own(scheduled(partial(one_cycle, total_steps=9))), 2)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    short = scheduled(partial(one_cycle, total_steps=2))
    with pytest.raises(ConfigError, match=r"OneCycleLR.*cannot be brought to step 4 of the checkpoint") as caught:
        train(Own(short), 3, tmp_path / "before.ckpt")
    assert "\n" not in str(caught.value)


def halves_of(p: list[Any], first: Any, second: Any) -> Any:
    """Two optimizers of one network, each with a schedule or none."""
    optimizers = [AdamW(p[:7], lr=1e-3), AdamW(p[7:], lr=1e-2)]
    return optimizers, [s(o) for s, o in zip((first, second), optimizers, strict=True) if s is not None]


def test_a_schedule_goes_on_with_its_own_state_when_another_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = (partial(halves_of, first=first, second=step_lr(0.1)) for first in (cosine, None))
    trainer, _ = train(Own(before), 1)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    with caplog.at_level(logging.INFO):
        trainer, _ = train(Own(after), 2, tmp_path / "before.ckpt")
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == pytest.approx([1e-3, 1e-6])
    assert said(caplog) == ["resumes with other optimizer settings: lr_scheduler none (checkpoint: CosineAnnealingLR)"]


RATES: dict[str, tuple[Any, Any, bool]] = {
    "tensors": (torch.tensor(1e-3), torch.tensor(1e-2), True),
    "to a tensor": (1e-3, torch.tensor(1e-2), True),
    "from a tensor": (torch.tensor(1e-3), 1e-2, True),
    "the same tensor": (torch.tensor(1e-3), torch.tensor(1e-3), False),
    "the same as a tensor": (1e-3, torch.tensor(1e-3), False),
    "the same as a number": (torch.tensor(1e-3), 1e-3, False),
}


@pytest.mark.parametrize("schedule", [None, step_lr(0.5)])
@pytest.mark.parametrize("change", RATES)
def test_a_rate_may_be_a_tensor(change: str, schedule: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new, is_changed = RATES[change]
    made = [scheduled(schedule, lr=copy.deepcopy(lr), foreach=False) for lr in (old, new)]
    trainer, _ = train(Own(made[0]), 1)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    with caplog.at_level(logging.INFO):
        trainer, recorder = train(Own(made[1]), 2, tmp_path / "before.ckpt")
    first = float(new) * (1 if schedule is None else 0.25)
    assert rate(recorder)[0] == pytest.approx(first, rel=1e-6)
    assert type(trainer.optimizers[0].param_groups[0]["lr"]) is type(new)
    line = "resumes with other optimizer settings: learning_rate 0.01 (checkpoint: 0.001)"
    assert said(caplog) == ([line] if is_changed else [])


def test_groups_of_equal_size_in_another_order_are_refused(tmp_path: Path) -> None:
    orders = [(slice(7), slice(7, 14)), (slice(7, 14), slice(7))]
    made = [lambda p, a=a, b=b: AdamW([{"params": p[a]}, {"params": p[b]}, {"params": p[14:]}]) for a, b in orders]
    trainer, _ = train(Own(made[0]), 1)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    message = r"its parameter group 0 has policy\.\S+ where the checkpoint's has policy\.\S+: group them as they were"
    with pytest.raises(ConfigError, match=message) as caught:
        train(Own(made[1]), 2, tmp_path / "before.ckpt")
    assert "\n" not in str(caught.value)
    older(tmp_path / "before.ckpt")
    train(Own(made[0]), 2, tmp_path / "before.ckpt")


@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_how_a_step_is_computed_may_change_without_a_word(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _ = train(Own(scheduled(None)), 1)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    _, whole = train(Own(scheduled(None)), 2)
    with caplog.at_level(logging.INFO):
        trainer, recorder = train(Own(scheduled(None, **{how: True})), 2, tmp_path / "before.ckpt")
    assert said(caplog) == []
    assert trainer.optimizers[0].param_groups[0][how] is True
    for name, value in whole.weights[-1].items():
        torch.testing.assert_close(recorder.weights[-1][name], value, rtol=1e-9, atol=1e-9)


def test_capturable_where_there_is_no_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, _ = train(Own(scheduled(None)), 1)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    with pytest.raises(ConfigError, match=r"optimizer\.capturable: True - the checkpoint was made with False"):
        train(Own(scheduled(None, capturable=True)), 2, tmp_path / "before.ckpt")
    checkpoint = read_checkpoint(tmp_path / "before.ckpt")
    (state,) = checkpoint["optimizer_states"]
    for group in (*state["param_groups"], *state["configured"]["groups"]):
        group["capturable"] = True  # as if from a GPU
    torch.save(checkpoint, tmp_path / "before.ckpt")
    with caplog.at_level(logging.INFO):
        trainer, _ = train(Own(scheduled(None)), 2, tmp_path / "before.ckpt")
    assert (trainer.optimizers[0].param_groups[0]["capturable"], said(caplog)) == (False, [])


@pytest.mark.parametrize("before", [DAPOModule], indirect=True)
def test_a_schedule_of_ours_may_become_a_subclasss_own(before: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = scheduled(step_lr(0.5), betas=(0.9, 0.99), weight_decay=0.0)
    with caplog.at_level(logging.INFO):
        _, recorder = train(Own(settings), 2, before)
    assert rate(recorder) == pytest.approx([2.5e-4, 1.25e-4])
    (line,) = said(caplog)
    assert "lr_scheduler StepLR (checkpoint: LambdaLR)" in line


# From the command line.


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_command_line_refuses_before_it_touches_anything(
    workspace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    quick = ["fit", "--config", "tiny.yaml", "--trainer.limit_val_batches", "0", "--trainer.default_root_dir"]
    main([*quick, "run", "--trainer.max_epochs", "2"])
    kept = files(workspace / "run")
    assert (
        yaml.safe_load((workspace / "run" / "config.yaml").read_text())["model"]["init_args"]["learning_rate"] == 1e-2
    )

    first = str(next((workspace / "run" / "checkpoints").glob("iteration_000001.ckpt")))
    for refused in (["--model.optimizer", "SGD"], ["--model.optimizer.amsgrad", "true"]):
        for target in (["run", "--ckpt_path", "last"], ["other", "--ckpt_path", first]):
            with pytest.raises(SystemExit) as stop:
                main([*quick, *target, "--trainer.max_epochs", "3", *refused])
            assert stop.value.code == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("error: model.optimizer")
            assert "the checkpoint" in error
            assert files(workspace / "run") == kept
            assert not (workspace / "other").exists()

    changed = ["--model.optimizer.lr", "3e-3", "--model.optimizer.weight_decay", "0.2"]
    with caplog.at_level(logging.INFO):
        main([*quick, "run", "--ckpt_path", "last", "--trainer.max_epochs", "3", *changed])
    assert said(caplog) == [
        "resumes with other optimizer settings: learning_rate 0.003 (checkpoint: 0.01), "
        "optimizer.weight_decay 0.2 (checkpoint: 0.01)"
    ]
    text = (workspace / "run" / "config.yaml").read_text()
    assert text.startswith(HEADER)
    settings = yaml.safe_load(text)["model"]["init_args"]
    assert settings["learning_rate"] == 3e-3
    assert settings["optimizer"]["init_args"]["weight_decay"] == 0.2
    saved = read_checkpoint(workspace / "run" / "checkpoints" / "iteration_000003.ckpt")["optimizer_states"][0]
    assert [(group["lr"], group["weight_decay"]) for group in saved["param_groups"]] == [(3e-3, 0.2)]


def test_two_sharded_ranks_go_on_from_a_folder_with_other_settings(workspace: Path) -> None:
    """Shards are loaded into the optimizers on another way than a file's states."""
    run = ["--config", "tiny.yaml", "--trainer.limit_val_batches", "0", "--trainer.devices", "2"]
    run += ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.save_distributed_checkpoint", "true"]
    fit_ranks(workspace, [*run, "--trainer.max_epochs", "1"], ranks=2)
    saved = workspace / "run" / "checkpoints"
    assert (saved / "iteration_000001.ckpt").is_dir()

    wrong = [*run, "--ckpt_path", "last", "--model.optimizer.amsgrad", "true"]
    assert run_ranks(2, command, ["fit", *wrong], folder=workspace) == [2, 2]
    assert "model.optimizer.amsgrad: True - the checkpoint was made with False" in logs(workspace)

    changed = ["--model.optimizer.lr", "3e-3", "--model.optimizer.weight_decay", "0.2", "--model.warmup_steps", "7"]
    fit_ranks(workspace, [*run, "--ckpt_path", "last", *changed], ranks=2)
    line = (
        "resumes with other optimizer settings: learning_rate 0.003 (checkpoint: 0.01), "
        "optimizer.weight_decay 0.2 (checkpoint: 0.01), warmup_steps 7 (checkpoint: 0)"
    )
    assert logs(workspace).count(line) == 1
    before, after = (read_optimizers(saved / f"iteration_{number:06d}.ckpt")[0] for number in (1, 2))
    (group,) = after["param_groups"]
    steps = after["state"][0]["step"].item()
    assert steps > before["state"][0]["step"].item()
    assert (group["initial_lr"], group["weight_decay"]) == (3e-3, 0.2)
    assert group["lr"] == pytest.approx(3e-3 * min(1, (steps + 1) / 8))


@pytest.mark.parametrize("before", [SFTModule], indirect=True)
def test_the_end_of_the_cosine_may_change(before: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the full rate to the end, only the warm-up is left: 3/4 and 4/4 of it in the third and the fourth step."""
    with caplog.at_level(logging.INFO):
        _, recorder = train(SFTModule(TinySource(), **SETTINGS, final_lr_factor=1.0), 2, before)
    assert said(caplog) == ["resumes with other optimizer settings: final_lr_factor 1 (checkpoint: 0)"]
    assert rate(recorder) == pytest.approx([7.5e-4, 1e-3])


def test_the_present_rate_of_a_schedule_that_is_not_watched_follows_the_new_one() -> None:
    """Halfway down from 0.1 before, halfway down from 0.4 now."""
    optimizers = []
    for rate_before_schedule in (0.1, 0.4):
        parameter = torch.nn.Parameter(torch.zeros(2))
        group = {"params": [parameter], "lr": rate_before_schedule, "initial_lr": rate_before_schedule}
        optimizers.append(SGD([group]))
        ResumedSettings(optimizers[-1], "model.optimizer", "learning_rate", [], {})
    optimizers[0].param_groups[0]["lr"] = 0.05
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(0.2)
