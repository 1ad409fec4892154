"""vLLM in a run of several processes: each has an engine of its own, with the weights that are spread over all."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ibro_lightning.models import PolicyOptions, Qwen2FromScratch, export_folder
from ibro_lightning.tasks import NumberPath

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.vllm_training import train

ENGINE = "{class_path: VLLMEngine, init_args: {dtype: float32, max_model_len: 200, max_num_seqs: 32}}"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads of 32, which vLLM's attention on CPUs knows."""
    source = Qwen2FromScratch(NumberPath(), hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2)
    folder = tmp_path_factory.mktemp("policy") / "model"
    return export_folder(source.build(PolicyOptions()), source.tokenizer(), folder)


def test_two_ranks_with_an_engine_each_train_and_evaluate_as_one_process_does(tmp_path: Path, policy: Path) -> None:
    faulthandler.dump_traceback_later(400, exit=True)  # three engines start here, not one
    weights, responses = train(tmp_path / "one", policy, ENGINE, 1, None)
    start = load_file(policy / "model.safetensors")
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-3
    two, others = train(tmp_path / "two", policy, ENGINE, 2, "fsdp2")
    assert max((weights[name] - two[name]).abs().max() for name in weights) < 1e-4
    assert others == responses
