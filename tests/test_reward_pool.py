"""The reward pool: right results in order whatever a response does, nothing that hangs, nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.rewards import (
    GoldTrial,
    LastNumberReward,
    PlainResponses,
    PoolOptions,
    Request,
    Reward,
    RewardByPart,
    RewardPool,
    RewardSum,
    Verdict,
    VerifiableReward,
    judge_all,
    judge_here,
)
from ibro_lightning.rewards.pool import pool as pool_module
from ibro_lightning.types import Completion, Prompt, RewardResult

PROMPT = Prompt("q1", "text", (1, 2), "ok")


def completion(text: str) -> Completion:
    return Completion((1, 2, 3), (0.0, -1.0, -2.0), "stop", text, 16, seed=0)


def texts(*said: str) -> list[tuple[Prompt, list[Completion]]]:
    return [(PROMPT, [completion(text) for text in said])]


class Obedient(VerifiableReward):
    """Does what the response says. Imports nothing of the test's world, so that a worker is there at once."""

    def verify(self, prompt, completion):
        match completion.text.split(":"):
            case ["hang"]:
                while True:
                    pass
            case ["in C"]:
                return 7 ** (9**9) > 0  # one long step of the interpreter: no signal handler, no thread gets a turn
            case ["memory"]:
                hoard = []
                while True:
                    hoard.append("x" * 10**6 + str(len(hoard)))
            case ["abort"]:
                os.abort()
            case ["_exit"]:
                os._exit(0)
            case ["until", path, *begun]:
                for marker in begun:
                    open(marker, "w").close()
                while not os.path.exists(path):
                    time.sleep(0.001)
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["raise"]:
                raise KeyError("oops")
            case ["exit"]:
                raise SystemExit(3)
            case ["setting"]:
                raise ConfigError("some.setting", 3, "write 4")
            case ["once", marker]:  # is killed the first time
                if not os.path.exists(marker):
                    open(marker, "w").close()
                    os.kill(os.getpid(), signal.SIGKILL)
            case ["pid"]:
                return Verdict(1.0, str(os.getpid()))
        return Verdict(completion.text == prompt.answer, completion.text)


class LongestWins(Reward):
    """Compares the responses of a group."""

    def __call__(self, prompt, completions):
        for c in completions:
            if c.text == "hang":
                time.sleep(1000)
        longest = max(len(c.text) for c in completions)
        return [
            RewardResult(float(len(c.text) == longest), {"accuracy": 0.5, "length": len(c.text)}) for c in completions
        ]


class Plain(Obedient):
    def verify(self, prompt, completion):
        return completion.text == prompt.answer

    def plain_responses(self, prompt):
        return PlainResponses(("ok",))


class FormOnly(Reward):
    """Never done with a group that holds a response "hang here"."""

    def __call__(self, prompt, completions):
        while any(c.text == "hang here" for c in completions):
            time.sleep(1)
        return [RewardResult(float(len(c.text)), {"length": len(c.text)}) for c in completions]


# By value, as from a notebook: the workers must not import this file, and pytest with it.
for reward_class in (Obedient, Plain, LongestWins, FormOnly):
    reward_class.__module__ = "__main__"


@pytest.fixture
def pool() -> Iterator[RewardPool]:
    with RewardPool([REWARD], PoolOptions(workers=2, deadline_s=30, memory_mib=150)) as pool:
        yield pool


REWARD = Obedient()


def outcome(results: Sequence[Sequence[RewardResult]]) -> list[list[str]]:
    """Per response: right, wrong or stopped."""
    return [["stopped" if r.timed_out else "right" if r.parts["accuracy"] else "wrong" for r in row] for row in results]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class TestResults:
    def test_are_those_of_judging_here_in_the_same_order(self, pool):
        rng = random.Random(0)
        answered = [
            (Prompt(f"q{q}", "text", (1,), "ok"), [completion(rng.choice(["ok", "no", "", "é" * 9])) for _ in range(n)])
            for q, n in enumerate([1, 0, 7, 8, 9, 16, 31, 2])
        ]
        assert judge_all(REWARD, answered, pool) == judge_all(REWARD, answered, judge_here)
        assert pool.counts == {"timeout": 0, "memory": 0, "crash": 0}

    def test_keep_their_order_when_later_ones_are_quicker(self, pool):
        said = [f"sleep:{seconds}" for seconds in (0.2, 0.0, 0.1, 0.0, 0.05, 0.0)]
        answered = [(PROMPT, [completion(text), completion("ok")]) for text in said]
        assert [[r.answer for r in row] for row in judge_all(REWARD, answered, pool)] == [[text, "ok"] for text in said]

    def test_of_megabytes_of_text_arrive(self, pool):
        long = "ok" * 2**20
        assert outcome(judge_all(REWARD, texts(*[long, "ok"] * 12), pool)) == [["wrong", "right"] * 12]

    def test_of_nothing_are_nothing(self, pool):
        assert judge_all(REWARD, [], pool) == []
        assert judge_all(REWARD, [(PROMPT, [])], pool) == [[]]

    def test_of_rewards_that_compare_are_for_the_whole_group(self):
        reward = LongestWins()
        with RewardPool([reward], PoolOptions(workers=2, deadline_s=5)) as pool:
            results = judge_all(reward, texts(*["a"] * 20, "aaa"), pool)
        assert [r.reward for r in results[0]] == [0.0] * 20 + [1.0]

    def test_come_from_several_processes_none_of_them_this_one(self, pool):
        said = ["pid", "sleep:0.05"] * 32
        pids = {r.answer for r in judge_all(REWARD, texts(*said), pool)[0]} - {"sleep:0.05"}
        assert len(pids) == 2
        assert str(os.getpid()) not in pids

    def test_of_a_sum_are_put_together_from_here_and_there(self):
        class Here(Reward):
            pooled = False

            def __call__(self, prompt, completions):
                return [RewardResult(float(os.getpid()), {"pid": float(os.getpid())}) for _ in completions]

        reward = RewardSum([REWARD, Here()])
        with RewardPool([reward], PoolOptions(workers=1)) as pool:
            ((result,),) = judge_all(reward, texts("pid"), pool)
        assert result.parts == {"accuracy": 1.0, "pid": float(os.getpid())}
        assert result.answer not in (None, str(os.getpid()))


class Meets(Reward):
    """Answers once its counterpart has begun, too."""

    def __init__(self, own: Path, other: Path, part: str) -> None:
        self.own, self.other, self.part = own, other, part

    def __call__(self, prompt, completions):
        self.own.touch()
        while not self.other.exists():
            time.sleep(0.001)
        return [RewardResult(1.0, {self.part: 1.0}) for _ in completions]


Meets.__module__ = "__main__"


class TestRewardsMadeOfOthers:
    def test_have_all_their_leaves_judged_together(self, tmp_path):
        """Each of the two waits for the other: one after the other, they would be stopped at the deadline."""
        one, two = tmp_path / "one", tmp_path / "two"
        reward = RewardSum([RewardByPart({"": Meets(one, two, "accuracy")}), Meets(two, one, "form")], [1.0, 0.5])
        with RewardPool([reward], PoolOptions(workers=2, deadline_s=60)) as pool:
            (results,) = judge_all(reward, texts("a"), pool)
        assert results == [RewardResult(1.5, {"accuracy": 1.0, "form": 1.0})]
        assert pool.counts == {"timeout": 0, "memory": 0, "crash": 0}

    def test_ask_the_judge_once_for_all_leaves_of_all_prompts(self):
        number, length = LastNumberReward(), LongestWins()
        reward = RewardByPart({"sum": RewardSum([number, RewardSum([length], [2.0])], [1.0, 3.0]), "one": number})
        prompts = [Prompt("p", "text", (1,), "2", part="sum"), Prompt("q", "text", (1,), "5", part="one")]
        asked = []

        def judge(requests):
            asked.append(requests)
            return [
                [RewardResult(10.0 * n + m, {f"part {n}": 1.0}) for m in range(len(request.completions))]
                for n, request in enumerate(requests, 1)
            ]

        answered = [(prompt, [completion("a"), completion("b")]) for prompt in prompts]
        results = judge_all(reward, answered, judge)
        (requests,) = asked
        assert [(request.reward, request.prompt.id) for request in requests] == [
            (number, "p"),
            (length, "p"),
            (number, "q"),
        ]
        # p: 10 + 3 * 2 * 20, 11 + 3 * 2 * 21; q: the third request as it is
        assert [[result.reward for result in row] for row in results] == [[130.0, 137.0], [30.0, 31.0]]
        assert [list(row[0].parts) for row in results] == [["part 1", "part 2"], ["part 3"]]

    def test_are_stopped_leaf_by_leaf_each_at_its_own_deadline(self):
        patient, form = Obedient(correct=3.0), FormOnly()
        patient.deadline_s = 60.0
        reward = RewardSum([patient, form], [0.5, 1.0])
        with RewardPool([reward], PoolOptions(workers=2, deadline_s=0.5, timeout_score=0.25)) as pool:
            (results,) = judge_all(reward, texts("ok", "hang here"), pool)
            assert pool.counts == {"timeout": 2, "memory": 0, "crash": 0}
            lost = {verdicts.reward: (verdicts.asked, verdicts.lost.total()) for verdicts in pool.take_verdicts()}
        assert lost == {"Obedient": (2, 0), "FormOnly": (2, 2)}
        assert [(r.reward, r.timed_out, r.outcome_span) for r in results] == [(1.75, True, 2.0), (-0.25, True, 2.0)]


def test_trials_of_golds_are_no_verdicts():
    reward = Plain()
    with RewardPool([reward], PoolOptions(workers=1, deadline_s=60)) as pool:
        ((trial,),) = pool([Request(GoldTrial(reward), PROMPT, [completion("")])])
        assert (trial.reward, trial.answer) == (1.0, None)
        assert pool.take_verdicts() == []


class TestWhatIsStopped:
    @pytest.mark.parametrize(
        ("text", "why"),
        [("hang", "timeout"), ("in C", "timeout"), ("memory", "memory"), ("abort", "crash"), ("_exit", "crash")],
    )
    def test_is_counted_and_scored_and_its_neighbours_are_not_harmed(self, text, why):
        said = ["ok", text, "no", "ok"]
        patience = 0.5 if why == "timeout" else 20.0
        with RewardPool([REWARD], PoolOptions(workers=2, deadline_s=patience, memory_mib=150)) as pool:
            assert outcome(judge_all(REWARD, texts(*said) * 3, pool)) == [["right", "stopped", "wrong", "right"]] * 3
            assert pool.counts == {"timeout": 0, "memory": 0, "crash": 0, why: 3}
            assert outcome(judge_all(REWARD, texts("ok"), pool)) == [["right"]]

    @pytest.mark.parametrize("score", [0.0, 0.25, 1.0])
    def test_gets_the_configured_score_as_its_accuracy(self, score):
        reward = Obedient(correct=2.0, incorrect=-2.0)
        with RewardPool([reward], PoolOptions(workers=1, deadline_s=0.1, timeout_score=score)) as pool:
            ((result,),) = judge_all(reward, texts("hang"), pool)
        expected = RewardResult(-2.0 + 4.0 * score, {"accuracy": score}, answer="", timed_out=True, why="stopped")
        assert result == expected

    def test_is_a_whole_group_where_responses_are_compared(self):
        reward = LongestWins()
        with RewardPool([reward], PoolOptions(workers=2, deadline_s=0.3, timeout_score=0.125)) as pool:
            results = judge_all(reward, [*texts("a", "hang", "b"), *texts("a", "aa")], pool)
        assert [(r.reward, r.timed_out) for r in results[0]] == [(0.125, True)] * 3
        assert [(r.reward, r.timed_out) for r in results[1]] == [(0.0, False), (1.0, False)]
        assert pool.counts["timeout"] == 3

    def test_a_reward_may_have_a_deadline_of_its_own(self):
        patient = Obedient()
        patient.deadline_s = 60.0
        with RewardPool([REWARD, patient], PoolOptions(workers=2, deadline_s=0.2)) as pool:
            assert outcome(judge_all(patient, texts("sleep:0.6"), pool)) == [["wrong"]]
            assert outcome(judge_all(REWARD, texts("hang"), pool)) == [["stopped"]]

    def test_memory_is_bounded_per_worker(self):
        """150 MiB more than it starts with; a hoarder without limit would have taken all there is."""
        pool = RewardPool([REWARD], PoolOptions(workers=2, deadline_s=20, memory_mib=150))
        peak = 0
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.is_set():
                for pid in pool.worker_pids:
                    try:
                        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    except (FileNotFoundError, ValueError, IndexError, ProcessLookupError):
                        continue
                    peak = max(peak, pages * os.sysconf("SC_PAGE_SIZE"))
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assert outcome(judge_all(REWARD, texts("memory", "ok") * 4, pool)) == [["stopped", "right"]] * 4
        finally:
            done.set()
            watcher.join()
            pool.close()
        assert 50 * 2**20 < peak < 300 * 2**20


class SlowedPool(RewardPool):
    """A pool whose clock stands still but for ``step_s`` after each result. The next response is judged only once the
    pool has looked at all deadlines by that clock, so the outcome does not depend on the machine's speed."""

    def __init__(self, folder: Path, step_s: float, deadline_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.step_s, self.now, self.judged = folder, step_s, 0.0, -1
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=lambda seconds: None)
        monkeypatch.setattr(pool_module, "time", clock)
        super().__init__([REWARD], PoolOptions(workers=1, deadline_s=deadline_s))

    def _listen(self) -> None:
        super()._listen()
        judged = sum(result is not None for row in self._results for result in row)
        if not any(worker.ready for worker in self._workers):
            return
        if judged > self.judged:
            self.judged, self.now = judged, self.now + self.step_s
        else:
            (self.folder / str(judged)).touch()  # what the next response waits for

    def results(self, count: int) -> list[str]:
        return outcome(judge_all(REWARD, texts(*[f"until:{self.folder}/{n}" for n in range(count)]), self))[0]


class TestDeadlines:
    """Several responses travel in one message; the deadline is for each of them."""

    def test_responses_that_take_longer_only_in_sum_are_not_stopped(self, tmp_path, monkeypatch):
        with SlowedPool(tmp_path, step_s=0.04, deadline_s=0.05, monkeypatch=monkeypatch) as pool:
            assert pool.results(32) == ["wrong"] * 32
            assert pool.longest_s == pytest.approx(0.04)

    def test_a_response_that_takes_longer_is_stopped_although_the_sum_has_time_left(self, tmp_path, monkeypatch):
        with SlowedPool(tmp_path, step_s=0.06, deadline_s=0.05, monkeypatch=monkeypatch) as pool:
            assert pool.results(32) == ["stopped"] * 32
            assert pool.longest_s == pytest.approx(0.06)


class TestFaultsOfOthers:
    def test_a_worker_killed_from_outside_costs_no_response_its_score(self, pool, tmp_path):
        """The out-of-memory killer or an operator: the response is judged again by another worker."""
        said = [f"once:{tmp_path}/{n}" for n in range(4)]
        results = judge_all(REWARD, texts("ok", *said, "ok"), pool)
        assert outcome(results) == [["right", *["wrong"] * 4, "right"]]
        assert pool.counts["crash"] == 0

    def test_idle_workers_may_be_killed_too(self, pool):
        judge_all(REWARD, texts("ok", "ok") * 8, pool)
        for pid in pool.worker_pids:
            os.kill(pid, signal.SIGKILL)
        assert outcome(judge_all(REWARD, texts("ok", "no") * 8, pool)) == [["right", "wrong"]] * 8
        assert pool.counts["crash"] == 0

    def test_the_process_that_forks_workers_may_be_killed(self, pool, tmp_path):
        judge_all(REWARD, texts("ok", "ok") * 8, pool)
        workers = pool.worker_pids
        server = int(Path(f"/proc/{workers[0]}/stat").read_text().rsplit(")", 1)[1].split()[1])
        begun, go = tmp_path / "begun", tmp_path / "go"

        def kill() -> None:
            assert wait_until(begun.exists, 60)
            os.kill(server, signal.SIGKILL)
            assert wait_until(lambda: not alive(server))
            go.touch()

        killer = threading.Thread(target=kill)
        killer.start()
        results = judge_all(REWARD, texts(*[f"until:{go}:{begun}", "ok"] * 8), pool)
        killer.join()
        assert outcome(results) == [["wrong", "right"] * 8]
        assert pool.counts["crash"] == 0
        assert not set(workers) & set(pool.worker_pids)
        assert not any(alive(pid) for pid in workers)

    def test_a_reward_that_raises_is_named_and_the_pool_goes_on(self, pool):
        with pytest.raises(RewardError, match=r"Obedient raised KeyError: 'oops' \(prompt 'q1'\)"):
            judge_all(REWARD, texts("ok", "hang", "raise"), pool)
        with pytest.raises(RewardError, match="raised SystemExit"):
            judge_all(REWARD, texts("exit"), pool)
        assert outcome(judge_all(REWARD, texts("ok", "no"), pool)) == [["right", "wrong"]]

    def test_a_settings_error_stays_one(self, pool):
        with pytest.raises(ConfigError, match=r"^some.setting: 3 - write 4$"):
            judge_all(REWARD, texts("setting"), pool)


class TestWhatCannotGoThere:
    def test_a_reward_that_cannot_be_sent_is_refused_at_once(self):
        reward = Obedient()
        reward.lock = threading.Lock()
        with pytest.raises(ConfigError, match=r"^reward_pool: 'Obedient' - .*cannot be sent.*pooled = False"):
            RewardPool([reward])

    def test_a_reward_that_cannot_be_loaded_there_is_refused(self, tmp_path):
        code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from only_here import Mine
        from ibro_lightning.rewards import RewardPool, judge_all
        import os
        os.remove({str(tmp_path / "only_here.py")!r})
        reward = Mine()
        from ibro_lightning.types import Completion, Prompt
        response = Completion((), (), "stop", "", 1, 0)
        judge_all(reward, [(Prompt("q", "", (1,), ""), [response])], RewardPool([reward]))
        """
        (tmp_path / "only_here.py").write_text(
            "from ibro_lightning.rewards import VerifiableReward\n"
            "class Mine(VerifiableReward):\n    def verify(self, prompt, completion): return True\n"
        )
        result = run_script(code, tmp_path)
        assert "ConfigError: reward_pool: " in result.stderr
        assert "No module named 'only_here'" in result.stderr

    def test_rewards_that_stay_need_no_processes(self):
        class Here(Obedient):
            pooled = False

        reward = Here()
        with RewardPool([reward]) as pool:
            assert outcome(judge_all(reward, texts("ok", "no"), pool)) == [["right", "wrong"]]
            assert pool.worker_pids == ()

    @pytest.mark.parametrize(
        ("name", "value"),
        [("workers", 0), ("deadline_s", 0), ("deadline_s", float("nan")), ("memory_mib", 1), ("timeout_score", 1.5)],
    )
    def test_bad_settings_are_refused(self, name, value):
        with pytest.raises(ConfigError, match=rf"^{name}: "):
            PoolOptions(**{name: value})


def run_script(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(code))
    return subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it, and so do their children
from ibro_lightning.types import Completion, Prompt
from ibro_lightning.rewards import PoolOptions, RewardPool, VerifiableReward, judge_all

class Mine(VerifiableReward):
    def verify(self, prompt, completion):
        while completion.text == "hang":
            pass
        return completion.text == "ok"

def ask(*texts):
    return [(Prompt("q", "", (1,), ""), [Completion((), (), "stop", text, 1, 0) for text in texts])]

reward = Mine()
pool = RewardPool([reward], PoolOptions(workers=2, deadline_s=60))
print([r.reward for r in judge_all(reward, ask(*["ok", "no"] * 8), pool)[0]][:2], flush=True)
server = int(open(f"/proc/{pool.worker_pids[0]}/stat").read().rsplit(")", 1)[1].split()[1])
print(server, *pool.worker_pids, flush=True)
"""


class TestNothingIsLeft:
    def test_after_close(self, pool):
        judge_all(REWARD, texts("ok", "ok") * 8, pool)
        workers = pool.worker_pids
        server = int(Path(f"/proc/{workers[0]}/stat").read_text().rsplit(")", 1)[1].split()[1])
        pool.close()
        assert not any(alive(pid) for pid in (server, *workers))
        assert not Path(f"/proc/{server}").exists()  # not even a zombie
        assert outcome(judge_all(REWARD, texts("ok"), pool)) == [["right"]]  # and it can be used again

    def test_of_a_worker_that_was_stopped(self):
        with RewardPool([REWARD], PoolOptions(workers=2, deadline_s=0.5)) as pool:
            judge_all(REWARD, texts("ok", "ok") * 8, pool)
            before = set(pool.worker_pids)
            judge_all(REWARD, texts("hang", "ok", "hang", "hang"), pool)
            gone = before - set(pool.worker_pids)
            assert gone
            assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in gone))  # not even zombies

    def test_after_ctrl_c_in_the_middle(self, pool, tmp_path):
        judge_all(REWARD, texts("ok", "ok") * 8, pool)
        workers = pool.worker_pids
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
        begun = tmp_path / "begun"

        def interrupt() -> None:
            assert wait_until(begun.exists, 60)
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Thread(target=interrupt)
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                judge_all(REWARD, texts(*[f"until:{tmp_path}/never:{begun}"] * 64), pool)
        finally:
            timer.join()
            signal.signal(signal.SIGINT, before)
        assert not any(alive(pid) for pid in workers)
        assert outcome(judge_all(REWARD, texts("ok"), pool)) == [["right"]]

    @pytest.mark.parametrize("kind", ["SIGKILL to the trainer", "SIGINT to the terminal's processes", "just ends"])
    def test_however_the_trainer_ends(self, tmp_path, kind):
        """A script without an `if __name__` guard, whose reward is defined in it, as people write them."""
        ending = "" if kind == "just ends" else 'judge_all(reward, ask("hang", "ok", "hang"), pool)\n'
        (tmp_path / "script.py").write_text(SCRIPT + ending)
        process = subprocess.Popen(
            [sys.executable, "script.py"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "[1.0, -1.0]\n"
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3
        if kind != "just ends":
            time.sleep(0.3)  # it is in the middle of "hang"
            assert all(alive(pid) for pid in pids)
            if kind.startswith("SIGKILL"):
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=600)
        assert wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_trainer_that_stops_at_once_leaves_no_word_from_the_pool(tmp_path: Path) -> None:
    """A wrong setting, say, while the pool's process is still importing: its complaint must stay the only one."""
    result = run_script(
        """
        from ibro_lightning.rewards import MathVerifyReward, RewardPool
        pool = RewardPool([MathVerifyReward()])
        raise SystemExit("error: one line")
        """,
        tmp_path,
    )
    assert result.stderr == "error: one line\n"


@pytest.mark.slow
def test_works_under_lightnings_ddp(tmp_path: Path) -> None:
    """Two ranks, each with a pool of its own, made in setup and ended in teardown."""
    result = run_script(
        """
        import lightning.pytorch as pl, os, sys, torch
        from ibro_lightning.types import Completion, Prompt
        from ibro_lightning.rewards import PoolOptions, RewardPool, VerifiableReward, judge_all

        class Mine(VerifiableReward):
            def verify(self, prompt, completion):
                while completion.text == "hang":
                    pass
                return completion.text == "ok"

        class Data(pl.LightningDataModule):
            def setup(self, stage):
                self.reward = Mine()
                self.pool = RewardPool([self.reward], PoolOptions(workers=1, deadline_s=0.3))
            def train_dataloader(self):
                said = ["ok", "hang", "no", "ok"] * 2
                answered = [(Prompt("q", "", (1,), ""), [Completion((), (), "stop", t, 1, 0) for t in said])]
                rewards = torch.tensor([r.reward for r in judge_all(self.reward, answered, self.pool)[0]])
                return torch.utils.data.DataLoader(rewards.reshape(2, 4), batch_size=1)
            def teardown(self, stage):
                os.write(1, f"rank {self.trainer.global_rank} {dict(self.pool.counts)}\\n".encode())
                self.pool.close()

        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)
            def training_step(self, batch, batch_idx):
                assert batch.tolist() == [[1.0, -1.0, -1.0, 1.0]]
                return self.layer(batch).sum()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                   ).fit(Module(), Data())
        """,
        tmp_path,
    )
    for rank in (0, 1):
        assert f"rank {rank} {{'timeout': 2, 'memory': 0, 'crash': 0}}" in result.stdout, result.stderr[-2000:]
