"""Bad input: one line on stderr that names the setting and what to write instead, before any training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ibro_lightning.cli.main import main


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command line, expect it to refuse, return the error line."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    line = errors[errors.index("error:") :]
    assert line.count("\n") == 1, "one line, and nothing after it"
    return line


CASES = {
    "unknown recipe": (["--config", "nothing.yaml"], ["--config", "nothing.yaml", "quickstart.yaml"]),
    "unknown key": (["--data.grup_size", "4"], ["grup_size", "group_size"]),
    "unknown class": (["--model.regularizer", "Nope"], ["regularizer", "Nope", "InformationBottleneck"]),
    "missing model folder": (["--model.policy", "no/such/folder"], ["model.policy", "no/such/folder"]),
    "folder without a model": (["--model.policy", "."], ["model.policy", "config.json"]),
    "too long prompts, all dropped": (["--data.prompt_limits.max_tokens", "2"], ["prompt_limits.max_tokens", "4"]),
    "too long prompts, refused": (
        ["--data.prompt_limits.max_tokens", "3", "--data.prompt_limits.overlong", "error"],
        ["prompt_limits.max_tokens", "overlong: drop"],
    ),
    "empty source": (["--data.source", "user_code.NoProblems"], ["data.source", "NoProblems"]),
    "reward raises": (["--data.reward", "user_code.Raises"], ["Raises", "oops", "finite number"]),
    "reward is NaN": (["--data.reward", "user_code.ReturnsNaN"], ["ReturnsNaN", "nan"]),
    "reward is NaN only for real responses": (["--data.reward", "user_code.NaNLater"], ["NaNLater"]),
    "group of one": (["--data.group_size", "1"], ["data.group_size: 1", "2 or more"]),
    "greedy training": (["--data.sampling.temperature", "0"], ["data.sampling.temperature: 0", "1.0"]),
    "truncated training (top_p)": (["--data.sampling.top_p", "0.9"], ["data.sampling.top_p: 0.9", "write 1"]),
    "truncated training (top_k)": (["--data.sampling.top_k", "5"], ["data.sampling.top_k: 5", "write 0"]),
    "truncated training (min_p)": (["--data.sampling.min_p", "0.1"], ["data.sampling.min_p: 0.1", "write 0"]),
    "impossible top_p": (["--data.sampling.top_p", "1.5"], ["sampling.top_p: 1.5"]),
    "negative coefficient": (["--model.regularizer.coef", "-1"], ["coef: -1", "0 or more"]),
    "accumulated batches": (
        ["--trainer.accumulate_grad_batches", "2"],
        ["trainer.accumulate_grad_batches: 2", "model.mini_batch_prompts"],
    ),
    "Lightning's own clipping": (["--trainer.gradient_clip_val", "1"], ["gradient_clip_val: 1", "model.max_grad_norm"]),
    "half precision": (["--trainer.precision", "bf16-true"], ["trainer.precision: 'bf16-true'", "bf16-mixed"]),
    "a controller of KL for an entropy term": (
        ["--model.regularizer.coef", "AdaptiveKL"],
        ["model.regularizer.coef: 'AdaptiveKL'", "follows the KL"],
    ),
    "a hindsight prompt that the tokenizer cannot write": (
        ["--model.regularizer", "IBRO"],
        ["model.regularizer.template", "cannot write"],
    ),
    "a setting of a class that a recipe names": (
        ["--model.policy", json.dumps({"class_path": "Qwen2FromScratch", "init_args": {"task": "NoSuchTask"}})],
        ["model.policy: 'ibro_lightning.models.Qwen2FromScratch'", "one of its settings: there is no Task of that"],
    ),
    "dual clip of a loss without": (
        ["--model.surrogate", "cispo", "--model.dual_clip", "3.0"],
        ["model.dual_clip: 3.0", "CISPOLoss has no dual clip: leave it out"],
    ),
    "dual clip below 1": (["--model.dual_clip", "0.5"], ["model.dual_clip: 0.5", "above 1"]),
    "longer than the model": (["--data.sampling.max_tokens", "300"], ["sampling.max_tokens: 300", "256 positions"]),
    "evaluation on training prompts": (["--data.allow_overlap", "false"], ["eval_sets.starts", "allow_overlap: true"]),
    "source of something else": (["--data.source", "user_code.NotProblems"], ["data.source", "dict", "Problem"]),
    "coefficient that is no number": (["--model.regularizer.coef", ".nan"], ["coef: nan", "0 or more"]),
    "negative learning rate": (["--model.optimizer.lr", "-1"], ["model.optimizer", "-1"]),
    "missing checkpoint": (["--ckpt_path", "nope.ckpt"], ["ckpt_path: 'nope.ckpt'", "no such checkpoint"]),
    "something else as checkpoint": (["--ckpt_path", "tiny.yaml"], ["ckpt_path: 'tiny.yaml'", "not a checkpoint"]),
    "a file as run folder": (["--trainer.default_root_dir", "tiny.yaml/x"], ["default_root_dir", "is a file"]),
    "the working folder as run folder": (["--trainer.default_root_dir", "."], ["default_root_dir", "runs/mine"]),
    "no checkpoint that is the best": (["--ckpt_path", "best"], ["ckpt_path: 'best'", "checkpoint.best"]),
    "accuracy out of range": (["--data.reward", "user_code.MinusOne"], ["MinusOne", "between 0"]),
    "zero threads": (["--num_threads", "0"], ["num_threads: 0", "1 or more"]),
}


@pytest.mark.parametrize("case", CASES)
def test_is_refused_in_one_line(case: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = CASES[case]
    config = [] if "--config" in arguments else ["--config", "tiny.yaml"]
    line = error_of(capsys, "fit", *config, *arguments)
    assert all(text in line for text in expected), line
    assert not list(workspace.glob("run/rollouts/*")), "training must not have begun"


def test_a_missing_column_is_named_with_those_that_exist(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "sums.jsonl").write_text('{"task": "1+1", "answer": "2"}\n')
    arguments = ("--data.source", "DatasetSource", "--data.source.path", "sums.jsonl")
    line = error_of(capsys, "fit", "--config", "tiny.yaml", *arguments)
    assert "source.prompt_column: ['problem', 'question', 'prompt']" in line
    assert "['answer', 'task']" in line


@pytest.mark.parametrize(("content", "reason"), [(None, "no such file"), ("", "empty"), ("{broken", "cannot be read")])
def test_a_bad_data_file_is_named(
    content: str | None, reason: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (workspace / "bad.jsonl").write_text(content)
    arguments = ("--data.source", "DatasetSource", "--data.source.path", "bad.jsonl")
    line = error_of(capsys, "fit", "--config", "tiny.yaml", *arguments)
    assert "source.path: 'bad.jsonl'" in line
    assert reason in line


def edited_policy(workspace: Path, tiny_policy: Path, model_type: str | None, **tokenizer_config: object) -> Path:
    folder = workspace / "edited"
    shutil.copytree(tiny_policy, folder)
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **tokenizer_config}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    if model_type:
        model_config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**model_config, "model_type": model_type}))
    return folder


def test_a_tokenizer_without_eos_is_refused(
    workspace: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edited_policy(workspace, tiny_policy, model_type="llama", eos_token=None)
    line = error_of(capsys, "fit", "--config", "tiny.yaml", "--model.policy", str(folder))
    assert "model.policy" in line
    assert "EOS" in line
    assert "tokenizer_config.json" in line


def test_an_eos_that_the_model_does_not_know_is_refused(
    workspace: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers opens a qwen2 folder without eos_token with Qwen's own EOS, which this model has no row for."""
    folder = edited_policy(workspace, tiny_policy, model_type=None, eos_token=None)
    line = error_of(capsys, "fit", "--config", "tiny.yaml", "--model.policy", str(folder))
    assert "<|endoftext|>" in line
    assert "eos_token" in line


def test_chat_prompts_need_a_chat_template(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "fit", "--config", "tiny.yaml", "--data.source", "SumsSource")
    assert "chat: false" in line


def test_a_run_does_not_move_away_the_policy_it_starts_from(
    workspace: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_policy, workspace / "run" / "model")
    (workspace / "run" / "config.yaml").write_text("# ibro_lightning 0.1.0\n")
    line = error_of(capsys, "fit", "--config", "tiny.yaml", "--model.policy", "run/model")
    assert "trainer.default_root_dir" in line
    assert (workspace / "run" / "model" / "config.json").exists()


def test_a_refused_run_leaves_the_earlier_one_where_it_was(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "1"])
    before = sorted(path.relative_to(workspace) for path in (workspace / "run").rglob("*"))
    capsys.readouterr()
    error_of(capsys, "fit", "--config", "tiny.yaml", "--data.group_size", "1")
    assert sorted(path.relative_to(workspace) for path in (workspace / "run").rglob("*")) == before
    assert not (workspace / "run.1").exists()


def test_a_policy_without_the_tasks_numbers_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny policy knows the numbers 0 to 11; with more the tokenizer would split them without a word."""
    arguments = ["--data.source", "NumberPathSource", "--data.reward", "NumberPathReward"]
    line = error_of(capsys, "fit", "--config", "tiny.yaml", *arguments)
    assert "no token" in line


def test_demonstrations_of_evaluation_problems_are_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The warm start holds out 15 %; an evaluation that holds out more would contain problems it has shown."""
    arguments = ["--data.eval_sets.number_path.source.heldout_fraction", "0.3"]
    line = error_of(capsys, "fit", "--config", "sft_quickstart.yaml", *arguments)
    assert "data.eval_sets.number_path" in line
    assert "heldout_fraction" in line


def test_a_folder_with_settings_of_something_else_is_left_alone(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "run").mkdir()
    (workspace / "run" / "config.yaml").write_text("my: settings\n")
    line = error_of(capsys, "fit", "--config", "tiny.yaml")
    assert "trainer.default_root_dir" in line
    assert (workspace / "run" / "config.yaml").read_text() == "my: settings\n"
