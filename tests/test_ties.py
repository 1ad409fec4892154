"""One truth about head and embedding for trainer, engine, critic, reference and export: what the weights are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from helpers.models import gpt2, qwen2
from helpers.rollouts import PROMPTS, RESPONSES
from helpers.sharded import OPTIONS, NoTokenizer, backward, trainable
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.engines import HFEngine
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import (
    LoRAOptions,
    Policy,
    PolicyOptions,
    PretrainedPolicy,
    build_critic,
    build_policy,
    export_folder,
)
from ibro_lightning.models.lora import adapter_layers
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.models.stored import TorchFiles, stored_weights
from ibro_lightning.models.ties import is_tied
from ibro_lightning.modules import DAPOModule, SFTModule
from ibro_lightning.tasks import NumberPath

torch.set_num_threads(1)
SEQUENCES = Sequences.collate(PROMPTS, RESPONSES)


def untied_in_memory(folder: Path) -> Path:
    """What transformers writes for a head that was untied in memory: both weights, under a config that says tied."""
    model = qwen2()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 0.5)
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    return folder


def change_weights(folder: Path, drop: str = "", **changes: torch.Tensor) -> Path:
    file = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items() if name != drop}
    save_file({**weights, **changes}, file, metadata={"format": "pt"})
    return folder


def logp(model: Any) -> torch.Tensor:
    return Policy(model)(SEQUENCES, temperature=0.8)[0].detach()


def check_one_truth(policy: Policy, source: PretrainedPolicy, folder: Path) -> None:
    """The trained policy, what an engine gets, and what is exported."""
    expected = policy(SEQUENCES, temperature=0.8)[0].detach()
    engine = HFEngine(dtype=OPTIONS.dtype)
    engine.setup(ModelSpec(source.config(), (0,), torch.device("cpu")))
    engine.load_weights(policy.named_full_weights())
    torch.testing.assert_close(logp(engine._model), expected, rtol=0, atol=1e-5)
    export_folder(policy.model, NoTokenizer(), folder / "model", source)
    exported = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    torch.testing.assert_close(logp(exported), expected, rtol=0, atol=1e-5)
    assert json.loads((folder / "model" / "config.json").read_text())["tie_word_embeddings"] is is_tied(exported)


def trained(policy: Policy, lr: float = 1e-3) -> Policy:
    optimizer = torch.optim.SGD(trainable(policy), lr=lr)
    for _ in range(3):
        backward(policy)
        optimizer.step()
        optimizer.zero_grad()
    return policy


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
def test_a_head_that_differs_on_the_disk_is_untied_everywhere(
    kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = untied_in_memory(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        assert isinstance(stored_weights(str(folder), "main"), TorchFiles)
    elif kind == "shards":
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="4KB")
    source = PretrainedPolicy(folder, OPTIONS)
    assert source.config().tie_word_embeddings is False
    policy = build_policy(source, OPTIONS)
    assert torch.equal(policy.model.lm_head.weight, weights["lm_head.weight"].double())
    assert not is_tied(policy.model)
    assert not is_tied(build_policy(source, OPTIONS, frozen=True).model)
    critic = build_critic(source, OPTIONS).model.base_model.state_dict()
    assert torch.equal(critic["embed_tokens.weight"], weights["model.embed_tokens.weight"].double())
    check_one_truth(trained(policy), source, tmp_path)
    again = PretrainedPolicy(tmp_path / "model", OPTIONS)
    assert not is_tied(build_policy(again, OPTIONS).model)
    told = [str(warning.message) for warning in recwarn if "tie_word_embeddings" in str(warning.message)]
    assert len(told) == 1
    assert "lm_head.weight differs" in told[0]


def test_equal_weights_under_a_config_that_says_tied_are_one(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    qwen2().save_pretrained(tmp_path / "base")
    embedding = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(tmp_path / "base", **{"lm_head.weight": embedding.clone()})
    source = PretrainedPolicy(tmp_path / "base", OPTIONS)
    policy = build_policy(source, OPTIONS)
    assert is_tied(policy.model)
    assert source.config().tie_word_embeddings is True
    assert not list(recwarn)
    check_one_truth(trained(policy), source, tmp_path)


def test_a_head_under_an_older_name_is_found(tmp_path: Path) -> None:
    """GPT-2's weights lie on the hub without their prefix."""
    gpt2().save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights["lm_head.weight"] = weights["wte.weight"] * 2
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    source = PretrainedPolicy(tmp_path / "base", OPTIONS)
    policy = build_policy(source, OPTIONS)
    assert not is_tied(policy.model)
    check_one_truth(trained(policy), source, tmp_path)


@pytest.mark.parametrize(
    ("names", "downloads"),
    [({"model.embed_tokens.weight"}, False), ({"model.embed_tokens.weight", "lm_head.weight"}, True), (None, True)],
)
def test_of_a_model_on_the_hub_headers_come_first(
    names: set[str] | None, downloads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a dry run need not download weights of which only one says what the head is."""
    folder, asked = untied_in_memory(tmp_path / "base"), []
    source = PretrainedPolicy("someone/model", OPTIONS)
    monkeypatch.setattr(source, "_load", lambda auto_class, **_: auto_class.from_pretrained(folder))
    monkeypatch.setattr("ibro_lightning.models.pretrained.names_on_hub", lambda *_: names)
    monkeypatch.setattr(
        "ibro_lightning.models.pretrained.stored_weights",
        lambda *_: asked.append(1) or stored_weights(str(folder), "main"),
    )
    assert source.config().tie_word_embeddings is not downloads
    assert bool(asked) is downloads


# Weights that a folder lacks, or has too many of.


def spoiled(folder: Path, case: str) -> Path:
    untied = case in ("no head", "head of another size")
    qwen2(tie_word_embeddings=not untied).save_pretrained(folder)
    if case == "no head":
        change_weights(folder, drop="lm_head.weight")
    elif case == "head of another size":
        change_weights(folder, **{"lm_head.weight": torch.zeros(3, 16)})
    elif case == "a layer without weights":
        change_weights(folder, drop="model.layers.1.mlp.up_proj.weight")
    elif case == "no embedding":
        change_weights(folder, drop="model.embed_tokens.weight")
    elif case == "a bias without a place":
        change_weights(folder, **{"model.layers.0.self_attn.o_proj.bias": torch.zeros(16)})
    elif case == "fewer layers in the config":
        file = folder / "config.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps({**values, "num_hidden_layers": 1, "layer_types": None}))
    elif case == "adapters":
        adapter = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)}
        change_weights(folder, **adapter)
    elif case == "cut off":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif case == "a missing shard":
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="4KB")
        next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()
    elif case == "no weights":
        (folder / "model.safetensors").unlink()
    return folder


CASES = {
    "no head": "tie_word_embeddings: false, .* no head",
    "head of another size": r"lm_head.weight is \(3, 16\) on the disk, and config.json makes it \(\d+, 16\)",
    "a layer without weights": "lacks model.layers.1.mlp.up_proj.weight of the model",
    "no embedding": "lacks 2 weights .lm_head.weight, …. of the model",
    "a bias without a place": "holds model.layers.0.self_attn.o_proj.bias for which",
    "fewer layers in the config": r"holds \d+ weights \(model.layers.1.* for which",
    "cut off": "cannot load its weights",
    "a missing shard": "cannot load its",
    "no weights": "cannot load its",
}


@pytest.mark.parametrize("case", CASES)
def test_incomplete_weights_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=CASES[case]) as refusal:
        build_policy(PretrainedPolicy(spoiled(tmp_path / "base", case), OPTIONS), OPTIONS)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("policy: ")


def test_weights_of_other_parts_are_harmless(tmp_path: Path) -> None:
    qwen2().save_pretrained(tmp_path / "base")
    more = {
        "score.weight": torch.zeros(1, 16),
        "visual.blocks.0.attn.qkv.weight": torch.zeros(4, 4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "mtp.layers.0.input_layernorm.weight": torch.zeros(16),
    }
    change_weights(tmp_path / "base", **more)
    policy = build_policy(PretrainedPolicy(tmp_path / "base", OPTIONS), OPTIONS)
    torch.testing.assert_close(logp(policy.model), logp(qwen2().double()))


# Adapters.


def adapted(folder: Path, targets: list[str] | None, **overrides: Any) -> tuple[PretrainedPolicy, PolicyOptions]:
    tokenizer = NumberPath(size=12).tokenizer()
    qwen2(vocab_size=len(tokenizer), **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = replace(OPTIONS, lora=LoRAOptions(rank=3, alpha=6.0, target_modules=targets))
    return PretrainedPolicy(folder, options), options


@pytest.mark.parametrize("kind", [DAPOModule, SFTModule])
@pytest.mark.parametrize(
    ("targets", "tied"),
    [
        (None, True),
        (None, False),
        (["q_proj", "down_proj"], True),
        (["lm_head"], False),
        (["lm_head", "q_proj"], False),
        (["layers.1.self_attn.v_proj"], True),
    ],
)
def test_adapters_are_the_same_in_trainer_engine_and_export(
    targets: list[str] | None, tied: bool, kind: Any, tmp_path: Path
) -> None:
    source, options = adapted(tmp_path / "base", targets, tie_word_embeddings=tied)
    module = kind(source, policy_options=options)
    module.configure_model()
    before = module.policy(SEQUENCES, temperature=0.8)[0].detach()
    trained(module.policy, lr=0.1)
    assert (module.policy(SEQUENCES, temperature=0.8)[0] - before).abs().max() > 0.01, "they learn"
    assert ("lm_head" in adapter_layers(module.policy.model)) is bool(targets and "lm_head" in targets)
    check_one_truth(module.policy, source, tmp_path)
    exported = module.export(tmp_path / "by_module" / "model")
    assert load_file(exported / "model.safetensors").keys() == load_file(tmp_path / "base" / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("targets", "tied", "words"),
    [
        (["lm_head"], True, "the weight of lm_head is that of model.embed_tokens too"),
        (["q_proj", "lm_head"], True, "lm_head"),
        (["embed_tokens"], True, "model.embed_tokens is an embedding"),
        (["embed_tokens", "q_proj"], False, "model.embed_tokens is an embedding"),
        (["input_layernorm"], False, "is a Qwen2RMSNorm"),
        (["mlp"], False, "is a Qwen2MLP"),
        (["nowhere"], False, "nowhere"),
        (["q_proj", "nowhere"], False, "nowhere"),
    ],
)
def test_adapters_that_could_not_be_merged_are_refused(
    targets: list[str], tied: bool, words: str, tmp_path: Path
) -> None:
    source, options = adapted(tmp_path / "base", targets, tie_word_embeddings=tied)
    with pytest.raises(ConfigError, match=rf"lora\.target_modules: .* - .*{words}"):
        build_policy(source, options)


@pytest.mark.parametrize("targets", ["all-linear", ["all-linear"], [], "q_proj"])
def test_targets_are_a_list_of_names(targets: Any) -> None:
    with pytest.raises(ConfigError, match=r"write a list such as \[q_proj, v_proj\], or null"):
        LoRAOptions(target_modules=targets)
