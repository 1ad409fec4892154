"""A real vLLM server, started once, as an engine: weights, samples, training on what it writes, and its death.

What is asked and answered over HTTP in detail is in tests/test_vllm_server*.py.
"""

from __future__ import annotations

import asyncio
import faulthandler
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from helpers.tiny_vllm import (
    PROMPTS,
    Provider,
    difference,
    largest_difference,
    perturb,
    spec_of,
    tiny_model,
    tokens_of,
    vllm_engine,
    weights_of,
)
from helpers.vllm_process import vllm_server
from helpers.vllm_training import train
from ibro_lightning.engines import VLLMServerEngine, vllm_http
from ibro_lightning.engines import vllm_server as engine_module
from ibro_lightning.engines.weight_check import WeightCheck, WeightVerifier
from ibro_lightning.errors import ConfigError, RolloutError, WeightSyncError
from ibro_lightning.models import PolicyOptions, Qwen2FromScratch, export_folder
from ibro_lightning.tasks import NumberPath
from ibro_lightning.types import SamplingParams

EXACT = 1e-4
SEEDS = [[100 * prompt + sample for sample in range(3)] for prompt in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Tied, with heads of 32, which vLLM's attention on CPUs knows, and with peaks in its distributions: its folder,
    and the model."""
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "max_position_embeddings": 512}
    source = Qwen2FromScratch(NumberPath(), **sizes, initializer_range=0.3)
    model = source.build(PolicyOptions())
    return export_folder(model, source.tokenizer(), tmp_path_factory.mktemp("policy") / "model"), model


@pytest.fixture(scope="module")
def server(policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    with vllm_server(policy[0], tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def _engine(policy, server) -> Iterator[VLLMServerEngine]:
    engine = VLLMServerEngine(server[0])
    engine.setup(spec_of(policy[1]))
    yield engine
    engine.close()


@pytest.fixture
def engine(_engine, policy) -> VLLMServerEngine:
    """With the policy's weights."""
    _engine.load_weights(weights_of(policy[1]))
    return _engine


@pytest.fixture
def model(policy) -> Any:
    """A policy that may be changed."""
    return deepcopy(policy[1])


def test_new_weights_are_sampled_from_at_once(engine, model):
    """The tied head and cached prefixes of long prompts included."""
    assert (engine.dtype, engine.max_model_len) == ("float32", 512)
    for step in range(3):
        assert difference(engine, model) < EXACT
        perturb(model, step, 0.3)
        assert difference(engine, model) > 0.05, "such a small change proves nothing"
        engine.load_weights(weights_of(model))
    assert difference(engine, model) < EXACT


def test_a_partial_sync(engine, model):
    new = deepcopy(model)
    perturb(new, 0, 0.3)
    layer = {name: tensor for name, tensor in weights_of(new) if name.startswith("model.layers.1.")}
    engine.load_weights(layer.items(), partial=True)
    model.load_state_dict(layer, strict=False)
    assert difference(engine, model) < EXACT


@pytest.mark.usefixtures("alone")
def test_samples_are_those_of_vllm_in_this_process(engine, policy):
    """Each is a function of its prompt and its seed, whatever else is in the batch, and ends in the same way."""
    sampling = SamplingParams(temperature=0.8, max_tokens=40, stop_token_ids=(9, 999))
    found = engine.generate(PROMPTS, sampling, SEEDS)
    inside = vllm_engine()
    inside.setup(spec_of(policy[1]))
    inside.load_weights(weights_of(policy[1]))
    expected = inside.generate(PROMPTS, sampling, SEEDS)
    inside.close()
    assert tokens_of(found) == tokens_of(expected)
    reasons = [[sample.finish_reason for sample in samples] for samples in found]
    assert reasons == [[sample.finish_reason for sample in samples] for samples in expected]
    assert largest_difference(policy[1], PROMPTS, found, 0.8) < EXACT


def test_every_stop_token_ends_a_response_and_is_its_last_token(engine, policy):
    stops = (2, 9, 17)
    sampling = SamplingParams(max_tokens=60, stop_token_ids=(*stops, 10**6))
    generated = engine.generate(PROMPTS, sampling, [[*range(8)] for _ in PROMPTS])
    reasons = set()
    for sample in (sample for samples in generated for sample in samples):
        reasons.add(sample.finish_reason)
        ends = [token in (*stops, 1, 2, 3) for token in sample.token_ids]
        assert not any(ends[:-1])
        assert ends[-1] == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.token_ids) == 60
    assert reasons == {"stop", "length"}
    assert largest_difference(policy[1], PROMPTS, generated) < EXACT


def test_log_probs_are_those_of_the_distribution_sampled_from(engine, policy):
    for temperature in (0.5, 1.7):
        sampling = SamplingParams(temperature=temperature, max_tokens=20)
        generated = engine.generate(PROMPTS, sampling, SEEDS)
        assert largest_difference(policy[1], PROMPTS, generated, temperature) < EXACT
    greedy = engine.generate([[5, 9]], SamplingParams(temperature=1.0, top_k=1, max_tokens=5), [[1, 2]])[0]
    assert greedy[0].token_ids == greedy[1].token_ids
    assert greedy[0].logp == (0.0,) * 5


def test_a_deadline_aborts_what_is_left_and_the_next_sync_works(engine, policy, monkeypatch):
    """It passes when a first response has come; what it cuts off must not keep the prefix cache."""
    real = asyncio.wait

    async def wait(waits: Any, timeout: float | None, return_when: str) -> Any:
        if timeout != 500:
            return await real(waits, timeout=timeout, return_when=return_when)
        pending = len(asyncio.all_tasks())
        while len(asyncio.all_tasks()) >= pending:
            await asyncio.sleep(0.001)
        return None

    with monkeypatch.context() as patch:
        patch.setattr(vllm_http.asyncio, "wait", wait)
        patch.setattr(engine, "deadline_s", 500)
        sampling = SamplingParams(max_tokens=200)
        cut = engine.generate([[5], [6]], sampling, [[1], [*range(100)]])
    reasons = [sample.finish_reason for samples in cut for sample in samples]
    assert "deadline" in reasons
    assert set(reasons) - {"deadline"}
    engine.load_weights(weights_of(policy[1]))
    assert difference(engine, policy[1]) < EXACT


class TestWeightCheck:
    @pytest.fixture
    def checked(self, engine, model) -> tuple[VLLMServerEngine, Provider, WeightVerifier]:
        """After one sound sync."""
        provider = Provider(model)
        verifier = WeightVerifier(WeightCheck(), engine, provider, seed=11)
        engine.load_weights(provider.named_full_weights())
        assert verifier.verify()["sync/logp_difference_max"] < EXACT
        provider.step()
        return engine, provider, verifier

    def refused(self, checked, match: str) -> None:
        engine, provider, verifier = checked
        engine.load_weights(provider.named_full_weights())
        with pytest.raises(WeightSyncError, match=match):
            verifier.verify()

    def test_passes_after_every_sync(self, checked):
        engine, provider, verifier = checked
        for _ in range(3):
            engine.load_weights(provider.named_full_weights())
            assert verifier.verify()["sync/logp_difference_max"] < EXACT
            provider.step()

    def test_notices_that_nothing_was_handed_over(self, checked, monkeypatch):
        monkeypatch.setattr(checked[0], "_hand_over", lambda *_: None)
        self.refused(checked, "sync did not reach the engine")

    def test_notices_a_stale_head(self, checked, monkeypatch):
        """vLLM takes files without it, and keeps the old one. The search for the cause sends parts, which arrive."""
        real = engine_module.write_weights

        def write(weights: Any, *rest: Any) -> None:
            given = dict(weights)
            if len(given) > 20:
                del given["lm_head.weight"]
            real(given.items(), *rest)

        monkeypatch.setattr(engine_module, "write_weights", write)
        self.refused(checked, r"stale weights in the engine.*: head.*output head is tied")

    def test_notices_cached_prefixes_of_the_old_weights(self, checked, monkeypatch):
        client = checked[0]._client
        real = client.ask
        fake = lambda asked, *rest: [{"success": True}] if "reset" in asked[0].path else real(asked, *rest)  # noqa: E731
        monkeypatch.setattr(client, "ask", fake)
        self.refused(checked, "prefix cache was not reset")


@pytest.mark.parametrize(("name", "size"), [("untied", 64), ("tied", 61)])
def test_a_policy_with_another_vocabulary_is_refused_at_the_start(server, name, size):
    """The server's has 63 tokens; it dies of the token 63 in a prompt."""
    engine = VLLMServerEngine(server[0])
    with pytest.raises(ConfigError, match=rf"its model lacks the policy's {size} tokens: start it with the policy's"):
        engine.setup(spec_of(tiny_model(name)))


def test_another_shape_is_refused_before_it_breaks_the_server(server, policy):
    spec = spec_of(deepcopy(policy[1]))
    spec.config.intermediate_size += 32
    with pytest.raises(ConfigError, match=r"6 of its weights are not the policy's, e\.g\. model\.layers\.0\.mlp"):
        VLLMServerEngine(server[0]).setup(spec)


def test_two_ranks_that_share_the_server_train_and_evaluate_as_one_process_does(tmp_path, policy, server):
    """With the check after every sync."""
    engine = f"{{class_path: VLLMServerEngine, init_args: {{url: '{server[0]}'}}}}"
    faulthandler.dump_traceback_later(400, exit=True)
    weights, responses = train(tmp_path / "one", policy[0], engine, 1, None)
    start = load_file(policy[0] / "model.safetensors")
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-3
    two, others = train(tmp_path / "two", policy[0], engine, 2, "fsdp2")
    assert max((weights[name] - two[name]).abs().max() for name in weights) < 1e-4
    assert others == responses


def test_the_death_of_its_engine_in_the_middle_of_a_rollout(engine, policy, server):
    """The last test: nothing answers after it."""
    loop = engine._client._loop
    (core,) = (child for child in server[1].children(recursive=True) if "EngineCore" in child.name())

    def kill() -> None:
        while len(asyncio.all_tasks(loop)) < 50:
            time.sleep(0.001)
        core.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(RolloutError, match=r"was lost while generating: .*--ckpt_path last continues"):
        engine.generate([[5]], SamplingParams(max_tokens=500), [[*range(200)]])
    thread.join()
    with pytest.raises(RolloutError, match="was lost while loading the weights"):
        engine.load_weights(weights_of(policy[1]))
