"""No regularisation: the published DAPO."""

from __future__ import annotations

from ibro_lightning.regularizers.base import PolicyLossMethod
from ibro_lightning.regularizers.method import Method


class NoRegularizer(PolicyLossMethod):
    """The loss is the policy gradient alone. Entropy is still measured, for the curves."""

    method = Method(
        formula="the policy loss alone; entropy is still measured",
        source="arXiv 2503.14476",
        certainty="paper",
        recipe="regularizer: null",
    )
    reads_old_entropy = False
