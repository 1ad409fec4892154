"""Requests to a vLLM server: many at a time, none of them repeated, and all ended when the server dies.

Generation takes as long as it takes, so no time limit tells a busy server from a dead one. Instead ``/health`` is asked
alongside, and everything fails once it does not answer in time.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

HEALTH_EVERY_S = 2.0
"""Pause between two questions for the server's health."""
KEEPALIVE_S = 1.0
"""How long an idle connection is used again. vLLM closes those that were idle for 5 s, perhaps as a request arrives."""
API_KEY = "VLLM_API_KEY"
"""The environment variable in which ``vllm serve`` takes its key, and in which it is looked up here."""


class ServerLost(Exception):
    """The server cannot be reached, does not answer, or reports that its engine is dead."""


class ServerRefused(Exception):
    """The server answered with an error; ``status`` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Request(NamedTuple):
    method: str
    path: str
    body: Mapping[str, Any] | None = None


class ServerClient:
    """A vLLM server at ``url``, and at no other address: redirects and proxies are not followed.

    Its event loop runs in a thread of its own, so that a signal reaches the main thread at once, and so that it works
    where another loop is running (in notebooks).

    Args:
        connections: requests sent at the same time; the others wait.
        timeout_s: how long the server may take to accept a connection, and to answer what needs no computing.
    """

    def __init__(self, url: str, connections: int, timeout_s: float) -> None:
        self.url, self.connections, self.timeout_s = url, connections, timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-server", daemon=True)
        self._thread.start()

    def ask(self, requests: Sequence[Request], deadline_s: float | None = None) -> list[Any]:
        """The JSON answers in order; None for those that have no content, or that the deadline cut off.

        Raises:
            ServerLost: the server cannot be reached, died, or does not answer ``/health`` any more.
            ServerRefused: the first error among the answers; the other requests are cancelled, and so aborted there.
        """
        future = asyncio.run_coroutine_threadsafe(self._ask_all(requests, deadline_s), self._loop)
        try:
            return future.result()
        except BaseException:  # also Ctrl-C: the server must not go on with what no client reads
            future.cancel()
            raise

    def close(self) -> None:
        """End all requests and the thread."""
        asyncio.run_coroutine_threadsafe(_all_cancelled(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _ask_all(self, requests: Sequence[Request], deadline_s: float | None) -> list[Any]:
        import aiohttp

        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)  # limited by turns
        key = os.environ.get(API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            turns = asyncio.Semaphore(self.connections)
            tasks = [asyncio.create_task(self._answer(session, request, turns)) for request in requests]
            watch = asyncio.create_task(self._watch(session))
            try:
                await self._finished(tasks, watch, deadline_s)
                return [task.result() if task.done() else None for task in tasks]
            finally:
                await _cancelled([*tasks, watch])

    async def _finished(self, tasks: Sequence[asyncio.Task], watch: asyncio.Task, deadline_s: float | None) -> None:
        """Wait until all tasks are done or the deadline has passed; raises the first error of a task or the watch."""
        everything = asyncio.gather(*tasks)
        await asyncio.wait({everything, watch}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        for done in (everything, watch):
            if done.done():
                done.result()

    async def _answer(
        self, session: Any, request: Request, turns: asyncio.Semaphore, limit_s: float | None = None
    ) -> Any:
        """The answer to one request, which has ``limit_s`` seconds (None: any time) from when its turn comes."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=self.timeout_s)
        method, path, body = request
        async with turns:
            with _lost(self.url, self.timeout_s):
                async with session.request(
                    method, self.url + path, json=body, timeout=timeout, allow_redirects=False
                ) as answer:
                    status, content = answer.status, await answer.read()
        return _read(status, content)

    async def _watch(self, session: Any) -> None:
        """Ask for the server's health again and again; never returns, and raises when the server is lost."""
        own_turn = asyncio.Semaphore()
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            try:
                await self._answer(session, Request("GET", "/health"), own_turn, self.timeout_s)
            except ServerRefused as error:
                if error.status == 503:
                    raise ServerLost("its engine is dead, says its /health") from error


@contextmanager
def _lost(url: str, timeout_s: float) -> Iterator[None]:
    """Connection errors as :class:`ServerLost`, in plain words."""
    import aiohttp

    try:
        yield
    except TimeoutError as error:
        raise ServerLost(f"no answer within {timeout_s:g} s") from error
    except aiohttp.ClientConnectorError as error:
        raise ServerLost(f"nothing accepts connections at {url} ({error.os_error.strerror or error})") from error
    except aiohttp.ClientError as error:
        raise ServerLost(f"the connection broke ({error or type(error).__name__})") from error


def _read(status: int, content: bytes) -> Any:
    """The JSON of an answer, if it has any; raises what an error status means."""
    try:
        answer = json.loads(content) if content else None
    except ValueError:
        answer = content.decode(errors="replace")
    if status == 200:
        return answer
    error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
    message = str(error.get("message", error) if isinstance(error, dict) else error)
    if status == 500 and "EngineCore encountered an issue" in message:  # EngineDeadError, as it reaches a client
        raise ServerLost("its engine is dead")
    raise ServerRefused(status, message)


async def _cancelled(tasks: Sequence[asyncio.Task]) -> None:
    """Cancel tasks and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _all_cancelled() -> None:
    await _cancelled([task for task in asyncio.all_tasks() if task is not asyncio.current_task()])
