"""Streams that never raise, so that printing cannot end a run: output that cannot be written is lost.

The reader of a pipe may go away (``| head``), or a terminal; the disk behind a redirection may fill up; a stream may be
closed (``>&-``), lack characters for the text, or be the user's own object. Both of the process's streams are therefore
replaced once, when it starts. Imports only the standard library, as it runs first.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

BROKEN_PIPE = 128 + getattr(signal, "SIGPIPE", 13)
"""Exit code, as shells define it, of a command whose reader has closed the pipe."""
PATIENCE_S = 1.0
"""Longest wait in seconds for the slow reader of a non-blocking stream (``O_NONBLOCK``)."""
_NAMES = ("stdout", "stderr")


class SafeStream(io.TextIOBase):
    """Writes to a text stream, and ignores its errors.

    Args:
        stream: anything with ``write``; None, Python's value for a closed descriptor, discards everything.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.lost: OSError | None = None
        """The first error that lost output."""

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() takes text, not {type(text).__name__}")
        if self.stream is not None:
            try:
                self._try(self.stream.write, text)
            except UnicodeError:
                encoding = self.encoding or "ascii"
                self._try(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(getattr(self.stream, "flush", None))

    def close(self) -> None:
        """Only flush: the rest of the process prints, too."""
        self.flush()

    def _try(self, call: Any, *arguments: Any) -> None:
        if call is None:
            return
        try:
            call(*arguments)
        except UnicodeError:
            if arguments:
                raise
        except BlockingIOError:
            with suppress(Exception):
                select.select([], [self.stream], [], PATIENCE_S)
                self.stream.flush()
        except OSError as error:
            self.lost = self.lost or error
        except Exception:  # a closed stream, or an error in the user's own: neither ends a run
            pass

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        try:
            return bool(self.stream.isatty())
        except Exception:
            return False

    def fileno(self) -> int:
        try:
            return int(self.stream.fileno())
        except Exception as error:
            raise io.UnsupportedOperation("this stream has no descriptor") from error

    @property
    def buffer(self) -> SafeBytes:
        return SafeBytes(self, self.stream.buffer)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # not set yet, as while copying
            raise AttributeError(name)
        return getattr(self.stream, name)


class SafeBytes:
    """The binary buffer of a :class:`SafeStream`, which ignores errors, too."""

    def __init__(self, stream: SafeStream, buffer: Any) -> None:
        self._stream, self._buffer = stream, buffer

    def write(self, content: Any) -> int:
        self._stream._try(self._buffer.write, content)
        return memoryview(content).nbytes

    def flush(self) -> None:
        self._stream._try(self._buffer.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)


def protect() -> None:
    """Replace this process's streams permanently. Idempotent."""
    _open_missing_descriptors()
    for name in _NAMES:
        before = getattr(sys, name)
        if isinstance(before, SafeStream):
            continue
        safe = SafeStream(before)
        setattr(sys, name, safe)
        if getattr(sys, f"__{name}__") is before:
            setattr(sys, f"__{name}__", safe)


@contextmanager
def protected() -> Iterator[None]:
    """Replace the streams only while a command runs that was called from Python."""
    before = {name: getattr(sys, name) for name in _NAMES if not isinstance(getattr(sys, name), SafeStream)}
    inside = {name: SafeStream(stream) for name, stream in before.items()}
    for name, stream in inside.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in inside.items():
            stream.flush()
            if getattr(sys, name) is stream:
                setattr(sys, name, before[name])


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; None, a closed one, is not."""
    return SafeStream(stream).isatty()


def tell(text: str) -> None:
    """Write a line to stderr, if possible."""
    with suppress(Exception):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def tell_now(text: str) -> None:
    """Write a line to stderr from a signal handler, which may have interrupted another ``write``."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def check_delivered() -> None:
    """End a command whose result is its output with an error code if any output was lost."""
    sys.stdout.flush()
    lost = sys.stdout.lost if isinstance(sys.stdout, SafeStream) else None
    if lost is None:
        return
    if lost.errno == errno.EPIPE:  # the reader has enough, like ``| head``
        raise SystemExit(BROKEN_PIPE)
    tell(f"error: standard output: {lost.strerror} - what this command prints is not complete")
    raise SystemExit(2)


def _open_missing_descriptors() -> None:
    """Open descriptors 0, 1 and 2 if closed: the next opened file, say a checkpoint, would get that number, and
    whatever prints without Python would write into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
