"""Names and shapes of the weights that an engine must receive, derived from the config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ibro_lightning.errors import RolloutError
from ibro_lightning.models.spec import ModelSpec


def weight_group(name: str) -> str:
    """The group of weights that must be replaced as a whole: ``head``, ``layer 3`` or another module's name."""
    if match := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name):
        return f"layer {match[1]}"
    return "head" if re.match(r"(lm_head|embed_out|output)\b", name) else name.rsplit(".", 1)[0]


def weight_shapes(spec: ModelSpec) -> dict[str, torch.Size]:
    """The shape of every weight by Hugging Face name; tied weights appear under each of their names."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(spec.config), trust_remote_code=spec.trust_remote_code)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def checked_weights(
    named_tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, torch.Size], *, partial: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``named_tensors`` unchanged; raises :class:`RolloutError` for an unknown name or wrong shape or, at the
    end, missing weights.

    With ``partial``, groups (:func:`weight_group`) may be missing, but must be complete, because engines fuse the
    matrices of a layer.
    """
    missing, groups = dict(shapes), set[str]()
    for name, tensor in named_tensors:
        if name not in shapes:
            raise RolloutError(f"the engine's model has no weight {name!r}")
        if tensor.shape != shapes[name]:
            raise RolloutError(f"weight {name!r} has shape {tuple(tensor.shape)}, not {tuple(shapes[name])}")
        missing.pop(name, None)
        groups.add(weight_group(name))
        yield name, tensor
    if partial:
        missing = {name: shape for name, shape in missing.items() if weight_group(name) in groups}
    if missing:
        raise RolloutError(f"the engine got no new values for {len(missing)} weights, e.g. {min(missing)!r}")
