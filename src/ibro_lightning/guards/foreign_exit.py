"""Detects ``sys.exit`` in a class that a recipe names, or in what it calls, which must not end a run successfully."""

from __future__ import annotations

import traceback

ALLOWED = {"ibro_lightning", "argparse", "jsonargparse", "lightning", "lightning_fabric", "pytorch_lightning", "torch"}
"""Packages whose ``SystemExit`` may end the process: command lines, and ends of a run that are reported elsewhere."""


def foreign_exit(end: BaseException) -> str | None:
    """Who raised ``SystemExit`` or the like, and where, in one line; None for an allowed package, and for Ctrl-C."""
    if isinstance(end, KeyboardInterrupt):
        return None
    frames = [
        frame for frame, _ in traceback.walk_tb(end.__traceback__) if frame.f_globals.get("__name__") != "_sitebuiltins"
    ]
    allowed = [str(frame.f_globals.get("__name__")).split(".")[0] in ALLOWED for frame in frames]
    if not any(allowed) or allowed[-1]:
        return None
    # The first frame after the last allowed one: the user recognises it, even if it called a library.
    first = frames[len(allowed) - allowed[::-1].index(True)]
    where = f"{first.f_code.co_qualname} ({first.f_code.co_filename}:{first.f_lineno})"
    text = f"{type(end).__name__}: {end}" if str(end) else type(end).__name__
    return f"{where} raised {text} - code that a recipe names must not end the process: raise an error that says why"
