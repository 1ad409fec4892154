"""Shards the products inside decoder blocks over ranks, by the model's own plan."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ibro_lightning.errors import ConfigError

SETTING = "trainer.strategy.tensor_parallel_size"


def parallelize(model: Any, blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Apply the model's ``base_model_tp_plan`` to its decoder ``blocks`` over ``mesh``, in place. Norms, and everything
    outside the blocks, stay whole.

    Raises:
        ConfigError: the model has no plan or an unsupported one, or its heads do not divide by the mesh's size.
    """
    config = model.config.get_text_config()
    kind, size = type(model).__name__, mesh.size()
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise ConfigError(SETTING, size, f"{kind} has no tensor-parallel plan: write 1")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        number = getattr(config, name, None)
        if isinstance(number, int) and number % size:
            raise ConfigError(SETTING, size, f"{kind} has {name} {number}: write a number that divides it")
    backbone = model.base_model
    inside = {id(module) for block in blocks for module in block.modules()}
    styles: dict[str, ParallelStyle] = {}
    for pattern, style in plan.items():
        path = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        for name, module in backbone.named_modules():
            if id(module) in inside and path.fullmatch(name):
                styles[name] = _style(style, module, config, size, kind)
    if not styles:
        raise ConfigError(SETTING, size, f"the tensor-parallel plan of {kind} fits none of its layers: write 1")
    parallelize_module(backbone, mesh, styles)


def _style(style: str, module: nn.Module, config: Any, size: int, kind: str) -> ParallelStyle:
    if style == "colwise":
        return ColwiseParallel()
    if style == "rowwise":
        return RowwiseParallel()
    weights = list(module.parameters(recurse=False))
    if style == "replicated_with_grad_allreduce" and [w.shape for w in weights] == [(head_dim(config),)]:
        # Norm of each head's queries or keys, [B, L, heads, head_dim]: ranks have different heads and the same weight.
        return SequenceParallel(sequence_dim=2, use_local_output=True)
    raise ConfigError(SETTING, size, f"the tensor-parallel plan of {kind} has a {style} layer, not supported: write 1")


def head_dim(config: Any) -> int:
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
