"""Shared fixtures: one thread (two contended OpenMP pools are far slower than one), and a tiny policy on disk."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from ibro_lightning.models import PolicyOptions, Qwen2FromScratch, export_folder
from ibro_lightning.tasks import NumberPath

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random Qwen2 with a few thousand parameters and the number-path tokenizer."""
    source = Qwen2FromScratch(NumberPath(size=12), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
    folder = tmp_path_factory.mktemp("policy") / "model"
    return export_folder(source.build(PolicyOptions()), source.tokenizer(), folder)


USER_CODE = '''
"""What a user would write: a reward, a regulariser and a prompt source in a file of their own."""

from ibro_lightning.datamodules import PromptSource
from ibro_lightning.regularizers import EntropyRegularizer
from ibro_lightning.rewards import VerifiableReward
from ibro_lightning.types import Problem


class SaysEquals(VerifiableReward):
    def verify(self, prompt, completion):
        return "=" in completion.text


class Raises(VerifiableReward):
    def verify(self, prompt, completion):
        raise KeyError("oops\\nsecond line")


class MinusOne(VerifiableReward):
    def verify(self, prompt, completion):
        return -1.0


class NeverRight(VerifiableReward):
    def verify(self, prompt, completion):
        return False


class ReturnsNaN(VerifiableReward):
    def verify(self, prompt, completion):
        return float("nan")


class NaNLater(VerifiableReward):
    def verify(self, prompt, completion):
        return float("nan") if completion.token_ids else 0.0


class Squared(EntropyRegularizer):
    def __init__(self, coef: float = 0.5):
        super().__init__(coef)

    def objective(self, stats):
        return stats.entropy**2


class Starts(PromptSource):
    def problems(self):
        for n in range(10):
            yield Problem(id=str(n), prompt=f"{n}>{n + 1}:", answer=n + 1)


class NotProblems(PromptSource):
    def problems(self):
        return [{"prompt": "1>2:", "answer": 2}]


class NoProblems(PromptSource):
    def problems(self):
        return []
'''


@pytest.fixture
def workspace(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with code of their own and a recipe ``tiny.yaml`` that runs in a second."""
    (tmp_path / "user_code.py").write_text(USER_CODE)
    (tmp_path / "tiny.yaml").write_text(
        textwrap.dedent(f"""
        seed_everything: 3
        num_threads: 1
        trainer: {{accelerator: cpu, max_epochs: 2, check_val_every_n_epoch: 2, default_root_dir: run}}
        model:
          class_path: DAPOModule
          init_args:
            policy: {tiny_policy}
            regularizer: {{class_path: InformationBottleneck}}
            optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-2}}}}
            mini_batch_prompts: 2
        data:
          class_path: RolloutDataModule
          init_args:
            source: {{class_path: user_code.Starts}}
            reward: {{class_path: user_code.SaysEquals}}
            sampling: {{temperature: 1.0, max_tokens: 6}}
            prompts_per_rollout: 4
            group_size: 4
            allow_overlap: true
            reward_pool: null  # starting its processes, which import user_code, takes longer than these runs
            dynamic_sampling: {{max_rounds: 2, on_exhausted: fill}}
            eval_sets:
              starts:
                source: {{class_path: user_code.Starts}}
                reward: {{class_path: user_code.SaysEquals}}
                samples: 4
                sampling: {{max_tokens: 6}}
        samples: {{every_n_iterations: 1}}
        checkpoint: {{every_n_iterations: 1}}
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path
