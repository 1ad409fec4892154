"""Curricula: a prompt's turn is used or passed over by how often it has been answered right so far."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.collecting import Paths, ScriptedEngine, build, through_a_file, trainer_of
from helpers.run_comparison import unequal
from helpers.runs import QUICK, curve, refusal
from ibro_lightning.cli.main import main
from ibro_lightning.datamodules import DynamicSampling, RolloutDataModule
from ibro_lightning.datamodules.dynamic_sampling import SampledGroups
from ibro_lightning.datamodules.producer import Progress
from ibro_lightning.errors import ConfigError
from ibro_lightning.ranks import ALONE
from ibro_lightning.seeding import counter_uniforms, derive_seed
from ibro_lightning.sources import Curriculum, DifficultyPools, MixturePart, MixtureSource, PassRates, PromptCursor
from ibro_lightning.sources.admission import AdmittedDraws, Draws, draws_of
from ibro_lightning.types import Completion, Generation, Group, Prompt, RewardResult

torch.set_num_threads(1)
F64 = torch.float64
DIGEST = PromptCursor([Prompt(str(i), str(i), (i,), None) for i in range(6)], 0).digest


@pytest.fixture(autouse=True)
def _run_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")


def cursor(count: int = 6, position: int = 0) -> PromptCursor:
    made = PromptCursor([Prompt(str(i), str(i), (i,), None) for i in range(count)], 5)
    made.position = position
    return made


def seen(rates: list[float], attempts: list[int]) -> PassRates:
    return PassRates(DIGEST, torch.tensor(rates, dtype=F64), torch.tensor(attempts))


class Fixed(Curriculum):
    """Probabilities given beforehand."""

    def __init__(self, *chances: float) -> None:
        super().__init__(Paths(len(chances)))
        self.chances = chances

    def admission(self, seen: PassRates) -> torch.Tensor:
        return torch.tensor(self.chances, dtype=F64)


def difficulty(number: int) -> float:
    """The pass rate of the prompt with this number: a third each never, at times and always."""
    return (number % 3) / 2


class OfKnownDifficulty(ScriptedEngine):
    """Each response is right with the probability that belongs to its prompt, by its seed."""

    def generate(self, prompts: Any, sampling: Any, seeds: Any) -> list[list[Generation]]:
        super().generate(prompts, sampling, seeds)
        right, wrong = (tuple(self.tokenizer(text)["input_ids"]) for text in ("1!", "0!"))
        chances = [difficulty(number_of(self.tokenizer.decode(list(ids)))) for ids in prompts]
        draws = [counter_uniforms(torch.tensor(row), 0) for row in seeds]
        return [
            [Generation(right if draw < chance else wrong, (-0.5, -0.25), "stop") for draw in own.tolist()]
            for chance, own in zip(chances, draws, strict=True)
        ]


def number_of(text: str) -> int:
    return int(text.split(">")[1].rstrip(":"))


def learning(tokenizer: Any, curriculum: Curriculum, **settings: Any) -> RolloutDataModule:
    """A datamodule whose policy stays as it is, with overlap if ``max_staleness`` says so."""
    data = build(
        tokenizer,
        attach=False,
        **{"source": curriculum, "engine": OfKnownDifficulty(tokenizer), "group_size": 8, **settings},
    )
    if data.max_staleness:
        data.collector.engine = data.engine.engine  # scripted, in this process
    data.trainer = trainer_of(tokenizer)
    data.setup("fit")
    return data


class TestPassRates:
    def test_the_first_group_sets_the_rate_and_later_ones_move_it(self) -> None:
        before = PassRates.unseen(DIGEST, 3)
        once = before.told({0: [(0.75, 8)], 2: [(0.0, 8)]}, memory=0.8)
        twice = once.told({0: [(0.25, 8), (1.0, 4)]}, memory=0.8)
        assert once.rates.tolist() == [0.75, 0.0, 0.0]
        assert once.attempts.tolist() == [8, 0, 8]
        assert twice.rates.tolist() == pytest.approx([0.8 * (0.8 * 0.75 + 0.2 * 0.25) + 0.2 * 1.0, 0.0, 0.0])
        assert twice.attempts.tolist() == [20, 0, 8]
        assert before.attempts.tolist() == [0, 0, 0], "a rollout that fails begins again with what was known"

    def test_responses_without_a_verdict_of_their_own_are_left_out(self) -> None:
        def response(reason: Any) -> Completion:
            return Completion((1,), (0.0,), reason, "", 4, 0)

        def verdict(accuracy: float, timed_out: bool = False) -> RewardResult:
            return RewardResult(accuracy, {"accuracy": accuracy}, timed_out=timed_out)

        prompt = Prompt("0", "", (1,), None)
        four = tuple(map(response, ("stop", "length", "stop", "deadline")))
        results = (verdict(1.0), verdict(0.0), verdict(0.0, timed_out=True), verdict(0.0))
        late = Group(prompt, (response("deadline"),) * 2, (verdict(0.0),) * 2)
        sampled = SampledGroups()
        sampled.add({7: Group(prompt, four, results), 9: late}, ALONE, filtered=False)
        assert sampled.outcomes == {7: (0.5, 2), 9: (0.0, 0)}

    def test_a_prompt_without_judged_responses_stays_unseen(self) -> None:
        draws = AdmittedDraws(Fixed(*[1.0] * 6), cursor(), None, 5)
        (first, one), (second, _) = draws.draw(2)
        after = draws.seen_after({first: (0.5, 4), second: (0.0, 0)})
        assert after.attempts.sum() == 4
        assert after.rates[int(one.id)] == 0.5


class TestPools:
    def test_bounds_belong_to_the_easy_and_the_hard(self) -> None:
        known = seen([0.0, 0.0, 0.25, 0.5, 0.75, 1.0], [0, 4, 4, 4, 4, 4])
        curriculum = DifficultyPools(Paths(), low=0.25, high=0.75, hard_share=0.5, easy_share=0.125)
        pools = {name: pool.nonzero().flatten().tolist() for name, pool in curriculum.pools(known).items()}
        assert pools == {"unseen": [0], "hard": [1, 2], "normal": [3], "easy": [4, 5]}
        assert curriculum.admission(known).tolist() == [1.0, 0.5, 0.5, 1.0, 0.125, 0.125]

    @given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1), st.floats(0, 0.5), st.floats(0.51, 1))
    def test_each_prompt_is_in_one_pool(self, drawn: list[tuple[float, int]], low: float, high: float) -> None:
        rates, attempts = zip(*drawn, strict=True)
        pools = DifficultyPools(Paths(), low, high).pools(seen([*rates], [*attempts]))
        assert torch.stack([*pools.values()]).sum(dim=0).tolist() == [1] * len(rates)


class TestDraws:
    def test_without_a_curriculum_they_are_the_cursors(self) -> None:
        draws = draws_of(None, cursor(), None, 5)
        assert type(draws) is Draws
        assert draws.draw(4) + draws.draw(9) == cursor().draw(13)
        assert draws.metrics() == {}
        assert draws.seen_after({0: (1.0, 8)}) is None

    def test_where_all_are_admitted_too(self) -> None:
        draws = AdmittedDraws(Fixed(*[1.0] * 6), cursor(), None, 5)
        assert draws.draw(4) + draws.draw(9) == cursor().draw(13)
        assert draws.metrics() == {"curriculum/admitted": 1.0, "curriculum/forced": 0.0}

    @given(st.integers(0, 40), st.lists(st.integers(1, 7), min_size=1, max_size=4))
    def test_are_the_documented_function_of_seed_turn_and_probability(self, start: int, counts: list[int]) -> None:
        chances = (1.0, 0.5, 0.25, 0.75, 0.5, 1.0)
        stand = cursor(position=start)
        draws = AdmittedDraws(Fixed(*chances), stand, None, 5)
        drawn = [draw for count in counts for draw in draws.draw(count)]
        turns = cursor(position=start).draw(stand.position - start)
        expected = [
            (turn, prompt)
            for turn, prompt in turns
            if derive_seed(5, "admission", turn) / 2**63 < chances[int(prompt.id)]
        ]
        assert draws.metrics()["curriculum/forced"] == 0.0
        assert drawn == expected
        assert draws.metrics()["curriculum/admitted"] == len(drawn) / len(turns)

    def test_one_prompt_that_is_admitted_is_enough(self) -> None:
        draws = AdmittedDraws(Fixed(1.0, *[0.0] * 5), cursor(), None, 5)
        assert [prompt.id for _, prompt in draws.draw(9)] == ["0"] * 9
        assert draws.metrics()["curriculum/forced"] == 0.0

    def test_where_none_is_the_gate_opens_after_two_passes(self) -> None:
        draws = AdmittedDraws(Fixed(*[0.0] * 6), cursor(), None, 5)
        assert draws.draw(4) + draws.draw(3) == cursor().draw(16)[12:] + cursor().draw(31)[28:]
        assert draws.metrics() == {"curriculum/admitted": 7 / 31, "curriculum/forced": 1.0}

    def test_what_was_seen_of_other_prompts_is_forgotten(self) -> None:
        known = PassRates("of others", torch.ones(6, dtype=F64), torch.ones(6, dtype=torch.int64))
        assert AdmittedDraws(Fixed(*[1.0] * 6), cursor(), known, 5).seen.attempts.sum() == 0

    @pytest.mark.parametrize(
        ("returned", "value"),
        [
            (torch.ones(5), r"\[5\]"),
            (torch.full((6,), 1.5), "1.5"),
            (torch.full((6,), math.nan), "nan"),
            ([1.0] * 6, "list"),
        ],
    )
    def test_an_admission_that_is_none_is_refused(self, returned: Any, value: str) -> None:
        class Own(Curriculum):
            def admission(self, seen: PassRates) -> Any:
                return returned

        with pytest.raises(ConfigError, match=rf"^source: 'Own, {value}' - its admission must return .* 6 numbers"):
            AdmittedDraws(Own(Paths()), cursor(), None, 5)


class TestTraining:
    """On 36 prompts, of which 12 each are answered right never, at times and always."""

    def asked(self, data: RolloutDataModule, rollouts: int) -> list[list[int]]:
        engine = data.engine.engine if hasattr(data.engine, "engine") else data.engine
        before = len(engine.texts)
        asked = []
        for _ in range(rollouts):
            data.next_rollout()
            asked.append([number_of(text) for text in engine.texts[before:]])
            before = len(engine.texts)
        return asked

    def test_after_each_was_seen_once_those_in_the_wanted_range_are_asked(self, tokenizer: Any) -> None:
        source = DifficultyPools(Paths(36), low=0.0, high=1.0, hard_share=0.0, easy_share=0.0, memory=0.9)
        data = learning(tokenizer, source, prompts_per_rollout=6)
        first, later = self.asked(data, 6), self.asked(data, 8)
        assert sorted(number for rollout in first for number in rollout) == list(range(1, 37))
        assert {difficulty(number) for rollout in later for number in rollout} == {0.5}
        metrics = data.next_rollout().metrics
        assert metrics["curriculum/hard_prompts"] == metrics["curriculum/easy_prompts"] == 12
        assert (metrics["curriculum/hard_pass_rate"], metrics["curriculum/easy_pass_rate"]) == (0.0, 1.0)
        assert 0.3 < metrics["curriculum/normal_pass_rate"] < 0.7
        assert metrics["curriculum/normal_share"] == 1.0
        assert metrics["curriculum/unseen_prompts"] == metrics["curriculum/forced"] == 0.0
        assert "curriculum/unseen_pass_rate" not in metrics
        assert metrics["rollout/zero_variance_groups"] == 0.0

    def test_shares_of_the_turns_of_hard_and_easy_ones_are_used(self, tokenizer: Any) -> None:
        source = DifficultyPools(Paths(36), 0.0, 1.0, hard_share=0.5, easy_share=0.25, memory=0.9)
        data = learning(tokenizer, source, prompts_per_rollout=6)
        self.asked(data, 6)
        start = data.progress.position
        asked = Counter(difficulty(number) for rollout in self.asked(data, 100) for number in rollout)
        turns = (data.progress.position - start) / 3  # of each third
        assert abs(asked[0.5] - turns) <= 6
        for level, share in ((0.0, 0.5), (1.0, 0.25)):
            assert abs(asked[level] - share * turns) < 4 * math.sqrt(turns * share * (1 - share)), level

    def test_a_hard_prompt_that_the_policy_has_learned_comes_back(self, tokenizer: Any) -> None:
        """The script has all wrong at first, then all half right."""
        source = DifficultyPools(Paths(3), hard_share=0.5)
        data = build(tokenizer, [0] * 3 + [2] * 300, source=source)
        pools = [data.next_rollout().metrics for _ in range(12)]
        assert pools[1]["curriculum/hard_prompts"] == 3.0
        assert pools[-1]["curriculum/normal_prompts"] == 3.0

    def test_one_that_admits_all_is_training_without(self, tokenizer: Any) -> None:
        plain, gated = (
            build(tokenizer, [0, 1, 4] * 20, source=source, dynamic_sampling=DynamicSampling(2))
            for source in (Paths(), DifficultyPools(Paths(), hard_share=1.0, easy_share=1.0))
        )
        for _ in range(4):
            one, other = plain.next_rollout(), gated.next_rollout()
            assert one.completions == other.completions
            assert one.prompts == other.prompts
            own = {name for name in other.metrics if name.startswith("curriculum/")}
            assert one.metrics.keys() == other.metrics.keys() - own
            assert own
        assert plain.engine.calls == gated.engine.calls
        assert plain.state_dict().keys() == {"iteration", "position", "skips", "lost_rollouts", "prompts"}
        assert gated.state_dict().keys() - plain.state_dict().keys() == {"seen"}

    def test_refills_of_dynamic_sampling_count_with_the_groups_that_it_drops(self, tokenizer: Any) -> None:
        data = build(
            tokenizer, [0, 4, 2, 1, 0, 3], source=DifficultyPools(Paths(6)), dynamic_sampling=DynamicSampling(2)
        )
        data.next_rollout()
        known = data.progress.seen
        assert len(data.engine.calls) == 2
        order = [number_of(text) - 1 for text in data.engine.texts]
        assert known.rates[torch.tensor(order)].tolist() == [0.0, 1.0, 0.5, 0.25, 0.0, 0.75]
        assert known.attempts.tolist() == [4] * 6

    def test_a_rollout_that_fails_begins_again_with_the_same_prompts(self, tokenizer: Any) -> None:
        data = learning(tokenizer, DifficultyPools(Paths(36)), dynamic_sampling=DynamicSampling(3, "fill"))
        twin = learning(tokenizer, DifficultyPools(Paths(36)), dynamic_sampling=DynamicSampling(3, "fill"))
        self.asked(data, 5), self.asked(twin, 5)
        generate, calls = data.engine.generate, []

        def fail(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 2:
                raise RuntimeError("in the second round")
            return generate(*arguments)

        data.collector.engine.generate = fail
        with pytest.raises(RuntimeError, match="second round"):
            self.asked(data, 5)
        data.collector.engine.generate = generate
        while twin.iteration < data.iteration:
            twin.next_rollout()
        assert data.next_rollout().completions == twin.next_rollout().completions


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "refills": {"dynamic_sampling": DynamicSampling(3, "fill")},
    "overlap": {"max_staleness": 1},
    "both": {"dynamic_sampling": DynamicSampling(3, "fill"), "max_staleness": 1},
}


class TestResuming:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("before", [0, 2, 13])
    def test_continues_with_the_same_prompts(self, tokenizer: Any, rule: str, before: int) -> None:
        source = DifficultyPools(Paths(36), easy_share=0.3)
        straight, resumed = (learning(tokenizer, source, **RULES[rule]) for _ in range(2))
        for _ in range(before):
            straight.next_rollout()
        state = through_a_file(straight.state_dict())
        resumed.load_state_dict(state)
        assert unequal(through_a_file(resumed.state_dict()), state) == []
        for _ in range(6):
            one, other = straight.next_rollout(), resumed.next_rollout()
            assert one.prompts == other.prompts
            assert one.completions == other.completions
            names = {name for name in one.metrics if name.startswith("curriculum/")}
            assert {name: one.metrics[name] for name in names} == {name: other.metrics[name] for name in names}
            assert len(names) > 8
        straight._settle(), resumed._settle()
        assert unequal(through_a_file(straight.state_dict()), through_a_file(resumed.state_dict())) == []

    def test_overlap_asks_what_a_run_without_asks(self, tokenizer: Any) -> None:
        """The outcomes of a rollout are known when the next one begins, whatever the policy does meanwhile."""
        source = DifficultyPools(Paths(36))
        straight, overlapped = learning(tokenizer, source), learning(tokenizer, source, max_staleness=1)
        for _ in range(16):
            assert straight.next_rollout().completions == overlapped.next_rollout().completions
        overlapped._settle()

    def test_a_curriculum_may_come_and_go_where_that_is_allowed(self, tokenizer: Any) -> None:
        """With ``resume.allow_changes``; the prompts are the same."""
        gated = learning(tokenizer, DifficultyPools(Paths(36)))
        for _ in range(3):
            gated.next_rollout()
        plain = build(tokenizer, source=Paths(36))
        plain.load_state_dict(through_a_file(gated.state_dict()))
        plain.next_rollout()
        assert plain.progress.position > gated.progress.position
        assert "seen" not in plain.state_dict()
        gated.load_state_dict(through_a_file(plain.state_dict()))
        assert gated.progress.seen is None
        assert gated.next_rollout().metrics["curriculum/unseen_prompts"] == 36.0

    def test_states_of_before_there_were_curricula_load(self) -> None:
        assert Progress.of({"iteration": 3, "position": 9}) == Progress(3, 9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DifficultyPools(Paths(), high=0.0), r"^high: 0.0 - write a pass rate: a number above 0 and up to 1"),
        (lambda: DifficultyPools(Paths(), low=0.9), r"^low: 0.9 - write .* up to, not including, high \(0.9\)"),
        (lambda: DifficultyPools(Paths(), low=math.nan), "^low: nan - write a pass rate"),
        (lambda: DifficultyPools(Paths(), hard_share=1.1), r"^hard_share: 1.1 - write a number from 0 \(none\) to 1"),
        (lambda: DifficultyPools(Paths(), easy_share=-0.1), "^easy_share: -0.1 - write a number from 0"),
        (lambda: DifficultyPools(Paths(), memory=1.0), "^memory: 1.0 - write a number from 0 up to, not including, 1"),
        (lambda: DifficultyPools(DifficultyPools(Paths())), "^source: 'DifficultyPools' - curricula cannot be nested"),
        (
            lambda: MixtureSource({"a": MixturePart(DifficultyPools(Paths()))}),
            r"^parts\.a\.source: 'DifficultyPools' - a curriculum is around the mixture",
        ),
    ],
)
def test_wrong_settings_say_what_to_write(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_mixture_keeps_its_parts_and_weights() -> None:
    mixture = MixtureSource({"a": MixturePart(Paths(2), 3.0), "b": MixturePart(Paths(3))})
    curriculum = DifficultyPools(mixture)
    assert curriculum.weights == {"a": 0.75, "b": 0.25}
    assert [problem.id for problem in curriculum.problems()] == [problem.id for problem in mixture.problems()]
    assert [problem.part for problem in curriculum.first_problems(1)] == ["a", "b"]


OWN = """
from ibro_lightning.sources import Curriculum


class NeverAgainIfRight(Curriculum):
    def admission(self, seen):
        return (seen.rates < 1).double()
"""


class TestCommandLine:
    SOURCE = ("--data.source", "DifficultyPools", "--data.source.source", "user_code.Starts")

    def test_its_curves_are_logged_and_its_settings_are_keys_of_a_recipe(self, workspace: Path) -> None:
        main([*QUICK, *self.SOURCE, "--data.source.easy_share", "0", "--trainer.max_epochs", "4"])
        names = [f"curriculum/{pool}_prompts" for pool in ("unseen", "hard", "normal", "easy")]
        sizes = [[*curve(name).values()] for name in names]
        assert [sum(column) for column in zip(*sizes, strict=True)] == [10.0] * 4
        assert sizes[0][0] == 10.0
        assert sizes[0][-1] < 10.0
        assert len(curve("curriculum/admitted")) == 4

    def test_one_of_a_users_own(self, workspace: Path) -> None:
        (workspace / "own.py").write_text(OWN)
        main([*QUICK, "--data.source", "own.NeverAgainIfRight", "--data.source.source", "user_code.Starts"])
        assert len(curve("curriculum/admitted")) == 2

    def test_a_bad_setting_is_one_line(self, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
        line = refusal([*QUICK, *self.SOURCE, "--data.source.low", "0.95"], capsys)
        assert "data.source.low: 0.95 - write a pass rate" in line
