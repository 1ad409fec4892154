"""Log-probs and entropy straight from the hidden states: an output layer that never holds its ``[N, V]`` logits.

Logits exist for a chunk of rows at a time, over the whole vocabulary, and are recomputed in the backward pass. With
``z = (h Wᵀ + b)/T``, ``p = softmax(z)``, and ``g``, ``u`` the gradients arriving for ``log p_y`` and ``H``:

    dz_j = g (1{j = y} − p_j) − u p_j (log p_j + H)
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ibro_lightning.functional.functional_calls import check_functionals, gradient_of, values_of
from ibro_lightning.functional.head_functionals import HeadFunctional
from ibro_lightning.functional.products import addmm_, exact_products, factors, wide

# Bytes of logits in a chunk: measured for a CPU (benchmarks/README.md), estimated for a GPU, which needs more rows.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
# Eager arithmetic passes over the logits several times: in blocks that fit a cache, like their temporaries.
_CPU_BLOCK_BYTES = 4 << 20
# Replaces a bias of −inf: p is still 0, and so is p log p, where 0·(−inf) would be nan.
_IMPOSSIBLE = -1e30
# Device types on which the arithmetic is compiled; one is removed when that fails.
_compiled_devices = {"cuda"}
_compiled: Callable[..., Any] = functools.cache(functools.partial(torch.compile, dynamic=True))
_allocates_as: str | None = None


@contextmanager
def shapes_only(device: str) -> Iterator[None]:
    """Size chunks as on ``device`` ("cpu", "cuda") and skip their arithmetic, which is hundreds of small operations:
    for memory estimates on tensors without values."""
    global _allocates_as
    before, _allocates_as = _allocates_as, device
    try:
        yield
    finally:
        _allocates_as = before


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``logprob_and_entropy(hidden @ weight.T + bias, targets)`` without the ``[N, V]`` logits.

    Logits, sums and results are float32 (float64 for float64 inputs) whatever the inputs' dtype, also under autocast.
    On a CPU, half-precision weights are converted once a pass, which takes ``4·V·D`` bytes until the pass ends. On a
    GPU, float16 gradients below 6e-8 vanish, as everywhere: use a loss scale.

    Args:
        hidden: ``[N, D]``; ``weight``: ``[V, D]``; ``bias``: ``[V]``, with −inf for masked tokens.
        targets: ``[N]`` int64. Checked against the vocabulary on a CPU only; on a GPU that would synchronize.
        temperature: the *sampling* temperature; scoring at any other is off by nats.
        chunk_size: rows of logits at a time. By default as many as fit in 64 MiB on a CPU, 512 MiB elsewhere.
        with_entropy: when False the entropy is neither computed nor returned (None).

    Returns:
        ``(logp [N], entropy [N] or None)``, in nats, both with exact first derivatives in hidden, weight and bias.
    """
    logp, entropy, _ = linear_head(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        chunk_size=chunk_size,
        with_entropy=with_entropy,
    )
    return logp, entropy


def linear_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    functionals: Mapping[str, HeadFunctional] = MappingProxyType({}),
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """:func:`linear_logprob_entropy`, and further numbers of each row's distribution in the same pass.

    Args:
        functionals: by name; see :class:`.HeadFunctional`. They see the logits divided by ``temperature``, a chunk at
            a time, and take a few temporaries of its size.

    Returns:
        ``(logp [N], entropy [N] or None, {name: value [N]})``, all with exact first derivatives.

    Raises:
        ConfigError: a functional cannot be computed of N rows of V logits.
        HookError: a functional returned something other than one number per row.
    """
    _check(hidden, weight, targets, bias, temperature, chunk_size)
    check_functionals(functionals, len(hidden), len(weight))
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        bias = bias if bias is None else bias.to(dtype)
    limit = _CHUNK_BYTES.get(_allocates_as or hidden.device.type, _CHUNK_BYTES["cuda"])
    chunk_size = chunk_size or max(1, limit // (len(weight) * wide(dtype).itemsize))
    # Converted outside the autograd function, so that autograd converts the gradients back.
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    logp, entropy, *values = _LinearHead.apply(
        hidden, weight, bias, targets, temperature, chunk_size, with_entropy, tuple(functionals.values())
    )
    return logp, entropy, dict(zip(functionals, values, strict=True))


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, chunk_size: int | None
) -> None:
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating-point [N, D], got {hidden.dtype} {list(hidden.shape)}")
    n, d = hidden.shape
    if weight.ndim != 2 or weight.shape[1] != d or not len(weight) or not weight.is_floating_point():
        raise ValueError(f"weight must be floating-point [V > 0, D={d}], got {weight.dtype} {list(weight.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias must be floating-point [V={len(weight)}], got {bias.dtype} {list(bias.shape)}")
    if targets.shape != (n,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [N={n}], got {targets.dtype} {list(targets.shape)}")
    if targets.device.type == "cpu" and n and not 0 <= targets.min() <= targets.max() < len(weight):
        raise ValueError(f"targets must be in [0, V={len(weight)}), got {targets.min()} to {targets.max()}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any
    ) -> tuple[Tensor | None, ...]:
        ctx.temperature, ctx.chunk_size, with_entropy, ctx.functionals = options
        ctx.set_materialize_grads(False)
        results, further = [], [list[tuple[Tensor, ...]]() for _ in ctx.functionals]
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = factors(hidden, weight)
            for rows, logits in _logit_chunks(h, w, bias, ctx.temperature, ctx.chunk_size, hidden.dtype):
                for block in _blocks(logits):
                    for functional, of_blocks in zip(ctx.functionals, further, strict=True):
                        of_blocks.append(_values(functional, logits[block], _within(rows, block)))
                    results.append(_run(_statistics, logits[block], targets[rows][block], with_entropy))
        top, log_total, logp, *entropy = (torch.cat(column) for column in zip(*results, strict=True))
        columns = [[torch.cat(column) for column in zip(*of_blocks, strict=True)] for of_blocks in further]
        ctx.counts = [len(of_functional) for of_functional in columns]
        flat = [column for of_functional in columns for column in of_functional]
        ctx.save_for_backward(hidden, weight, bias, *flat, targets, top, log_total, logp, *entropy)
        logp = logp.clone() if bias is None else logp.masked_fill(bias[targets] == -torch.inf, -torch.inf)
        values = (of_functional[0].clone() for of_functional in columns)
        return logp, entropy[0].clone() if entropy else None, *values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, *g_values: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *statistics = ctx.saved_tensors
        columns = [[statistics.pop(0) for _ in range(count)] for count in ctx.counts]
        with_gradient = [
            (functional, g / ctx.temperature, saved)
            for functional, g, saved in zip(ctx.functionals, g_values, columns, strict=True)
            if g is not None
        ]
        inputs, (h, w) = (hidden, weight, bias), factors(hidden, weight)
        per_row = [g if g is None else g / ctx.temperature for g in (g_logp, g_entropy)] + statistics
        needs = zip(inputs, ctx.needs_input_grad, strict=False)
        sums = [torch.zeros_like(x, dtype=wide(x.dtype)) if needed else None for x, needed in needs]
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, logits in _logit_chunks(h, w, bias, ctx.temperature, ctx.chunk_size, hidden.dtype):
                dz = logits if h.dtype == logits.dtype else torch.empty_like(logits, dtype=h.dtype)
                for block in _blocks(logits):
                    z = logits[block]
                    out = z if dz is logits else dz[block]
                    of_functionals = _gradients(with_gradient, z, _within(rows, block))
                    _run(_logit_gradients, z, out, *(x if x is None else x[rows][block] for x in per_row))
                    if of_functionals is not None:
                        out += of_functionals
                with exact_products(hidden.device, hidden.dtype):
                    _accumulate(sums, rows, dz, h, w)
        return *(s if s is None else s.to(x.dtype) for s, x in zip(sums, inputs, strict=True)), *(None,) * 5


def _within(rows: slice, block: slice) -> slice:
    return slice(rows.start + block.start, rows.start + block.stop)


def _values(functional: HeadFunctional, logits: Tensor, rows: slice) -> tuple[Tensor, ...]:
    if _allocates_as is not None:
        return (logits.new_empty(len(logits)),)
    return values_of(functional, logits, rows)


def _gradients(
    functionals: list[tuple[HeadFunctional, Tensor, list[Tensor]]], logits: Tensor, rows: slice
) -> Tensor | None:
    """The sum of the functionals' gradients on the logits, which it leaves as they are; None for none. Each functional
    comes with the gradient of its value and what its forward pass has saved."""
    total: Tensor | None = None
    for functional, g, saved in functionals:
        if _allocates_as is not None:
            return torch.empty_like(logits)
        gradient = gradient_of(functional, logits, rows, g[rows], *(column[rows] for column in saved))
        total = gradient if total is None else total.add_(gradient)
    return total


def _statistics(logits: Tensor, targets: Tensor, with_entropy: bool, *, overwrite: bool) -> tuple[Tensor, ...]:
    """``(max z, log Σ exp(z − max), log p_y[, H])`` of each row; with ``overwrite`` the logits serve as scratch."""
    scratch = logits if overwrite else None
    top = logits.amax(dim=1)
    shifted = torch.sub(logits, top.unsqueeze(1), out=scratch)
    at_target = shifted.gather(1, targets.unsqueeze(1)).squeeze(1)
    exps = torch.exp(shifted, out=None if with_entropy else scratch)
    total = exps.sum(dim=1)
    log_total = total.log()
    if not with_entropy:
        return top, log_total, at_target - log_total
    return top, log_total, at_target - log_total, log_total - torch.mul(shifted, exps, out=scratch).sum(dim=1) / total


def _logit_gradients(
    logits: Tensor, out: Tensor, g: Tensor | None, u: Tensor | None, targets: Tensor, *per_row: Tensor, overwrite: bool
) -> None:
    """Write ``dz`` to ``out``, which may be the logits. The 1/Σ of ``p = exp(z − max)/Σ`` goes into row factors."""
    scratch = logits if overwrite else None
    top, log_total, logp, *entropy = per_row
    shifted = torch.sub(logits, top.unsqueeze(1), out=scratch)
    exps = torch.exp(shifted, out=scratch if u is None else None)
    factor, rest = -torch.exp(-log_total), 0.0 if g is None else g
    if u is None:
        torch.mul(exps, (rest * factor).unsqueeze(1), out=out)
    else:
        # g + u (log p + H), where log p = shifted − log Σ.
        offset = rest + u * (entropy[0] - log_total)
        inner = torch.mul(shifted, (u * factor).unsqueeze(1), out=scratch)
        inner = torch.add(inner, (offset * factor).unsqueeze(1), out=scratch)
        torch.mul(inner, exps, out=out)
        rest = rest + u * (entropy[0] + logp)
    if g is not None:
        # Written, not added: in half precision 1 − p_y would be lost where p_y is close to 1.
        out.scatter_(1, targets.unsqueeze(1), (g - logp.exp() * rest).unsqueeze(1).to(out.dtype))


def _accumulate(sums: list[Tensor | None], rows: slice, dz: Tensor, hidden: Tensor, weight: Tensor) -> None:
    d_hidden, d_weight, d_bias = sums
    if d_hidden is not None:
        addmm_(d_hidden[rows], dz, weight)
    if d_weight is not None:
        addmm_(d_weight, dz.T, hidden[rows])
    if d_bias is not None:
        d_bias += dz.sum(dim=0, dtype=d_bias.dtype)


def _logit_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk_size: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """``(rows, logits / temperature)`` of each chunk, in one buffer, which the caller may overwrite.

    Args:
        dtype: of the head's inputs, before :func:`.factors`.
    """
    buffer = hidden.new_empty((min(chunk_size, len(hidden)), len(weight)), dtype=wide(hidden.dtype))
    for rows in _slices(len(hidden), chunk_size):
        logits = buffer[: rows.stop - rows.start]
        if bias is not None:
            logits.copy_((bias.to(logits.dtype) / temperature).clamp(min=_IMPOSSIBLE))
        with exact_products(hidden.device, dtype):
            addmm_(logits, hidden[rows], weight.T, beta=0 if bias is None else 1, alpha=1 / temperature)
        yield rows, logits


def _blocks(logits: Tensor) -> Iterator[slice]:
    """The rows of a chunk that are processed at a time."""
    fitting = _CPU_BLOCK_BYTES // (logits.shape[1] * logits.itemsize)
    in_blocks = logits.device.type == "cpu" and _allocates_as is None
    return _slices(len(logits), max(1, fitting if in_blocks else len(logits)))


def _slices(count: int, step: int) -> Iterator[slice]:
    """One empty slice for no rows, so that concatenated results keep their dtype and device."""
    for start in range(0, max(count, 1), step):
        yield slice(start, min(start + step, count))


def _run(function: Callable[..., Any], logits: Tensor, *args: Any) -> Any:
    """Run a chunk's arithmetic, compiled on a GPU, where each eager operation is a trip to memory."""
    if _allocates_as is not None:
        columns = 0 if function is _logit_gradients else 4 if args[1] else 3  # with or without the entropy
        return tuple(logits.new_empty(len(logits)) for _ in range(columns))
    device = logits.device.type
    if device in _compiled_devices:
        try:
            return _compiled(function)(logits, *args, overwrite=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _compiled_devices.discard(device)
            warnings.warn(f"torch.compile failed on {device}, going on without it: {error}", stacklevel=2)
    return function(logits, *args, overwrite=True)
