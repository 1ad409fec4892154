"""The rule-based verifier: the published rule to the letter, and what the lenient mode accepts beyond it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ibro_lightning.errors import RewardError
from ibro_lightning.rewards.mathematics.dapo_reward import DapoMathReward, dapo_score
from ibro_lightning.types import Completion, Prompt

REMOVED_UNITS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "sue", "points", "feet", "minutes"),
    *("digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students", "children tickets"),
    "multiples",
)
# (response, gold, verdict). The verdicts are those of verl's math_dapo.py at commit 012542c; the oddities (the commas
# of lists, "banana", the first formula of a line) are its own.
PUBLISHED = [
    # where the answer is read
    ("Answer: 34", "34", 1),
    ("answer:34", "34", 1),
    ("ANSWER : 34", "34", 1),
    ("Answer\t:\t34", "34", 1),
    ("Answer:\n34", "34", 1),
    ("Answer:\n\n  34", "34", 1),
    ("Final Answer: 34", "34", 1),
    ("myanswer: 34", "34", 1),
    ("Answer: 35\nAnswer: 34", "34", 1),
    ("Answer: 34\nAnswer: 35", "34", 0),
    ("Answer: 34\nSo it is 35.", "34", 1),
    ("Answer: 34 Answer: 35", "35", 0),
    ("Answer 34", "34", 0),
    ("The answer is 34", "34", 0),
    ("Answer - 34", "34", 0),
    ("34", "34", 0),
    ("", "34", 0),
    ("Answer:", "34", 0),
    ("Answer: \n", "34", 0),
    ("Answer: 34" + " " * 290, "34", 1),
    ("Answer: 34" + " " * 291, "34", 0),
    ("Answer: 34\n" + "x" * 289, "34", 1),
    ("Answer: 34\n" + "x" * 290, "34", 0),
    ("Answer：34", "34", 0),
    (r"\boxed{34}", "34", 0),
    ("$34$", "34", 0),
    ("nothing", "[INVALID]", 1),
    # decoration it does not know
    ("**Answer:** 34", "34", 0),
    ("**Answer**: 34", "34", 0),
    ("Answer: **34**", "34", 0),
    ("Answer: 34.", "34", 0),
    ("Answer: 34.0", "34", 0),
    ("Answer: 0034", "34", 0),
    ("Answer: +34", "34", 0),
    ("Answer: -34", "34", 0),
    ("Answer: −34", "-34", 0),
    ("Answer: (34)", "34", 0),
    ("Answer: `34`", "34", 0),
    # the part after the last equals sign
    ("Answer: x = 34", "34", 1),
    ("Answer: 35 = x = 34", "34", 1),
    ("Answer: 34 = x", "34", 0),
    ("Answer: x = 34 or x = 35", "35", 1),
    ("Answer: 0", "5x-7y+4=0", 1),
    # replacements, in order
    ("Answer: an 34", "34", 1),
    ("Answer: a 34", "34", 1),
    ("Answer: alpha 34", "alph34", 1),
    ("Answer: banana 34", "banan34", 1),
    ("Answer: $34.$", "34", 1),
    ("Answer: $34$.", "34", 1),
    (r"Answer: \$34", "34", 1),
    (r"Answer: 3\ 4", "34", 1),
    ("Answer: 3 4", "34", 1),
    (r"Answer: 34\mbox{cm}", "34", 1),
    (r"Answer: 3,\text{and}4", "3,4", 1),
    (r"Answer: 3\text{and}4", "3,4", 1),
    (r"Answer: 3 \text{ and } 4", "3,4", 1),
    (r"Answer: 34\text{m}", "34", 1),
    (r"Answer: 34 \text{ m}", "34", 1),
    ("Answer: 3 and 4", "3,4", 0),
    # removed expressions
    *((f"Answer: 34 {unit}", "34", 1) for unit in REMOVED_UNITS),
    ("Answer: 34 square units", "34", 1),
    (r"Answer: 34 \ldots", "34", 1),
    (r"Answer: 34\text{s}", "34", 1),
    (r"Answer: 34\text{.}", "34", 1),
    ("Answer: 34", "34\\text{\ns}", 1),
    (r"Answer: 34\text{m}^2", "34", 1),
    (r"Answer: 34\text{}^3", "34", 1),
    ("Answer: 34", "34\\text{\n}", 1),
    (r"Answer: 34\mathrm{th}", "34", 1),
    (r"Answer: 34^\circ", "34", 1),
    (r"Answer: 34^{\circ}", "34", 1),
    (r"Answer: 3\;4", "34", 1),
    (r"Answer: 1,\!234", "1234", 1),
    ("Answer: 1{,}234", "1234", 1),
    ('Answer: "34"', "34", 1),
    (r"Answer: 34\dots", "34", 1),
    ("Answer: 34 cm^2", "34", 0),
    ("Answer: 34 apples", "34", 0),
    ("Answer: 34 inch", "34", 0),
    ("Answer: 34 meter", "34", 0),
    # LaTeX
    ("Answer: $34$", "34", 1),
    ("Answer: the value is $34$ indeed", "34", 1),
    ("Answer: $34$ or $35$", "34", 1),
    ("Answer: $34", "34", 1),
    ("Answer: $$34$$", "34", 0),
    ("Answer: $$34$$", "", 1),
    (r"Answer: \(34\)", "34", 0),
    (r"Answer: \text{34}", "34", 1),
    (r"Answer: \text{a}\text{b}", "ab", 1),
    (r"Answer: \text{a{b}c}", "a{bc}", 1),
    (r"Answer: \textbf{34}", "34", 1),
    (r"Answer: \overline{34}", "34", 1),
    (r"Answer: \boxed{34}", "34", 1),
    (r"Answer: \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1),
    (r"Answer: \boxed{3}+\boxed{4}", r"3}+\boxed{4", 1),
    (r"Answer: \boxed{34", "34", 0),
    (r"Answer: \frac12", r"\frac{1}{2}", 1),
    (r"Answer: \frac123", r"\frac{1}{2}3", 1),
    (r"Answer: \frac1{2}", r"\frac{1}{2}", 0),
    (r"Answer: \dfrac{1}{2}", r"\frac{1}{2}", 0),
    (r"Answer: \sqrt2", r"\sqrt{2}", 1),
    (r"Answer: \sqrt23", r"\sqrt{2}3", 1),
    ("Answer: 1/2", r"\frac{1}{2}", 0),
    (r"Answer: \left(1,2\right)", "(1,2)", 0),
    (r"Answer: ( 3, \frac{\pi}{2} )", r"(3,\frac{\pi}{2})", 1),
    # commas between digits
    ("Answer: 1,234", "1234", 1),
    ("Answer: 1,2,3", "123", 1),
    ("Answer: 34", "3,4", 1),
    ("Answer: 1,234.5", "1234.5", 0),
    ("Answer: -1,234", "-1234", 0),
    ("Answer: 1,234 x", "1234x", 0),
]

ACCEPTED = [  # for gold 34, by the lenient mode only
    ("**Answer:** 34", "Answer: 34.0", "Answer: 0034", "Answer: +34", "Answer: 34.", "Answer: 34 apples"),
    ("Answer: **34**", "Answer: __34__", "Answer: `34`", "**Final Answer**: 34.", "### Answer:\n\n**34**"),
    (r"\textbf{Answer:} 34", r"Answer: \(34\)", "Answer:\n$$\n34\n$$", "Answer:\n\\[\n34\n\\]", "Answer：34"),
    (r"\boxed{34}", r"So \[ \boxed{34}. \]", "$34$", r"\(34\)", "So it is $34$.", "Answer: $x = 34$."),
    (r"one \boxed{3} and, after more than that, \boxed{34}", "Answer: ３４", "Answer: 34 kg"),
    ("Answer: 34" + "\n" * 400, "Answer: 34\\%", "Answer: 34°", "Answer: 34 cubic feet."),
    ("Answer: $m+n = 34$.", "Answer: 34 cubic inch"),
]
ACCEPTED_BY_BOTH = ["Answer: 34", "Answer: x = 34", "Answer: 34 cm", "Answer:\n34", "Answer: m + n = 34", "Answer: $34"]
ACCEPTED_BY_BOTH += [
    "Answer: 34cm",
    r"Answer: $34\ \text{cm}^2$",
    r"Answer: 34\text{ cm}",
    "Answer: The answer is $34$. I hope so.",
]
REJECTED = [  # for gold 34
    ("Answer: 35", "Answer: -34", "Answer: 340", "Answer: 1,034", "Answer: 34.5", "Answer: 34.05", "Answer: 034034"),
    ("Answer: 34 or 35", "Answer: 35 or 34", "Answer: $34$ or $35$", "$35$ or $34$", "Answer: 34, 35", "Answer: 3 4"),
    (r"\boxed{34} or \boxed{35}", r"\boxed{35}, \boxed{34}", "Answer: x = 34 or x = 35", "Answer: x = 35 or x = 34"),
    ("Answer: 33-34", "Answer: 34 to 36", "Answer: between 34 and 36", r"Answer: 34 \pm 1", r"Answer: \geq 34"),
    ("Answer: 34x", r"Answer: 2 \cdot 34", "Answer: 34 + 1", "Answer: 34/2", r"Answer: \frac{34}{2}", "Answer: 34!"),
    ("Answer: 34^2", "Answer: 34²", r"Answer: 34\pi", "Answer: 34 pi", "Answer: 34 million", "Answer: 34 mod 7"),
    (r"Answer: \sqrt{34}", r"Answer: \boxed{34}^2", r"\boxed{34} + 1", r"-\boxed{34}", "Answer: 34 dozens"),
    (
        "34",
        "",
        "Answer:",
        "The answer is",
        "Answer: not 34",
        "Answer: 34 more",
        "Answer: 34 n",
        "$34$ is not it, 35 is",
    ),
    (
        "Answer: 34\nBut in fact \\boxed{35}",
        "\\boxed{34}\nAnswer: 35",
        "Answer: (34, 35)",
        r"\boxed{34",
        "Answer: 34e5",
    ),
]


def judged(response: str, answer: object, strict: bool) -> tuple[float, str | None]:
    prompt = Prompt(id="7", text="", token_ids=(), answer=answer)
    [result] = DapoMathReward(strict=strict)(prompt, [Completion((), (), "stop", response, 8, 0)])
    return result.reward, result.answer


@pytest.mark.parametrize(("response", "gold", "verdict"), PUBLISHED)
def test_the_strict_mode_is_the_published_rule(response: str, gold: str, verdict: int) -> None:
    assert dapo_score(response, gold) == float(verdict)


@pytest.mark.parametrize("response", [response for row in ACCEPTED for response in row])
def test_the_lenient_mode_accepts_what_the_rule_rejects_for_its_form(response: str) -> None:
    assert dapo_score(response, "34") == 0.0
    assert dapo_score(response, "34", strict=False) == 1.0


@pytest.mark.parametrize("response", ACCEPTED_BY_BOTH)
def test_both_modes_accept_the_form_that_the_prompt_asks_for(response: str) -> None:
    assert dapo_score(response, "34") == 1.0
    assert dapo_score(response, "34", strict=False) == 1.0


@pytest.mark.parametrize("response", [response for row in REJECTED for response in row])
def test_the_lenient_mode_rejects_other_numbers_hedges_ranges_and_expressions(response: str) -> None:
    assert dapo_score(response, "34", strict=False) == 0.0


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        (r"Answer: \dfrac{1}{2}", r"\frac{1}{2}"),
        (r"Answer: $\left(1, 2\right)$.", "(1,2)"),
        (r"**Answer:** \text{Evelyn}", r"\text{Evelyn}"),
        ("Answer: (C)", r"\text{(C)}"),
        (r"\boxed{10,\!080}", "10080"),
        ("Answer: 1,234", "1234"),
        ("Answer: .5", "0.50"),
        ("Answer: −7", "-7"),
        (r"\boxed{1}, \boxed{2}", "1,2"),
        ("Answer: x + y = 3", "x+y=3"),
    ],
)
def test_the_lenient_mode_compares_short_latex_too(response: str, gold: str) -> None:
    assert dapo_score(response, gold, strict=False) == 1.0


def test_an_equation_as_gold_is_not_its_right_side() -> None:
    assert dapo_score("Answer: 0", "5x - 7y + 4 = 0") == 1.0  # the published rule compares what follows "="
    assert dapo_score("Answer: 0", "5x - 7y + 4 = 0", strict=False) == 0.0


@pytest.mark.parametrize("strict", [True, False])
def test_special_tokens_are_no_part_of_the_answer(strict: bool) -> None:
    assert dapo_score(r"<|im_start|>Answer: \boxed{42}<|im_end|>", "42", strict=strict) == 1.0
    assert dapo_score("Answer: 42<|eot_id|>" + "<|endoftext|>" * 100, "42", strict=strict) == 1.0
    assert dapo_score("Answer: 42im_end|>", "42", strict=strict) == 0.0


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**6), 10**6), st.integers(-3, 3), st.sampled_from(["Answer: {}", r"\boxed{{{}}}", "${}$."]))
def test_the_lenient_mode_tells_integers_apart(gold: int, difference: int, form: str) -> None:
    response = form.format(f"{gold + difference:,}")
    assert dapo_score(response, str(gold), strict=False) == float(difference == 0)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["Answer:", "$", r"\text{", r"\boxed{", "}", "frac", "sqrt", "=", "\n", " ", "3", "cm"]))
)
def test_any_text_is_judged_and_a_verdict_is_reached_by_comparing_what_is_reported(parts: list[str]) -> None:
    response = "".join(parts)
    for strict in (True, False):
        reward, answer = judged(response, "3", strict)
        assert (reward == 1.0) == (answer == "3")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("piece", ["9", "$", r"\text{", r"\boxed{", "{", "<|", "Answer: ", "$ ", r"\frac", "=3"])
def test_a_megabyte_of_anything_is_judged_as_response_and_as_gold(piece: str, strict: bool) -> None:
    much = piece * (1_000_000 // len(piece))
    assert dapo_score(much, "42", strict=strict) == 0.0
    assert dapo_score("Answer: 42", much, strict=strict) == 0.0


@pytest.mark.parametrize(
    ("strict", "response", "reported"),
    [
        (True, "Answer: 1,024", (1.0, "1024")),
        (True, "Answer: 7 apples", (-1.0, "7apples")),
        (True, "I do not know.", (-1.0, "")),
        (False, r"\boxed{1024.0}", (1.0, "1024")),
        (False, "**Answer:** $x = 007$", (-1.0, "7")),
        (False, "I do not know.", (-1.0, "")),
    ],
)
def test_the_reward_reports_the_answer_in_one_spelling(
    strict: bool, response: str, reported: tuple[float, str]
) -> None:
    assert judged(response, 1024, strict) == reported


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_prompt_without_an_answer_is_an_error_of_the_data(answer: object) -> None:
    with pytest.raises(RewardError, match="DapoMathReward finds no answer in prompt '7'"):
        judged("Answer: 1", answer, True)


def test_the_reward_runs_in_the_trainers_process() -> None:
    assert DapoMathReward.pooled is False
