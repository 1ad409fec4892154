"""The words and signs that the grammar of answers knows."""

from __future__ import annotations


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


RELATIONS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in", r"\equiv": "=="}
SETS = {r"\cup": "union", r"\cap": "intersection", r"\setminus": "difference"}
OPENING = {"(": ")", "[": "]", r"\langle": r"\rangle", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
SEPARATORS = words(r", ; and or \lor \vee \land \wedge")
FUNCTIONS = words(
    "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh coth ln log lg exp max min gcd lcm abs floor "
    "ceil det sgn Re Im arg cbrt deg dim ker Gamma cis"
)
INVERTIBLE = words("sin cos tan cot sec csc sinh cosh tanh coth")
"""Functions of which the exponent −1 means the inverse."""
CONSTANTS = {r"\pi": "pi", r"\infty": "inf"}
GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar aleph vartheta varrho"
)
MARKS = words(r"\angle \triangle \measuredangle \square \circ \perp \parallel \odot")
ACCENTS = words(r"\vec \hat \bar \tilde \overline \overrightarrow \widehat \dot \overleftrightarrow")
CURRENCIES = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen"}
APPLIED = frozenset("fghFGH")
"""Letters that a bracket makes a function; others it multiplies."""
BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "sixteen": 16,
}
# Words that are mathematics without a backslash.
PLAIN = {
    **{
        name: f"\\{name}"
        for name in words("sqrt cbrt sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp")
    },
    **{name: f"\\{name}" for name in words("pi gcd lcm max min floor ceil abs frac cis theta alpha beta gamma phi")},
    **{name: f"\\{name}" for name in words("lambda mu sigma delta omega epsilon tau rho")},
    **dict.fromkeys(words("infinity Infinity inf oo"), r"\infty"),
    "asin": r"\arcsin",
    "acos": r"\arccos",
    "atan": r"\arctan",
    "union": r"\cup",
    **dict.fromkeys((*words("percent percentage pct"), "per cent"), r"\%"),
    **dict.fromkeys(words("degrees degree deg"), r"\degree"),
}
JOINING = {"and": "and", "or": "or", "AND": "and", "OR": "or"}
LOGIC = {r"\lor": "or", r"\vee": "or", r"\land": "and", r"\wedge": "and"}
SHORT_WORDS = words(
    "no yes all any odd one two six ten not the for if is of to in on at by as it per sun mon tue wed thu fri sat jan "
    "feb mar apr may jun jul aug sep oct nov dec red am pm dne nan"
)
"""Words of at most three letters, which are no products of symbols."""
