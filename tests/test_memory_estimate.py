"""The memory that a dry run prints, against real steps; and its arithmetic, against torch's count."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.processes import logs, run_ranks
from helpers.quick import slow_unless
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.dry_run.engine_memory import engine_memory
from ibro_lightning.dry_run.layout import GIB, Layout
from ibro_lightning.dry_run.memory import MemoryEstimate, estimate_memory
from ibro_lightning.dry_run.networks import NetworkMemory
from ibro_lightning.dry_run.report import verdict
from ibro_lightning.dry_run.shadow import ShadowMemory
from ibro_lightning.dry_run.shapes import Shapes
from ibro_lightning.dry_run.work import Tokens, measured_speeds, seconds_at, work_of
from ibro_lightning.engines import EngineProcess, HFEngine, VLLMEngine, VLLMServerEngine
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import PolicyOptions, randomness
from ibro_lightning.modules import DAPOModule
from ibro_lightning.regularizers import IBRO, ClipCov, InformationBottleneck, KLCov, MarginalEntropy
from ibro_lightning.tasks import NumberPath
from ibro_lightning.types import Prompt, SamplingParams
from ibro_lightning.update import ReferenceKL

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "dry_run_memory.py"
ONE = Layout()


def benchmark() -> ModuleType:
    """``benchmarks/dry_run_memory.py``, whose measurement this is a small version of."""
    if "dry_run_memory" not in sys.modules:
        spec = importlib.util.spec_from_file_location("dry_run_memory", BENCHMARK)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["dry_run_memory"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["dry_run_memory"])
    return sys.modules["dry_run_memory"]


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2's architecture, smaller: a few MiB of weights."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    NumberPath(size=12).tokenizer().save_pretrained(folder)
    return str(folder)


def module_of(policy: str, kind: type = DAPOModule, checkpointing: bool = False, **settings: Any) -> Any:
    settings = {"regularizer": InformationBottleneck(), "micro_batch_tokens": 1024, **settings}
    return kind(policy, policy_options=PolicyOptions(gradient_checkpointing=checkpointing), **settings)


def shapes_of(module: Any, ranks: int = 1) -> Shapes:
    asked = Prompt("1", "1>2:", (3, 4), "2", {}, "1>2:", "1>2:")
    return Shapes.of_rollouts(
        module, ranks, prompts_per_rollout=8, group_size=4, prompt=32, response=96, prompts=[asked]
    )


def test_a_shared_prompt_counts_once_in_a_micro_batch(small_llama: str) -> None:
    """Groups of 32 + 4 · 96 tokens: 2 of them make 832; without sharing, 8 rows make 1024. Flex attention cannot."""
    shared, whole = (
        shapes_of(DAPOModule(small_llama, micro_batch_tokens=1024, policy_options=PolicyOptions(share_prompts=shared)))
        for shared in (True, False)
    )
    assert (shared.micro_rows, shared.micro_batches, shared.half_a_micro_batch) == (8, 4, 416)
    assert (whole.micro_rows, whole.micro_batches, whole.half_a_micro_batch) == (8, 4, 512)
    assert len(set(shared.sequences().same_prompts())) == 2
    assert len(set(whole.sequences().same_prompts())) == 8
    options = PolicyOptions(attn_implementation="flex_attention")
    assert not shapes_of(DAPOModule(small_llama, policy_options=options)).micro_groups


# The estimate against what torch's allocator has handed out.


@pytest.mark.parametrize(
    ("algorithm", "checkpointing", "micro_batch_tokens"),
    slow_unless(
        lambda case: case[0] == "ppo" or case[1],
        [("dapo", False, 1024), ("dapo", True, 1024), ("dapo", False, 256), ("ppo", False, 1024)],
    ),
)
def test_the_estimate_is_the_measured_peak_of_a_training_step(
    small_llama: str, algorithm: str, checkpointing: bool, micro_batch_tokens: int
) -> None:
    measuring = benchmark()
    case = measuring.Case(algorithm, checkpointing=checkpointing, micro_batch_tokens=micro_batch_tokens)
    measured = measuring.measure_allocator(case, small_llama)
    assert measured > 20 * 2**20, "too small to say anything"
    assert measuring.estimate(case, small_llama)["estimate"] == pytest.approx(measured, rel=0.15)


def _measure_rank(policy: str) -> None:
    measuring = benchmark()
    measured = measuring.measure_allocator(measuring.Case(strategy="fsdp2", ranks=2), policy)
    Path(f"{torch.distributed.get_rank()}.json").write_text(json.dumps(measured))


def test_the_estimate_is_the_measured_peak_of_two_fsdp2_ranks(small_llama: str, tmp_path: Path) -> None:
    measuring = benchmark()
    case = measuring.Case(strategy="fsdp2", ranks=2)
    found = measuring.estimate(case, small_llama)
    assert run_ranks(2, _measure_rank, small_llama, folder=tmp_path) == [0, 0], logs(tmp_path)
    for rank in range(2):
        measured = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["estimate"] == pytest.approx(measured, rel=0.15)
    assert found["static"] <= 0.6 * measuring.estimate(measuring.Case(), small_llama)["static"]


# What it is made of.


def test_a_shadow_counts_storages_as_long_as_they_live() -> None:
    with ShadowMemory() as memory:
        first = torch.empty(1 << 20)
        view = first.view(2, -1)
        assert memory.now == 4 << 20
        second = first * 2
        assert memory.now == 8 << 20
        del first
        assert memory.now == 8 << 20, "the view holds it"
        del view, second
        assert (memory.now, memory.peak) == (0, 8 << 20)
        third = torch.empty(1 << 20)
        third.untyped_storage().resize_(0)
        assert memory.now == 0
        third.untyped_storage().resize_(4 << 20)
        assert memory.now == 4 << 20


def test_in_a_shadow_small_tensors_have_values_and_large_ones_take_no_memory() -> None:
    with ShadowMemory() as memory:
        mask = torch.tensor([True, False, True])
        huge = torch.empty(3, 1 << 40)
        assert huge[mask].shape == (2, 1 << 40)
        assert int(mask.sum()) == 2
        assert float(huge[0, 0]) == 0.0
        assert memory.peak > 12 << 40


@pytest.fixture(scope="module")
def plain_estimate(small_llama: str) -> MemoryEstimate:
    plain = module_of(small_llama)
    return estimate_memory(plain, shapes_of(plain), ONE)


@pytest.mark.parametrize(
    "settings",
    [
        {"regularizer": IBRO()},
        {"regularizer": IBRO(form="two-term")},
        {"regularizer": ClipCov()},
        {"regularizer": KLCov(), "kl": ReferenceKL()},
        {"surrogate": "gspo", "aggregation": "seq-mean-token-mean"},
        {"regularizer": InformationBottleneck(noise=0.5)},
        {"regularizer": MarginalEntropy(base=InformationBottleneck())},
        pytest.param({"regularizer": MarginalEntropy(base=IBRO(form="two-term"))}, marks=pytest.mark.slow),
    ],
    ids=["ibro", "two-term", "clip-cov", "kl", "gspo", "noise", "marginal", "marginal two-term"],
)
def test_every_loss_runs_in_a_shadow(
    small_llama: str, plain_estimate: MemoryEstimate, settings: dict[str, Any]
) -> None:
    module = module_of(small_llama, **settings)
    found = estimate_memory(module, shapes_of(module), Layout())
    assert found.notes == ()
    reference = found.networks[-1].weights if module.kl is not None else 0
    extra = found.update - reference - plain_estimate.update
    two_terms = any(isinstance(method, IBRO) and method.form == "two-term" for method in module.regularizer.combined)
    assert (extra > 5 * 2**20) == two_terms, "only two-term keeps the activations of a second forward pass"


def test_a_loss_that_looks_into_values_is_left_out_and_that_is_said(small_llama: str) -> None:
    class Peeking(InformationBottleneck):
        def objective(self, stats: Any) -> Any:
            return stats.entropy[stats.entropy > 1].sum() * stats.mask

    module = module_of(small_llama, regularizer=Peeking())
    assert "the loss was left out" in estimate_memory(module, shapes_of(module), Layout()).notes[0]


def test_the_optimizer_is_asked_what_it_keeps(small_llama: str) -> None:
    def states(optimizer: Any) -> float:
        module = module_of(small_llama, optimizer=optimizer)
        network = estimate_memory(module, shapes_of(module), Layout()).networks[0]
        return network.states / network.weights

    assert states(torch.optim.AdamW) == pytest.approx(2, rel=1e-3)
    assert states(torch.optim.SGD) == 0
    assert states(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)) == pytest.approx(1, rel=1e-3)
    with pytest.raises(ConfigError, match=r"^optimizer: "):
        states(lambda p: torch.optim.AdamW(p, lr=-1.0))


def test_what_settings_do_to_the_estimate(small_llama: str, plain_estimate: MemoryEstimate) -> None:
    def estimate(layout: Layout = ONE, **settings: Any) -> MemoryEstimate:
        module = module_of(small_llama, **settings)
        return estimate_memory(module, shapes_of(module, layout.data_parallel), layout)

    plain = plain_estimate
    assert estimate(checkpointing=True).update < plain.update
    assert estimate(micro_batch_tokens=256).update < plain.update
    assert estimate(Layout(world=2, kind="ddp")).networks[0].buckets == plain.networks[0].gradients
    assert estimate(Layout(precision="bf16-mixed")).networks[0].micro_batch < plain.networks[0].micro_batch
    eighth = estimate(Layout(world=8, kind="fsdp2")).networks[0]
    assert eighth.weights + eighth.states < 0.13 * (plain.networks[0].weights + plain.networks[0].states)
    offloaded = estimate(Layout(world=8, kind="fsdp2", cpu_offload=True))
    assert offloaded.host == eighth.weights + eighth.states + eighth.gradients
    assert offloaded.update == eighth.micro_batch + offloaded.rollout
    both = estimate(Layout(world=4, kind="fsdp2", tensor_parallel=2)).networks[0]
    assert both.weights < 0.6 * plain.networks[0].weights
    assert both.micro_batch < estimate(Layout(world=2, kind="fsdp2")).networks[0].micro_batch


def test_the_estimate_leaves_the_random_generators_and_the_process_alone(small_llama: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    module = module_of(small_llama)
    estimate_memory(module, shapes_of(module), Layout(world=4, kind="fsdp2"))
    assert torch.equal(torch.rand(3), expected)
    assert not torch.distributed.is_initialized()


def test_a_sharded_network_without_values_is_not_tried_for_random_numbers(
    small_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that is imported on the way may draw from Python's generator, as a module of the network might."""
    monkeypatch.setattr(randomness, "_watch_states", lambda: lambda: True)
    for layout in (ONE, Layout(world=2, kind="fsdp2")):
        module = module_of(small_llama)
        assert estimate_memory(module, shapes_of(module), layout).notes == ()


def test_the_engines_cache(small_llama: str) -> None:
    config = LlamaConfig.from_pretrained(small_llama)
    sampling = SamplingParams(max_tokens=96)
    where = {"prompt": 32, "group_size": 4, "responses": 32}
    found = engine_memory(HFEngine(max_batch_size=16), config, 1000, sampling, Layout(), **where)
    assert found.cache == 16 * (32 + 96) * 2 * (2 * 2 * 32) * 4  # rows, tokens, layers, keys and values, bytes
    assert (found.weights, found.stays) == (4000, True)
    assert found.work > 16 * 4096 * 8, "cumulative sums in float64"
    gpu = Layout(device="cuda", memory=80 * GIB)
    vllm = engine_memory(VLLMEngine(gpu_memory_utilization=0.5), config, 1000, sampling, gpu, **where)
    assert vllm.total == 40 * GIB
    assert not vllm.stays
    assert engine_memory(VLLMEngine(kv_cache_gib=2), config, 1000, sampling, gpu, **where).cache == 2 * GIB
    assert "not known" in engine_memory(VLLMEngine(), config, 1000, sampling, Layout(device="cuda"), **where).note
    server = engine_memory(VLLMServerEngine("http://localhost:8000"), config, 1000, sampling, gpu, **where)
    assert (server.total, server.unknown) == (0, None)


def test_an_engine_that_generates_during_the_update_needs_its_memory_then_too(small_llama: str) -> None:
    config, sampling = LlamaConfig.from_pretrained(small_llama), SamplingParams(max_tokens=30)
    where = {"prompt": 10, "group_size": 4, "responses": 64}
    for layout in (Layout(), Layout(device="cuda")):
        plain = engine_memory(HFEngine(), config, 1000, sampling, layout, **where)
        apart = engine_memory(EngineProcess(HFEngine()), config, 1000, sampling, layout, **where)
        assert apart == plain, "as much as in this process"
        network = NetworkMemory("policy", 1000, 1000, 4000, 8000, 4000, 100, 100, 0)
        turns, beside = (
            MemoryEstimate((network,), engine.in_another_process(4000, overlaps=overlaps), 50, layout)
            for engine, overlaps in ((plain, False), (apart, True))
        )
        gpu = layout.device == "cuda"
        assert beside.generate == turns.generate
        assert beside.update - turns.update == plain.cache + plain.work + (plain.weights if gpu else 0)
        assert turns.host == (4000 + plain.weights if gpu else 0)
        assert beside.host == (4000 if gpu else 0)
        on_their_way = {row.name: row.generate for row in beside.rows}.get("engine: weights on their way", 0)
        assert on_their_way == (0 if gpu else 4000)


def test_vllm_keeps_nothing_in_host_memory_while_it_sleeps(small_llama: str) -> None:
    """Its sleep of level 2 discards the weights; the embedded engine moves them."""
    config, gpu = LlamaConfig.from_pretrained(small_llama), Layout(device="cuda", memory=80 * GIB)
    where = {"prompt": 32, "group_size": 4, "responses": 32}
    network = NetworkMemory("policy", 1000, 1000, 4000)
    for engine, kept in ((VLLMEngine(), 0), (HFEngine(dtype="bfloat16"), 2000)):
        found = engine_memory(engine, config, 1000, SamplingParams(max_tokens=96), gpu, **where)
        assert MemoryEstimate((network,), found, 0, gpu).host == kept


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"gpu_memory_utilization": 0.5},
            "gpu_memory_utilization: 0.5 leaves 0.0 GiB .* beside 50.0 GiB .* 0.63 or more",
        ),
        (
            {"gpu_memory_utilization": 0.625, "max_model_len": 2**17},
            "leaves 0.0 GiB .* takes 0.1 GiB: write 0.63 or more",
        ),
        ({"gpu_memory_utilization": 0.5, "max_model_len": 2**27}, "takes 64.0 GiB: take VLLMServerEngine"),
        (
            {"kv_cache_gib": 0.5, "max_model_len": 2**22},
            r"kv_cache_gib: 0.5 leaves 0.5 GiB .* takes 2.0 GiB: write 2 or more",
        ),
    ],
)
def test_a_vllm_that_would_not_start_does_not_fit(small_llama: str, settings: dict[str, Any], said: str) -> None:
    """Its cache must hold one response of the greatest length: 2 · 2 · 2 · 32 bfloat16 numbers a token."""
    config, gpu = LlamaConfig.from_pretrained(small_llama), Layout(device="cuda", memory=80 * GIB)
    where = {"prompt": 32, "group_size": 4, "responses": 32}
    found = engine_memory(VLLMEngine(**settings), config, 25 * GIB, SamplingParams(max_tokens=96), gpu, **where)
    module = module_of(small_llama)
    line = verdict(MemoryEstimate((NetworkMemory("policy", 1, 1, 4),), found, 0, gpu), shapes_of(module), module)
    assert line.startswith("does not fit: vLLM would not start, as data.engine.")
    assert re.search(said, line), line


def test_tensor_parallelism_of_vllm_is_refused_on_the_gpus_of_several_ranks(small_llama: str) -> None:
    config, sampling = LlamaConfig.from_pretrained(small_llama), SamplingParams(max_tokens=96)
    where = {"prompt": 32, "group_size": 4, "responses": 32}
    engine = VLLMEngine(tensor_parallel_size=2)
    for apart in (engine, EngineProcess(engine)):
        with pytest.raises(ConfigError, match=r"tensor_parallel_size: 2 - each of the 8 processes .* VLLMServerEngine"):
            engine_memory(apart, config, 1000, sampling, Layout("cuda", world=8, memory=80 * GIB), **where)
    alone = engine_memory(engine, config, 1000, sampling, Layout("cuda", memory=80 * GIB), **where)
    assert alone.weights == 1000
    assert engine_memory(engine, config, 1000, sampling, Layout("cpu", world=2, memory=GIB), **where).weights == 1000


def test_a_note_is_shown_where_there_are_no_figures(small_llama: str) -> None:
    config, gpu = LlamaConfig.from_pretrained(small_llama), Layout(device="cuda")
    where = {"prompt": 32, "group_size": 4, "responses": 32}
    network = NetworkMemory("policy", 1000, 1000, 4000)
    for engine, note in ((VLLMServerEngine("http://localhost:8000"), "on the server"), (VLLMEngine(), "is not known")):
        found = engine_memory(engine, config, 1000, SamplingParams(max_tokens=96), gpu, **where)
        assert any(note in row.note for row in MemoryEstimate((network,), found, 0, gpu).rows)


def test_an_engine_in_bfloat16_is_not_advised_to_be_in_bfloat16(small_llama: str) -> None:
    config, gpu = LlamaConfig.from_pretrained(small_llama), Layout(device="cuda", memory=4 * GIB)
    where, module = {"prompt": 32, "group_size": 4, "responses": 32}, module_of(small_llama)
    for dtype, advised in (("bfloat16", "VLLMServerEngine, on devices"), ("float32", "data.engine.dtype: bfloat16")):
        engine = HFEngine(dtype=dtype, max_batch_size=1)
        found = engine_memory(engine, config, 4 * GIB, SamplingParams(max_tokens=96), gpu, **where)
        line = verdict(MemoryEstimate((NetworkMemory("policy", 1, 1, 4),), found, 0, gpu), shapes_of(module), module)
        assert line.startswith("does not fit")
        assert advised in line
        assert line.count("bfloat16") == (dtype == "float32")


def test_the_verdict_says_what_to_change(small_llama: str) -> None:
    module = module_of(small_llama)
    network = NetworkMemory("policy", 10, 10, weights=4 * GIB, states=8 * GIB, gradients=4 * GIB, micro_batch=60 * GIB)

    def said(gib: int, **changes: Any) -> str:
        layout = Layout(memory=gib * GIB, **changes)
        return verdict(MemoryEstimate((network,), None, 0, layout), shapes_of(module), module)

    assert said(100).startswith("fits: 76.0 of 100.0 GiB")
    assert said(80).startswith("tight")
    refused = said(40)
    assert refused.startswith("does not fit")
    # A prompt of 32 tokens, once for four responses of 96.
    for setting in ("gradient_checkpointing: true", "model.micro_batch_tokens: 416", "fsdp2", "lora"):
        assert setting in refused
    assert "cpu_offload" in said(40, kind="fsdp2", world=2)


# Arithmetic and time.


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tmp_path: Path, tied: bool, shared: bool) -> None:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    NumberPath(size=12).tokenizer().save_pretrained(tmp_path)
    options = PolicyOptions(fused_head=False, attn_implementation="eager", share_prompts=shared)
    module = DAPOModule(str(tmp_path), policy_options=options)
    found = work_of(module, estimate_memory(module, shapes_of(module), Layout()), Tokens(1, 4, 32, 96), True)
    module = DAPOModule(str(tmp_path), policy_options=options)
    module.configure_model()
    assert module.policy.shares_prompts is shared
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.policy(Sequences.collate([[1] * 32] * 4, [[1] * 96] * 4), temperature=1.0)
    # torch counts all pairs of attention, half of which are masked, and the head of padded rows at one more position.
    attention = 4 * 2 * (4 * 16) * 4 * (128 - shared) ** 2
    head = 0 if shared else 2 * 512 * 64 * 4
    assert found.score == pytest.approx(counter.get_total_flops() - attention / 2 - head, rel=0.01)
    assert found.update == pytest.approx(3 * found.score + 2 * 512 * 64 * 4 * 96, rel=1e-9)  # the head once more


def test_time_is_that_of_an_earlier_run_and_otherwise_there_is_none(tmp_path: Path) -> None:
    assert measured_speeds(tmp_path) == {}
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(20):
            writer.add_scalar("tokens_per_second/generate", 100.0 if step >= 10 else 1.0, step)
            writer.add_scalar("tokens_per_second/update", 50.0, step)
    speeds = measured_speeds(tmp_path)
    assert speeds == {"tokens_per_second/generate": 100.0, "tokens_per_second/update": 50.0}
    assert seconds_at(speeds, Tokens(2, 8, 10, 50)) == {"generate": 4.0, "update": 9.6}


def test_nothing_of_a_network_is_allocated(small_llama: str) -> None:
    """The module's networks stay without values, so that 7B do not fill a laptop."""
    module = module_of(small_llama)
    estimate_memory(module, shapes_of(module), Layout())
    policy: nn.Module = module.policy
    assert all(isinstance(parameter, FakeTensor) for parameter in policy.parameters())
