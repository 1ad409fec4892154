"""Networks sharded over several processes, compared with the same ones in one piece."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from helpers.models import qwen2
from helpers.processes import HANGS_S, logs, run_ranks
from helpers.rollouts import PROMPTS, RESPONSES
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.models import (
    Critic,
    Policy,
    PolicyOptions,
    PretrainedPolicy,
    Sharding,
    build_critic,
    build_policy,
    clip_gradients,
    full_tensor,
    grad_norm,
)
from ibro_lightning.runs.checkpoints.plugin import CheckpointFiles

OPTIONS = PolicyOptions(dtype="float64")  # type: ignore[arg-type]  # rounding must not hide a mistake


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None: ...


def on_ranks(count: int, function: Callable[..., None], *arguments: Any, folder: Path) -> None:
    codes = run_ranks(count, function, *arguments, folder=folder)
    assert codes == [0] * count, f"exit codes {codes}\n{logs(folder)}"


def meet(data_parallel: int = 2, tensor_parallel: int = 1) -> Sharding:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=HANGS_S))
    mesh = init_device_mesh(
        "cpu", (data_parallel, tensor_parallel), mesh_dim_names=("data_parallel", "tensor_parallel")
    )
    return Sharding(mesh, torch.device("cpu"))


def saved_model(folder: Path, **overrides: Any) -> Path:
    qwen2(**overrides).save_pretrained(folder)
    return folder


def source_of(folder: Path, options: PolicyOptions = OPTIONS) -> PretrainedPolicy:
    return PretrainedPolicy(str(folder), options)


def objective(network: nn.Module, rows: list[int]) -> Tensor:
    """A sum over rows, so that shares add up."""
    sequences = Sequences.collate([PROMPTS[row] for row in rows], [RESPONSES[row] for row in rows])
    if isinstance(network, Critic):
        return (network(sequences) - 1).square().sum()
    logp, entropy = network(sequences, temperature=0.8)
    assert logp.dtype == (torch.float64 if next(network.parameters()).dtype == torch.float64 else torch.float32)
    return logp.sum() - 0.3 * entropy.sum()


def backward(network: nn.Module, sharding: Sharding | None = None) -> None:
    """Gradients of all rows, in two micro-batches; each rank takes its share of both."""
    size, rank = (sharding.data_parallel_size, sharding.mesh["data_parallel"].get_local_rank()) if sharding else (1, 0)
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
        (objective(network, rows[rank::size]) * size).backward()


def trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def check_same_weights(ours: Policy, theirs: Policy, tolerance: float = 0.0) -> None:
    expected = dict(theirs.named_full_weights())
    got = dict(ours.named_full_weights())
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert type(got[name]) is Tensor
        assert got[name].dtype == tensor.dtype
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def check_training(sharded: Any, single: Any, sharding: Sharding, steps: int = 3, tolerance: float = 1e-10) -> None:
    """Loss, gradients, their norm, clipped and stepped weights of a sharded network and of one in one piece."""
    optimizers = [torch.optim.AdamW(trainable(network), lr=1e-2) for network in (single, sharded)]
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(single)
        backward(sharded, sharding)
        for (name, expected), (ours, parameter) in zip(
            single.named_parameters(), sharded.named_parameters(), strict=True
        ):
            assert ours == name
            assert (expected.grad is None) == (parameter.grad is None), name
            if expected.grad is not None:
                size = expected.grad.abs().max().item()
                torch.testing.assert_close(
                    full_tensor(parameter.grad), expected.grad, rtol=0, atol=tolerance * (1 + size)
                )
        norms = [clip_gradients(network.parameters(), 1.0) for network in (single, sharded)]
        assert type(norms[1]) is Tensor
        torch.testing.assert_close(norms[1], norms[0], rtol=tolerance, atol=0)
        assert abs(grad_norm(sharded.parameters()).item() - 1) < 1e-6
        for optimizer in optimizers:
            optimizer.step()
        # A forward pass before weights are handed out: they must be the new ones all the same.
        with torch.no_grad():
            torch.testing.assert_close(
                objective(sharded, [0, 1]), objective(single, [0, 1]), rtol=tolerance, atol=tolerance
            )
        if isinstance(sharded, Policy):
            check_same_weights(sharded, single, tolerance)


class TwoNetworks(pl.LightningModule):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.source = source_of(folder)

    def configure_model(self) -> None:
        if not hasattr(self, "policy"):
            self.sharding = getattr(self.trainer.strategy, "sharding", None)
            self.policy = build_policy(self.source, OPTIONS, self.sharding)
            self.critic = build_critic(self.source, OPTIONS, self.sharding)

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-2) for network in (self.policy, self.critic)]
        return optimizers, [torch.optim.lr_scheduler.ConstantLR(optimizer) for optimizer in optimizers]

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(range(2))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for network, optimizer in zip((self.policy, self.critic), optimizers, strict=True):
            backward(network, self.sharding)
            clip_gradients(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def fit(folder: Path, epochs: int, save: Path, resume: Path | None, strategy: Any = "auto", devices: int = 1) -> None:
    trainer = pl.Trainer(
        plugins=CheckpointFiles(),
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = TwoNetworks(folder)
    trainer.fit(module, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(save)
