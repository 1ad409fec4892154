"""Units: which words are some, and how large each is of its kind."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from ibro_lightning.rewards.mathematics.answers.vocabulary import FUNCTIONS, GREEK, words

Dimension = tuple[tuple[str, int], ...]
"""Base units with their powers, sorted: ``(("m", 1), ("s", -1))``. Unknown things such as apples are their own base."""

# base unit, factor, names
_TABLE = """
m       1               m meter metre
m       1000            km kilometer kilometre
m       1/10            dm
m       1/100           cm centimeter centimetre
m       1/1000          mm millimeter millimetre
m       1/1000000000    nm
m       254/10000       inch inches in
m       3048/10000      foot feet ft
m       9144/10000      yard yd
m       1609344/1000    mile mi
s       1               s sec second
s       1/1000          ms
s       60              min minute
s       3600            h hr hour
s       86400           day
s       604800          week
g       1               g gram
g       1000            kg kilogram
g       1/1000          mg milligram
g       1000000         tonne
ton     1               ton
lb      1               lb lbs pound
lb      1/16            oz ounce
dollar  1               dollar usd buck
dollar  1/100           cent
euro    1               euro
degree  1               degree deg
month   1               month
month   12              year yr
gallon  1               gallon gal
gallon  1/4             quart
gallon  1/8             pint
person  1               person people
man     1               man men
woman   1               woman women
child   1               child children
volt    1               V volt
ampere  1               A ampere amp
kelvin  1               K kelvin
"""
_UNITS: dict[str, tuple[Fraction, Dimension]] = {
    name: (Fraction(factor), ((base, 1),))
    for base, factor, *names in map(str.split, _TABLE.strip().splitlines())
    for name in names
} | {
    "mph": (Fraction(1609344, 3600000), (("m", 1), ("s", -1))),
    "kmh": (Fraction(1000, 3600), (("m", 1), ("s", -1))),
    "kph": (Fraction(1000, 3600), (("m", 1), ("s", -1))),
    "hectare": (Fraction(10000), (("m", 2),)),
    **dict.fromkeys(("cc", "ml", "mL", "milliliter", "millilitre"), (Fraction(1, 10**6), (("m", 3),))),
    **dict.fromkeys(("l", "L", "liter", "litre"), (Fraction(1, 1000), (("m", 3),))),
    **dict.fromkeys(("radian", "rad"), (Fraction(1), ())),
}
_DERIVED: dict[str, tuple[int, Dimension]] = {  # of gram, metre and second
    "N": (1000, (("g", 1), ("m", 1), ("s", -2))),
    "J": (1000, (("g", 1), ("m", 2), ("s", -2))),
    "W": (1000, (("g", 1), ("m", 2), ("s", -3))),
    "Pa": (1000, (("g", 1), ("m", -1), ("s", -2))),
    "Hz": (1, (("s", -1),)),
}
_PREFIXES = {"": Fraction(1), "m": Fraction(1, 1000), "k": Fraction(1000), "M": Fraction(10**6), "G": Fraction(10**9)}
_UNITS |= {
    prefix + name: (factor * size, dimension)
    for name, (size, dimension) in _DERIVED.items()
    for prefix, factor in _PREFIXES.items()
}
_NAMED = {"newton": "N", "joule": "J", "watt": "W", "pascal": "Pa", "hertz": "Hz", "kilojoule": "kJ", "kilowatt": "kW"}
_UNITS |= {name: _UNITS[symbol] for name, symbol in _NAMED.items()}
_MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_FILLING = words("the a an of total each about")
_NOT_UNITS = words(
    "more less than over under nearly almost plus minus times divided modulo squared cubed factorial sqrt root "
    "infinity choose base binary either maybe else possibly perhaps approximately not or and to is if where "
    "when for no wrong negative positive below above point doubled tripled halved zero one two three four five "
    "six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen "
    "twenty thirty forty fifty sixty seventy eighty ninety half halves third thirds quarter quarters but "
    "except without only exactly"
)
"""Words that change the number before them, or make it uncertain."""
# Fourths, hundredths, millions, dozens: other numbers than the one before them.
_OF_NUMBERS = re.compile(
    r".*(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|teen|tie|hundred|thousand|illion)ths?|.*illions?|dozens?|tens|"
    r"hundreds?|thousands?"
)
_BARE = words(
    "cm mm km kg mg ml mph kmh lb lbs oz ft yd hr hrs min sec inch inches feet foot meters meter miles mile hours "
    "hour minutes minute seconds second days day years year dollars dollar cents cent grams gram liters liter sq "
    "square cubic cu units unit in"
)
_TIGHT = words(
    "cm mm km kg mph kmh kph miles mile hours hour minutes minute seconds days years dollars cents inches feet"
)
_ALSO_WORDS = words("in second seconds man men ton child person k n v w j l rad foot pound day")


def is_unit_word(word: str, spaced: bool) -> bool:
    """Whether letters behind a number, without ``\\text``, are a unit's, and no product of symbols."""
    return word in _BARE if spaced else word in _TIGHT


def is_unit_symbol(word: str) -> bool:
    """Whether upright letters behind a number are a unit's: words are, single letters if they are known."""
    return len(word) > 1 or word in _UNITS


def is_unit(word: str) -> bool:
    """Whether a word of a sentence is a unit, and nothing else in English."""
    return word not in _ALSO_WORDS and (word in _UNITS or word.removesuffix("s") in _UNITS)


def multiplier(word: str) -> int | None:
    """The factor of a word such as "million"."""
    return _MULTIPLIERS.get(word.lower())


def measured(parts: list[tuple[str, int]]) -> tuple[Fraction, Dimension] | None:
    """A unit's size and dimension, from words with their powers; None for words that are no unit.

    >>> measured([("km", 1), ("hour", -1)])
    (Fraction(5, 18), (('m', 1), ('s', -1)))
    >>> measured([("apples", 1)]), measured([("more", 1)])
    ((Fraction(1, 1), (('apple', 1),)), None)
    """
    size, dimension = Fraction(1), Counter[str]()
    pending = 1
    for word, power in parts:
        name = word.rstrip(".")
        name = name if name in _UNITS or len(name) <= 3 else name.lower()
        if not _is_possible(name):
            return None
        if name in _POWERS:
            pending = _POWERS[name]
            continue
        if name in _FILLING:
            continue
        factor, base = _unit(name)
        power *= pending
        pending = 1
        size *= factor**power
        for unit, exponent in base:
            dimension[unit] += exponent * power
    for scale in ("celsius", "fahrenheit"):
        if dimension["degree"] == dimension[scale] == 1:
            del dimension["degree"], dimension[scale]
            dimension["degree" + scale[0].upper()] = 1
    return size, tuple(sorted((unit, power) for unit, power in dimension.items() if power))


def _is_possible(name: str) -> bool:
    """Whether a word behind a number can be what it counts or measures, and does not change it."""
    if name in _UNITS or name.removesuffix("s") in _UNITS or name in _POWERS or name in _FILLING:
        return True
    if not re.fullmatch(r"[^\W\d_]{3,}(?:-[^\W\d_]+)*", name):
        return False
    return name not in _NOT_UNITS | FUNCTIONS | GREEK and not _OF_NUMBERS.fullmatch(name)


def _unit(name: str) -> tuple[Fraction, Dimension]:
    for candidate in (name, name.removesuffix("s"), name.removesuffix("es")):
        if candidate in _UNITS:
            return _UNITS[candidate]
    if name.endswith("ies"):
        singular = name[:-3] + "y"
    elif name.endswith(("xes", "ches", "shes", "sses")):
        singular = name[:-2]
    else:
        singular = name if name.endswith("ss") else name.removesuffix("s")
    return Fraction(1), ((singular, 1),)
