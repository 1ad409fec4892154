"""What one rank needs for a network that is trained: its update run once, as it is, on tensors without memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from ibro_lightning.errors import ConfigError
from ibro_lightning.estimate.layout import Layout
from ibro_lightning.estimate.shadow import ShadowMemory
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
    """Bytes of one rank.

    Args:
        name: policy, critic or reference.
        parameters, trained: numbers of them, in the whole network.
        weights, states: of the network and its optimizer, there from the first update to the last.
        gradients: there during an update.
        micro_batch: what else is alive at the worst moment of a micro-batch: activations, gathered weights, logits.
        step: what else is alive, beside the gradients, at the worst moment of the optimizer step.
        buckets: DDP's copy of the gradients, always there.
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
        """Alive all the time."""
        return self.weights + self.states + self.buckets

    @property
    def update(self) -> int:
        """The most that an update adds to :attr:`always`."""
        return self.gradients + max(self.micro_batch, self.step)


def parameter_count(source: PolicySource, options: PolicyOptions) -> int:
    """Of the language model, tied ones counted once."""
    return _count(_empty(source, AutoModelForCausalLM, options))


def frozen_network(name: str, source: PolicySource, options: PolicyOptions, layout: Layout) -> NetworkMemory:
    """A network that is only run forward: a reference policy."""
    with layout.sharding() as sharding:
        network = _policy(source, options, frozen=True)
        count = _count(network)
        with ShadowMemory(layout.device) as memory:
            _materialize(network, sharding, memory)
            return NetworkMemory(name, count, 0, memory.now)


def policy_network(module: Any, layout: Layout, loss: Callable[[], Tensor], *, accumulates: bool) -> NetworkMemory:
    """The policy of a :class:`PolicyModule`; ``loss`` runs one micro-batch through ``module.policy``."""

    def build() -> nn.Module:
        module.policy = _policy(module.policy_source, module.policy_options)
        policy: nn.Module = module.policy
        return policy

    return _trained("policy", build, module.optimizer_factory, layout, loss, module.max_grad_norm, accumulates)


def critic_network(module: Any, layout: Layout, loss: Callable[[], Tensor], *, accumulates: bool) -> NetworkMemory:
    """The critic of a :class:`PPOModule`; ``loss`` runs one micro-batch through ``module.critic``."""

    def build() -> nn.Module:
        options = module.policy_options
        model = _empty(module.critic_source, AutoModelForTokenClassification, options)
        module.critic = Critic(model, gradient_checkpointing=options.gradient_checkpointing, packing=options.packing)
        critic: nn.Module = module.critic
        return critic

    factory = module.critic_optimizer_factory
    return _trained("critic", build, factory, layout, loss, module.max_grad_norm, accumulates)


def _trained(
    name: str,
    build: Callable[[], nn.Module],
    factory: Callable[[Any], torch.optim.Optimizer],
    layout: Layout,
    loss: Callable[[], Tensor],
    max_grad_norm: float,
    accumulates: bool,
) -> NetworkMemory:
    with layout.sharding() as sharding, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a real run has to say, it will
        network = build()
        count, trained = _count(network), _count(network, trained=True)
        with ShadowMemory(layout.device) as memory, layout.autocast():
            _materialize(network, sharding, memory)
            weights = memory.now
            parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
            optimizer = _optimizer(factory, parameters, name, layout)
            _give_gradients(parameters)
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


def _optimizer(
    factory: Callable[[Any], torch.optim.Optimizer], parameters: list[nn.Parameter], name: str, layout: Layout
) -> torch.optim.Optimizer:
    try:
        optimizer = factory(parameters)
    except (TypeError, ValueError) as error:
        setting = "model.optimizer" if name == "policy" else f"model.{name}_optimizer"
        raise ConfigError(setting, "given", f"the optimizer refuses its settings: {error}") from error
    for group in optimizer.param_groups if layout.device != "cpu" else ():
        # What torch chooses on accelerators: all parameters at once, which takes copies of all of them.
        if group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def _give_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def _policy(source: PolicySource, options: PolicyOptions, *, frozen: bool = False) -> Policy:
    """As ``build_policy`` makes it, without values."""
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
    """The model on the meta device; its config is enough."""
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
