"""The policy network: scores responses and provides its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.functional import HeadFunctional, KLToHead, KLToLogits, logprob_and_entropy
from ibro_lightning.functional.functional_calls import on_logits
from ibro_lightning.models.compiled import compile_in_place
from ibro_lightning.models.head import LinearHead, find_linear_head
from ibro_lightning.models.hf_folder import full_weights
from ibro_lightning.models.network import ResponseNetwork
from ibro_lightning.models.sharding import is_sharded
from ibro_lightning.models.transformer import scatter_rows


class Policy(ResponseNetwork):
    """A causal language model that scores the response tokens of a batch.

    Dropout and all other random draws in training are permanently off: they would make the probability ratio to the
    sampling policy noisy. The module can therefore stay in train mode, which gradient checkpointing needs; see
    :mod:`.randomness`.

    Args:
        model: a transformers causal language model.
        fused_head: compute log-probs and entropies without ever holding all logits, if the head allows it.
        packing: run micro-batches as one row without padding.
        share_prompts: run each distinct prompt of a micro-batch once, where that is exact.
    """

    def __init__(
        self,
        model: Any,
        *,
        gradient_checkpointing: bool = False,
        fused_head: bool = True,
        packing: bool = False,
        share_prompts: bool = True,
    ) -> None:
        super().__init__(
            model, gradient_checkpointing=gradient_checkpointing, packing=packing, share_prompts=share_prompts
        )
        self._fused_head = fused_head
        self._head: tuple[LinearHead | None] | None = None  # cached; a tuple, so that it is not a submodule

    @overload
    def forward(
        self, sequences: Sequences, *, temperature: float, with_entropy: bool = ..., functionals: None = ...
    ) -> tuple[Tensor, Tensor | None]: ...
    @overload
    def forward(
        self,
        sequences: Sequences,
        *,
        temperature: float,
        with_entropy: bool = ...,
        functionals: Mapping[str, HeadFunctional],
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]: ...
    def forward(
        self,
        sequences: Sequences,
        *,
        temperature: float,
        with_entropy: bool = True,
        functionals: Mapping[str, HeadFunctional] | None = None,
    ) -> tuple[Any, ...]:
        """Log-probs and entropies of the response tokens, response-aligned.

        Args:
            sequences: ``[B, L]`` tokens, padded on either side.
            temperature: the sampling temperature the responses came from.
            functionals: further numbers of each token's distribution, in the same pass (:func:`.linear_head`). Their
                rows are the response tokens, row after row without padding.

        Returns:
            ``(logp [B, T], entropy [B, T] or None)`` in nats, 0 on padding; float32, or float64 for float64
            weights. With ``functionals``, even if there are none, also ``{name: value [B, T]}``.
        """
        scores = self.without_draws(lambda: self._score(sequences, temperature, with_entropy, functionals or {}))
        return scores[:2] if functionals is None else scores

    def _score(
        self,
        sequences: Sequences,
        temperature: float,
        with_entropy: bool,
        functionals: Mapping[str, HeadFunctional],
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        targets = sequences.input_ids[sequences.is_response]
        head = self._linear_head()
        if head is None:
            logits = self.response_states(self.model, sequences, "logits")
            logp, entropy = logprob_and_entropy(logits, targets, temperature=temperature, with_entropy=with_entropy)
            values = on_logits(functionals, logits.to(logp.dtype) / temperature) if functionals else {}
        else:
            hidden = self.response_states(head.backbone, sequences, "last_hidden_state")
            logp, entropy, values = head.evaluate(
                hidden, targets, functionals, temperature=temperature, with_entropy=with_entropy
            )
        mask = sequences.response_mask
        scattered = {name: scatter_rows(of_tokens, mask) for name, of_tokens in values.items()}
        return scatter_rows(logp, mask), None if entropy is None else scatter_rows(entropy, mask), scattered

    @torch.no_grad()
    def kl_to(self, sequences: Sequences, *, temperature: float, reverse: bool) -> HeadFunctional:
        """A functional for a pass over the same responses after other prompts: the exact KL divergence to this policy's
        present distribution after ``sequences``' own, token by token, over the whole vocabulary, in nats. One forward
        pass; no gradients reach it.

        Args:
            sequences: ``[B, L]`` with the responses of that pass, row by row.
            reverse: KL(that pass ‖ this one); otherwise KL(this one ‖ that pass).
        """
        return self.without_draws(lambda: self._kl_to(sequences, temperature, reverse))

    def _kl_to(self, sequences: Sequences, temperature: float, reverse: bool) -> HeadFunctional:
        head = self._linear_head()
        if head is None:
            logits = self.response_states(self.model, sequences, "logits")
            return KLToLogits(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, reverse)
        hidden = self.response_states(head.backbone, sequences, "last_hidden_state")
        weight: Tensor = head.linear.weight
        bias: Tensor | None = head.linear.bias
        if not weight.requires_grad and is_sharded(self):
            # A frozen network of its own gives its gathered weights back after this pass, which a policy in training
            # gathers again in the pass that reads them.
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        hidden, weight = (_under_autocast(x) for x in (hidden, weight))  # rounded as in that pass
        return KLToHead(hidden, weight, bias, temperature / head.scale, reverse)

    def named_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Detached weights under their Hugging Face names, adapters merged; tied ones appear under each of their names.

        Sharded weights are gathered one at a time; every rank must iterate over all of them.
        """
        self.model = compile_in_place(self.model)
        yield from full_weights(self.model)

    def _linear_head(self) -> LinearHead | None:
        if self._head is None:
            self.model = compile_in_place(self.model)
            self._head = (find_linear_head(self.model) if self._fused_head else None,)
        return self._head[0]


def _under_autocast(x: Tensor) -> Tensor:
    """In the dtype of autocast, if that is on."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if is_cast else x
