"""What users' regularisers, losses and policies return is checked where it arrives, and the error names their class."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import TinySource, qwen2
from helpers.rollouts import make_rollout
from helpers.updates import CUTS, assert_same, begin_step, micro_loss, scored_first, summed, token_stats
from ibro_lightning.batches.experience import Experience, MicroBatch, TokenStats
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError, HookError
from ibro_lightning.functional import Collision, HeadFunctional, RestrictedEntropy
from ibro_lightning.models import Policy
from ibro_lightning.modules import DAPOModule, PPOModule
from ibro_lightning.regularizers import EntropyRegularizer, StepContext
from ibro_lightning.regularizers.base import PolicyLossMethod
from ibro_lightning.regularizers.coefficients import Coefficient
from ibro_lightning.update import PlainLoop, PolicyLoss, Scorer

torch.set_num_threads(1)


class Own(EntropyRegularizer):
    """A regulariser of which one hook returns something else."""

    def __init__(self, coef: float = 0.1, **hooks: Callable[..., Any]) -> None:
        super().__init__(coef)
        for name, hook in hooks.items():
            setattr(self, name, hook)

    def objective(self, stats: TokenStats) -> Tensor:
        assert stats.entropy is not None
        return stats.entropy


def step_loss(loss: PolicyLoss, unscored: bool = False) -> tuple[Tensor, dict[str, float]]:
    """Of an optimizer step on the rollout of the helpers, in one micro-batch."""
    scorer = Scorer(PlainLoop({"policy": Policy(qwen2().double())}, []), loss)
    rollout = make_rollout()
    groups = torch.arange(rollout.num_groups) if unscored else None
    step = loss.prepare(scorer(rollout, first_step=groups), scorer.context())
    micro = step.micro_batch()
    return loss(loss.stats(micro, scorer.context()), micro)


def test_the_plain_case_is_fine() -> None:
    value, metrics = step_loss(PolicyLoss(Own()))
    assert value.requires_grad
    assert metrics["update/regularizer"] > 0


PER_TOKEN = r"return \[B, T\], one number per token"
FAULTS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "objective, a scalar": (lambda stats: stats.entropy.mean(), rf"objective returned float64 \[\] - {PER_TOKEN}"),
    "objective, a row": (lambda stats: stats.entropy[0], rf"objective returned float64 \[6\] - {PER_TOKEN}"),
    "objective, a mask": (lambda stats: stats.entropy > 1, rf"objective returned bool \[8, 6\] - {PER_TOKEN}"),
    "objective, nothing": (lambda stats: None, rf"objective returned None - {PER_TOKEN}"),
    "shape_policy_loss, a scalar": (lambda loss, stats: loss.mean(), rf"shape_policy_loss returned .* - {PER_TOKEN}"),
    "shape_policy_loss, nothing": (lambda loss, stats: None, rf"shape_policy_loss returned None - {PER_TOKEN}"),
    "measure, a scalar": (
        lambda stats: {"mine": stats.logp.mean()},
        rf"measure returned float64 \[\] as 'mine' - {PER_TOKEN}",
    ),
    "measure, a tensor": (lambda stats: stats.logp, r"measure returned float64 \[8, 6\] - return a mapping"),
    "statistics, a row": (
        lambda micro, context: {"mine": micro.advantages[0]},
        rf"statistics returned float64 \[6\] as 'mine' - {PER_TOKEN}",
    ),
    "statistics, nothing": (lambda micro, context: None, "statistics returned None - return a mapping"),
    "functionals, a list": (lambda context: [Collision()], r"functionals returned \[a Collision\] - return a mapping"),
    "functionals, a function": (
        lambda context: {"mine": lambda logits, rows: logits.amax(dim=1)},
        "functionals returned a function as 'mine' - return an object of a subclass of HeadFunctional",
    ),
    "functionals, a class": (
        lambda context: {"mine": Collision},
        "functionals returned the class Collision as 'mine' - return an object of a subclass of HeadFunctional",
    ),
    "prepare, nothing": (lambda step, context: None, "prepare returned None - return the step"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_hook_returns_is_checked_and_its_class_named(fault: str) -> None:
    hook, message = FAULTS[fault]
    with pytest.raises(HookError, match=rf"^Own\.{message}"):
        step_loss(PolicyLoss(Own(**{fault.partition(",")[0]: hook})))


class WithoutEntropy(EntropyRegularizer):
    needs_entropy = False

    def objective(self, stats: TokenStats) -> Any:
        return stats.entropy


def test_an_objective_on_an_entropy_that_its_class_has_declined_says_which_flag_to_set() -> None:
    with pytest.raises(HookError, match=r"^WithoutEntropy\.objective returned None .* sets needs_entropy = True$"):
        step_loss(PolicyLoss(WithoutEntropy(0.1)))


class ShapesByEntropy(PolicyLossMethod):
    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Any:
        return stats.entropy


def test_so_does_a_gate() -> None:
    with pytest.raises(HookError, match=r"shape_policy_loss returned None .* sets shaping_needs_entropy = True$"):
        step_loss(PolicyLoss(ShapesByEntropy()))


class TwiceTheEntropy(WithoutEntropy):
    def objective(self, stats: TokenStats) -> Any:
        return 2 * stats.entropy


class GatesByEntropy(ShapesByEntropy):
    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Any:
        return loss * (stats.entropy > 0.5)


@pytest.mark.parametrize(
    ("regularizer", "flag"), [(TwiceTheEntropy(0.1), "needs_entropy"), (GatesByEntropy(), "shaping_needs_entropy")]
)
def test_an_error_of_their_own_gets_a_note_on_the_flag(regularizer: EntropyRegularizer, flag: str) -> None:
    with pytest.raises(TypeError) as caught:
        step_loss(PolicyLoss(regularizer))
    assert caught.value.__notes__ == [f"stats.entropy is None unless the class sets {flag} = True"]


class NoSuper(EntropyRegularizer):
    def __init__(self) -> None:
        self.mine = 1

    def objective(self, stats: TokenStats) -> Tensor:
        return stats.logp


@pytest.mark.parametrize("build", [PolicyLoss, lambda r: DAPOModule(TinySource(), regularizer=r)])
def test_a_constructor_without_super_is_refused_at_once(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"^regularizer: 'NoSuper' - its __init__ must call super\(\).__init__\(coef"):
        build(NoSuper())


class FloatWeight(Own):
    @property
    def coefficients(self) -> Any:
        return {**super().coefficients, "weight": 0.5}


class ListOfCoefficients(Own):
    @property
    def coefficients(self) -> Any:
        return [self.coefficient]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FloatWeight, r"^FloatWeight\.coefficients returned 0\.5 as 'weight' - .*as_coefficient\(number"),
        (ListOfCoefficients, r"^ListOfCoefficients\.coefficients returned \[a Constant\] - "),
    ],
)
def test_coefficients_are_objects_that_can_be_saved(kind: type[Own], message: str) -> None:
    with pytest.raises(HookError, match=message):
        PolicyLoss(kind())


class Surrogate(PolicyLoss):
    result: Any = None

    def surrogate(self, stats: TokenStats) -> Any:
        return type(self).result(super().surrogate(stats)[0])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda loss: (loss.mean(), {}), r"float64 \[\] - return \[B, T\].*: here \[8, 6\]; PolicyLoss aggregates"),
        (lambda loss: loss, r"float64 \[8, 6\] - return the pair \(loss \[B, T\], metrics by name\)"),
        (lambda loss: (loss, [loss]), r"\(float64 \[8, 6\], \[float64 \[8, 6\]\]\) - return the pair"),
        (lambda loss: (loss, {"mine": loss.mean()}), r"float64 \[\] as 'mine' - return \[B, T\]"),
    ],
)
def test_a_surrogate_of_ones_own_is_named(result: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Surrogate, "result", staticmethod(result))
    with pytest.raises(HookError, match=rf"^Surrogate\.surrogate returned {message}"):
        step_loss(Surrogate())


class NamedLikePrepared(Own):
    def prepare(self, step: Experience, context: StepContext) -> Experience:
        return step.with_extra(collision=step.advantages)

    def functionals(self, context: StepContext) -> dict[str, HeadFunctional]:
        return {"collision": Collision()}


class NamedTwice(Own):
    def functionals(self, context: StepContext) -> dict[str, HeadFunctional]:
        return {"collision": Collision()}

    def statistics(self, micro: MicroBatch, context: StepContext) -> dict[str, Tensor]:
        return {"collision": micro.advantages}


@pytest.mark.parametrize(("kind", "hook"), [(NamedLikePrepared, "functionals"), (NamedTwice, "statistics")])
def test_no_functional_takes_the_name_of_another_tensor(kind: type[Own], hook: str) -> None:
    with pytest.raises(HookError, match=rf"^{kind.__name__}\.{hook} returned 'collision', which stats\.extra has"):
        step_loss(PolicyLoss(kind()))


class PolicyOfOnesOwn(torch.nn.Module):
    """One that accepts functionals, and forgets them."""

    def __init__(self, values: Any) -> None:
        super().__init__()
        self.policy, self.values = Policy(qwen2().double()), values

    def forward(self, sequences: Any, *, functionals: Any = None, **options: Any) -> Any:
        logp, entropy = self.policy(sequences, **options)
        return (logp, entropy) if functionals is None else (logp, entropy, *self.values(logp))


@pytest.mark.parametrize(
    "values",
    [
        lambda logp: (),
        lambda logp: ({},),
        lambda logp: ([logp],),
        lambda logp: ({"collision": logp.mean()},),
    ],
)
def test_a_policy_of_ones_own_that_gives_no_values_is_named(values: Any) -> None:
    class Asks(Own):
        def functionals(self, context: StepContext) -> dict[str, HeadFunctional]:
            return {"collision": Collision()}

    loss = PolicyLoss(Asks())
    scorer = Scorer(PlainLoop({"policy": PolicyOfOnesOwn(values)}, []), loss)
    step = loss.prepare(scorer(make_rollout()), scorer.context())
    with pytest.raises(HookError, match=r"^PolicyOfOnesOwn\.forward returned "):
        loss.stats(step.micro_batch(), scorer.context())


# A gate on the policy loss may read functionals, though it has no α.


class TopPGate(PolicyLossMethod):
    """No policy gradient where the entropy of the likeliest tokens is at its bound or below."""

    def __init__(self, top_p: float = 0.9, bound: float = 0.5) -> None:
        super().__init__()
        self.restricted, self.bound = RestrictedEntropy(top_p=top_p), bound

    def functionals(self, context: StepContext) -> dict[str, HeadFunctional]:
        return {"top_p_entropy": self.restricted}

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        return torch.where(stats.extra["top_p_entropy"] > self.bound, loss, loss.detach())


class Statistics(PolicyLossMethod):
    def statistics(self, micro: MicroBatch, context: StepContext) -> dict[str, Tensor]:
        return {"twice": torch.full_like(micro.advantages, 2.0)}

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        return loss * stats.extra["twice"]


@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
@pytest.mark.parametrize("fused_head", [True, False])
def test_a_gate_by_top_p_entropy_is_that_mask_on_the_policy_loss(kind: Any, fused_head: bool) -> None:
    """In any cut into micro-batches; its mean is a curve."""
    gated, plain = (kind(TinySource(), regularizer=method) for method in (TopPGate(), None))
    for module in (gated, plain):
        module.configure_model()
        module.policy._fused_head = fused_head
    step = begin_step(scored_first(plain), plain.prepare(make_rollout()))
    noise = torch.randn(step.mask.shape, generator=torch.Generator().manual_seed(1)).double()
    assert step.old_logp is not None
    step = replace(step, old_logp=step.old_logp + 0.3 * noise)
    parameters = list(gated.policy.parameters())

    def entropies(micro: MicroBatch) -> Tensor:
        functionals = {"h": RestrictedEntropy(top_p=0.9)}
        return gated.policy(micro.sequences, temperature=micro.temperature, functionals=functionals)[2]["h"].detach()

    micro = step.micro_batch()
    middle = entropies(micro)[micro.mask].sort().values[12:14]
    assert middle[1] - middle[0] > 1e-6
    gated.regularizer.bound = middle.mean()

    def by_hand(part: Experience) -> tuple[Tensor, Any]:
        micro = part.micro_batch()
        stats = token_stats(gated, micro)
        loss, _ = gated.policy_loss.surrogate(stats)
        if (correction := gated.policy_loss.sampler_correction) is not None and stats.sampler_logp is not None:
            loss = loss * correction(stats.old_logp, stats.sampler_logp, stats.mask).weights
        loss = torch.where(entropies(micro) > middle.mean(), loss, loss.detach())
        assert micro.weights is not None
        return (torch.where(micro.mask, loss, 0.0) * micro.weights).sum(), None

    expected = summed(by_hand, [step], parameters)
    for cut in CUTS:
        parts = [step.select(torch.tensor(rows)) for rows in cut]
        assert_same(summed(lambda part: micro_loss(gated, part), parts, parameters), expected)
    _, metrics = micro_loss(gated, step)
    assert metrics["regularizer/top_p_entropy"] > 0


def test_a_gate_may_read_statistics() -> None:
    twice, once = step_loss(PolicyLoss(Statistics()))[0], step_loss(PolicyLoss())[0]
    torch.testing.assert_close(twice, 2 * once)


class TermAndGate(TopPGate):
    """Its base has a flag of its own for α = 0."""

    shaping_needs_extra = False


def test_what_is_not_needed_at_a_coefficient_of_zero_is_not_computed() -> None:
    with pytest.raises(KeyError, match="top_p_entropy"):
        step_loss(PolicyLoss(TermAndGate()))


# From the command line: one line that names the class, and exit code 2.

OWN = """
from ibro_lightning.functional import HeadFunctional
from ibro_lightning.regularizers import EntropyRegularizer


class Probabilities(HeadFunctional):
    def value(self, logits, rows):
        return logits.softmax(dim=1)


class Scrambled(EntropyRegularizer):
    def __init__(self, coef: float = 0.1):
        super().__init__(coef)

    def functionals(self, context):
        return {"p": Probabilities()}

    def objective(self, stats):
        return stats.extra["p"]


class Scalar(EntropyRegularizer):
    def __init__(self, coef: float = 0.1):
        super().__init__(coef)

    def objective(self, stats):
        return stats.entropy.mean()


class NoSuper(EntropyRegularizer):
    def __init__(self, coef: float = 0.1):
        self.mine = coef

    def objective(self, stats):
        return stats.entropy
"""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Scrambled", r"error: Probabilities\.value returned float32 \[\d+, \d+\] - return \[n\], one number per row"),
        ("Scalar", r"error: Scalar\.objective returned float32 \[\] - return \[B, T\], one number per token"),
        ("NoSuper", r"error: model\.regularizer: 'NoSuper' - its __init__ must call super\(\)\.__init__\(coef\)"),
    ],
)
def test_a_fault_of_the_users_class_is_one_line_and_no_bug_of_ours(
    workspace: Path, capsys: pytest.CaptureFixture[str], name: str, line: str
) -> None:
    (workspace / "own_faults.py").write_text(OWN)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "tiny.yaml", "--model.regularizer", f"own_faults.{name}"])
    assert end.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(line, last), last
    assert "bug" not in last


def test_numbers_are_coefficients_that_stay() -> None:
    assert all(isinstance(c, Coefficient) for c in PolicyLoss(Own(0.25)).coefficients.values())


# The commands of the pages, on a small recipe.

ROOT = Path(__file__).parent.parent
COMMAND = re.compile(r"^\$ python -m ibro_lightning fit --config quickstart\.yaml((?:.*\\\n)*.*)$", re.MULTILINE)


def commands_of(text: str) -> list[list[str]]:
    """The arguments of the commands that name a class of one's own."""
    found = [command.replace("\\\n", " ").split() for command in COMMAND.findall(text)]
    return [arguments for arguments in found if any(word.startswith("my_code.") for word in arguments)]


@pytest.mark.parametrize(
    ("page", "place"), [("README.md", 0), ("docs/extending.md", 0), ("docs/extending.md", 1), ("docs/extending.md", 2)]
)
def test_a_documented_class_trains_by_the_command_beside_it(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, page: str, place: int
) -> None:
    monkeypatch.setitem(sys.modules, "my_code", None)
    del sys.modules["my_code"]  # that of another page; and this one's is gone after the test
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = [block for block in blocks if re.search(r"\((EntropyRegularizer|PolicyLossMethod)\):", block)]
    (workspace / "my_code.py").write_text("\n".join(code))
    arguments = commands_of(text)[place]
    main(["fit", "--config", "tiny.yaml", *arguments, "--trainer.max_epochs", "1"])
    assert f"class_path: {arguments[1]}" in (workspace / "run" / "config.yaml").read_text()


def test_every_documented_command_is_tried() -> None:
    found = {page: len(commands_of((ROOT / page).read_text())) for page in ("README.md", "docs/extending.md")}
    assert found == {"README.md": 1, "docs/extending.md": 3}
