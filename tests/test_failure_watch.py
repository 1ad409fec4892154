"""A rank that fails takes the others with it: two processes, one of which waits for the other in a collective."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.processes import start_ranks
from ibro_lightning.callbacks import RankWatch
from ibro_lightning.errors import RankError
from ibro_lightning.guards.failure_watch import FailureWatch, note

GRACE_S, SILENCE_S = 1.0, 3.0
BOUND_S = 600.0
"""Seconds within which all processes of a test must be gone; on an idle machine it takes the grace and a moment."""

SCRIPT = f"""
import os, sys, time
from datetime import timedelta
import torch
from torch import distributed
from ibro_lightning.errors import RankError
from ibro_lightning.guards.failure_watch import FailureWatch, leave

watch = FailureWatch(grace_s={GRACE_S}, silence_s={SILENCE_S}, period_s=0.1)
watch.start()  # before there is a process group
distributed.init_process_group("gloo", timeout=timedelta(minutes=30))
rank = distributed.get_rank()

def wait_for_the_other():
    distributed.all_reduce(torch.ones(1))

def say(text):
    print(text, flush=True)

wait_for_the_other()
say("ready")
"""


def run_script(code: str) -> None:
    os.dup2(os.open(f"stderr_{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT), 2)
    exec(code, {})


class Ranks:
    """Two processes that run the script, and then what a test adds to it."""

    def __init__(self, body: str, folder: Path) -> None:
        self.folder = folder
        self.processes = start_ranks(2, run_script, SCRIPT + textwrap.dedent(body), folder=folder)

    def send(self, number: int, rank: int) -> None:
        """Send a signal to a rank a second after it is ready."""
        process, log = self.processes[rank], self.folder / f"rank_{rank}.log"
        while not (log.exists() and "ready\n" in log.read_text()):
            assert process.exitcode is None
            time.sleep(0.02)
        time.sleep(1)
        assert process.pid is not None
        os.kill(process.pid, number)

    def end(self, rank: int) -> tuple[int | None, str]:
        """Exit code, and what it said on stderr; within the bound."""
        self.processes[rank].join(BOUND_S)
        return self.processes[rank].exitcode, (self.folder / f"stderr_{rank}").read_text()


@contextmanager
def ranks(body: str, folder: Path) -> Iterator[Ranks]:
    both = Ranks(body, folder)
    try:
        yield both
    finally:
        for process in both.processes:
            process.kill()
            process.join()


def test_a_rank_that_waits_is_ended_and_says_who_failed_and_how(tmp_path: Path) -> None:
    body = """
        if rank == 1:
            watch.report(KeyError("oops"))
            time.sleep(1000)  # its clean-up hangs, too
        wait_for_the_other()
    """
    with ranks(body, tmp_path) as both:
        code, said = both.end(0)
        assert code == 1
        assert "rank 1 failed: KeyError: 'oops'" in said
        code, said = both.end(1)
        assert code == 1
        assert "KeyError: 'oops'" in said, "the rank that failed shows its own error"


@pytest.mark.parametrize("failing", [0, 1])
def test_an_uncaught_exception_is_a_failure_and_leaves_a_note_before_the_store_goes(
    failing: int, tmp_path: Path
) -> None:
    body = f"""
        if rank == {failing}:
            raise KeyError("oops")
        try:
            wait_for_the_other()
        except RuntimeError:
            time.sleep(1000)  # whoever is left would wait for something else
    """
    with ranks(body, tmp_path) as both:
        code, said = both.end(failing)
        assert code != 0
        assert "KeyError: 'oops'" in said
        code, said = both.end(1 - failing)
        assert code == 1
        assert f"rank {failing} failed: KeyError: 'oops'" in said


def test_a_rank_that_leaves_in_time_is_left_alone(tmp_path: Path) -> None:
    body = """
        if rank == 1:
            watch.report(KeyError("oops"))
            leave(3)
        error = RankError("rank 1 failed: …")
        watch.report(error)
        assert watch.failure_of_another().startswith("rank 1 failed: KeyError")
        leave(4)
    """
    with ranks(body, tmp_path) as both:
        assert [both.end(rank)[0] for rank in range(2)] == [4, 3]


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_gives_no_sign_of_life_counts_as_dead(stopped: int, tmp_path: Path) -> None:
    body = """
        if rank == STOPPED:
            time.sleep(1000)
        wait_for_the_other()
    """.replace("STOPPED", str(stopped))
    with ranks(body, tmp_path) as both:
        both.send(signal.SIGSTOP, stopped)
        code, said = both.end(1 - stopped)
        assert code == 1
        expected = "the group's store has not answered for 3 s" if stopped == 0 else "rank 1 has sent no heartbeat"
        assert expected in said


def test_a_rank_that_was_killed_is_noticed(tmp_path: Path) -> None:
    body = """
        if rank == 0:
            time.sleep(1000)
        try:
            wait_for_the_other()
        except RuntimeError:
            time.sleep(1000)
    """
    with ranks(body, tmp_path) as both:
        both.send(signal.SIGKILL, 0)
        code, said = both.end(1)
        assert code == 1
        assert "is gone" in said


def test_long_work_is_no_silence_and_ending_well_no_failure(tmp_path: Path) -> None:
    body = f"""
        if rank == 1:
            watch.stop()
            leave(0)
        end = time.monotonic() + 2 * {SILENCE_S}
        while time.monotonic() < end:
            sum(range(10**6))  # holds the interpreter, apart from what it hands out
        watch.stop()
        leave(0)
    """
    with ranks(body, tmp_path) as both:
        assert [both.end(rank) for rank in range(2)] == [(0, ""), (0, "")]


def test_alone_there_is_nothing_to_watch() -> None:
    hook = sys.excepthook
    watch = FailureWatch(period_s=0.01)
    watch.start()
    watch.start()
    watch.report(KeyError("oops"))
    assert watch.failure_of_another() is None
    watch.stop()
    watch.stop()
    assert sys.excepthook == hook


def watching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("failure-watch")]


def test_a_command_that_ends_before_the_ranks_have_met_is_no_longer_watched() -> None:
    """Otherwise the watch would end the process that it ran in, such as a notebook's, when its time is up."""
    hook, watch = sys.excepthook, FailureWatch(period_s=0.01)
    watch.start()
    assert len(watching()) == 2
    watch.stop_without_group()
    assert sys.excepthook == hook
    assert not watching()


@pytest.mark.parametrize("set_up", [True, False])
def test_neither_is_one_that_fails_before_they_have_met(set_up: bool) -> None:
    trainer, callback = SimpleNamespace(world_size=2), RankWatch()
    if set_up:
        callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
        assert watching()
    callback.on_exception(trainer, None, KeyError("oops"))  # type: ignore[arg-type]
    assert not watching()


def test_a_note_is_one_line_and_tells_a_lost_connection_from_an_error() -> None:
    assert note(2, ValueError("first\nsecond")) == "rank 2 failed: ValueError: first second"
    lost = note(0, RuntimeError("Connection closed by peer [127.0.0.1]:1234"))
    assert lost.startswith("rank 0 lost the connection to another rank")
    assert len(note(0, ValueError("x" * 10_000))) < 1000
    assert issubclass(RankError, RuntimeError)


def test_ranks_that_do_not_meet_give_up() -> None:
    """Nobody else can tell a process whose group never came about."""
    code = """
import time
from ibro_lightning.guards import failure_watch
failure_watch.JOINING_S = 0.5
failure_watch.FailureWatch(period_s=0.1).start()
time.sleep(60)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: the ranks have not joined within 0.5 s")
