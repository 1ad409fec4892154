"""Whole runs through the command line, as a user starts them, on a policy of a few thousand parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from ibro_lightning import __version__
from ibro_lightning.cli.main import main
from ibro_lightning.runs.run_files import MARK

TRAIN = ["fit", "--config", "tiny.yaml", "--trainer.limit_val_batches", "0"]
"""Without evaluations."""
PHASES = ("sync", "generate", "reward", "prepare", "update")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_fit_leaves_all_that_a_person_needs(workspace: Path, tiny_policy: Path, capsys: pytest.CaptureFixture) -> None:
    main(["fit", "--config", "tiny.yaml"])
    run = workspace / "run"

    summary = json.loads((run / "summary.json").read_text())
    assert {"accuracy_before", "accuracy_after", "seconds", "model_dir", "log_dir"} <= summary.keys()
    assert 0 <= summary["accuracy_before"] <= 1
    assert summary["iterations"] == 2

    model = AutoModelForCausalLM.from_pretrained(summary["model_dir"])
    tokenizer = AutoTokenizer.from_pretrained(summary["model_dir"])
    assert model.config.vocab_size == len(tokenizer)
    before = load_file(tiny_policy / "model.safetensors")
    assert any(not torch.equal(before[name], value) for name, value in weights(run).items()), "nothing was learned"

    config = (run / "config.yaml").read_text()
    assert config.count(f"ibro_lightning {__version__}") == 1
    assert "dual_clip: 10.0" in config, "defaults are resolved"

    events = EventAccumulator(str(run), size_guidance={"tensors": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"rollout/reward", "rollout/accuracy", "policy/entropy", "rollout/length", "update/clipped_high"}
    expected |= {"update/clipped_low", "update/clipped_dual", "update/approx_kl", "update/grad_norm", "advantage/mean"}
    expected |= {"ib/cov_advantage_entropy", "rollout/zero_variance_groups", "val/starts/avg@4", "val/starts/pass@4"}
    expected |= {f"tokens_per_second/{phase}" for phase in PHASES}
    assert expected <= tags
    assert [event.step for event in events.Scalars("rollout/reward")] == [1, 2]
    assert [event.step for event in events.Scalars("val/starts/avg@4")] == [0, 2], "before and after training"
    assert "samples/text_summary" in events.Tags()["tensors"]

    rollouts = pandas.read_parquet(run / "rollouts")
    columns = {
        "iteration",
        "prompt",
        "answer",
        "meta",
        "response",
        "prompt_tokens",
        "response_tokens",
        "reward",
        "reward_accuracy",
    }
    assert columns <= set(rollouts.columns)
    assert sorted(rollouts.iteration.unique()) == [1, 2]
    assert sum(rollouts.trained_on) == 2 * 4 * 4
    means = rollouts.groupby("iteration").reward_accuracy.mean().tolist()
    curve = [event.value for event in events.Scalars("rollout/accuracy")]
    assert curve == pytest.approx(means), "the curve and the record count every sampled response"

    assert not list(run.rglob("*.partial")), "no temporary file is left"
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert "state_dict" in checkpoint
    output = capsys.readouterr().out
    assert "avg@k" in output
    assert "→" in output


def test_the_same_seed_gives_the_same_weights_bit_for_bit(workspace: Path) -> None:
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        main([*TRAIN, "--seed_everything", seed, "--trainer.default_root_dir", name])
    assert identical(weights(workspace / "a"), weights(workspace / "b"))
    assert not identical(weights(workspace / "a"), weights(workspace / "c"))


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(workspace: Path) -> None:
    main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "4", "--trainer.default_root_dir", "whole"])
    main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "2", "--trainer.default_root_dir", "halves"])
    resume = ["--ckpt_path", "halves/checkpoints/last.ckpt", "--trainer.default_root_dir", "halves"]
    main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "4", *resume])
    assert identical(weights(workspace / "whole"), weights(workspace / "halves"))
    assert len(list((workspace / "halves" / "rollouts").iterdir())) == 4


def test_a_resumed_run_sums_up_the_whole_run(workspace: Path) -> None:
    main(["fit", "--config", "tiny.yaml"])
    first = json.loads((workspace / "run" / "summary.json").read_text())
    evaluation = (workspace / "run" / "evaluations" / "iteration_000000.json").read_text()
    main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "3", "--ckpt_path", "run/checkpoints/last.ckpt"])
    whole = json.loads((workspace / "run" / "summary.json").read_text())
    assert whole["accuracy_before"] == first["accuracy_before"]
    checkpoint = torch.load(workspace / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert whole["seconds"] >= checkpoint["callbacks"]["RunSummary"]["seconds"] > first["seconds"] / 2
    assert (whole["iterations"], first["iterations"]) == (3, 2)
    assert (workspace / "run" / "evaluations" / "iteration_000000.json").read_text() == evaluation
    assert sorted(path.name for path in (workspace / "run" / "checkpoints").glob("*.ckpt")) == [
        "iteration_000002.ckpt",
        "iteration_000003.ckpt",
        "last.ckpt",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trainer.max_epochs", "0"],
        ["--trainer.max_epochs", "0", "--trainer.enable_progress_bar", "false"],
        ["--data.reward", "user_code.NeverRight", "--data.eval_sets.starts.reward", "user_code.NeverRight"],
    ],
    ids=["no iterations", "no progress bar either", "nothing to learn from"],
)
def test_a_run_without_any_update_still_gets_its_summary(
    arguments: list[str], workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", "--config", "tiny.yaml", *arguments])
    summary = json.loads((workspace / "run" / "summary.json").read_text())
    assert summary["optimizer_steps"] == 0
    assert summary["accuracy_before"] == summary["accuracy_after"]
    assert "no optimizer step" in capsys.readouterr().out


def test_flags_of_the_trainer_switch_off_what_they_name(workspace: Path) -> None:
    flags = ["--trainer.enable_checkpointing", "false", "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "1"]
    main(["fit", "--config", "tiny.yaml", *flags])
    summary = json.loads((workspace / "run" / "summary.json").read_text())
    assert summary["iterations"] == 1
    assert summary["accuracy_after"] is None
    assert not (workspace / "run" / "checkpoints").exists()


def test_continuing_in_another_folder_leaves_what_is_there(workspace: Path) -> None:
    main(["fit", "--config", "tiny.yaml", "--trainer.default_root_dir", "a"])
    main(["fit", "--config", "tiny.yaml", "--trainer.default_root_dir", "b", "--trainer.max_epochs", "1"])
    resume = ["--ckpt_path", "a/checkpoints/last.ckpt", "--trainer.default_root_dir", "b"]
    main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "3", *resume])
    assert json.loads((workspace / "b.1" / "summary.json").read_text())["iterations"] == 1
    assert json.loads((workspace / "b" / "summary.json").read_text())["iterations"] == 3


def test_mixed_precision_trains(workspace: Path) -> None:
    """As dapo_ib does: float32 weights, bfloat16 arithmetic, an engine in bfloat16."""
    engine = ["--data.engine", "HFEngine", "--data.engine.dtype", "bfloat16"]
    main(["fit", "--config", "tiny.yaml", "--trainer.precision", "bf16-mixed", *engine])
    assert all(value.dtype == torch.float32 for value in weights(workspace / "run").values())
    assert json.loads((workspace / "run" / "summary.json").read_text())["optimizer_steps"] > 0


def test_predicting_again_replaces_the_earlier_predictions(workspace: Path) -> None:
    main(["predict", "--config", "tiny.yaml", "--data.eval_batch_prompts", "2"])
    main(["predict", "--config", "tiny.yaml", "--data.eval_batch_prompts", "10"])
    assert len(pandas.read_parquet(workspace / "run" / "predictions" / "starts")) == 10 * 4


def test_without_an_evaluation_before_training_there_is_one_after(workspace: Path) -> None:
    main(["fit", "--config", "tiny.yaml", "--trainer.num_sanity_val_steps", "0", "--trainer.max_epochs", "1"])
    summary = json.loads((workspace / "run" / "summary.json").read_text())
    assert summary["accuracy_before"] is None
    assert 0 <= summary["accuracy_after"] <= 1


def test_looking_at_a_run_does_not_change_its_record(workspace: Path) -> None:
    main(["fit", "--config", "tiny.yaml"])
    files = [path for path in (workspace / "run").rglob("*") if path.is_file() and path.name != MARK]
    before = {path: path.read_bytes() for path in files}
    main(["validate", "--config", "tiny.yaml", "--model.policy", "run/model"])
    main(["predict", "--config", "tiny.yaml", "--model.policy", "run/model"])
    assert {path: path.read_bytes() for path in before} == before


def test_several_rollouts_per_epoch_count_as_several_iterations(workspace: Path) -> None:
    main(["fit", "--config", "tiny.yaml", "--data.rollouts_per_epoch", "2"])
    summary = json.loads((workspace / "run" / "summary.json").read_text())
    assert summary["iterations"] == len(list((workspace / "run" / "rollouts").iterdir())) == 4
    assert (workspace / "run" / "evaluations" / "iteration_000004.json").exists()


def test_micro_batches_do_not_change_what_is_learned(workspace: Path) -> None:
    """Only floating-point summation order differs."""
    for name, budget in (("large", "10000"), ("small", "20")):
        root = ["--trainer.default_root_dir", name, "--trainer.max_epochs", "1"]
        main([*TRAIN, "--model.micro_batch_tokens", budget, *root])
    large, small = weights(workspace / "large"), weights(workspace / "small")
    for name in large:
        torch.testing.assert_close(large[name], small[name], rtol=1e-3, atol=1e-4)


def test_regularizers_of_ones_own_and_of_ours_act_on_the_weights(workspace: Path) -> None:
    """Same seed, different term: the weights must differ, so no setting is silently ignored."""
    results = {}
    for name in ("NoRegularizer", "EntropyBonus", "InformationBottleneck", "user_code.Squared"):
        coef = [] if name == "NoRegularizer" else ["--model.regularizer.coef", "0.5"]
        regularizer = ["--model.regularizer", name, *coef]
        root = ["--trainer.default_root_dir", name, "--trainer.max_epochs", "1"]
        main([*TRAIN, *regularizer, *root])
        results[name] = weights(workspace / name)
    names = list(results)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not identical(results[first], results[second]), (first, second)


def test_a_second_run_moves_the_first_aside(workspace: Path) -> None:
    main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "1"])
    main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "2"])
    assert json.loads((workspace / "run.1" / "summary.json").read_text())["iterations"] == 1
    assert json.loads((workspace / "run" / "summary.json").read_text())["iterations"] == 2
    assert len(list((workspace / "run").glob("events.*"))) == 1, "two runs never share their curves"


def test_training_that_does_not_end_on_an_evaluation_gets_one(workspace: Path) -> None:
    main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "3"])
    summary = json.loads((workspace / "run" / "summary.json").read_text())
    after = json.loads((workspace / "run" / "evaluations" / "iteration_000003.json").read_text())
    assert summary["accuracy_after"] == after["starts"]["avg_at_k"]["mean"]


def test_validate_prints_a_table_and_writes_json(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["validate", "--config", "tiny.yaml"])
    output = capsys.readouterr().out
    assert "pass@k" in output
    content = json.loads((workspace / "run" / "evaluations" / "validate.json").read_text())["starts"]
    assert content["questions"] == 10
    assert content["samples"] == 4
    assert set(content["pass_at_k"]) == {"1", "2", "3", "4"}
    assert content["avg_at_k"]["low"] <= content["avg_at_k"]["mean"] <= content["avg_at_k"]["high"]
    assert content["pass_at_k"]["1"]["mean"] == pytest.approx(content["avg_at_k"]["mean"])


def test_validate_gives_the_same_numbers_every_time_and_test_agrees(workspace: Path) -> None:
    results = []
    for command in ("validate", "validate", "test"):
        main([command, "--config", "tiny.yaml"])
        results.append(json.loads((workspace / "run" / "evaluations" / f"{command}.json").read_text()))
    assert results[0] == results[1] == results[2]


def test_a_checkpoint_evaluates_like_the_model_that_was_exported_with_it(workspace: Path) -> None:
    main(["fit", "--config", "tiny.yaml"])
    main(["validate", "--config", "tiny.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"])
    after = json.loads((workspace / "run" / "summary.json").read_text())["evaluations"]["after"]
    validated = json.loads((workspace / "run" / "evaluations" / "validate.json").read_text())
    assert validated == after


def test_predict_writes_every_response(workspace: Path) -> None:
    main(["predict", "--config", "tiny.yaml", "--data.eval_batch_prompts", "4"])
    table = pandas.read_parquet(workspace / "run" / "predictions" / "starts")
    assert len(table) == 10 * 4
    assert set(table.prompt_id) == {str(n) for n in range(10)}


def test_the_exported_folder_can_be_trained_further_and_evaluates_alike(workspace: Path) -> None:
    main(["fit", "--config", "tiny.yaml"])
    main(["validate", "--config", "tiny.yaml", "--model.policy", "run/model", "--trainer.default_root_dir", "again"])
    after = json.loads((workspace / "run" / "summary.json").read_text())["accuracy_after"]
    again = json.loads((workspace / "again" / "evaluations" / "validate.json").read_text())
    assert again["starts"]["avg_at_k"]["mean"] == after


def test_supervised_fine_tuning_from_scratch_lowers_the_loss(workspace: Path) -> None:
    small = ["--model.policy.init_args.hidden_size", "32", "--model.policy.init_args.num_layers", "1"]
    steps = ["--data.steps_per_epoch", "20", "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "2"]
    main(["fit", "--config", "sft_quickstart.yaml", *small, *steps])
    events = EventAccumulator(str(workspace / "runs" / "sft_quickstart"))
    events.Reload()
    losses = [event.value for event in events.Scalars("sft/loss")]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    rates = [event.value for event in events.Scalars("update/lr")]
    assert max(rates) == pytest.approx(4e-3, rel=0.02)
    assert rates[-1] < 0.05 * max(rates), "the cosine ends near 0"
    assert (workspace / "runs" / "sft_quickstart" / "model" / "model.safetensors").exists()


def test_the_module_runs_as_a_program_and_knows_its_version(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ibro_lightning", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert __version__ in result.stdout
