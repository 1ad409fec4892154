"""Runs a transformers model over prompts and responses, padded or packed, and only where necessary."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ibro_lightning.batches.flat import FlatBatch
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.errors import ConfigError
from ibro_lightning.models.flat_attention import flat_attention
from ibro_lightning.models.spec import plain_outputs


def response_states(
    model: nn.Module, sequences: Sequences, output: str, *, after_last: bool = False, packing: bool = False
) -> Tensor:
    """The model's outputs at the positions that predict response tokens, in row order: ``[N, …]``, ``N = Σ lengths``.

    The token at position i is predicted at i − 1, so the first of a row's states is that of the prompt's last token.

    Args:
        output: name of the model's output: ``logits`` or ``last_hidden_state``.
        after_last: also the state after each row's last token (one more per row).
        packing: run all rows as one, without padding. Exact only if :func:`check_packing` passes.
    """
    attended = sequences.attention_mask.bool()  # [B, L]
    predicts = sequences.is_response.roll(-1, dims=1)  # [B, L]
    predicts[:, -1] = False
    if after_last:
        ends = (sequences.starts + sequences.lengths - 1)[:, None]
        predicts = predicts.scatter(1, ends, True)
    if packing:
        # Restarting positions tell transformers where a sequence begins, but only without an attention mask.
        tokens, positions = sequences.input_ids[attended][None], sequences.position_ids[attended][None]
        return run(model, output, input_ids=tokens, position_ids=positions)[0][predicts[attended]]
    accepted = accepted_arguments(model)
    inputs = {"input_ids": sequences.input_ids, "attention_mask": sequences.attention_mask}
    if "position_ids" in accepted:
        inputs["position_ids"] = sequences.position_ids
    first = int(predicts.any(dim=0).float().argmax())
    if output == "logits" and "logits_to_keep" in accepted:  # the head is skipped at earlier positions
        keep = sequences.input_ids.shape[1] - first
        return run(model, output, **inputs, logits_to_keep=keep)[predicts[:, first:]]
    return run(model, output, **inputs)[predicts]


def flat_response_states(
    model: Any, sequences: Sequences, output: str, *, after_last: bool = False, batch: FlatBatch | None = None
) -> Tensor:
    """:func:`response_states` without padding, and of each distinct prompt once. Exact where
    :func:`.sharing.why_not_shared` finds nothing.

    Args:
        batch: ``sequences``, flattened; None: that is done here.
    """
    if batch is None:
        batch = FlatBatch.of(sequences if after_last else sequences.without_last())
    places = batch.predicting(sequences, after_last=after_last)
    inputs = {"input_ids": batch.tokens[None], "position_ids": batch.positions[None]}
    with flat_attention(model.config.get_text_config(), batch):
        if output == "logits" and "logits_to_keep" in accepted_arguments(model):
            return run(model, output, **inputs, logits_to_keep=places)[0]
        return run(model, output, **inputs)[0][places]


def accepted_arguments(model: nn.Module) -> frozenset[str]:
    """The names of what a model's forward pass takes, looked up once for all models of a class."""
    own = vars(model).get("forward")  # a wrapper around this one model, which a cache would keep in memory
    return _parameters(type(model).forward) if own is None else frozenset(inspect.signature(own).parameters)


@lru_cache(maxsize=64)
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def run(model: Any, output: str, **inputs: Any) -> Tensor:
    """One output of a forward pass without a cache, whatever else the model's config asks for."""
    with plain_outputs(getattr(model, "config", None)):
        states: Tensor = getattr(model(**inputs, use_cache=False), output)
    return states


def backbone_of(model: Any) -> nn.Module | None:
    """The model without its head; None if transformers defines no such part."""
    backbone = getattr(model, "base_model", model)
    return None if backbone is model else backbone


@torch.no_grad()
def check_packing(model: Any, device: torch.device | None = None) -> None:
    """Run three short sequences packed, through the model without its head: they must not see each other, nor differ
    from the same sequences run one by one.

    Args:
        device: where the model computes; None: where its weights are.

    Raises:
        ConfigError: they do, or the model cannot run them.
    """
    vocabulary = model.config.get_text_config().vocab_size
    backbone = backbone_of(model)
    network, output = (model, "logits") if backbone is None else (backbone, "last_hidden_state")
    device = device or next(model.parameters()).device
    rows = _probe(vocabulary, device)
    try:
        packed = response_states(network, rows, output, packing=True)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            "policy_options.packing", True, f"this model cannot run packed sequences ({error}): write false"
        ) from error
    last = int(rows.response_lengths[-1])
    with_others = response_states(network, _probe(vocabulary, device, shift=3), output, packing=True)
    indices = torch.arange(len(rows), device=packed.device).split(1)
    alone = torch.cat([response_states(network, rows.select(row), output) for row in indices])
    size = alone.abs().max().clamp(min=1e-6)
    contamination = (packed - with_others)[-last:].abs().max() / size
    difference = (packed - alone).abs().max() / size
    # The same arithmetic on the same tokens gives the same numbers. Packed and unpacked results differ in rounding, by
    # much less than this bound in any precision; a wrong position or mask changes them by much more.
    half = torch.is_autocast_enabled(packed.device.type)
    precision = torch.finfo(torch.get_autocast_dtype(packed.device.type) if half else packed.dtype).eps
    if not (contamination < precision and difference < precision**0.6):
        attention = getattr(model.config, "_attn_implementation", "this attention")
        raise ConfigError(
            "policy_options.packing",
            True,
            f"with {attention}, packed sequences see each other (hidden states differ by "
            f"{max(contamination, difference):.1%}): write false, or another model.policy_options.attn_implementation, "
            "such as flash_attention_2",
        )


def probe_states(model: Any, device: torch.device | None = None) -> Tensor:
    """The logits of a few short rows of different lengths."""
    config = getattr(model, "config", None)
    vocabulary = 2 if config is None else config.get_text_config().vocab_size  # every model has two tokens
    return response_states(model, _probe(vocabulary, device or next(model.parameters()).device), "logits")


def _probe(vocabulary: int, device: torch.device, shift: int = 0) -> Sequences:
    """Three rows of different lengths; ``shift`` changes the tokens of all but the last."""
    rows = [[(7 * i + 1 + (shift if row < 2 else 0)) % vocabulary for i in range(n)] for row, n in enumerate((5, 3, 7))]
    sequences = Sequences.collate([row[:1] for row in rows], [row[1:] for row in rows])
    return sequences.to(device)


def scatter_rows(values: Tensor, mask: Tensor) -> Tensor:
    """``[N]`` values in row order → ``[B, T]`` where ``mask``, 0 elsewhere; differentiable."""
    if values.ndim != 1:  # masked_scatter would take the first of as many numbers as there are
        raise ValueError(f"values must be [N], one per response token, got {list(values.shape)}")
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
