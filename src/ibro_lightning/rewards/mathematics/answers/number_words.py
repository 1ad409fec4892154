r"""Words that are numbers, or that change or deny the number beside them: the one list of them.

>>> in_signs("negative 5"), in_signs(r"5\text{ squared}"), in_signs("5 divided by 2")
('-5', '5^2', '5/2')
"""

from __future__ import annotations

import re

from ibro_lightning.rewards.mathematics.answers.vocabulary import words

MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_MANY = words("lakh crore score gross googol pair couple double triple quadruple twice thrice half halves nil")
_NUMBERS = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety first third quarter"
)
# Fourths, hundredths, millions, dozens, nines: other numbers than the one before them.
_OF_NUMBERS = re.compile(
    r".*(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|teen|tie|hundred|thousand|illion)ths?|.*illions?|tens"
)
_OPERATIONS = words(
    "plus minus times divided multiplied modulo mod squared square cubed cube factorial sqrt root power powers choose "
    "negative doubled tripled quadrupled halved percent percentage reciprocal inverse imaginary repeating recurring "
    "remainder base binary octal ternary hexadecimal exponent raised infinity"
)
_BOUNDS = words(
    "more less fewer greater larger smaller higher lower bigger over under above below beyond up least most minimum "
    "maximum exceeding exceeds than within between until before after down top bottom bound near short shy"
)
_HEDGES = words(
    "about approximately roughly around nearly almost either or maybe perhaps possibly probably likely might may could "
    "else unless if say guess circa versus vs"
)
DENIALS = words(
    "not no never neither nor none nothing without except excluding besides but cannot hardly barely scarcely wrong "
    "incorrect false impossible invalid incorrectly wrongly unlikely doubt deny denies"
)
CHANGING = DENIALS | _HEDGES | _BOUNDS | _OPERATIONS | _NUMBERS | _MANY | MULTIPLIERS.keys()

_SIGNS = {"plus": "+", "minus": "-", "times": r"\times ", "divided by": "/", "over": "/"}
_POWERS = {"squared": "^2", "cubed": "^3", "factorial": "!"}
_OPEN = r"(?:\\(?:text|mathrm|textrm|mbox)\s*\{\s*)?"
_AT_NUMBER = r"(?=[-0-9.(]|\\(?:frac|sqrt|pi))"
_ANY = re.compile(r"negative|minus|plus|times|divided|over|squared|cubed|factorial")
_SIGN_BEFORE = re.compile(rf"(?:^|(?<=[\s(=,{{]))({_OPEN})(?:negative|minus)\b(\s*\}}?)\s*(?:(?=[a-z]\b)|{_AT_NUMBER})")
_BETWEEN = re.compile(rf"(?<=[0-9)}}])\s*({_OPEN})\b(plus|minus|times|divided by|over)\b(\s*\}}?)\s*{_AT_NUMBER}")
_BEHIND = re.compile(rf"(?<=[0-9)}}a-z])\s*({_OPEN})\b(?<![a-z])(squared|cubed|factorial)\b(\s*\}}?)")


def changes(word: str) -> bool:
    """Whether a word is a number, or changes, bounds or denies the one beside it, as far as such words are known.

    >>> changes("Millions"), changes("isn't"), changes("apples")
    (True, True, False)
    """
    word = word.lower()
    return word in CHANGING or word.removesuffix("s") in CHANGING or denies(word) or bool(_OF_NUMBERS.fullmatch(word))


def denies(word: str) -> bool:
    return word in DENIALS or word.endswith(("n't", "n’t"))


def multiplier(word: str) -> int | None:
    """The factor of a word such as "million"."""
    return MULTIPLIERS.get(word.lower())


def in_signs(text: str) -> str:
    """``text`` with the signs for "negative", "plus", "times", "squared" and the like, where they stand at a number."""
    if not _ANY.search(text):
        return text
    text = _SIGN_BEFORE.sub(lambda match: _kept(match, "-", 2), text)
    text = _BETWEEN.sub(lambda match: _kept(match, _SIGNS[match[2]], 3), text)
    return _BEHIND.sub(lambda match: _kept(match, _POWERS[match[2]], 3), text)


def _kept(match: re.Match[str], sign: str, closing: int) -> str:
    r"""The sign, with the brace that ``\text{`` opened or closed if its partner is not in the match."""
    opened, closed = bool(match[1]), match[closing].strip() == "}"
    if opened == closed:
        return sign
    return match[1] + sign if opened else sign + "}"
