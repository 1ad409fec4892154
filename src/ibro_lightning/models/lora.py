"""Low-rank adapters (LoRA, arXiv 2106.09685) with peft: only they learn, and the world sees merged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.models.sharding import decoder_blocks, whole

SETTING = "model.policy_options.lora"
ADAPTER = "default"
BASE = ".base_layer."


@dataclass(frozen=True)
class LoRAOptions:
    """``W + alpha/rank · B·A`` in place of W, where only A and B learn. There is no dropout: it would be noise in the
    probability ratio.

    Args:
        rank: rows of A.
        alpha: the adapters' scale is alpha / rank.
        target_modules: names of the linear layers that get an adapter, such as [q_proj, v_proj]; None takes all of
            the decoder blocks.
        seed: of A's initial values; B starts at 0, so the policy starts as the base model.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(f"{SETTING}.rank", self.rank, 1)
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"{SETTING}.alpha", self.alpha, "write a positive number")


def add_adapters(model: Any, options: LoRAOptions, *, empty: bool = False) -> None:
    """Put adapters into a transformers model, in place, and freeze all else.

    Args:
        empty: leave the adapters on the meta device, for :func:`initial_adapter` to fill.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(SETTING, "given", "peft is missing: pip install 'ibro-lightning[lora]'") from error
    layers = _linear_layers(model)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=options.target_modules or sorted(layers),
        fan_in_fan_out=Conv1D in layers.values(),
        task_type="CAUSAL_LM",
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
    )
    try:
        inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=empty)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{SETTING}.target_modules", options.target_modules, reason) from error
    # In half precision a small step would be lost in the rounding, and adapters are small.
    dtype = torch.promote_types(model.dtype, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)
            if not empty:
                parameter.data.copy_(initial_adapter(name, parameter, options))


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def initial_adapter(name: str, parameter: Tensor, options: LoRAOptions) -> Tensor:
    """The whole tensor that an adapter's parameter starts as, a function of seed and name alone."""
    start = torch.zeros(parameter.shape)
    if ".lora_A." in name:
        digits = [options.seed, *name.encode()]
        generator = torch.Generator().manual_seed(_mix(digits))
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    return start.to(parameter.dtype)


def _mix(values: list[int]) -> int:
    """FNV-1a, 63 bits: Python's own hash of text differs from process to process."""
    state = 0xCBF29CE484222325
    for value in values:
        state = (state ^ value) * 0x100000001B3 % (1 << 63)
    return state


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by the name of the layer that they stand for."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that the adapters amount to, under the base model's names, one at a time; see ``whole``."""
    layers = adapter_layers(model)
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            continue
        layer, _, leaf = name.rpartition(BASE)
        full = whole(tensor)
        if layer in layers and leaf == "weight":
            full = full + _difference(layers[layer]).to(full.dtype)
        yield name.replace(BASE, "."), full


def _difference(layer: Any) -> Tensor:
    """What a layer's adapter adds to its weight, in the adapter's dtype."""
    a, b = whole(layer.lora_A[ADAPTER].weight), whole(layer.lora_B[ADAPTER].weight)
    difference = b @ a * layer.scaling[ADAPTER]
    return difference.T if layer.fan_in_fan_out else difference


def adapter_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapters under the names that peft saves them with, one at a time."""
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            yield f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}", whole(tensor)


def save_adapter(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write a folder that ``PeftModel.from_pretrained`` reads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model.peft_config[ADAPTER].save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _linear_layers(model: Any) -> dict[str, type]:
    """The last names of the linear layers in the decoder blocks, and what they are."""
    return {
        name.rpartition(".")[2]: type(module)
        for block in decoder_blocks(model)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
