"""The information plane of a policy: estimates of H(r|q), H(r) and I(q; r) from a few prompts and their responses.

``q`` is a prompt, ``r`` a whole response, ``π(r|q)`` its probability, and ``M`` the number of prompts, of which each is
as likely as another: ``H(q) = log M``. All in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ibro_lightning.functional.aggregate import Reduction, masked_covariance, masked_mean


@dataclass(frozen=True)
class PlanePoint:
    """A point in the information plane, scalars in float64, nats per response. See :func:`information_plane`."""

    conditional_entropy: Tensor
    """H(r|q)."""
    marginal_entropy: Tensor
    """H(r)."""
    mutual_information: Tensor
    """I(q; r) = H(r) − H(r|q), at most :attr:`mutual_information_ceiling`."""
    mutual_information_upper: Tensor
    """The leave-one-out bound: from above, where :attr:`mutual_information` is a bound from below."""
    mutual_information_ceiling: Tensor
    """log M."""
    joint_entropy: Tensor
    """H(q, r) = log M + H(r|q)."""
    conditional_entropy_error: Tensor
    mutual_information_error: Tensor
    marginal_entropy_error: Tensor
    """Standard errors; the last takes the other two for independent."""


def information_plane(cross_logp: Tensor, surprise: Tensor | None = None) -> PlanePoint:
    """Where a policy is in the information plane, from one response to each of M different prompts.

    With ``p(r) = mean_q' π(r|q')``, prompt q itself among the q'::

        I(q; r) = mean_i [ log π(r_i|q_i) − log p(r_i) ]
        H(r|q)  = mean of −log π(r|q), over these responses or more
        H(r)    = H(r|q) + I(q; r), which over these responses is mean_i −log p(r_i)

    **Bias.** For the M prompts alone, as equally likely prompts, all are unbiased. For the distribution that the
    prompts were drawn from, H(r|q) is unbiased; I and H(r) are too small in expectation, and never above their
    ceilings, log M and H(r|q) + log M: a policy whose responses tell its prompts apart reads log M, however much more
    they say (the bound of InfoNCE with the true density, arXiv 1905.06922, section 2). ``mutual_information_upper``,
    whose mean leaves out prompt q itself, is too large in expectation; the truth is between the two. It may be
    infinite.

    **Error.** Each term of I is at most log M, and below −c with a probability of at most exp(−c). Standard errors are
    the spread of a term over the root of their number; that of I treats its terms as independent, though they share the
    prompts of ``p(r)``.

    Responses must be samples of ``π``, at its temperature, under no other restriction. A cut at a fixed length is fine:
    r is what there is before the cut.

    Args:
        cross_logp: ``[M, M]`` log π(r_i|q_j), of response i (to prompt i) under prompt j; −inf is allowed off the
            diagonal.
        surprise: ``[P]`` −log π(r|q) for each of P prompts of the same distribution, or its mean over a prompt's
            responses. The more, the smaller the error of H(r|q), which is most of that of H(r). None: of the M
            responses.

    Raises:
        ValueError: other shapes, or less than two prompts.

    Example:
        Two prompts that are answered deterministically, each in its own way:

        >>> sure = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
        >>> point = information_plane(sure)
        >>> round(point.mutual_information.item(), 4), round(point.mutual_information_ceiling.item(), 4)
        (0.6931, 0.6931)
    """
    count = len(cross_logp)
    if cross_logp.shape != (count, count) or count < 2:
        raise ValueError(f"cross_logp is [M, M] of at least two prompts; got {list(cross_logp.shape)}")
    surprise = -cross_logp.diagonal() if surprise is None else surprise
    if surprise.ndim != 1 or len(surprise) < 2:
        raise ValueError(f"surprise is [P] of at least two prompts; got {list(surprise.shape)}")
    cross_logp, surprise = cross_logp.double(), surprise.double()
    own = cross_logp.diagonal()  # [M] log π(r_i|q_i)
    others = cross_logp.masked_fill(torch.eye(count, dtype=torch.bool, device=own.device), -torch.inf)
    terms = own - (cross_logp.logsumexp(dim=1) - math.log(count))  # [M]
    upper = own - (others.logsumexp(dim=1) - math.log(count - 1))  # [M]
    conditional, information = surprise.mean(), terms.mean()
    conditional_error = surprise.std() / math.sqrt(len(surprise))
    information_error = terms.std() / math.sqrt(count)
    return PlanePoint(
        conditional_entropy=conditional,
        marginal_entropy=conditional + information,
        mutual_information=information,
        mutual_information_upper=upper.mean(),
        mutual_information_ceiling=own.new_tensor(math.log(count)),
        joint_entropy=conditional + math.log(count),
        conditional_entropy_error=conditional_error,
        mutual_information_error=information_error,
        marginal_entropy_error=torch.hypot(conditional_error, information_error),
    )


def masked_correlation(x: Tensor, y: Tensor, mask: Tensor, *, mean: Reduction = masked_mean) -> Tensor:
    """Pearson's correlation of ``x`` and ``y`` over valid tokens, in float64; nan where one of them does not vary.

    Args:
        x, y, mask: any common shape. Values under a zero mask are ignored.
        mean: over the valid tokens, of all processes if they share the batch.
    """
    x, y = (torch.where(mask.bool(), values, 0.0).double() for values in (x, y))
    spread = masked_covariance(x, x, mask, mean=mean) * masked_covariance(y, y, mask, mean=mean)
    # Equal values, such as three times 0.1, have a variance of rounding's size and not of 0.
    size = mean(x * x, mask) * mean(y * y, mask)
    correlation = masked_covariance(x, y, mask, mean=mean) / spread.sqrt()
    return torch.where(spread > 1e-20 * size, correlation, torch.nan).clamp(-1.0, 1.0)


def quarter(position: Tensor, length: Tensor) -> Tensor:
    """The quarter, 0 to 3, in which each ``position`` (from 0) of a ``length`` lies, both int64 and ``[N]``. A length
    of less than four leaves the later quarters empty in part: of two tokens, the first is in 0 and the last in 2."""
    return (4 * position) // length


def ending_rates(lengths: Tensor, ended: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """How often a response ends at a token, by the token's quarter of the length limit.

    Args:
        lengths: ``[B]`` int64 tokens of each response, EOS included, at least 1.
        ended: ``[B]`` bool: the last token is an EOS, and no cut at the limit.
        limits: ``[B]`` int64: the most tokens that each could have.

    Returns:
        ``(endings [4], tokens [4])`` int64 counts; their ratio is an unbiased estimate of the mean of π(EOS) over the
        positions that responses reach. Its standard error is about √(rate / tokens).
    """
    edges = -(-limits[:, None] * torch.arange(5, device=limits.device) // 4)  # [B, 5] the first position of a quarter
    tokens = (lengths[:, None].clamp(max=edges[:, 1:]) - edges[:, :-1]).clamp(min=0).sum(dim=0)  # [4]
    last = quarter(lengths - 1, limits)[ended]  # lengths are at most limits
    return torch.bincount(last.clamp(max=3), minlength=4), tokens
