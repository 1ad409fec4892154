"""The policy network: scores responses, hands out its weights, becomes a Hugging Face folder."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ibro_lightning.functional import logprob_and_entropy
from ibro_lightning.sequences import Sequences


class Policy(nn.Module):
    """A causal language model that scores the response tokens of a batch.

    Dropout is switched off for good: with it, the probability ratio to the sampling policy would be noise. The module
    can therefore stay in train mode, which gradient checkpointing needs.
    """

    def __init__(self, model: Any, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        remove_dropout(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._parameters_of_forward = frozenset(inspect.signature(model.forward).parameters)
        self.train()

    def forward(
        self, sequences: Sequences, *, temperature: float, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies of the response tokens, response-aligned.

        Args:
            sequences: ``[B, L]`` tokens, padded on either side.
            temperature: the sampling temperature the responses came from.

        Returns:
            ``(logp [B, T], entropy [B, T] or None)`` in nats, 0 on padding; float32, or float64 for float64
            weights.
        """
        # The token at position i is predicted at i − 1: look one step ahead of every response token.
        predicts_response = sequences.is_response.roll(-1, dims=1)
        predicts_response[:, -1] = False
        targets = sequences.input_ids[sequences.is_response]
        first = int(predicts_response.any(dim=0).float().argmax())
        logits = self._logits(sequences, keep_from=first)[predicts_response[:, first:]]
        logp, entropy = logprob_and_entropy(logits, targets, temperature=temperature, with_entropy=with_entropy)
        mask = sequences.response_mask
        return _scatter(logp, mask), None if entropy is None else _scatter(entropy, mask)

    def named_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Detached weights under their Hugging Face names; tied weights appear under each of their names."""
        for name, tensor in self.model.state_dict().items():
            yield name, tensor.detach()

    def _logits(self, sequences: Sequences, *, keep_from: int) -> Tensor:
        """``[B, L − keep_from, V]``; models that can do so skip the head on the positions before."""
        kwargs: dict[str, Any] = {"attention_mask": sequences.attention_mask, "use_cache": False}
        if "position_ids" in self._parameters_of_forward:
            kwargs["position_ids"] = sequences.position_ids
        if "logits_to_keep" not in self._parameters_of_forward:
            return self.model(input_ids=sequences.input_ids, **kwargs).logits[:, keep_from:]
        keep = sequences.input_ids.shape[1] - keep_from
        return self.model(input_ids=sequences.input_ids, logits_to_keep=keep, **kwargs).logits


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout probability in ``model`` to 0, in modules and in the attributes that attention layers read."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def export_folder(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write a Hugging Face folder (``config.json``, ``model.safetensors``, tokenizer) in place of ``folder``."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return folder


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """``[N]`` values in row order → ``[B, T]`` where ``mask``, 0 elsewhere; differentiable."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
