"""Rollout engines: token ids in, token ids and log-probs out."""

from ibro_lightning.engines.hf import HFEngine

__all__ = ["HFEngine"]
