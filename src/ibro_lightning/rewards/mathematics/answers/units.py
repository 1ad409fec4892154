"""Units: which words are some, and how large each is of its kind."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from ibro_lightning.rewards.mathematics.answers.nouns import ADJECTIVES, NOUNS, noun, singulars
from ibro_lightning.rewards.mathematics.answers.number_words import changes
from ibro_lightning.rewards.mathematics.answers.vocabulary import CURRENCIES, FUNCTIONS, GREEK, words

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
dollar  1               dollar usd USD buck
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
degreeC 1               degreeC celsius centigrade
degreeF 1               degreeF fahrenheit
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
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_FILLING = words("the a an of total each")
_BASES = {base for _, dimension in _UNITS.values() for base, _ in dimension} | set(CURRENCIES.values())
_BARE = words(
    "cm mm km kg mg ml mph kmh lb lbs oz ft yd hr hrs min sec inch inches feet foot meters meter miles mile hours "
    "hour minutes minute seconds second days day years year dollars dollar cents cent grams gram liters liter sq "
    "square cubic cu units unit in"
)
_TIGHT = words(
    "cm mm km kg mph kmh kph miles mile hours hour minutes minute seconds days years dollars cents inches feet"
)
_ALSO_WORDS = words("in second k n v w j l K")


def is_unit_word(word: str, spaced: bool) -> bool:
    """Whether letters behind a number, without ``\\text``, are a unit's, and no product of symbols."""
    return word in _BARE if spaced else word in _TIGHT


def is_unit_symbol(word: str) -> bool:
    """Whether upright letters behind a number are a unit's: words are, single letters if they are known."""
    return len(word) > 1 or word in _UNITS


def is_unit(word: str) -> bool:
    """Whether a word of a sentence is a unit, or a noun that is counted, and nothing else in English."""
    known = noun(word) is not None or any(singular in _UNITS for singular in singulars(word))
    return known and word not in _ALSO_WORDS


def is_known(dimension: Dimension) -> bool:
    """Whether a unit is one that does not change the number before it, so that it may be left out: all its words are
    known, and they are not adjectives alone.

    >>> [is_known(tuple((name, 1) for name in names.split())) for names in ("apple", "apple red", "red", "lakh")]
    [True, True, False, False]
    """
    names = {name for name, _ in dimension}
    return not names - _BASES - NOUNS - ADJECTIVES and (not names or bool(names - ADJECTIVES))


def measured(parts: list[tuple[str, int]]) -> tuple[Fraction, Dimension] | None:
    """A unit's size and dimension, from words with their powers; None for words that are no unit, or change the number.

    A word that is not known is a dimension of its own (see :func:`is_known`).

    >>> measured([("km", 1), ("hour", -1)])
    (Fraction(5, 18), (('m', 1), ('s', -1)))
    >>> measured([("apples", 1)]), measured([("more", 1)])
    ((Fraction(1, 1), (('apple', 1),)), None)
    """
    size, dimension = Fraction(1), Counter[str]()
    pending, named = 1, False
    for place, (word, power) in enumerate(parts):
        name = word.rstrip(".")
        if name == "ordered" and place + 1 < len(parts):  # the one kind of pairs that are no two things each
            continue
        if name.startswith("pair") and place and parts[place - 1][0] == "ordered":
            name = "tuple"
        name = name if name in _UNITS or len(name) <= 3 else name.lower()
        if name in _POWERS:
            pending = _POWERS[name]
            continue
        if name in _FILLING:
            continue
        if not _is_possible(name):
            return None
        factor, base = _unit(name)
        power *= pending
        pending, named = 1, True
        size *= factor**power
        for unit, exponent in base:
            dimension[unit] += exponent * power
    for scale in ("degreeC", "degreeF"):
        if dimension["degree"] == dimension[scale] == 1:
            del dimension["degree"]
    found = tuple(sorted((unit, power) for unit, power in dimension.items() if power))
    return (size, found) if named and (is_known(found) or not set(dict(found)) <= ADJECTIVES) else None


def _is_possible(name: str) -> bool:
    """Whether a word behind a number can be what it counts or measures, and does not change it as far as we know."""
    if name in ADJECTIVES or noun(name) or any(singular in _UNITS for singular in singulars(name)):
        return True
    if not re.fullmatch(r"[^\W\d_]{3,}(?:-[^\W\d_]+)*", name):
        return False
    return name not in FUNCTIONS | GREEK and not any(map(changes, name.split("-")))


def _unit(name: str) -> tuple[Fraction, Dimension]:
    for candidate in singulars(name):
        if candidate in _UNITS:
            return _UNITS[candidate]
    return Fraction(1), ((name if name in ADJECTIVES else noun(name) or _singular(name), 1),)


def _singular(name: str) -> str:
    """One spelling for the singular and plural of a noun that is not in the list."""
    if match := re.fullmatch(r"(.*)(?:ies|ie)", name):
        return match[1] + "y"
    if match := re.fullmatch(r"(.*(?:ss|x|z|ch|sh|o))es", name):
        return match[1]
    return name if name.endswith(("ss", "us", "is")) else name.removesuffix("s")
