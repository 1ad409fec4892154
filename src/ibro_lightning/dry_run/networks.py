"""Memory of a trained network on one rank: its real update is run once, on tensors without memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ibro_lightning.dry_run.layout import Layout
from ibro_lightning.dry_run.shadow import ShadowMemory
from ibro_lightning.models import PolicyOptions, PolicySource, Sharding, clip_gradients
from ibro_lightning.models.building import empty_model, wrap_critic, wrap_policy
from ibro_lightning.models.sharding import materialize, shard
from ibro_lightning.modules.network_optimizers import optimizer_of


@dataclass(frozen=True)
class NetworkMemory:
    """Bytes on one rank.

    Args:
        name: policy, critic or reference.
        parameters, trained: their numbers, in the whole network.
        weights, states: of the network and its optimizer, from the first update to the last.
        gradients: during an update.
        micro_batch: additional peak in a micro-batch: activations, gathered weights, logits.
        step: additional peak, besides the gradients, in the optimizer step.
        buckets: DDP's copy of the gradients, always present.
    """

    name: str
    parameters: int
    trained: int
    weights: int
    states: int = 0
    gradients: int = 0
    micro_batch: int = 0
    step: int = 0
    buckets: int = 0

    @property
    def always(self) -> int:
        """Bytes that are always present."""
        return self.weights + self.states + self.buckets

    @property
    def update(self) -> int:
        """Peak that an update adds to :attr:`always`."""
        return self.gradients + max(self.micro_batch, self.step)


def parameter_count(source: PolicySource, options: PolicyOptions) -> int:
    """Parameters of the language model, tied ones counted once."""
    return _count(empty_model(source, options))


def frozen_network(name: str, source: PolicySource, options: PolicyOptions, layout: Layout) -> NetworkMemory:
    """Memory of a network that only runs forward: a reference policy."""
    with layout.sharding() as sharding:
        network = wrap_policy(empty_model(source, options), options, frozen=True, empty=True)
        count = _count(network)
        with ShadowMemory(layout.device) as memory:
            _materialize(network, sharding, memory)
            return NetworkMemory(name, count, 0, memory.now)


def trained_network(
    module: Any, name: str, layout: Layout, loss: Callable[[], Tensor], accumulates: bool
) -> NetworkMemory:
    """Memory of the ``policy`` or the ``critic`` of a module, which is given it without values.

    Args:
        loss: runs one micro-batch through it.
        accumulates: whether an optimizer step has several micro-batches.
    """
    options = module.policy_options
    with layout.sharding() as sharding, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a real run gives them
        if name == "policy":
            network: Any = wrap_policy(empty_model(module.policy_source, options), options, empty=True)
        else:
            network = wrap_critic(empty_model(module.critic_source, options, critic=True), options)
        setattr(module, name, network)
        count, trained = _count(network), _count(network, trained=True)
        with ShadowMemory(layout.device) as memory, layout.autocast():
            _materialize(network, sharding, memory)
            weights = memory.now
            parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
            optimizer = optimizer_of(module, name, parameters)
            for group in optimizer.param_groups if layout.device != "cpu" else ():
                # torch's choice on accelerators: all parameters at once, which copies all of them.
                if group.get("foreach", True) is None and not group.get("fused"):
                    group["foreach"] = True
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            gradients = memory.now - weights
            optimizer.step()
            states = memory.now - weights - gradients
            if not accumulates:
                optimizer.zero_grad()
            memory.peak = memory.now
            loss().backward()
            before, micro_peak = weights + states + gradients, memory.peak
            memory.peak = memory.now
            clip_gradients(network.parameters(), module.updater.max_grad_norm)
            optimizer.step()
            return NetworkMemory(
                name=name,
                parameters=count,
                trained=trained,
                weights=weights,
                states=states,
                gradients=gradients,
                micro_batch=micro_peak - before,
                step=memory.peak - before,
                buckets=gradients if layout.kind == "ddp" else 0,
            )


def _materialize(network: Any, sharding: Sharding | None, memory: ShadowMemory) -> None:
    if sharding is not None:
        shard(network, sharding)
        network.device = sharding.device
    with memory.without_values():
        materialize(network, torch.device("cpu"))


def _count(network: nn.Module, *, trained: bool = False) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad or not trained)
