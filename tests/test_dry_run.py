"""``fit --dry_run``: what it prints, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.processes import run_ranks
from ibro_lightning.cli.main import main
from ibro_lightning.dry_run.layout import GIB, Layout
from ibro_lightning.errors import ConfigError
from ibro_lightning.strategies import FSDP2Strategy
from ibro_lightning.tasks import NumberPath

# Qwen2.5-7B with 4 of its 28 layers, which are all alike: with gradients and AdamW's state 32 GB.
LARGE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}


# How a run is spread.


def trainer_settings(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"accelerator": "cuda", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None, **changes}
    )


def test_a_layout_is_what_the_trainer_section_says() -> None:
    assert Layout.of(trainer_settings(accelerator="gpu"), 80) == Layout("cuda", memory=80 * GIB)
    assert Layout.of(trainer_settings(devices="8", num_nodes=2), 80).kind == "ddp"
    sharded = Layout.of(trainer_settings(devices=[0, 1, 2, 3], strategy=FSDP2Strategy(tensor_parallel_size=2)), 80)
    assert (sharded.world, sharded.kind, sharded.data_parallel) == (4, "fsdp2", 2)
    assert Layout.of(trainer_settings(devices="0,1", strategy="ddp_find_unused_parameters_true"), 80).world == 2
    assert Layout.of(trainer_settings(precision="bf16"), 80).precision == "bf16-mixed"
    on_cpu = Layout.of(trainer_settings(accelerator="cpu", devices="auto"))
    assert on_cpu.world == 1
    assert (on_cpu.memory or 0) > GIB


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"accelerator": "auto"}, "trainer.accelerator"),
        ({"devices": "many"}, "trainer.devices"),
        ({"strategy": "deepspeed"}, "trainer.strategy"),
        ({"precision": "16-mixed"}, "trainer.precision"),
        (
            {"devices": 3, "strategy": FSDP2Strategy(tensor_parallel_size=2)},
            "^trainer.strategy.tensor_parallel_size: 2",
        ),
    ],
)
def test_a_layout_that_cannot_be_is_refused(changes: dict[str, Any], setting: str) -> None:
    with pytest.raises(ConfigError, match=setting):
        Layout.of(trainer_settings(**changes))


# The command.

DRY = ["fit", "--config", "tiny.yaml", "--dry_run"]


def run_dry(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*DRY, *arguments])
    return int(ended.value.code or 0)


def test_a_dry_run_prints_and_leaves_nothing(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(workspace.rglob("*"))
    assert run_dry("--estimate.gib", "1", "--estimate.tflops", "0.001") == 0
    printed = capsys.readouterr().out
    for text in (
        "first prompt",
        "'0>1:'",
        "memory per rank",
        "key-value cache",
        "fits: ",
        "at 0.001 TFLOP/s",
        "FLOP: ",
    ):
        assert text in printed, printed
    assert [path for path in sorted(workspace.rglob("*")) if "__pycache__" not in str(path)] == before


def test_a_dry_run_does_not_touch_an_earlier_run(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "run").mkdir()
    (workspace / "run" / "config.yaml").write_text("# ibro_lightning\n")
    assert run_dry() == 0
    assert [path.name for path in workspace.glob("run*")] == ["run"]
    assert [path.name for path in (workspace / "run").iterdir()] == ["config.yaml"]
    assert "no time" in capsys.readouterr().out


def test_a_large_model_on_16_gpus_needs_neither_weights_nor_gpus(
    workspace: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = NumberPath(size=12).tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**LARGE, "eos_token_id": tokenizer.eos_token_id}))
    cuda = ["--trainer.accelerator", "cuda", "--trainer.devices", "8", "--trainer.num_nodes", "2"]
    settings = ["--trainer.precision", "bf16-mixed", "--model.policy_options.gradient_checkpointing", "true"]
    code = run_dry(
        *cuda, *settings, "--trainer.strategy", "fsdp2", "--model.policy", str(folder), "--estimate.gib", "80"
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert "16 cuda processes, fsdp2, bf16-mixed" in printed
    assert "policy: 2,022,229,504 parameters" in printed
    assert "data.prompts_per_rollout: 4 is no multiple of the 16 ranks" in printed
    # float32: 4 bytes a weight and 8 of AdamW, over 16 ranks
    assert f"{2_022_229_504 * 4 / 16 / GIB:10.2f}" in printed
    assert f"{2_022_229_504 * 8 / 16 / GIB:10.2f}" in printed


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["--data.source", "user_code.NoProblems"], "data.source"),
        (["--data.reward", "user_code.ReturnsNaN"], "ReturnsNaN"),
        (["--data.sampling.max_tokens", "100000"], "data.sampling.max_tokens"),
        (["--data.group_size", "1"], "data.group_size"),
        (["--data.prompt_limits.max_tokens", "1"], "data.prompt_limits.max_tokens"),
        (["--model.regularizer", "IBRO", "--model.regularizer.template", "{prompt} zzz {answer}"], "regularizer"),
        (
            [
                *("--model.regularizer", "MarginalEntropy", "--model.regularizer.base", "IBRO"),
                *("--model.regularizer.base.template", "{prompt} zzz {answer}"),
            ],
            "model.regularizer.base.template",
        ),
        (["--trainer.gradient_clip_val", "1"], "trainer.gradient_clip_val"),
        (["--trainer.precision", "16-mixed"], "trainer.precision"),
        (["--estimate.gib", "0"], "estimate.gib"),
    ],
)
def test_what_training_would_stop_at_is_one_line(
    workspace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], setting: str
) -> None:
    assert run_dry(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert setting in error
    assert not (workspace / "run").exists()


def test_a_command_without_a_dry_run_imports_none_of_it(tmp_path: Path) -> None:
    """In a process that is forked from one that has imported the command line, and no test."""
    code = "import ibro_lightning.cli.run, sys; print(*sorted(name for name in sys.modules if 'dry_run' in name))"
    assert run_ranks(1, exec, code, folder=tmp_path) == [0]
    printed = (tmp_path / "rank_0.log").read_text()
    assert printed.split() == ["ibro_lightning.dry_run", "ibro_lightning.dry_run.options"]


def test_only_fit_has_a_dry_run(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["validate", *DRY[1:]])
    assert ended.value.code == 2
    assert "only fit" in capsys.readouterr().err


def test_a_warm_start_has_one_too(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[1] / "configs" / "sft_quickstart.yaml"
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(recipe), "--dry_run"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "demonstrations" in printed
    assert "memory per rank" in printed
