"""Makes trained networks deterministic: random draws would make the ratio to the sampling policy noisy.

Dropout is switched off by a probability of 0. Other draws in training have many names (router jitter, random routing,
layer drop, stochastic depth …), so they are not found by name: the network is run, and the modules that draw are put
into evaluation mode, in which engines run them, too. If it still draws, the network is refused.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.finite import why_not_finite
from ibro_lightning.models.flat_attention import recomputing
from ibro_lightning.models.transformer import probe_states

T = TypeVar("T")
Run = Callable[[], Tensor]


def _remove_dropout(model: nn.Module) -> None:
    """Set every dropout probability in ``model`` to 0, in modules and in the attributes that attention layers read."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class DeterministicNetwork(nn.Module):
    """A network around ``self.model`` that draws no random numbers in train mode.

    :meth:`ensure_deterministic` sees to that, or else the first forward pass.

    Args:
        model: of transformers.
    """

    device: torch.device | None = None
    """Where a sharded network computes, possibly not where its shards are; None: where its weights are."""

    def __init__(self, model: Any, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        self._evaluated: list[nn.Module] | None = None  # to keep in evaluation mode; None: not determined yet
        _remove_dropout(model)
        if gradient_checkpointing:
            options = {"use_reentrant": False, "context_fn": recomputing}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        self.train()

    def ensure_deterministic(self) -> None:
        """Ensure that results in train mode do not depend on random numbers.

        Raises:
            ConfigError: they do; names the module that draws them.
        """
        if not self._evaluated:
            self._evaluated = _evaluate_drawing_modules(self.model, lambda: probe_states(self.model, self.device))

    def without_draws(self, compute: Callable[[], T]) -> T:
        """``compute()``; if it draws random numbers, these are switched off and it is repeated."""
        if self._evaluated is None and self.training and not is_shadow(self.model):
            has_moved = _watch_states()
            result = compute()
            if not has_moved():
                self._evaluated = []
                return result
            # Not self.ensure_deterministic(), which a sharded network runs as a forward pass of its own.
            DeterministicNetwork.ensure_deterministic(self)
        return compute()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._evaluated or ():
            module.training = False
        return self


@torch.no_grad()
def _evaluate_drawing_modules(model: nn.Module, run: Run) -> list[nn.Module]:
    """Put those modules of ``model`` into evaluation mode that make ``run``, a small forward pass of it, depend on a
    random state, and return them. Most models have none. Every rank runs the model equally often.

    Raises:
        ConfigError: modules draw in evaluation mode as well, or weights are not finite; names them.
    """
    if is_shadow(model):
        return []
    name = type(model).__name__
    if reason := why_not_finite(dict(model.named_parameters())):  # of this rank's part
        raise ConfigError("policy", name, f"{reason}: take the model from before it broke")
    output, moved = _seeded_run(run, 0)
    if not torch.isfinite(output).all():
        remedy = "what it computes is not finite, though its weights are: try model.policy_options.dtype: float32"
        raise ConfigError("policy", name, remedy)
    found: list[nn.Module] = []
    drawing: list[nn.Module] = []
    random_numbers = False
    # Two runs under different seeds may agree, as draws can matter rarely, and a module's own generator is not watched:
    # so both are checked.
    while moved or _unequal(output, _seeded_run(run, 1)[0]):
        drawing, random_numbers = _drawing_modules(model, run)
        in_training = [module for module in drawing if module.training]
        if not in_training:
            break
        for module in in_training:
            module.training = False
        found += in_training
        output, moved = _seeded_run(run, 0)
    if drawing and any(_differ(run, seed) for seed in range(8)):
        what, does = "changes from one run to the next", "gives other results for the same input"
        if random_numbers:
            what, does = "depends on random numbers", "draws them"
        raise ConfigError(
            "policy",
            name,
            f"what it computes {what}, and not in training alone: {_named(model, drawing)} {does}; the ratio to the "
            "policy that sampled would be noise: take another model, or switch it off there",
        )
    if found:
        does = "gives other results for the same input in training"
        if random_numbers:
            does = "draws random numbers in training (router jitter, layer drop or the like)"
        warnings.warn(
            f"{name}: {_named(model, found)} {does}: like dropout, this is off, as it is while responses are sampled",
            stacklevel=4,
        )
    return found


def is_shadow(model: nn.Module) -> bool:
    """Whether the model is a dry run's, without values; judged by this rank's part if it is sharded."""
    return any(isinstance(getattr(p, "_local_tensor", p), FakeTensor) for p in model.parameters())


def _named(model: nn.Module, modules: list[nn.Module]) -> str:
    """``MixtralSparseMoeBlock (model.layers.0.mlp and 31 others)``"""
    names = {module: name for name, module in model.named_modules()}
    others = {1: "", 2: " and another"}.get(len(modules), f" and {len(modules) - 1} others")
    return f"{type(modules[0]).__name__} ({names[modules[0]] or 'the model'}{others})"


def _seeded_run(run: Run, seed: int) -> tuple[Tensor, bool]:
    """The output of a run, and whether it advanced a random state."""
    with _seeded(seed) as has_moved:
        return run(), has_moved()


def _differ(run: Run, seed: int) -> bool:
    """Whether two runs under different seeds differ by more than rounding."""
    return _unequal(_seeded_run(run, 2 * seed)[0], _seeded_run(run, 2 * seed + 1)[0])


def _unequal(one: Tensor, other: Tensor) -> bool:
    difference = (one - other).abs().max() / one.abs().max().clamp(min=1e-6)
    return not bool(difference <= torch.finfo(one.dtype).eps ** 0.6)


def _drawing_modules(model: nn.Module, run: Run) -> tuple[list[nn.Module], bool]:
    """The innermost modules that advance a random state, and whether random numbers are the cause. If there are none,
    those whose outputs differ for the same inputs, by a generator of their own or a counter of calls."""
    drew: dict[nn.Module, bool] = {}
    traces: list[list[tuple[nn.Module, list[Tensor], list[Tensor]]]] = []
    before: dict[nn.Module, tuple[Callable[[], bool], list[Tensor]]] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        before[module] = (_watch_states(), _tensors((args, kwargs)))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        advanced, inputs = before.pop(module)
        drew[module] = drew.get(module, False) or advanced()
        traces[-1].append((module, inputs, _tensors(output)))

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
    handles += [module.register_forward_hook(leave, with_kwargs=True) for module in model.modules()]
    try:
        for seed in (1, 2):
            traces.append([])
            with _seeded(seed):
                run()
    finally:
        for handle in handles:
            handle.remove()
    drawing = [module for module, drawn in drew.items() if drawn]
    random_numbers = bool(drawing)
    if not drawing:
        drawing = [
            module
            for (module, inputs, outputs), (_, others, different) in zip(*traces, strict=False)
            if _equal(inputs, others) and not _equal(outputs, different)
        ]
    outer = {parent for parent in drawing if any(child in drawing for child in list(parent.modules())[1:])}
    innermost = [module for module in dict.fromkeys(drawing) if module not in outer] or [model]
    kinds = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
    has_generator = any(isinstance(value, kinds) for module in innermost for value in vars(module).values())
    return innermost, random_numbers or has_generator


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _watch_states() -> Callable[[], bool]:
    """A function that tells whether any of the process's random states has changed since this call."""
    before = _states()
    return lambda: any(
        not torch.equal(old, new) if isinstance(old, Tensor) else old != new
        for old, new in zip(before, _states(), strict=True)
    )


def _states() -> list[Any]:
    kind, keys, *rest = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    on_device = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), random.getstate(), (kind, keys.tobytes(), *rest), *on_device]


@contextmanager
def _seeded(seed: int) -> Iterator[Callable[[], bool]]:
    """Within, all random states come from ``seed``; afterwards they are restored. Yields whether any has changed."""
    python, numbers = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: where CUDA is not initialised, each call keeps the formatted stack for when it is.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # the global state is what models draw from
        try:
            yield _watch_states()
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
