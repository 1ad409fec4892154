"""Finds the linear head of a causal language model, and verifies that it is nothing but linear."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ibro_lightning.functional import HeadFunctional, linear_head
from ibro_lightning.models.spec import plain_outputs
from ibro_lightning.models.transformer import backbone_of, run

# Gemma's, RecurrentGemma's and xLSTM's names of a cap on logits, but not of one on attention.
SOFT_CAP = re.compile(r"(?!att).*logits?_soft_?cap.*")


@dataclass(frozen=True)
class LinearHead:
    """``logits = scale · (hidden @ weight.T + bias)``: gives log-probs and entropies without the logits."""

    backbone: nn.Module
    linear: nn.Linear
    scale: float

    def evaluate(
        self,
        hidden: Tensor,
        targets: Tensor,
        functionals: Mapping[str, HeadFunctional],
        *,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """``(logp [N], entropy [N] or None, {name: value [N]})`` of ``hidden [N, D]``."""
        return linear_head(
            hidden,
            self.linear.weight,
            targets,
            functionals,
            bias=self.linear.bias,
            temperature=temperature / self.scale,
            with_entropy=with_entropy,
        )


def find_linear_head(model: Any) -> LinearHead | None:
    """The model's head, if it is a plain linear layer, possibly with a constant factor (Cohere, Granite).

    Verified on a few tokens: the model's logits must be ``scale · head(hidden)``. Otherwise (soft-capping, adapters,
    several heads) returns None with a warning, and the full logits are needed.
    """
    head, reason = _inspect(model)
    if head is None:
        warnings.warn(
            f"{type(model).__name__}: {reason}; log-probs and entropies are computed from full logits, "
            "which takes more memory",
            stacklevel=2,
        )
    return head


def _inspect(model: Any) -> tuple[LinearHead | None, str]:
    backbone = backbone_of(model)
    linear = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if backbone is None or type(linear) is not nn.Linear:
        return None, "its head is not a plain linear layer"
    # A soft cap on small logits is lost in rounding, so its name is checked too.
    config = model.config.get_text_config()
    if caps := [name for name, value in vars(config).items() if SOFT_CAP.fullmatch(name) and value]:
        return None, f"its logits are soft-capped ({caps[0]})"
    scale = _measure_scale(model, backbone, linear)
    if scale is None:
        return None, "its logits are not a multiple of its head's output"
    return LinearHead(backbone, linear, scale), ""


@torch.no_grad()
def _measure_scale(model: Any, backbone: nn.Module, linear: nn.Linear) -> float | None:
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(8, device=linear.weight.device).remainder(vocabulary)[None]
    with plain_outputs(model.config):
        output = backbone(input_ids=tokens, use_cache=False)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:  # an adapter's "base model" is a language model again
        return None
    output.last_hidden_state = hidden.to(linear.weight.dtype)
    # Only the head from here on, without the autocast that attention may need: its rounding would blur a factor.
    with torch.autocast(tokens.device.type, enabled=False), patch.object(backbone, "forward", lambda *_, **__: output):
        logits = run(model, "logits", input_ids=tokens).double()
        plain = linear(output.last_hidden_state).double()
    size = plain.square().sum()
    scale = float((logits * plain).sum() / size) if size > 0 else 1.0
    tolerance = 4 * torch.finfo(linear.weight.dtype).eps * float(logits.abs().max())
    if scale <= 0 or float((logits - scale * plain).abs().max()) > tolerance:
        return None
    return 1.0 if abs(scale - 1.0) < 1e-3 else scale
