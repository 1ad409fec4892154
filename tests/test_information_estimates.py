"""The estimators of the information plane, on policies whose information is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.rollouts import make_rollout
from ibro_lightning.batches import FlatSequences, Rollout
from ibro_lightning.batches.cross_prompts import Probe, surprise
from ibro_lightning.batches.ragged import row_sums
from ibro_lightning.functional import information_plane
from ibro_lightning.ranks import Ranks
from ibro_lightning.types import Completion, Group, Prompt, RewardResult


def binary_entropy(error: float) -> float:
    return -error * math.log(error) - (1 - error) * math.log(1 - error)


def channel(prompts: int, error: float) -> Tensor:
    """``[q, r]`` log π(r|q): r is q, or with ``error`` one of the others, each as likely as another."""
    table = torch.full((prompts, prompts), error / (prompts - 1), dtype=torch.float64)
    return table.fill_diagonal_(1 - error).log()


def draws(table: Tensor, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """``[M]`` a response to each of the prompts."""
    return torch.multinomial(table[prompts].exp(), 1, generator=generator).squeeze(-1)


def points(table: Tensor, size: int, count: int) -> dict[str, Tensor]:
    """``[count]`` of each estimate, from ``size`` of the table's prompts at a time."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Tensor]] = {}
    for _ in range(count):
        prompts = torch.randperm(len(table), generator=generator)[:size]
        responses = draws(table, prompts, generator)
        point = information_plane(table[prompts][:, responses].T)
        for name in point.__dataclass_fields__:
            found.setdefault(name, []).append(getattr(point, name))
    return {name: torch.stack(values) for name, values in found.items()}


def assert_mean(values: Tensor, expected: float, most: float) -> None:
    """The mean is within four of its standard errors, and these are at most ``most``: what the test can tell apart."""
    error = values.std().item() / math.sqrt(len(values))
    assert error <= most
    assert abs(values.mean().item() - expected) <= 4 * error


class TestClosedForms:
    def test_responses_that_do_not_depend_on_the_prompt_say_nothing(self) -> None:
        nats = torch.tensor([-1.5, -0.2, -30.0, -800.0])  # of four responses, under any prompt
        point = information_plane(nats[:, None].expand(4, 4))
        assert point.mutual_information.item() == pytest.approx(0.0, abs=1e-12)
        assert point.mutual_information_upper.item() == pytest.approx(0.0, abs=1e-12)
        assert point.mutual_information_error.item() == pytest.approx(0.0, abs=1e-12)
        assert point.marginal_entropy.item() == pytest.approx(831.7 / 4)
        assert point.conditional_entropy.item() == pytest.approx(831.7 / 4)

    def test_an_answer_of_its_own_to_every_prompt_says_which_it_was(self) -> None:
        sure = torch.full((5, 5), -torch.inf).fill_diagonal_(0.0)
        point = information_plane(sure)
        for value in (point.mutual_information, point.marginal_entropy, point.joint_entropy):
            assert value.item() == pytest.approx(math.log(5), abs=1e-12)
        assert point.mutual_information_ceiling.item() == pytest.approx(math.log(5))
        assert point.conditional_entropy.item() == 0.0
        assert point.mutual_information_upper.item() == math.inf

    def test_an_answer_that_two_prompts_share_says_which_pair_it_was(self) -> None:
        same = torch.arange(8) // 2
        cross = torch.where(same[:, None] == same, 0.0, -torch.inf)
        point = information_plane(cross)
        assert point.mutual_information.item() == pytest.approx(math.log(4), abs=1e-12)
        assert point.mutual_information_upper.item() == pytest.approx(math.log(7), abs=1e-12)

    @pytest.mark.parametrize("error", [0.05, 0.3, 0.75])
    def test_a_noisy_channel(self, error: float) -> None:
        """All of the prompts at once: no bias. 0.75 of four prompts is no information at all."""
        size, known = 4, binary_entropy(error) + error * math.log(3)
        found = points(channel(size, error), size, 1000)
        assert_mean(found["conditional_entropy"], known, 0.02)
        assert_mean(found["joint_entropy"], math.log(size) + known, 0.02)
        if error < 0.75:
            assert_mean(found["mutual_information"], math.log(size) - known, 0.02)
        else:
            assert found["mutual_information"].abs().max() < 1e-12
        assert (found["marginal_entropy"] - math.log(size)).abs().max() < 1e-12  # all responses are alike
        assert found["mutual_information"].max() <= math.log(size) + 1e-12

    def test_some_of_the_prompts_give_a_bound_from_below_and_one_from_above(self) -> None:
        """Of 32 prompts, eight at a time. The bounds' expectations are written out."""
        error, size, some = 0.2, 32, 8
        known = math.log(size) - binary_entropy(error) - error * math.log(size - 1)
        found = points(channel(size, error), some, 1000)
        right, wrong = math.log(1 - error), math.log(error / (size - 1))
        others = (some - 1) / (size - 1) * error  # a wrong response names another one of the eight
        alike, one = wrong, math.log(((some - 1) * math.exp(wrong) + math.exp(right)) / some)
        last = math.log(((some - 2) * math.exp(wrong) + math.exp(right)) / (some - 1))
        below = (1 - error) * (right - one) + others * (wrong - one)
        above = (1 - error) * (right - alike) + others * (wrong - last)
        assert below < known < above
        assert_mean(found["mutual_information"], below, 0.02)
        assert_mean(found["mutual_information_upper"], above, 0.03)

    def test_stated_errors_are_those_of_repeated_measurements(self) -> None:
        """To a tenth: the spread of 800 measurements has an error of 2.5 %."""
        found = points(channel(32, 0.3), 32, 800)
        for name in ("conditional_entropy", "mutual_information"):
            stated = found[f"{name}_error"].square().mean().sqrt().item()
            assert stated == pytest.approx(found[name].std().item(), rel=0.1)

    def test_more_responses_than_the_probe_has_are_taken_for_the_conditional_entropy(self) -> None:
        sure = torch.full((2, 2), -torch.inf).fill_diagonal_(-1.0)
        point = information_plane(sure, torch.tensor([1.0, 2.0, 6.0]))
        assert point.conditional_entropy.item() == 3.0
        assert point.conditional_entropy_error.item() == pytest.approx(math.sqrt(7 / 3))
        assert point.marginal_entropy.item() == pytest.approx(3.0 + math.log(2))
        assert point.marginal_entropy_error.item() == pytest.approx(math.sqrt(7 / 3))

    @pytest.mark.parametrize("shape", [(2, 3), (1, 1), (4,)])
    def test_other_shapes_are_refused(self, shape: Sequence[int]) -> None:
        with pytest.raises(ValueError, match="of at least two prompts; got"):
            information_plane(torch.zeros(*shape))


EOS = 99


def table_score(table: Tensor) -> Any:
    """The scorer of a policy that answers by a first token as ``table [q, r]`` says, a second one that is 0 or 1 with
    half a chance each, and EOS."""

    def score(sequences: FlatSequences, temperature: float, with_entropy: bool = True) -> tuple[Tensor, Tensor]:
        assert temperature == 0.7
        assert not with_entropy
        prompts = sequences.prompts.long()
        assert (sequences.prompt_lengths == 1).all()
        first = sequences.responses.long().reshape(-1, 3)[:, 0]
        nats = torch.stack([table[prompts, first], torch.full((len(first),), -math.log(2)), torch.zeros(len(first))], 1)
        return nats.flatten().float(), torch.zeros(len(first) * 3)

    return score


def group(prompt: Sequence[int], *responses: Sequence[int], logp: float | None = -0.5, reason: Any = "stop") -> Group:
    completions = tuple(
        Completion(tokens, () if logp is None else [logp] * len(tokens), reason, "", 8, seed=0) for tokens in responses
    )
    return Group(Prompt(str(prompt), "", tuple(prompt), None), completions, (RewardResult(0.0, {}),) * len(responses))


def rollout_of(groups: Sequence[Group], dropped: Sequence[Group] = (), **others: Any) -> Rollout:
    settings = {"name": "train", "iteration": 3, "temperature": 0.7, **others}
    return Rollout.from_groups(groups, dropped=tuple(dropped), **settings)


class FakeRanks(Ranks):
    """One of several ranks whose parts are known beforehand."""

    def gather(self, item: Any) -> list[Any]:
        return [*self.data[: self.rank], item, *self.data[self.rank + 1 :]]

    def sum(self, value: Tensor) -> Tensor:
        return value


class TestProbe:
    def test_the_policy_of_a_table_is_placed_where_the_table_is(self) -> None:
        """The second token adds log 2 to both entropies, and nothing to what responses say of prompts."""
        table, found = channel(6, 0.25), []
        generator = torch.Generator().manual_seed(1)
        for _ in range(200):
            responses = [[int(first), 1, EOS] for first in draws(table, torch.arange(6), generator)]
            probe = Probe([[q] for q in range(6)], responses)
            found.append(information_plane(probe.cross_logp(table_score(table), 0.7, torch.device("cpu"))))
        known = binary_entropy(0.25) + 0.25 * math.log(5)
        assert_mean(torch.stack([p.mutual_information for p in found]), math.log(6) - known, 0.04)
        assert_mean(torch.stack([p.conditional_entropy for p in found]), known + math.log(2), 0.04)
        assert all(p.marginal_entropy.item() == pytest.approx(math.log(12), abs=1e-6) for p in found)

    def test_ranks_add_up_to_the_matrix_of_one_process(self) -> None:
        table, cpu = channel(3, 0.4), torch.device("cpu")
        probe = Probe([[0], [1], [2]], [[2, 0, EOS], [1, 0, EOS], [0, 1, EOS]])
        whole = probe.cross_logp(table_score(table), 0.7, cpu)
        parts = [probe.cross_logp(table_score(table), 0.7, cpu, FakeRanks(rank, 5)) for rank in range(5)]
        assert torch.equal(sum(parts), whole)
        assert not parts[4].any()  # more ranks than prompts
        assert whole[0, 1].item() == pytest.approx(math.log(0.2) - math.log(2))
        assert whole[1, 1].item() == pytest.approx(math.log(0.6) - math.log(2))

    def test_prompts_are_different_and_any_that_was_sampled_may_be_chosen(self) -> None:
        groups = [group([1, 2], [5, 0], [6, 0]), group([3], [7, 0]), group([1, 2], [8, 0])]
        rollout = rollout_of(groups, [group([4], [9, 9, 0])])
        probe = Probe.of(rollout, 16)
        assert sorted(zip(probe.prompts, probe.responses, strict=True)) == [
            ([1, 2], [5, 0]),
            ([3], [7, 0]),
            ([4], [9, 9, 0]),
        ]
        chosen = {tuple(map(tuple, Probe.of(replace(rollout, iteration=n), 2).prompts)) for n in range(40)}
        assert len({frozenset(pair) for pair in chosen}) == 3, "each pair in some iteration"

    def test_what_a_deadline_cut_is_passed_over_and_one_prompt_is_no_probe(self) -> None:
        late = group([1], [5, 5], reason="deadline")
        assert Probe.of(rollout_of([late, group([2], [6, 0])]), 16) is None
        assert len(Probe.of(rollout_of([late, group([2], [6, 0]), group([3], [])]), 16) or ()) == 0

    def test_the_choice_does_not_depend_on_the_ranks(self) -> None:
        groups = [group([n], [n, 0]) for n in range(1, 12)]
        alone = Probe.of(rollout_of(groups), 4)
        shares = [rollout_of(groups[::2]), rollout_of(groups[1::2])]
        gathered: list[Any] = []

        class Listening(FakeRanks):
            def gather(self, item: Any) -> list[Any]:
                gathered.append(item)
                return super().gather(item)

        for rank in range(2):
            Probe.of(shares[rank], 4, Listening(rank, 2, [{}, {}]))
        assert [Probe.of(shares[rank], 4, FakeRanks(rank, 2, gathered)) for rank in range(2)] == [alone, alone]

    def test_surprise_is_the_mean_of_each_prompts_responses(self) -> None:
        late = replace(group([9], [1], reason="deadline").completions[0], logp=(-40.0,))
        mixed = group([1], [5, 0], [6, 7, 8, 0])
        mixed = replace(mixed, completions=(*mixed.completions, late), results=mixed.results * 2)
        mixed = replace(mixed, results=mixed.results[:3])
        nats, tokens = surprise(rollout_of([mixed, group([2], [5, 5, 0], logp=-1.0)], [group([3], [0], logp=-0.25)]))
        assert nats.tolist() == [1.5, 3.0, 0.25]
        assert tokens.tolist() == [3.0, 3.0, 1.0]

    def test_without_log_probs_nothing_is_known_of_the_surprise(self) -> None:
        assert surprise(rollout_of([group([1], [5]), group([2], [5], logp=None)])) is None
        assert surprise(rollout_of([group([1], [5]), group([2], [5], logp=math.nan)])) is None
        fine = rollout_of([group([1], [5]), group([2], [6])])
        assert surprise(fine, FakeRanks(0, 2, [None, (False, [])])) is None
        nats, _ = surprise(fine, FakeRanks(0, 2, [None, (True, [(2.0, 1.0)])]))
        assert nats.tolist() == [0.5, 0.5, 2.0]


def test_helper_rollouts_have_what_the_probe_reads() -> None:
    """A rollout as modules get it: its own log-probs, row by row."""
    rollout = make_rollout(iteration=1)
    nats, tokens = surprise(rollout)
    sums = -row_sums(rollout.sampler_logp.double(), rollout.sequences.response_lengths)
    means = [sums[rollout.groups == number].mean().item() for number in rollout.groups.unique_consecutive().tolist()]
    assert nats.tolist() == pytest.approx(means)
    assert tokens.sum().item() == pytest.approx(
        sum(rollout.sequences.response_lengths[rollout.groups == n].double().mean().item() for n in range(4))
    )
