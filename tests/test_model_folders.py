"""What a model folder holds beside its weights is repaired, copied or left out; it never costs the run's result."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import (
    LoRAOptions,
    PolicyOptions,
    PretrainedPolicy,
    build_critic,
    build_policy,
    export_folder,
)
from ibro_lightning.models.generation_config import repaired
from ibro_lightning.modules import PPOModule, SFTModule

SAMPLING = {"temperature": 0.6, "top_p": 0.9}


@pytest.fixture
def folder(tiny_policy: Path, tmp_path: Path) -> Path:
    """A model folder of one's own to spoil."""
    return Path(shutil.copytree(tiny_policy, tmp_path / "base"))


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))


def exported(folder: Path, options: PolicyOptions | None = None) -> Path:
    options = options or PolicyOptions()
    source = PretrainedPolicy(folder, options)
    policy = build_policy(source, options)
    return export_folder(policy.model, source.tokenizer(), folder.parent / "out" / "model", source)


def greedy(folder: Path) -> list[int]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("1>2:", return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, temperature=None, top_p=None, top_k=None)[
        0
    ].tolist()


# generation_config.json.


@pytest.mark.parametrize(
    ("values", "expected", "change"),
    [
        (SAMPLING, {**SAMPLING, "do_sample": True}, "do_sample: true is added"),
        ({**SAMPLING, "do_sample": False}, {"do_sample": False}, "temperature: 0.6, top_p: 0.9, which is left out"),
        ({"temperature": 0.0}, {}, "temperature: 0.0"),
        ({"top_k": 1, "temperature": 0.6}, {}, "top_k: 1"),
        ({"num_beams": 3, "temperature": 0.6}, {"num_beams": 3}, "temperature: 0.6"),
        ({"num_return_sequences": 4}, {}, "num_return_sequences: 4"),
        ({"num_return_sequences": 4, "do_sample": True}, {"num_return_sequences": 4, "do_sample": True}, ""),
        ({"early_stopping": True, "length_penalty": 2.0, "num_beams": 2}, {"early_stopping": True, "num_beams": 2}, ""),
        ({"early_stopping": "perhaps"}, {}, "early_stopping: 'perhaps'"),
        ({"streamer": 1, "eos_token_id": 2}, {"eos_token_id": 2}, "streamer: 1"),
        ({"max_new_tokens": "many"}, {}, "max_new_tokens: 'many'"),
        ({"eos_token_id": "</s>", "pad_token_id": -1}, {}, "eos_token_id: '</s>', pad_token_id: -1"),
        ({"cache_implementation": "odd", "use_cache": False}, {"use_cache": False}, "cache_implementation: 'odd'"),
        ({"output_scores": True}, {}, "output_scores: True"),
        ({"a_new_setting": [1, {"x": None}]}, {"a_new_setting": [1, {"x": None}]}, ""),
        ({"eos_token_id": [0, 3], "transformers_version": "4.1"}, {"eos_token_id": [0, 3]}, ""),
    ],
)
def test_settings_that_transformers_refuses_are_mended(
    values: dict[str, Any], expected: dict[str, Any], change: str, tmp_path: Path
) -> None:
    config, changes = repaired(values)
    assert change in changes
    assert bool(change) == bool(changes)
    config.save_pretrained(tmp_path)
    kept = GenerationConfig.from_pretrained(tmp_path).to_diff_dict()
    assert {name: value for name, value in kept.items() if name != "transformers_version"}.items() >= expected.items()
    for name in values.keys() - expected.keys() - {"length_penalty", "transformers_version"}:
        assert getattr(config, name, None) is None


@pytest.mark.parametrize("text", ["{", "[1]", "3", "", "\udcff", json.dumps({"early_stopping": []}), "\ufeff{}"])
def test_a_generation_config_that_is_none_costs_nothing(folder: Path, text: str) -> None:
    file = folder / "generation_config.json"
    file.write_text(text, errors="surrogateescape")
    before = PretrainedPolicy(folder).eos_token_ids()
    file.unlink()
    assert before == PretrainedPolicy(folder).eos_token_ids()
    file.write_text(text, errors="surrogateescape")
    out = exported(folder)
    assert greedy(out) == greedy(folder.parent / "out" / "model")
    GenerationConfig.from_pretrained(out).validate(strict=True)


def test_sampling_values_do_not_cost_the_model(workspace: Path, folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    """At the end of training, when it is resumed, and of a checkpoint."""
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    arguments = ["fit", "--config", "tiny.yaml", "--model.policy", str(folder), "--data.eval_sets", "null"]
    main([*arguments, "--trainer.max_epochs", "1"])
    assert sum("do_sample: true is added" in str(warning.message) for warning in recwarn) == 1
    kept = json.loads(Path("run/model/generation_config.json").read_text())
    assert {name: kept[name] for name in ("do_sample", *SAMPLING)} == {"do_sample": True, **SAMPLING}
    shutil.rmtree("run/model")
    main([*arguments, "--trainer.max_epochs", "1", "--ckpt_path", "last"])
    main(["export", "--ckpt_path", "last", "--run", "run", "--output", "again/model"])
    first = AutoModelForCausalLM.from_pretrained("run/model").state_dict()
    second = AutoModelForCausalLM.from_pretrained("again/model").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("lora", [None, LoRAOptions(rank=2)])
def test_a_model_in_memory_that_transformers_refuses_to_write_is_written(
    folder: Path, lora: LoRAOptions | None, recwarn: pytest.WarningsRecorder
) -> None:
    """Of PPO, and of supervised training with adapters, which have folders of their own beside the policy's."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generation_config.temperature = 0.6
    options = PolicyOptions(lora=lora)
    module = SFTModule((model, tokenizer), policy_options=options) if lora else PPOModule((model, tokenizer))
    module.configure_model()
    out = module.export(folder.parent / "out" / "model")
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(["adapter" if lora else "critic", "model"])
    assert GenerationConfig.from_pretrained(out).temperature == 0.6
    assert greedy(out) == greedy(folder)
    assert [str(w.message) for w in recwarn if "generation_config" in str(w.message)] == [
        "model: generation_config.json is repaired: do_sample: true is added to its sampling values"
    ]


def test_an_end_that_the_model_cannot_generate_is_left_out(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 99999]}))
    source = PretrainedPolicy(folder)
    assert source.eos_token_ids() == (source.tokenizer().eos_token_id, 1)


# config.json.


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_dtype": "bfloat16", "dtype": None},
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
        {"temperature": 0.6, "do_sample": False, "num_beams": 3, "max_length": 20},
        {"odd": {"a": [1, None]}, "_name_or_path": "somewhere/else", "id2label": {"0": "x"}, "architectures": None},
        {"auto_map": {"AutoModelForCausalLM": "modeling_odd.Odd"}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "odd"}},
        {"quantization_config": {}},
        {"quantization_config": None},
    ],
)
@pytest.mark.parametrize("with_generation", [True, False])
def test_an_odd_config_trains_and_is_exported(folder: Path, changes: dict[str, Any], with_generation: bool) -> None:
    edit(folder / "config.json", **changes)
    if not with_generation:
        (folder / "generation_config.json").unlink()
    out = exported(folder)
    critic = build_critic(PretrainedPolicy(folder), PolicyOptions())
    export_folder(critic.model, AutoTokenizer.from_pretrained(folder), folder.parent / "out" / "critic")
    plain = AutoModelForCausalLM.from_pretrained(out)
    policy = build_policy(PretrainedPolicy(folder), PolicyOptions())
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in policy.model.state_dict().items())
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(plain(tokens).logits, policy.model(tokens).logits)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not hasattr(PretrainedPolicy(folder).config(), "quantization_config")
    assert greedy(out)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no valid JSON|not a valid JSON"),
        ("[]", "cannot load its Config"),
        ("{}", "model_type"),
        ('{"model_type": "qwen2", "hidden_size": "many"}', "hidden_size"),
        ('{"model_type": "t5"}', "cannot load its|no EOS"),
    ],
)
def test_a_config_that_is_none_is_refused_in_one_line(folder: Path, text: str, words: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words) as refusal:
        build_policy(PretrainedPolicy(folder), PolicyOptions())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("build", "setting"), [(build_policy, "policy"), (build_critic, "critic")])
def test_weights_that_are_no_numbers_are_refused(folder: Path, build: Any, setting: str) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][1] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{setting}: .*model\.norm\.weight holds NaN: name a model whose weights"):
        build(PretrainedPolicy(folder), PolicyOptions())


def test_quantized_weights_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", quantization_config={"quant_method": "odd"})
    with pytest.raises(ConfigError, match="quantiz"):
        build_policy(PretrainedPolicy(folder), PolicyOptions())


# Tokenizers.


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for x in %}")


def several_templates(folder: Path) -> None:
    templates = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]
    edit(folder / "tokenizer_config.json", chat_template=templates)


def odd_fields(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", odd={"a": 1}, tokenizer_class="OddTokenizer", processor_class="Odd")
    (folder / "special_tokens_map.json").write_text('{"odd": 3}')
    (folder / "added_tokens.json").write_text('{"<odd>": 9999}')


def read_only(folder: Path) -> None:
    for file in folder.iterdir():
        file.chmod(0o444)


@pytest.mark.parametrize("spoil", [without_template, several_templates, odd_fields, read_only])
def test_an_odd_tokenizer_is_exported_as_it_is_read(
    folder: Path, spoil: Callable[[Path], None], recwarn: pytest.WarningsRecorder
) -> None:
    spoil(folder)
    out = exported(folder)
    ours, theirs = (AutoTokenizer.from_pretrained(each) for each in (folder, out))
    assert theirs.get_vocab() == ours.get_vocab()
    assert theirs.chat_template == ours.chat_template
    assert greedy(out) == greedy(folder)
    assert not [str(warning.message) for warning in recwarn if "tokenizer" in str(warning.message).lower()]


def test_a_tokenizer_that_cannot_be_written_is_copied(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    source = PretrainedPolicy(folder)
    tokenizer = source.tokenizer()

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("this one cannot")

    tokenizer.save_pretrained = refuse
    out = export_folder(build_policy(source, PolicyOptions()).model, tokenizer, folder.parent / "model", source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    messages = [str(warning.message) for warning in recwarn]
    assert messages == [
        "model: the tokenizer cannot be written (NotImplementedError: this one cannot)",
        "model: the tokenizer's files are those of the base model, as new ones would be read otherwise",
    ]
    assert sorted(path.name for path in out.parent.iterdir()) == ["base", "model"], "nothing half-written"


def test_a_changed_tokenizer_is_written_as_it_was_used(folder: Path) -> None:
    source = PretrainedPolicy(folder)
    source.tokenizer().chat_template = "{{ messages[0]['content'] }}"
    out = export_folder(
        build_policy(source, PolicyOptions()).model, source.tokenizer(), folder.parent / "model", source
    )
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages[0]['content'] }}"


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        PretrainedPolicy(folder).eos_token_ids()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "{", "3"])
def test_a_broken_tokenizer_is_refused_in_one_line(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match="cannot load its Tokenizer") as refusal:
        PretrainedPolicy(folder).eos_token_ids()
    assert "\n" not in str(refusal.value)


# What else there is.


def test_the_files_of_a_processor_are_kept(folder: Path) -> None:
    """AutoProcessor opens what is exported as it opens the base."""
    names = [
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "chat_template.json",
    ]
    for name in names:
        (folder / name).write_text(json.dumps({"made_for": name}))
        (folder / name).chmod(0o444)
    for name in ("README.md", "modeling_odd.py", "training_args.bin", "model.safetensors.index.json.old"):
        (folder / name).write_text("not ours")
    (folder / "broken_processor.json").symlink_to(folder / "nowhere")
    out = exported(folder)
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert not {"README.md", "modeling_odd.py", "training_args.bin"} & {file.name for file in out.iterdir()}
    again = exported(out)
    assert all((again / name).is_file() for name in names)


def test_a_base_that_went_away_costs_nothing(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    (folder / "processor_config.json").write_text("{}")
    source = PretrainedPolicy(folder)
    policy, tokenizer, before = build_policy(source, PolicyOptions()), source.tokenizer(), greedy(folder)
    shutil.rmtree(folder)
    out = export_folder(policy.model, tokenizer, folder.parent / "model", source)
    assert greedy(out) == before


@pytest.mark.parametrize("lora", [None, LoRAOptions(rank=2)])
def test_a_model_that_transformers_cannot_write_is_written_plainly(
    folder: Path, lora: LoRAOptions | None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    options = PolicyOptions(lora=lora)
    source = PretrainedPolicy(folder, options)
    policy = build_policy(source, options)
    for parameter in policy.parameters():
        parameter.data.add_(0.01)
    expected = dict(policy.named_full_weights())

    def refuse(*_: Any, **__: Any) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(type(policy.model.config), "save_pretrained", refuse)
    out = export_folder(policy.model, source.tokenizer(), folder.parent / "out" / "model", source)
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert greedy(out)
    assert "transformers' folder cannot be written (AttributeError: no such thing)" in str(recwarn[0].message)


def test_a_full_disk_is_an_error_still(folder: Path) -> None:
    source = PretrainedPolicy(folder)
    policy = build_policy(source, PolicyOptions())

    def fill(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source.tokenizer().save_pretrained = fill
    with pytest.raises(OSError, match="No space left"):
        export_folder(policy.model, source.tokenizer(), folder.parent / "model", source)
    assert not (folder.parent / "model").exists()
