"""Files are written whole or not at all; a full disk is said in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Ending of files that are being written."""
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files may not be that large",
}
# How libraries say it that keep no errno: safetensors (Rust), arrow; and torch.save, which only knows that it failed.
_SAID = re.compile(r"No space left on device|Disk quota exceeded|File too large|os error (?:28|122|27)\b")
_UNSAID = re.compile(r"PytorchStreamWriter failed|iostream error|inline_container\.cc.*unexpected pos")


class DiskFullError(RuntimeError):
    """A file cannot be written. Says which one, how much room there is, and how to go on."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write ``path`` under; it gets its own once it is complete and on the disk. If that fails, nothing of it
    is left, and what was there before is as it was.

    Raises:
        DiskFullError: there is no room for it.
    """
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _to_disk(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Says in one line that there is no room for ``path`` (a file or a folder), if that is why writing it fails.

    Raises:
        DiskFullError: in place of what the operating system or a library said.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if (full := as_disk_full(error, path)) is None:
            raise
        raise full from error


def as_disk_full(error: BaseException | None, path: Path) -> DiskFullError | None:
    """The same in one line, if ``error``, or one that it came from, says that there is no room; None for any other.

    Args:
        path: what was being written, as far as one knows. An error that names a file knows better.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, DiskFullError):
            return error
        if why := _reason(error):
            named = getattr(error, "filename", None)
            return DiskFullError(_message(Path(named) if isinstance(named, str) else path, why))
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _reason(error: BaseException) -> str | None:
    """Why there is no room, or None if that is not what the error is about."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{_FULL[error.errno]} ({os.strerror(error.errno)})"
    if isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError":
        text = str(error)
        if _UNSAID.search(text):
            return "writing failed, most likely as the disk is full"
        return f"writing failed ({' '.join(text.split())[:120]})" if _SAID.search(text) else None
    return None


def _message(path: Path, why: str) -> str:
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        free = f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free there"
    except OSError:
        free = "its file system does not answer"
    return (
        f"{path.name.removesuffix(PARTIAL)} cannot be written to {folder}: {why}; {free}. What was written before is "
        "whole: make room, then go on from the newest checkpoint with --ckpt_path last"
    )


def _to_disk(path: Path) -> None:
    """Network file systems and quotas may find out only now that there is no room."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
