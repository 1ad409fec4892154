"""What may be written for ``policy``: a folder as text or Path, a hub name, a model in memory, a source."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path, PurePath
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, pipeline

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.cli.parser import OneLineParser
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import (
    ModelPolicy,
    Policy,
    PolicyOptions,
    PretrainedPolicy,
    Qwen2FromScratch,
    as_source,
    build_policy,
)
from ibro_lightning.modules import DAPOModule, PPOModule, SFTModule
from ibro_lightning.update.reference import ReferenceKL

SEQUENCES = Sequences.collate([[1, 2, 3]], [[4, 5]])


@pytest.fixture(scope="module")
def model(tiny_policy: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_policy)


def logp(policy: Policy) -> torch.Tensor:
    return policy(SEQUENCES, temperature=1.0)[0].detach()


def configured(module: Any) -> Any:
    module.configure_model()
    return module


@pytest.mark.parametrize("kind", [DAPOModule, PPOModule, SFTModule])
def test_a_path_a_model_and_a_pair_are_what_their_folder_is(kind: Any, tiny_policy: Path, model: Any) -> None:
    expected = logp(configured(kind(str(tiny_policy))).policy)
    for policy in (tiny_policy, model, (model, AutoTokenizer.from_pretrained(tiny_policy))):
        module = configured(kind(policy))
        assert torch.equal(logp(module.policy), expected)
        assert module.policy.training
        assert module.eos_token_ids == kind(str(tiny_policy)).eos_token_ids
        assert module.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_policy).get_vocab()


def test_a_critic_and_a_reference_may_be_given_likewise(tiny_policy: Path, model: Any, tmp_path: Path) -> None:
    module = configured(PPOModule(tiny_policy))
    torch.nn.init.ones_(module.critic.model.score.weight)
    module.export(tmp_path / "model")
    folder = tmp_path / "critic"
    expected = module.critic(SEQUENCES)
    for critic in (str(folder), folder, AutoModelForTokenClassification.from_pretrained(folder)):
        assert torch.equal(configured(PPOModule(tiny_policy, critic=critic)).critic(SEQUENCES), expected)
    assert (configured(PPOModule(tiny_policy, critic=model)).critic(SEQUENCES) == 0).all()
    expected = logp(build_policy(PretrainedPolicy(tiny_policy), PolicyOptions()))
    for reference in (tiny_policy, model):
        kl = ReferenceKL(policy=reference)
        DAPOModule(tiny_policy, kl=kl)
        assert torch.equal(logp(kl.on(torch.device("cpu"))), expected)


def test_a_model_in_memory_is_left_as_it_is(model: Any) -> None:
    """So that the reference and a resumed run begin where training began."""
    before = copy.deepcopy(model.state_dict())
    module = configured(DAPOModule(model, kl=ReferenceKL()))
    for parameter in module.policy.parameters():
        parameter.data.mul_(1.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    reference = module.kl.on(torch.device("cpu"))
    assert torch.equal(logp(reference), logp(Policy(copy.deepcopy(model))))


def test_a_model_in_memory_gets_the_dtype_and_the_attention_of_the_options(tiny_policy: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.bfloat16)
    whole = build_policy(ModelPolicy(half), PolicyOptions())
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    assert half.dtype == torch.bfloat16
    options = PolicyOptions(dtype="bfloat16", attn_implementation="eager", gradient_checkpointing=True)
    eager = build_policy(ModelPolicy(half), options)
    assert {parameter.dtype for parameter in eager.parameters()} == {torch.bfloat16}
    assert eager.model.config._attn_implementation == "eager"
    assert half.config._attn_implementation == "sdpa"
    rotary = [buffer.dtype for name, buffer in eager.named_buffers() if "inv_freq" in name]
    assert set(rotary) == {torch.float32}


def test_an_untied_head_in_memory_stays_untied(model: Any, tmp_path: Path) -> None:
    untied = copy.deepcopy(model)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach() * 2)
    module = configured(DAPOModule(untied))
    assert module.policy_source.config().tie_word_embeddings is False
    module.export(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    again = build_policy(PretrainedPolicy(tmp_path / "model"), PolicyOptions())
    assert torch.equal(logp(again), logp(module.policy))


class WithoutName:
    """Stands where a model would."""


def test_anything_else_is_refused_in_one_line_that_says_what_to_write(
    tiny_policy: Path, model: Any, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    nameless = copy.deepcopy(model)
    nameless.config._name_or_path = ""
    nameless.name_or_path = ""
    adapter = Path(shutil.copytree(tiny_policy, tmp_path / "adapter"))
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").touch()
    (tmp_path / "run").mkdir()
    shutil.copytree(tiny_policy, tmp_path / "run" / "model")
    (tmp_path / "last.ckpt").touch()
    (tmp_path / "model.gguf").touch()
    meta = AutoModelForCausalLM.from_config(model.config).to("meta")
    cases: list[tuple[Any, str]] = [
        (None, "None - write a Hugging Face folder or hub name"),
        (3, "3 - write a Hugging Face folder"),
        ({"a": 1}, "'dict' - write a Hugging Face"),
        ([model], "'list' - write"),
        (WithoutName(), "'WithoutName' - write"),
        (tokenizer, "this is a tokenizer"),
        (Policy(copy.deepcopy(model)), r"'Policy' - write .* its \.model is one"),
        (pipeline("text-generation", model=model, tokenizer=tokenizer), r"its \.model is one"),
        (torch.compile(model), "the one that was compiled"),
        (Qwen2FromScratch, "the class Qwen2FromScratch"),
        (PurePath("runs/nothing"), "no such folder"),
        (nameless, r"its tokenizer is unknown: write \(model, tokenizer\)"),
        ((model, "gpt2"), r"a str is not a tokenizer: write \(model, tokenizer\)"),
        (AutoModel.from_pretrained(tiny_policy), "not a causal language model"),
        (AutoModelForTokenClassification.from_config(model.config), "not a causal language model"),
        (meta, "not all in memory"),
        ("", "empty: write"),
        ("no/such/folder", "no such folder"),
        (Path("runs/nothing"), "no such folder"),
        (tmp_path / "nothing", "no such folder"),
        (tmp_path / "model.gguf", "this is a file: name a Hugging Face model folder"),
        (str(tmp_path / "last.ckpt"), "this is a checkpoint: .* export"),
        (tmp_path / "gguf", "GGUF files cannot be trained"),
        (tmp_path / "run", "no config.json: .* here .*run/model"),
        (adapter, "holds an adapter .* merge_and_unload"),
    ]
    for value, words in cases:
        with pytest.raises(ConfigError, match=words) as refusal:
            DAPOModule(value)
        assert "\n" not in str(refusal.value)
        assert str(refusal.value).startswith("policy: ")


def test_a_model_that_its_config_does_not_build_is_refused(model: Any) -> None:
    """An engine would build another one."""
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)

    def with_bias(changed: Any) -> None:
        changed.lm_head.bias = torch.nn.Parameter(torch.zeros(changed.config.vocab_size))

    def with_layer(changed: Any) -> None:
        changed.model.layers.append(copy.deepcopy(changed.model.layers[-1]))

    def without_layer(changed: Any) -> None:
        del changed.model.layers[-1]

    def with_another_mlp(changed: Any) -> None:
        changed.model.layers[0].mlp = torch.nn.Linear(4, 4)

    def with_wider_mlp(changed: Any) -> None:
        changed.model.layers[0].mlp.up_proj = torch.nn.Linear(changed.config.hidden_size, 7, bias=False)

    last = model.config.num_hidden_layers - 1
    cases: list[tuple[Any, str]] = [
        (with_bias, r"it has lm_head\.bias more"),
        (with_layer, rf"it has model\.layers\.{last + 1}\..* and \d+ others more"),
        (without_layer, rf"it lacks model\.layers\.{last}\..* and \d+ others"),
        (with_another_mlp, r"it has model\.layers\.0\.mlp\.weight .* it lacks model\.layers\.0\.mlp\.gate_proj"),
        (with_wider_mlp, r"model\.layers\.0\.mlp\.up_proj\.weight in another shape \(\[7, "),
    ]
    for change, words in cases:
        changed = copy.deepcopy(model)
        change(changed)
        with pytest.raises(ConfigError, match=f"its weights are not what its config builds: .*{words}") as refusal:
            DAPOModule((changed, tokenizer))
        assert "\n" not in str(refusal.value)


def test_a_vocabulary_that_has_grown_is_in_the_config(model: Any) -> None:
    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(model.config.vocab_size + 3)
    assert as_source(grown, PolicyOptions()).config().vocab_size == model.config.vocab_size + 3


def test_adapters_of_others_are_refused(tiny_policy: Path, model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    pair = (wrapped, AutoTokenizer.from_pretrained(tiny_policy))
    cases = [
        (wrapped, "what merge_and_unload"),
        (pair, "what merge_and_unload"),
        (wrapped.base_model.model, "merge them first"),
    ]
    for policy, words in cases:
        with pytest.raises(ConfigError, match=words):
            as_source(policy, PolicyOptions())
    assert isinstance(as_source(wrapped.merge_and_unload(), PolicyOptions()), ModelPolicy)


def test_the_command_line_writes_each_as_it_was_given() -> None:
    """``config.yaml`` must read as what ran."""
    parser = OneLineParser(exit_on_error=False)
    parser.add_lightning_class_args(PPOModule, "model")
    task = {"class_path": "ibro_lightning.tasks.NumberPath", "init_args": {"size": 12}}
    scratch = {"class_path": "ibro_lightning.models.Qwen2FromScratch", "init_args": {"task": task}}
    kl = {"class_path": "ibro_lightning.update.ReferenceKL", "init_args": {"policy": "some/reference"}}
    for policy, critic in (("some/model", None), (scratch, "runs/a/critic")):
        settings = parser.parse_object({"model": {"policy": policy, "critic": critic, "kl": kl}})
        written = yaml.safe_load(parser.dump(settings))["model"]
        assert written.get("critic") == critic
        assert written["kl"]["init_args"]["policy"] == "some/reference"
        assert (written["policy"] if critic is None else written["policy"]["class_path"]) == (
            policy if critic is None else scratch["class_path"]
        )
