"""vLLM in processes of its own: the weights travel there in pieces, and when a process dies the run says so at once.

Starting takes 20 seconds: the tests that only use an engine share one, the others run in the order of the file.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from helpers.tiny_vllm import (
    PROMPTS,
    changeable,
    changed_to,
    difference,
    largest_difference,
    perturb,
    spec_of,
    tiny_model,
    tokens_of,
    vllm_engine,
    weights_of,
)
from ibro_lightning.engines import VLLMEngine
from ibro_lightning.engines import vllm as vllm_module
from ibro_lightning.engines.vllm_worker import chunks
from ibro_lightning.errors import RolloutError
from ibro_lightning.types import SamplingParams

SEEDS = [[100 * prompt + sample for sample in range(3)] for prompt in range(len(PROMPTS))]
PARAMS = SamplingParams(max_tokens=60)
SECONDS = 60.0  # in which a death must be noticed, on a busy machine


def vllm_processes(kind: str) -> list[psutil.Process]:
    """Our living descendants whose name vLLM set to ``kind``."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and kind in child.name()
    ]


def kill(kind: str) -> None:
    (process,) = vllm_processes(kind)
    process.send_signal(signal.SIGKILL)


class StillWaiting(BaseException):
    """Not an Exception, which the engine would report in its own words."""


@contextmanager
def soon(seconds: float = SECONDS) -> Iterator[None]:
    """Interrupts what waits for a dead process."""

    def late(*_: Any) -> None:
        raise StillWaiting(f"for a dead process, after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def dies(call: Callable[[], Any]) -> None:
    """``call`` fails soon, with an error that a person can act on."""
    with soon(), pytest.raises(RolloutError, match=r"the vLLM engine died while .*checkpoint"):
        call()


@pytest.fixture(scope="module")
def expected(_engines) -> Any:
    """The same samples from an engine in this process. It ends before the other starts: vLLM reads its mode once."""
    samples = _engines("tied").generate(PROMPTS, PARAMS, SEEDS)
    _engines.stop()
    return samples


@pytest.fixture(scope="module")
def engine(expected) -> Iterator[VLLMEngine]:
    engine = vllm_engine(in_process=False)
    engine.setup(spec_of(tiny_model("tied")))
    yield engine
    engine.close()
    assert not vllm_processes("VLLM")


@pytest.fixture
def running(engine) -> VLLMEngine:
    with soon(400):  # a start takes 20 s, and far longer beside other work
        engine.setup(spec_of(tiny_model("tied")))  # nothing, unless a test has killed it
    engine.load_weights(weights_of(tiny_model("tied")))
    return engine


class TestAtWork:
    def test_the_process_group_is_not_ours(self, running):
        assert vllm_processes("EngineCore")
        assert not torch.distributed.is_initialized()

    def test_samples_are_those_of_an_engine_in_this_process(self, running, expected):
        found = running.generate(PROMPTS, PARAMS, SEEDS)
        assert tokens_of(found) == tokens_of(expected)
        assert largest_difference(tiny_model("tied"), PROMPTS, found) < 1e-4

    @pytest.mark.parametrize("limit", [1, 20_000, 10**9])
    def test_new_weights_arrive_in_pieces_of_any_size(self, running, monkeypatch, limit):
        """Matrices that vLLM fuses come in different messages."""
        monkeypatch.setattr(vllm_module, "chunks", partial(chunks, limit=limit))
        model = changeable("tied")
        for step in range(3):
            perturb(model, step, 0.3)
            assert difference(running, model) > 0.05
            running.load_weights(weights_of(model))
            assert difference(running, model) < 1e-4

    def test_bfloat16_weights(self, running):
        model = changeable("tied", 1, torch.bfloat16)
        running.load_weights(weights_of(model))
        assert difference(running, changed_to(model, torch.float32)) < 1e-4

    def test_a_partial_sync(self, running):
        model, new = changeable("tied"), changeable("tied", 1)
        layer = {name: tensor for name, tensor in weights_of(new) if name.startswith("model.layers.1.")}
        running.load_weights(layer.items(), partial=True)
        model.load_state_dict(layer, strict=False)
        assert difference(running, model) < 1e-4

    def test_a_refused_sync_is_mended_by_the_next(self, running):
        missing = "model.layers.1.mlp.up_proj.weight"
        with pytest.raises((KeyError, RolloutError), match=missing):
            running.load_weights((n, t) for n, t in weights_of(changeable("tied", 1)) if n != missing)
        running.load_weights(weights_of(tiny_model("tied")))
        assert difference(running, tiny_model("tied")) < 1e-4

    def test_deadlines_and_what_comes_after_them(self, running, monkeypatch):
        """Aborting is a message, and tokens of aborted requests may already be on their way."""
        expected = tokens_of(running.generate(PROMPTS, PARAMS, SEEDS))
        reasons = set()
        for seconds in (8, 3, 12, 5):
            clock = SimpleNamespace(monotonic=itertools.count().__next__)
            with monkeypatch.context() as patch:
                patch.setattr(vllm_module, "time", clock)
                running.deadline_s = seconds
                cut = running.generate(PROMPTS, PARAMS, SEEDS)
            for samples, full in zip(cut, expected, strict=True):
                for sample, tokens in zip(samples, full, strict=True):
                    reasons.add(sample.finish_reason)
                    assert sample.token_ids == tokens[: len(sample.token_ids)]
            running.deadline_s = None
            assert tokens_of(running.generate(PROMPTS, PARAMS, SEEDS)) == expected
            running.load_weights(weights_of(tiny_model("tied")))
        assert "deadline" in reasons

    def test_ctrl_c_leaves_nothing_for_the_next_call(self, running, monkeypatch):
        expected = tokens_of(running.generate([[9, 8, 7], [20, 21]], PARAMS, [[1, 2], [3]]))
        steps, real = itertools.count(), running._engine.step

        def step() -> Any:
            if next(steps) == 4:
                raise KeyboardInterrupt
            return real()

        with monkeypatch.context() as patch:
            patch.setattr(running._engine, "step", step)
            with pytest.raises(KeyboardInterrupt):
                running.generate(PROMPTS, PARAMS, SEEDS)
        assert tokens_of(running.generate([[9, 8, 7], [20, 21]], PARAMS, [[1, 2], [3]])) == expected


class TestDeath:
    def test_of_the_engine_in_the_middle_of_a_rollout(self, running, monkeypatch):
        steps, real = itertools.count(), running._engine.step

        def step() -> Any:
            if next(steps) == 3:
                kill("EngineCore")
            return real()

        monkeypatch.setattr(running._engine, "step", step)
        dies(lambda: running.generate(PROMPTS, PARAMS, SEEDS))
        # It stays dead, and everything says so.
        dies(lambda: running.generate(PROMPTS, PARAMS, SEEDS))
        dies(lambda: running.load_weights(weights_of(tiny_model("tied"))))
        with soon():
            running.close()
        assert not vllm_processes("VLLM"), "a process is left behind"

    def test_of_a_worker_during_a_sync(self, running):
        """Started anew after the engine's death above, which shows that it can be."""
        assert difference(running, tiny_model("tied")) < 1e-4

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            kill("Worker")
            yield from weights_of(tiny_model("tied"))

        dies(lambda: running.load_weights(weights()))
        with pytest.raises(RuntimeError, match="load_weights"):  # closed: it had some of the weights and not others
            running.generate(PROMPTS, PARAMS, SEEDS)
        with soon():
            running.close()
        assert not vllm_processes("VLLM"), "a process is left behind"


def test_two_processes_that_share_each_layer_answer_like_the_plain_model(expected, monkeypatch):
    """Tensor parallelism: every weight arrives in pieces, and each process keeps its part."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    engine = vllm_engine(tensor_parallel_size=2)
    engine.setup(spec_of(tiny_model("tied")))
    try:
        for seed in range(2):
            model = changeable("tied", seed)
            engine.load_weights(weights_of(model))
            assert difference(engine, model) < 1e-4
    finally:
        engine.close()
    assert not vllm_processes("VLLM")
