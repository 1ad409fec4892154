"""Which weights an engine must be given, known from the config alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ibro_lightning.types import ModelSpec


def weight_shapes(spec: ModelSpec) -> dict[str, torch.Size]:
    """Shape of every weight under its Hugging Face name; tied weights under each of their names."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(spec.config), trust_remote_code=spec.trust_remote_code)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def checked_weights(
    named_tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, torch.Size], *, partial: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """``named_tensors`` as they come, one at a time; raises for a name or shape the model has not, and, unless
    ``partial``, at the end for those that never came."""
    missing = dict(shapes)
    for name, tensor in named_tensors:
        if name not in shapes:
            raise KeyError(f"the engine's model has no weight {name!r}")
        if tensor.shape != shapes[name]:
            raise ValueError(f"weight {name!r} has shape {tuple(tensor.shape)}, not {tuple(shapes[name])}")
        missing.pop(name, None)
        yield name, tensor
    if missing and not partial:
        raise KeyError(f"the engine got no new values for {len(missing)} weights, e.g. {min(missing)!r}")
