"""Checks what users' losses, regularisers and policies return: a wrong shape would be broadcast, or fail far away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ibro_lightning.batches.experience import Experience, MicroBatch, TokenStats
from ibro_lightning.errors import ConfigError, HookError, wrong_return
from ibro_lightning.functional import HeadFunctional
from ibro_lightning.regularizers import EntropyRegularizer
from ibro_lightning.regularizers.coefficients import Coefficient, TrackedNumber


def check_regularizer(regularizer: EntropyRegularizer) -> None:
    """Raise unless the regulariser has its coefficients, all of which are objects that can be saved and moved."""
    if not isinstance(getattr(regularizer, "coefficient", None), Coefficient):
        remedy = "its __init__ must call super().__init__(coef), which sets the coefficient"
        raise ConfigError("regularizer", type(regularizer).__name__, remedy)
    coefficients = regularizer.coefficients
    remedy = (
        "return {**super().coefficients, name: coefficient}, where as_coefficient(number, name, 'entropy') makes a "
        "coefficient of a number"
    )
    if not isinstance(coefficients, Mapping):
        raise wrong_return(regularizer, "coefficients", coefficients, remedy)
    for name, coefficient in coefficients.items():
        if not isinstance(coefficient, TrackedNumber):
            raise wrong_return(regularizer, "coefficients", coefficient, remedy, name)


def functionals_of(regularizer: EntropyRegularizer, functionals: Any, micro: MicroBatch) -> dict[str, HeadFunctional]:
    """What :meth:`.EntropyRegularizer.functionals` returned."""
    found = _by_name(regularizer, "functionals", functionals, micro.extra, "a HeadFunctional")
    for name, functional in found.items():
        if not isinstance(functional, HeadFunctional):
            remedy = "return an object of a subclass of HeadFunctional, not the class or a function"
            raise wrong_return(regularizer, "functionals", functional, remedy, name)
    return found


def statistics_of(
    regularizer: EntropyRegularizer, statistics: Any, micro: MicroBatch, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What :meth:`.EntropyRegularizer.statistics` returned; ``values`` are those of its functionals. A statistic may
    replace what was prepared under its name."""
    found = _by_name(regularizer, "statistics", statistics, values, "a tensor [B, T]")
    return {name: per_token(regularizer, "statistics", x, micro, name=name) for name, x in found.items()}


def of_policy(policy: Any, scores: Any, functionals: Mapping[str, HeadFunctional], micro: MicroBatch) -> Any:
    """What a policy returned that was to compute ``functionals``: ``(logp, entropy, {name: [B, T]})``."""
    complete = isinstance(scores, tuple) and len(scores) == 3 and isinstance(scores[2], Mapping)
    if not complete or set(functionals) != set(scores[2]):
        remedy = f"with functionals, return (logp, entropy, values), with values of {', '.join(functionals)} by name"
        raise wrong_return(policy, "forward", scores, remedy)
    for name, values in scores[2].items():
        per_token(policy, "forward", values, micro, name=name)
    return scores


def shaped(loss: Tensor, regularizer: EntropyRegularizer, stats: TokenStats) -> Tensor:
    """The policy loss ``[B, T]`` after the regulariser's ``shape_policy_loss``."""
    advice = without_entropy(stats, "shaping_needs_entropy")
    with noted(advice):
        values = regularizer.shape_policy_loss(loss, stats)
    return per_token(regularizer, "shape_policy_loss", values, stats, advice)


def measured(regularizer: EntropyRegularizer, stats: TokenStats) -> dict[str, Tensor]:
    """The curves ``[B, T]`` of the regulariser's ``measure``."""
    found = _by_name(regularizer, "measure", regularizer.measure(stats), {}, "a tensor [B, T]")
    return {name: per_token(regularizer, "measure", x, stats, name=name, floating=False) for name, x in found.items()}


def prepared_by(regularizer: EntropyRegularizer, step: Any) -> Experience:
    """What :meth:`.EntropyRegularizer.prepare` returned."""
    if not isinstance(step, Experience):
        remedy = "return the step, or what step.with_extra(name=values) or replace(step, advantages=values) returns"
        raise wrong_return(regularizer, "prepare", step, remedy)
    for name, values in {"advantages": step.advantages, **step.extra}.items():
        per_step_token(name, values, step)
    return step


def of_surrogate(loss: Any, result: Any, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
    """What a ``surrogate`` returned: a loss ``[B, T]`` and metrics. A scalar would be broadcast by the sampler's
    weights."""
    remedy = "return the pair (loss [B, T], metrics by name)"
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise wrong_return(loss, "surrogate", result, remedy)
    per_token(loss, "surrogate", result[0], stats, "; PolicyLoss aggregates them")
    return result[0], {n: per_token(loss, "surrogate", x, stats, name=n, floating=False) for n, x in result[1].items()}


def per_token(
    owner: object,
    method: str,
    values: Any,
    batch: MicroBatch | TokenStats,
    advice: str = "",
    *,
    name: str | None = None,
    floating: bool = True,
) -> Tensor:
    """``values``, if they are ``[B, T]``; ``floating``: and in floating point, so that they can have a gradient."""
    shape = batch.mask.shape
    if isinstance(values, Tensor) and values.shape == shape and (values.is_floating_point() or not floating):
        return values
    kind = " in floating point" if floating else ""
    remedy = f"return [B, T], one number per token{kind}: here {list(shape)}{advice}"
    raise wrong_return(owner, method, values, remedy, name)


def without_entropy(stats: TokenStats, flag: str) -> str:
    """Advice for a method that may have read ``stats.entropy`` where there is none."""
    return "" if stats.entropy is not None else f"; stats.entropy is None unless the class sets {flag} = True"


@contextmanager
def noted(advice: str) -> Iterator[None]:
    """Add advice, if there is any, to an error that reading None may have caused."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        if advice:
            error.add_note(advice.removeprefix("; "))
        raise


def per_step_token(name: str, values: Any, step: Experience) -> None:
    """Raise unless ``values`` are ``[N]``."""
    if not isinstance(values, Tensor) or values.shape != step.mask.shape:
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        shapes = f"[N] = {list(step.mask.shape)}, got {found}"
        raise HookError(f"{name} of a step are {shapes}: per_token(values) repeats [B] over each response's tokens")


def _by_name(owner: object, method: str, values: Any, present: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise wrong_return(owner, method, values, f"return a mapping: names, and {kind} for each")
    for name in values:
        if name in present:
            raise HookError(
                f"{type(owner).__name__}.{method} returned {name!r}, which stats.extra has already (it has "
                f"{', '.join(present)}) - write another name"
            )
    return dict(values)
