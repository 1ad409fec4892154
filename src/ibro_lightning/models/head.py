"""Which part of a causal language model turns hidden states into logits, and whether it does only that."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ibro_lightning.functional import linear_logprob_entropy
from ibro_lightning.models.transformer import backbone_of

# Gemma's, RecurrentGemma's and xLSTM's names, but not that of a cap on attention.
SOFT_CAP = re.compile(r"(?!att).*logits?_soft_?cap.*")


@dataclass(frozen=True)
class LinearHead:
    """``logits = scale · (hidden @ weight.T + bias)``: enough for log-probs and entropies without the logits."""

    backbone: nn.Module
    linear: nn.Linear
    scale: float

    def logprob_entropy(
        self, hidden: Tensor, targets: Tensor, *, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``(logp [N], entropy [N] or None)`` of ``hidden [N, D]``."""
        return linear_logprob_entropy(
            hidden,
            self.linear.weight,
            targets,
            bias=self.linear.bias,
            temperature=temperature / self.scale,
            with_entropy=with_entropy,
        )


def find_linear_head(model: Any) -> LinearHead | None:
    """The model's head, if it is a plain linear layer, possibly with a constant factor (Cohere, Granite).

    Not trusted but tried: on a few tokens, ``scale · head(hidden)`` must be what the model gives as logits. Otherwise
    (soft-capping, adapters, several heads) the answer is None, said once, and full logits are to be computed.
    """
    head, reason = _look(model)
    if head is None:
        warnings.warn(
            f"{type(model).__name__}: {reason}; log-probs and entropies are computed from full logits, "
            "which takes more memory",
            stacklevel=2,
        )
    return head


def _look(model: Any) -> tuple[LinearHead | None, str]:
    backbone = backbone_of(model)
    linear = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if backbone is None or type(linear) is not nn.Linear:
        return None, "its head is not a plain linear layer"
    # At small logits a soft cap hides within rounding, so it is looked for by name as well.
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
    output = backbone(input_ids=tokens, use_cache=False)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:  # an adapter's "base model" is a language model again
        return None
    output.last_hidden_state = hidden.to(linear.weight.dtype)
    # From here on the head alone, and exactly: autocast, which the attention may need, would blur a factor.
    with torch.autocast(tokens.device.type, enabled=False), patch.object(backbone, "forward", lambda *_, **__: output):
        logits = model(input_ids=tokens, use_cache=False).logits.double()
        plain = linear(output.last_hidden_state).double()
    size = plain.square().sum()
    scale = float((logits * plain).sum() / size) if size > 0 else 1.0
    tolerance = 4 * torch.finfo(linear.weight.dtype).eps * float(logits.abs().max())
    if scale <= 0 or float((logits - scale * plain).abs().max()) > tolerance:
        return None
    return 1.0 if abs(scale - 1.0) < 1e-3 else scale
