"""An engine in a process of its own does what it would do in this one, and the process never outlives its use."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from helpers.engines import Told
from helpers.forked import engine_processes, fork_engines
from helpers.models import qwen2
from helpers.processes import HANGS_S, start_ranks
from ibro_lightning.engines import EngineProcess, HFEngine, VLLMEngine, shared_weights
from ibro_lightning.engines.process import environment
from ibro_lightning.errors import ConfigError, RolloutError
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import SamplingParams

SAMPLING = SamplingParams(max_tokens=9)
PROMPTS, SEEDS = [[1, 2, 3], [4, 5]], [[7, 8, 9], [10, 11, 12]]


def spec() -> ModelSpec:
    return ModelSpec(qwen2().config, (0,), torch.device("cpu"))


def weights(seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    yield from qwen2(seed).state_dict().items()


def until(happens: Callable[[], object]) -> None:
    """Waits for an event; many times as long as it takes on a busy machine."""
    end = time.monotonic() + HANGS_S
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="class")
def apart() -> Iterator[EngineProcess]:
    engine = EngineProcess(HFEngine(max_batch_size=4))
    engine.setup(spec())
    yield engine
    engine.close()
    assert not engine_processes()


class TestAtWork:
    def test_its_samples_are_those_of_an_engine_in_this_process_bit_for_bit(self, apart: EngineProcess) -> None:
        here = HFEngine(max_batch_size=4)
        here.setup(spec())
        assert apart.max_model_len == here.max_model_len == 64
        for seed in (0, 1):
            for engine in (here, apart):
                engine.load_weights(weights(seed))
            assert apart.generate(PROMPTS, SAMPLING, SEEDS) == here.generate(PROMPTS, SAMPLING, SEEDS)

    def test_a_second_setup_starts_no_second_process(self, apart: EngineProcess) -> None:
        (before,) = engine_processes()
        apart.setup(spec())
        assert engine_processes() == [before]

    def test_a_part_of_the_weights_arrives_alone(self, apart: EngineProcess) -> None:
        apart.load_weights(weights(1))
        expected = apart.generate(PROMPTS, SAMPLING, SEEDS)
        apart.load_weights(weights(0))
        assert apart.generate(PROMPTS, SAMPLING, SEEDS) != expected
        names = [name for name, _ in weights() if "layers.1" in name]
        for part in (True, False):  # one layer, then all others
            changed = [(name, tensor) for name, tensor in weights(1) if (name in names) == part]
            apart.load_weights(changed, partial=True)
        assert apart.generate(PROMPTS, SAMPLING, SEEDS) == expected

    def test_errors_are_those_of_the_engine_and_it_goes_on(self, apart: EngineProcess) -> None:
        with pytest.raises(RolloutError, match=r"HFEngine got no new values for"):
            apart.load_weights(list(weights())[:2])
        with pytest.raises(RolloutError, match="no weight 'other'"):
            apart.load_weights([("other", torch.zeros(1))], partial=True)
        with pytest.raises(ConfigError) as refused:
            apart.generate(PROMPTS, SamplingParams(max_tokens=99), SEEDS)
        assert (refused.value.field, refused.value.value) == ("sampling.max_tokens", 99)
        apart.load_weights(weights())
        assert apart.generate(PROMPTS, SAMPLING, SEEDS)

    def test_signals_are_for_the_trainer(self, apart: EngineProcess) -> None:
        """A terminal and a scheduler send them to all processes; the rollout in flight is wanted for the checkpoint."""
        (server,) = engine_processes()
        assert os.getsid(server.pid) != os.getsid(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            server.send_signal(number)
        apart.load_weights(weights())
        assert apart.generate(PROMPTS, SAMPLING, SEEDS)
        assert engine_processes() == [server]


class TestItsEnd:
    @pytest.fixture
    def told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineProcess]:
        fork_engines(monkeypatch)  # how it ends does not depend on how it began
        engine = EngineProcess(Told(str(tmp_path)), num_threads=2)
        engine.setup(spec())
        yield engine
        engine.close()
        assert not engine_processes()

    def test_errors_have_the_traceback_of_its_process_and_a_death_its_cause(self, told: EngineProcess) -> None:
        ((generation,),) = told.generate([[Told.WORKS]], SAMPLING, [[0]])
        threads, pid = generation.token_ids
        assert threads == 2
        assert pid == engine_processes()[0].pid != os.getpid()
        with pytest.raises(ValueError, match="as told") as error:
            told.generate([[Told.RAISES]], SAMPLING, [[0]])
        assert 'raise ValueError("as told")' in error.value.__notes__[0]
        with pytest.raises(RuntimeError, match="Odd: number 3") as error:
            told.generate([[Told.RAISES_ODD]], SAMPLING, [[0]])
        assert "raise Odd(3)" in error.value.__notes__[0]
        with pytest.raises(RolloutError, match=r"the process of Told ended with exit code 7 \(during: generate\)"):
            told.generate([[Told.DIES]], SAMPLING, [[0]])
        with pytest.raises(RolloutError, match="does not run"):
            told.generate([[Told.WORKS]], SAMPLING, [[0]])
        told.load_weights(weights())  # starts it anew
        assert told.generate([[Told.WORKS]], SAMPLING, [[0]])[0][0].token_ids[1] != pid

    def test_a_call_in_progress_learns_at_once_that_it_was_killed_or_closed(
        self, told: EngineProcess, tmp_path: Path
    ) -> None:
        for end in (lambda: engine_processes()[0].kill(), told.close):
            told.load_weights(weights())
            found: list[BaseException] = []

            def hang(found: list[BaseException] = found) -> None:
                try:
                    told.generate([[Told.HANGS]], SAMPLING, [[0]])
                except RolloutError as error:
                    found.append(error)

            thread = threading.Thread(target=hang)
            thread.start()
            until((tmp_path / "hangs").exists)
            end()
            thread.join(HANGS_S)
            assert "signal SIGKILL" in str(found[0])
            assert not engine_processes()
            (tmp_path / "hangs").unlink()

    def test_an_interrupted_call_leaves_no_answer_for_the_next(
        self, told: EngineProcess, tmp_path: Path, ctrl_c_interrupts: None
    ) -> None:
        def interrupt() -> None:
            until((tmp_path / "hangs").exists)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            told.generate([[Told.HANGS]], SAMPLING, [[0]])
        assert not engine_processes()
        told.load_weights(weights())
        assert told.generate([[Told.WORKS]], SAMPLING, [[0]])

    def test_closing_lets_the_engine_release_what_it_holds(self, told: EngineProcess, tmp_path: Path) -> None:
        assert not (tmp_path / "closed").exists()
        told.close()
        assert (tmp_path / "closed").exists()
        assert not engine_processes()
        told.setup(spec())
        assert engine_processes()

    @pytest.mark.parametrize("busy", [False, True])
    def test_it_ends_with_the_trainer_that_is_killed(self, busy: bool, tmp_path: Path) -> None:
        (trainer,) = start_ranks(1, serve_until_killed, str(tmp_path), busy, folder=tmp_path)
        until(lambda: (tmp_path / ("hangs" if busy else "ready")).exists())
        (server,) = engine_processes(trainer.pid)
        trainer.kill()
        trainer.join()
        until(lambda: not runs(server.pid))


def serve_until_killed(folder: str, busy: bool) -> None:
    if not busy:  # one of the two is a fresh process
        fork_engines()
    engine = EngineProcess(Told(folder))
    engine.setup(spec())
    Path(folder, "ready").touch()
    if busy:
        engine.generate([[Told.HANGS]], SAMPLING, [[0]])
    threading.Event().wait()


class TestSettings:
    def test_a_wrong_number_of_threads_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"^num_threads: 0 - write 1 or more"):
            EngineProcess(HFEngine(), num_threads=0)

    def test_an_engine_that_cannot_travel_is_named(self) -> None:
        engine = HFEngine()
        engine.lock = threading.Lock()  # type: ignore[attr-defined]
        with pytest.raises(
            ConfigError, match=r"^engine: 'HFEngine' - cannot be sent to a process of its own .*'_thread"
        ):
            EngineProcess(engine).setup(spec())

    def test_what_the_engine_refuses_is_refused_before_its_process_starts(self) -> None:
        EngineProcess(HFEngine()).check_sampling(SamplingParams(temperature=3.0), setting="sampling")
        with pytest.raises(ConfigError, match=r"^sampling\.temperature: 3\.0 - vLLM refuses"):
            EngineProcess(VLLMEngine()).check_sampling(SamplingParams(temperature=3.0), setting="sampling")

    def test_it_has_the_dtype_and_the_limit_of_the_engine(self) -> None:
        engine = EngineProcess(VLLMEngine(dtype="float16", max_model_len=77))
        assert (engine.dtype, engine.max_model_len) == ("float16", 77)

    def test_its_process_is_no_rank_and_sees_its_ranks_gpu_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("MASTER_PORT", "1234")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
        gpu = torch.device("cuda", 1)
        alone = environment(3, gpu)
        assert not {"RANK", "MASTER_PORT"} & alone.keys()
        assert (alone["CUDA_VISIBLE_DEVICES"], alone["OMP_NUM_THREADS"]) == ("4,6", "3")
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert environment(1, gpu)["CUDA_VISIBLE_DEVICES"] == "6"
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert environment(1, gpu)["CUDA_VISIBLE_DEVICES"] == "1"
        assert "CUDA_VISIBLE_DEVICES" not in environment(1, torch.device("cpu"))


TENSORS = {
    "matrix": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "half": torch.randn(7, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "small": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
    "one": torch.tensor(3, dtype=torch.int64),
    "none": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
}


class TestWeightFile:
    def test_what_is_read_is_what_was_written(self) -> None:
        with shared_weights.nameless_file() as file:
            for chosen in (list(TENSORS), ["half", "one"], []):  # shorter ones leave nothing of longer ones
                table = shared_weights.write(file, ((name, TENSORS[name]) for name in chosen))
                found = dict(shared_weights.read(file, table))
                assert list(found) == chosen
                for name, tensor in found.items():
                    expected = TENSORS[name]
                    assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
                    assert torch.equal(tensor.float(), expected.float())

    def test_what_was_read_stays_when_the_memory_is_freed(self) -> None:
        with shared_weights.nameless_file() as file:
            found = dict(shared_weights.read(file, shared_weights.write(file, TENSORS.items())))
            shared_weights.clear(file)
            assert os.fstat(file.fileno()).st_size == 0
            assert torch.equal(found["matrix"], TENSORS["matrix"])

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it is a temporary file")
    def test_it_has_no_name_that_could_be_left_behind(self) -> None:
        with shared_weights.nameless_file() as file:
            assert "memfd" in os.readlink(f"/proc/self/fd/{file.fileno()}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "engine: None - write an engine, such as HFEngine()"),
        (("x",), "engine: 'x' - write an engine"),
        ((HFEngine,), "engine: .*HFEngine.* - write an engine"),
        ((EngineProcess(HFEngine()),), "engine: 'EngineProcess' - it is a process already"),
        ((HFEngine(), 0), "num_threads: 0 - write 1 or more"),
        ((HFEngine(), 1.5), "num_threads: 1.5 - write a whole number"),
    ],
)
def test_what_is_no_engine_of_its_own_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineProcess(*arguments)
