"""Adapters learn, and nothing else does; engines and exports see merged weights."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.models import TinyQwen2, gpt2, qwen2
from helpers.rollouts import PROMPTS, RESPONSES
from helpers.sharded import (
    OPTIONS,
    NoTokenizer,
    backward,
    check_same_weights,
    check_training,
    meet,
    objective,
    on_ranks,
    saved_model,
    source_of,
    trainable,
)
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.cli.main import main
from ibro_lightning.engines import HFEngine
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import LoRAOptions, Policy, PolicyOptions, build_critic, build_policy, export_folder
from ibro_lightning.models.lora import is_adapter
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import SamplingParams

torch.set_num_threads(1)
LORA = LoRAOptions(rank=3, alpha=6.0)
ADAPTED = replace(OPTIONS, lora=LORA)


def trained(policy: Policy, steps: int = 3) -> Policy:
    optimizer = torch.optim.AdamW(trainable(policy), lr=1e-2)
    for _ in range(steps):
        backward(policy)
        optimizer.step()
        optimizer.zero_grad()
    return policy


def adapted(**settings: Any) -> Policy:
    return build_policy(TinyQwen2(), replace(ADAPTED, **settings))


def test_a_policy_with_new_adapters_is_its_base_model() -> None:
    base, policy = build_policy(TinyQwen2(), OPTIONS), adapted()
    check_same_weights(policy, base)
    assert torch.equal(objective(policy, [0, 1]), objective(base, [0, 1]))


def test_only_adapters_learn() -> None:
    policy = adapted()
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    assert {is_adapter(name) for name, p in policy.named_parameters() if p.requires_grad} == {True}
    # A and B of seven linear layers in each of two blocks.
    assert len(trainable(policy)) == 2 * 7 * 2
    trained(policy)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]) != is_adapter(name), name
        assert is_adapter(name) or parameter.grad is None


def test_merged_weights_say_what_the_adapted_policy_says() -> None:
    policy = trained(adapted())
    whole = qwen2().to(torch.float64)
    whole.load_state_dict(dict(policy.named_full_weights()))
    sequences = Sequences.collate(PROMPTS, RESPONSES)
    for ours, theirs in zip(policy(sequences, temperature=0.8), Policy(whole)(sequences, temperature=0.8), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_fused_head_stays_on(recwarn: pytest.WarningsRecorder) -> None:
    policy = adapted()
    objective(policy, [0])
    assert policy._linear_head() is not None
    assert not [warning for warning in recwarn if "full logits" in str(warning.message)]


def test_an_engine_takes_merged_weights() -> None:
    policy = trained(adapted())
    engine = HFEngine()
    engine.setup(ModelSpec(qwen2().config, (0,), torch.device("cpu")))
    engine.load_weights(policy.named_full_weights())
    assert engine.generate(PROMPTS[:2], SamplingParams(max_tokens=3), [[1], [2]])


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_export_is_merged_and_has_the_adapter_beside_it(tmp_path: Path, family: str) -> None:
    made = {"qwen2": qwen2, "gpt2": gpt2}[family]()  # GPT-2's layers keep their weights transposed
    made.to(torch.float64).save_pretrained(tmp_path / "base")
    policy = trained(build_policy(source_of(tmp_path / "base"), ADAPTED))
    export_folder(policy.model, NoTokenizer(), tmp_path / "out" / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float64)
    assert type(merged) is type(made)
    for name, tensor in policy.named_full_weights():
        assert torch.equal(merged.state_dict()[name], tensor), name
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    # peft's own merge of what it reads from the folder.
    read = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"), autocast_adapter_dtype=False)
    state = read.merge_and_unload().state_dict()
    assert state.keys() == merged.state_dict().keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, merged.state_dict()[name], rtol=0, atol=1e-6)
    changed = [name for name, tensor in made.state_dict().items() if not torch.equal(tensor, state[name])]
    assert len(changed) == {"qwen2": 14, "gpt2": 8}[family], "the linear layers of two blocks"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "model"]


def test_adapters_start_the_same_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = dict(adapted().named_parameters())
    torch.manual_seed(2)
    second = dict(adapted().named_parameters())
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name
    values = [p for name, p in first.items() if "lora_A" in name]
    assert not torch.equal(values[0], values[1]), "layers differ"
    other = dict(adapted(lora=replace(LORA, seed=1)).named_parameters())
    assert any(not torch.equal(parameter, other[name]) for name, parameter in first.items())


def test_adapters_of_half_precision_weights_are_float32() -> None:
    policy = build_policy(TinyQwen2(torch.bfloat16), replace(PolicyOptions(), lora=LORA))
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    trained(policy)
    assert {tensor.dtype for _, tensor in policy.named_full_weights()} == {torch.bfloat16}


def test_named_layers_get_adapters_and_no_others() -> None:
    policy = adapted(lora=replace(LORA, target_modules=["q_proj", "v_proj"]))
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in policy.named_parameters() if is_adapter(name)}
    assert layers == {"q_proj", "v_proj"}


def test_the_reference_and_the_critic_have_none() -> None:
    frozen = build_policy(TinyQwen2(), ADAPTED, frozen=True)
    assert not any(is_adapter(name) or p.requires_grad for name, p in frozen.named_parameters())
    assert not any(is_adapter(name) for name, _ in build_critic(TinyQwen2(), ADAPTED).named_parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"rank": 0}, "rank: 0 - write 1 or more"), ({"alpha": -1.0}, "alpha: -1.0 - write a positive number")],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoRAOptions(**settings)


@pytest.mark.parametrize("names", ["all-linear", "q_proj", ["all-linear"], []])
def test_layers_that_are_no_list_of_names_are_one_line_from_the_command_line(
    names: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """``all-linear`` is peft's word for what null means here."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "quickstart", f"--model.policy_options.lora.target_modules={json.dumps(names)}"])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "model.policy_options.lora.target_modules: " in line
    assert line.endswith("write a list such as [q_proj, v_proj], or null for all linear layers of the decoder blocks")


def test_an_unknown_layer_is_named() -> None:
    with pytest.raises(ConfigError, match=r"lora\.target_modules: \['nowhere'\] - .*nowhere"):
        adapted(lora=replace(LORA, target_modules=["nowhere"]))


def test_without_peft_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'ibro-lightning\[lora\]'"):
        adapted()


# Sharded.


def train_sharded(folder: Path) -> None:
    sharding = meet()
    source = source_of(folder)
    for options in (ADAPTED, replace(ADAPTED, gradient_checkpointing=True)):
        policy, single = build_policy(source, options, sharding), build_policy(source, options)
        for (name, theirs), (ours, parameter) in zip(single.named_parameters(), policy.named_parameters(), strict=True):
            assert (ours, parameter.dtype, parameter.requires_grad) == (name, theirs.dtype, theirs.requires_grad)
            assert parameter.to_local().numel() <= (theirs.numel() + theirs[0].numel()) // 2, "sharded too"
        check_training(policy, single, sharding)
        export_folder(policy.model, NoTokenizer(), Path("out/model"))
        merged = AutoModelForCausalLM.from_pretrained("out/model", dtype=torch.float64)
        for name, tensor in policy.named_full_weights():
            assert torch.equal(merged.state_dict()[name], tensor), name
        assert Path("out/adapter/adapter_model.safetensors").is_file()
    # float32 adapters on bfloat16 weights: two types in a group.
    half = replace(PolicyOptions(dtype="bfloat16"), lora=LORA)
    policy, single = build_policy(source, half, sharding), build_policy(source, half)
    check_same_weights(policy, single)
    backward(policy, sharding)
    assert {p.grad.dtype for p in trainable(policy) if p.grad is not None} == {torch.float32}


def test_two_ranks_train_adapters_as_one_process_does(tmp_path: Path) -> None:
    on_ranks(2, train_sharded, saved_model(tmp_path / "model"), folder=tmp_path)


def refuse_tensor_parallel(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: 2 - adapters .* write 1"):
        build_policy(source_of(folder), ADAPTED, meet(1, 2))


def test_adapters_are_not_cut_by_tensor_parallelism(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", num_attention_heads=4, num_key_value_heads=2)
    on_ranks(2, refuse_tensor_parallel, model, folder=tmp_path)
