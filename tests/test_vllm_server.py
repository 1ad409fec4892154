"""The engine for a running vLLM server before it generates: what is asked of the server, and how weights reach it.

The server only pretends; the real one is in tests/vllm.
"""

from __future__ import annotations

import itertools
import re
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from transformers import Qwen2Config

from helpers.fake_vllm import SPEC, VOCAB, WEIGHTS, FakeServer, fake_server
from helpers.processes import HANGS_S, free_port
from helpers.sharded import on_ranks
from ibro_lightning.datamodules import EvalSet, EvaluationDataModule
from ibro_lightning.engines import VLLMServerEngine, vllm_http
from ibro_lightning.errors import ConfigError, RankError, RolloutError
from ibro_lightning.ranks import Ranks
from ibro_lightning.rewards import LastNumberReward
from ibro_lightning.tasks import SumsSource
from ibro_lightning.types import SamplingParams

PARAMS = SamplingParams(max_tokens=5)


@pytest.fixture
def running() -> Iterator[tuple[FakeServer, str]]:
    with fake_server() as server:
        yield server


@pytest.fixture
def fake(running) -> FakeServer:
    return running[0]


@pytest.fixture
def engine(running) -> Iterator[VLLMServerEngine]:
    """Set up, without weights."""
    engine = VLLMServerEngine(running[1])
    engine.setup(SPEC)
    yield engine
    engine.close()


@pytest.fixture
def ready(engine) -> VLLMServerEngine:
    engine.load_weights(WEIGHTS.items())
    return engine


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_http, "HEALTH_EVERY_S", 0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "127.0.0.1:8000"}, r"^url: '127\.0\.0\.1:8000' - write the server's address, such as http://127"),
        ({"url": "http://[::1"}, r"^url: 'http://\[::1' - write the server's address"),
        ({"url": "http://host:abc"}, r"^url: 'http://host:abc' - write the server's address"),
        ({"url": "http://host:99999"}, r"^url: 'http://host:99999' - write the server's address"),
        ({"url": "http://host#"}, r"^url: 'http://host#' - write the server's address"),
        ({"url": 8000}, r"^url: 8000 - write the server's address"),
        ({"url": "ftp://host"}, r"^url: 'ftp://host' - write the server's address"),
        ({"url": "http://host:8000/v1"}, r"^url: 'http://host:8000/v1' - write it without /v1"),
        ({"url": "http://a:secret@host"}, r"^url: 'http://…' - write no password here; for a key, set VLLM_API_KEY"),
        ({"url": "http://host:8000"}, r"^weights_dir: None - host may be another machine: write a folder that the"),
        ({"url": "http://localhost:1", "max_num_seqs": 0}, r"^max_num_seqs: 0 - write 1 or more"),
        ({"url": "http://localhost:1", "max_num_seqs": 2.5}, r"^max_num_seqs: 2\.5 - write a whole number"),
        ({"url": "http://localhost:1", "weights_dir": 3}, r"^weights_dir: 3 - write the path of a folder"),
        ({"url": "http://localhost:1", "timeout_s": 0}, r"^timeout_s: 0 - write 0\.1 or more"),
        ({"url": "http://localhost:1", "deadline_s": 0}, r"^deadline_s: 0 - write 0\.001 or more, or null to wait"),
    ],
)
def test_refused_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message) as refused:
        VLLMServerEngine(**settings)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/", "http://localhost:1", "http://[::1]:8000"])
def test_servers_on_this_machine_need_no_folder(url):
    assert VLLMServerEngine(url).url == url.rstrip("/")


def test_temperatures_that_vllm_would_replace_are_refused_before_anything_starts():
    sets = {"sums": EvalSet(SumsSource(), LastNumberReward(), sampling=SamplingParams(temperature=0.001))}
    with pytest.raises(ConfigError, match=r"^eval_sets\.sums\.sampling\.temperature: 0\.001 - vLLM would sample at"):
        EvaluationDataModule(VLLMServerEngine("http://localhost:1"), eval_sets=sets)


class TestSetup:
    def test_reads_the_servers_settings(self, engine):
        assert (engine.dtype, engine.max_model_len) == ("float32", 32)

    def test_a_second_one_asks_nothing(self, engine, fake):
        asked = len(fake.asked)
        engine.setup(SPEC)
        assert len(fake.asked) == asked

    def refusal(self, url: str, **settings: Any) -> str:
        engine = VLLMServerEngine(url, **settings)
        before = set(threading.enumerate())
        with pytest.raises(ConfigError) as refused:
            engine.setup(SPEC)
        left = {thread.name for thread in set(threading.enumerate()) - before}  # the pretended server has some, too
        assert "vllm-server" not in left, "its thread goes on"
        assert "\n" not in str(refused.value)
        return str(refused.value)

    def test_nobody_listens(self):
        url = f"http://127.0.0.1:{free_port()}"
        message = self.refusal(url)
        assert message.startswith(f"url: '{url}' - no vLLM server answers there: nothing accepts connections at {url}")
        assert "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs" in message

    def test_somebody_listens_and_says_nothing(self, watchful):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            message = self.refusal(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.1)
        assert "no vLLM server answers there: no answer within 0.1 s" in message

    @pytest.mark.parametrize("answer", [(404, {"detail": "Not Found"}), (302, None), (500, "<html>")])
    def test_another_kind_of_server(self, running, answer):
        fake, url = running
        fake.answers["/version"] = lambda _: answer
        fake.headers["Location"] = url + "/health"
        assert f"it answers /version with {answer[0]}" in self.refusal(url)
        assert "is it a vLLM server?" in self.refusal(url)
        assert set(fake.paths()) == {"/version"}, "a redirect was followed"

    @pytest.mark.parametrize(
        ("path", "answer", "message"),
        [
            ("/version", (200, {"version": "0.9.2"}), "the server is vLLM 0.9.2: 0.32 or later is needed"),
            ("/v1/models", (401, {"error": "Unauthorized"}), "set the environment variable VLLM_API_KEY"),
            ("/server_info?config_format=json", (404, {}), "restart this vLLM server with VLLM_SERVER_DEV_MODE=1"),
            ("/v1/completions", (400, {"error": {"message": "no pooling"}}), "does not generate: no pooling"),
            ("/v1/completions", (200, {}), "its model lacks the policy's 11 tokens: start it with the policy's folder"),
        ],
    )
    def test_a_server_that_does_not_serve_training(self, running, path, answer, message):
        running[0].answers[path] = lambda _: answer
        assert message in self.refusal(running[1])

    @pytest.mark.parametrize("size", [VOCAB - 1, VOCAB + 1])
    def test_a_model_with_another_vocabulary(self, running, size):
        running[0].vocab_size = size
        assert "its model lacks the policy's 11 tokens" in self.refusal(running[1])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"intermediate_size": 13},
                r"3 of its weights .*, e\.g\. model\.layers\.0\.mlp.*: \(8, 13\) instead of",
            ),
            (
                {"num_hidden_layers": 2, "layer_types": None},
                r"12 of its weights .*, e\.g\. model\.layers\.1\..*: \(8,\) instead of None",
            ),
            ({}, None),
        ],
    )
    def test_a_model_with_other_weights_if_its_folder_can_be_seen(self, running, tmp_path, change, message):
        """vLLM takes a wider layer without a word, and does not recover from refusing others."""
        fake, url = running
        fake.model = str(tmp_path)
        Qwen2Config(**{**SPEC.config.to_dict(), **change}).save_pretrained(tmp_path)
        if message:
            assert re.search(message, self.refusal(url))
        else:
            engine = VLLMServerEngine(url)
            engine.setup(SPEC)
            engine.close()

    @pytest.mark.parametrize(
        ("part", "setting", "value", "message"),
        [
            (
                "model_config",
                "logprobs_mode",
                "raw_logprobs",
                "--logprobs-mode processed_logprobs: its log-probs are raw",
            ),
            ("scheduler_config", "enable_chunked_prefill", True, "--no-enable-chunked-prefill: on CPUs it dies"),
        ],
    )
    def test_a_missing_flag_is_named(self, running, part, setting, value, message):
        fake, url = running
        fake.config[part][setting] = value
        assert f"restart this vLLM server with {message}" in self.refusal(url)
        fake.config["device_config"]["device"] = "cuda"  # where chunks do no harm
        if part == "scheduler_config":
            engine = VLLMServerEngine(url)
            engine.setup(SPEC)
            engine.close()

    def test_an_untried_version_is_taken_with_a_word(self, running):
        running[0].answers["/version"] = lambda _: (200, {"version": "0.33.1"})
        engine = VLLMServerEngine(running[1])
        with pytest.warns(UserWarning, match=r"the server is vLLM 0\.33\.1, which was not tried"):
            engine.setup(SPEC)
        engine.close()

    def test_the_key_comes_from_the_environment(self, running, monkeypatch):
        monkeypatch.setenv("VLLM_API_KEY", "k")
        engine = VLLMServerEngine(running[1])
        engine.setup(SPEC)
        engine.close()
        assert set(running[0].keys) == {"Bearer k"}

    def test_a_folder_that_is_not_there(self, running, tmp_path):
        message = self.refusal(running[1], weights_dir=str(tmp_path / "nowhere"))
        assert message.startswith("weights_dir: '")
        assert "there is no such folder" in message


class TestWeights:
    def test_arrive_whole_in_a_private_folder_that_is_gone_afterwards(self, running, tmp_path):
        fake, url = running
        engine = VLLMServerEngine(url, weights_dir=str(tmp_path))
        engine.setup(SPEC)
        engine.load_weights(WEIGHTS.items())
        engine.close()
        (arrived,) = fake.weights
        assert arrived.keys() == WEIGHTS.keys()
        assert all(torch.equal(arrived[name], WEIGHTS[name]) for name in WEIGHTS)
        assert fake.modes == [0o700]
        assert list(tmp_path.iterdir()) == []
        assert fake.paths()[-2:] == ["/collective_rpc", "/reset_prefix_cache"]

    def test_a_missing_one_is_named_before_the_server_hears_of_it(self, ready, fake):
        asked = len(fake.asked)
        with pytest.raises(RolloutError, match=r"no new values for 1 weights, e\.g\. 'lm_head\.weight'"):
            ready.load_weights((name, t) for name, t in WEIGHTS.items() if name != "lm_head.weight")
        assert len(fake.asked) == asked
        assert ready.generate([[1]], PARAMS, [[0]])  # it still has the old ones, all of them

    def test_a_partial_sync_hands_over_what_is_given(self, ready, fake):
        head = {"lm_head.weight": torch.ones(VOCAB, 8)}
        ready.load_weights(head.items(), partial=True)
        assert fake.weights[-1].keys() == head.keys()
        ready.load_weights([], partial=True)  # vLLM refuses an empty folder
        assert fake.paths()[-2:] == ["/reset_prefix_cache"] * 2

    def test_nothing_is_generated_after_a_failure_until_a_sync_succeeds(self, ready, fake):
        fake.answers["/collective_rpc"] = lambda _: (500, {"error": {"message": "Repo id must\nbe"}})
        with pytest.raises(RolloutError, match=r"failed while loading the weights in /\S+: Repo id must be; does"):
            ready.load_weights(WEIGHTS.items())
        with pytest.raises(RolloutError, match=r"a successful load_weights\(\.\.\.\) comes before generate"):
            ready.generate([[1]], PARAMS, [[0]])
        del fake.answers["/collective_rpc"]
        ready.load_weights(WEIGHTS.items())
        assert ready.generate([[1]], PARAMS, [[4]])[0][0].token_ids == (4,)

    def test_the_prefix_cache_is_reset_once_aborted_requests_have_ended(self, ready, fake):
        tries = itertools.count(1)
        fake.answers["/reset_prefix_cache"] = lambda _: (200, {"success": next(tries) == 3})
        ready.load_weights(WEIGHTS.items())
        assert next(tries) == 4

    def test_a_prefix_cache_that_is_never_reset_is_an_error(self, ready, fake):
        fake.answers["/reset_prefix_cache"] = lambda _: (200, {"success": False})
        ready.timeout_s = 0.1
        with pytest.raises(RolloutError, match="keeps the prefix cache of the old weights: it serves others"):
            ready.load_weights(WEIGHTS.items())
        with pytest.raises(RolloutError, match="a successful load_weights"):
            ready.generate([[1]], PARAMS, [[0]])


def share_a_server(url: str, fails: bool) -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=HANGS_S))
    rank, size = distributed.get_rank(), distributed.get_world_size()
    control = distributed.new_group(backend="gloo")
    engine = VLLMServerEngine(url)
    with pytest.raises(ConfigError, match=r"^engine: 'VLLMServerEngine' - processes of one tensor-parallel group"):
        engine.use_ranks(Ranks(0, 1, None, control, control, rank == 0, rank == 0))
    engine.use_ranks(Ranks(rank, size, None, control, control, rank == 0))
    engine.setup(SPEC)
    taken = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in WEIGHTS.items():
            taken.append(name)
            distributed.barrier(control)  # as where each holds a part
            yield name, tensor

    if fails:
        error = RolloutError if rank == 0 else RankError
        with pytest.raises(error, match="the vLLM server failed while loading"):
            engine.load_weights(gathered())
        with pytest.raises(RolloutError, match="a successful load_weights"):
            engine.generate([[1]], PARAMS, [[rank]])
    else:
        engine.load_weights(gathered())
        assert engine.generate([[1]], PARAMS, [[rank]])[0][0].token_ids == (rank,)
    assert taken == list(WEIGHTS)
    engine.close()


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_share_a_server_and_the_first_hands_over_the_weights(running, tmp_path: Path, fails):
    """All iterate, since gathering is collective, and none generates before the weights are there."""
    fake, url = running
    if fails:
        fake.answers["/collective_rpc"] = lambda _: (500, {"error": {"message": "no"}})
    on_ranks(2, share_a_server, url, fails, folder=tmp_path)
    assert fake.paths().count("/collective_rpc") == 1
    assert len(fake.weights) == (not fails)
