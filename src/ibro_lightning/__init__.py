"""Reinforcement learning with verifiable rewards for language models, on PyTorch Lightning.

Importing the package itself is cheap; import names from its parts, e.g. ``from ibro_lightning.functional import
group_advantages``.
"""

from ibro_lightning.version import __version__

__all__ = ["__version__"]
