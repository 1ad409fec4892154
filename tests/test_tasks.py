"""The self-contained tasks: rules checked by hand or by brute force, tokens that survive saving, splits that hold."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ibro_lightning.errors import ConfigError
from ibro_lightning.models import PolicyOptions, Qwen2FromScratch, export_folder
from ibro_lightning.tasks import (
    Countdown,
    CountdownSource,
    NumberPath,
    NumberPathDemonstrations,
    NumberPathSource,
    SumsSource,
    in_split,
)

torch.set_num_threads(1)
DATA = Path(os.environ.get("IBRO_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA} (set IBRO_DATA)")


def by_hand(move: str, value: int) -> int:
    """The standard task's arithmetic, written out."""
    return {"+7": value + 7, "-3": value - 3, "*2": value * 2}[move]


class TestNumberPathRules:
    @pytest.mark.parametrize(
        ("move", "value", "expected"),
        [
            ("+7", 0, 7),
            ("+7", 42, 49),
            ("+7", 43, None),  # 50 is out of range
            ("-3", 3, 0),
            ("-3", 2, None),
            ("*2", 24, 48),
            ("*2", 25, None),
            ("*2", 0, 0),
            ("+3", 5, None),  # an operator and an operand, but no move of this task
            ("7", 5, None),
            ("", 5, None),
            ("=", 5, None),
            ("!", 5, None),
        ],
    )
    def test_apply(self, move, value, expected):
        assert NumberPath().apply(move, value) == expected

    def test_other_sizes_and_moves(self):
        task = NumberPath(size=10, moves=["+1", "*3"])
        assert [task.apply("+1", 8), task.apply("+1", 9), task.apply("*3", 3), task.apply("*3", 4)] == [
            9,
            None,
            9,
            None,
        ]
        assert task.apply("+7", 0) is None

    @pytest.mark.parametrize(("size", "moves"), [(50, ("+7", "-3", "*2")), (13, ("+5", "*3")), (7, ("-2",))])
    def test_distances_equal_floyd_warshall(self, size, moves):
        """Relaxing over every middle point, instead of searching from every start."""
        numbers = range(size)
        far = 10**6
        best = {(a, b): 0 if a == b else far for a in numbers for b in numbers}
        for a, move in itertools.product(numbers, moves):
            operator, operand = move[0], int(move[1:])
            b = a + operand if operator == "+" else a - operand if operator == "-" else a * operand
            if b in numbers and b != a:
                best[a, b] = 1
        for middle, a, b in itertools.product(numbers, numbers, numbers):
            best[a, b] = min(best[a, b], best[a, middle] + best[middle, b])
        assert NumberPath(size, moves).distances == {pair: steps for pair, steps in best.items() if 0 < steps < far}

    @pytest.mark.parametrize(("start", "target", "steps"), [(12, 24, 1), (0, 7, 1), (0, 4, 2), (0, 1, 3)])
    def test_distances_found_by_hand(self, start, target, steps):
        """Two moves take 0 to 14 or 4 (and 0 *2 stays), so 1 = 4 - 3 needs three."""
        assert NumberPath().distances[start, target] == steps

    @pytest.mark.parametrize(
        "moves", [[], ["7"], ["/2"], ["+"], ["+-1"], ["+0"], ["*2.5"], ["+7", "sqrt"], ["+7", ""], ["**2"]]
    )
    def test_moves_that_are_none_are_refused(self, moves):
        with pytest.raises(ConfigError, match=r"^moves"):
            NumberPath(moves=moves)

    def test_a_range_of_one_number_is_refused(self):
        with pytest.raises(ConfigError, match=r"^size"):
            NumberPath(size=1)


class TestNumberPathVerifier:
    RIGHT = ("*2", "=", "24", "-3", "=", "21", "!")

    def test_accepts_right_answers(self):
        task = NumberPath()
        assert task.verify(self.RIGHT, 12, 21)
        assert task.verify(["+7", "=", "7", "!"], 0, 7)
        detour = ["-3", "=", "9", "+7", "=", "16", "-3", "=", "13", "+7", "=", "20", "-3", "=", "17", "!"]
        assert task.verify(detour, 12, 17)

    def test_accepts_passing_the_target_on_the_way(self):
        assert NumberPath().verify(["-3", "=", "3", "*2", "=", "6", "-3", "=", "3", "!"], 6, 3)

    def test_accepts_its_own_demonstration_from_the_docstring(self):
        """The example that users read first must be right."""
        steps = "*2=24 -3=21 *2=42 -3=39 -3=36 -3=33 -3=30 +7=37 +7=44 -3=41"
        tokens = [token for step in steps.split() for token in (step.split("=")[0], "=", step.split("=")[1])]
        assert NumberPath().verify([*tokens, "!"], 12, 41)

    @pytest.mark.parametrize(
        ("tokens", "why"),
        [
            (["*2", "=", "25", "-3", "=", "22", "!"], "wrong arithmetic, and the mistake carried on"),
            (["*2", "=", "25", "-3", "=", "21", "!"], "wrong arithmetic, then back on track"),
            (["*2", "=", "24", "*2", "=", "48", "+7", "=", "55", "!"], "leaves the range"),
            (["*2", "=", "24", "-3", "=", "21"], "no EOS"),
            (["*2", "=", "24", "-3", "=", "21", "+7"], "cut in the middle of the next step"),
            (["*2", "=", "24", "-3", "=", "21", "<pad>"], "padding instead of EOS"),
            (["*2", "=", "24", "-3", "=", "21", "!", "!"], "EOS twice"),
            (["*2", "=", "24", "-3", "=", "21", "!", "+7", "=", "28", "!"], "goes on behind EOS"),
            (["*2", "=", "24", "!", "-3", "=", "21", "!"], "EOS in the middle"),
            (["*2", "=", "24", "-3", "=", "21", "!", "=", "!", "!"], "a whole step of nonsense behind EOS"),
            ([], "empty"),
            (["!"], "EOS alone"),
            (["21", "!"], "the target alone"),
            (["*2", "=", "24", "!"], "ends elsewhere"),
            (["=", "*2", "24", "-3", "=", "21", "!"], "malformed order"),
            (["24", "=", "*2", "-3", "=", "21", "!"], "number and move swapped"),
            (["*2", ">", "24", "-3", "=", "21", "!"], "another sign instead of ="),
            (["*2", "24", "-3", "21", "!"], "no ="),
            (["*2", "=", "24", "-3", "=", "2", "1", "!"], "the number in two tokens"),
            (["*2", "=", "24-3=21", "!"], "several tokens merged into one"),
            (["*2=24", "-3=21", "!"], "steps merged into one token"),
            (["*2", "=", "024", "-3", "=", "21", "!"], "a leading zero"),
            (["*2", "=", "24.0", "-3", "=", "21", "!"], "a fraction"),
            (["*2", "=", " 24", "-3", "=", "21", "!"], "a blank"),
            (["+9", "=", "21", "!"], "true arithmetic with a move that does not exist"),
            (["<pad>", "*2", "=", "24", "-3", "=", "21", "!"], "padding in front"),
            (["<unk>", "=", "24", "-3", "=", "21", "!"], "an unknown token"),
            ([None, "=", "24", "-3", "=", "21", "!"], "an id that the tokenizer does not know"),
        ],
    )
    def test_rejects(self, tokens, why):
        assert not NumberPath().verify(tokens, 12, 21), why

    def test_rejects_an_answer_to_another_problem(self):
        assert not NumberPath().verify(self.RIGHT, 12, 24)
        assert not NumberPath().verify(self.RIGHT, 13, 21)

    def test_a_start_that_is_the_target_still_needs_a_step(self):
        assert not NumberPath().verify(["!"], 21, 21)
        assert NumberPath().verify(["-3", "=", "3", "*2", "=", "6", "!"], 6, 6)


class TestRandomWalks:
    def test_every_walk_is_right_and_ends_where_it_first_meets_its_target(self):
        task = NumberPath()
        lengths = set()
        for seed in range(2000):
            start, target, tokens = task.random_walk(seed, max_steps=6)
            moves, equals, numbers = tokens[0::3], tokens[1::3], [int(number) for number in tokens[2::3]]
            assert set(equals) == {"="}
            assert 1 <= len(numbers) <= 6
            assert start != target
            before = [start, *numbers[:-1]]
            assert numbers == [by_hand(move, value) for move, value in zip(moves, before, strict=True)]
            assert all(0 <= number < 50 for number in numbers)
            assert numbers.index(target) == len(numbers) - 1
            lengths.add(len(numbers))
        assert lengths == {1, 2, 3, 4, 5, 6}

    def test_starts_and_targets_cover_the_task(self):
        walks = [NumberPath().random_walk(seed, max_steps=12)[:2] for seed in range(3000)]
        assert {start for start, _ in walks} == set(range(50))
        assert {target for _, target in walks} == set(range(50))

    def test_a_function_of_the_seed(self):
        task = NumberPath()
        random.seed(1)
        first = [task.random_walk(seed, 8) for seed in range(20)]
        random.seed(2)
        assert [task.random_walk(seed, 8) for seed in range(20)] == first
        assert len({str(walk) for walk in first}) > 15


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tokenizer as an exported policy's user opens it: AutoTokenizer on a folder of model type qwen2."""
    source = Qwen2FromScratch(NumberPath(), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
    folder = tmp_path_factory.mktemp("export") / "model"
    export_folder(source.build(PolicyOptions()), source.tokenizer(), folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"
    return AutoTokenizer.from_pretrained(folder)


class TestNumberPathTokenizer:
    TEXT = "12>41:*2=24-3=21*2=42-3=39+7=46!"
    TOKENS = ("12", ">", "41", ":", "*2", "=", "24", "-3", "=", "21", "*2", "=", "42", "-3", "=", "39", "+7", "=", "46")

    @pytest.fixture(params=["fresh", "saved"])
    def tokenizer(self, request):
        return NumberPath().tokenizer() if request.param == "fresh" else request.getfixturevalue("saved")

    def test_one_token_per_number_and_per_move(self, tokenizer):
        assert tokenizer.convert_ids_to_tokens(tokenizer(self.TEXT)["input_ids"]) == [*self.TOKENS, "!"]
        for number in range(50):
            assert len(tokenizer(str(number))["input_ids"]) == 1
        for move in ("+7", "-3", "*2"):
            assert len(tokenizer(move)["input_ids"]) == 1

    def test_ids_are_distinct_and_within_the_vocabulary(self, tokenizer):
        """6 special and punctuation tokens, 3 moves, 50 numbers: the embedding's size."""
        ids = tokenizer.get_vocab().values()
        assert sorted(ids) == list(range(59))
        assert len(tokenizer) == 59

    def test_text_round_trips(self, tokenizer):
        task = NumberPath()
        for seed in range(300):
            start, target, tokens = task.random_walk(seed, max_steps=12)
            text = task.prompt(start, target) + "".join(tokens)
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == 4 + len(tokens)
            assert tokenizer.decode(ids) == text

    def test_eos_and_pad_are_special(self, tokenizer):
        ids = tokenizer(self.TEXT)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token == "!"
        assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
        assert tokenizer.decode(ids, skip_special_tokens=True) == self.TEXT[:-1]

    def test_nothing_is_added_to_a_prompt(self, tokenizer):
        assert tokenizer("12>41:")["input_ids"] == tokenizer("12>41:", add_special_tokens=False)["input_ids"]
        assert len(tokenizer("12>41:")["input_ids"]) == 4

    def test_saving_keeps_every_id(self, saved):
        fresh = NumberPath().tokenizer()
        assert saved.get_vocab() == fresh.get_vocab()
        assert saved(self.TEXT)["input_ids"] == fresh(self.TEXT)["input_ids"]
        assert (saved.eos_token_id, saved.pad_token_id) == (fresh.eos_token_id, fresh.pad_token_id)

    def test_repeated_moves_leave_no_gap_in_the_vocabulary(self):
        """An id beyond the embedding's rows crashes the model on its first number."""
        try:
            tokenizer = NumberPath(size=5, moves=("+1", "+1")).tokenizer()
        except ConfigError:
            return  # refusing them is just as good
        assert max(tokenizer.get_vocab().values()) < len(tokenizer)


class TestHeldOutSplit:
    # The first 8 hex digits of SHA-256, from `printf %s 12>41: | sha256sum`, over 2^32: 0.520, 0.232, 0.964, 0.122.
    HASHES = (
        ("12>41:", "85301f85", 0.520),
        ("0>7:", "3b7d424f", 0.232),
        ("7>8:", "f6c484d5", 0.964),
        ("0+0", "1f2ac6a6", 0.122),
    )

    @pytest.mark.parametrize(("problem", "digits", "draw"), HASHES)
    def test_decided_by_the_problems_sha256(self, problem, digits, draw):
        """These must never change: a policy trained with an older version would have seen today's held-out problems."""
        assert hashlib.sha256(problem.encode()).hexdigest().startswith(digits)
        assert int(digits, 16) / 2**32 == pytest.approx(draw, abs=5e-4)
        for fraction in (draw - 0.01, draw + 0.01):
            assert in_split(problem, "heldout", fraction) == (draw < fraction)
            assert in_split(problem, "train", fraction) == (draw >= fraction)
            assert in_split(problem, "all", fraction)

    @pytest.mark.parametrize("fraction", [0.0, 1.0])
    def test_nothing_or_everything_can_be_held_out(self, fraction):
        assert [in_split(str(i), "heldout", fraction) for i in range(100)] == [fraction == 1.0] * 100

    def test_train_and_heldout_are_disjoint_and_cover_everything(self):
        sides = {
            split: {p.id for p in NumberPathSource(split=split, min_distance=1, max_distance=99).problems()}
            for split in ("train", "heldout", "all")
        }
        assert sides["train"].isdisjoint(sides["heldout"])
        assert sides["train"] | sides["heldout"] == sides["all"]
        assert sides["all"] == {f"{start}>{target}:" for start, target in NumberPath().distances}

    def test_about_15_percent_are_held_out(self):
        """2450 problems at most, so one standard deviation is 0.7 percent."""
        total = len(list(NumberPathSource(split="all", min_distance=1, max_distance=99).problems()))
        heldout = len(list(NumberPathSource(split="heldout", min_distance=1, max_distance=99).problems()))
        assert 2000 < total <= 2450
        assert 0.12 < heldout / total < 0.18

    def test_a_problems_side_does_not_depend_on_the_difficulty_asked_for(self):
        easy = {p.id for p in NumberPathSource(split="heldout", min_distance=1, max_distance=4).problems()}
        everything = {p.id for p in NumberPathSource(split="heldout", min_distance=1, max_distance=99).problems()}
        assert easy < everything

    def test_no_demonstration_answers_a_held_out_problem(self):
        heldout = {p.prompt for p in NumberPathSource(split="heldout", min_distance=1, max_distance=99).problems()}
        demonstrations = NumberPathDemonstrations()
        prompts = [demonstrations.demonstration(seed)[0] for seed in range(4000)]
        assert len(set(prompts)) > 500
        assert heldout.isdisjoint(prompts)

    def test_demonstrations_are_right_answers_to_their_prompts(self):
        demonstrations, task = NumberPathDemonstrations(max_steps=5), NumberPath()
        tokenizer = task.tokenizer()
        for seed in range(300):
            prompt, response = demonstrations.demonstration(seed)
            start, target = prompt.rstrip(":").split(">")
            assert task.verify([*tokenizer.tokenize(response), "!"], int(start), int(target))
        assert demonstrations.demonstration(3) == NumberPathDemonstrations(max_steps=5).demonstration(3)

    def test_problems_have_the_difficulty_asked_for_and_say_what_the_reward_needs(self):
        distances = NumberPath().distances
        for problem in NumberPathSource(min_distance=3, max_distance=4).problems():
            answer = problem.answer
            assert problem.prompt == f"{answer['start']}>{answer['target']}:"
            assert 3 <= distances[answer["start"], answer["target"]] <= 4
            assert (answer["size"], answer["moves"]) == (50, ["+7", "-3", "*2"])


def solutions(numbers: list[int], target: int) -> list[str]:
    """Every expression of three numbers that equals ``target``: all orders, operators and both ways to bracket."""
    operators = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b if b else None,
    }
    found = []
    for a, b, c in itertools.permutations(numbers):
        for p, q in itertools.product(operators, repeat=2):
            left = operators[p](Fraction(a), Fraction(b))
            if left is not None and operators[q](left, Fraction(c)) == target:
                found.append(f"({a} {p} {b}) {q} {c}")
            right = operators[q](Fraction(b), Fraction(c))
            if right is not None and operators[p](Fraction(a), right) == target:
                found.append(f"{a} {p} ({b} {q} {c})")
    return found


class TestCountdownVerifier:
    @pytest.mark.parametrize(
        ("expression", "numbers", "target"),
        [
            ("30 + 93 - 100", [30, 100, 93], 23),
            ("(93-100)+30", [30, 100, 93], 23),
            ("  3*4 ", [3, 4], 12),
            ("3 × 4", [4, 3], 12),
            ("8 ÷ 2 − 1", [1, 2, 8], 3),
            ("1 / 3 * 3", [3, 3, 1], 1),  # 0.333… * 3: exact in fractions
            ("(1 / 49) * 49", [1, 49, 49], 1),  # in floating point this is 0.9999999999999999
            ("1 - 5 / (7 / 3)", [1, 5, 7, 3], Fraction(-8, 7)),
            ("((((5))))+2", [5, 2], 7),
            ("3 - 10 + 8", [3, 10, 8], 1),  # negative on the way
            ("2 * 3 + 4", [2, 3, 4], 10),  # precedence
            ("10 - 3 - 2", [2, 3, 10], 5),  # left to right
            ("24 / 4 / 2", [2, 4, 24], 3),
            ("0 + 5 * 1", [0, 1, 5], 5),
        ],
    )
    def test_accepts_right_expressions(self, expression, numbers, target):
        assert Countdown().verify(expression, numbers, target)

    @pytest.mark.parametrize(
        ("expression", "why"),
        [
            ("30 + 93 + 100", "another value"),
            ("30 + 93 - 100 + 0", "a number that was not given"),
            ("30 + 93 - 100 + 30 - 30", "a number used again"),
            ("23", "the target itself"),
            ("30 - 7", "right value, other numbers"),
            ("93 - 70", "right value, other numbers"),
            ("30 + -100 + 93", "unary minus"),
            ("-(100 - 93) + 30", "unary minus"),
            ("+30 + 93 - 100", "unary plus"),
            ("30 + 93 - ~99", "a bitwise operator"),
            ("30 + 93 - 100 ** 1", "a power"),
            ("30 + 93 - 100 // 1", "floor division"),
            ("(30 + 93) % 100", "modulo, with the right value"),
            ("30 ^ 93 ^ 100", "xor"),
            ("int(30 + 93 - 100)", "a call"),
            ("abs(30) + 93 - 100", "a call"),
            ("x", "a name"),
            ("30 + 93 - 100 if True else 0", "a condition"),
            ("[30 + 93 - 100][0]", "a subscript"),
            ("30 + 93 - 100 == 23", "a comparison"),
            ("(30 + 93 - 100,)", "a tuple"),
            ("lambda: 23", "a function"),
            ("(x := 30) + 93 - 100", "an assignment"),
            ("30.0 + 93 - 100", "a floating-point number"),
            ("30 + 93 - 100j", "a complex number"),
            ("'30' + '93'", "strings"),
            ("True + 93", "a truth value"),
            ("30 + 93 -", "half an expression"),
            ("(30 + 93 - 100", "an open bracket"),
            ("30 + 93 - 100)", "a closing bracket too many"),
            ("30 93 100", "no operators"),
            ("30 + 93 - 100 = 23", "an equation"),
            ("30 + 93 - 100; 1", "two statements"),
            ("30 + 93\n- 100", "two lines"),
            ("", "nothing"),
            ("   ", "blanks"),
            ("()", "an empty tuple"),
            ("\x00", "a null byte"),
            ("the answer is 23", "prose"),
        ],
    )
    def test_rejects(self, expression, why):
        assert not Countdown().verify(expression, [30, 100, 93], 23), why

    @pytest.mark.parametrize(
        ("expression", "numbers", "target"),
        [
            ("2 ** 3", [2, 3], 8),
            ("7 // 2", [7, 2], 3),
            ("7 % 4", [7, 4], 3),
            ("6 ^ 3", [6, 3], 5),
            ("6 | 1", [6, 1], 7),
            ("6 & 3", [6, 3], 2),
            ("1 << 3", [1, 3], 8),
            ("-(3 - 5)", [3, 5], 2),
            ("-5 + 7", [5, 7], 2),
            ("+5 + 2", [5, 2], 7),
            ("5.0 + 2", [5, 2], 7),
            ("int(5 + 2)", [5, 2], 7),
            ("max(5, 2)", [5, 2], 5),
            ("(5 + 2,)[0]", [5, 2], 7),
            ("5 + 2 if 1 else 0", [5, 2, 1, 0], 7),
        ],
    )
    def test_other_operations_are_refused_whatever_they_give(self, expression, numbers, target):
        """In Python, value and numbers of each of these would be right."""
        assert not Countdown().verify(expression, numbers, target)

    @pytest.mark.parametrize("expression", ["5 / 0", "5 / (3 - 3)", "0 / 0", "(3 - 3) / (3 - 3)"])
    def test_division_by_zero_is_wrong_rather_than_an_error(self, expression):
        assert not Countdown(use_all=False).verify(expression, [5, 0, 3, 3, 3, 3], 0)

    @pytest.mark.parametrize(
        "expression", ["0x1e + 93 - 100", "0b11110 + 93 - 100", "3_0 + 93 - 100", "30 + 93 - 100 # !"]
    )
    def test_python_spellings_are_no_numbers(self, expression):
        """Nobody writes them in an answer; a policy that finds them has found a gap, not a solution."""
        assert not Countdown().verify(expression, [30, 100, 93], 23)

    def test_repeated_numbers_may_be_used_as_often_as_they_were_given(self):
        assert Countdown().verify("7 + 7 * 2", [7, 7, 2], 21)
        assert not Countdown().verify("7 + 7 + 7", [7, 7, 2], 21)
        assert not Countdown().verify("7 * 2 + 7", [7, 2, 3], 21)

    def test_numbers_may_be_left_out_only_if_the_task_says_so(self):
        assert Countdown(use_all=False).verify("3 * 4", [3, 4, 9], 12)
        assert not Countdown(use_all=True).verify("3 * 4", [3, 4, 9], 12)
        assert not Countdown(use_all=False).verify("3 * 4 * 1", [3, 4, 9], 12)
        assert not Countdown(use_all=False).verify("3 + 3", [3, 4, 9], 6)

    @pytest.mark.parametrize(
        "hostile",
        [
            "9**9**9**9**9",
            "(" * 1_000_000,
            "(" * 240 + "1" + ")" * 240,
            "[" * 400,
            "-" * 1_000_000 + "1",
            "-" * 450 + "1",
            "1" + "+1" * 200,
            "1" + "+1" * 500_000,
            "9" * 1_000_000,
            "9" * 499,
            "9" * 4301,
            "9*" * 249 + "9",
            "99999999*" * 50 + "9",
            "1" + "/7" * 200,
            "__import__('os').system('sleep 5')",
            "exec('while True: pass')",
            "[i for i in range(10**9)]",
            "f'{1:999999999}'",
            "'a' * 10**10",
            "1 if " * 90 + "1",
            "lambda " * 60,
            "\ud800",
            "\u202e1+1",
            "1\\\n+1",
            "\\",
            "𝟙+𝟙",
            "+" * 500,
            "." * 500,
            "0" * 500,
            "1e309",
            "1 << 10000000000",
        ],
        ids=lambda text: ascii(text[:12]),
    )
    def test_hostile_text_is_wrong_rather_than_an_error(self, hostile):
        """Responses are whatever the policy came up with; verifying one may neither raise nor hang nor run it."""
        assert Countdown().verify(hostile, [1, 9], 23) is False

    def test_agrees_with_brute_force_on_random_expressions(self):
        """Right exactly for the expressions that brute force finds, over everything three numbers can make."""
        rng = random.Random(0)
        task = Countdown()
        for _ in range(15):
            numbers = [rng.randint(1, 12) for _ in range(3)]
            target = rng.randint(1, 30)
            right = solutions(numbers, target)
            for a, b, c in itertools.permutations(numbers):
                for p, q in itertools.product("+-*/", repeat=2):
                    for expression in (f"({a} {p} {b}) {q} {c}", f"{a} {p} ({b} {q} {c})"):
                        assert task.verify(expression, numbers, target) == (expression in right), expression


class TestCountdownProblems:
    def test_every_generated_problem_can_be_solved(self):
        for seed in range(200):
            numbers, target = Countdown.generate(seed, 3, 30)
            found = solutions(numbers, target)
            assert found, f"{numbers} cannot make {target}"
            assert Countdown().verify(found[0], numbers, target)

    def test_the_solution_that_comes_with_a_problem_solves_it(self):
        problems = list(CountdownSource(num_problems=200, num_numbers=4, max_number=12).problems())
        for problem in problems:
            assert Countdown().verify(problem.meta["solution"], problem.answer["numbers"], problem.answer["target"])
        assert len({problem.meta["solution"].strip("()0123456789") for problem in problems}) > 20  # not all alike

    def test_numbers_and_targets_are_in_range_and_no_target_is_given_away(self):
        for seed in range(200):
            numbers, target = Countdown.generate(seed, 4, 25)
            assert len(numbers) == 4
            assert all(1 <= number <= 25 for number in numbers)
            assert target > 0
            assert target not in numbers
            assert type(target) is int

    def test_the_source_is_a_function_of_its_seed_without_repetitions(self):
        def ids(**settings):
            return [p.id for p in CountdownSource(num_problems=100, chat=False, **settings).problems()]

        assert ids(seed=1) == ids(seed=1)
        assert set(ids(seed=1)) != set(ids(seed=2))
        # Numbers 1 to 3 make few problems, so 100 draws must repeat some.
        few = ids(num_numbers=2, max_number=3)
        assert len(set(few)) == len(few) < 100

    def test_the_sources_split_is_disjoint_and_complete(self):
        sides = {
            split: {p.id for p in CountdownSource(num_problems=300, split=split).problems()}
            for split in ("train", "heldout", "all")
        }
        assert sides["train"].isdisjoint(sides["heldout"])
        assert sides["train"] | sides["heldout"] == sides["all"]
        assert 0.05 < len(sides["heldout"]) / len(sides["all"]) < 0.25

    def test_the_prompt_states_numbers_and_target(self):
        (problem,) = CountdownSource(num_problems=1, chat=False, template="{numbers} to {target}").problems()
        assert problem.prompt == f"{problem.answer['numbers']} to {problem.answer['target']}"
        (problem,) = CountdownSource(num_problems=1).problems()
        (message,) = problem.prompt
        assert message["role"] == "user"
        assert str(problem.answer["numbers"]) in message["content"]
        assert str(problem.answer["target"]) in message["content"]

    def test_reads_a_file(self, tmp_path):
        rows = [
            {"numbers": [3, 4, 5], "target": 23},
            {"numbers": [4, 3, 5], "target": 23},  # the same problem in another order
            {"numbers": [3, 4, 5], "target": 17, "problem": "further columns do no harm"},
        ]
        path = tmp_path / "countdown.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        problems = list(CountdownSource(str(path), chat=False).problems())
        assert [p.answer for p in problems] == [
            {"numbers": [3, 4, 5], "target": 23},
            {"numbers": [3, 4, 5], "target": 17},
        ]
        assert len({p.id for p in problems}) == 2

    @pytest.mark.parametrize(
        ("line", "why"),
        [
            ("{broken", "not JSON"),
            ('{"numbers": [1, 2]}', "no target"),
            ('{"target": 3}', "no numbers"),
            ('{"numbers": 5, "target": 3}', "numbers is no list"),
            ('{"numbers": ["x"], "target": 3}', "a number that is none"),
            ('{"numbers": [1, 2], "target": null}', "target is null"),
            ("[1, 2]", "not an object"),
        ],
    )
    def test_a_broken_line_is_named(self, tmp_path, line, why):
        path = tmp_path / "countdown.jsonl"
        path.write_text('{"numbers": [1, 2], "target": 3}\n' + line + "\n")
        with pytest.raises(ConfigError, match=r"countdown\.jsonl.*line 2"):
            list(CountdownSource(str(path)).problems())

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"nowhere\.jsonl.*no such file"):
            list(CountdownSource(str(tmp_path / "nowhere.jsonl")).problems())

    @needs_data
    def test_reads_the_public_file_whose_problems_can_all_be_solved(self):
        problems = list(CountdownSource(str(DATA / "countdown_cd3_128.jsonl")).problems())
        rows = [json.loads(line) for line in (DATA / "countdown_cd3_128.jsonl").read_text().splitlines()]
        distinct = {(tuple(sorted(row["numbers"])), row["target"]) for row in rows}
        assert len(rows) == 128
        assert len(problems) == len(distinct)
        for problem in problems:
            numbers, target = problem.answer["numbers"], problem.answer["target"]
            assert any(Countdown().verify(expression, numbers, target) for expression in solutions(numbers, target))

    @pytest.mark.parametrize("template", ["no names", "{numbers} only", "{numbers} {target} {more}", "{numbers", "{0}"])
    def test_a_template_that_cannot_be_filled_in_is_refused(self, template):
        with pytest.raises(ConfigError, match=r"^template"):
            CountdownSource(template=template)

    @pytest.mark.parametrize(
        "settings",
        [
            {"num_numbers": 1},
            {"max_number": 0},
        ],
    )
    def test_settings_without_problems_are_refused(self, settings):
        with pytest.raises(ConfigError, match=f"^{next(iter(settings))}"):
            list(CountdownSource(**settings).problems())


class TestSums:
    def test_every_sum_once_with_its_answer(self):
        problems = list(SumsSource(chat=False, template="{a}+{b}=").problems())
        assert {p.prompt: p.answer for p in problems} == {f"{a}+{b}=": str(a + b) for a in range(10) for b in range(10)}
        assert len({p.id for p in problems}) == len(problems) == 100

    def test_the_split_is_disjoint_and_complete(self):
        train, heldout = ({p.id for p in SumsSource(split=split).problems()} for split in ("train", "heldout"))
        assert train.isdisjoint(heldout)
        assert len(train | heldout) == 100
        assert "0+0" in heldout  # 0.122 (see above) is below the default 0.2

    def test_two_digits(self):
        problems = list(SumsSource(digits=2).problems())
        assert len(problems) == 8100
        assert "10+99" in {p.id for p in problems}


def test_demonstrations_of_a_task_without_any_move_are_refused():
    """Otherwise the search for a walk that leads somewhere would never end."""
    with pytest.raises(ConfigError, match=r"^task"):
        NumberPathDemonstrations(NumberPath(size=2, moves=["+7"]))
