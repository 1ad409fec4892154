"""An update written out: one unpadded sequence at a time, plain transformers and autograd, gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ibro_lightning.batches import Rollout

Rows = list[Tensor]
"""One ``[length]`` tensor per response."""


@dataclass(frozen=True)
class Loss:
    """``agg(clipped loss) − coef·agg(weight·H)`` over the tokens of the responses that count."""

    counts: Sequence[bool]
    aggregation: Literal["token-mean", "seq-mean-token-mean"] = "token-mean"
    coef: float = 0.0
    part: Literal["raw", "centred", "uniform"] = "raw"

    def weights(self, lengths: Sequence[int]) -> list[float]:
        """What each token of a response counts."""
        if self.aggregation == "token-mean":
            total = sum(length for length, counts in zip(lengths, self.counts, strict=True) if counts)
            return [counts / total for counts in self.counts]
        return [
            counts / (sum(self.counts) * max(length, 1)) for length, counts in zip(lengths, self.counts, strict=True)
        ]

    def of(self, logp: Rows, entropy: Rows, old_logp: Rows, advantages: Rows) -> Tensor:
        weights = self.weights([len(row) for row in logp])
        mean = sum(w * a.sum() for w, a in zip(weights, advantages, strict=True)) / sum(
            w * len(a) for w, a in zip(weights, advantages, strict=True)
        )
        loss = torch.zeros((), dtype=torch.float64)
        for weight, new, h, old, a in zip(weights, logp, entropy, old_logp, advantages, strict=True):
            if not weight:
                continue
            ratio = (new - old).exp()
            clipped = torch.maximum(-ratio * a, -ratio.clamp(0.8, 1.28) * a)
            clipped = torch.where(a < 0, torch.minimum(clipped, -10 * a), clipped)
            of_entropy = {"raw": a, "centred": a - mean, "uniform": mean * torch.ones_like(a)}[self.part]
            loss = loss + weight * (clipped - self.coef * of_entropy * h).sum()
        return loss


def scores(model: Any, rollout: Rollout) -> tuple[Rows, Rows]:
    """(log-probs, entropies) of the response tokens."""
    logp, entropy = [], []
    for prompt, completion in zip(rollout.prompts, rollout.completions, strict=True):
        tokens = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        logits = model(tokens).logits[0, len(prompt.token_ids) - 1 : -1] / rollout.temperature
        log_p = logits.log_softmax(-1)
        logp.append(log_p.gather(-1, torch.tensor(completion.token_ids, dtype=torch.long)[:, None]).squeeze(-1))
        entropy.append(-(log_p.exp() * log_p).sum(-1))
    return logp, entropy


def values(critic: Any, rollout: Rollout) -> Rows:
    """The critic's value before each response token."""
    rows = []
    for prompt, completion in zip(rollout.prompts, rollout.completions, strict=True):
        tokens = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        rows.append(critic(tokens).logits[0, len(prompt.token_ids) - 1 : -1, 0])
    return rows


def descend(model: Any, loss: Callable[[], Tensor], lr: float, passes: int) -> list[Tensor]:
    """``model``'s parameters after so many steps."""
    parameters = list(model.parameters())
    for _ in range(passes):
        gradients = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= lr * gradient
    return [parameter.detach() for parameter in parameters]


def update_policy(
    model: Any, rollout: Rollout, advantages: Rows, loss: Loss, *, lr: float, passes: int
) -> list[Tensor]:
    with torch.no_grad():
        old_logp, _ = scores(model, rollout)
    return descend(model, lambda: loss.of(*scores(model, rollout), old_logp, advantages), lr, passes)


def update_critic(
    critic: Any, rollout: Rollout, returns: Rows, counts: Sequence[bool], *, clip: float, lr: float, passes: int
) -> list[Tensor]:
    """``½·max((V − R)², (clip(V, V_old ± clip) − R)²)``, its mean over the tokens that count."""
    with torch.no_grad():
        old = values(critic, rollout)
    total = sum(len(row) for row, counted in zip(old, counts, strict=True) if counted)

    def loss() -> Tensor:
        parts = []
        for value, before, target, counted in zip(values(critic, rollout), old, returns, counts, strict=True):
            inside = before + (value - before).clamp(-clip, clip)
            parts.append(counted * 0.5 * torch.maximum((value - target) ** 2, (inside - target) ** 2).sum() / total)
        return torch.stack(parts).sum()

    return descend(critic, loss, lr, passes)


def per_token(numbers: Sequence[float], rollout: Rollout) -> Rows:
    """Each response's number, on each of its tokens."""
    lengths = rollout.sequences.response_lengths.tolist()
    return [torch.full((length,), number, dtype=torch.float64) for number, length in zip(numbers, lengths, strict=True)]


def whitened(rows: Rows, counts: Sequence[bool]) -> Rows:
    """Mean 0 and variance 1 over the tokens that count, 0 on the others."""
    valid = torch.cat([row for row, counted in zip(rows, counts, strict=True) if counted])
    scale = (valid.var(unbiased=False) + 1e-8).sqrt()
    return [counted * (row - valid.mean()) / scale for row, counted in zip(rows, counts, strict=True)]
