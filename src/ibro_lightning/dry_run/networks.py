"""Memory of a trained network on one rank: its real update is run once, on tensors without memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from ibro_lightning.dry_run.layout import Layout
from ibro_lightning.dry_run.shadow import ShadowMemory
from ibro_lightning.models import (
    Critic,
    Policy,
    PolicyOptions,
    PolicySource,
    PretrainedPolicy,
    Sharding,
    clip_gradients,
)
from ibro_lightning.models.building import parameters_on_meta
from ibro_lightning.models.lora import add_adapters
from ibro_lightning.models.sharding import materialize, shard


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
    return _count(_empty(source, AutoModelForCausalLM, options))


def frozen_network(name: str, source: PolicySource, options: PolicyOptions, layout: Layout) -> NetworkMemory:
    """Memory of a network that only runs forward: a reference policy."""
    with layout.sharding() as sharding:
        network = _policy(source, options, frozen=True)
        count = _count(network)
        with ShadowMemory(layout.device) as memory:
            _materialize(network, sharding, memory)
            return NetworkMemory(name, count, 0, memory.now)


def policy_network(module: Any, layout: Layout, loss: Callable[[], Tensor], *, accumulates: bool) -> NetworkMemory:
    """Memory of a :class:`PolicyModule`'s policy; ``loss`` runs one micro-batch through ``module.policy``."""

    def build() -> nn.Module:
        module.policy = _policy(module.policy_source, module.policy_options)
        policy: nn.Module = module.policy
        return policy

    make_optimizer = partial(module.make_optimizer, "policy")
    return _trained_network("policy", build, make_optimizer, layout, loss, module.updater.max_grad_norm, accumulates)


def critic_network(module: Any, layout: Layout, loss: Callable[[], Tensor], *, accumulates: bool) -> NetworkMemory:
    """Memory of a :class:`PPOModule`'s critic; ``loss`` runs one micro-batch through ``module.critic``."""

    def build() -> nn.Module:
        options = module.policy_options
        model = _empty(module.critic_source, AutoModelForTokenClassification, options)
        module.critic = Critic(model, gradient_checkpointing=options.gradient_checkpointing, packing=options.packing)
        critic: nn.Module = module.critic
        return critic

    make_optimizer = partial(module.make_optimizer, "critic")
    return _trained_network("critic", build, make_optimizer, layout, loss, module.updater.max_grad_norm, accumulates)


def _trained_network(
    name: str,
    build: Callable[[], nn.Module],
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    layout: Layout,
    loss: Callable[[], Tensor],
    max_grad_norm: float,
    accumulates: bool,
) -> NetworkMemory:
    with layout.sharding() as sharding, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a real run gives them
        network = build()
        count, trained = _count(network), _count(network, trained=True)
        with ShadowMemory(layout.device) as memory, layout.autocast():
            _materialize(network, sharding, memory)
            weights = memory.now
            parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
            optimizer = _with_device_defaults(make_optimizer(parameters), layout)
            _allocate_gradients(parameters)
            gradients = memory.now - weights
            optimizer.step()
            states = memory.now - weights - gradients
            if not accumulates:
                optimizer.zero_grad()
            memory.peak = memory.now
            loss().backward()
            before, micro_peak = weights + states + gradients, memory.peak
            memory.peak = memory.now
            clip_gradients(network.parameters(), max_grad_norm)
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


def _with_device_defaults(optimizer: torch.optim.Optimizer, layout: Layout) -> torch.optim.Optimizer:
    for group in optimizer.param_groups if layout.device != "cpu" else ():
        # torch's choice on accelerators: all parameters at once, which copies all of them.
        if group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def _allocate_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def _policy(source: PolicySource, options: PolicyOptions, *, frozen: bool = False) -> Policy:
    """The policy as ``build_policy`` makes it, without values."""
    model = _empty(source, AutoModelForCausalLM, options)
    if options.lora is not None and not frozen:
        add_adapters(model, options.lora, empty=True)
    policy = Policy(
        model,
        gradient_checkpointing=options.gradient_checkpointing and not frozen,
        fused_head=options.fused_head,
        packing=options.packing,
    )
    return policy.requires_grad_(False) if frozen else policy


def _empty(source: PolicySource, auto_class: Any, options: PolicyOptions) -> Any:
    """The model on the meta device, from its config alone."""
    config = copy.deepcopy(source.config())
    if auto_class is AutoModelForTokenClassification:
        config.num_labels = 1
    with parameters_on_meta():
        if isinstance(source, PretrainedPolicy):
            return source.empty(auto_class, config, options)
        return auto_class.from_config(
            config, dtype=getattr(torch, options.dtype), attn_implementation=options.attn_implementation
        )


def _materialize(network: Any, sharding: Sharding | None, memory: ShadowMemory) -> None:
    if sharding is not None:
        shard(network, sharding)
        network.device = sharding.device
    with memory.without_values():
        materialize(network, torch.device("cpu"))


def _count(network: nn.Module, *, trained: bool = False) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad or not trained)
