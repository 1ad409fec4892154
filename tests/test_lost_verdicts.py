"""A reward never ends a run without a word, and verdicts that were all lost are told of at once, and not for ever."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import distributed

from helpers.processes import logs, run_ranks
from ibro_lightning.cli.main import main
from ibro_lightning.datamodules.collector import check_reward
from ibro_lightning.datamodules.lost_verdicts import LostVerdicts, check_verdicts
from ibro_lightning.errors import ConfigError, RankError, RewardError
from ibro_lightning.guards.interruption import Interrupted
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.rewards import (
    GoldTrial,
    PoolOptions,
    Reward,
    RewardByPart,
    RewardPool,
    RewardSum,
    VerifiableReward,
    judge_all,
    judge_here,
    score,
)
from ibro_lightning.rewards.base import PlainResponses
from ibro_lightning.rewards.pool import Verdicts, joined
from ibro_lightning.rewards.pool.lost import Loss
from ibro_lightning.types import Completion, Group, Prompt, RewardResult, SamplingParams

PROMPT = Prompt("q1", "text", (1, 2), "ok")
ENDS = [
    SystemExit(0),
    SystemExit(),
    SystemExit("message"),
    KeyboardInterrupt(),
    GeneratorExit(),
    BaseException("custom"),
    StopIteration(),
]
NAMES = ["exit-0", "exit", "exit-text", "keyboard", "generator", "base", "stop"]


def completion(text: str = "ok") -> Completion:
    return Completion((1, 2), (0.0, -1.0), "stop", text, 16, seed=0)


class Ends(VerifiableReward):
    """Raises what it is given, in a place of choice."""

    def __init__(self, error: BaseException, place: str = "verify") -> None:
        super().__init__()
        self.error, self.place = error, place

    def _at(self, place: str) -> None:
        if place == self.place:
            raise self.error

    def setup(self, tokenizer):
        self._at("setup")

    def verify(self, prompt, completion):
        self._at("verify")
        return True

    def combine(self, prompt, results):
        self._at("combine")
        return super().combine(prompt, results)

    def plain_responses(self, prompt):
        self._at("plain")
        return PlainResponses(("ok",))


@pytest.mark.parametrize("error", ENDS, ids=NAMES)
class TestEndsInProcess:
    def test_in_the_call(self, error):
        with pytest.raises(RewardError, match=rf"Ends raised {type(error).__name__}.*prompt 'q1'") as told:
            judge_all(Ends(error), [(PROMPT, [completion()])], judge_here)
        assert told.value.__cause__ is error

    def test_as_part_of_another_reward(self, error):
        for reward in (RewardSum([Ends(error)]), RewardByPart({"": Ends(error)})):
            with pytest.raises(RewardError, match=f"Ends raised {type(error).__name__}"):
                judge_all(reward, [(PROMPT, [completion()])], judge_here)
            with pytest.raises(RewardError, match=f"Ends raised {type(error).__name__}"):
                check_reward(reward, [PROMPT], SamplingParams())

    def test_in_adding_up(self, error):
        with pytest.raises(RewardError, match=f"Ends raised {type(error).__name__}.*adding up"):
            judge_all(Ends(error, "combine"), [(PROMPT, [completion()])], judge_here)

    def test_in_warm_up(self, error):
        with pytest.raises(RewardError, match=rf"Ends raised {type(error).__name__}.*\(setup\)"):
            RewardSum([Ends(error, "setup")]).setup(None)

    @pytest.mark.parametrize("place", ["plain", "verify"])
    def test_in_the_trial_of_a_gold(self, error, place):
        with pytest.raises(RewardError, match=rf"Ends raised .*{type(error).__name__}.*gold of prompt 'q1'"):
            score(GoldTrial(Ends(error, place)), PROMPT, [completion()])


class TestWhoseEndItIs:
    """What is not the reward's stays what it is."""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
    def test_a_signals_handler_is_not_the_reward(self, number):
        def handler(number, frame):
            raise SystemExit(77)

        class Signalled(VerifiableReward):
            def verify(self, prompt, completion):
                os.kill(os.getpid(), number)
                return True

        before = signal.signal(number, handler)
        try:
            with pytest.raises(SystemExit) as end:
                judge_all(Signalled(), [(PROMPT, [completion()])], judge_here)
            assert signal.getsignal(number) is handler
        finally:
            signal.signal(number, before)
        assert end.value.code == 77

    @pytest.mark.parametrize("kind", [Interrupted, MemoryError, RewardError])
    def test_what_means_something_passes(self, kind):
        with pytest.raises(kind, match=r"^said$"):
            score(Ends(kind("said")), PROMPT, [completion()])

    def test_handlers_are_as_before_afterwards(self):
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        judge_all(Ends(ValueError(), "nowhere"), [(PROMPT, [completion()])], judge_here)
        with pytest.raises(RewardError):
            judge_all(Ends(SystemExit()), [(PROMPT, [completion()])], judge_here)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    def test_a_handler_that_the_reward_installs_stays(self):
        class Installs(VerifiableReward):
            def verify(self, prompt, completion):
                signal.signal(signal.SIGINT, mine)
                return True

        def mine(number, frame):
            pass

        before = signal.getsignal(signal.SIGINT)
        try:
            judge_all(Installs(), [(PROMPT, [completion()])], judge_here)
            assert signal.getsignal(signal.SIGINT) is mine
        finally:
            signal.signal(signal.SIGINT, before)


QUITS = """
import sys
from ibro_lightning.rewards import VerifiableReward
from ibro_lightning.sources import PromptSource


class AtOnce(VerifiableReward):
    def __init__(self):
        sys.exit(0)
    def verify(self, prompt, completion):
        return True


class Later(VerifiableReward):
    def verify(self, prompt, completion):
        if completion.token_ids:
            sys.exit(0)
        return False


class Source(PromptSource):
    def problems(self):
        exit()


class Generated(AtOnce):
    def __init__(self):
        raise GeneratorExit("so")
"""


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "--data.reward.class_path=quits.AtOnce",
            r"AtOnce.__init__ \(.*quits.py:9\) raised SystemExit: 0 - code that a recipe names",
        ),
        ("--data.reward.class_path=quits.Later", r"Later raised SystemExit: 0 \(prompt '\d'\)"),
        ("--data.source.class_path=quits.Source", r"Source.problems \(.*quits.py:23\) raised SystemExit"),
        ("--data.reward.class_path=quits.Generated", r"Generated.__init__ \(.*quits.py:28\) raised GeneratorExit: so"),
    ],
    ids=["constructor", "call", "source", "other"],
)
def test_a_run_ends_with_one_line_and_code_2(workspace: Path, capfd, setting, said) -> None:
    (workspace / "quits.py").write_text(QUITS)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "tiny.yaml", setting, "--trainer.num_sanity_val_steps=0", "--data.weight_check=null"])
    assert end.value.code == 2
    assert re.match(f"error: {said}", capfd.readouterr().err.splitlines()[-1])


# The pool.


class Obedient(VerifiableReward):
    """Does what the response says, in a worker."""

    def verify(self, prompt, completion):
        match completion.text.split(":"):
            case ["hang"]:
                time.sleep(1000)
            case ["exit", code]:
                os._exit(int(code))
            case ["kill", number]:
                os.kill(os.getpid(), int(number))
            case ["closed"]:
                os.closerange(3, 1000)
                time.sleep(1000)
            case ["sys.exit"]:
                sys.exit(0)
            case ["own error"]:

                class OwnError(RewardError):
                    def __init__(self, one, two):
                        super().__init__(f"{one} {two}")

                raise OwnError(1, 2)
        return completion.text == "ok"


class Warm(VerifiableReward):
    """Takes long once in every worker, as a reward that imports something slow in its call."""

    warm = False

    def verify(self, prompt, completion):
        if not Warm.warm:
            time.sleep(1000)
        return True


# By value, as from a notebook: the workers must not import this file, and torch with it.
for reward_class in (Obedient, Warm):
    reward_class.__module__ = reward_class.verify.__module__ = "__main__"
REWARD = Obedient()


@pytest.fixture
def pool() -> Iterator[RewardPool]:
    with RewardPool([REWARD], PoolOptions(workers=2, deadline_s=0.5, memory_mib=150)) as pool:
        yield pool


def judged(pool: RewardPool, *texts: str, reward: Reward = REWARD) -> tuple[list[Group], list[Verdicts]]:
    completions = tuple(map(completion, texts))
    results = judge_all(reward, [(PROMPT, completions)], pool)[0]
    return [Group(PROMPT, completions, tuple(results))], pool.take_verdicts()


class TestWhyTheyWereLost:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("exit:0", "worker died on the response: exit code 0"),
            ("exit:3", "worker died on the response: exit code 3"),
            ("kill:9", "worker died on the response: signal SIGKILL"),
            ("kill:11", "worker died on the response: signal SIGSEGV"),
            ("hang", "timed out after 0.5 s"),
        ],
    )
    def test_says_how_the_worker_ended(self, pool, text, reason):
        _, (verdicts,) = judged(pool, text, text, "ok", "ok")
        assert str(verdicts).startswith(f"2 of 4 verdicts of Obedient were lost (2 {reason}) - ")
        assert verdicts.share == 0.5

    def test_a_closed_connection_is_no_exit_code(self, pool):
        _, (verdicts,) = judged(pool, "closed")
        assert "worker died on the response: a closed connection" in str(verdicts)
        assert [result.timed_out for result in judged(pool, "ok")[0][0].results] == [False]

    def test_sys_exit_and_errors_that_cannot_be_sent_are_told_as_they_are(self, pool):
        with pytest.raises(RewardError, match="Obedient raised SystemExit: 0"):
            judged(pool, "sys.exit")
        with pytest.raises(RewardError, match=r"Obedient gave OwnError: 1 2, which cannot be sent"):
            judged(pool, "own error")

    def test_a_prompt_that_cannot_be_sent_is_named(self, pool):
        prompt = Prompt("q9", "text", (1,), lambda: None)
        with pytest.raises(RewardError, match=r"reward_pool: prompt 'q9' cannot be sent to a worker process"):
            judge_all(REWARD, [(prompt, [completion()])], pool)

    def test_a_worker_that_dies_at_its_start_has_seen_no_response(self, tmp_path):
        """Whatever is the matter with the machine: here, a worker that cannot send its first word."""

        class Sabotage(VerifiableReward):
            def preload(self):
                from multiprocessing.connection import Connection

                Connection.send_bytes = lambda self, data: os._exit(5)

            def verify(self, prompt, completion):
                return True

        Sabotage.__module__ = Sabotage.preload.__module__ = Sabotage.verify.__module__ = "__main__"
        reward = Sabotage()
        with RewardPool([reward], PoolOptions(workers=1)) as pool:
            # What the server itself says goes through Connection.send, which is another method.
            _, (verdicts,) = judged(pool, "ok", reward=reward)
        assert "1 of 1 verdicts of Sabotage were lost (1 worker died at its start, before a response" in str(verdicts)

    def test_fresh_workers_that_time_out_are_told_of_preload(self):
        reward = Warm()
        with RewardPool([reward], PoolOptions(workers=2, deadline_s=0.2)) as pool:
            _, (verdicts,) = judged(pool, *["ok"] * 6, reward=reward)
        assert verdicts.share == 1
        assert str(verdicts).startswith("6 of 6 verdicts of Warm were lost (6 timed out after 0.2 s) - all in fresh")
        assert "the reward's method preload" in str(verdicts)

    def test_responses_that_are_slow_themselves_are_not(self):
        later = Verdicts("Mine", 10, 5)
        later.lost[Loss("timeout", True, False, None, 5.0)] += 3
        later.lost[Loss("timeout", True, True, None, 5.0)] += 2
        assert "preload" not in str(later)
        assert "5 timed out after 5 s) - raise data.reward_pool.deadline_s" in str(later)

    def test_while_some_are_still_to_come_the_share_is_that_of_those_that_are_settled(self):
        verdicts = Verdicts("Mine", 10, 3)
        assert (verdicts.share, verdicts.share_so_far) == (0.0, 0.0)
        verdicts.lost[Loss("memory", True, True)] += 1
        assert (verdicts.share, verdicts.share_so_far) == (0.1, 0.25)
        assert Verdicts("Mine", 10).share_so_far == 0.0

    def test_those_of_the_ranks_are_put_together(self):
        one, two = Verdicts("Mine", 4, 2), Verdicts("Mine", 4, 4)
        one.lost[Loss("memory", True, True)] += 2
        (together,) = joined([[one], [two]])
        assert (together.asked, together.judged, together.share) == (8, 6, 0.25)

    def test_a_preload_that_ends_its_process_is_told_of(self):
        class Dead(VerifiableReward):
            def preload(self):
                os._exit(3)

            def verify(self, prompt, completion):
                return True

        Dead.__module__ = Dead.preload.__module__ = Dead.verify.__module__ = "__main__"
        reward = Dead()
        with (
            RewardPool([reward], PoolOptions(workers=1)) as pool,
            pytest.raises(RewardError, match=r"forks workers died 4 times \(exit code 3\).*preload"),
        ):
            judged(pool, "ok", reward=reward)

    def test_a_long_judging_is_told_of_before_its_end(self, pool, monkeypatch):
        said: list[str] = []
        monkeypatch.setattr("ibro_lightning.rewards.pool.pool.REPORT_AFTER_S", 0.0)
        pool.say = said.append
        judged(pool, *["exit:0"] * 4)
        assert len(said) == 1
        assert re.match(r"0 s of judging so far: \d of 4 verdicts of Obedient were lost", said[0])
        judged(pool, *["ok"] * 4)
        assert len(said) == 1


class Several:
    """Ranks of which this one knows what the others say."""

    def __init__(self, *others) -> None:
        self.others = others

    def gather(self, item):
        return [item, *self.others]

    def broadcast(self, item):
        return item


def _note_on_a_rank() -> None:
    """Rank 0 loses all its verdicts, rank 1 none: both stop, and the line has both ranks' numbers."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    group_of_all = distributed.new_group(backend="gloo")
    ranks = Ranks(rank, 2, None, group_of_all, group_of_all, rank == 0)
    mine = Verdicts("Mine", 2, 0 if rank == 0 else 2)
    mine.lost.update({Loss("timeout", True, True, None, 5.0): 2} if rank == 0 else {})
    with pytest.raises(RewardError, match=r"one is lost, 1 so far: 2 of 4 verdicts of Mine were lost \(2 timed"):
        LostVerdicts(PoolOptions(max_lost_rollouts=1)).note(group(*[rank == 0] * 2), [mine], "one", ranks)
    expected = (RewardError, "^Ends raised SystemExit") if rank == 0 else (RankError, "rank 0 failed: Rew")
    with pytest.raises(expected[0], match=expected[1]), ranks.all_or_none():
        judge_all(Ends(SystemExit(0), "verify" if rank == 0 else ""), [(PROMPT, [completion()])], judge_here)


def group(*stopped: bool) -> list[Group]:
    results = tuple(RewardResult(-1.0, {"accuracy": 0.0}, timed_out=one) for one in stopped)
    return [Group(PROMPT, tuple(completion() for _ in stopped), results)]


class TestLostRollouts:
    def test_are_told_of_at_once_and_end_the_run_in_the_end(self):
        lost = LostVerdicts(PoolOptions(max_lost_rollouts=3))
        for number in (1, 2):
            with pytest.warns(UserWarning, match=rf"^iteration {number}: 1 of 2 responses have no verdict") as told:
                assert lost.note(group(True, False), [], f"iteration {number}") == 0.5
            assert "the run stops after 3 (data.reward_pool.max_lost_rollouts)" in str(told[0].message)
        with pytest.raises(RewardError, match=r"max_lost_rollouts: 3 - iteration 3 is lost, 3 in a row: 2 of 2"):
            lost.note(group(True, True), [], "iteration 3")

    def test_in_a_row_means_in_a_row(self):
        lost = LostVerdicts(PoolOptions(max_lost_rollouts=2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(5):
                lost.note(group(True), [], "one")
                lost.note(group(False), [], "two")
        assert lost.in_a_row == 0

    def test_a_small_share_is_not_worth_a_word(self, recwarn):
        lost = LostVerdicts(PoolOptions(max_lost_rollouts=1, lost_share=0.6))
        assert lost.note(group(True, False), [], "one") == 0.5
        assert lost.note([], [], "nothing was judged") == 0
        assert not recwarn.list

    def test_null_never_stops(self):
        lost = LostVerdicts(PoolOptions(max_lost_rollouts=None))
        for number in range(20):
            with pytest.warns(UserWarning, match="never stops"):
                lost.note(group(True), [], f"iteration {number}")

    def test_all_ranks_decide_alike(self):
        """One rank's verdicts are all there, the other's all lost: both see one half."""
        for mine, other in ((group(True), (1, 0, [])), (group(False), (1, 1, []))):
            with pytest.raises(RewardError, match="1 of 2 responses"):
                LostVerdicts(PoolOptions(max_lost_rollouts=1)).note(mine, [], "iteration 1", Several(other))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            LostVerdicts(PoolOptions(max_lost_rollouts=1)).note(group(True), [], "one", Several((3, 0, [])))

    def test_so_do_real_ones(self, tmp_path):
        codes = run_ranks(2, _note_on_a_rank, folder=tmp_path)
        assert codes == [0, 0], logs(tmp_path)

    def test_a_part_of_a_mixture_is_told_of_and_does_not_end_the_run(self):
        part = Verdicts("OfAPart", 2)
        part.lost[Loss("crash", True, True, -11)] += 2
        lost = LostVerdicts(PoolOptions(max_lost_rollouts=1))
        with pytest.warns(UserWarning, match=r"^one: 2 of 2 verdicts of OfAPart were lost \(2 worker died on the resp"):
            lost.note(group(True, True, *[False] * 14), [part], "one", ALONE)
        assert lost.in_a_row == 0

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("lost_share", 0),
            ("lost_share", 1.5),
            ("lost_share", float("nan")),
            ("lost_share", "much"),
            ("max_lost_rollouts", 0),
            ("max_lost_rollouts", 1.5),
            ("max_lost_rollouts", True),
            ("max_lost_rollouts", float("inf")),
        ],
    )
    def test_settings_are_checked(self, name, value):
        with pytest.raises(ConfigError, match=rf"^{name}: "):
            PoolOptions(**{name: value})


class TestFirstTrial:
    """What can be known before training is not found out by training."""

    tokenizer = staticmethod(lambda text, add_special_tokens: {"input_ids": [7] * len(text)})

    def test_two_lost_verdicts_are_refused(self):
        reward = Warm()
        with RewardPool([reward], PoolOptions(workers=1, deadline_s=0.2)) as pool:
            with pytest.raises(RewardError, match=r"^data.reward_pool: a first verdict was tried twice.*preload"):
                check_verdicts(pool, reward, [PROMPT], SamplingParams(), self.tokenizer)
            pool.options.__dict__["max_lost_rollouts"] = None
            with pytest.warns(UserWarning, match=r"1 of 1 verdicts of Warm were lost.*null does not stop"):
                check_verdicts(pool, reward, [PROMPT], SamplingParams(), self.tokenizer)

    def test_one_may_be_lost(self, tmp_path, recwarn):
        class Once(VerifiableReward):
            def __init__(self, marker):
                super().__init__()
                self.marker = marker

            def verify(self, prompt, completion):
                if not os.path.exists(self.marker):
                    open(self.marker, "w").close()
                    time.sleep(1000)
                return True

        Once.__module__ = Once.__init__.__module__ = Once.verify.__module__ = "__main__"
        reward = Once(str(tmp_path / "marker"))
        with RewardPool([reward], PoolOptions(workers=1, deadline_s=0.5)) as pool:
            check_verdicts(pool, reward, [PROMPT], SamplingParams(), self.tokenizer)
            assert pool.counts["timeout"] == 1
        assert not recwarn.list

    def test_the_response_is_the_gold_behind_what_the_prompt_begins(self):
        seen: list[Completion] = []

        class Here(RewardPool):
            def __call__(self, requests):
                return judge_here(requests)

        class Watching(VerifiableReward):
            def verify(self, prompt, completion):
                seen.append(completion)
                return True

        pool = Here([])

        prompts = [Prompt("a", "", (1,), 42, prefill="It is "), Prompt("b", "", (1,), {"tests": []}, part="other")]
        check_verdicts(pool, Watching(), prompts, SamplingParams(max_tokens=1), self.tokenizer)
        assert {(c.text, c.token_ids, c.max_tokens) for c in seen} == {("It is 42", (7, 7), 2), ("1", (7,), 1)}


DIES = """
import os
from ibro_lightning.rewards import VerifiableReward


class Dies(VerifiableReward):
    def verify(self, prompt, completion):
        if completion.token_ids and completion.text != str(prompt.answer):
            os._exit(0)
        return "=" in completion.text
"""
POOL = ["--data.reward.class_path=dies.Dies", "--data.reward_pool.workers=1", "--data.reward_pool.deadline_s=60"]
QUICK = ["--trainer.num_sanity_val_steps=0", "--data.weight_check=null", "--trainer.check_val_every_n_epoch=100"]
QUICK += ["--data.prompts_per_rollout=1", "--data.group_size=2", "--data.dynamic_sampling.max_rounds=1"]
QUICK += ["--model.mini_batch_prompts=1"]


def test_a_run_whose_worker_dies_on_every_response_stops(workspace: Path, capfd) -> None:
    """Before the first rollout all is well (its verdict of the gold is right); the count is in the checkpoint."""
    (workspace / "dies.py").write_text(DIES)
    argv = ["fit", "--config", "tiny.yaml", *POOL, *QUICK, "--trainer.max_epochs=4"]
    line = r"iteration 1: 2 of 2 verdicts of Dies were lost \(2 worker died on the response: exit code 0\)"
    with pytest.warns(UserWarning, match=line), pytest.raises(SystemExit) as end:
        main([*argv, "--data.reward_pool.max_lost_rollouts=2"])
    assert end.value.code == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert re.match(
        r"error: data.reward_pool.max_lost_rollouts: 2 - iteration 2 is lost, 2 in a row: 2 of 2 verdicts of D", said
    )
    with pytest.raises(SystemExit):
        main([*argv, "--data.reward_pool.max_lost_rollouts=2", "--ckpt_path=last"])
    assert "iteration 2 is lost, 2 in a row" in capfd.readouterr().err.splitlines()[-1]  # not after two more


def test_an_evaluation_is_told_of_too(workspace: Path, capfd) -> None:
    (workspace / "dies.py").write_text(DIES)
    argv = ["validate", "--config", "tiny.yaml", "--data.eval_sets.starts.reward.class_path=dies.Dies"]
    argv += [*POOL[1:], "--data.weight_check=null", "--data.eval_batch_prompts=1", "--data.eval_samples=2"]
    line = "starts, batch 1 of 10: 2 of 2 verdicts of Dies were lost"
    with pytest.warns(UserWarning, match=line), pytest.raises(SystemExit) as end:
        main([*argv, "--data.reward_pool.max_lost_rollouts=2"])
    assert end.value.code == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: data.reward_pool.max_lost_rollouts: 2 - starts, batch 2 of 10 is lost, 2 in a row")
