"""Rollout engines: token ids in, token ids and log-probs out."""

from ibro_lightning.engines.hf import HFEngine
from ibro_lightning.engines.vllm import VLLMEngine

__all__ = ["HFEngine", "VLLMEngine"]
