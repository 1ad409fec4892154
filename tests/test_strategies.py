"""``fsdp2`` on two processes: the same losses, gradients, weights and checkpoints as one, at half the memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from helpers.models import qwen2
from helpers.rollouts import PROMPTS, RESPONSES
from helpers.sharded import (
    OPTIONS,
    NoTokenizer,
    backward,
    check_training,
    fit,
    meet,
    objective,
    on_ranks,
    saved_model,
    source_of,
    trainable,
)
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import (
    PolicyOptions,
    build_critic,
    build_policy,
    clip_gradients,
    export_folder,
    full_tensor,
    grad_norm,
)
from ibro_lightning.runs.checkpoints.plugin import read_checkpoint
from ibro_lightning.strategies import FSDP2Strategy

torch.set_num_threads(1)
ROWS = range(len(PROMPTS))
FOLDERS = {"save_distributed_checkpoint": True}


# What the processes of this and other files share.


# Two processes, without Lightning.


def variants(tied: Path, untied: Path) -> Iterator[tuple[Path, PolicyOptions, dict[str, Any]]]:
    yield tied, OPTIONS, {}
    yield untied, OPTIONS, {}
    yield tied, replace(OPTIONS, gradient_checkpointing=True), {}
    yield untied, replace(OPTIONS, fused_head=False), {"reshard_after_forward": False}
    yield tied, OPTIONS, {"cpu_offload": True}


def train_each_variant(tied: Path, untied: Path) -> None:
    sharding = meet()
    for folder, options, settings in variants(tied, untied):
        here = replace(sharding, **settings)
        source = source_of(folder, options)
        policy, single = build_policy(source, options, here), build_policy(source, options)
        assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
        blocks = [module for module in policy.modules() if isinstance(module, FSDPModule)]
        assert len(blocks) == (3 if folder == tied else 4), (
            "two blocks, the root, and an embedding that is not the head"
        )
        check_training(policy, single, here)
        check_training(build_critic(source, options, here), build_critic(source, options), here, steps=2)
        frozen = build_policy(source, options, here, frozen=True)
        assert not trainable(frozen)
        with torch.no_grad():
            expected = objective(build_policy(source, options), list(ROWS))
            torch.testing.assert_close(objective(frozen, list(ROWS)), expected, rtol=1e-12, atol=0)


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    tied = saved_model(tmp_path / "tied")
    untied = saved_model(tmp_path / "untied", tie_word_embeddings=False, vocab_size=23, num_hidden_layers=2)
    on_ranks(2, train_each_variant, tied, untied, folder=tmp_path)


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def compare_mixed_precision(folder: Path) -> None:
    options = PolicyOptions()
    sharding = replace(meet(), dtype=torch.bfloat16)
    source = source_of(folder, options)
    policy, single = build_policy(source, options, sharding), build_policy(source, options)
    exact = build_policy(source, options)
    values, gradients = [], []
    for network, here, context in (
        (policy, sharding, autocast()),
        (single, None, autocast()),
        (exact, None, nullcontext()),
    ):
        with context:
            values.append(network(Sequences.collate(PROMPTS, RESPONSES), temperature=0.8)[0])
            backward(network, here)
        gradients.append(torch.cat([full_tensor(p.grad).flatten() for p in network.parameters()]))
    assert all(value.dtype == torch.float32 for value in values)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    # Autocast's own rounding, measured against float32, is the yardstick: ours must be the same one, not another.
    rounding = (values[1] - values[2]).abs().max()
    assert (values[0] - values[1]).abs().max() <= 0.1 * rounding
    assert (gradients[0] - gradients[1]).norm() <= 0.3 * (gradients[1] - gradients[2]).norm()


def test_mixed_precision_rounds_as_autocast_does_on_one_device(tmp_path: Path) -> None:
    on_ranks(
        2,
        compare_mixed_precision,
        saved_model(tmp_path / "model", hidden_size=64, num_attention_heads=4),
        folder=tmp_path,
    )


def local_bytes(network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Parameters, gradients and optimizer states that this process keeps."""
    kept = [*network.parameters(), *(p.grad for p in network.parameters() if p.grad is not None)]
    kept += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in kept]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # gradients share a buffer


def compare_memory(folder: Path) -> None:
    options = PolicyOptions()
    sharding = meet()
    used = []
    for here in (sharding, None):
        policy = build_policy(source_of(folder, options), options, here)
        optimizer = torch.optim.AdamW(policy.parameters())
        backward(policy, here)
        optimizer.step()
        used.append(local_bytes(policy, optimizer))
    number = sum(parameter.numel() for parameter in policy.parameters())
    assert used[1] >= 4 * 4 * number, "weight, gradient and two moments, in float32"
    assert used[0] <= 0.6 * used[1], f"{used[0]} of {used[1]} bytes"


def test_two_ranks_keep_at_most_six_tenths_each(tmp_path: Path) -> None:
    on_ranks(2, compare_memory, saved_model(tmp_path / "model", hidden_size=64, vocab_size=500), folder=tmp_path)


def export_and_read(folder: Path) -> None:
    sharding = meet()
    source = source_of(folder)
    policy, critic = build_policy(source, OPTIONS, sharding), build_critic(source, OPTIONS, sharding)
    with torch.no_grad():
        for parameter in itertools.chain(policy.parameters(), critic.parameters()):
            parameter.mul_(1.5).add_(0.25)
    weights = dict(policy.named_full_weights())
    export_folder(policy.model, NoTokenizer(), Path("out/model"))
    export_folder(critic.model, NoTokenizer(), Path("out/critic"))
    # Every rank finds the folders whole: rank 0 has been waited for.
    model = AutoModelForCausalLM.from_pretrained("out/model", dtype=torch.float64)
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    assert model.config.dtype == torch.float64
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    again = build_critic(source_of(Path("out/critic")), OPTIONS)
    for (name, expected), parameter in zip(again.named_parameters(), critic.parameters(), strict=True):
        assert torch.equal(expected, full_tensor(parameter)), name
    try:
        if distributed.get_rank() == 0:
            Path("blocked").write_text("a file where a folder should be")
        distributed.barrier()
        export_folder(policy.model, NoTokenizer(), Path("blocked/model"))
    except OSError:
        return
    raise AssertionError("rank 0 cannot write, and this rank has not heard of it")


def test_a_sharded_model_is_exported_whole(tmp_path: Path) -> None:
    on_ranks(2, export_and_read, saved_model(tmp_path / "model"), folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["critic", "model"]


# Gradients in one piece.


def test_the_norm_of_plain_gradients_is_torchs_bit_for_bit() -> None:
    models = [qwen2(), qwen2()]
    for model in models:
        for index, parameter in enumerate(model.parameters()):
            if index % 3:
                parameter.grad = parameter.detach() * index
    expected = nn.utils.clip_grad_norm_(models[0].parameters(), 2.0)
    assert torch.equal(grad_norm(models[1].parameters()), expected)
    assert torch.equal(clip_gradients(models[1].parameters(), 0.0), expected), "0 clips nothing"
    assert torch.equal(grad_norm(models[1].parameters()), expected)
    assert torch.equal(clip_gradients(models[1].parameters(), 2.0), expected)
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert ours.grad is None if theirs.grad is None else torch.equal(ours.grad, theirs.grad)


# Through Lightning: two networks, two optimizers, checkpoints to and from one process.


def fit_sharded(folder: Path, epochs: int, save: Path, resume: Path | None, settings: dict[str, Any]) -> None:
    fit(folder, epochs, save, resume, FSDP2Strategy(**settings), devices=int(os.environ["WORLD_SIZE"]))
    distributed.barrier()


def check_same_checkpoints(path: Path, expected: Path, tolerance: float) -> None:
    ours, theirs = (read_checkpoint(p) for p in (path, expected))
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    assert ours["global_step"] == theirs["global_step"]
    for name, tensor in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], tensor, rtol=0, atol=tolerance)
    assert len(ours["optimizer_states"]) == len(theirs["optimizer_states"]) == 2
    for state, wanted in zip(ours["optimizer_states"], theirs["optimizer_states"], strict=True):
        assert state["param_groups"] == wanted["param_groups"]
        assert list(state["state"]) == list(wanted["state"])
        for number, entry in wanted["state"].items():
            assert list(state["state"][number]) == list(entry)
            for key, value in entry.items():
                torch.testing.assert_close(state["state"][number][key], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        FOLDERS,
        *(pytest.param(s, marks=pytest.mark.slow) for s in ({"cpu_offload": True}, {"tensor_parallel_size": 2})),
    ],
    ids=str,
)
def test_checkpoints_go_from_one_process_to_two_and_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = saved_model(tmp_path / "model", **heads)
    single = {epochs: tmp_path / f"single{epochs}.ckpt" for epochs in (1, 2)}
    for epochs, path in single.items():
        fit(model, epochs, path, None)
    begun, resumed = tmp_path / "two1.ckpt", tmp_path / "two2.ckpt"
    on_ranks(2, fit_sharded, model, 1, begun, None, settings, folder=tmp_path)
    check_same_checkpoints(begun, single[1], 1e-9)
    on_ranks(2, fit_sharded, model, 2, resumed, single[1], settings, folder=tmp_path)
    check_same_checkpoints(resumed, single[2], 1e-9)
    fit(model, 2, tmp_path / "back.ckpt", begun)
    check_same_checkpoints(tmp_path / "back.ckpt", single[2], 1e-9)


def test_a_run_resumed_on_as_many_ranks_ends_with_the_same_bits(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    paths = [tmp_path / name for name in ("whole.ckpt", "half.ckpt", "resumed.ckpt")]
    on_ranks(2, fit_sharded, model, 2, paths[0], None, {}, folder=tmp_path)
    on_ranks(2, fit_sharded, model, 1, paths[1], None, {}, folder=tmp_path)
    on_ranks(2, fit_sharded, model, 2, paths[2], paths[1], {}, folder=tmp_path)
    check_same_checkpoints(paths[2], paths[0], 0.0)


# Settings.


def trainer_with(strategy: Any, **settings: Any) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", strategy=strategy, logger=False, enable_checkpointing=False, **settings)


def test_the_name_fsdp2_is_registered() -> None:
    strategy = trainer_with("fsdp2", devices=2).strategy
    assert type(strategy) is FSDP2Strategy
    assert strategy.sharding is None, "there is no mesh before the processes have met"


def test_a_recipe_can_name_the_class_and_its_settings() -> None:
    parser = ArgumentParser()
    parser.add_argument("--strategy", type=pl.strategies.Strategy)
    settings = ["--strategy=FSDP2Strategy", "--strategy.tensor_parallel_size=2", "--strategy.timeout=0:10:00"]
    strategy = parser.instantiate(parser.parse_args([*settings, "--strategy.cpu_offload=true"])).strategy
    assert type(strategy) is FSDP2Strategy
    assert strategy.cpu_offload
    assert strategy._timeout == timedelta(minutes=10)


@pytest.mark.parametrize(
    ("settings", "trainer", "said"),
    [
        (
            {"tensor_parallel_size": 3},
            {},
            "tensor_parallel_size: 3 - it must divide the number of processes, which is 2",
        ),
        ({}, {"precision": "bf16-true"}, "trainer.precision: 'bf16-true' - not supported with fsdp2"),
        ({"tensor_parallel_size": 0}, {}, "tensor_parallel_size: 0 - write 1 or more"),
        ({"timeout": timedelta(0)}, {}, "timeout: '0:00:00' - write a positive time"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], trainer: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer_with(FSDP2Strategy(**settings), devices=2, **trainer).strategy.setup_environment()
