"""Settings with bounds, such as clip ratios: numbers, or coefficients that move within them."""

from __future__ import annotations

import math

from ibro_lightning.errors import ConfigError, is_number
from ibro_lightning.regularizers.coefficients.base import Coefficient, as_coefficient


class BoundedSetting:
    """A number that is above one bound and below another at every value that it takes.

    Args:
        setting: its name in a recipe.
        number: a plain one, or a coefficient, which is given the policy's entropy before every update.
        above: lower bound, which it may not be equal to.
        limit: upper bound.
        included: whether it may be equal to the upper bound.
        example: a number to suggest where another is refused.

    Raises:
        ConfigError: a number is out of these bounds; or a coefficient could leave them (:attr:`.Coefficient.bounds`),
            or is.
    """

    def __init__(
        self,
        setting: str,
        number: Coefficient | float,
        *,
        above: float = 0.0,
        limit: float = math.inf,
        included: bool = True,
        example: str,
    ) -> None:
        self.setting, self.above, self.limit, self.included, self.example = setting, above, limit, included, example
        if not isinstance(number, Coefficient) and not self.allows(number):
            raise ConfigError(setting, number, self.remedy)
        self.number = as_coefficient(number, setting, "entropy") if isinstance(number, Coefficient) else number
        if isinstance(number, Coefficient):
            for value in number.bounds or (number.value,):
                if not self.allows(value):
                    what = f"it can become {value:g} ({self.remedy}): bound it by its settings"
                    raise ConfigError(setting, type(number).__name__, what)

    @property
    def value(self) -> float:
        """The present number."""
        if not isinstance(self.number, Coefficient):
            return self.number
        value = self.number.value
        if not self.allows(value):
            what = f"{type(self.number).__name__} has moved it there ({self.remedy}): bound it by its settings"
            raise ConfigError(self.setting, value, what)
        return value

    def allows(self, value: float) -> bool:
        """Whether ``value`` is a number within the bounds."""
        if not is_number(value):
            return False
        return self.above < value < self.limit or (self.included and math.isclose(value, self.limit))  # schedules round

    @property
    def coefficients(self) -> dict[str, Coefficient]:
        """The coefficient by the setting's name; none for a plain number, which has neither state nor curve."""
        return {self.setting: self.number} if isinstance(self.number, Coefficient) else {}

    @property
    def remedy(self) -> str:
        """What to write instead."""
        if self.limit == math.inf:
            kind = f"number above {self.above:g}" if self.above else "positive number"
            return f"write a {kind}, such as {self.example}"
        span = f"above {self.above:g} and up to" if self.included else f"between {self.above:g} and"
        return f"write a number {span} {self.limit:g}, such as {self.example}"
