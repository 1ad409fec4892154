"""The update without Lightning: in a plain loop and in Fabric as docs/update.md has them; and how short the way to the
regulariser's term is."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import TinySource, qwen2
from helpers.rollouts import make_rollout
from helpers.updates import fit
from ibro_lightning import regularizers
from ibro_lightning.batches import Rollout, TokenStats
from ibro_lightning.batches.experience import Experience, MicroBatch
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import clipped_surrogate
from ibro_lightning.models import LoRAOptions, Policy, PolicyOptions, Qwen2FromScratch
from ibro_lightning.modules import DAPOModule, PolicyModule, PPOModule, SFTModule
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.regularizers import EntropyBonus, InformationBottleneck, StepContext
from ibro_lightning.regularizers.coefficients import AdaptiveKL, Cosine, EntropyBand, Linear, TargetEntropy
from ibro_lightning.strategies import FSDP2Strategy
from ibro_lightning.update import (
    PlainLoop,
    PolicyLoss,
    ReferenceKL,
    SamplerCorrection,
    Scorer,
    TokenBudget,
    Updater,
)
from ibro_lightning.update.steps import rows_of

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "update.md").read_text(), re.DOTALL)


def block(beginning: str) -> str:
    """The code block of docs/update.md whose first line begins so."""
    (code,) = [code for code in BLOCKS if code.startswith(beginning)]
    return code


def rollouts(count: int = 2) -> list[Rollout]:
    """Whose rewards are all that is known of them: no accuracy."""
    return [replace(make_rollout(iteration=number + 1), reward_parts={}) for number in range(count)]


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"policy": Policy(qwen2().double()), "rollouts": rollouts()}
    exec(compile(code, "docs/update.md", "exec"), names)
    return names


def weights(policy: Any) -> dict[str, Tensor]:
    return {
        name.removeprefix("_forward_module."): value.detach().clone() for name, value in policy.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["# a plain loop", "# Fabric"])
def test_the_documented_loops_train_in_at_most_forty_lines(kind: str) -> None:
    code = block(kind)
    assert len(code.splitlines()) <= 40
    names = run(code)
    assert len(names["curves"]) == 4
    for metrics in names["curves"]:
        assert metrics["update/regularizer"] != 0
        assert metrics["update/grad_norm"] > 0
    before = weights(Policy(qwen2().double()))
    after = weights(names["policy"])
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_fabric_and_a_plain_loop_do_the_same() -> None:
    plain, fabric = (weights(run(block(kind))["policy"]) for kind in ("# a plain loop", "# Fabric"))
    for name, value in plain.items():
        assert torch.equal(value, fabric[name]), name


def test_a_plain_loop_comes_to_the_weights_of_a_trainer() -> None:
    settings = {"optimizer": torch.optim.AdamW, "learning_rate": 1e-3, "warmup_steps": 0, "mini_batch_prompts": 2}
    module = DAPOModule(TinySource(), regularizer=InformationBottleneck(0.005), **settings)
    fit(module, rollouts())
    plain, start = weights(run(block("# a plain loop"))["policy"]), weights(Policy(qwen2().double()))
    for name, value in weights(module.policy).items():
        torch.testing.assert_close(plain[name], value, rtol=0, atol=1e-6)  # advantages are in float32 there
    assert max((plain[name] - start[name]).abs().max() for name in start) > 1e-3


def test_a_plain_loop_refuses_responses_without_log_probs_while_they_are_corrected() -> None:
    """Their importance weights would be 0, and the policy loss with them."""
    rollout = make_rollout()
    rollout = replace(rollout, sampler_logp=torch.full_like(rollout.sampler_logp, torch.nan))
    loop = PlainLoop({"policy": Policy(qwen2().double())}, [])
    with pytest.raises(ConfigError, match="sampler_correction"):
        Scorer(loop, PolicyLoss())(rollout)
    assert Scorer(loop, PolicyLoss(sampler_correction=None))(rollout).mask.any()


def one_update(budget: int, mini_batch_prompts: int | None = None) -> dict[str, Tensor]:
    """Weights after plain gradient descent, whose step is the gradient."""
    policy = Policy(qwen2().double())
    loop = PlainLoop({"policy": policy}, [torch.optim.SGD(policy.parameters(), lr=0.1)])
    loss = PolicyLoss(InformationBottleneck(0.5))
    scorer = Scorer(loop, loss, TokenBudget(budget))
    updater = Updater(loop, TokenBudget(budget), mini_batch_prompts=mini_batch_prompts, max_grad_norm=None)
    context, rollout = scorer.context(), make_rollout()
    experience = scorer(rollout)
    advantages = experience.per_token(rollout.rewards.double())
    for step in updater.steps(replace(experience, advantages=advantages), loss, context):
        updater.update(step, loss, context)
    return weights(policy)


@pytest.mark.parametrize("budget", [1, 20, 30])
@pytest.mark.parametrize("mini_batch_prompts", [None, 2])
def test_the_update_itself_does_not_depend_on_the_token_budget(budget: int, mini_batch_prompts: int | None) -> None:
    """The real accumulation: a gradient divided by the number of micro-batches would be another step."""
    whole, cut = one_update(10_000, mini_batch_prompts), one_update(budget, mini_batch_prompts)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-9, atol=1e-12)


class Measured(PolicyLoss):
    """Reports two things that are not finite; the first has a loss's name and is none."""

    def surrogate(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().surrogate(stats)
        return loss, {**metrics, "update/information_loss": torch.full_like(loss, torch.inf)}


class NotFinite(Measured):
    must_be_finite = (*PolicyLoss.must_be_finite, "update/information_loss")


@pytest.mark.parametrize(("kind", "skipped"), [(Measured, 0.0), (NotFinite, 1.0)])
def test_a_step_is_skipped_for_the_metrics_that_its_loss_names(kind: type[PolicyLoss], skipped: float) -> None:
    policy = Policy(qwen2().double())
    loop = PlainLoop({"policy": policy}, [torch.optim.SGD(policy.parameters(), lr=0.1)])
    loss, before = kind(), weights(policy)
    scorer, updater = Scorer(loop, loss), Updater(loop)
    experience = scorer(make_rollout())
    advantages = experience.per_token(make_rollout().rewards.double())
    (step,) = updater.steps(replace(experience, advantages=advantages), loss, scorer.context())
    _, metrics = updater.update(step, loss, scorer.context())
    assert metrics["update/skipped_steps"] == skipped
    assert metrics["update/information_loss"] == torch.inf
    assert all(torch.equal(before[name], value) for name, value in weights(policy).items()) == bool(skipped)


def test_a_loss_of_ones_own_is_a_class_of_the_recipe(workspace: Path) -> None:
    """As the docs write it, from the command line."""
    (workspace / "my_code.py").write_text(block("# my_code.py\nfrom ibro_lightning.update import PolicyLoss"))
    main(["fit", "--config", "tiny.yaml", "--model.surrogate", "my_code.Reinforce", "--trainer.max_epochs", "1"])
    config = (workspace / "run" / "config.yaml").read_text()
    assert "surrogate: my_code.Reinforce" in config


def test_advantages_of_ones_own_read_the_scores() -> None:
    names: dict[str, Any] = {}
    exec(block("# my_code.py\nfrom ibro_lightning.modules import DAPOModule"), names)
    module, plain = names["Surprising"](TinySource()), DAPOModule(TinySource())
    for each in (module, plain):
        each.configure_model()
    experience = module.prepare(make_rollout())
    expected = plain.prepare(make_rollout()).advantages * (1 - experience.old_logp)
    torch.testing.assert_close(experience.advantages, expected)


# The loss, and the way to it.


@pytest.mark.parametrize("dual_clip", [None, 4.0])
def test_the_loss_written_out_is_the_surrogate_of_functional(dual_clip: float | None) -> None:
    """To the last bit, value, flags and gradient."""
    generator = torch.Generator().manual_seed(0)
    logp, old_logp, advantages = (torch.randn(50, 50, generator=generator) for _ in range(3))
    logp[0, 0] = -torch.inf
    clips = {"clip_ratio_low": 0.3, "clip_ratio_high": 0.5, "dual_clip": dual_clip}
    results = []
    for of in (lambda stats: PolicyLoss(**clips).surrogate(stats), None):
        leaf = logp.clone().requires_grad_()
        if of is None:
            named = clipped_surrogate(leaf, old_logp, advantages, **clips)._asdict()
            loss, flags = named.pop("loss"), {f"update/{name}": values for name, values in named.items()}
        else:
            mask = torch.ones(50, 50, dtype=torch.bool)
            loss, flags = of(TokenStats(leaf, None, old_logp, old_logp, advantages, mask))
        results.append((loss, flags, torch.autograd.grad(loss.sum(), leaf)[0]))
    (loss, flags, gradient), (expected_loss, expected_flags, expected_gradient) = results
    assert torch.equal(loss, expected_loss)
    assert torch.equal(gradient, expected_gradient)
    assert flags.keys() == expected_flags.keys()
    assert all(torch.equal(flags[name], values) for name, values in expected_flags.items())
    assert all(
        values.any() == (name != "update/clipped_dual" or dual_clip is not None) for name, values in flags.items()
    )


def test_the_readme_shows_the_loss_as_it_is() -> None:
    shown = (ROOT / "README.md").read_text().split("```python\nclass PolicyLoss:\n")[1].split("\n```")[0]
    assert shown in (ROOT / "src" / "ibro_lightning" / "update" / "loss.py").read_text()


def test_the_way_from_the_training_step_to_the_ib_term_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "benchmarks" / "path_to_the_ib_term.py"
    spec = importlib.util.spec_from_file_location("path_to_the_ib_term", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    way = module.path_to_the_ib_term()
    assert way.calls[0][1] == "DAPOModule.training_step"
    assert way.calls[-1][1] == "InformationBottleneck.objective"
    assert len(way.calls) <= 5
    assert len(way.files) <= 4
    assert way.lines <= 120


# One and the same in Python, in an IDE and on the command line.

KINDS = [DAPOModule, PPOModule, SFTModule]


@pytest.mark.parametrize("kind", KINDS)
def test_the_signature_is_what_the_help_shows(kind: type, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = inspect.signature(kind).parameters
    assert not any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    with pytest.raises(SystemExit):
        main(["fit", f"--model.help={kind.__name__}"])
    shown = {
        name.partition(".")[0] for name in re.findall(r"--model\.(?:init_args\.)?([\w.]+)", capsys.readouterr().out)
    }
    assert shown - {"help"} == set(parameters)


def documented(kind: type) -> set[str]:
    return set(re.findall(r"^ {8}(\w+): ", kind.__doc__ or "", re.MULTILINE))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_documented(kind: type) -> None:
    """In the class, or in the base that explains what several modules share; neither explains what is not there."""
    parameters = set(inspect.signature(kind).parameters)
    assert documented(kind) <= parameters <= documented(kind) | documented(PolicyModule)
    assert documented(PolicyModule) <= {name for module in KINDS for name in inspect.signature(module).parameters}


CONFIGURED: list[type] = [DAPOModule, PPOModule, SFTModule, ReferenceKL, SamplerCorrection, Qwen2FromScratch]
CONFIGURED += [getattr(regularizers, name) for name in regularizers.__all__ if name != "StepContext"]
CONFIGURED += [Linear, Cosine, TargetEntropy, EntropyBand, AdaptiveKL, PolicyOptions, LoRAOptions, FSDP2Strategy]


@pytest.mark.parametrize("kind", CONFIGURED)
def test_every_argument_has_a_text_of_its_own_for_the_help(kind: type) -> None:
    """The parser looks for ``name: text`` in the docstrings of the class and its bases; ``a, b: text`` is neither's."""
    text = "\n".join(
        inspect.getdoc(base) or "" for base in kind.__mro__ if base.__module__.startswith("ibro_lightning")
    )
    for name in inspect.signature(kind).parameters:
        assert re.search(rf"^ +{name}: \S", text, re.MULTILINE), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_keyword_names_the_class_it_was_given_to(kind: type) -> None:
    with pytest.raises(
        TypeError, match=rf"^{kind.__name__}\.__init__\(\) got an unexpected keyword argument 'clip_rate'"
    ):
        kind(TinySource(), clip_rate=0.2)


def test_modules_are_at_most_two_levels_below_lightning() -> None:
    for kind in KINDS:
        above = [base.__name__ for base in kind.__mro__]
        assert above.index("LightningModule") <= 2


def test_a_rank_without_rows_of_a_step_takes_part_with_one_that_does_not_count() -> None:
    module = DAPOModule(TinySource(), update_epochs=2)
    module.configure_model()
    step = rows_of(module.prepare(make_rollout()), torch.tensor([], dtype=torch.long))
    assert len(step) == 1
    assert not step.mask.any()


# What takes no part in a step.


def taken(losses: Sequence[PolicyLoss], ranks: Ranks = ALONE) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights after a step of gradient descent by each loss, all on the same rollout, and the metrics of the steps."""
    policy = Policy(qwen2().double())
    loop = PlainLoop({"policy": policy}, [torch.optim.SGD(policy.parameters(), lr=0.1)], ranks=ranks)
    scorer, updater, rollout = Scorer(loop, PolicyLoss()), Updater(loop), make_rollout()
    context, experience = scorer.context(), scorer(rollout)
    advantages = experience.per_token(rollout.rewards.double())
    step = replace(experience, advantages=advantages)
    metrics = [updater.update(loss.prepare(step, context), loss, context)[1] for loss in losses]
    return weights(policy), metrics


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-14, msg=name)


class NotANumber(PolicyLoss):
    """Loss and gradient are NaN."""

    def surrogate(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().surrogate(stats)
        return loss * torch.nan, metrics


def test_a_step_that_is_left_out_leaves_no_gradient_behind() -> None:
    after_both, metrics = taken([NotANumber(), PolicyLoss()])
    after_one, _ = taken([PolicyLoss()])
    assert [step["update/skipped_steps"] for step in metrics] == [1.0, 0.0]
    assert ["update/grad_norm" in step for step in metrics] == [False, True]
    assert_equal(after_both, after_one)


class AnotherRankHasMore(Ranks):
    """As if another rank needed one micro-batch more for the step."""

    def max(self, value: Tensor) -> Tensor:
        return value if value.is_floating_point() else value + 1


def test_a_row_that_is_repeated_for_the_sake_of_other_ranks_does_not_count() -> None:
    """Neither in the gradient nor in the metrics."""
    alone, metrics = taken([PolicyLoss(InformationBottleneck(0.5))])
    repeated, other_metrics = taken([PolicyLoss(InformationBottleneck(0.5))], AnotherRankHasMore())
    assert_equal(repeated, alone)
    assert other_metrics == [pytest.approx(step, rel=1e-12) for step in metrics]


class NothingElsewhere(EntropyBonus):
    """Not a number where the mask is False, where it need not be one."""

    def objective(self, stats: TokenStats) -> Tensor:
        return torch.where(stats.mask, super().objective(stats), torch.nan)


def test_values_under_a_false_mask_are_ignored_even_if_they_are_no_numbers() -> None:
    expected, metrics = taken([PolicyLoss(EntropyBonus(0.5))])
    actual, other_metrics = taken([PolicyLoss(NothingElsewhere(0.5))])
    assert_equal(actual, expected)
    assert other_metrics == [pytest.approx(step, rel=1e-12) for step in metrics]


class Prepared(EntropyBonus):
    """Prepares a weight of 0 for each token, which the weight of 1 in the statistics replaces."""

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        return step.with_extra(weight=torch.zeros_like(step.advantages))

    def statistics(self, micro: MicroBatch, context: StepContext) -> dict[str, Tensor]:
        return {"weight": torch.ones_like(micro.advantages)}

    def objective(self, stats: TokenStats) -> Tensor:
        return super().objective(stats) * stats.extra["weight"]


def test_a_statistic_replaces_what_was_prepared_under_the_same_name() -> None:
    assert_equal(taken([PolicyLoss(Prepared(0.5))])[0], taken([PolicyLoss(EntropyBonus(0.5))])[0])


def test_one_group_with_a_large_rate_may_move_the_policy_far() -> None:
    """However small the rate of the others: the policy is scored again after the step."""
    policy = Policy(qwen2().double())
    one, *others = policy.parameters()
    groups = [{"params": others, "lr": 1e-9}, {"params": [one], "lr": 1e-2}]
    loop, loss = PlainLoop({"policy": policy}, [torch.optim.AdamW(groups)]), PolicyLoss()
    scorer, updater, rollout = Scorer(loop, loss), Updater(loop), make_rollout()
    context, experience = scorer.context(), scorer(rollout)
    advantages = experience.per_token(rollout.rewards.double())
    step = loss.prepare(replace(experience, advantages=advantages), context)
    done, metrics = updater.update(step, loss, context)
    assert updater.policy_shift([metrics], done, context)["update/policy_shift"] > 0


def test_a_schedule_moves_only_with_steps_that_are_taken() -> None:
    policy, rollout = Policy(qwen2().double()), make_rollout()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    loop = PlainLoop({"policy": policy}, [optimizer], [schedule])
    scorer, updater = Scorer(loop, PolicyLoss()), Updater(loop)
    context, experience = scorer.context(), scorer(rollout)
    rates = []
    for loss in (PolicyLoss(), NotANumber(), PolicyLoss()):
        updater.update(loss.prepare(experience, context), loss, context)
        rates += schedule.get_last_lr()
    assert rates == [0.05, 0.05, 0.025]


class OthersWereOnTime(Ranks):
    def sum(self, value: Tensor) -> Tensor:
        return value + 1


def test_a_rank_whose_responses_are_all_late_begins_with_the_others() -> None:
    """Otherwise they would wait for it."""
    rollout = make_rollout()
    late = replace(rollout, late=torch.ones_like(rollout.late))
    loop = PlainLoop({"policy": Policy(qwen2())}, [])
    assert not Updater(loop).start_iteration(late)
    assert Updater(replace(loop, ranks=OthersWereOnTime())).start_iteration(late)


@pytest.mark.parametrize(
    "returned", [lambda loss: (loss.mean(), {}), lambda loss: loss, lambda loss: (loss[:, :1], {})]
)
def test_a_surrogate_without_a_loss_for_every_token_is_refused(returned: Any) -> None:
    """A scalar would otherwise take the shape of the sampler's weights, and train."""

    class Mine(PolicyLoss):
        def surrogate(self, stats: Any) -> Any:
            return returned(super().surrogate(stats)[0])

    stats = SimpleNamespace(
        **dict.fromkeys(("logp", "old_logp", "advantages"), torch.zeros(2, 3)), mask=torch.ones(2, 3, dtype=torch.bool)
    )
    with pytest.raises(ValueError, match=r"^Mine\.surrogate returned .* - return "):
        Mine(sampler_correction=None)(stats, stats)  # type: ignore[arg-type]


def test_a_reference_that_is_not_set_up_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"^call ReferenceKL\.setup\(policy_source, options\)"):
        ReferenceKL().on(torch.device("cpu"))


def test_a_loop_without_an_optimizer_of_the_policy_is_named() -> None:
    policy = torch.nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match=r"^no optimizer of the loop has parameters of the policy"):
        Updater(PlainLoop({"policy": policy}, [])).clip_and_step("policy", {})


@pytest.mark.parametrize("shape", [(8,), (8, 6)])
def test_advantages_that_are_not_per_token_are_refused_with_what_to_write(shape: tuple[int, ...]) -> None:
    """One number per response, or padded as up to 0.2."""
    loop, loss = PlainLoop({"policy": Policy(qwen2().double())}, []), PolicyLoss()
    scorer = Scorer(loop, loss)
    experience = replace(scorer(make_rollout()), advantages=torch.zeros(shape))
    with pytest.raises(
        ValueError, match=r"^advantages of a step are \[N\] = \[27\], got .*per_token\(values\) repeats"
    ):
        loss.prepare(experience, scorer.context())


class Padded(EntropyBonus):
    def prepare(self, step: Experience, context: StepContext) -> Experience:
        return step.with_extra(mine=torch.zeros(8, 6))


def test_a_prepared_tensor_that_is_not_per_token_is_refused_by_name() -> None:
    loop, loss = PlainLoop({"policy": Policy(qwen2().double())}, []), PolicyLoss(Padded(0.1))
    scorer = Scorer(loop, loss)
    with pytest.raises(ValueError, match=r"^mine of a step are \[N\] = \[27\], got \[8, 6\]"):
        loss.prepare(scorer(make_rollout()), scorer.context())
