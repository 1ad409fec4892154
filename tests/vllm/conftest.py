"""Running vLLM engines, shared by the tests that ask for the same."""

from __future__ import annotations

import faulthandler
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest

from helpers.tiny_vllm import EOS, SETTINGS, spec_of, tiny_model, vllm_engine, weights_of
from ibro_lightning.engines import VLLMEngine

# Two contended OpenMP pools are far slower than one thread; read by vLLM's own processes, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    """A dead engine that is waited for would stop the whole suite: after two minutes, say where, and exit."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Engines:
    """Hands out a running engine if one was started in the same way. They run side by side, which starts them sooner,
    and end together: closing one takes the others' process groups away."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[VLLMEngine, Any]] = {}

    def __call__(
        self, name: str, *, eos: Sequence[int] = EOS, cls: type[VLLMEngine] = VLLMEngine, **settings: Any
    ) -> VLLMEngine:
        """An engine for ``tiny_model(name)`` that holds its weights."""
        key = repr((name, tuple(eos), cls, sorted({**SETTINGS, **settings}.items())))
        self._forget_closed_ones()
        if key not in self._running:
            engine = vllm_engine(cls, **settings)
            engine.setup(spec_of(tiny_model(name), eos))
            self._running[key] = engine, engine._engine
        engine, _ = self._running[key]
        engine.load_weights(weights_of(tiny_model(name)))
        return engine

    def _forget_closed_ones(self) -> None:
        """An engine that a sync broke has closed itself, started anew perhaps, and is alone since."""
        closed = [key for key, (engine, inner) in self._running.items() if engine._engine is not inner]
        if not closed:
            return
        for key, (engine, _) in list(self._running.items()):
            if key not in closed:
                engine._engine = None  # closing it would take the process groups of the one that was started anew
            if engine._engine is None:
                del self._running[key]
            else:
                self._running[key] = engine, engine._engine

    def stop(self) -> None:
        self._forget_closed_ones()
        with mock.patch("gc.collect"):  # two seconds for each
            while self._running:
                self._running.popitem()[1][0].close()
        gc.collect()


@pytest.fixture(scope="session")
def _engines() -> Iterator[Engines]:
    engines = Engines()
    yield engines
    engines.stop()


@pytest.fixture
def serve(_engines: Engines) -> Callable[..., VLLMEngine]:
    """``serve(model name, **settings)``: a running engine with that model's weights."""
    return _engines


@pytest.fixture
def alone(_engines: Engines) -> None:
    """For tests that start and stop engines of their own."""
    _engines.stop()
