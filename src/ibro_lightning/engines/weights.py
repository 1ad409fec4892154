"""Which weights an engine must be given, known from the config alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ibro_lightning.types import ModelSpec


def weight_group(name: str) -> str:
    """``head``, ``layer 3`` or the name of whatever else a weight belongs to: what is replaced whole or not at all."""
    if match := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name):
        return f"layer {match[1]}"
    return "head" if re.match(r"(lm_head|embed_out|output)\b", name) else name.rsplit(".", 1)[0]


def weight_shapes(spec: ModelSpec) -> dict[str, torch.Size]:
    """Shape of every weight under its Hugging Face name; tied weights under each of their names."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(spec.config), trust_remote_code=spec.trust_remote_code)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def checked_weights(
    named_tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, torch.Size], *, partial: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """``named_tensors`` as they come, one at a time.

    Raises for a name or shape the model has not, and at the end for those that never came; with ``partial``, for those
    of a group (:func:`weight_group`) of which others came: engines fuse the matrices of a layer.
    """
    missing, groups = dict(shapes), set[str]()
    for name, tensor in named_tensors:
        if name not in shapes:
            raise KeyError(f"the engine's model has no weight {name!r}")
        if tensor.shape != shapes[name]:
            raise ValueError(f"weight {name!r} has shape {tuple(tensor.shape)}, not {tuple(shapes[name])}")
        missing.pop(name, None)
        groups.add(weight_group(name))
        yield name, tensor
    if partial:
        missing = {name: shape for name, shape in missing.items() if weight_group(name) in groups}
    if missing:
        raise KeyError(f"the engine got no new values for {len(missing)} weights, e.g. {min(missing)!r}")
