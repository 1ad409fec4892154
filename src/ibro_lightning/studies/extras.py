"""What studies need beyond the package's own dependencies: scipy, statsmodels and matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ibro_lightning.errors import ConfigError


@contextmanager
def extra_packages() -> Iterator[None]:
    """Context of the imports of optional packages; where one is missing, a :class:`ConfigError` says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        remedy = "this package is missing: studies need `pip install ibro-lightning[studies]`"
        raise ConfigError("studies", error.name, remedy) from error
