"""vLLM in a process of ours: it samples what it samples here, and a run overlaps it with its updates."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.tiny_vllm import MAX_LEN, PROMPTS, SETTINGS, largest_difference, spec_of, tiny_model, tokens_of, weights_of
from ibro_lightning.engines import EngineProcess, VLLMEngine
from ibro_lightning.errors import ConfigError, RolloutError
from ibro_lightning.models import PolicyOptions, Qwen2FromScratch, export_folder
from ibro_lightning.tasks import NumberPath
from ibro_lightning.types import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.processes import fit
from helpers.runs import curve

SEEDS = [[100 * prompt + sample for sample in range(2)] for prompt in range(len(PROMPTS))]
PARAMS = SamplingParams(max_tokens=40)


@pytest.fixture(scope="module")
def expected(_engines) -> dict[int, Any]:
    """The samples of an engine in this process, by the seed of the weights."""
    engine, samples = _engines("tied"), {}
    for seed in (0, 1):
        engine.load_weights(weights_of(tiny_model("tied", seed)))
        samples[seed] = engine.generate(PROMPTS, PARAMS, SEEDS)
    _engines.stop()
    return samples


def test_samples_are_those_of_vllm_in_this_process_and_its_death_is_noticed(expected: dict[int, Any]) -> None:
    faulthandler.dump_traceback_later(400, exit=True)  # two engines start here
    engine = EngineProcess(VLLMEngine(**SETTINGS))
    engine.setup(spec_of(tiny_model("tied")))
    try:
        assert engine.max_model_len == MAX_LEN
        for seed in (0, 1):
            engine.load_weights(weights_of(tiny_model("tied", seed)))
            found = engine.generate(PROMPTS, PARAMS, SEEDS)
            assert tokens_of(found) == tokens_of(expected[seed])
            assert largest_difference(tiny_model("tied", seed), PROMPTS, found) < 1e-4
        with pytest.raises(ConfigError, match="another model's"):
            engine.generate([[10**6]], PARAMS, [[0]])
        (server,) = [c for c in psutil.Process().children() if "process_child" in " ".join(c.cmdline())]
        server.kill()
        with pytest.raises(RolloutError, match=r"the process of VLLMEngine ended with signal SIGKILL"):
            engine.generate(PROMPTS, PARAMS, SEEDS)
        engine.load_weights(weights_of(tiny_model("tied")))  # starts it anew
        assert tokens_of(engine.generate(PROMPTS, PARAMS, SEEDS)) == tokens_of(expected[0])
    finally:
        engine.close()
    assert not [c for c in psutil.Process().children() if "process_child" in " ".join(c.cmdline())]


RECIPE = """
seed_everything: 3
num_threads: 1
trainer: {accelerator: cpu, max_epochs: 3, check_val_every_n_epoch: 2, default_root_dir: run}
model:
  class_path: DAPOModule
  init_args:
    policy: POLICY
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
    mini_batch_prompts: 2
data:
  class_path: RolloutDataModule
  init_args:
    source: {class_path: NumberPathSource, init_args: {split: train}}
    reward: {class_path: coin.Coin}
    sampling: {temperature: 1.0, max_tokens: 8}
    prompts_per_rollout: 5
    group_size: 4
    max_staleness: 1
    reward_pool: null
    engine: {class_path: VLLMEngine, init_args: {dtype: float32, max_model_len: 200, max_num_seqs: 32}}
    eval_sets:
      heldout:
        source: {class_path: NumberPathSource, init_args: {split: heldout}}
        reward: {class_path: coin.Coin}
        samples: 2
        limit: 6
        sampling: {max_tokens: 8}
"""
COIN = """
from ibro_lightning.rewards import VerifiableReward


class Coin(VerifiableReward):
    def verify(self, prompt, completion):
        return sum(completion.token_ids) % 3 == 0
"""


def test_a_run_overlaps_vllm_with_its_updates(tmp_path: Path) -> None:
    faulthandler.dump_traceback_later(400, exit=True)
    source = Qwen2FromScratch(NumberPath(), hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2)
    policy = export_folder(source.build(PolicyOptions()), source.tokenizer(), tmp_path / "policy")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("POLICY", str(policy)))
    (tmp_path / "coin.py").write_text(COIN)
    fit(tmp_path, ["--config", "recipe.yaml"])
    run = str(tmp_path / "run")
    assert curve("rollout/staleness", run) == {1: 0.0, 2: 1.0, 3: 1.0}
    assert max(curve("sync/logp_difference_max", run).values()) < 1e-3
    apart = curve("sampler/logp_difference_mean", run)
    assert apart[1] < 1e-5
    assert min(apart[2], apart[3]) > 1e-4, "older weights, not other kernels"
