"""Atomic file writes, free names, and a full disk as an error of one line."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ibro_lightning.errors import UserError, causes

PARTIAL = ".partial"
"""Suffix of files that are being written."""
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files may not be that large",
}
# Messages of libraries without an errno: safetensors (Rust) and arrow; and torch.save, which gives no reason.
_EXPLICIT = re.compile(r"No space left on device|Disk quota exceeded|File too large|os error (?:28|122|27)\b")
_LIKELY = re.compile(r"PytorchStreamWriter failed|iostream error|inline_container\.cc.*unexpected pos")


class DiskFullError(UserError, RuntimeError):
    """A file cannot be written as the disk is full; names the file, the free space, and how to resume."""


@contextmanager
def written_atomically(path: Path, under: Path | None = None) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path, which is synced and renamed to ``path`` in the end. On an error
    the temporary file is removed, and an earlier ``path`` is unchanged.

    Args:
        under: another temporary path, where several processes may write the same file.

    Raises:
        DiskFullError: the disk is full.
    """
    partial = under or path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            to_disk(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Any) -> Path:
    """Write JSON with :func:`written_atomically`."""
    with written_atomically(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
    return path


def free_name(path: Path, *suffixes: str) -> Path:
    """``path`` with the first number for which neither it nor it with any of the suffixes exists, such as
    ``runs/quickstart.1``."""
    number, taken = 1, os.path.lexists
    while any(taken(path.with_name(f"{path.name}.{number}{suffix}")) for suffix in ("", PARTIAL, *suffixes)):
        number += 1
    return path.with_name(f"{path.name}.{number}")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Context for writing ``path`` (a file or a folder) that raises :class:`DiskFullError` in place of the operating
    system's or a library's error."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if (full := as_disk_full(error, path)) is None:
            raise
        raise full from error


def as_disk_full(error: BaseException | None, path: Path) -> DiskFullError | None:
    """The :class:`DiskFullError` for ``error``, if it or one of its causes means that the disk is full; otherwise None.
    It names ``path`` unless the error names a file."""
    for cause in causes(error):
        if isinstance(cause, DiskFullError):
            return cause
        if why := _reason(cause):
            named = getattr(cause, "filename", None)
            return DiskFullError(_message(Path(named) if isinstance(named, str) else path, why))
    return None


def _reason(error: BaseException) -> str | None:
    """How the disk is full, or None if the error has another meaning."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{_FULL[error.errno]} ({os.strerror(error.errno)})"
    if isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError":
        text = str(error)
        if _LIKELY.search(text):
            return "writing failed, most likely as the disk is full"
        return f"writing failed ({' '.join(text.split())[:120]})" if _EXPLICIT.search(text) else None
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
        "intact: free some space, then resume with --ckpt_path last"
    )


def to_disk(path: Path) -> None:
    """Sync a file, or a folder's list of names, so that it survives a power failure. Network file systems and quotas
    may report a full disk only here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system syncs folders
            raise
    finally:
        os.close(descriptor)
