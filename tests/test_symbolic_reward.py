"""The symbolic verifier: which answer it reads, what it takes for equal, and that nothing hostile gets through."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from sympy import Pow, Symbol, factorial, sympify

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.rewards.mathematics import expressions
from ibro_lightning.rewards.mathematics.expressions import is_heavy
from ibro_lightning.rewards.mathematics.symbolic import MathVerifyReward, math_verify_score
from ibro_lightning.types import Completion, Prompt


def judged(response: str, answer: object, **options: object) -> tuple[float, str | None]:
    prompt = Prompt(id="7", text="", token_ids=(), answer=answer)
    [result] = MathVerifyReward(**options)(prompt, [Completion((), (), "stop", response, 8, 0)])  # type: ignore[arg-type]
    return result.reward, result.answer


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("Answer: 1/2", r"\frac{1}{2}"),
        (r"\boxed{0.5}", r"\frac12"),
        ("**Answer:** x = 5.", "5"),
        ("Answer: 5", "x=5"),
        (r"Answer: \left( 3, \frac{\pi}{2} \right)", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"Answer: \begin{pmatrix} 1 \\ 2 \end{pmatrix}.", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("$x+1$", "1+x"),
        (r"Answer: (x+1)^2", "x^2+2x+1"),
        (r"\[ \boxed{\text{Evelyn}} \]", r"\text{Evelyn}"),
        ("Answer: Evelyn", r"\text{Evelyn}"),
        (r"Answer: [-2,7]", r"x \in [-2,7]"),
        ("Answer: 3, 5, 7", "7,3,5"),
        (r"Answer: 10\%", r"10\%"),
        ("Answer: 34 apples", "34"),
        ("Answer: The largest n is 34.", "34"),
        ("The answer is 34.", "34"),
        ("Answer:\n\\[\n\\frac{3}{4}\n\\]", "0.75"),
        ("Answer: 42<|im_end|>", "42"),
    ],
)
def test_equal_answers_are_right_however_they_are_written(response: str, gold: str) -> None:
    assert math_verify_score(response, gold) == 1.0


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("Answer: 35", "34"),
        ("Answer: -34", "34"),
        ("Answer: 34 or 35", "34"),
        (r"\boxed{34} or \boxed{35}", "34"),
        (r"Answer: 34\pi", "34"),
        ("Answer: (1,2)", "(2,1)"),
        ("Answer: [1,2)", "[1,2]"),
        ("Answer: x > 5", "x < 5"),
        ("Answer: Carla", r"\text{Evelyn}"),
        ("I do not know.", "34"),
        ("", "34"),
    ],
)
def test_other_answers_and_none_are_wrong(response: str, gold: str) -> None:
    assert math_verify_score(response, gold) == 0.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"First \boxed{12}." + "\nAnswer: 34", "34"),
        ("Answer: 34\nNo, it is \\boxed{12}.", "12"),
        (r"First \boxed{12}." + "\nAnswer: as computed in step 3", "12"),
        (r"With $n = 3$ it is $34$.", "34"),
        (r"One \boxed{3}. " + "Then we go on with the rest. " * 4 + r"So \boxed{34}.", "34"),
    ],
)
def test_a_bare_answer_line_counts_unless_a_box_follows_it(response: str, answer: str) -> None:
    assert judged(response, "99") == (-1.0, answer)
    assert judged(response, answer) == (1.0, answer)


@pytest.mark.parametrize("form", ["1/2", "0.5", r"\frac12", r"\frac{2}{4}", r"x = \frac{1}{2}", ".50"])
def test_equal_numbers_have_one_spelling_for_votes_right_or_wrong(form: str) -> None:
    assert judged(f"Answer: {form}", "3") == (-1.0, "1/2")
    assert judged(f"Answer: {form}", r"\frac{1}{2}") == (1.0, "1/2")


def test_right_answers_share_the_golds_spelling_and_unread_ones_are_empty() -> None:
    assert judged("Answer: (1+x)^2", "x^2+2x+1")[1] == judged("Answer: x^2 + 2x + 1", "x^2+2x+1")[1]
    assert judged("I do not know.", "1") == (-1.0, "")


def test_options_change_what_is_equal() -> None:
    assert math_verify_score("$0.333$", "$1/3$") == 0.0
    assert math_verify_score("$0.333$", "$1/3$", precision=3) == 1.0
    assert math_verify_score("$f(y)$", "$f(x)$") == 0.0
    assert math_verify_score("$f(y)$", "$f(x)$", strict=False) == 1.0
    assert math_verify_score("$-2 < x < 7$", "$(-2,7)$") == 1.0
    assert math_verify_score("$-2 < x < 7$", "$(-2,7)$", allow_set_relation_comp=False) == 0.0
    assert math_verify_score("$(-2,7)$", "$-2 < x < 7$", allow_set_relation_comp=False) == 1.0
    assert math_verify_score("$5$ m", "$5$ cm") == 0.0
    assert math_verify_score(r"$5\text{ m}$", r"$5\text{ cm}$", units="ignored") == 1.0
    assert math_verify_score("$5$", r"$5\text{ cm}$") == 1.0
    assert math_verify_score("$5$", r"$5\text{ cm}$", units="required") == 0.0
    assert math_verify_score("$2, 1$", "$1, 2$") == 1.0
    assert math_verify_score("$2, 1$", "$1, 2$", order=True) == 0.0
    assert math_verify_score(r"$5 \cdot 6$", "$30$") == 1.0
    assert math_verify_score(r"$5 \cdot 6$", "$30$", simplified=True) == 0.0
    assert math_verify_score("$30$", r"$5 \cdot 6$", simplified=True) == 1.0
    assert math_verify_score("$7(3)$", "$10$", equality="library") == 1.0
    assert math_verify_score("The answer is 5", "5", match_types=["latex"]) == 0.0
    assert math_verify_score("The answer is 5", "5", match_types=["expr"]) == 1.0
    assert math_verify_score("The answer is C.", "C", match_types=["string"]) == 1.0
    assert math_verify_score("The answer is B.", "C", match_types=["string"]) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match_types": ["words"]}, "^match_types: .* - write a list of some of latex, expr, string"),
        ({"match_types": "latex"}, "^match_types: "),
        ({"match_types": []}, "^match_types: "),
        ({"precision": -1}, "^precision: -1 - write 0 or more"),
        ({"numeric_precision": 0}, "^numeric_precision: 0 - write 1 or more"),
        ({"last_chars": 0}, "^last_chars: 0 - write 1 or more"),
        ({"units": "si"}, "^units: 'si' - write one of agree, required, ignored"),
        ({"equality": "mine"}, "^equality: 'mine' - write one of rules, library"),
    ],
)
def test_wrong_options_name_what_is_allowed(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        math_verify_score("1", "1", **options)
    with pytest.raises(ConfigError, match=message):
        MathVerifyReward(**options)  # type: ignore[arg-type]


def test_an_option_that_does_not_exist_is_refused_by_the_rewards_name() -> None:
    with pytest.raises(TypeError, match=r"MathVerifyReward.*'timeout'"):
        math_verify_score("1", "1", timeout=5)


@pytest.mark.parametrize("gold", ["", "$$", "Answer is forty two.", None])
def test_a_gold_that_cannot_be_read_is_an_error_of_the_data(gold: str | None) -> None:
    with pytest.raises(RewardError, match=r"prompt '7': the gold answer .* cannot be read as mathematics"):
        judged("Answer: 42", gold)
    assert math_verify_score("Answer: 42", gold) == 0.0  # the bare function judges, it does not complain


def test_only_the_end_of_a_response_is_read_and_formulas_are_not_cut_open() -> None:
    late = "So $a$ and $b$.\n" * 400 + "It is $34$."
    assert math_verify_score(late, "34") == 1.0
    assert math_verify_score(r"\boxed{34}." + " x" * 3000, "34") == 0.0
    assert math_verify_score(r"\boxed{34}." + " x" * 3000, "34", last_chars=7000) == 1.0
    assert judged("$x=5$\nIt is $34$ of $7 x$", "1", last_chars=25) == judged("It is $34$ of $7 x$", "1")


def test_it_works_in_a_thread_and_logs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The library's own time limits are signals, which fail in threads; without them it warns."""
    monkeypatch.setattr("math_verify.parser.TIMEOUT_WARNING_SHOWN", False)
    monkeypatch.setattr("math_verify.grader.TIMEOUT_WARNING_SHOWN", False)
    expressions.library.cache_clear()
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(1) as executor:
        assert executor.submit(math_verify_score, r"\boxed{1/2}", "0.5").result() == 1.0
    assert caplog.records == []
    logging.getLogger("math_verify.parser").warning("not silenced for others")
    assert [record.message for record in caplog.records] == ["not silenced for others"]


INTEGRAL = r"\int_0^1 2x+3\,dx"
"""What only the library reads."""


@pytest.mark.parametrize("error", [RecursionError, TypeError, OverflowError, ValueError, AssertionError])
@pytest.mark.parametrize("function", ["parser.extract_match", "verify"])
def test_whatever_the_library_raises_means_wrong(
    function: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    response = r"Answer: $\int_0^1 {2x+3}\; dx$"
    assert judged(response, INTEGRAL)[0] == 1.0  # from here on, the gold is known

    def fail(*args: object, **kwargs: object) -> object:
        raise error("hostile")

    monkeypatch.setattr(f"math_verify.{function}", fail)
    assert judged(r"Answer: $\int_0^1 3+2x\; dx$", INTEGRAL)[0] == -1.0


@pytest.mark.parametrize("function", ["parser.extract_match", "verify"])
def test_running_out_of_memory_is_not_a_verdict(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    response = r"Answer: $\int_0^1 3+2x\; dx$"
    assert judged(response, INTEGRAL)[0] == 1.0

    def fail(*args: object, **kwargs: object) -> object:
        raise MemoryError

    monkeypatch.setattr(f"math_verify.{function}", fail)
    with pytest.raises(MemoryError):
        judged(response, INTEGRAL)


@pytest.mark.parametrize(
    "giant",
    [
        "9^{9^{9^{9}}}",
        "10^{10^{10}}",
        "2^{100000000}",
        "1000000!",
        r"\sin(10^{10^{10}})",
        "(a+b+c+d)^{60}",
        "x^{99999}",
    ],
)
def test_giant_numbers_are_compared_as_they_are_written(giant: str) -> None:
    assert math_verify_score(f"${giant}$", "42") == 0.0
    assert math_verify_score(f"${giant}$", giant) == 1.0
    assert math_verify_score(f"${giant} + 1$", giant) == 0.0


def test_deep_nesting_is_refused_before_the_parser_sees_it() -> None:
    def nested(depth: int) -> str:
        return "$" + "(" * depth + "42" + ")" * depth + "$"

    assert math_verify_score(nested(10), "42") == 1.0
    assert math_verify_score(nested(2000), "42") == 0.0
    assert math_verify_score("0) 0] " * 200 + "$42$", "42") == 1.0  # closing brackets alone nest nothing


@pytest.mark.parametrize("piece", ["9", "$", r"\boxed{", "{", "1 + ", "Answer: ", "\x00", r"\frac", "$$1", "\ud800"])
def test_a_megabyte_of_anything_is_judged(piece: str) -> None:
    assert math_verify_score(piece * (1_000_000 // len(piece)), "42") == 0.0


def test_the_estimate_of_size_evaluates_nothing() -> None:
    def power(base: object, exponent: object) -> Pow:
        return Pow(sympify(base), sympify(exponent), evaluate=False)

    x = Symbol("x")
    light = [sympify("3/4"), power(2, 2024), power(2, power(2, 10)), power(13, sympify("1/2")), power(x + 1, 9), x**100]
    heavy = [power(9, power(9, power(9, 9))), power(2, -(10**9)), factorial(10**7, evaluate=False), power(x + 1, 999)]
    assert [is_heavy(expression) for expression in light] == [False] * len(light)
    assert [is_heavy(expression) for expression in heavy] == [True] * len(heavy)


def test_importing_and_pickling_the_reward_needs_no_sympy() -> None:
    code = (
        "import pickle, sys; from ibro_lightning.rewards.mathematics.symbolic import MathVerifyReward; "
        "pickle.loads(pickle.dumps(MathVerifyReward())); assert not {'sympy', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert pickle.loads(pickle.dumps(MathVerifyReward(precision=3))).options["float_rounding"] == 3
    assert MathVerifyReward.pooled
