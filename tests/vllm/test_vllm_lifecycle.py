"""Starting, stopping and interrupting vLLM: what it does to the process, what it says when something is wrong, and that
nothing of a call that failed is left for the next."""

from __future__ import annotations

import _thread
import contextlib
import itertools
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from helpers.tiny_vllm import (
    LONG,
    NEVER,
    PROMPTS,
    SIZES,
    difference,
    largest_difference,
    spec_of,
    tiny_model,
    tokens_of,
    vllm_engine,
    weights_of,
)
from ibro_lightning.engines import VLLMEngine
from ibro_lightning.engines import vllm as vllm_module
from ibro_lightning.errors import ConfigError, RolloutError
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import SamplingParams

STAGES = ["imported", "set up", "weights loaded", "generated", "closed"]
LIFE = """
    import json, logging, os, random, signal, sys
    import numpy, torch
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[1])
    from helpers.tiny_vllm import PROMPTS, difference, spec_of, tiny_model, vllm_engine, weights_of
    from ibro_lightning.types import SamplingParams

    model, life = tiny_model("tied"), {}
    original = torch.set_num_threads

    def state():
        digest = lambda value: hash(str(value))
        return {
            "torch generator": digest(torch.get_rng_state().tolist()),
            "numpy generator": digest([part if isinstance(part, (str, int, float)) else part.tolist()
                                       for part in numpy.random.get_state()]),
            "python generator": digest(random.getstate()),
            "threads": torch.get_num_threads(),
            "set_num_threads": torch.set_num_threads is original,
            "default dtype": str(torch.get_default_dtype()),
            "default device": str(torch.get_default_device()),
            "gradients": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matrix products": torch.get_float32_matmul_precision(),
            "cores": sorted(os.sched_getaffinity(0)),
            "folder": os.getcwd(),
            "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
            "root logger": [logging.getLogger().level, len(logging.getLogger().handlers)],
            "process group": torch.distributed.is_initialized(),
            "temporary folders": sorted(f for f in os.listdir(os.environ["TMPDIR"]) if f.startswith("ibro")),
            "environment": dict(os.environ),
            "vllm imported": "vllm" in sys.modules,
        }

    def say(stage):
        life[stage] = state()

    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    engine = vllm_engine()
    say("imported")
    engine.setup(spec_of(model)); say("set up")
    engine.load_weights(weights_of(model)); say("weights loaded")
    params, seeds = SamplingParams(max_tokens=5), [[1, 2]] * len(PROMPTS)
    first = engine.generate(PROMPTS, params, seeds); say("generated")
    engine.close(); engine.close(); say("closed")
    # A trainer that has a process group of its own, as every strategy on several devices has.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    engine.setup(spec_of(model))
    engine.load_weights(weights_of(model))
    life["same samples in a group"] = engine.generate(PROMPTS, params, seeds) == first
    engine.close()
    life["group"] = torch.distributed.is_initialized()
    if life["group"]:
        ones = torch.ones(1)
        torch.distributed.all_reduce(ones)
        life["sum"] = ones.item()
        engine.setup(spec_of(model))
        engine.load_weights(weights_of(model))
        life["same samples in a group again"] = engine.generate(PROMPTS, params, seeds) == first
        engine.close()
        life["group"] = torch.distributed.is_initialized()
    print("LIFE", json.dumps(life))
"""


@pytest.fixture(scope="module")
def life(tmp_path_factory) -> dict[str, Any]:
    """What a process is like at each stage of an engine's life; one of its own, where vLLM was never imported."""
    folder = tmp_path_factory.mktemp("life")
    (folder / "life.py").write_text(textwrap.dedent(LIFE))
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    tests = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, str(folder / "life.py"), tests], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("LIFE ")[1].splitlines()[0])


class TestTheProcess:
    def test_vllm_is_imported_only_by_setup(self, life):
        """``--help`` and runs with the embedded engine must neither need it nor wait for it."""
        assert [life[stage].pop("vllm imported") for stage in STAGES[:2]] == [False, True]

    @pytest.mark.parametrize(
        "what",
        [
            "torch generator",
            "numpy generator",
            "python generator",
            "threads",
            "set_num_threads",
            "default dtype",
            "default device",
            "gradients",
            "deterministic",
            "matrix products",
            "cores",
            "folder",
            "signals",
            "root logger",
            "temporary folders",
        ],
    )
    def test_is_left_as_it_was(self, life, what):
        """Else switching the engine would change the training that follows, or how it ends."""
        assert [life[stage][what] for stage in STAGES] == [life["imported"][what]] * len(STAGES)

    def test_gets_no_new_environment(self, life):
        """A subprocess of the run, e.g. a reward's, must not be started with libraries of vLLM's choice."""
        before = life["imported"]["environment"]
        for stage in STAGES:
            after = life[stage]["environment"]
            inherited = ("LD_", "OMP_", "PYTHON", "PL_", "CUDA", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
            for name in sorted(after.keys() | before.keys()):
                assert not name.startswith(inherited) or after.get(name) == before.get(name), (stage, name)

    def test_has_no_process_group_left(self, life):
        assert not life["closed"]["process group"]

    def test_keeps_the_trainers_process_group(self, life):
        """The trainer goes on after an engine was closed, e.g. to its last checkpoint."""
        assert life["group"], "closing the engine destroyed the trainer's process group"
        assert life["sum"] == 1
        assert life["same samples in a group again"]

    def test_an_engine_can_be_set_up_again_after_closing(self, life):
        assert life["same samples in a group"]


@pytest.fixture(scope="class")
def sound_afterwards(_engines) -> Iterator[None]:
    _engines.stop()
    yield
    assert not torch.distributed.is_initialized(), "an engine that did not start left a process group"
    assert difference(_engines("tied"), tiny_model("tied"), PROMPTS[:2]) < 1e-4


@pytest.mark.usefixtures("sound_afterwards")
class TestStarting:
    """A setting that vLLM refuses is named, and the next engine starts as if nothing had been (the fixture asks)."""

    def refused(self, **settings: Any) -> str:
        with pytest.raises(ConfigError) as error:
            vllm_engine(**settings).setup(spec_of(tiny_model("tied")))
        assert len(str(error.value)) < 1000
        return str(error.value)

    def test_a_cache_too_small_for_one_response(self):
        assert "kv_cache_gib: 0.0001" in self.refused(kv_cache_gib=0.0001)

    def test_longer_than_the_model_can(self):
        assert "max_model_len: 1024" in self.refused(max_model_len=1024)

    def test_an_unknown_argument(self):
        message = self.refused(engine_args={"blok_size": 32})
        assert message == ("engine_args: 'blok_size' - vLLM has no such argument: did you mean block_size?")

    def test_an_argument_of_the_wrong_kind(self):
        assert "enable_prefix_caching" in self.refused(engine_args={"enable_prefix_caching": "perhaps"})

    def test_a_head_size_that_vllms_attention_cannot_do(self):
        config = Qwen2Config(**{**SIZES, "hidden_size": 48}, vocab_size=61, tie_word_embeddings=True)
        with pytest.raises(ConfigError, match=r"head.*24.*use HFEngine"):
            vllm_engine().setup(ModelSpec(config, (1,), torch.device("cpu")))


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("gpu_memory_utilization", 0),
            ("gpu_memory_utilization", 1.5),
            ("kv_cache_gib", -1),
            ("max_model_len", 1),
            ("max_num_seqs", 0),
            ("tensor_parallel_size", 0),
            ("deadline_s", -2.0),
            ("deadline_s", 0),
            ("deadline_s", float("nan")),
        ],
    )
    def test_a_wrong_value_is_refused_before_anything_starts(self, name, value):
        with pytest.raises(ConfigError, match=f"^{name}"):
            vllm_engine(**{name: value})

    @pytest.mark.parametrize(
        "name", ["model", "logprobs_mode", "worker_extension_cls", "kv_cache_memory_bytes", "seed"]
    )
    def test_what_is_set_elsewhere_is_refused_with_the_place(self, name):
        with pytest.raises(ConfigError, match=rf"engine_args: '{name}' - .*write"):
            vllm_engine(engine_args={name: 1})

    def test_engine_args_reach_vllm_over_our_own(self, serve):
        engine = serve("tied", engine_args={"block_size": 64, "enable_prefix_caching": False})
        config = engine._engine.vllm_config
        assert config.cache_config.block_size == 64
        assert not config.cache_config.enable_prefix_caching
        assert difference(engine, tiny_model("tied")) < 1e-4

    def test_our_own_settings_reach_vllm(self, serve):
        config = serve("tied", max_num_seqs=5, max_model_len=100, seed=8)._engine.vllm_config
        assert config.scheduler_config.max_num_seqs == 5
        assert config.model_config.max_model_len == 100
        assert config.model_config.seed == 8
        assert config.model_config.dtype == torch.float32
        assert config.model_config.logprobs_mode == "processed_logprobs"

    def test_prefixes_are_cached_unless_told_otherwise(self, serve):
        """Samples of a group share their prompt: computed once. On CPUs vLLM would leave it out."""
        assert serve("tied")._engine.vllm_config.cache_config.enable_prefix_caching


class TestBeforeAndAfter:
    def test_generating_without_setup(self):
        with pytest.raises(RuntimeError, match="setup"):
            vllm_engine().generate([[1]], SamplingParams(), [[1]])

    def test_setup_twice_does_nothing(self, serve):
        engine = serve("tied")
        before = engine._engine
        engine.setup(spec_of(tiny_model("tied")))
        assert engine._engine is before

    def test_closing_what_was_never_set_up(self):
        vllm_engine().close()

    def test_offloading_on_a_cpu_does_nothing(self, serve):
        engine = serve("tied")
        engine.offload()
        engine.offload()
        assert difference(engine, tiny_model("tied")) < 1e-4
        engine.onload()
        engine.onload()
        assert difference(engine, tiny_model("tied")) < 1e-4


SEEDS = [[100 * prompt + sample for sample in range(3)] for prompt in range(len(PROMPTS))]


class Clock:
    """A second per look, so that a deadline comes after the same number of steps on every machine."""

    def __init__(self) -> None:
        self.monotonic = itertools.count().__next__


class TestDeadline:
    PARAMS = SamplingParams(max_tokens=100)

    @pytest.fixture
    def engine(self, serve, monkeypatch) -> Iterator[VLLMEngine]:
        engine = serve("tied", max_num_seqs=6)
        yield engine
        engine.deadline_s = None

    @pytest.fixture
    def clock(self, monkeypatch) -> None:
        monkeypatch.setattr(vllm_module, "time", SimpleNamespace(monotonic=Clock().monotonic))

    def test_late_responses_are_returned_as_they_are(self, engine, clock):
        """Finished, begun and never begun ones, each a prefix of what it would have become."""
        whole = engine.generate(PROMPTS, self.PARAMS, SEEDS)
        engine.deadline_s = 25
        cut = engine.generate(PROMPTS, self.PARAMS, SEEDS)
        assert [len(samples) for samples in cut] == [3] * len(PROMPTS)
        kinds = set()
        for prompt, samples, expected in zip(PROMPTS, cut, whole, strict=True):
            for sample, full in zip(samples, expected, strict=True):
                assert len(sample.logp) == len(sample.token_ids)
                assert full.token_ids[: len(sample.token_ids)] == sample.token_ids
                if sample.finish_reason == "deadline":
                    assert len(sample.token_ids) < len(full.token_ids)
                    kinds.add("late" if sample.token_ids else "never begun")
                else:
                    assert (sample.token_ids, sample.finish_reason) == (full.token_ids, full.finish_reason)
                    kinds.add(sample.finish_reason)
                if sample.token_ids:
                    assert largest_difference(tiny_model("tied"), [prompt], [[sample]]) < 1e-4
        assert {"late", "never begun", "stop"} <= kinds

    def test_the_engine_works_as_before_afterwards(self, engine, clock):
        """Also the same requests again, whose ids the aborted ones had."""
        expected = tokens_of(engine.generate(PROMPTS, self.PARAMS, SEEDS))
        for _ in range(3):
            engine.deadline_s = 12
            reasons = {s.finish_reason for own in engine.generate(PROMPTS, self.PARAMS, SEEDS) for s in own}
            assert "deadline" in reasons
            assert not engine._engine.has_unfinished_requests()
            engine.deadline_s = None
            assert tokens_of(engine.generate(PROMPTS, self.PARAMS, SEEDS)) == expected
            engine.load_weights(weights_of(tiny_model("tied")))  # refused while requests are running
            assert difference(engine, tiny_model("tied")) < 1e-4

    def test_a_deadline_that_is_met_changes_nothing(self, engine):
        expected = engine.generate(PROMPTS, self.PARAMS, SEEDS)
        engine.deadline_s = 60.0
        found = engine.generate(PROMPTS, self.PARAMS, SEEDS)
        assert tokens_of(found) == tokens_of(expected)
        assert [[s.finish_reason for s in own] for own in found] == [[s.finish_reason for s in own] for own in expected]

    def test_a_deadline_before_any_token_is_an_error(self, engine, clock):
        engine.deadline_s = 0.001
        with pytest.raises(RolloutError, match=r"data\.engine\.deadline_s"):
            engine.generate(PROMPTS, self.PARAMS, SEEDS)
        engine.deadline_s = None
        assert difference(engine, tiny_model("tied")) < 1e-4

    def test_no_samples_are_never_late(self, engine, clock):
        engine.deadline_s = 0.001
        assert engine.generate([[5]], self.PARAMS, [[]]) == [[]]

    def test_in_real_time(self, serve):
        engine = serve("tied", eos=NEVER)
        engine.deadline_s = 0.15
        begin = time.monotonic()
        samples = engine.generate([[7]], SamplingParams(max_tokens=500), [list(range(64))])[0]
        took = time.monotonic() - begin
        engine.deadline_s = None
        assert {s.finish_reason for s in samples} == {"deadline"}
        assert all(0 < len(s.token_ids) < 500 for s in samples)
        assert took < 5


OTHERS = [[9, 8, 7], [20, 21]]


class TestInterruptions:
    """What was left of a call would answer the next one: its request ids are the same."""

    PARAMS = SamplingParams(max_tokens=40)

    def check(self, engine: VLLMEngine, expected: list[Any]) -> None:
        assert not engine._engine.has_unfinished_requests()
        assert tokens_of(engine.generate(OTHERS, self.PARAMS, [[1, 2], [3]])) == expected
        engine.load_weights(weights_of(tiny_model("tied")))  # refused while requests are running
        assert difference(engine, tiny_model("tied")) < 1e-4

    @pytest.fixture
    def engine(self, serve) -> Iterator[VLLMEngine]:
        engine = serve("tied", eos=NEVER)
        yield engine
        if engine._engine.has_unfinished_requests():
            serve.stop()  # the next test gets a sound one

    @pytest.fixture
    def expected(self, engine) -> list[Any]:
        return tokens_of(engine.generate(OTHERS, self.PARAMS, [[1, 2], [3]]))

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
    @pytest.mark.parametrize("after", [0, 1, 5])
    @pytest.mark.parametrize("lost", [False, True], ids=["before a step", "after a step, with its tokens"])
    def test_an_exception_between_steps(self, engine, expected, monkeypatch, error, after, lost):
        steps, real = itertools.count(), engine._engine.step

        def step() -> Any:
            number = next(steps)
            if number == after and not lost:
                raise error
            outputs = real()
            if number == after:
                raise error
            return outputs

        with monkeypatch.context() as patch:
            patch.setattr(engine._engine, "step", step)
            with pytest.raises((error, RolloutError)):
                engine.generate(PROMPTS, self.PARAMS, SEEDS)
        self.check(engine, expected)

    @pytest.mark.parametrize("number", [0, 1, 7])
    def test_ctrl_c_while_requests_are_handed_over(self, engine, expected, monkeypatch, number):
        calls, real = itertools.count(), engine._engine.add_request

        def add_request(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(engine._engine, "add_request", add_request)
            with pytest.raises(KeyboardInterrupt):
                engine.generate(PROMPTS, self.PARAMS, SEEDS)
        self.check(engine, expected)

    @pytest.mark.parametrize("bad", [[], [-1]], ids=["empty", "negative token"])
    def test_a_prompt_that_vllm_refuses_after_it_took_others(self, engine, expected, bad):
        with pytest.raises((ConfigError, RolloutError)):
            engine.generate([[5], LONG, bad, [6]], self.PARAMS, [[1], [2], [3], [4]])
        self.check(engine, expected)

    def test_ctrl_c_in_the_midst_of_a_step(self, engine, expected, monkeypatch):
        """vLLM splits a step in two, and refuses every further one if the second half is missing."""
        executor = engine._engine.engine_core.engine_core.model_executor
        steps, real = itertools.count(), executor.execute_model

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            if next(steps) == 3:
                _thread.interrupt_main()
            return result

        with monkeypatch.context() as patch:
            patch.setattr(executor, "execute_model", execute_model)
            with pytest.raises(KeyboardInterrupt):
                engine.generate(PROMPTS, self.PARAMS, SEEDS)
        assert next(steps) == 4  # the step was finished, and none came after it
        self.check(engine, expected)

    def test_a_real_ctrl_c(self, engine, expected):
        """Wherever in vLLM it happens to arrive."""
        for delay in (0.03, 0.08, 0.13):
            timer = threading.Timer(delay, _thread.interrupt_main)
            timer.start()
            with contextlib.suppress(KeyboardInterrupt):  # Python drops one that arrives in a destructor
                engine.generate([[7]], SamplingParams(max_tokens=500), [list(range(64))])
            timer.join()
        self.check(engine, expected)
