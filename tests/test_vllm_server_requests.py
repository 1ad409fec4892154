"""The engine for a running vLLM server at work: requests, answers, and what can go wrong with either.

The server only pretends; the real one is in tests/vllm.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from helpers.fake_vllm import SPEC, VOCAB, WEIGHTS, FakeServer, completion, fake_server
from helpers.processes import HANGS_S
from ibro_lightning.engines import VLLMServerEngine, vllm_http
from ibro_lightning.errors import ConfigError, RolloutError
from ibro_lightning.types import SamplingParams

PARAMS = SamplingParams(max_tokens=5, stop_token_ids=(7, 500))


@pytest.fixture
def running() -> Iterator[tuple[FakeServer, str]]:
    with fake_server() as server:
        yield server


@pytest.fixture
def fake(running) -> FakeServer:
    return running[0]


@pytest.fixture
def ready(running) -> Iterator[VLLMServerEngine]:
    engine = VLLMServerEngine(running[1])
    engine.setup(SPEC)
    engine.load_weights(WEIGHTS.items())
    yield engine
    engine.close()


@pytest.fixture
def hanging() -> Iterator[Callable[[Any], tuple[int, Any]]]:
    """An answer that does not come before the test has ended."""
    ended = threading.Event()
    yield lambda _: (ended.wait(HANGS_S), (0, None))[1]
    ended.set()


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_http, "HEALTH_EVERY_S", 0.01)


class TestGenerating:
    def test_every_sample_is_a_request_with_its_own_seed_and_comes_back_in_its_place(self, ready, fake):
        prompts, seeds = [[1, 2], [3], [4, 5, 6]], [[10, 11], [], [12]]
        generated = ready.generate(prompts, PARAMS, seeds)
        assert [[sample.token_ids for sample in own] for own in generated] == [[(10,), (11,)], [], [(12,)]]
        assert generated[0][0].logp == (-1.5,)
        asked = {body["seed"]: body for body in fake.completions()}
        assert {seed: body["prompt"] for seed, body in asked.items()} == {10: [1, 2], 11: [1, 2], 12: [4, 5, 6]}

    def test_nothing_is_left_to_the_models_generation_config(self, ready, fake):
        ready.generate([[1]], PARAMS, [[3]])
        (body,) = fake.completions()
        assert body == {
            "prompt": [1],
            "seed": 3,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": 5,
            "ignore_eos": True,
            "stop_token_ids": [2, 7],  # those that the model has
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def test_no_prompts_no_responses(self, ready):
        assert ready.generate([], PARAMS, []) == []

    def test_as_many_requests_as_allowed_are_sent_at_once_and_none_more(self, running):
        """Each waits for its fellows; with fewer at a time this would wait for ever."""
        fake, url = running
        engine = VLLMServerEngine(url, max_num_seqs=3)
        engine.setup(SPEC)
        engine.load_weights(WEIGHTS.items())
        together, lock, flying, most = threading.Barrier(3), threading.Lock(), 0, 0

        def answer(body: Any) -> tuple[int, Any]:
            nonlocal flying, most
            with lock:
                flying += 1
                most = max(most, flying)
            together.wait(HANGS_S)
            with lock:
                flying -= 1
            return 200, completion([body["seed"]], [0.0], "stop")

        fake.answers["/v1/completions"] = answer
        generated = engine.generate([[1]], PARAMS, [list(range(9))])
        engine.close()
        assert [sample.token_ids for sample in generated[0]] == [(seed,) for seed in range(9)]
        assert most == 3

    def test_what_json_cannot_say_is_minus_infinity(self, ready, fake):
        fake.answers["/v1/completions"] = lambda _: (200, completion([1, 2], [-0.125, -9999.0], "stop"))
        assert ready.generate([[1]], PARAMS, [[0]])[0][0].logp == (-0.125, -math.inf)

    @pytest.mark.parametrize("answer", [completion([1], [-0.1], "abort"), completion([1, 2], [-0.1])])
    def test_an_answer_that_is_no_whole_response_is_refused(self, ready, fake, answer):
        fake.answers["/v1/completions"] = lambda _: (200, answer)
        with pytest.raises(RolloutError, match="the vLLM server ended a response with"):
            ready.generate([[1]], PARAMS, [[0]])

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([VOCAB], "policy: 'token id 11' - a prompt holds it, but the model has 11 tokens"),
            (
                [1] * 28,
                r"sampling\.max_tokens: 5 - with the longest .* restart the server with a higher --max-model-len",
            ),
        ],
    )
    def test_what_would_kill_the_server_or_be_refused_is_not_sent(self, ready, fake, prompt, message):
        with pytest.raises(ConfigError, match=message):
            ready.generate([[1], prompt], PARAMS, [[0], [0]])
        assert not fake.completions()

    def test_calls_in_the_wrong_order_say_what_comes_first(self, running):
        engine = VLLMServerEngine(running[1])
        engine.setup(SPEC)
        with pytest.raises(RolloutError, match="a successful load_weights"):
            engine.generate([[1]], PARAMS, [[0]])
        engine.offload(), engine.onload(), engine.close(), engine.close()  # nothing to do, and no harm
        for call in (lambda: engine.load_weights([]), lambda: engine.generate([], PARAMS, [])):
            with pytest.raises(RolloutError, match=r"setup\(spec\) comes before"):
                call()


class TestFailures:
    def test_a_refused_request_ends_the_others_and_none_is_repeated(self, ready, fake, hanging):
        def answer(body: Any) -> tuple[int, Any]:
            if body["seed"] == 0:
                return hanging(body)
            fake.wait_for_completions(2)
            return 400, {"error": {"message": "no such\nparameter", "code": 400}}

        fake.answers["/v1/completions"] = answer
        with pytest.raises(RolloutError, match=r"^the vLLM server failed while generating: no such parameter$"):
            ready.generate([[1]], PARAMS, [[0, 1]])
        assert asyncio.all_tasks(ready._client._loop) == set()
        assert sorted(body["seed"] for body in fake.completions()) == [0, 1]

    def lost(self, engine: VLLMServerEngine, why: str) -> None:
        match = (
            rf"^the vLLM server at http://127.* was lost while generating: {why}.*; once it is back, --ckpt_path last"
        )
        with pytest.raises(RolloutError, match=match):
            engine.generate([[1]], PARAMS, [[0, 1]])

    def test_a_connection_that_breaks(self, ready, fake):
        def answer(_: Any) -> tuple[int, Any]:
            fake.wait_for_completions(2)
            return 0, None

        fake.answers["/v1/completions"] = answer
        self.lost(ready, "the connection broke")
        assert len(fake.completions()) == 2, "it was tried again"

    def test_an_engine_that_died_behind_its_server(self, ready, fake):
        message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
        fake.answers["/v1/completions"] = lambda _: (500, {"error": {"message": message}})
        self.lost(ready, "its engine is dead")

    def test_an_engine_that_died_while_its_server_lets_requests_wait(self, ready, fake, watchful, hanging):
        fake.answers |= {"/v1/completions": hanging, "/health": lambda _: (503, None)}
        self.lost(ready, "its engine is dead, says its /health")

    def test_a_server_that_says_nothing_any_more(self, ready, fake, watchful, hanging):
        ready._client.timeout_s = 0.2
        fake.answers |= {"/v1/completions": hanging, "/health": hanging}
        self.lost(ready, r"no answer within 0\.2 s")

    def test_only_the_servers_health_has_a_time_limit(self, ready, fake, watchful, monkeypatch):
        """A response takes as long as it takes; here, until the server's health was asked for."""
        limits, real = {}, aiohttp.ClientSession.request

        def request(session: Any, method: str, url: str, **more: Any) -> Any:
            limits[urlsplit(url).path] = more["timeout"].total
            return real(session, method, url, **more)

        monkeypatch.setattr(aiohttp.ClientSession, "request", request)
        asked = threading.Event()
        fake.answers["/health"] = lambda _: (asked.set(), (200, None))[1]
        fake.answers["/v1/completions"] = lambda _: (asked.wait(HANGS_S), (200, completion([1], [0.0])))[1]
        assert ready.generate([[1]], PARAMS, [[0]])[0][0].token_ids == (1,)
        assert limits == {"/v1/completions": None, "/health": 60.0}

    def test_ctrl_c_ends_the_requests_and_the_next_call_works(self, ready, fake, hanging, ctrl_c_interrupts):
        arrived, main, client = threading.Event(), threading.get_ident(), ready._client

        def answer(body: Any) -> tuple[int, Any]:
            arrived.set()
            return hanging(body)

        def interrupt() -> None:
            """Again if need be: Python drops an exception that a signal raises within a finaliser."""
            arrived.wait(HANGS_S)
            while not ended.is_set():
                # It waits for the answers at the end of a few calls.
                if sys._current_frames()[main].f_code.co_name == "wait":
                    os.kill(os.getpid(), signal.SIGINT)
                ended.wait(1.0)

        fake.answers["/v1/completions"] = answer
        ended, thread = threading.Event(), threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            ready.generate([[1]], PARAMS, [[0, 1]])
        ended.set()
        thread.join()
        until = time.monotonic() + HANGS_S
        while asyncio.all_tasks(client._loop):
            assert time.monotonic() < until, "the server goes on for nobody"
            time.sleep(0.01)
        del fake.answers["/v1/completions"]
        assert ready.generate([[1]], PARAMS, [[6]])[0][0].token_ids == (6,)


class TestDeadline:
    def test_cuts_what_is_unfinished_and_keeps_the_rest(self, ready, fake, hanging, monkeypatch):
        """It passes once three of five responses have come, and four tasks are left: two responses, the watch on the
        server's health, and the one that waits."""
        limits = []

        async def wait(_: Any, timeout: float, return_when: str) -> None:
            limits.append(timeout)
            while len(asyncio.all_tasks()) > 4:
                await asyncio.sleep(0.001)

        fake.answers["/v1/completions"] = lambda body: (
            hanging(body) if body["seed"] % 2 else (200, completion([body["seed"]], [0.0], "stop"))
        )
        ready.deadline_s = 30.0
        monkeypatch.setattr(vllm_http.asyncio, "wait", wait)
        generated = ready.generate([[1]], PARAMS, [[0, 1, 2, 3, 4]])[0]
        late, stopped = ((), "deadline"), "stop"
        found = [(sample.token_ids, sample.finish_reason) for sample in generated]
        assert found == [((0,), stopped), late, ((2,), stopped), late, ((4,), stopped)]
        assert limits == [30.0]

    def test_that_leaves_nothing_is_an_error(self, ready, fake, hanging):
        fake.answers["/v1/completions"] = hanging
        ready.deadline_s = 0.01
        with pytest.raises(RolloutError, match=r"deadline_s: 0\.01 s passed before any response was finished"):
            ready.generate([[1]], PARAMS, [[0, 1]])
