"""``max_staleness: 1``: while the policy learns from a rollout, the next one is made from the weights before that."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.collecting import IsOne, Paths, ScriptedEngine, build, through_a_file, trainer_of
from helpers.forked import engine_processes, fork_engines
from helpers.models import TinyQwen2
from helpers.run_comparison import differences, unequal
from helpers.runs import curve, refusal
from ibro_lightning import timing
from ibro_lightning.callbacks.metrics_log import throughput
from ibro_lightning.cli.main import main
from ibro_lightning.datamodules import DynamicSampling, EvalSet, RolloutDataModule
from ibro_lightning.datamodules.in_flight import restored
from ibro_lightning.datamodules.producer import owners_of
from ibro_lightning.engines import EngineProcess, HFEngine
from ibro_lightning.errors import ConfigError, RolloutError
from ibro_lightning.guards import interruption
from ibro_lightning.modules import DAPOModule, PolicyProviderMixin, PPOModule, SFTModule
from ibro_lightning.ranks import Ranks
from ibro_lightning.rewards import VerifiableReward
from ibro_lightning.timing import PhaseTimer
from overlap import shown

torch.set_num_threads(1)


def overlapped(tokenizer: Any, rights: Sequence[int] | None = None, **settings: Any) -> RolloutDataModule:
    """A datamodule of three prompts by four responses, whose engine is scripted, and so in this process."""
    trainer = settings.pop("trainer", None) or trainer_of(tokenizer)
    data = build(tokenizer, rights, attach=False, max_staleness=1, **settings)
    data.collector.engine = data.engine.engine
    data.trainer = trainer
    data.setup("fit")
    return data


def versions(data: RolloutDataModule, count: int) -> list[Any]:
    """``count`` rollouts, after each of which the policy learns: its version is the number of updates."""
    rollouts = []
    for update in range(1, count + 1):
        rollouts.append(data.next_rollout())
        data.provider.version = float(update)
    data._settle()
    return rollouts


class TestRollouts:
    def test_each_is_made_from_the_weights_before_the_update_that_it_overlaps(self, tokenizer: Any) -> None:
        data = overlapped(tokenizer)
        rollouts = versions(data, 4)
        assert [rollout.iteration for rollout in rollouts] == [1, 2, 3, 4]
        assert data.engine.weights_at_calls == [0.0, 0.0, 1.0, 2.0, 3.0]  # the fifth is in flight
        assert [rollout.metrics["rollout/staleness"] for rollout in rollouts] == [0.0, 1.0, 1.0, 1.0]

    def test_prompts_and_seeds_are_those_of_a_run_without_overlap(self, tokenizer: Any) -> None:
        """The scripted engine answers the same whatever its weights."""
        straight, data = build(tokenizer), overlapped(tokenizer)
        expected = [straight.next_rollout() for _ in range(4)]
        for rollout, other in zip(versions(data, 4), expected, strict=True):
            assert rollout.completions == other.completions
            assert rollout.prompts == other.prompts
            assert torch.equal(rollout.sampler_logp, other.sampler_logp)
        assert data.engine.calls[:4] == straight.engine.calls

    def test_the_policy_learns_while_the_next_one_is_made(self, tokenizer: Any, monkeypatch: Any) -> None:
        data, begun, go_on = overlapped(tokenizer), threading.Event(), threading.Event()
        generate = data.engine.generate

        def wait(*arguments: Any) -> Any:
            if len(data.engine.calls) == 1:  # the second rollout
                begun.set()
                assert go_on.wait(600)
            return generate(*arguments)

        monkeypatch.setattr(data.engine, "generate", wait)
        assert data.next_rollout().iteration == 1
        assert begun.wait(600)
        assert len(data.engine.calls) == 1, "the first one is here, and the second one is not made yet"
        go_on.set()
        assert data.next_rollout().iteration == 2

    def test_its_engine_stays_on_the_device(self, tokenizer: Any) -> None:
        data = overlapped(tokenizer)
        versions(data, 2)
        assert "offload" not in data.engine.events

    @pytest.mark.parametrize(
        ("trainer", "epochs", "calls"),
        [
            ({"max_epochs": 3}, 3, 3),
            ({"max_epochs": 2, "num_training_batches": 2}, 2, 4),
            ({"max_epochs": -1, "max_steps": 3}, 3, 3),
            ({"max_epochs": -1}, 3, 4),
            ({"max_epochs": None}, 3, 4),
        ],
    )
    def test_none_is_made_that_nobody_trains_on(
        self, tokenizer: Any, trainer: dict[str, Any], epochs: int, calls: int
    ) -> None:
        """One step per rollout here; without a limit the last one in flight is wanted."""
        own = trainer_of(tokenizer, **trainer)
        data = overlapped(tokenizer, trainer=own)
        for epoch in range(epochs):
            own.current_epoch = epoch
            for batch in range(own.num_training_batches):
                own.fit_loop.epoch_loop.batch_progress.current.ready = batch
                data.next_rollout()
                own.global_step += 1
        data._settle()
        assert len(data.engine.calls) == calls

    def test_an_error_is_raised_where_the_rollout_is_asked_for_and_it_begins_again(self, tokenizer: Any) -> None:
        straight, data = build(tokenizer), overlapped(tokenizer)
        generate, calls = data.engine.generate, []

        def fail(*arguments: Any) -> Any:
            calls.append(None)
            if len(calls) == 2:
                raise RolloutError("once")
            return generate(*arguments)

        data.engine.generate = fail
        assert data.next_rollout().iteration == 1
        data._settle()  # raises nothing: an evaluation may go on
        with pytest.raises(RolloutError, match="once"):
            data.next_rollout()
        again = data.next_rollout()
        straight.next_rollout()
        assert again.completions == straight.next_rollout().completions
        assert again.metrics["rollout/staleness"] == 0.0

    def test_dynamic_sampling_counts_skips_as_without_overlap(self, tokenizer: Any) -> None:
        rule = DynamicSampling(max_rounds=1, max_skips=2)
        data = overlapped(tokenizer, [0] * 3 + [1] * 3 + [0] * 100, dynamic_sampling=rule)
        assert [data.next_rollout().skip_update for _ in range(3)] == [True, False, True]
        with pytest.raises(RolloutError, match="none in 2 rollouts in a row"):
            data.next_rollout()

    def test_the_making_of_one_is_no_phase_of_the_main_thread(self, tokenizer: Any, monkeypatch: Any) -> None:
        """The heartbeat names what an iteration waits for."""
        data, seen = overlapped(tokenizer), []
        generate = data.engine.generate

        def look(*arguments: Any) -> Any:
            with PhaseTimer()("inner"):
                seen.append(timing.running())
            return generate(*arguments)

        monkeypatch.setattr(data.engine, "generate", look)
        rollout = data.next_rollout()
        data._settle()
        assert seen[0] is None or seen[0][0] == "wait"
        assert timing.running() is None
        assert rollout.metrics.keys() >= {"time/wait_s", "time/generate_s", "time/sync_s"}


class TestEvaluation:
    def test_waits_for_the_rollout_in_flight_before_it_loads_weights(self, tokenizer: Any, monkeypatch: Any) -> None:
        sets = {"some": EvalSet(Paths(2), IsOne(), samples=2)}
        data = overlapped(tokenizer, eval_sets=sets, allow_overlap=True)
        go_on, generate = threading.Event(), data.engine.generate

        def wait(*arguments: Any) -> Any:
            assert go_on.wait(600) or len(data.engine.calls) != 1
            return generate(*arguments)

        go_on.set()
        data.next_rollout()
        data._settle()
        go_on.clear()
        monkeypatch.setattr(data.engine, "generate", wait)
        data.provider.version = 1.0
        data.next_rollout()  # begins the third, which waits
        data.provider.version = 2.0
        evaluated: list[Any] = []
        evaluation = threading.Thread(target=lambda: evaluated.extend(data.val_dataloader()[0]))
        evaluation.start()
        assert data.engine.weights == [0.0, 0.0, 1.0], "the third is still being made from version 1"
        go_on.set()
        evaluation.join(600)
        assert len(evaluated) == 1
        assert data.engine.weights == [0.0, 0.0, 1.0, 2.0]
        assert data.engine.weights_at_calls == [0.0, 0.0, 1.0, 2.0]
        assert data.next_rollout().metrics["rollout/staleness"] == 1.0
        data._settle()
        assert data.engine.weights_at_calls[-1] == 2.0


class Numpys(VerifiableReward):
    """Its results are not plain numbers, and have an answer."""

    def verify(self, prompt: Any, completion: Any) -> Any:
        import numpy

        return numpy.float64(completion.text == "1")


class TestState:
    @pytest.mark.parametrize("rounds", [1, 2])
    def test_a_resumed_run_trains_on_the_rollout_that_was_in_flight(self, tokenizer: Any, rounds: int) -> None:
        settings = {"dynamic_sampling": DynamicSampling(max_rounds=rounds), "reward": Numpys()}
        script = [1, 0, 2, 3] * 20
        straight = overlapped(tokenizer, script, **settings)
        versions(straight, 2)
        state = through_a_file(straight.state_dict())
        done, answered = len(straight.engine.calls), len(straight.engine.texts)
        expected = versions(straight, 2)

        resumed = overlapped(tokenizer, script[answered:], **settings)
        resumed.provider.version = 2.0
        resumed.load_state_dict(state)
        assert unequal(through_a_file(resumed.state_dict()), state) == [], "saved again before it is asked for"
        for number in (1, 2):
            rollout, other = resumed.next_rollout(), expected[number - 1]
            assert rollout.completions == other.completions
            assert rollout.results == other.results
            assert rollout.dropped == other.dropped
            assert rollout.prompts == other.prompts
            assert torch.equal(rollout.sampler_logp, other.sampler_logp)
            found, wanted = ({k: v for k, v in r.metrics.items() if "time/" not in k} for r in (rollout, other))
            assert found == wanted
            resumed.provider.version = float(number)
        resumed._settle()
        assert resumed.engine.calls == straight.engine.calls[done:]

    def test_without_overlap_the_rollout_in_flight_is_made_anew(self, tokenizer: Any) -> None:
        data = overlapped(tokenizer)
        versions(data, 1)
        plain = build(tokenizer)
        plain.load_state_dict(through_a_file(data.state_dict()))
        assert plain.next_rollout().iteration == 2
        assert plain.engine.calls == data.engine.calls[1:2]
        assert "next" not in plain.state_dict()

    def test_with_other_prompts_too(self, tokenizer: Any) -> None:
        data, other = overlapped(tokenizer), overlapped(tokenizer, source=Paths(4))
        versions(data, 1)
        state = data.state_dict()
        state["next"]["shares"][0]["own"]["prompts"][0] = "gone"
        with pytest.raises(ConfigError, match="allow_changes"):
            other.load_state_dict(state)
        other.allow_other_prompts = True
        other.load_state_dict(state)
        assert other.next_rollout().metrics["rollout/staleness"] == 0.0

    def test_one_that_failed_is_not_part_of_it(self, tokenizer: Any) -> None:
        data = overlapped(tokenizer)
        generate = data.engine.generate
        data.engine.generate = lambda *a: generate(*a) if len(data.engine.calls) < 1 else 1 / 0
        data.next_rollout()
        state = data.state_dict()
        assert "next" not in state
        assert (state["iteration"], state["position"]) == (1, 3)

    def test_other_numbers_of_ranks_share_it_as_they_share_any_other(self, tokenizer: Any) -> None:
        data = overlapped(tokenizer, [1, 0, 2, 0, 3] * 9, prompts_per_rollout=5, dynamic_sampling=DynamicSampling(2))
        versions(data, 1)
        state = through_a_file(data.state_dict())["next"]
        (whole,) = [restored(state, data.prompts, Ranks())]
        assert whole is not None
        shares = [restored(state, data.prompts, Ranks(rank, 2)) for rank in range(2)]
        owners = owners_of(whole.total_groups, whole.after.iteration, 2)
        for rank, share in enumerate(shares):
            assert share is not None
            assert list(share.own) == [number for number, owner in enumerate(owners) if owner == rank]
            assert all(share.own[number] == whole.own[number] for number in share.own)
        assert sorted(map(id, whole.dropped)) != [], "the script leaves some over"
        assert sum(len(share.dropped) for share in shares if share) == len(whole.dropped)


class TestRefused:
    @pytest.mark.parametrize("value", [2, -1, True, 1.0, None, "1"])
    def test_other_values(self, tokenizer: Any, value: Any) -> None:
        with pytest.raises(ConfigError, match=r"^max_staleness: .* write 0, or 1"):
            build(tokenizer, attach=False, max_staleness=value)

    def test_modules_that_take_any_token_for_the_policys_own(self, tokenizer: Any) -> None:
        trainer = trainer_of(tokenizer)
        trainer.lightning_module.learns_off_policy = False
        with pytest.raises(
            ConfigError, match=r"^max_staleness: 1 - Learner would .* model\.sampler_correction, .* or 0"
        ):
            overlapped(tokenizer, trainer=trainer)

    @pytest.mark.parametrize("module", [DAPOModule, PPOModule])
    def test_a_module_learns_off_policy_if_it_corrects(self, module: Any) -> None:
        assert module(TinyQwen2()).learns_off_policy
        assert not module(TinyQwen2(), sampler_correction=None).learns_off_policy
        assert not SFTModule.learns_off_policy
        assert not PolicyProviderMixin.learns_off_policy

    def test_the_command_line_says_so_in_one_line(self, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
        overlap = ["fit", "--config", "tiny.yaml", "--data.max_staleness", "1"]
        line = refusal([*overlap, "--model.sampler_correction", "null"], capsys)
        assert line.startswith("error: data.max_staleness: 1 - DAPOModule would take")
        assert "write model.sampler_correction" in line
        assert refusal([*overlap[:-1], "3"], capsys).startswith("error: data.max_staleness: 3 - write 0, or 1")


class TestEngines:
    def test_any_engine_gets_a_process_and_one_that_has_it_stays(self, tokenizer: Any) -> None:
        engine = ScriptedEngine(tokenizer)
        data = build(tokenizer, attach=False, max_staleness=1, engine=engine)
        assert isinstance(data.engine, EngineProcess)
        assert data.engine.engine is engine
        own = EngineProcess(HFEngine(), num_threads=3)
        assert build(tokenizer, attach=False, max_staleness=1, engine=own).engine is own
        assert build(tokenizer, attach=False, engine=engine).engine is engine


def test_signals_abandon_nothing_in_another_thread() -> None:
    """They reach the main thread, which may be in an update, while a rollout is made in this one."""
    interruption.clear()
    found: list[str] = []

    def work() -> None:
        with interruption.abandonable():
            interruption.request("SIGTERM")  # as the handler would, but in the midst of our work
            found.append("went on")

    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert found == ["went on"]
        assert interruption.requested() == "SIGTERM"
    finally:
        interruption.clear()


def test_the_time_of_an_iteration_counts_what_runs_beside_it_once(tokenizer: Any) -> None:
    rollout = build(tokenizer).next_rollout()
    seconds = {"sync": 1.0, "verify": 1.0, "generate": 5.0, "reward": 1.0, "prepare": 2.0, "update": 4.0}
    metrics = {f"time/{phase}_s": spent for phase, spent in seconds.items()} | {"rollout/generated_tokens": 80.0}
    assert throughput(rollout, metrics)["time/total_s"] == 14.0
    beside = throughput(rollout, metrics | {"time/wait_s": 2.0})
    assert beside["time/total_s"] == 10.0
    assert beside["tokens_per_second/total"] == 8.0
    assert (beside["time_share/generate"], beside["time_share/wait"]) == (0.5, 0.2)


# Whole runs, with an engine in a process of its own.

OVERLAP = ["fit", "--config", "tiny.yaml", "--data.max_staleness", "1", "--trainer.max_epochs", "4"]


@pytest.fixture
def forked_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_engines(monkeypatch)


@pytest.mark.usefixtures("forked_engines")
def test_the_same_command_twice_is_the_same_bit_for_bit(workspace: Path) -> None:
    """It is evaluated while a rollout is in flight. How runs go on is in test_crash.py."""
    for run in ("one", "two"):
        main([*OVERLAP, "--trainer.default_root_dir", run, "--checkpoint.keep_last", "null"])
    assert differences(workspace / "one", workspace / "two") == []
    staleness, apart = curve("rollout/staleness", "one"), curve("sampler/logp_difference_mean", "one")
    assert staleness == {1: 0.0, 2: 1.0, 3: 1.0, 4: 1.0}
    assert apart[1] < 1e-5
    assert min(apart[step] for step in (2, 3, 4)) > 1e-3
    states = [torch.load(path, weights_only=True) for path in sorted((workspace / "one").glob("checkpoints/iter*"))]
    assert ["next" in state["RolloutDataModule"] for state in states] == [True, True, True, False]


@pytest.mark.usefixtures("forked_engines")
def test_an_error_of_a_reward_ends_the_run_in_one_line_and_leaves_no_process(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal([*OVERLAP, "--data.reward", "user_code.NaNLater"], capsys)
    assert "NaNLater" in line
    assert not engine_processes()
    assert not [thread for thread in threading.enumerate() if thread.name == "rollout"]


DIES = """
import os, signal
from ibro_lightning.engines import HFEngine
from ibro_lightning.engines.base import Rows
from ibro_lightning.types import Generation, SamplingParams


class Dies(HFEngine):
    calls = 0

    def generate(self, prompts: Rows, sampling: SamplingParams, seeds: Rows) -> list[list[Generation]]:
        self.calls += sampling.max_tokens == 6 and len(seeds[0]) == 4
        if self.calls == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(prompts, sampling, seeds)
"""


@pytest.mark.usefixtures("forked_engines")
def test_the_death_of_the_engines_process_is_one_line_and_the_run_goes_on_from_its_checkpoint(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "dying.py").write_text(DIES)
    line = refusal([*OVERLAP, "--data.engine", "dying.Dies"], capsys)
    assert line.startswith("error: the process of Dies ended with signal SIGKILL (during: generate)")
    assert line.endswith("--ckpt_path last continues from the last checkpoint, if there is one")
    main([*OVERLAP, "--ckpt_path", "last"])
    assert max(curve("rollout/staleness")) == 4


def test_the_benchmark_shows_a_single_run_of_each_kind() -> None:
    assert shown([1.234]) == "1.23"
    assert shown([1.0, 2.0, 3.0]) == "2.00 [1.00, 3.00]"
