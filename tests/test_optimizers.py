"""Where a learning rate comes from, how it is scheduled, which optimizers a subclass may return, and how far an update
moves the policy."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.optim import lr_scheduler as schedulers

from helpers.models import TinySource
from helpers.quick import slow_unless
from helpers.rollouts import rollouts
from helpers.updates import fit
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.modules import DAPOModule, PolicyModule, PPOModule, SFTModule
from ibro_lightning.update.optimizer import Schedule, build_optimizer

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]


# One learning rate.


class NeedsRate(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)


class OwnRate(torch.optim.SGD):
    """Finds its own step size, as some optimizers do: their ``lr`` defaults to None."""

    def __init__(self, params: Any, lr: float | None = None) -> None:
        super().__init__(params, lr=0.5)
        self.defaults["lr"] = lr


class Passes(torch.optim.AdamW):
    def __init__(self, params: Any, scale: float = 1.0, **kw: Any) -> None:
        super().__init__(params, **kw)


class Perhaps(torch.optim.AdamW):
    def __init__(self, params: Any, lr: float | None = None) -> None:
        super().__init__(params, lr=1e-3 if lr is None else lr)


class CallsItOtherwise(torch.optim.AdamW):
    def __init__(self, params: Any, step: float = 1e-3, **kw: Any) -> None:
        super().__init__(params, lr=step, **kw)


def of_rate(params: Any, lr: float = 1e-3) -> torch.optim.Optimizer:
    return AdamW(params, lr=lr)


def of_anything(params: Any, **settings: Any) -> torch.optim.Optimizer:
    return AdamW(params, **settings)


NOBODY_SET = [AdamW, SGD, Passes, Perhaps, CallsItOtherwise, of_rate, of_anything, partial(of_rate), partial(Passes)]
NOBODY_SET += [partial(AdamW, lr=None), lambda p: AdamW(p), lambda p: Passes(p), lambda p: CallsItOtherwise(p)]


@pytest.mark.parametrize("rate", [1e-6, 1e-4])
@pytest.mark.parametrize("factory", NOBODY_SET, ids=range(len(NOBODY_SET)))
def test_a_rate_that_nobody_set_is_the_modules(factory: Any, rate: float) -> None:
    optimizer = build_optimizer(factory, parameters(), rate, setting="o", rate_setting="r", default_rate=1e-6)
    assert [optimizer.defaults["lr"], optimizer.param_groups[0]["lr"]] == [rate, rate]


SOMEBODY_SET: list[tuple[Any, float]] = [
    (partial(Passes, lr=2e-3), 2e-3),
    (partial(CallsItOtherwise, step=2e-3), 2e-3),
    (partial(of_rate, lr=1e-3), 1e-3),
    (partial(partial(AdamW, lr=1e-3), eps=1e-7), 1e-3),
    (lambda p: Passes(p, lr=2e-3), 2e-3),
    (lambda p, **ignored: AdamW(p, lr=2e-3), 2e-3),
]


@pytest.mark.parametrize(("factory", "rate"), SOMEBODY_SET)
def test_a_rate_that_somebody_set_counts_or_contradicts(factory: Any, rate: float) -> None:
    names = {"setting": "model.optimizer", "rate_setting": "model.learning_rate", "default_rate": 1e-6}
    assert build_optimizer(factory, parameters(), 1e-6, **names).param_groups[0]["lr"] == rate
    with pytest.raises(
        ConfigError, match=rf"model\.learning_rate: 0\.0001 - model\.optimizer has lr {rate:g}: write one"
    ):
        build_optimizer(factory, parameters(), 1e-4, **names)


UNUSABLE: list[tuple[Any, str]] = [
    ("AdamW", "write an optimizer's class"),
    (None, "write an optimizer's class"),
    (torch.optim.LBFGS, "its step computes the loss several times"),
    (partial(torch.optim.SparseAdam, eps=1e-7), "gradients are dense here"),
    (nn.Linear, "it is not a torch optimizer"),
]


@pytest.mark.parametrize(("optimizer", "message"), UNUSABLE)
def test_what_no_update_can_use_is_refused_by_the_constructor(optimizer: Any, message: str) -> None:
    for name in ("optimizer", "critic_optimizer"):
        with pytest.raises(ConfigError, match=rf"^{name}: .* - {message}"):
            PPOModule(TinySource(), **{name: optimizer})


@pytest.mark.parametrize(
    ("factory", "rate"),
    [
        (AdamW, 1e-6),
        (SGD, 1e-6),
        (torch.optim.Adafactor, 1e-6),
        (NeedsRate, 1e-6),
        (partial(AdamW, betas=(0.9, 0.99)), 1e-6),
        (lambda p: AdamW(p, weight_decay=0.0), 1e-6),
        (partial(AdamW, lr=3e-4), 3e-4),
        (lambda p: AdamW(p, lr=3e-4), 3e-4),
        (lambda p: AdamW(p, lr=1e-3), 1e-6),  # the default of the class: nobody can tell whether it is meant
        (OwnRate, 0.5),
    ],
)
def test_the_learning_rate_is_the_modules_unless_the_optimizer_was_given_one(factory: Any, rate: float) -> None:
    optimizer = build_optimizer(
        factory, parameters(), 1e-6, setting="model.optimizer", rate_setting="model.learning_rate", default_rate=1e-6
    )
    assert [group["lr"] for group in optimizer.param_groups] == [rate]


def test_each_group_of_a_function_may_have_its_own_rate() -> None:
    def factory(p: list[nn.Parameter]) -> Any:
        return AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.5}])

    optimizer = build_optimizer(factory, parameters(), 1e-4, setting="o", rate_setting="r", default_rate=1e-6)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 0.5]


def test_learning_rates_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^learning_rate: 0\.0001 - optimizer has lr 0\.0003: write one"):
        fit(DAPOModule(TinySource(), learning_rate=1e-4, optimizer=partial(AdamW, lr=3e-4)), rollouts(1))
    fit(DAPOModule(TinySource(), learning_rate=3e-4, optimizer=partial(AdamW, lr=3e-4)), rollouts(1))


def test_a_function_that_gives_no_optimizer_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer: .* it gives a list, not a torch optimizer"):
        fit(DAPOModule(TinySource(), optimizer=lambda p: p), rollouts(1))


def test_without_settings_the_published_rate_is_warmed_up() -> None:
    """AdamW at its own default of 1e-3 destroys a policy in two iterations."""
    for module, critic in ((DAPOModule(TinySource()), None), (PPOModule(TinySource()), 1e-5)):
        _, recorder = fit(module, rollouts(12))
        rates = [metrics["update/lr"] for metrics in recorder.metrics]
        assert rates == pytest.approx([1e-6 * min(1, (step + 1) / 11) for step in range(12)])
        if critic is not None:
            assert recorder.metrics[-1]["critic/lr"] == pytest.approx(critic)
    assert SFTModule(TinySource()).learning_rate == 1e-5


class Subclass(DAPOModule):
    def __init__(self, policy: Any, learning_rate: float = 2e-5, **settings: Any) -> None:
        super().__init__(policy, learning_rate=learning_rate, **settings)


def test_a_subclass_may_have_another_default_rate() -> None:
    for settings, rate in (({}, 2e-5), ({"optimizer": partial(AdamW, lr=3e-4)}, 3e-4)):
        trainer, _ = fit(Subclass(TinySource(), warmup_steps=0, **settings), rollouts(1))
        assert trainer.optimizers[0].param_groups[0]["lr"] == rate


@pytest.mark.parametrize("name", ["learning_rate", "warmup_steps", "max_grad_norm"])
def test_settings_below_zero_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: -1 - write 0 or more"):
        DAPOModule(TinySource(), **{name: -1})
    if name != "max_grad_norm":
        with pytest.raises(ConfigError, match=rf"^{name}: None - write (a whole number, )?0 or more"):
            DAPOModule(TinySource(), **{name: None})


def test_no_norm_is_no_clipping() -> None:
    ends = []
    for norm in (None, 0, 1e9):
        module = DAPOModule(TinySource(), optimizer=SGD, learning_rate=0.1, max_grad_norm=norm)
        fit(module, rollouts(2))
        ends.append(module.policy.state_dict())
    assert all(torch.equal(ends[0][name], end[name]) for end in ends[1:] for name in ends[0])


# From the command line and in recipes.


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    shown = capsys.readouterr()
    assert stop.value.code == 0, shown.err
    config: dict[str, Any] = yaml.safe_load(shown.out)["model"]["init_args"]
    return config


DAPO = ["--model", "DAPOModule", "--model.policy", "somewhere"]


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        (["--model.optimizer", "torch.optim.AdamW"], 1e-6),
        (["--model.optimizer", "AdamW", "--model.optimizer.weight_decay", "0.1"], 1e-6),
        (["--model.optimizer", "SGD", "--model.optimizer.lr", "0.001"], 1e-3),
        (["--model.optimizer.lr", "3e-4"], 3e-4),
        (["--model.learning_rate", "2e-5"], 2e-5),
        (["--optimizer", "AdamW", "--optimizer.lr", "1e-4"], 1e-4),
    ],
)
def test_the_printed_configuration_tells_the_rate_and_is_read_back_the_same(
    arguments: list[str], rate: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = printed(capsys, *DAPO, *arguments)
    assert config["learning_rate"] == rate
    assert "lr" not in config["optimizer"]["init_args"]
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({"model": {"class_path": "DAPOModule", "init_args": config}}))
    assert printed(capsys, "--config", str(tmp_path / "again.yaml")) == config


def test_recipes_may_write_optimizers_in_any_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forms: dict[str, tuple[Any, float]] = {
        "name": ("AdamW", 1e-6),
        "class": ({"class_path": "torch.optim.Adam"}, 1e-6),
        "rate": ({"class_path": "AdamW", "init_args": {"lr": 3e-4}}, 3e-4),
        "null": ({"class_path": "AdamW", "init_args": {"lr": None}}, 1e-6),
    }
    for name, (form, rate) in forms.items():
        path = tmp_path / f"{name}.yaml"
        model = {"class_path": "DAPOModule", "init_args": {"policy": "somewhere", "optimizer": form}}
        path.write_text(yaml.safe_dump({"model": model}))
        assert printed(capsys, "--config", str(path))["learning_rate"] == rate, name


def test_two_rates_on_the_command_line_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *DAPO, "--model.learning_rate", "1e-4", "--model.optimizer.lr", "3e-4"])
    assert capsys.readouterr().err == (
        "error: model.learning_rate: 0.0001 - model.optimizer has lr 0.0003: write one of them\n"
    )


def test_an_optimizer_and_a_schedule_as_lightning_users_write_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the top level, before or behind the model, and in a recipe."""
    spelled = ["--optimizer=SGD", "--optimizer.lr", "0.3", "--lr_scheduler", "CosineAnnealingLR"]
    spelled += ["--lr_scheduler.T_max=100"]
    (tmp_path / "top.yaml").write_text(
        "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.3}}\n"
        "lr_scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 100}}\n"
    )
    shown = [
        printed(capsys, *spelled, *DAPO),
        printed(capsys, *DAPO, *spelled),
        printed(capsys, *DAPO, "--config", str(tmp_path / "top.yaml")),
    ]
    for config in shown:
        assert config["optimizer"]["class_path"] == "torch.optim.SGD"
        assert config["learning_rate"] == 0.3
        assert config["lr_scheduler"]["class_path"] == "torch.optim.lr_scheduler.CosineAnnealingLR"
        assert config["lr_scheduler"]["init_args"]["T_max"] == 100


def recipe(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return ["--config", str(path)]


RATE = "model: {class_path: DAPOModule, init_args: {policy: somewhere, learning_rate: 2.0e-4}}"
OWN = """
model: {class_path: DAPOModule, init_args: {policy: x, optimizer: {class_path: AdamW, init_args: {lr: 3.0e-4}}}}
"""
TOP = """
optimizer: {class_path: AdamW, init_args: {lr: 3.0e-4, weight_decay: 0.1}}
lr_scheduler: {class_path: StepLR, init_args: {step_size: 7}}
"""
LATER: dict[str, tuple[list[str], list[str], float]] = {
    "over an optimizer's": ([OWN], ["--model.learning_rate", "1e-4"], 1e-4),
    "over the module's": ([RATE], ["--model.optimizer.lr", "1e-4"], 1e-4),
    "over the module's, as Lightning has it": ([RATE], ["--optimizer.lr=1e-4"], 1e-4),
    "a whole optimizer": ([RATE], ["--model.optimizer", "{class_path: SGD, init_args: {lr: 0.1}}"], 0.1),
    "a recipe over a recipe": ([OWN, RATE], [], 2e-4),
    "the reverse": ([RATE, OWN], [], 3e-4),
    "top level": ([RATE, TOP], [], 3e-4),
    "over the top level": ([RATE, TOP], ["--optimizer.lr", "1e-4"], 1e-4),
    "another optimizer at the same rate": ([OWN], ["--model.optimizer", "SGD"], 3e-4),
}


@pytest.mark.parametrize("name", LATER)
def test_a_later_source_has_the_last_word(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes, arguments, rate = LATER[name]
    files = [part for number, text in enumerate(recipes) for part in recipe(tmp_path / f"{number}.yaml", text)]
    config = printed(capsys, *files, *arguments)
    assert config["learning_rate"] == rate
    assert "lr" not in config["optimizer"]["init_args"]
    if TOP in recipes:
        assert config["optimizer"]["class_path"] == "torch.optim.AdamW"
        assert config["optimizer"]["init_args"]["weight_decay"] == 0.1
        assert config["lr_scheduler"]["init_args"]["step_size"] == 7


def test_two_rates_in_one_recipe_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = recipe(tmp_path / "both.yaml", OWN.replace("policy: x", "policy: x, learning_rate: 2.0e-4"))
    with pytest.raises(SystemExit):
        main(["fit", *both, "--print_config"])
    assert capsys.readouterr().err == (
        "error: model.learning_rate: 0.0002 - model.optimizer has lr 0.0003: write one of them\n"
    )


REFUSED = {
    "--optimizer.lr null": "optimizer.lr: None - write a number, or leave it out: model.learning_rate is used then",
    "--optimizer LBFGS": "model.optimizer: 'LBFGS' - its step computes the loss several times",
    "--model.optimizer SparseAdam": "model.optimizer: 'SparseAdam' - gradients are dense here",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_optimizers_that_cannot_be_used_are_refused_at_the_start(
    arguments: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "tiny.yaml", *arguments.split()])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {REFUSED[arguments]}")
    assert not (workspace / "run").exists()


def test_another_class_has_its_own_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = printed(capsys, *DAPO, "--model.optimizer", "SGD", "--model.optimizer.momentum", "0.5")["optimizer"]
    assert settings["init_args"]["weight_decay"] == 0
    assert settings["init_args"]["momentum"] == 0.5
    decay = recipe(tmp_path / "decay.yaml", OWN.replace("lr:", "weight_decay: 0.5, betas: [0.8, 0.9], lr:"))
    assert printed(capsys, *decay, "--model.optimizer", "Adam")["optimizer"]["init_args"]["weight_decay"] == 0
    assert printed(capsys, *decay, "--optimizer.eps", "1e-7")["optimizer"]["init_args"]["weight_decay"] == 0.5


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "torch.optim.lr_scheduler.ReduceLROnPlateau"])
def test_a_schedule_that_waits_for_a_metric_is_refused(
    name: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "tiny.yaml", "--lr_scheduler", name])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: model.lr_scheduler: 'ReduceLROnPlateau' - it waits for a metric")
    assert not (workspace / "run").exists()


# Schedules.

SCHEDULES: dict[str, Callable[..., Any]] = {
    "CosineAnnealingLR": partial(schedulers.CosineAnnealingLR, T_max=7, eta_min=0.01),
    "CosineAnnealingWarmRestarts": partial(schedulers.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "OneCycleLR": partial(schedulers.OneCycleLR, max_lr=0.5, total_steps=12),
    "MultiStepLR": partial(schedulers.MultiStepLR, milestones=[2, 2, 5]),
    "ExponentialLR": partial(schedulers.ExponentialLR, gamma=0.9),
    "CyclicLR": partial(schedulers.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 0.9**step),
    "SequentialLR": lambda optimizer: schedulers.SequentialLR(
        optimizer, [schedulers.ConstantLR(optimizer, 0.5, 2), schedulers.ExponentialLR(optimizer, 0.9)], [3]
    ),
    "PolynomialLR": partial(schedulers.PolynomialLR, total_iters=6),
}


def rates(schedule: Schedule, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return seen


def optimizer_of(rate: float = 0.1) -> torch.optim.Optimizer:
    return SGD(parameters(), lr=rate, momentum=0.9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_begins_when_the_warm_up_ends(name: str) -> None:
    plain = optimizer_of()
    theirs = SCHEDULES[name](plain)
    expected = []
    for _ in range(9):
        expected.append(plain.param_groups[0]["lr"])
        plain.step()
        theirs.step()
    assert rates(Schedule(optimizer_of(), SCHEDULES[name]), 9) == expected
    rising = [expected[0] * (step + 1) / 4 for step in range(3)]
    assert rates(Schedule(optimizer_of(), SCHEDULES[name], warmup_steps=3), 12) == pytest.approx(rising + expected)


def saved(tmp_path: Path, *states: Any) -> Any:
    """Through a file, as a checkpoint: plain values alone."""
    torch.save(states, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize("stop", [1, 2, 5, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_exactly(name: str, stop: int, tmp_path: Path) -> None:
    whole = rates(Schedule(optimizer_of(), SCHEDULES[name], warmup_steps=2), 12)
    before = Schedule(optimizer_of(), SCHEDULES[name], warmup_steps=2)
    rates(before, stop)
    optimizer, schedule = saved(tmp_path, before.optimizer.state_dict(), before.state_dict())
    after = Schedule(optimizer_of(), SCHEDULES[name], warmup_steps=2)
    after.optimizer.load_state_dict(optimizer)
    after.load_state_dict(schedule)
    assert after.changes == []
    assert rates(after, 12 - stop) == whole[stop:]


def test_a_changed_schedule_is_where_it_would_be_had_it_been_so_from_the_start(tmp_path: Path) -> None:
    before = Schedule(optimizer_of(), partial(schedulers.CosineAnnealingLR, T_max=7), warmup_steps=2)
    rates(before, 5)
    optimizer, schedule = saved(tmp_path, before.optimizer.state_dict(), before.state_dict())
    others: dict[str, tuple[float, Any, int]] = {
        "lr_scheduler.T_max 20 (checkpoint: 7)": (0.1, partial(schedulers.CosineAnnealingLR, T_max=20), 2),
        "warmup_steps 8 (checkpoint: 2)": (0.1, partial(schedulers.CosineAnnealingLR, T_max=7), 8),
        "lr_scheduler ExponentialLR (checkpoint: CosineAnnealingLR)": (0.1, SCHEDULES["ExponentialLR"], 2),
        "": (0.4, partial(schedulers.CosineAnnealingLR, T_max=7), 2),  # the rate itself is the optimizer's to report
    }
    for change, (rate, factory, warmup_steps) in others.items():
        after = Schedule(optimizer_of(rate), factory, warmup_steps)
        after.optimizer.load_state_dict(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            after.load_state_dict(schedule)
        assert ", ".join(after.changes) == change
        assert rates(after, 6) == rates(Schedule(optimizer_of(rate), factory, warmup_steps), 11)[5:]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (partial(schedulers.StepLR, step="x"), "the schedule refuses its settings: .*step"),
        (lambda optimizer: optimizer, "it gives a SGD, not an LRScheduler"),
        (lambda optimizer: schedulers.ReduceLROnPlateau(optimizer), "it waits for a metric"),
    ],
)
def test_what_is_no_schedule_is_named(factory: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^lr_scheduler: .* - {message}"):
        fit(DAPOModule(TinySource(), optimizer=SGD, lr_scheduler=factory), rollouts(1))


def test_both_networks_have_the_schedule() -> None:
    module = PPOModule(
        TinySource(),
        learning_rate=0.01,
        critic_learning_rate=0.02,
        warmup_steps=1,
        lr_scheduler=partial(schedulers.ExponentialLR, gamma=0.5),
    )
    _, recorder = fit(module, rollouts(4))
    factors = [0.5, 1, 0.5, 0.25]
    assert [metrics["update/lr"] for metrics in recorder.metrics] == pytest.approx([0.01 * f for f in factors])
    assert [metrics["critic/lr"] for metrics in recorder.metrics] == pytest.approx([0.02 * f for f in factors])


# What a subclass may return from configure_optimizers.


def one(module: Any) -> Any:
    return SGD(module.parameters(), lr=0.1)


def two(module: Any) -> list[Any]:
    named = list(module.policy.named_parameters())
    matrices = [p for _, p in named if p.ndim == 2]
    return [SGD(matrices, lr=0.1), SGD([p for _, p in named if p.ndim != 2], lr=0.1)]


def halving(optimizer: Any) -> Any:
    return schedulers.ExponentialLR(optimizer, 0.5)


RETURNED: dict[str, Callable[[Any], Any]] = {
    "an optimizer": one,
    "a list": lambda module: [one(module)],
    "a tuple": lambda module: (one(module),),
    "a dict": lambda module: {"optimizer": one(module)},
    "a dict with a schedule": lambda m: {"optimizer": (o := one(m)), "lr_scheduler": halving(o)},
    "a dict with a schedule's dict": lambda m: {"optimizer": (o := one(m)), "lr_scheduler": {"scheduler": halving(o)}},
    "two lists": lambda m: ([o := one(m)], [halving(o)]),
    "several of one network": two,
}


@pytest.mark.parametrize("returned", RETURNED)
@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
def test_a_subclass_may_return_optimizers_in_any_form(kind: type[PolicyModule], returned: str) -> None:
    if kind is PPOModule and returned == "several of one network":
        pytest.skip("its critic would have none")
    mine = type("Mine", (kind,), {"configure_optimizers": lambda self: RETURNED[returned](self)})
    module = mine(TinySource())
    trainer, recorder = fit(module, rollouts(3))
    assert trainer.global_step == 3
    scheduled = "schedule" in returned or returned == "two lists"
    # In PPO one optimizer takes a step for each network, and its schedule with it.
    factor = 0.5 if kind is DAPOModule else 0.25
    expected = [0.1, 0.1 * factor, 0.1 * factor**2] if scheduled else [0.1] * 3
    assert [metrics["update/lr"] for metrics in recorder.metrics] == pytest.approx(expected)
    if kind is DAPOModule and not scheduled:
        usual = DAPOModule(TinySource(), optimizer=SGD, learning_rate=0.1, warmup_steps=0)
        fit(usual, rollouts(3))
        for name, value in usual.policy.state_dict().items():
            assert torch.equal(value, module.policy.state_dict()[name]), name


def test_a_network_without_an_optimizer_is_named() -> None:
    class PolicyAlone(PPOModule):
        def configure_optimizers(self) -> Any:
            return SGD(self.policy.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match="configure_optimizers: 'critic' - no optimizer has its parameters"):
        fit(PolicyAlone(TinySource()), rollouts(1))


def test_a_schedule_of_a_subclass_that_waits_for_a_metric_is_refused() -> None:
    class Waits(DAPOModule):
        def configure_optimizers(self) -> Any:
            optimizer = one(self)
            return [optimizer], [schedulers.ReduceLROnPlateau(optimizer)]

    with pytest.raises(ConfigError, match="configure_optimizers: 'ReduceLROnPlateau' - it waits for a metric"):
        fit(Waits(TinySource()), rollouts(1))


# How far an update moves the policy.


@pytest.mark.parametrize("settings", [{}, {"mini_batch_prompts": 1}, {"update_epochs": 2}], ids=str)
@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
def test_an_update_that_moves_the_policy_too_far_is_reported(
    kind: type[PolicyModule], settings: dict[str, Any]
) -> None:
    module = kind(TinySource(), learning_rate=1.0, warmup_steps=0, **settings)
    with pytest.warns(UserWarning, match="moved the policy") as caught:
        _, recorder = fit(module, rollouts(1))
    lines = [str(one.message) for one in caught if "moved the policy" in str(one.message)]
    assert len(lines) == 1
    shift = recorder.metrics[0]["update/policy_shift"]
    assert shift > 0.5
    assert lines[0].startswith(f"iteration 1: one update has moved the policy by {shift:.2g} nats per token")
    assert "lower learning_rate (1)" in lines[0]


@pytest.mark.parametrize("settings", [{}, {"mini_batch_prompts": 1}, {"update_epochs": 3}], ids=str)
def test_the_shift_is_that_of_the_whole_update(settings: dict[str, Any]) -> None:
    module = DAPOModule(TinySource(), optimizer=SGD, learning_rate=0.3, warmup_steps=0, max_grad_norm=None, **settings)
    module.configure_model()
    rollout = rollouts(1)[0]
    sequences = rollout.sequences.pad()
    before, _ = module.policy(sequences, temperature=rollout.temperature)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*moved the policy")
        _, recorder = fit(module, [rollout])
    after, _ = module.policy(sequences, temperature=rollout.temperature)
    measured = sequences.response_mask & (rollout.groups == 0)[:, None]  # of four groups, an eighth at least
    moved = (after - before).abs()[measured].mean().item()
    assert 0.001 < moved < 0.5
    assert recorder.metrics[0]["update/policy_shift"] == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"mini_batch_prompts": 2}], ids=str)
def test_a_policy_that_is_no_longer_a_number_is_reported(settings: dict[str, Any]) -> None:
    module = DAPOModule(TinySource(), optimizer=SGD, learning_rate=1e30, warmup_steps=0, **settings)
    with pytest.warns(UserWarning, match="iteration 1: one update has moved the policy by nan nats"):
        fit(module, rollouts(1))


def test_the_published_rate_costs_no_further_pass() -> None:
    module = DAPOModule(TinySource())
    module.configure_model()
    passes: list[int] = []
    module.policy.register_forward_pre_hook(lambda *_: passes.append(1))
    rewards = torch.tensor([1.0, -1.0] * 4)  # a group without an advantage would have a pass of its own
    _, recorder = fit(module, [replace(rollout, rewards=rewards) for rollout in rollouts(2)])
    assert len(passes) == 2
    assert all("update/policy_shift" not in metrics for metrics in recorder.metrics)


# torch.compile.


def compile_layers(module: Any) -> None:
    layers = module.policy.model.model.layers
    for index in range(len(layers)):
        layers[index] = torch.compile(layers[index], backend="eager")


COMPILED: dict[str, Callable[[Any], Any]] = {
    "the model": lambda m: setattr(m.policy, "model", torch.compile(m.policy.model, backend="eager")),
    "the model, in place": lambda m: m.policy.model.compile(backend="eager"),
    "the policy": lambda m: setattr(m, "policy", torch.compile(m.policy, backend="eager")),
    "its layers": compile_layers,
    "the module, in place": lambda m: m.compile(backend="eager"),
}


@pytest.fixture(scope="module")
def uncompiled() -> dict[str, Any]:
    module = DAPOModule(TinySource(), optimizer=SGD, learning_rate=0.1)
    fit(module, rollouts(1))
    return OrderedDict(module.state_dict())


@pytest.mark.parametrize("way", slow_unless(lambda way: way in ("the model", "the module, in place"), COMPILED))
def test_a_compiled_policy_trains_as_ever_under_its_own_names(way: str, uncompiled: dict[str, Any]) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    module = DAPOModule(TinySource(), optimizer=SGD, learning_rate=0.1)
    module.configure_model()
    COMPILED[way](module)
    fit(module, rollouts(1))
    assert list(module.state_dict()) == list(uncompiled)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, uncompiled[name])
    assert [name for name, _ in module.named_full_weights()] == [
        name.removeprefix("policy.model.") for name in uncompiled
    ]
    if "module" not in way:
        assert counters["stats"]["unique_graphs"] >= 1, "it was compiled, not only unwrapped"


COMPILED_MODULE = """
import torch
from ibro_lightning.modules import DAPOModule


class Compiled(DAPOModule):
    def configure_model(self):
        super().configure_model()
        self.policy.model = torch.compile(self.policy.model, backend="eager")
"""


@pytest.mark.slow
def test_a_run_with_a_compiled_policy_goes_on_and_exports(workspace: Path) -> None:
    from safetensors.torch import load_file

    (workspace / "compiled_module.py").write_text(COMPILED_MODULE)
    recipe = (workspace / "tiny.yaml").read_text().replace("DAPOModule", "compiled_module.Compiled")
    (workspace / "compiled.yaml").write_text(recipe)
    quick = ["--trainer.limit_val_batches", "0"]
    main(["fit", "--config", "compiled.yaml", *quick])
    main(
        ["fit", "--config", "compiled.yaml", *quick, "--trainer.max_epochs", "1", "--trainer.default_root_dir", "half"]
    )
    main(["fit", "--config", "compiled.yaml", *quick, "--trainer.default_root_dir", "half", "--ckpt_path", "last"])
    whole, halves = (load_file(workspace / run / "model" / "model.safetensors") for run in ("run", "half"))
    assert not [name for name in whole if "_orig_mod" in name]
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


class CriticFirst(PPOModule):
    def configure_optimizers(self) -> Any:
        optimizers, schedules = super().configure_optimizers()
        return optimizers[::-1], schedules[::-1]


def test_the_order_of_the_optimizers_does_not_matter() -> None:
    ends = []
    for kind in (PPOModule, CriticFirst):
        module = kind(TinySource(), learning_rate=1e-3, critic_learning_rate=1e-2, warmup_steps=0)
        trainer, recorder = fit(module, rollouts(2))
        assert trainer.global_step == 2
        ends.append(recorder.weights[-1])
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
