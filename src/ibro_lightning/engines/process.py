"""An engine in a process of its own, so that responses are generated while the policy learns."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any

import cloudpickle
import torch
from torch import Tensor, distributed

from ibro_lightning.engines import process_child, shared_weights
from ibro_lightning.engines.base import RolloutEngine, Rows
from ibro_lightning.errors import ConfigError, RolloutError, check_count
from ibro_lightning.guards.signals import ended
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import Dtype, Generation, SamplingParams

OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that make a process a rank of the run, which the engine's is not."""
CLOSE_S = 10.0
"""Longest time in seconds for an engine to release what it holds; then its process is killed."""


class EngineProcess(RolloutEngine):
    """Runs any engine in a process of its own, which ends with this one, however that ends.

    The process starts in :meth:`setup`, without the state of this one: what ``engine`` needs must be in its arguments.
    If the process dies, the call in progress raises :class:`RolloutError` at once, and the next sync starts a new one.
    Calls come from one thread at a time; only :meth:`close` may come from another, and ends the call in progress.

    Args:
        engine: the engine, as it would be without a process of its own.
        num_threads: CPU threads of the process. The policy has those of ``--num_threads`` meanwhile: two pools of
            threads that contend for the same cores are far slower than one thread each.
    """

    def __init__(self, engine: RolloutEngine, num_threads: int = 1) -> None:
        if isinstance(engine, type) or not hasattr(engine, "generate"):
            raise ConfigError("engine", engine, "write an engine, such as HFEngine()")
        if isinstance(engine, EngineProcess):
            raise ConfigError("engine", "EngineProcess", "it is a process already: write the engine in it")
        check_count("num_threads", num_threads)
        self.engine, self.num_threads = engine, num_threads
        self.dtype: Dtype = engine.dtype
        self.max_model_len = engine.max_model_len
        self._spec: ModelSpec | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._conn: Connection
        self._weights: IO[bytes]
        self._asking = threading.Lock()

    def check_sampling(self, sampling: SamplingParams, *, setting: str) -> None:
        """As the engine does, if it does."""
        if check := getattr(self.engine, "check_sampling", None):
            check(sampling, setting=setting)

    def setup(self, spec: ModelSpec) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._clear_up(self._process)
        self._spec = spec
        self._start(spec.device)
        try:
            self.max_model_len = self._ask("setup", spec)
        except BaseException:
            self.close()
            raise

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, partial: bool = False) -> None:
        """See :class:`RolloutEngine`. Starts the process anew if it has died."""
        if self._process is None and self._spec is not None:
            self.setup(self._spec)
        self._check_running()
        self._ask("load_weights", shared_weights.write(self._weights, named_tensors), partial)
        shared_weights.clear(self._weights)

    def generate(self, prompts: Rows, sampling: SamplingParams, seeds: Rows) -> list[list[Generation]]:
        generated: list[list[Generation]] = self._ask("generate", prompts, sampling, seeds)
        return generated

    def offload(self) -> None:
        if self._process is not None:
            self._ask("offload")

    def onload(self) -> None:
        if self._process is not None:
            self._ask("onload")

    def close(self) -> None:
        """End the process; a call in progress in another thread raises :class:`RolloutError`."""
        process = self._process
        if process is None:
            return
        if self._asking.locked():
            process.kill()  # the other thread notices, and clears up
            process.wait()
            return
        self._conn.close()  # the process releases what the engine holds, and ends
        with suppress(subprocess.TimeoutExpired):
            process.wait(CLOSE_S)
        self._clear_up(process)

    def _start(self, device: torch.device) -> None:
        try:
            pickled = cloudpickle.dumps(self.engine)
        except Exception as error:
            name, reason = type(self.engine).__name__, f"{type(error).__name__}: {error}"
            remedy = f"cannot be sent to a process of its own ({reason}): let it open what it needs in setup"
            raise ConfigError("engine", name, remedy) from error
        self._conn, theirs = Pipe()
        self._weights = shared_weights.nameless_file()
        descriptors = theirs.fileno(), self._weights.fileno()
        code = f"from {process_child.__name__} import main; main(*{descriptors}, {os.getpid()})"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer alone
                env=environment(self.num_threads, device),
            )
        self._ask("engine", pickled)

    def _check_running(self) -> None:
        if self._process is None:
            raise RolloutError(f"the process of {type(self.engine).__name__} does not run: setup(spec) comes first")

    def _ask(self, what: str, *arguments: Any) -> Any:
        """The engine's answer to a call; raises what the call raised."""
        self._check_running()
        process = self._process
        assert process is not None
        answered = False
        with self._asking:
            try:
                self._conn.send((what, arguments))
                good, answer = self._conn.recv()
                answered = True
            except (EOFError, OSError) as error:
                raise RolloutError(self._obituary(process, what)) from error
            finally:
                if not answered:  # on Ctrl-C, too: the answer would be taken for the next call's
                    self._clear_up(process)
        if not good:
            raise answer
        return answer

    def _obituary(self, process: subprocess.Popen[bytes], what: str) -> str:
        try:
            how = ended(process.wait(CLOSE_S))
        except subprocess.TimeoutExpired:
            how = ended(None)
        name, doing = type(self.engine).__name__, what.replace("_", " ")
        return (
            f"the process of {name} ended with {how} (during: {doing}): is memory short? "
            "What is on disk is intact: --ckpt_path last continues from the last checkpoint, if there is one"
        )

    def _clear_up(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        process.kill()
        process.wait()
        self._conn.close()
        self._weights.close()


def environment(num_threads: int, device: torch.device) -> dict[str, str]:
    """The environment of an engine's process.

    Args:
        device: of this rank. With several ranks the process sees no other GPU, since vLLM takes the first that it sees.
    """
    own = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    own |= {"OMP_NUM_THREADS": str(num_threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several and device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = device.index or 0
        own["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) and visible[index] else str(index)
    return own
