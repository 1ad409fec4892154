"""Responses of the embedded engine while they are generated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ibro_lightning.engines.hf_batch import Batch
from ibro_lightning.engines.sampling import sample_tokens
from ibro_lightning.types import Generation, Logp, SamplingParams, TokenIds


class Live(NamedTuple):
    """The rows of the batch. ``B`` rows; a row that has ended may stay for a while.

    Args:
        samples: ``[B]`` number of each row's response.
        seeds: ``[B]``, one per response.
        steps: ``[B]`` tokens that the response has.
        ended: ``[B]`` whether it is complete.
        logits: ``[B, V]`` of its next token.
    """

    samples: Tensor
    seeds: Tensor
    steps: Tensor
    ended: Tensor
    logits: Tensor


class Responses:
    """Samples responses, row by row of a batch that shrinks as they end and grows when others join.

    Args:
        ends: token ids that end a response.
        compact_below: drop the rows that have ended when the share of the others falls below this.
    """

    def __init__(self, sampling: SamplingParams, ends: Tensor, compact_below: float) -> None:
        self.sampling, self.ends, self.compact_below = sampling, ends, compact_below
        self._batch: Batch | None = None
        self._live: Live
        self._sampled: list[tuple[Tensor, ...]] = []
        """Of each step: responses, tokens, log-probs, and whether the response had already ended; ``[B]`` each."""

    @property
    def rows(self) -> int:
        return 0 if self._batch is None else len(self._live.samples)

    def add(self, batch: Batch, logits: Tensor, copies: Tensor, samples: Tensor, seeds: Tensor) -> None:
        """Begin responses.

        Args:
            batch, logits: prompts, and the logits of their next tokens, ``[P, V]``.
            copies: ``[P]`` responses per prompt.
            samples, seeds: numbers and seeds of all their responses, ``[sum of copies]``.
        """
        source = torch.arange(len(copies), device=copies.device).repeat_interleave(copies)
        batch.select(source)
        live = Live(samples, seeds, torch.zeros_like(samples), torch.zeros_like(samples).bool(), logits[source])
        if self._batch is None:
            self._batch, self._live = batch, live
        else:
            self._batch.join(batch)
            self._live = Live(*(torch.cat(pair) for pair in zip(self._live, live, strict=True)))

    def step(self) -> None:
        """Sample one token for every row."""
        assert self._batch is not None
        samples, seeds, steps, ended, logits = self._live
        tokens, logp = sample_tokens(logits, self.sampling, seeds, steps)
        self._sampled.append((samples, tokens, logp, ended))
        steps = steps + 1
        ended = ended | torch.isin(tokens, self.ends) | (steps >= self.sampling.max_tokens)
        live = ~ended
        remaining = int(live.sum())
        if remaining == 0:
            self._batch = None
            return
        if remaining < self.compact_below * len(samples):
            keep = _in_place(live, remaining)
            self._batch.select(keep)
            samples, seeds, steps, ended, tokens = (x[keep] for x in (samples, seeds, steps, ended, tokens))
        self._live = Live(samples, seeds, steps, ended, self._batch.extend(tokens))

    def finished(self) -> list[Generation]:
        """All responses, by number."""
        if not self._sampled:
            return []
        samples, tokens, logp, ended = (torch.cat(column) for column in zip(*self._sampled, strict=True))
        order = samples[~ended].argsort(stable=True).cpu()  # by response, and in each by step
        samples, tokens, logp = (column[~ended].cpu()[order] for column in (samples, tokens, logp))
        stops = samples.bincount().cumsum(dim=0)
        stopped = torch.isin(tokens[stops - 1], self.ends.cpu()).tolist()
        # [N] each; the responses are views of these.
        ids, nats = TokenIds.shared(tokens.int().numpy()), Logp.shared(logp.float().numpy())
        starts = [0, *stops.tolist()]
        return [
            Generation(ids[start:stop], nats[start:stop], "stop" if reason else "length")
            for start, stop, reason in zip(starts, starts[1:], stopped, strict=False)
        ]


def _in_place(live: Tensor, count: int) -> Tensor:
    """The ``count`` rows that are ``live [B]``, ordered so that few change their place: the last ones fill the gaps."""
    keep = torch.arange(count, device=live.device)
    keep[~live[:count]] = count + live[count:].nonzero().squeeze(-1)
    return keep
