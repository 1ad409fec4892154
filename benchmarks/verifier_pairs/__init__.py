"""Pairs of a gold and an answer whose verdict is true by construction: other writings and near-misses, of real golds
(``pairs_of``) and of golds that we write ourselves (``own_pairs``).

They are made from the text of a gold and from its value as plain Python sees it, or from the parts of a gold of our
own, never by the code that they test. ``checks.py`` confirms labels by sympy.
"""

from verifier_pairs.own_golds import own_pairs
from verifier_pairs.pairs import Pair, pairs_of

__all__ = ["Pair", "own_pairs", "pairs_of"]
