"""``python -m ibro_lightning verify GOLD RESPONSE``: how the symbolic verifier reads and judges one response."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ibro_lightning.errors import ConfigError
from ibro_lightning.rewards.mathematics.answers.rendering import printed
from ibro_lightning.rewards.mathematics.answers.rules import UNITS
from ibro_lightning.rewards.mathematics.gold_text import gold_texts
from ibro_lightning.rewards.mathematics.readings import Reading
from ibro_lightning.rewards.mathematics.symbolic import EQUALITIES, MathVerifyReward
from ibro_lightning.runs.arguments import OneLineArguments

_MARKED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\fbox|(?i:answer)")
_WITH_VALUE = ("--precision", "--units", "--equality")


def main(argv: Sequence[str]) -> bool:
    """Run the command; returns whether the response is right."""
    parser = OneLineArguments(prog="python -m ibro_lightning verify", description=__doc__)
    parser.add_argument("gold", help="the right answer, as LaTeX or text")
    parser.add_argument("response", help="a response, or an answer alone: $…$ and \\boxed{…} are formulas")
    parser.add_argument("--precision", type=int, default=6, help="decimals from which a number may be rounded")
    parser.add_argument("--units", choices=UNITS, default="agree", help="whether units may be left out or differ")
    parser.add_argument("--order", action="store_true", help="entries of a list in the gold's order")
    parser.add_argument("--simplified", action="store_true", help="no more operations than the gold")
    parser.add_argument("--equality", choices=EQUALITIES, default="rules", help="library: math-verify's own")
    options = parser.parse_args(_answers_last(argv))
    reward = MathVerifyReward(
        precision=options.precision,
        units=options.units,
        order=options.order,
        simplified=options.simplified,
        equality=options.equality,
    )
    try:
        golds = gold_texts(options.gold)
        response = options.response
        if not _MARKED.search(response):  # an answer alone
            response = f"Answer: {response}"
        verdict = reward.judged(response, golds)
    except ValueError as error:
        raise ConfigError("gold", options.gold, str(error)) from error
    gold, found = reward.readings(response, golds[0])
    print(f"{'right' if verdict.accuracy else 'wrong'}: {verdict.why}")
    print(f"gold    {_shown(gold)}")
    print(f"answer  {_shown(found)}")
    return bool(verdict.accuracy)


def _answers_last(argv: Sequence[str]) -> list[str]:
    """The arguments with gold and response behind "--", since an answer may begin with a minus sign."""
    options: list[str] = []
    answers = list[str]()
    rest = iter(argv)
    for argument in rest:
        if argument.startswith("--") and argument[2:3].isalpha():
            options.append(argument)
            if argument in _WITH_VALUE:
                options += [value for value in [next(rest, None)] if value is not None]
        elif argument == "-h":
            options.append(argument)
        elif argument != "--":
            answers.append(argument)
    return [*options, "--", *answers] if answers else options


def _shown(reading: Reading | None) -> str:
    if reading is None:
        return "none found"
    if reading.node is not None:
        return printed(reading.node)
    return f"{reading.text}    (read by math-verify)" if reading.library is not None else f'"{reading.text}"'
