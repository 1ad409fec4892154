"""The callback InformationPlane: its curves, on one rank and on two, and a training that it does not change."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from helpers.forked import fork_engines
from helpers.processes import logs, run_ranks
from helpers.rollouts import make_rollout, share_of
from helpers.run_comparison import curves, differences
from helpers.runs import CHECKPOINTS, refusal, same, weights
from helpers.updates import begin_step, dapo, micro_loss, ppo, sgd, token_stats
from ibro_lightning.callbacks import InformationPlane
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.regularizers import (
    IBRO,
    EntropyBonus,
    EntropyRegularizer,
    InformationBottleneck,
    NoRegularizer,
)
from ibro_lightning.regularizers.base import StepContext
from ibro_lightning.regularizers.hindsight import HindsightTemplate
from ibro_lightning.types import Prompt
from ibro_lightning.update import PlainLoop, TokenBudget, Updater
from ibro_lightning.update.gradient_share import regularizer_share
from ibro_lightning.update.loss import weighted_sum
from ibro_lightning.update.token_statistics import answer_parts, ending_parts, entropy_parts, some_groups

ON = ["--information_plane.every_n_iterations", "1", "--information_plane.responses", "8"]
OFF = ["--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
SHOWN = ["--information_plane.template", "{prompt}{answer}>{prompt}"]
PPO = """
model:
  class_path: PPOModule
  init_args: {critic_optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}, mini_batch_prompts: 6}
data: {init_args: {prompts_per_rollout: 12, group_size: 1, dynamic_sampling: null}}
"""
EVERY = {
    *("conditional_entropy", "conditional_entropy_per_token", "conditional_entropy_error", "joint_entropy"),
    *("marginal_entropy", "marginal_entropy_error", "marginal_entropy_drift"),
    *("mutual_information", "mutual_information_error", "mutual_information_upper", "mutual_information_ceiling"),
    *("entropy_positive_advantage", "entropy_negative_advantage", "regularizer_gradient_share"),
    *(f"entropy_{name}_quarter" for name in ("first", "second", "third", "last")),
    *("entropy_given_answer", "corr_advantage_entropy_given_answer", "corr_advantage_lambda", "answer_information"),
}


def run(folder: str, *argv: str) -> dict[str, list[tuple[int, float]]]:
    main(["fit", "--config", "tiny.yaml", *OFF, "--trainer.default_root_dir", folder, *argv])
    return curves(Path(folder))


def of_plane(found: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("information/"): v for name, v in found.items() if name.startswith("information/")}


@pytest.mark.parametrize("algorithm", ["DAPO", "PPO", "overlap"])
def test_training_is_the_same_bit_for_bit_and_every_curve_is_there(
    algorithm: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace / "ppo.yaml").write_text(PPO)
    settings = {"DAPO": [], "PPO": ["--config", "ppo.yaml"], "overlap": ["--data.max_staleness", "1"]}[algorithm]
    if algorithm == "overlap":
        fork_engines(monkeypatch)
    without, found = run("without", *settings), run("with", *settings, *ON, *SHOWN)
    assert same(weights("without"), weights("with"))
    measured = of_plane(found)
    assert {name: v for name, v in found.items() if name.removeprefix("information/") not in measured} == without
    assert measured.keys() >= EVERY
    assert all([step for step, _ in measured[name]] == [1, 2] for name in EVERY)
    assert all(math.isfinite(value) for points in measured.values() for _, value in points)
    for _, value in measured["mutual_information"]:
        assert value <= measured["mutual_information_ceiling"][0][1] + 1e-6
    parts = (dict(measured[name]) for name in ("marginal_entropy", "conditional_entropy", "mutual_information"))
    total, given, information = parts
    assert all(total[n] == pytest.approx(given[n] + information[n], abs=1e-5) for n in (1, 2))
    assert measured["marginal_entropy_drift"][0][1] == 0.0
    assert measured["marginal_entropy_drift"][1][1] == pytest.approx(total[2] - total[1], abs=1e-5)
    states = torch.load(Path("without") / CHECKPOINTS.name / "last.ckpt", weights_only=True)["callbacks"]
    assert any("InformationPlane" in name for name in states)


def test_a_resumed_run_has_the_same_curves_bit_for_bit(workspace: Path) -> None:
    four = [*ON, "--information_plane.every_n_iterations", "3", "--trainer.max_epochs", "4"]
    run("whole", *four)
    run("parts", *four, "--trainer.max_epochs", "2")
    (Path("parts") / "config.yaml").unlink()
    found = run("parts", *four, "--ckpt_path", "last")
    assert [step for step, _ in found["information/marginal_entropy_drift"]] == [1, 4]
    wrong = [line for line in differences(Path("whole"), Path("parts")) if "curve" in line or "safetensors" in line]
    assert not wrong


def test_it_costs_nothing_unless_it_is_asked_for(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the setting it never looks at a rollout; and a plain Trainer's has a period."""

    def looks(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(InformationPlane, "plane", looks)
    monkeypatch.setattr(InformationPlane, "tokens", looks)
    assert not of_plane(run("without", "--trainer.max_epochs", "1"))
    assert InformationPlane().every_n_iterations == 10


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "every": ({"every_n_iterations": -1}, "every_n_iterations: -1 - write 0 or more"),
    "prompts": ({"prompts": 1}, "prompts: 1 - write 2 or more"),
    "responses": ({"responses": 0}, "responses: 0 - write 1 or more"),
    "template": ({"template": "{prompt}"}, "template: {prompt} - must contain {prompt}, and {answer}"),
    "share": ({"gradient_share": 1}, "gradient_share: 1 - write true or false"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused(case: str) -> None:
    settings, line = WRONG[case]
    with pytest.raises(ConfigError) as refused:
        InformationPlane(**settings)
    assert line in str(refused.value).replace("'", "")


def test_a_module_without_rollouts_gets_a_warning(tmp_path: Path) -> None:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", callbacks=[InformationPlane()], max_epochs=0, **off)
    with pytest.warns(UserWarning, match="InformationPlane does nothing: it needs a module with scorer, updater"):
        trainer.fit(BoringModel())


def test_a_template_that_the_tokenizer_cannot_write_is_named(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--information_plane.template", "{prompt} The answer is {answer}."]
    line = refusal(["fit", "--config", "tiny.yaml", *OFF, *ON, *words], capsys)
    assert line.startswith("error: information_plane.template: ")
    assert "use only words that the model knows" in line


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_ranks_measure_what_one_does_and_train_the_same(strategy: str, workspace: Path) -> None:
    argv = ["fit", "--config", "tiny.yaml", *OFF, "--trainer.devices", "2", "--trainer.strategy", strategy]
    argv += ["--rollout_log.every_n_iterations", "0", "--samples.every_n_iterations", "0"]
    for folder, settings in (("without", []), ("with", [*ON, *SHOWN])):
        codes = run_ranks(2, main, [*argv, "--trainer.default_root_dir", folder, *settings], folder=workspace)
        assert codes == [0, 0], logs(workspace)
    assert same(weights("without"), weights("with"))
    alone, found = of_plane(run("alone", *ON, *SHOWN)), of_plane(curves(Path("with")))
    assert found.keys() == alone.keys()
    for name, points in alone.items():
        for (step, value), (_, other) in zip(points, found[name], strict=True):
            assert other == pytest.approx(value, rel=2e-3, abs=2e-3), (name, step)  # weights differ by rounding in 2


def context(module: Any, ranks: Ranks = ALONE) -> StepContext:
    return StepContext(module.policy, module.scorer.score, ranks=ranks)


def updater_of(module: Any, tokens: int = 10_000) -> Updater:
    return Updater(PlainLoop({"policy": module.policy}, []), TokenBudget(tokens))


class TestGradientShare:
    @pytest.mark.parametrize("make", [dapo, ppo], ids=["DAPO", "PPO"])
    @pytest.mark.parametrize("tokens", [10_000, 12], ids=["at once", "in micro-batches"])
    def test_it_is_the_ratio_of_the_norms_that_autograd_gives(self, make: Any, tokens: int) -> None:
        module = make(regularizer=InformationBottleneck(0.3), optimizer=sgd)
        experience = module.prepare(make_rollout(iteration=1))
        step = begin_step(module, experience)
        parameters = [p for p in module.policy.parameters() if p.requires_grad]

        def norm(value: Tensor) -> float:
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            return math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))

        micro = step.micro_batch()
        objective = module.policy_loss.regularizer.objective(token_stats(module, micro))
        known = norm(0.3 * weighted_sum(objective, micro)) / norm(micro_loss(module, micro)[0])
        found = regularizer_share(updater_of(module, tokens), experience, module.policy_loss, context(module))
        assert found == pytest.approx(known, rel=1e-9)
        assert all(parameter.grad is None for parameter in module.policy.parameters())

    @pytest.mark.parametrize("regularizer", [NoRegularizer(), EntropyBonus(0.0)])
    def test_without_a_term_there_is_none(self, regularizer: EntropyRegularizer) -> None:
        module = dapo(regularizer=regularizer)
        experience = module.prepare(make_rollout(iteration=1))
        assert regularizer_share(updater_of(module), experience, module.policy_loss, context(module)) is None

    def test_a_loss_that_is_the_term_alone_has_all_of_it(self) -> None:
        module = dapo(regularizer=EntropyBonus(0.1))
        experience = module.prepare(make_rollout(iteration=1))
        flat = replace(experience, advantages=torch.zeros_like(experience.advantages))
        found = regularizer_share(updater_of(module), flat, module.policy_loss, context(module))
        assert found == pytest.approx(1.0, rel=1e-12)


class TestTokens:
    def test_groups_are_whole_and_ranks_choose_the_same(self) -> None:
        module, rollout = dapo(), make_rollout(iteration=1)
        whole = some_groups(module.scorer(rollout), rollout, 100)
        assert len(whole) == len(rollout)
        some = some_groups(module.scorer(rollout), rollout, 4)
        chosen = sorted(some.groups.unique().tolist())
        assert len(chosen) == 2
        assert len(some) == sum((rollout.groups == group).sum().item() for group in chosen)

        class Four(Ranks):
            def sum(self, value: Tensor) -> Tensor:
                return torch.full_like(value, len(rollout))

        parts = [share_of(rollout, numbers) for numbers in ([0], [1], [2], [3])]
        own = [some_groups(module.scorer(part), part, 4, Four(0, 4)) for part in parts]
        counting = [part.groups[part.row_sums(part.mask) > 0].unique().tolist() for part in own]
        assert sorted(number for numbers in counting for number in numbers) == chosen
        nothing = share_of(rollout, [])
        assert not some_groups(module.scorer(nothing), nothing, 100, Four(0, 4)).mask.any()

    def test_entropies_by_advantage_and_position_as_counted_by_hand(self) -> None:
        module = dapo()
        rollout = make_rollout(iteration=1)
        experience = module.prepare(rollout)
        entropy = torch.arange(len(experience.mask), dtype=torch.float64)
        found = entropy_parts(experience, entropy)
        rows: list[tuple[float, float, int]] = []
        for advantage, length in zip(
            experience.advantages.split(experience.lengths.tolist()), experience.lengths.tolist(), strict=True
        ):
            rows += [(advantage[t].item(), float(len(rows) + t), 4 * t // length) for t in range(length)]
        for name, sign in (("positive", 1), ("negative", -1)):
            values = [h for a, h, _ in rows if a * sign > 0]
            assert found[f"entropy_{name}_advantage"] == pytest.approx(sum(values) / len(values))
        for number, name in enumerate(("first", "second", "third", "last")):
            values = [h for _, h, part in rows if part == number]
            assert found[f"entropy_{name}_quarter"] == pytest.approx(sum(values) / len(values))
        flat = replace(experience, advantages=torch.zeros_like(experience.advantages))
        assert not {name for name in entropy_parts(flat, entropy) if name.endswith("advantage")}

    def test_an_answer_that_leaves_half_of_the_tokens_says_log_two_per_token(self) -> None:
        """Uniform over 8 tokens, and over 4 with the answer shown: Σ H − Hᵃ = T log 2; λ is 2·(2/3) − 1 everywhere,
        and does not vary."""
        module = dapo()
        rollout = make_rollout(iteration=1)
        step = replace(module.prepare(rollout), prompts=answered(rollout.prompts))
        entropy = torch.full_like(step.advantages, math.log(8))
        found = answer_parts(step, entropy, SHOW, told(lambda count: torch.full((count,), math.log(4))))
        assert found["entropy_given_answer"] == pytest.approx(math.log(4))
        assert found["answer_information"] == pytest.approx(step.lengths.double().mean().item() * math.log(2), rel=1e-6)
        assert math.isnan(found["corr_advantage_lambda"])
        assert math.isnan(found["corr_advantage_entropy_given_answer"])

    def test_ib_s_weight_in_place_of_ibro_s_gives_a_correlation_of_minus_one(self) -> None:
        """Where λ_t = −c·A_t, as IB regularisation has it: Hᵃ = H·(1 − c·A)/2."""
        module = dapo()
        rollout = make_rollout(iteration=1)
        step = replace(module.prepare(rollout), prompts=answered(rollout.prompts))
        entropy = torch.rand(len(step.mask), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
        given = entropy * (1 - 0.3 * step.advantages) / 2
        found = answer_parts(step, entropy, SHOW, told(lambda count: given))
        assert found["corr_advantage_lambda"] == pytest.approx(-1.0, abs=1e-9)
        assert -1.0 < found["corr_advantage_entropy_given_answer"] < -0.2

    def test_endings_leave_out_what_a_deadline_cut(self) -> None:
        """Responses of 2, 6, 1, 5, 3, 4, 4 and 2 tokens, of at most 6: quarters of 2, 1, 2 and 1 positions."""
        found = ending_parts(make_rollout(iteration=1))
        rollout = make_rollout(iteration=1)
        lengths = [len(completion.token_ids) for completion in rollout.completions]
        for number, name in enumerate(("first", "second", "third", "last")):
            tokens = sum(4 * t // 6 == number for length in lengths for t in range(length))
            ends = sum(4 * (length - 1) // 6 == number for length in lengths)
            assert found[f"eos_{name}_quarter"] == pytest.approx(ends / tokens)


SHOW = HindsightTemplate("{prompt}{answer}")


class Letters:
    """A tokenizer of characters."""

    all_special_tokens: tuple[str, ...] = ()
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(map(chr, ids))


def answered(prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
    return tuple(replace(prompt, text="", content="", answer=7) for prompt in prompts)


def told(entropies: Any) -> StepContext:
    """A context whose policy has these entropies after the prompts that show the answer."""

    def score(sequences: Any, temperature: float) -> tuple[Tensor, Tensor]:
        count = len(sequences.responses)
        return torch.zeros(count), entropies(count).double()

    return StepContext(lambda *_, **__: (torch.zeros(0), None), score, Letters())


def test_ibro_s_own_template_is_taken() -> None:
    regularizer = IBRO(0.1, template="{prompt}{answer}")
    assert isinstance(regularizer.hindsight, HindsightTemplate)
    assert InformationPlane().hindsight is None
