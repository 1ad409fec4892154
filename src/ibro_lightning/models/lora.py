"""Low-rank adapters (LoRA, arXiv 2106.09685) with peft: only they are trained; all else sees merged weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ibro_lightning.errors import ConfigError, check_count, is_number
from ibro_lightning.models.sharding import decoder_blocks, full_tensor

FIELD = "policy_options.lora"
ADAPTER = "default"
BASE = ".base_layer."


@dataclass(frozen=True)
class LoRAOptions:
    """``W + alpha/rank · B·A`` in place of W, where only A and B are trained. There is no dropout: it would add noise
    to the probability ratio.

    Args:
        rank: rows of A.
        alpha: the adapters' scale is alpha / rank.
        target_modules: names of the linear layers that get an adapter, such as [q_proj, v_proj]; None takes all of
            the decoder blocks. The head (lm_head) can be one if it is a layer of its own, not if it is the embedding.
        seed: of A's initial values; B starts at 0, so the policy starts as the base model.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] | str | None = None  # a string is refused below, with a remedy
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("rank", self.rank, 1)
        if not (is_number(self.alpha) and 0 < self.alpha < math.inf):
            raise ConfigError("alpha", self.alpha, "write a positive number")
        names = self.target_modules
        if names is not None and (not isinstance(names, list | tuple | set) or not names or "all-linear" in names):
            remedy = "write a list such as [q_proj, v_proj], or null for all linear layers of the decoder blocks"
            raise ConfigError("target_modules", str(names), remedy)


def add_adapters(model: Any, options: LoRAOptions, *, empty: bool = False) -> None:
    """Add adapters to a transformers model, in place, and freeze everything else.

    Args:
        empty: leave the adapters on the meta device, for :func:`initial_adapter` to fill.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(FIELD, "given", "peft is missing: pip install 'ibro-lightning[lora]'") from error
    layers = _linear_layers(model)
    if options.target_modules:
        _check_targets(model, options.target_modules)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=sorted(options.target_modules or layers),
        fan_in_fan_out=Conv1D in layers.values(),
        task_type="CAUSAL_LM",
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
    )
    try:
        inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=empty)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{FIELD}.target_modules", options.target_modules, reason) from error
    # Half precision would round small steps away, and adapters need little memory.
    dtype = torch.promote_types(model.dtype, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)
            if not empty:
                parameter.data.copy_(initial_adapter(name, parameter, options))


def _check_targets(model: nn.Module, names: Collection[str]) -> None:
    """Raise :class:`ConfigError` unless every layer that ``names`` match can be merged into weights of its own."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    unmatched = set(names)
    for name, module in model.named_modules():
        matches = {target for target in names if f".{name}".endswith(f".{target}")}
        unmatched -= matches
        if not matches:
            continue
        kind, weight = type(module), getattr(module, "weight", None)
        if not isinstance(module, nn.Linear | Conv1D):
            what = "an embedding" if isinstance(module, nn.Embedding) else f"a {kind.__name__}"
            remedy = f"{name} is {what}, and adapters are for linear layers: leave it out"
            raise ConfigError(f"{FIELD}.target_modules", sorted(names), remedy)
        others = [other for other in owners.get(id(weight), []) if other != name]
        if others:
            remedy = f"the weight of {name} is that of {others[0]} too (tied), which would stay: leave it out"
            raise ConfigError(f"{FIELD}.target_modules", sorted(names), remedy)
    if unmatched:
        remedy = (
            f"the model has no layer {min(unmatched)}: write names such as {', '.join(sorted(_linear_layers(model)))}"
        )
        raise ConfigError(f"{FIELD}.target_modules", sorted(names), remedy)


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def initial_adapter(name: str, parameter: Tensor, options: LoRAOptions) -> Tensor:
    """The initial value of an adapter's parameter, as a whole tensor: a function of seed and name alone."""
    start = torch.zeros(parameter.shape)
    if ".lora_A." in name:
        state = 0xCBF29CE484222325  # FNV-1a, 63 bits: Python's own hash of strings differs between processes
        for digit in (options.seed, *name.encode()):
            state = (state ^ digit) * 0x100000001B3 % (1 << 63)
        generator = torch.Generator().manual_seed(state)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    return start.to(parameter.dtype)


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by the name of the layer that they replace."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights with adapters merged, under the base model's names, one at a time; see :func:`full_tensor`."""
    layers = adapter_layers(model)
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            continue
        layer, _, leaf = name.rpartition(BASE)
        full = full_tensor(tensor)
        if layer in layers and leaf == "weight":
            full = full + _difference(layers[layer]).to(full.dtype)
        yield name.replace(BASE, "."), full


def _difference(layer: Any) -> Tensor:
    """What a layer's adapter adds to its weight, in the adapter's dtype."""
    a, b = full_tensor(layer.lora_A[ADAPTER].weight), full_tensor(layer.lora_B[ADAPTER].weight)
    difference = b @ a * layer.scaling[ADAPTER]
    return difference.T if layer.fan_in_fan_out else difference


def adapter_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapters under peft's names in files, one at a time."""
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            yield f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}", full_tensor(tensor)


def save_adapter(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write a folder that ``PeftModel.from_pretrained`` reads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[ADAPTER].save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _linear_layers(model: Any) -> dict[str, type]:
    """The linear layers in the decoder blocks: the last parts of their names, and their types."""
    return {
        name.rpartition(".")[2]: type(module)
        for block in decoder_blocks(model)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
