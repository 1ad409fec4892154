"""Our rollouts in a LightningModule that is not ours, and our modules on batches that somebody else makes."""

from __future__ import annotations

import re
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from helpers.models import qwen2
from ibro_lightning.batches import Rollout, Sequences, collate_rollout
from ibro_lightning.datamodules import EvalSet, RolloutDataModule
from ibro_lightning.errors import ConfigError, RolloutError
from ibro_lightning.functional import group_advantages, token_mean
from ibro_lightning.models import Policy, PolicyOptions, Qwen2FromScratch
from ibro_lightning.modules import DAPOModule, PolicyProviderMixin, PPOModule, SFTModule
from ibro_lightning.rewards import VerifiableReward
from ibro_lightning.tasks import NumberPath, NumberPathSource
from ibro_lightning.types import SamplingParams

START = Qwen2FromScratch(NumberPath(size=12), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Says7(VerifiableReward):
    pooled = False

    def verify(self, prompt: Any, completion: Any) -> bool:
        return "7" in completion.text


class Reinforce(PolicyProviderMixin, pl.LightningModule):
    """Someone's own module: a loss, automatic optimization, nothing of ours but the mixin."""

    min_group_size = 2

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy, self.tokenizer = policy, START.tokenizer()
        self.rewards: list[float] = []
        self.evaluated: list[str] = []

    def training_step(self, rollout: Rollout, batch_idx: int) -> torch.Tensor:
        self.rewards.append(float(rollout.rewards.mean()))
        advantages = group_advantages(rollout.rewards, rollout.groups)
        scorer = self.policy if isinstance(self.policy, Policy) else Policy(self.policy)
        sequences = rollout.sequences.pad()
        logp, _ = scorer(sequences, temperature=rollout.temperature)
        mask = sequences.response_mask
        return -token_mean(logp * advantages[:, None], mask, mask.sum())

    def validation_step(self, rollout: Rollout, batch_idx: int) -> None:
        self.evaluated.append(rollout.name)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def rollouts(**settings: Any) -> RolloutDataModule:
    defaults: dict[str, Any] = {
        "source": NumberPathSource(NumberPath(size=12)),
        "reward": Says7(),
        "sampling": SamplingParams(max_tokens=6),
        "prompts_per_rollout": 4,
        "group_size": 4,
        "rollouts_per_epoch": 10,
        "reward_pool": None,
    }
    return RolloutDataModule(**{**defaults, **settings})


@pytest.mark.parametrize("wrap", [Policy, lambda model: model], ids=["policy", "transformers model"])
def test_a_module_with_a_loss_of_its_own_learns_from_our_rollouts(wrap: Any, tmp_path: Any) -> None:
    """The weight check is on: after each step the engine has the module's new weights."""
    pl.seed_everything(0)
    module = Reinforce(wrap(START.build(PolicyOptions())))
    sets = {
        "path": EvalSet(NumberPathSource(NumberPath(size=12), "heldout"), Says7(), 1, SamplingParams(max_tokens=6), 4)
    }
    trainer = pl.Trainer(max_epochs=1, num_sanity_val_steps=0, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, datamodule=rollouts(eval_sets=sets))
    assert len(module.rewards) == 10
    assert sum(module.rewards[-3:]) > sum(module.rewards[:3]) + 0.5
    assert module.evaluated == ["path"]


def test_a_plain_model_is_scored_without_dropout_and_keeps_its_mode(tmp_path: Any) -> None:
    model = qwen2(attention_dropout=0.5)
    module = Reinforce(model.train())
    module._trainer = pl.Trainer(default_root_dir=tmp_path, **QUIET)
    sequences = Sequences.collate([[3, 4], [5]], [[6, 7], [8, 9, 0]])
    expected, _ = Policy(qwen2())(sequences, temperature=0.7)
    torch.testing.assert_close(module.response_logp(sequences, 0.7), expected.detach())
    assert model.training
    assert not module.response_logp(sequences, 0.7).requires_grad


def test_groups_too_small_for_the_module_are_refused_under_its_name(tmp_path: Any) -> None:
    module = Reinforce(START.build(PolicyOptions()))
    with pytest.raises(ConfigError, match=r"^group_size: 1 - Reinforce compares responses"):
        pl.Trainer(default_root_dir=tmp_path, **QUIET).fit(module, datamodule=rollouts(group_size=1))


# A rollout from tokens.

TOKENS: dict[str, Any] = {
    "prompt_token_ids": [[5, 6], [7], [5, 6]],
    "response_token_ids": [[8, 9, 2], [9, 2], [8, 2]],
    "rewards": [1.0, 0.5, -1.0],
}


def test_responses_to_equal_prompts_are_one_group_unless_they_are_numbered() -> None:
    rollout = Rollout.from_tokens(**TOKENS, logp=[[-1.0, -2.0, -3.0], [-4.0, -5.0], [-6.0, -7.0]])
    assert rollout.groups.tolist() == [0, 0, 1]
    assert rollout.rewards.tolist() == [1.0, -1.0, 0.5]
    assert rollout.sampler_logp.tolist() == [-1.0, -2.0, -3.0, -6.0, -7.0, -4.0, -5.0]
    assert rollout.sequences.pad().input_ids.tolist() == [[5, 6, 8, 9, 2], [5, 6, 8, 2, 0], [7, 9, 2, 0, 0]]
    assert rollout.outcomes is None
    numbered = Rollout.from_tokens(**TOKENS, groups=[4, 3, 9], accuracy=[1, 0, 0], truncated=[False, True, False])
    assert numbered.groups.tolist() == [0, 1, 2]
    assert numbered.accuracy.tolist() == [1.0, 0.0, 0.0]
    assert numbered.truncated.tolist() == [False, True, False]


def test_unknown_log_probs_are_nan_and_too_few_are_refused() -> None:
    assert Rollout.from_tokens(**TOKENS).sampler_logp.isnan().all()
    with pytest.raises(RolloutError, match="3 tokens and 1 log-probs"):
        Rollout.from_tokens(**TOKENS, logp=[[-1.0], [-1.0, -1.0], [-1.0, -1.0]])


def test_rollouts_and_sequences_print_as_one_line() -> None:
    rollout = Rollout.from_tokens(**TOKENS, iteration=3)
    assert repr(rollout) == "Rollout(train, iteration 3: 3 responses to 2 prompts, 7 tokens, mean reward 0.167)"
    assert repr(rollout.sequences) == (
        "FlatSequences(prompts=[5] int32, responses=[7] int32, prompt_lengths=[3] int64, response_lengths=[3] int64)"
    )
    assert repr(Rollout.from_groups([], name="aime", iteration=0, temperature=1.0)) == (
        "Rollout(aime: 0 responses to 0 prompts, 0 tokens)"
    )


def test_a_data_loader_collates_the_same_rollout() -> None:
    samples = [
        {"prompt_token_ids": [5, 6], "response_token_ids": [[8, 9, 2], [8, 2]], "rewards": [1.0, -1.0]},
        {"prompt_token_ids": [7], "response_token_ids": [[9, 2]], "rewards": [0.5]},
    ]
    (rollout,) = DataLoader(samples, batch_size=2, collate_fn=collate_rollout)
    expected = Rollout.from_tokens(**TOKENS)
    assert rollout.groups.equal(expected.groups)
    assert rollout.rewards.equal(expected.rewards)
    assert rollout.sequences.responses.equal(expected.sequences.responses)


class Iterations(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Rollout, batch_idx: int) -> None:
        self.seen.append(batch.iteration)


@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
def test_our_modules_train_on_a_plain_data_loader(kind: Any, tmp_path: Any) -> None:
    """The second response is rewarded: it becomes likelier, and iterations are the Trainer's."""
    samples = [
        {"prompt_token_ids": [5, n], "response_token_ids": [[8, 9, 2], [8, 2]], "rewards": [-1.0, 1.0]}
        for n in range(6, 10)
    ]
    module = kind(START, learning_rate=1e-2, warmup_steps=0, sampler_correction=None)
    iterations = Iterations()
    trainer = pl.Trainer(max_epochs=2, default_root_dir=tmp_path, callbacks=[iterations], **QUIET)
    module.configure_model()
    pair = Sequences.collate([[5, 6], [5, 6]], [[8, 9, 2], [8, 2]])
    with torch.no_grad():
        before = module.policy(pair, temperature=1.0)[0].sum(dim=1)
    trainer.fit(module, DataLoader(samples, batch_size=2, collate_fn=collate_rollout))
    with torch.no_grad():
        after = module.policy(pair, temperature=1.0)[0].sum(dim=1)
    assert float((after - before)[1]) > float((after - before)[0])
    assert iterations.seen == [1, 2, 3, 4]


SINGLE = {"prompt_token_ids": [5, 6], "response_token_ids": [[8, 2]], "rewards": [1.0]}
PAIR = {"prompt_token_ids": [5, 6], "response_token_ids": [[8, 2], [9, 2]], "rewards": [1.0, -1.0]}


def _fit(tmp_path: Any, samples: list[Any], collate: Any, kind: Any = DAPOModule, **given: Any) -> None:
    settings = {} if kind is SFTModule else {"sampler_correction": None}
    trainer = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    loader = DataLoader(samples, batch_size=2, collate_fn=collate)
    trainer.fit(kind(START, **settings), loader, loader if given.get("validate") else None)


WRONG_BATCHES: list[tuple[Any, Any, str]] = [
    (DAPOModule, None, "dict' - DAPOModule takes batches of type ibro_lightning.batches.Rollout: write collate_fn"),
    (PPOModule, lambda rows: torch.zeros(2), "'Tensor' - PPOModule takes batches of type .*Rollout: write collate_fn"),
    (SFTModule, collate_rollout, "'Rollout' - SFTModule takes batches of type .*Sequences: yield Sequences.collate"),
]


@pytest.mark.parametrize(("kind", "collate", "line"), WRONG_BATCHES)
def test_batches_of_another_type_are_refused_by_name(kind: Any, collate: Any, line: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=f"train_dataloaders: .*{line}"):
        _fit(tmp_path, [PAIR] * 2, collate, kind)


def test_a_datamodule_for_another_module_is_refused(tmp_path: Any) -> None:
    trainer = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    data = RolloutDataModule(source=NumberPathSource(NumberPath(size=12)), reward=Says7())
    with pytest.raises(
        ConfigError, match=r"it learns from Sequences, and the batches of RolloutDataModule are Rollout"
    ):
        trainer.fit(SFTModule(START), datamodule=data)


def test_rollouts_without_accuracy_cannot_be_validated_on_and_the_line_says_why(tmp_path: Any) -> None:
    with pytest.raises(RolloutError, match=r"2 responses.* does not say which responses are right.*accuracy"):
        _fit(tmp_path, [PAIR], collate_rollout, validate=True)
    _fit(tmp_path, [{**PAIR, "accuracy": [1, 0]}], collate_rollout, validate=True)


def test_a_token_that_the_policy_has_not_is_named(tmp_path: Any) -> None:
    unknown = {**PAIR, "response_token_ids": [[8, 2], [999, 2]]}
    with pytest.raises(ConfigError, match=r"response_token_ids: 999 - the policy has \d+ tokens"):
        _fit(tmp_path, [unknown], collate_rollout)


def test_single_responses_leave_nothing_to_compare_and_a_warning_says_so(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match="no prompt of a batch has 2 responses for DAPOModule to compare"):
        _fit(tmp_path, [SINGLE] * 2, collate_rollout)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no prompt of a batch")
        _fit(tmp_path, [SINGLE] * 2, collate_rollout, PPOModule)
        _fit(tmp_path, [PAIR, SINGLE], collate_rollout)


def test_a_data_loaders_samples_are_groups_of_their_own_even_with_equal_prompts() -> None:
    sample = {"prompt_token_ids": [5, 6], "response_token_ids": [[8, 2], [9, 2]], "rewards": [1.0, 0.0]}
    assert collate_rollout([sample, sample]).groups.tolist() == [0, 0, 1, 1]


WRONG_TOKENS: dict[str, Any] = {
    "rewards: [1.0, 0.5] - 2 entries for 3 prompts": {"rewards": [1.0, 0.5]},
    "rewards: [1.0, 0.5, -1.0, 0.0] - 4 entries": {"rewards": [1.0, 0.5, -1.0, 0.0]},
    "response_token_ids: [(8,), (9,), (8,), (9,)] - 4 entries": {"response_token_ids": [[8], [9], [8], [9]]},
    "groups: [0, 1] - 2 entries": {"groups": [0, 1]},
    "logp: [[-1.0, -1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [-1.0]] - 4 entries": {
        "logp": [[-1.0] * 3, [-1.0] * 2, [-1.0] * 2, [-1.0]]
    },
    "accuracy: [1, 0, 0, 1] - 4 entries": {"accuracy": [1, 0, 0, 1]},
    "truncated: [True] - 1 entries": {"truncated": [True]},
    "groups[0]: 'a' - write a whole number": {"groups": ["a", "a", "b"]},
    "groups: 4 - its responses answer different prompts": {"groups": [4, 4, 9]},
    "prompt_token_ids[1]: [] - ": {"prompt_token_ids": [[5, 6], [], [5, 6]]},
    "prompt_token_ids[1]: [-7] - ": {"prompt_token_ids": [[5, 6], [-7], [5, 6]]},
    "response_token_ids[0]: [8, -100] - ": {"response_token_ids": [[8, -100], [9], [8]]},
    "response_token_ids[2]: [8.0] - ": {"response_token_ids": [[8], [9], [8.0]]},
    "accuracy[1]: 2 - ": {"accuracy": [1, 2, 0]},
    "rewards[2]: nan - ": {"rewards": [1.0, 0.5, float("nan")]},
    "rewards[0]: 'x' - ": {"rewards": ["x", 0.5, 1.0]},
}


@pytest.mark.parametrize("line", WRONG_TOKENS)
def test_tokens_that_do_not_belong_together_are_refused(line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}"):
        Rollout.from_tokens(**{**TOKENS, **WRONG_TOKENS[line]})


def test_tokens_and_numbers_may_be_tensors() -> None:
    plain = Rollout.from_tokens(**TOKENS, accuracy=[1, 0, 0])
    of_tensors = {name: [torch.tensor(row) for row in rows] for name, rows in TOKENS.items()}
    rollout = Rollout.from_tokens(**of_tensors, accuracy=torch.tensor([1, 0, 0]), truncated=torch.zeros(3))
    assert rollout.groups.tolist() == [0, 0, 1]
    assert rollout.sequences.responses.equal(plain.sequences.responses)
    assert rollout.accuracy.equal(plain.accuracy)


TWO = {"prompt_token_ids": [5, 6], "response_token_ids": [[8, 2], [9, 2]], "rewards": [1.0, 0.0]}
ONE = {"prompt_token_ids": [7], "response_token_ids": [[9, 2]], "rewards": [0.5]}
WRONG_SAMPLES: dict[str, Any] = {
    # lengths that differ within samples, but not in sum
    "samples[0].rewards: [1, 0, 1] - 3 entries for 2 responses": [
        {**TWO, "rewards": [1, 0, 1]},
        {**ONE, "rewards": []},
    ],
    "samples[1]: ['prompt_token_ids', 'response_token_ids', 'rewards', 'logp'] - logp: write": [
        TWO,
        {**ONE, "logp": [[-1.0, -1.0]]},
    ],
    "samples[1]: ['prompt_token_ids', 'response_token_ids', 'rewards'] - logp: write": [
        {**TWO, "logp": [[-1.0, -1.0]] * 2},
        ONE,
    ],
    "samples[1].accuracy: [1, 0] - 2 entries for 1 responses": [
        {**TWO, "accuracy": [1, 0]},
        {**ONE, "accuracy": [1, 0]},
    ],
    "samples[0]: ['prompt_token_ids', 'response_token_ids'] - rewards: write": [
        {name: TWO[name] for name in ("prompt_token_ids", "response_token_ids")}
    ],
    "samples[0].log_probs: [[-1.0, -1.0]] - nothing reads it: write": [{**ONE, "log_probs": [[-1.0, -1.0]]}],
    "samples: ['tuple'] - write at least one mapping": [([7], [[9, 2]], [0.5])],
    "samples: [] - write at least one mapping": [],
}


@pytest.mark.parametrize("line", WRONG_SAMPLES)
def test_a_data_loaders_samples_are_checked_one_by_one(line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}"):
        collate_rollout(WRONG_SAMPLES[line])
