"""Blocks cut over two processes that see the same data: gradients, weights and exports of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from helpers.models import gpt2, qwen2
from helpers.sharded import (
    OPTIONS,
    NoTokenizer,
    check_same_weights,
    check_training,
    meet,
    on_ranks,
    saved_model,
    source_of,
)
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import build_critic, build_policy, export_folder, full_tensor
from ibro_lightning.models.tensor_parallel import parallelize

torch.set_num_threads(1)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def saved_qwen3(folder: Path) -> Path:
    """With a norm of each head's queries and keys, whose gradient is a sum over the ranks' heads."""
    shapes: dict[str, Any] = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    config = Qwen3Config(
        **shapes, **HEADS, num_hidden_layers=2, initializer_range=0.4, max_position_embeddings=64, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, 0.5, 2.0)
    model.save_pretrained(folder)
    return folder


def train(folders: list[Path], data_parallel: int) -> None:
    sharding = meet(data_parallel, 2)
    assert (sharding.data_parallel_size, sharding.tensor_parallel_size) == (data_parallel, 2)
    for number, folder in enumerate(folders):
        source = source_of(folder)
        policy, single = build_policy(source, OPTIONS, sharding), build_policy(source, OPTIONS)
        check_same_weights(policy, single)
        queries = policy.get_parameter("model.model.layers.0.self_attn.q_proj.weight")
        assert isinstance(queries, DTensor)
        assert queries.to_local().numel() == queries.numel() // (2 * data_parallel)
        check_training(policy, single, sharding)
        export_folder(policy.model, NoTokenizer(), Path(f"out{number}/model"))
        exported = AutoModelForCausalLM.from_pretrained(f"out{number}/model", dtype=torch.float64)
        for name, tensor in policy.named_full_weights():
            assert torch.equal(exported.state_dict()[name], tensor), name
        critic, single_critic = build_critic(source, OPTIONS, sharding), build_critic(source, OPTIONS)
        check_training(critic, single_critic, sharding, steps=2)
        for ours, theirs in zip(critic.parameters(), single_critic.parameters(), strict=True):
            torch.testing.assert_close(full_tensor(ours), theirs.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("data_parallel", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_tensor_parallel_group_trains_as_one_process_does(tmp_path: Path, data_parallel: int) -> None:
    folders = [
        saved_model(tmp_path / "tied", **HEADS),
        saved_model(tmp_path / "untied", tie_word_embeddings=False, **HEADS),
        saved_qwen3(tmp_path / "qwen3"),
    ]
    on_ranks(2 * data_parallel, train, folders, data_parallel, folder=tmp_path)


class Two:
    """A mesh of two ranks, as far as it is asked before anything is cut."""

    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: gpt2(), "GPT2LMHeadModel has no tensor-parallel plan: write 1"),
        (lambda: qwen2(), "Qwen2ForCausalLM has num_key_value_heads 1: write a number that divides it"),
        (lambda: with_plan({"layers.*.mlp.up_proj": "moe_tp_experts"}), "has a moe_tp_experts layer, not supported"),
        (lambda: with_plan({"nowhere.*.up_proj": "colwise"}), "fits none of its layers: write 1"),
    ],
    ids=["no plan", "heads", "experts", "no match"],
)
def test_models_that_cannot_be_cut_are_refused_in_one_line(model: Any, said: str) -> None:
    built = model()
    blocks = list(built.base_model.layers) if hasattr(built.base_model, "layers") else []
    with pytest.raises(ConfigError, match=rf"tensor_parallel_size: 2 - .*{said}"):
        parallelize(built, blocks, Two())  # type: ignore[arg-type]


def with_plan(plan: dict[str, str]) -> Any:
    model = qwen2(**HEADS)
    model.config.base_model_tp_plan = plan
    return model
