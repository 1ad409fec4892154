"""A rank that fails takes the others with it: two processes, one of which waits for the other in a collective."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

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


@contextmanager
def ranks(body: str) -> Iterator[list[subprocess.Popen[str]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT + textwrap.dedent(body)],
            env=environment | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and what it said on stderr; within the bound."""
    _, said = process.communicate(timeout=BOUND_S)
    return process.returncode, said


def test_a_rank_that_waits_is_ended_and_says_who_failed_and_how() -> None:
    body = """
        if rank == 1:
            watch.report(KeyError("oops"))
            time.sleep(1000)  # its clean-up hangs, too
        wait_for_the_other()
    """
    with ranks(body) as processes:
        code, said = ends(processes[0])
        assert code == 1
        assert "rank 1 failed: KeyError: 'oops'" in said
        code, said = ends(processes[1])
        assert code == 1
        assert "KeyError: 'oops'" in said, "the rank that failed shows its own error"


@pytest.mark.parametrize("failing", [0, 1])
def test_an_uncaught_exception_is_a_failure_and_leaves_a_note_before_the_store_goes(failing: int) -> None:
    body = f"""
        if rank == {failing}:
            raise KeyError("oops")
        try:
            wait_for_the_other()
        except RuntimeError:
            time.sleep(1000)  # whoever is left would wait for something else
    """
    with ranks(body) as processes:
        code, said = ends(processes[failing])
        assert code != 0
        assert "KeyError: 'oops'" in said
        code, said = ends(processes[1 - failing])
        assert code == 1
        assert f"rank {failing} failed: KeyError: 'oops'" in said


def test_a_rank_that_leaves_in_time_is_left_alone() -> None:
    body = """
        if rank == 1:
            watch.report(KeyError("oops"))
            leave(3)
        error = RankError("rank 1 failed: …")
        watch.report(error)
        assert watch.failure_of_another().startswith("rank 1 failed: KeyError")
        leave(4)
    """
    with ranks(body) as processes:
        assert [ends(process)[0] for process in processes] == [4, 3]


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_gives_no_sign_of_life_counts_as_dead(stopped: int) -> None:
    body = """
        if rank == STOPPED:
            time.sleep(1000)
        wait_for_the_other()
    """.replace("STOPPED", str(stopped))
    with ranks(body) as processes:
        assert processes[stopped].stdout is not None
        assert processes[stopped].stdout.readline() == "ready\n"
        time.sleep(1)
        processes[stopped].send_signal(signal.SIGSTOP)
        code, said = ends(processes[1 - stopped])
        assert code == 1
        expected = "the group's store has not answered for 3 s" if stopped == 0 else "rank 1 has sent no heartbeat"
        assert expected in said


def test_a_rank_that_was_killed_is_noticed() -> None:
    body = """
        if rank == 0:
            time.sleep(1000)
        try:
            wait_for_the_other()
        except RuntimeError:
            time.sleep(1000)
    """
    with ranks(body) as processes:
        assert processes[0].stdout is not None
        assert processes[0].stdout.readline() == "ready\n"
        time.sleep(1)
        processes[0].kill()
        code, said = ends(processes[1])
        assert code == 1
        assert "is gone" in said


def test_long_work_is_no_silence_and_ending_well_no_failure() -> None:
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
    with ranks(body) as processes:
        assert [ends(process) for process in processes] == [(0, ""), (0, "")]


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
