"""Pairs of a gold and an answer whose verdict is true by construction: other writings of real golds, and near-misses.

They are made from the text of a gold and from its value as plain Python sees it, never by the code that they test.
"""

from verifier_pairs.pairs import Pair, pairs_of

__all__ = ["Pair", "pairs_of"]
