"""Verifiers decide what is learned: exact on right and wrong answers, quick on hostile ones, loud when broken."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch

from ibro_lightning.datamodules.collector import check_reward
from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.functional import overlong_penalty
from ibro_lightning.rewards import (
    CodeReward,
    LastNumberReward,
    MathVerifyReward,
    OverlongPenalty,
    Reward,
    RewardByPart,
    RewardSum,
    VerifiableReward,
    last_number,
    score,
)
from ibro_lightning.tasks import CountdownReward, NumberPath, NumberPathReward
from ibro_lightning.types import Completion, Prompt, RewardResult, SamplingParams

torch.set_num_threads(1)
COUNTDOWN = {"numbers": [30, 100, 93], "target": 23}
NUMBER_PATH = {"start": 12, "target": 21, "size": 50, "moves": ["+7", "-3", "*2"]}


def prompt(answer: Any = "8", prompt_id: str = "gsm/17") -> Prompt:
    return Prompt(prompt_id, "text", (1, 2), answer)


def completion(text: str = "", *, tokens: Sequence[int] = (), max_tokens: int = 64) -> Completion:
    return Completion(tuple(tokens), (0.0,) * len(tokens), "stop", text, max_tokens, seed=0)


class Says(Reward):
    """A reward that returns what it was told to, or raises it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, prompt, completions):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class TestLastNumber:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("8", 8),
            ("answer: 8.0", 8),
            ("so 3 + 5 = 8", 8),
            ("-7", -7),
            ("x = -7.", -7),
            ("(-7)", -7),
            ("$-7$", -7),
            ("5-3", 3),
            ("x-3", 3),
            ("(5)-3", 3),
            ("f[2]-3", 3),
            ("from 5 to -3", -3),
            ("$1,234.50.", Fraction("1234.5")),
            ("1,234,567", 1234567),
            ("12,345", 12345),
            ("1, 2, 3", 3),
            ("1,2,3", 3),
            ("0.1", Fraction(1, 10)),
            ("3.14159", Fraction("3.14159")),
            ("The answer is 42!", 42),
            ("42%", 42),
            ("**42**", 42),
            ("\\boxed{42}", 42),
            ("7\n\n", 7),
            ("007", 7),
            ("first 8, finally 9.", 9),
            ("Step 2", 2),
            ("8.", 8),
            ("2.50", Fraction(5, 2)),
            ("123456789012345678901234567890", 123456789012345678901234567890),
        ],
    )
    def test_is_exact(self, text, expected):
        assert last_number(text) == expected

    @pytest.mark.parametrize(
        "text",
        [
            *(
                "3/2",
                "-3/2",
                "it is 3 / 2.",
                "4:30",
                "at 4:30 p.m.",
                "2:1",
                "2 : 1",
                "1.2.3",
                "2024-05-01",
                "05/01/2024",
            ),
            *(
                r"\frac{3}{2}",
                r"$\dfrac{1}{2}$",
                r"\frac32",
                r"{3 \over 2}",
                "1/ 2",
                "3⁄2",
                "2^3",
                "x_2",
                "1e5",
                "1.5e-3",
            ),
        ],
    )
    def test_none_if_it_is_a_part_of_something_else(self, text):
        assert last_number(text) is None

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            *(
                ("6/3 = 2", 2),
                ("1/2 of it: 7", 7),
                ("Answer:30", 30),
                ("answer: 30", 30),
                ("#### 72", 72),
                ("$5/day", 5),
            ),
            *(("9-5", 5), ("10 - 3", 3), ("2, 3", 3), ("20 %", 20), ("5 km/h", 5), ("Total: $1,200.00.", 1200)),
            *((r"\boxed{72}", 72), ("He has 3. 4", 4), ("1. 5 apples", 5), ("(3)(4)", 4), ("3*4", 4), ("€7.", 7)),
        ],
    )
    def test_what_stands_alone_counts(self, text, expected):
        assert last_number(text) == expected

    @pytest.mark.parametrize("text", ["", " ", "no number", "-", ".", ",", "½", "$,.%", "eight", "x²"])
    def test_none_where_there_is_none(self, text):
        assert last_number(text) is None

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("the answer is −7", -7),
            ("−1,200", -1200),
            ("5−3", 3),
        ],
    )
    def test_the_typographic_minus_counts(self, text, expected):
        """Models write U+2212 as well as the hyphen, and countdown expressions accept it."""
        assert last_number(text) == expected

    @pytest.mark.parametrize(("text", "expected"), [("it is .5", "1/2"), ("-.25", "-1/4"), ("$.75", "3/4")])
    def test_a_leading_point_counts(self, text, expected):
        assert last_number(text) == Fraction(expected)

    @pytest.mark.parametrize(
        "text",
        ["9" * 1_000_000, "1," * 500_000, "1,111" * 200_000, "-" * 1_000_000, "1." * 500_000, "0" * 999_999 + "x"],
        ids=lambda text: text[:6],
    )
    def test_only_the_end_of_a_megabyte_is_searched(self, text):
        """Searched whole, a number of a million digits would raise (Python refuses to read it) or take minutes."""
        assert last_number(text) == last_number(text[-2000:])

    def test_a_number_at_the_end_of_a_long_response_is_found(self):
        assert last_number("word " * 100_000 + "the answer is 1,234") == 1234


class TestLastNumberReward:
    @pytest.mark.parametrize(
        ("text", "answer", "right"),
        [
            ("the answer is 8", "8", True),
            ("the answer is 8.0", "8", True),
            ("8", 8, True),
            ("8", 8.0, True),
            ("$1,234.50.", "1234.5", True),
            ("-7", "-7", True),
            ("336", "336^\\circ", True),
            ("27", "27.0", True),
            ("7", "-7", False),
            ("8.01", "8", False),
            ("80", "8", False),
            ("8 or 9", "8", False),
            ("", "8", False),
            ("eight", "8", False),
            ("0.30000000000000004", "0.3", False),
        ],
    )
    def test_right_and_wrong(self, text, answer, right):
        (result,) = score(LastNumberReward(), prompt(answer), [completion(text)])
        assert (result.reward, dict(result.parts)) == ((1.0, {"accuracy": 1.0}) if right else (-1.0, {"accuracy": 0.0}))

    def test_an_answer_without_a_number_is_an_error_of_the_data(self):
        """Comparing None with None would make every silent response right."""
        with pytest.raises(RewardError, match=r"no number.*'\\\\pi'.*gsm/17"):
            score(LastNumberReward(), prompt("\\pi"), [completion("no number either")])

    def test_results_come_in_the_order_of_the_completions(self):
        results = score(LastNumberReward(), prompt("8"), [completion("8"), completion("9"), completion("8")])
        assert [result.parts["accuracy"] for result in results] == [1, 0, 1]


class TestVerifiableReward:
    class Half(VerifiableReward):
        def verify(self, prompt, completion):
            return float(completion.text)

    def test_accuracy_and_reward_are_what_the_settings_say(self):
        reward = self.Half(correct=2.0, incorrect=-0.5)
        results = reward(prompt(), [completion("0"), completion("1"), completion("0.4")])
        assert [r.parts["accuracy"] for r in results] == [0.0, 1.0, 0.4]
        assert [r.reward for r in results] == pytest.approx([-0.5, 2.0, 0.5])

    @pytest.mark.parametrize(("correct", "incorrect"), [(0.0, 0.0), (-1.0, 1.0), (math.nan, 0.0)])
    def test_right_must_pay_more_than_wrong(self, correct, incorrect):
        with pytest.raises(ConfigError, match="correct"):
            LastNumberReward(correct, incorrect)


class TestCountdownReward:
    @pytest.mark.parametrize(
        ("text", "right"),
        [
            ("<answer>30 + 93 - 100</answer>", True),
            ("I think… <answer> (93 - 100) + 30 </answer> done", True),
            ("<answer>30 + 93 - 100 = 23</answer>", True),
            ("<answer>1</answer> no, <answer>30 + 93 - 100</answer>", True),
            ("<answer>\n30 + 93 - 100\n</answer>", True),
            ("<answer>30 + 93 - 100</answer> no, <answer>1</answer>", False),
            ("<answer>30 + 93 - 100", False),
            ("30 + 93 - 100</answer>", False),
            ("30 + 93 - 100", False),
            ("</answer>30 + 93 - 100<answer>", False),
            ("<answer></answer>", False),
            ("<answer>23</answer>", False),
            ("<answer>23 = 30 + 93 - 100</answer>", False),
            ("<answer>30 + 93 + 100 = 23</answer>", False),
            ("<answer>30 + 93 - 100</answer><answer>", False),
            ("", False),
        ],
    )
    def test_judges_the_last_answer(self, text, right):
        (result,) = score(CountdownReward(), prompt(COUNTDOWN), [completion(text)])
        assert result.parts["accuracy"] == right

    def test_the_whole_response_is_the_expression_without_tags(self):
        judged = score(CountdownReward(tagged=False), prompt(COUNTDOWN), [completion(" 30 + 93 - 100 = 23")])
        assert judged[0].parts["accuracy"] == 1
        for text in ("30 + 93", "", "I say 30 + 93 - 100", "<answer>30 + 93 - 100</answer>"):
            assert score(CountdownReward(tagged=False), prompt(COUNTDOWN), [completion(text)])[0].reward == -1.0

    def test_numbers_may_be_left_out_if_the_settings_say_so(self):
        answer = {"numbers": [3, 4, 9], "target": 12}
        text = "<answer>3 * 4</answer>"
        assert score(CountdownReward(use_all=False), prompt(answer), [completion(text)])[0].reward == 1.0
        assert score(CountdownReward(use_all=True), prompt(answer), [completion(text)])[0].reward == -1.0

    @pytest.mark.parametrize("text", ["<answer>" * 200_000, "<answer>" + "(" * 1_000_000 + "</answer>"])
    def test_hostile_responses_are_wrong_rather_than_an_error(self, text):
        assert score(CountdownReward(), prompt(COUNTDOWN), [completion(text)])[0].parts["accuracy"] == 0


class TestNumberPathReward:
    def judge(self, tokens: Sequence[str], answer: Any = NUMBER_PATH) -> float:
        tokenizer = NumberPath().tokenizer()
        reward = NumberPathReward()
        reward.setup(tokenizer)
        ids = tokenizer.convert_tokens_to_ids(list(tokens))
        # The text is what rewards of other tasks read; this one must not believe it.
        (result,) = score(reward, prompt(answer), [completion("*2=24-3=21!", tokens=ids)])
        return result.parts["accuracy"]

    @pytest.mark.parametrize(
        ("tokens", "right"),
        [
            (["*2", "=", "24", "-3", "=", "21", "!"], 1.0),
            (["*2", "=", "24", "-3", "=", "21"], 0.0),
            (["*2", "=", "24", "-3", "=", "2", "1", "!"], 0.0),
            (["*2", "=", "24", "!"], 0.0),
            (["*2", "=", "25", "-3", "=", "21", "!"], 0.0),
            (["*2", "=", "24", "-3", "=", "21", "!", "<pad>"], 0.0),
            (["!"], 0.0),
            ([], 0.0),
        ],
    )
    def test_reads_tokens_rather_than_text(self, tokens, right):
        assert self.judge(tokens) == right

    def test_the_problem_says_which_moves_there_are(self):
        tokens = ["+7", "=", "19", "!"]
        assert self.judge(tokens, {**NUMBER_PATH, "target": 19}) == 1.0
        assert self.judge(tokens, {**NUMBER_PATH, "target": 19, "moves": ["-3", "*2"]}) == 0.0
        assert self.judge(tokens, {**NUMBER_PATH, "target": 19, "size": 19}) == 0.0

    def test_needs_its_tokenizer_first(self):
        with pytest.raises(RewardError, match=r"NumberPathReward.*setup"):
            score(NumberPathReward(), prompt(NUMBER_PATH), [completion()])

    def test_refuses_a_tokenizer_without_the_tasks_tokens(self):
        """Another policy's tokens would make every answer wrong, silently, for a whole run."""

        class Foreign:
            def get_vocab(self):
                return {token: i for i, token in enumerate(NumberPath().vocabulary()) if token != "="}

            def convert_ids_to_tokens(self, ids):
                return []

        reward = NumberPathReward()
        reward.setup(Foreign())
        with pytest.raises(ConfigError, match=r"NumberPathReward.*'='"):
            score(reward, prompt(NUMBER_PATH), [completion()])


def test_a_wrong_number_to_try_a_gold_with_is_none_of_the_other_golds():
    responses = LastNumberReward().plain_responses(prompt([1, 2, 4]))
    assert (responses.right, responses.wrong) == (("1", "2", "4"), ("3", "5"))


class TestOverlongPenalty:
    @pytest.mark.parametrize(
        ("length", "expected"),
        # Limit 20, buffer 8: nothing up to 12 tokens, then an eighth more for each, and no more beyond the limit.
        [(0, 0.0), (1, 0.0), (12, 0.0), (13, -0.125), (16, -0.5), (19, -0.875), (20, -1.0), (25, -1.0)],
    )
    def test_grows_linearly_within_the_buffer(self, length, expected):
        (result,) = score(OverlongPenalty(8), prompt(), [completion(tokens=[1] * length, max_tokens=20)])
        assert (result.reward, dict(result.parts)) == (expected, {"overlong": expected})

    def test_factor(self):
        (result,) = score(OverlongPenalty(8, factor=0.5), prompt(), [completion(tokens=[1] * 16, max_tokens=20)])
        assert result.reward == -0.25

    def test_each_response_is_judged_by_the_limit_it_was_sampled_under(self):
        short, long = (completion(tokens=[1] * 20, max_tokens=limit) for limit in (20, 100))
        assert [r.reward for r in score(OverlongPenalty(8), prompt(), [short, long])] == [-1.0, 0.0]

    def test_is_what_functional_computes_on_tensors(self):
        lengths = torch.arange(65)
        expected = overlong_penalty(lengths, max_tokens=64, buffer_tokens=24, factor=0.7)
        completions = [completion(tokens=[1] * int(length), max_tokens=64) for length in lengths]
        results = score(OverlongPenalty(24, 0.7), prompt(), completions)
        assert [result.reward for result in results] == pytest.approx(expected.tolist())
        # in double precision
        assert [result.reward for result in results] == [0.7 * max(-1.0, min(0.0, (40 - n) / 24)) for n in range(65)]

    def test_a_buffer_longer_than_the_limit_is_refused(self):
        with pytest.raises((ConfigError, RewardError), match=r"buffer_tokens.*at most.*4"):
            score(OverlongPenalty(8), prompt(), [completion(max_tokens=4), completion(max_tokens=20)])

    def test_a_settings_error_stays_one(self):
        """The user must change a setting, not the reward's code."""
        with pytest.raises(ConfigError, match="buffer_tokens"):
            score(OverlongPenalty(8), prompt(), [completion(max_tokens=4)])

    def test_a_buffer_without_tokens_is_refused(self):
        with pytest.raises(ConfigError, match="buffer_tokens"):
            OverlongPenalty(0)


class TestRewardSum:
    def test_adds_rewards_and_keeps_parts_side_by_side(self):
        reward = RewardSum([LastNumberReward(), OverlongPenalty(8)])
        (result,) = score(reward, prompt("8"), [completion("8", tokens=[1] * 16, max_tokens=20)])
        assert result.reward == pytest.approx(1.0 - 0.5)
        assert dict(result.parts) == {"accuracy": 1.0, "overlong": -0.5}

    def test_weights_scale_rewards_and_not_parts(self):
        reward = RewardSum([LastNumberReward(), OverlongPenalty(8)], weights=[2.0, 0.1])
        (result,) = score(reward, prompt("8"), [completion("9", tokens=[1] * 16, max_tokens=20)])
        assert result.reward == pytest.approx(-2.0 - 0.05)
        assert dict(result.parts) == {"accuracy": 0.0, "overlong": -0.5}

    def test_sums_each_completions_own_results(self):
        reward = RewardSum([LastNumberReward(), OverlongPenalty(8)])
        results = score(reward, prompt("8"), [completion("8"), completion("9", tokens=[1] * 20, max_tokens=20)])
        assert [r.reward for r in results] == [1.0, -2.0]

    @pytest.mark.parametrize("stopped", [(False, False), (True, False), (False, True)])
    def test_is_stopped_if_any_member_is(self, stopped):
        accuracy, form = (
            Says([RewardResult(0.0, {name: 0.0}, timed_out=flag)])
            for name, flag in zip(("accuracy", "form"), stopped, strict=True)
        )
        (result,) = score(RewardSum([accuracy, form]), prompt(), [completion()])
        assert result.timed_out == any(stopped)

    @pytest.mark.parametrize(("weight", "span", "expected"), [(0.5, 2.0, 1.0), (-3.0, None, 3.0), (1.0, 0.25, 0.25)])
    def test_right_and_wrong_are_as_far_apart_as_the_weighted_verifiers(self, weight, span, expected):
        accuracy = Says([RewardResult(1.0, {"accuracy": 1.0}, outcome_span=span)])
        reward = RewardSum([OverlongPenalty(8), accuracy], weights=[7.0, weight])
        (result,) = score(reward, prompt(), [completion()])
        assert result.outcome_span == expected

    def test_two_parts_of_one_name_are_refused(self):
        """One of them would silently replace the other, and filter the wrong groups."""
        with pytest.raises(RewardError, match="accuracy"):
            score(RewardSum([LastNumberReward(), LastNumberReward()]), prompt("8"), [completion("8")])

    def test_a_broken_member_is_named(self):
        with pytest.raises(RewardError, match=r"Says.*gsm/17"):
            score(RewardSum([LastNumberReward(), Says([])]), prompt("8"), [completion("8")])

    def test_hands_the_tokenizer_on(self):
        tokens = NumberPath().tokenizer()
        member = NumberPathReward()
        RewardSum([member, OverlongPenalty(8)]).setup(tokens)
        assert score(member, prompt(NUMBER_PATH), [completion()])[0].parts["accuracy"] == 0

    def test_needs_rewards_and_one_weight_for_each(self):
        with pytest.raises(ConfigError, match="rewards"):
            RewardSum([])
        with pytest.raises(ConfigError, match=r"weights.*2 numbers"):
            RewardSum([LastNumberReward(), OverlongPenalty(8)], weights=[1.0])
        with pytest.raises(ConfigError, match=r"weights.*'a'.*2 numbers"):
            RewardSum([LastNumberReward(), OverlongPenalty(8)], weights=[1.0, "a"])


class TestScore:
    """Whatever is wrong with a reward, the error says whose it is and on which prompt, before anything is trained."""

    GOOD = RewardResult(0.5, {"accuracy": 1.0})

    def test_good_results_pass_through(self):
        assert score(Says([self.GOOD, self.GOOD]), prompt(), [completion()] * 2) == [self.GOOD, self.GOOD]
        assert score(Says([]), prompt(), []) == []

    @pytest.mark.parametrize(
        "answer",
        [
            ZeroDivisionError("by zero"),
            KeyError("target"),
            RecursionError(),
            AssertionError("wrong"),
            [RewardResult(math.nan, {"accuracy": 1.0})],
            [RewardResult(math.inf, {"accuracy": 1.0})],
            [RewardResult(-math.inf, {"accuracy": 1.0})],
            [RewardResult(1.0, {"accuracy": math.nan})],
            [RewardResult(1.0, {"accuracy": 1.0, "format": math.inf})],
            [RewardResult(10**400, {"accuracy": 1.0})],
            [],
            [GOOD, GOOD],
        ],
        ids=repr,
    )
    def test_broken_rewards_are_named_with_the_prompt(self, answer):
        with pytest.raises(RewardError, match=r"Says.*gsm/17"):
            score(Says(answer), prompt(), [completion()])

    @pytest.mark.parametrize(
        "answer",
        [
            None,
            1.0,
            [0.5],
            [None],
            [RewardResult(None, {"accuracy": 1.0})],
            [RewardResult("1", {"accuracy": 1.0})],
            [RewardResult(1.0, {"accuracy": "right"})],
            [RewardResult(1.0, None)],
            [RewardResult(1.0, {"accuracy": 1.0}, outcome_span="")],
            [RewardResult(1.0, {"accuracy": 1.0}, outcome_span=torch.ones(2))],
        ],
        ids=repr,
    )
    def test_something_else_than_results_is_named_too(self, answer):
        """Returning plain numbers is the first thing anyone tries."""
        with pytest.raises(RewardError, match=r"Says.*gsm/17"):
            score(Says(answer), prompt(), [completion()])

    def test_the_cause_is_kept_for_the_traceback(self):
        with pytest.raises(RewardError, match="ZeroDivisionError: by zero") as caught:
            score(Says(ZeroDivisionError("by zero")), prompt(), [completion()])
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def test_being_interrupted_is_no_fault_of_the_reward(self):
        class Interrupted(Reward):
            def __call__(self, prompt, completions):
                os.kill(os.getpid(), signal.SIGINT)
                return [RewardResult(0.0, {"accuracy": 0.0})]

        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
        try:
            with pytest.raises(KeyboardInterrupt):
                score(Interrupted(), prompt(), [completion()])
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, before)


class TestCheckReward:
    def test_demands_an_accuracy(self):
        with pytest.raises(RewardError, match=r"OverlongPenalty.*overlong.*no 'accuracy'"):
            check_reward(OverlongPenalty(8), [prompt()], SamplingParams(max_tokens=20))

    def test_tries_an_empty_response_under_the_limit_it_will_have(self):
        seen = []

        class Watching(VerifiableReward):
            def verify(self, prompt, completion):
                seen.append((prompt.id, completion.token_ids, completion.text, completion.max_tokens))
                return False

        check_reward(Watching(), [prompt(), prompt(prompt_id="second")], SamplingParams(max_tokens=20))
        assert seen == [("gsm/17", (), "", 20)]

    def test_finds_a_reward_that_cannot_bear_an_empty_response(self):
        class Fragile(VerifiableReward):
            def verify(self, prompt, completion):
                return completion.text.split()[-1] == "8"

        with pytest.raises(RewardError, match=r"Fragile raised IndexError.*gsm/17"):
            check_reward(Fragile(), [prompt()], SamplingParams())

    @pytest.mark.parametrize("reward", [LastNumberReward(), RewardSum([LastNumberReward(), OverlongPenalty(8)])])
    def test_good_rewards_pass(self, reward):
        check_reward(reward, [prompt("8")], SamplingParams(max_tokens=20))

    @pytest.mark.parametrize(
        ("reward", "bad"),
        [
            (MathVerifyReward(), "light blue or so"),
            (LastNumberReward(), "none"),
            (CodeReward(), {"tests": ["assert"]}),
            (RewardSum([MathVerifyReward(), OverlongPenalty(8)]), "light blue or so"),
        ],
    )
    def test_an_answer_that_cannot_be_used_is_found_before_training(self, reward, bad):
        """Wherever it stands: drawn hours later, it would end the run then."""
        good = {"tests": ["assert f(1) == 2"]} if isinstance(reward, CodeReward) else "8"
        prompts = [prompt(good, "first"), prompt(good, "second"), prompt(bad, "gold/6")]
        with pytest.raises(RewardError, match="gold/6"):
            check_reward(reward, prompts, SamplingParams(max_tokens=20))

    def test_rewards_that_may_be_slow_are_tried_on_one_prompt_of_each_part(self):
        seen = []

        class Watching(VerifiableReward):
            def verify(self, prompt, completion):
                seen.append(prompt.id)
                return False

        parts = [Prompt(f"{part}/{n}", "text", (1,), "8", part=part) for part in ("a", "b") for n in range(3)]
        check_reward(Watching(), parts, SamplingParams(max_tokens=20))
        assert sorted(seen) == ["a/0", "b/0"]


class TestOutcomeSpan:
    """By how much right is rewarded more than wrong travels with each result."""

    def span(self, reward, part=""):
        asked = Prompt("p", "text", (1,), "8", part=part)
        (result,) = reward(asked, [completion("8")])
        return result.outcome_span

    def test_of_a_verifier_and_of_what_is_made_of_it(self):
        half = LastNumberReward(correct=0.5, incorrect=0.0)
        assert self.span(LastNumberReward()) == 2.0
        assert self.span(half) == 0.5
        assert self.span(RewardSum([half, OverlongPenalty(8)], weights=[4.0, 1.0])) == 2.0
        assert self.span(RewardSum([OverlongPenalty(8), half], weights=[1.0, -1.0])) == 0.5
        assert self.span(RewardSum([half, OverlongPenalty(8)], weights=[0.0, 1.0])) == 0.0
        assert self.span(RewardByPart({"a": half, "b": LastNumberReward()}), part="a") == 0.5
        assert self.span(OverlongPenalty(8)) is None
        assert LastNumberReward().stopped(0.5).outcome_span == 2.0

    def test_a_reward_of_ones_own_need_not_say_it(self):
        silent = Says([RewardResult(3.0, {"accuracy": 1.0})])
        assert self.span(RewardSum([silent, OverlongPenalty(8)], weights=[0.5, 1.0])) == 0.5
        with pytest.raises(RewardError, match="outcome_span"):
            score(Says([RewardResult(3.0, {"accuracy": 1.0}, outcome_span=float("nan"))]), prompt(), [completion()])
        with pytest.raises(RewardError, match="returned"):
            score(Says([RewardResult(3.0, {"accuracy": 1.0}, outcome_span="2")]), prompt(), [completion()])


def test_a_part_of_the_mixture_without_a_reward_is_named() -> None:
    stray = Prompt("b/3", "text", (1,), "8", part="b")
    with pytest.raises(ConfigError, match=r"^rewards: \['a'\] - add a reward for the part 'b' .*\(prompt 'b/3'\)$"):
        RewardByPart({"a": LastNumberReward()})(stray, [completion("8")])


def test_what_a_run_does_not_use_is_not_imported() -> None:
    """Neither the sandbox, nor math-verify with sympy, nor torch, which a worker process of the pool can do without."""
    code = """
import sys
import ibro_lightning.rewards
from ibro_lightning.rewards import *
CodeReward(), MathVerifyReward(), OverlongPenalty(4), PoolOptions()
heavy = {"torch", "numpy", "sympy", "math_verify", "lightning", "transformers", "reasoning_gym"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
print(sorted(name for name in sys.modules if name.startswith("ibro_lightning.rewards.code.")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    code_reward = ["ibro_lightning.rewards.code.limits", "ibro_lightning.rewards.code.reward"]
    assert result.stdout.splitlines() == ["[]", str(code_reward)]
