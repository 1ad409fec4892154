"""What an engine needs to build an empty copy of the policy, and what a forward pass of it returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, get_args

import torch

from ibro_lightning.errors import ConfigError
from ibro_lightning.types import Dtype


@dataclass(frozen=True)
class ModelSpec:
    """What an engine needs to build an empty copy of the policy; the weights arrive with ``load_weights``."""

    config: Any
    """The transformers ``PretrainedConfig``."""
    eos_token_ids: tuple[int, ...]
    device: torch.device
    trust_remote_code: bool = False

    def plain_config(self) -> Any:
        """A copy of the config whose model returns named logits and nothing else."""
        config = deepcopy(self.config)
        for part, name in _other_outputs(config):
            setattr(part, name, PLAIN_OUTPUTS[name])
        return config


PLAIN_OUTPUTS = {
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}
"""Config keys that decide what a forward pass returns. Router logits (and the loss that transformers computes from
them, which fails while decoding), attentions and hidden states are never read."""


@contextmanager
def plain_outputs(config: Any) -> Iterator[None]:
    """Within, :data:`PLAIN_OUTPUTS` replace the settings of this config; None has no effect."""
    changed = [(part, name, getattr(part, name)) for part, name in _other_outputs(config)]
    try:
        for part, name, _ in changed:
            setattr(part, name, PLAIN_OUTPUTS[name])
        yield
    finally:
        for part, name, value in changed:
            setattr(part, name, value)


def _other_outputs(config: Any) -> list[tuple[Any, str]]:
    """The keys of a config, or of its text model's, that differ from :data:`PLAIN_OUTPUTS`."""
    if config is None:
        return []
    text = config.get_text_config()
    parts = [config] if text is config else [config, text]
    return [
        (part, name) for part in parts for name, plain in PLAIN_OUTPUTS.items() if getattr(part, name, plain) != plain
    ]


def check_dtype(field: str, name: object) -> None:
    """Raise :class:`ConfigError` unless ``name`` is that of a floating-point dtype; float64 is for comparisons."""
    dtype = getattr(torch, str(name), None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(field, name, f"write one of {', '.join(get_args(Dtype))}")
