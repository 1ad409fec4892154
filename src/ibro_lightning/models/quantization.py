"""Refuses quantized weights, which cannot be trained; a config that merely mentions them is fine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from transformers.quantizers import AutoHfQuantizer

from ibro_lightning.errors import ConfigError
from ibro_lightning.models.stored import StoredWeights
from ibro_lightning.ranks import rank_zero_warn

FIELD = "quantization_config"
PLAIN = {"F64", "F32", "F16", "BF16"}


def take_quantization(config: Any, look: Callable[[], StoredWeights | None], path: str) -> Any:
    """Remove ``quantization_config`` from ``config``, and return it if the weights on disk are quantized.

    Args:
        look: returns the weights.
    """
    if not hasattr(config, FIELD):
        return None
    quantization = getattr(config, FIELD)
    delattr(config, FIELD)
    weights = look() if quantization else None
    if weights is None:
        return quantization or None
    if any(weights.dtype(name) not in PLAIN for name in weights.names):
        return quantization
    rank_zero_warn(f"{path}: config.json has a {FIELD}, but the weights are not quantized: it is left out")
    return None


def refuse_quantized(setting: str, path: str) -> NoReturn:
    raise ConfigError(setting, path, "its weights are quantized, and cannot be trained: name an unquantized copy")


def forget_quantization(model: Any, quantization: Any, setting: str, path: str) -> None:
    """Turn a model that was dequantized while it was loaded into an ordinary one.

    Raises:
        ConfigError: it is still quantized.
    """
    supported = AutoHfQuantizer.supports_quant_method(quantization)
    if not supported or not all(p.dtype.is_floating_point and p.itemsize > 1 for p in model.parameters()):
        refuse_quantized(setting, path)
    model.hf_quantizer = None
    if hasattr(model.config, FIELD):
        delattr(model.config, FIELD)
