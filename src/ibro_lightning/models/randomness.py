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
from ibro_lightning.models.transformer import probe_states

T = TypeVar("T")
Run = Callable[[], Tensor]


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout probability in ``model`` to 0, in modules and in the attributes that attention layers read."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class StillNetwork(nn.Module):
    """A network around ``self.model`` that draws no random numbers in train mode.

    :meth:`hold_still` ensures that, or else the first forward pass.
    """

    model: Any
    device: torch.device | None = None
    """Where a sharded network computes, possibly not where its shards are; None: where its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self._still: list[nn.Module] | None = None  # to keep in evaluation mode; None: not determined yet

    def hold_still(self) -> None:
        """Ensure that results in train mode do not depend on random numbers.

        Raises:
            ConfigError: they do; names the module that draws them.
        """
        self._still = self._still or still_modules(self.model, lambda: probe_states(self.model, self.device))

    def without_draws(self, compute: Callable[[], T]) -> T:
        """``compute()``; if it draws random numbers, these are switched off and it is repeated."""
        if self._still is None and self.training and not _is_shadow(self.model):
            has_moved = _watch_states()
            result = compute()
            if not has_moved():
                self._still = []
                return result
            # Not self.hold_still(), which a sharded network runs as a forward pass of its own.
            StillNetwork.hold_still(self)
        return compute()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._still or ():
            module.training = False
        return self


@torch.no_grad()
def still_modules(model: nn.Module, run: Run, setting: str = "policy") -> list[nn.Module]:
    """Put those modules of ``model`` into evaluation mode that make ``run`` depend on a random state, and return them.
    Most models have none. Every rank runs the model equally often.

    Args:
        model: as it is trained.
        run: a small forward pass of it.
        setting: name of the model's setting, for errors.

    Raises:
        ConfigError: modules draw in evaluation mode as well, or weights are not finite; names them.
    """
    if _is_shadow(model):
        return []
    _check_finite(model, run, setting)
    found: list[nn.Module] = []
    drawing: list[nn.Module] = []
    random_numbers = False
    while _draws(run):
        drawing, random_numbers = _drawing_modules(model, run)
        in_training = [module for module in drawing if module.training]
        if not in_training:
            break
        for module in in_training:
            module.training = False
        found += in_training
    if drawing and any(_differ(run, seed) for seed in range(8)):
        what, does = (
            ("depends on random numbers", "draws them")
            if random_numbers
            else ("changes from one run to the next", "gives other results for the same input")
        )
        raise ConfigError(
            setting,
            type(model).__name__,
            f"what it computes {what}, and not in training alone: {_named(model, drawing)} {does}; the ratio to the "
            "policy that sampled would be noise: take another model, or switch it off there",
        )
    if found:
        does = (
            "draws random numbers in training (router jitter, layer drop or the like)"
            if random_numbers
            else "gives other results for the same input in training"
        )
        warnings.warn(
            f"{type(model).__name__}: {_named(model, found)} {does}: like dropout, this is off, as it is while "
            "responses are sampled",
            stacklevel=4,
        )
    return found


def _is_shadow(model: nn.Module) -> bool:
    """Whether the model is a dry run's, without values; judged by this rank's part if it is sharded."""
    return any(isinstance(getattr(p, "_local_tensor", p), FakeTensor) for p in model.parameters())


def _check_finite(model: nn.Module, run: Run, setting: str) -> None:
    """Raise :class:`ConfigError` if a weight, or the model's output, is not finite."""
    for name, parameter in model.named_parameters():
        values = getattr(parameter, "_local_tensor", parameter)  # this rank's part if sharded
        if not torch.isfinite(values).all():
            remedy = f"its weight {name} is not finite (NaN or infinity): take the model from before it broke"
            raise ConfigError(setting, type(model).__name__, remedy)
    with _seeded(0):
        output = run()
    if not torch.isfinite(output).all():
        remedy = "what it computes is not finite, though its weights are: try model.policy_options.dtype: float32"
        raise ConfigError(setting, type(model).__name__, remedy)


def _named(model: nn.Module, modules: list[nn.Module]) -> str:
    """``MixtralSparseMoeBlock (model.layers.0.mlp and 31 others)``"""
    names = {module: name for name, module in model.named_modules()}
    others = {1: "", 2: " and another"}.get(len(modules), f" and {len(modules) - 1} others")
    return f"{type(modules[0]).__name__} ({names[modules[0]] or 'the model'}{others})"


def _draws(run: Run) -> bool:
    """Whether a run advances a random state or depends on one. Two runs under different seeds may agree, as draws can
    matter rarely, and a module's own generator is not watched: so both are checked."""
    with _seeded(0) as has_moved:
        run()
        moved = has_moved()
    return moved or _differ(run, 0)


def _differ(run: Run, seed: int) -> bool:
    """Whether two runs under different seeds differ by more than rounding."""
    outputs = []
    for run_seed in (2 * seed, 2 * seed + 1):
        with _seeded(run_seed):
            outputs.append(run())
    difference = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max().clamp(min=1e-6)
    return not bool(difference <= torch.finfo(outputs[0].dtype).eps ** 0.6)


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

    handles = [
        handle
        for module in model.modules()
        for handle in (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        )
    ]
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
    return innermost, random_numbers or any(_has_generator(module) for module in innermost)


def _has_generator(module: nn.Module) -> bool:
    kinds = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
    return any(isinstance(value, kinds) for value in vars(module).values())


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
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # the global state is what models draw from
        try:
            yield _watch_states()
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
