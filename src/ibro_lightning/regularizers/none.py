"""No regularisation: the published DAPO."""

from __future__ import annotations

from ibro_lightning.regularizers.base import PolicyLossMethod


class NoRegularizer(PolicyLossMethod):
    """The loss is the policy gradient alone. Entropy is still measured, for the curves."""

    reads_old_entropy = False
