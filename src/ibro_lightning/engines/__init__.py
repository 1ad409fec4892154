"""Rollout engines: from token ids to sampled token ids and log-probs."""

from ibro_lightning.engines.hf import HFEngine
from ibro_lightning.engines.process import EngineProcess
from ibro_lightning.engines.vllm import VLLMEngine
from ibro_lightning.engines.vllm_server import VLLMServerEngine

__all__ = ["EngineProcess", "HFEngine", "VLLMEngine", "VLLMServerEngine"]
