"""Reinforcement learning with verifiable rewards for language models, on PyTorch Lightning.

Importing the package itself is cheap; import names from its parts, e.g. ``from ibro_lightning.functional import
group_advantages``.
"""

__version__ = "0.2.0"
