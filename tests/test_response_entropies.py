"""Statistics of tokens: entropies by advantage, position and answer, endings, and the regulariser's share of the
gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.rollouts import make_rollout, share_of
from helpers.updates import begin_step, dapo, micro_loss, ppo, sgd, token_stats
from ibro_lightning.functional import ending_rates, masked_correlation, quarter
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.regularizers import EntropyBonus, EntropyRegularizer, InformationBottleneck, NoRegularizer
from ibro_lightning.regularizers.base import StepContext
from ibro_lightning.regularizers.hindsight import HindsightTemplate
from ibro_lightning.types import Prompt
from ibro_lightning.update import PlainLoop, TokenBudget, Updater
from ibro_lightning.update.gradient_share import regularizer_share
from ibro_lightning.update.loss import weighted_sum
from ibro_lightning.update.response_entropies import answer_parts, ending_parts, entropy_parts, some_groups


class TestPositions:
    def test_quarters(self) -> None:
        assert quarter(torch.arange(8), torch.tensor(8)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert quarter(torch.arange(6), torch.tensor(6)).tolist() == [0, 0, 1, 2, 2, 3]
        assert quarter(torch.arange(2), torch.tensor(2)).tolist() == [0, 2]

    def test_endings_by_quarter_of_the_limit_count_as_the_tokens_are_counted_one_by_one(self) -> None:
        generator = torch.Generator().manual_seed(0)
        limits = torch.randint(1, 40, (500,), generator=generator)
        lengths = (torch.rand(500, generator=generator) * limits).long() + 1
        ended = torch.rand(500, generator=generator) < 0.7
        endings, tokens = [0] * 4, [0] * 4
        for length, limit, end in zip(lengths.tolist(), limits.tolist(), ended.tolist(), strict=True):
            for position in range(length):
                place = 4 * position // limit
                tokens[place] += 1
                endings[place] += end and position == length - 1
        found = ending_rates(lengths, ended, limits)
        assert [part.tolist() for part in found] == [endings, tokens]

    def test_the_rate_of_endings_is_the_chance_of_eos(self) -> None:
        """Responses that end with 0.1 at each token, of at most 16: four standard errors of a rate, at most 0.01."""
        chance, limit = 0.1, 16
        generator = torch.Generator().manual_seed(0)
        ends = torch.rand(20000, limit, generator=generator) < chance
        ended = ends.any(dim=1)
        lengths = torch.where(ended, ends.int().argmax(dim=1) + 1, limit)
        endings, tokens = ending_rates(lengths, ended, torch.full_like(lengths, limit))
        for count, total in zip(endings.tolist(), tokens.tolist(), strict=True):
            error = math.sqrt(chance * (1 - chance) / total)
            assert 4 * error < 0.01
            assert abs(count / total - chance) < 4 * error


class TestCorrelation:
    def test_as_numpy_has_it(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x, noise = torch.randn(2, 200, generator=generator).unbind()
        mask = torch.rand(200, generator=generator) < 0.6
        y = torch.where(mask, 3.0 - 2.0 * x + noise, torch.nan)
        known = np.corrcoef(x[mask].double(), y[mask].double())[0, 1]
        assert masked_correlation(x, y, mask).item() == pytest.approx(known, rel=1e-12)

    def test_what_does_not_vary_has_none(self) -> None:
        x, mask = torch.tensor([0.1, 0.1, 0.1, 7.0]), torch.tensor([True, True, True, False])
        assert masked_correlation(x, torch.tensor([1.0, 2.0, 3.0, 4.0]), mask).isnan()
        assert masked_correlation(x, x, torch.zeros(4, dtype=torch.bool)).isnan()

    def test_it_is_one_of_a_line(self) -> None:
        x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
        mask = torch.ones(3, dtype=torch.bool)
        assert masked_correlation(x, -3 * x + 1, mask).item() == pytest.approx(-1.0, abs=1e-15)


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
