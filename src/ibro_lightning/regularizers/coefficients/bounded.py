"""Clip ratios: numbers, or coefficients that move them."""

from __future__ import annotations

import math

from ibro_lightning.errors import ConfigError, is_number
from ibro_lightning.regularizers.coefficients import Coefficient, as_coefficient


class ClipRatio:
    """A clip ratio ε, above 0 and below ``limit``, at every value that it takes.

    Args:
        setting: its name in a recipe.
        ratio: a number, or a coefficient, which is given the policy's entropy before every update.
        limit: upper limit.
        included: whether ε may be equal to the limit.

    Raises:
        ConfigError: a number is out of these bounds; or a coefficient could come to be (:attr:`.Coefficient.bounds`),
            or is.
    """

    def __init__(
        self, setting: str, ratio: Coefficient | float, limit: float = math.inf, *, included: bool = True
    ) -> None:
        self.setting, self.limit, self.included = setting, limit, included
        if not isinstance(ratio, Coefficient) and not self.allows(ratio):
            raise ConfigError(setting, ratio, self.remedy)
        self.ratio = as_coefficient(ratio, setting, "entropy") if isinstance(ratio, Coefficient) else ratio
        if isinstance(ratio, Coefficient):
            for value in ratio.bounds or (ratio.value,):
                if not self.allows(value):
                    what = f"it can come to be {value:g} ({self.remedy}): bound it by its settings"
                    raise ConfigError(setting, type(ratio).__name__, what)

    @property
    def value(self) -> float:
        """The present ε."""
        if not isinstance(self.ratio, Coefficient):
            return self.ratio
        value = self.ratio.value
        if not self.allows(value):
            what = f"{type(self.ratio).__name__} has moved it there ({self.remedy}): bound it by its settings"
            raise ConfigError(self.setting, value, what)
        return value

    def allows(self, value: float) -> bool:
        """Whether ``value`` is a number within the bounds."""
        if not is_number(value):
            return False
        return 0 < value < self.limit or (self.included and math.isclose(value, self.limit))  # schedules round

    @property
    def remedy(self) -> str:
        """What to write instead."""
        if self.limit == math.inf:
            return "write a positive number, such as 0.28"
        return f"write a number between 0 and {self.limit:g}, such as 0.2"
