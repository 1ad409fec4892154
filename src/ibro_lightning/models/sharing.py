"""Whether a model may run each distinct prompt once for all its responses: tried, because no list of architectures is
complete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ibro_lightning.batches.flat import FlatBatch
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.errors import is_out_of_memory
from ibro_lightning.models.flat_attention import SUPPORTED
from ibro_lightning.models.transformer import flat_response_states, response_states

LONGEST_TRIED = 256
"""Tokens: sliding windows up to this one are tried with sequences that exceed them."""


def why_not_shared(model: Any, network: Any, output: str, device: torch.device | None = None) -> str | None:
    """Why prompts cannot be shared, in words; None if they can.

    A few short groups of unequal lengths are run as :func:`.response_states` and as :func:`.flat_response_states` run
    them. States must be the same up to rounding, and so must the gradients that reach the token embeddings, to which
    every row of a group contributes.

    Args:
        model: the whole model.
        network, output: the part that is run, and the name of its output.
        device: where it computes; None: where its weights are.
    """
    if (obstacle := known_obstacle(model)) is not None:
        return obstacle
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    vocabulary = model.config.get_text_config().vocab_size
    rows = _probe(vocabulary, window + 3 if window < LONGEST_TRIED else 0)
    rows = rows.to(device or next(model.parameters()).device)
    batch = FlatBatch.of(rows)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            runs = [
                _run(model, lambda: response_states(network, rows, output)),
                _run(model, lambda: flat_response_states(network, rows, output, batch=batch)),
            ]
            # At once: after a backward pass, a sharded network has given its gathered weights back.
            of_plain, of_flat = torch.autograd.grad(
                [_weighted(states) for states, _ in runs], [leaf for _, leaf in runs], allow_unused=True
            )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"it cannot run them in one row ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    if window and window not in batch.windows:
        return "its attention does not say how far it sees"
    (plain, _), (flat, leaf) = runs
    of_flat = torch.zeros_like(leaf) if of_flat is None else of_flat
    summed = torch.zeros_like(of_flat[0]).index_add_(0, batch.places(rows), of_plain[rows.attention_mask.bool()])
    # As for packing: rounding is much smaller than the bound, and a wrong mask does much more. A float64 model with
    # norms in float32 is not exact by float64's measure: a group's gradients are rounded one by one, or their sum is.
    bound = _precision(flat) ** 0.6
    for name, one, other in (("hidden states", flat, plain), ("gradients", of_flat[0], summed)):
        difference = (one - other).detach().abs().max() / other.detach().abs().max().clamp(min=1e-6)
        if not difference < bound:
            return f"{name} differ by {difference:.2g} of the largest"
    return None


def known_obstacle(model: Any) -> str | None:
    """What can be said without running the model."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return "it is no model of transformers"
    config = config.get_text_config()
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in SUPPORTED:
        return f"attention is {implementation}, not {' or '.join(SUPPORTED)}"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be exchanged"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of kind {min(kinds)}"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is cut into chunks"
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return "it is compiled"
    return None


def _run(model: Any, compute: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """States, and the token embeddings that they came from, as a leaf."""
    embedded: list[Tensor] = []

    def as_leaf(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = model.get_input_embeddings().register_forward_hook(as_leaf)
    try:
        states = compute()
    finally:
        handle.remove()
    return states, embedded[0]


def _weighted(states: Tensor) -> Tensor:
    """A sum that weighs every number of ``states`` differently."""
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (states * weights.to(states)).sum()


def _probe(vocabulary: int, longest: int) -> Sequences:
    """Three groups, their rows not in order; one response is made so long that its sequence has ``longest`` tokens."""
    prompts, lengths = [3, 6, 3, 4, 6, 3], [2, 7, 4, 3, 1, 5]
    lengths[2] = max(lengths[2], longest - prompts[2])

    def tokens(seed: int, count: int) -> list[int]:
        return [(7 * place + 3 * seed + 1) % vocabulary for place in range(count)]

    rows = [tokens(10 + row, length) for row, length in enumerate(lengths)]
    return Sequences.collate([tokens(length, length) for length in prompts], rows)


def _precision(states: Tensor) -> float:
    device = states.device.type
    half = torch.is_autocast_enabled(device)
    return torch.finfo(torch.get_autocast_dtype(device) if half else states.dtype).eps
