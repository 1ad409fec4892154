"""What an engine is handed from a policy that is spread over processes: two of them, with FSDP, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from helpers.models import qwen2
from helpers.processes import logs, run_ranks
from helpers.rollouts import PROMPTS
from ibro_lightning.engines import HFEngine
from ibro_lightning.models import Policy
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import SamplingParams

torch.set_num_threads(1)
RANKS = 2


def sharded() -> Policy:
    model = qwen2()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Policy(model)


def check_names_and_values(policy: Policy) -> None:
    """Every name of the whole model, the tied head's too, with the values and types of the whole model."""
    whole = dict(Policy(qwen2()).named_full_weights())
    kept = [tensor for tensor in policy.model.state_dict().values() if isinstance(tensor, DTensor)]
    assert len(kept) == len(whole)
    assert any(tensor.to_local().numel() < tensor.numel() for tensor in kept), "nothing is sharded"
    gathered = dict(policy.named_full_weights())
    assert list(gathered) == list(whole)
    assert torch.equal(gathered["lm_head.weight"], gathered["model.embed_tokens.weight"])
    for name, tensor in whole.items():
        assert type(gathered[name]) is torch.Tensor, name
        assert not gathered[name].requires_grad
        assert gathered[name].dtype == tensor.dtype
        assert torch.equal(gathered[name], tensor), name


def check_one_at_a_time(policy: Policy, patch: pytest.MonkeyPatch) -> None:
    """A weight is gathered when it is asked for, and not before."""
    calls: list[torch.Size] = []
    gather = DTensor.full_tensor

    def counted(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(self.shape)
        return gather(self, *args, **kwargs)

    patch.setattr(DTensor, "full_tensor", counted)
    weights = policy.named_full_weights()
    for number, (name, tensor) in enumerate(weights, start=1):
        assert len(calls) == number, name
        assert calls[-1] == tensor.shape
    assert number == len(policy.model.state_dict())


def check_an_engine(policy: Policy) -> None:
    """Both processes' engines say what one with the whole model says."""
    answers = []
    for source in (policy, Policy(qwen2())):
        engine = HFEngine()
        engine.setup(ModelSpec(qwen2().config, (0,), torch.device("cpu")))
        engine.load_weights(source.named_full_weights())
        answers.append(engine.generate(PROMPTS[:3], SamplingParams(max_tokens=5), [[1, 2], [3], [4]]))
    assert answers[0] == answers[1]


def on_rank() -> None:
    distributed.init_process_group("gloo")
    policy = sharded()
    check_names_and_values(policy)
    check_an_engine(policy)
    with pytest.MonkeyPatch.context() as patch:
        check_one_at_a_time(policy, patch)
    print("done")


def test_sharded_weights_are_gathered_whole_on_every_rank_one_at_a_time(tmp_path: Path) -> None:
    codes = run_ranks(RANKS, on_rank, folder=tmp_path)
    assert codes == [0] * RANKS, logs(tmp_path)
    assert all("done" in (tmp_path / f"rank_{rank}.log").read_text() for rank in range(RANKS))


def test_weights_in_one_piece_are_handed_out_as_they_are() -> None:
    policy = Policy(qwen2())
    for name, tensor in policy.named_full_weights():
        assert tensor.data_ptr() == policy.model.get_parameter(name).data_ptr()
        assert not tensor.requires_grad
