"""All memory that one rank holds while it generates and while it updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ibro_lightning.dry_run.engine_memory import EngineMemory
from ibro_lightning.dry_run.layout import Layout
from ibro_lightning.dry_run.networks import NetworkMemory, frozen_network, trained_network
from ibro_lightning.dry_run.shapes import Shapes
from ibro_lightning.modules import PPOModule


@dataclass(frozen=True)
class Row:
    """One line of the table: bytes while generating and while updating."""

    name: str
    generate: int = 0
    update: int = 0
    note: str = ""


@dataclass(frozen=True)
class MemoryEstimate:
    """Everything that is in memory at the same time.

    Args:
        networks: those that are trained, then a reference policy.
        engine: None if nothing generates.
        rollout: bytes of a rollout and its scores.
        layout: the layout that the estimate is for.
        notes: what the figures leave out.
    """

    networks: tuple[NetworkMemory, ...]
    engine: EngineMemory | None
    rollout: int
    layout: Layout
    notes: tuple[str, ...] = field(default=())

    @property
    def rows(self) -> list[Row]:
        """Rows of the device. Networks are updated one after the other, so only the largest update counts."""
        rows = []
        largest = max(self.networks, key=lambda network: network.update)
        offloaded = self.layout.cpu_offload
        for network in self.networks:
            on_device = 0 if offloaded else network.weights
            rows.append(Row(f"{network.name}: weights", on_device, on_device))
            if network.trained:
                states = 0 if offloaded else network.states
                rows.append(Row(f"{network.name}: optimizer states", states, states))
            if network.buckets:
                rows.append(Row(f"{network.name}: DDP's gradient buckets", network.buckets, network.buckets))
        name = f"{largest.name}: " if len(self.networks) > 1 else ""
        rows.append(Row(f"{name}gradients", 0, 0 if offloaded else largest.gradients))
        step_only = largest.step > largest.micro_batch
        temporaries = "temporaries of the optimizer step" if step_only else "activations, gathered weights, logits"
        rows.append(Row(f"{name}{temporaries}", 0, max(largest.step, largest.micro_batch)))
        rows.append(Row("rollout and scores", 0, self.rollout))
        if self.engine is not None:
            engine, on_host = self.engine, self.layout.device == "cpu"
            during = 1 if engine.overlaps else 0
            rows.append(Row("engine: weights", engine.weights, engine.weights if engine.stays else 0))
            rows.append(Row("engine: weights on their way", engine.in_transit if on_host else 0))
            rows.append(Row("engine: key-value cache", engine.cache, engine.cache * during, engine.note))
            rows.append(Row("engine: computing and sampling a token", engine.work, engine.work * during))
        return [row for row in rows if row.generate or row.update or row.note]

    @property
    def generate(self) -> int:
        """Bytes while responses are generated."""
        return sum(row.generate for row in self.rows)

    @property
    def update(self) -> int:
        """Bytes at the worst moment of an update."""
        return sum(row.update for row in self.rows)

    @property
    def peak(self) -> int:
        return max(self.generate, self.update)

    @property
    def host(self) -> int:
        """Bytes per rank in host memory: what is offloaded, engine weights that leave the device, and new ones on their
        way to another process."""
        offloaded = sum(n.weights + n.states + n.gradients for n in self.networks) if self.layout.cpu_offload else 0
        if (engine := self.engine) is None:
            return offloaded
        in_transit = 0 if self.layout.device == "cpu" else engine.in_transit
        return offloaded + in_transit + (0 if engine.stays or engine.dropped else engine.weights)


def estimate_memory(module: Any, shapes: Shapes, layout: Layout, engine: EngineMemory | None = None) -> MemoryEstimate:
    """Memory that one rank needs for a module's iterations. Replaces the module's networks by ones without values.

    Args:
        module: as constructed, without a trainer.
        shapes: of an iteration on one rank.
        engine: the engine's memory, if anything generates.
    """

    def trained(name: str, loss: Callable[[Any, Shapes], Tensor]) -> NetworkMemory:
        return trained_network(module, name, layout, partial(loss, module, shapes), shapes.micro_batches > 1)

    notes = []
    try:
        networks = [trained("policy", _policy_loss)]
    except (RuntimeError, TypeError, AttributeError) as error:
        # A custom loss or regulariser may read values, which do not exist here.
        reason = " ".join(str(error).split())[:120]
        notes.append(f"the loss was left out: it cannot be run on tensors without values ({reason})")
        networks = [trained("policy", _plain_loss)]
    if isinstance(module, PPOModule):
        networks.append(trained("critic", _value_loss))
    if module.kl is not None:
        networks.append(frozen_network("reference", module.kl.source, module.policy_options, layout))
    return MemoryEstimate(tuple(networks), engine, shapes.rollout_bytes(module), layout, tuple(notes))


def _policy_loss(module: Any, shapes: Shapes) -> Tensor:
    """Loss of one micro-batch, as an update computes it."""
    if module.policy_loss is None:
        return _plain_loss(module, shapes)
    policy_loss, context = module.policy_loss, module.context()
    step = policy_loss.prepare(shapes.experience(module), context)
    micro = step.micro_batch()
    return policy_loss(policy_loss.stats(micro, context), micro)[0]


def _plain_loss(module: Any, shapes: Shapes) -> Tensor:
    with_entropy = module.policy_loss is not None
    logp, entropy = module.policy(shapes.sequences().pad(), temperature=1.0, with_entropy=with_entropy)
    loss: Tensor = logp.sum() if entropy is None else logp.sum() + entropy.sum()
    return loss


def _value_loss(module: PPOModule, shapes: Shapes) -> Tensor:
    micro, loss = shapes.experience(module).micro_batch(), module.value_loss
    return loss(loss.stats(micro, module.context()), micro)[0]
