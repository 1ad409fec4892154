"""Signals that wait until a library's call is done."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from ibro_lightning.guards.signals import held_back


class Stopped(BaseException):
    """Raised by the handler that was there before."""


@pytest.fixture(autouse=True)
def handled() -> Iterator[list[int]]:
    """The signals that reached the handlers from before, each of which raises."""
    seen: list[int] = []

    def handle(number: int, frame: object) -> None:
        seen.append(number)
        raise Stopped

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def stopped(work: Callable[[Callable[[], None]], None]) -> bool:
    """Whether ``work``, which is given the function that lets signals through, ends by a signal."""
    try:
        with held_back() as let_through:
            work(let_through)
    except Stopped:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_it_is_let_through(handled, number):
    done = []

    def work(let_through: Callable[[], None]) -> None:
        let_through()  # there is none
        send(number)
        done.append(list(handled))
        let_through()
        done.append("more")

    assert stopped(work)
    assert done == [[]]
    assert handled == [number]


def test_or_until_the_end(handled):
    done = []

    def work(let_through: Callable[[], None]) -> None:
        send(signal.SIGTERM)
        done.append(list(handled))

    assert stopped(work)
    assert done == [[]]
    assert handled == [signal.SIGTERM]


def test_what_comes_while_the_work_is_cleaned_up_waits_too(handled):
    done = []

    def work(let_through: Callable[[], None]) -> None:
        try:
            send(signal.SIGTERM)
            let_through()
        finally:
            send(signal.SIGINT)
            done.append(list(handled))

    assert stopped(work)
    assert done == [[signal.SIGTERM]]
    assert handled == [signal.SIGTERM, signal.SIGINT]


def test_a_second_ctrl_c_does_not_wait(handled):
    done = []

    def work(let_through: Callable[[], None]) -> None:
        send(signal.SIGINT)
        done.append(list(handled))
        send(signal.SIGINT)
        done.append("more")

    assert stopped(work)
    assert done == [[]]
    assert handled == [signal.SIGINT, signal.SIGINT]  # the handler from before counts them itself


def test_a_signal_that_kills_kills_afterwards():
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with held_back():
            send(signal.SIGTERM)
            os.write(writer, b"still here")
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.read(reader, 10) == b"still here"
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_handlers_are_the_same_afterwards():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with held_back():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
