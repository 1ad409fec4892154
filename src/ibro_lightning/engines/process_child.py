"""The other side of :class:`.EngineProcess`: a process that holds an engine, and answers one call after the other."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from ibro_lightning.engines import shared_weights
from ibro_lightning.engines.base import RolloutEngine
from ibro_lightning.guards.signals import end_with, stop_signals


def main(connection: int, weights: int, parent: int) -> None:
    """Serve the trainer at the other end of a connection until that is closed.

    Args:
        connection, weights: file descriptors; the latter of the memory through which weights come.
        parent: the trainer's process id.
    """
    end_with(parent, signal.SIGKILL)
    for number in stop_signals():  # the trainer reacts to them, and ends this process
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    served = Served(weights)
    conn = Connection(connection)
    try:
        with suppress(EOFError, OSError):  # the trainer has closed it, or is gone
            while True:
                what, arguments = conn.recv()
                conn.send(served.answer(what, arguments))
    finally:
        served.close()


class Served:
    """The engine, and the calls that it gets."""

    def __init__(self, weights: int) -> None:
        self._weights = os.fdopen(weights, "rb")
        self._engine: RolloutEngine

    def answer(self, what: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        """``(True, the result)`` of a call, or ``(False, the error)``."""
        try:
            own = getattr(self, what, None)
            return True, (own or getattr(self._engine, what))(*arguments)
        except Exception as error:
            return False, _portable(error)

    def engine(self, pickled: bytes) -> None:
        self._engine = pickle.loads(pickled)

    def setup(self, spec: Any) -> int | None:
        if spec.device.type == "cuda" and torch.cuda.device_count() == 1:
            spec = replace(spec, device=torch.device("cuda", 0))  # the only one that this process sees
        self._engine.setup(spec)
        return self._engine.max_model_len

    def load_weights(self, table: list[shared_weights.Entry], partial: bool) -> None:
        self._engine.load_weights(shared_weights.read(self._weights, table), partial=partial)

    def close(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


def _portable(error: Exception) -> Exception:
    """The error as another process can read it, with the traceback that it has here."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(error.__notes__[-1])
        return plain
    return error
