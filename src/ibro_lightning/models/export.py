"""A model as whole weights under its Hugging Face names, and as a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, distributed, nn

from ibro_lightning.models.lora import (
    BASE,
    adapter_layers,
    adapter_weights,
    merged_weights,
    save_adapter,
)
from ibro_lightning.models.sharding import is_sharded, named_parameters, whole
from ibro_lightning.models.weights import agree


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """``model.state_dict()`` in whole tensors, adapters merged. Sharded ones are gathered when they are asked for, one
    at a time; every rank must ask for all."""
    if adapter_layers(model):
        yield from merged_weights(model)
        return
    for name, tensor in model.state_dict().items():
        yield name, whole(tensor)


def export_folder(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write a Hugging Face folder (``config.json``, ``model.safetensors``, tokenizer) in place of ``folder``.

    Adapters are merged into it, and written as peft keeps them to ``adapter`` beside it. Of a sharded model every rank
    must call this: one tensor at a time is gathered, rank 0 keeps it on the CPU and writes, and all wait for it. Of
    any other model, what ranks but the first ask for is left out.
    """
    if not is_sharded(model):
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            _write(model, tokenizer, folder, _collect(model) if adapter_layers(model) else None, _adapters(model))
        return folder
    weights, adapters = _collect(model), _adapters(model)
    first = distributed.get_rank() == 0
    agree(lambda: _write(model, tokenizer, folder, weights, adapters) if first else None)
    return folder


def _write(
    model: Any, tokenizer: Any, folder: Path, weights: dict[str, Tensor] | None, adapters: dict[str, Tensor]
) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=weights)
    tokenizer.save_pretrained(partial)
    _replace(folder, partial)
    if adapters:
        folder = folder.with_name("adapter")
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_adapter(model, adapters, partial)
        _replace(folder, partial)


def _replace(folder: Path, partial: Path) -> None:
    old = folder.with_name(folder.name + ".old.partial")  # swept away when the run goes on, should it end right here
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _collect(model: nn.Module) -> dict[str, Tensor]:
    """All whole weights on rank 0's CPU, tied ones as one tensor; nothing elsewhere."""
    canonical = {name.replace(BASE, "."): first.replace(BASE, ".") for name, first, _ in named_parameters(model)}
    kept = _on_rank_zero(full_weights(model))
    return {name: kept[canonical.get(name, name)] for name in kept}


def _adapters(model: nn.Module) -> dict[str, Tensor]:
    return _on_rank_zero(adapter_weights(model)) if adapter_layers(model) else {}


def _on_rank_zero(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    kept = {}
    for name, tensor in weights:
        if first:
            kept[name] = tensor.cpu().contiguous()
    return kept
