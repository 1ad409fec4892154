"""Commands and functions in processes of their own, several of them as the ranks of one run.

Importing torch, Lightning and transformers takes seconds: a server imports them once, and every process forks from it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HANGS_S = 600.0
"""Processes that take longer are taken to hang: many times what the slowest takes on a busy machine."""
ENVIRONMENT = dict(os.environ)
"""As it was before the first test: what Lightning writes there, the seed for one, would make ranks differ from a test
that calls the same function itself. A server hands on what it found when it started, whichever test that was in."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "ibro_lightning.cli.run",
        "torch.utils.tensorboard",
        "transformers.models.qwen2.modeling_qwen2",
        "helpers.warm",  # the last one
    ]
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_ranks(
    count: int, function: Callable[..., Any], *arguments: Any, folder: Path, doors: Sequence[Connection | None] = ()
) -> list[BaseProcess]:
    """``count`` processes that call ``function(*arguments)`` in ``folder`` as the ranks of a run, as torchrun would
    start them; what they print goes to ``folder/rank_0.log``, …

    Args:
        doors: through which a rank says that it is done, and that it waits at until the other end is closed.
    """
    port = free_port()
    processes = []
    for rank, door in enumerate(doors or [None] * count):
        process = CONTEXT.Process(
            target=_on_rank, args=(rank, count, port, str(folder), door, function, arguments, ENVIRONMENT)
        )
        process.start()
        processes.append(process)
    return processes


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[int]:
    """Exit codes of :func:`start_ranks`. No rank ends before all are done: with the first one its store would go, and
    with any its sockets, which another one may still need. Processes that hang are killed, and have -9."""
    pipes = [CONTEXT.Pipe() for _ in range(count)]
    processes = start_ranks(count, function, *arguments, folder=folder, doors=[theirs for _, theirs in pipes])
    for _, theirs in pipes:
        theirs.close()
    busy = {door: process for (door, _), process in zip(pipes, processes, strict=True)}
    until = time.monotonic() + HANGS_S
    while busy and time.monotonic() < until:
        ready = wait([*busy, *(process.sentinel for process in busy.values())], until - time.monotonic())
        busy = {door: process for door, process in busy.items() if door not in ready and process.sentinel not in ready}
    for door, _ in pipes:
        door.close()
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    codes = [-9 if process.exitcode is None else process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def logs(folder: Path) -> str:
    """What all ranks printed."""
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("rank_*.log")))


def command(argv: Sequence[str]) -> None:
    """The command line of ibro_lightning."""
    from ibro_lightning.cli.main import main

    main(list(argv))


def fit(folder: Path, argv: Sequence[str], ranks: int = 1, strategy: str | None = None) -> None:
    """``python -m ibro_lightning fit …`` in ``folder``, on so many ranks; fails with what they printed."""
    several = ["--trainer.devices", str(ranks), "--trainer.strategy", strategy] if strategy else []
    codes = run_ranks(ranks, command, ["fit", *argv, *several], folder=folder)
    assert codes == [0] * ranks, f"exit codes {codes}\n{logs(folder)}"


def _on_rank(
    rank: int,
    count: int,
    port: int,
    folder: str,
    door: Connection | None,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    environment: Mapping[str, str],
) -> None:
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = ["ibro_lightning"]
    if count > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "tests",
        }
    log = os.open(f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        function(*arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if door is not None:
        door.send_bytes(b"done")
        with suppress(EOFError, OSError):
            door.recv_bytes()
    os._exit(code)  # not through the interpreter's end, where gloo's threads now and then abort
