"""Entry point of the command line: runs the command, and handles output and exit.

A command imports what it needs and no more: ``compare`` and ``report``, and the help of ``export``, need no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ibro_lightning.cli.commands import answer, export_parser
from ibro_lightning.guards import interruption, printing, signals
from ibro_lightning.guards.endings import ended
from ibro_lightning.runs.recipes import resolve_configs
from ibro_lightning.studies.extras import extra_packages

PRINTING = ("compare", "report", "export", "verify", "doctor")
"""Commands whose result is what they print."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ibro_lightning``; ``args`` as on the command line.

    Raises:
        SystemExit: with the exit code of ``docs/endings.md``, unless that is 0.
    """
    argv = list(sys.argv[1:] if args is None else args)
    interruption.clear()
    with printing.protected(), ended(), signals.raised():
        signals.end_with_launcher()
        if (text := answer(argv)) is not None:
            print(text)
        else:
            command(argv)(argv)
        if text is not None or argv[0] in PRINTING:
            printing.check_delivered()


def command(argv: Sequence[str]) -> Callable[[Sequence[str]], None]:
    """The function that runs the command in ``argv[0]``, with what it needs imported."""
    with importing():
        if argv[0] == "compare":
            from ibro_lightning.evaluation.compare import main as compare

            return lambda argv: compare(argv[1:])
        if argv[0] == "study":
            with extra_packages():
                from ibro_lightning.cli.study import main as study

            return lambda argv: study(argv[1:])
        if argv[0] == "report":
            from ibro_lightning.studies.report.command import main as report

            return lambda argv: report(argv[1:])
        if argv[0] == "export":
            return _export
        if argv[0] == "verify":
            return _verify
        if argv[0] == "doctor":
            return _doctor
        from ibro_lightning.cli.run import main as run

        return run


def _verify(argv: Sequence[str]) -> None:
    from ibro_lightning.cli.verify import main as verify

    if not verify(argv[1:]):
        raise SystemExit(1)


def _doctor(argv: Sequence[str]) -> None:
    from ibro_lightning.cli.doctor import main as doctor

    if not doctor(argv[1:]):
        raise SystemExit(1)


def _export(argv: Sequence[str]) -> None:
    arguments = resolve_configs(argv[1:])
    export_parser().parse_args(arguments)  # --help and mistakes are answered before the imports, which take seconds
    with importing():
        from ibro_lightning.cli.export import main as export
    export(arguments)


@contextmanager
def importing() -> Iterator[None]:
    """Context of imports: ends with a line that says what the installation lacks."""
    try:
        yield
    except ModuleNotFoundError as error:
        printing.tell(f"error: the Python package {error.name} is missing: pip install . installs all that is needed")
        raise SystemExit(2) from error
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        printing.tell("error: the installed packages are incompatible: see the traceback above, and pip check")
        raise SystemExit(1) from error
