"""Reinforcement learning with verifiable rewards for language models, on PyTorch Lightning.

Importing this package is cheap and pulls in nothing; import what is needed from its parts, e.g.
``from ibro_lightning.functional import group_advantages``.
"""

from ibro_lightning.version import __version__

__all__ = ["__version__"]
